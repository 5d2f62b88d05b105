"""The Square attack: random search by squares, without gradients, in l_inf, l_2 and l_1.

Andriushchenko et al. 2020, arXiv 1912.00049; the l_1 form and the schedule are those of the
authors' AutoAttack code.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gfa_jax import _validate, losses, norms
from gfa_jax.attacks import base, chunks
from gfa_jax.attacks.estimators import Model, fold_in
from gfa_jax.attacks.runs import Attack, Found, Problem, goal_of
from gfa_jax.threat import ThreatModel
from gfa_jax.types import Array

WINDOWS = ("per_example", "shared")
_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
_QUERIES_TO_SORTING = 20
"""Queries after which chunks are formed anew: often enough for few broken examples in them, rarely
enough for moving examples to cost little."""
_TINY = 1e-12
_START = 2**31 - 1
"""The key index of the starting point, which no query uses."""


class Draw(NamedTuple):
    """The random numbers of one query, one entry for each example.

    Attributes:
      corners: uniform in [0, 1), ``[B, 2, 2]``: row and column of two windows (l_inf uses one).
      signs: -1 or 1, ``[B, C]``: one for each channel.
      flip: bool ``[B]``, whether the pattern is transposed (l_2 and l_1).
    """

    corners: Array
    signs: Array
    flip: Array


DrawFn = Callable[[Array, Array, int], Draw]
"""``(keys [B] of this run, query number, channels) -> Draw``."""


def square(
    threat: ThreatModel,
    *,
    num_queries: int = 5000,
    p_init: float = 0.8,
    num_restarts: int = 1,
    random_start: bool = True,
    window: str = "per_example",
    rescale_schedule: bool = False,
    chunk_size: int | None = None,
) -> Attack:
    """Random search: squares of the perturbation change where that raises the margin loss.

    No gradient is used, so that a gain over gradient attacks is a sign of masked gradients. Given
    targets, it is a targeted attack.

    Args:
      threat: norm and radius.
      num_queries: squares tried after the start; it ends early once all examples are broken.
      p_init: share of the image that the first squares cover, in (0, 1]; it halves after 10, 50,
        200, 500, 1000, 2000, 4000, 6000 and 8000 queries.
      num_restarts: runs with new draws.
      random_start: start with random stripes (l_inf) or tiles at the ball's surface; otherwise at
        the clean input.
      window: ``per_example``: every example draws its own squares, anywhere in the image.
        ``shared``: as in AutoAttack's code, all examples draw the same squares (here from a key of
        their own, so that they do not depend on the batch either), and never in the last row or
        column.
      rescale_schedule: whether the halvings are scaled from 10,000 queries to ``num_queries``.
      chunk_size: the model sees so many examples at once, and broken ones soon no more, which saves
        most of the work where many break early; the results are the same. By default all examples
        are evaluated at every query, which suits a batch that is spread over devices.

    Returns:
      The attack, for images ``[B, H, W, C]``. ``num_forwards`` counts queries until success.

    Raises:
      ValueError: for options out of range; at the call, for inputs that are not images.
    """
    _validate.one_of(WINDOWS, window=window)
    shared = window == "shared"

    def draw(keys: Array, number: Array, num_channels: int) -> Draw:
        own = fold_in(keys, number)
        if not shared:
            return jax.vmap(lambda key: _draw(key, num_channels))(own)
        common = _draw(jax.random.fold_in(jax.random.key(0), number), num_channels)
        everyone = jax.tree.map(
            lambda leaf: jnp.broadcast_to(leaf, (len(keys), *leaf.shape)), common
        )
        if threat.norm == "linf":
            return everyone
        return everyone._replace(signs=jax.vmap(lambda key: _draw(key, num_channels))(own).signs)

    return with_draws(
        threat,
        draw,
        num_queries=num_queries,
        p_init=p_init,
        num_restarts=num_restarts,
        random_start=random_start,
        rescale_schedule=rescale_schedule,
        chunk_size=chunk_size,
        last_corner=not shared,
    )


def _draw(key: Array, num_channels: int) -> Draw:
    # One draw for all: keys cost more than numbers.
    uniform = jax.random.uniform(key, (5 + num_channels,))
    return Draw(
        corners=uniform[:4].reshape(2, 2),
        signs=jnp.where(uniform[5:] < 0.5, -1.0, 1.0),
        flip=uniform[4] < 0.5,
    )


class _Examples(NamedTuple):
    """Examples and what the search knows of them; all fields have the batch axis.

    Attributes:
      keys: of this run.
      inputs: clean images.
      labels: the true classes.
      targets: the target classes of a targeted attack, or ``None``.
      active: whether to attack.
      points: the best images so far.
      loss: the loss there.
      success: whether the goal is reached there; then the search is over.
      num_queries: model evaluations until then.
    """

    keys: Array
    inputs: Array
    labels: Array
    targets: Array | None
    active: Array
    points: Array
    loss: Array
    success: Array
    num_queries: Array

    @property
    def is_done(self) -> Array:
        """Returns whether there is nothing left to do, bool ``[B]``."""
        return self.success | ~self.active

    def query(self, model: Model, points: Array) -> "_Examples":
        """Evaluates new points and moves where the loss rises or the goal is reached."""
        logits = model(points)
        if self.targets is None:
            reached = base.is_misclassified(logits, self.labels)
            loss = losses.margin(logits, self.labels).astype(jnp.float32)
        else:
            reached = ~base.is_misclassified(logits, self.targets)
            loss = -losses.margin(logits, self.targets).astype(jnp.float32)
        going = ~self.is_done
        accepted = going & ((loss > self.loss) | reached)
        return self._replace(
            points=jnp.where(norms.expand(accepted, points), points, self.points),
            loss=jnp.where(going, jnp.maximum(self.loss, loss), self.loss),
            success=self.success | (going & reached),
            num_queries=self.num_queries + going,
        )


def with_draws(
    threat: ThreatModel,
    draw: DrawFn,
    *,
    num_queries: int,
    p_init: float,
    num_restarts: int,
    random_start: bool,
    rescale_schedule: bool,
    chunk_size: int | None,
    last_corner: bool,
) -> Attack:
    """The attack on given random numbers; for the other arguments see ``square``."""
    _validate.positive_integer(num_queries=num_queries, num_restarts=num_restarts)
    if chunk_size is not None:
        _validate.positive_integer(chunk_size=chunk_size)
    _validate.positive(p_init=p_init)
    _validate.fraction(p_init=p_init)

    def run(
        model: Model, keys: Array | None, problem: Problem, goal: base.Goal, index: int | Array
    ) -> Found:
        inputs = problem.inputs
        if inputs.ndim != 4:
            raise ValueError(f"inputs have shape {inputs.shape}; Square needs images [B, H, W, C].")
        assert keys is not None
        size, height, width, channels = inputs.shape
        schedule = _sides(num_queries, p_init, height, width, rescale_schedule, threat.norm)
        levels = np.unique(schedule)
        level_of, sides = jnp.asarray(np.searchsorted(levels, schedule)), jnp.asarray(schedule)
        patterns = None
        if threat.norm != "linf":
            patterns = jnp.asarray(_padded_patterns(levels, threat.norm), inputs.dtype)

        def try_square(number: Array, some: _Examples) -> _Examples:
            """One query for some of the examples."""
            drawn = draw(some.keys, number, channels)
            side = sides[number]
            if patterns is None:
                points = _linf_step(threat, some.inputs, some.points, drawn, side, last_corner)
            else:
                pattern = patterns[level_of[number]]
                points = _lp_step(
                    threat, some.inputs, some.points, drawn, side, pattern, last_corner
                )
            return some.query(model, points)

        start = problem.start
        if start is None and random_start:
            start = _start(threat, fold_in(keys, _START), inputs)
        elif start is None:
            start = inputs
        none = jnp.zeros(size, jnp.int32)
        first = _Examples(
            keys=keys,
            inputs=inputs,
            labels=problem.labels,
            targets=problem.targets,
            active=problem.active,
            points=inputs,
            loss=jnp.full(size, -jnp.inf, jnp.float32),
            success=none > 0,
            num_queries=none,
        ).query(model, start)
        last = chunks.loop(
            try_square,
            first,
            lambda some: ~some.is_done,
            num_steps=num_queries,
            chunk_size=chunk_size,
            steps_between=_QUERIES_TO_SORTING,
        )
        return Found(last.points, last.success, last.loss, last.num_queries, none, none)

    return Attack(threat, goal_of("margin"), run, num_restarts=num_restarts, draws_steps=True)


def _sides(
    num_queries: int, p_init: float, height: int, width: int, rescale: bool, norm: str
) -> np.ndarray:
    """Returns the side of the square of each query, int32 ``[num_queries]``."""
    numbers = np.arange(num_queries)
    if rescale:
        numbers = (numbers / num_queries * 10_000).astype(int)
    num_halvings = (np.asarray(_HALVINGS)[None] < numbers[:, None]).sum(axis=1)
    # np.rint rounds halves to even, as Python does.
    sides = np.rint(np.sqrt(p_init / 2.0**num_halvings * height * width)).astype(np.int32)
    if norm != "linf":
        # Bumps need a centre: odd sides from 3.
        sides = np.maximum(sides, 3)
        sides += 1 - sides % 2
    return np.clip(sides, 1, min(height, width)).astype(np.int32)


def _window(
    uniform: Array, side: Array, height: int, width: int, last_corner: bool
) -> tuple[Array, Array, Array]:
    """Returns the mask ``[B, H, W]`` of one window for each example, and its corner ``[B, 1]`` x 2.

    Args:
      uniform: ``[B, 2]`` in [0, 1).
      side: of the window.
      height: of the image.
      width: of the image.
      last_corner: whether the window may touch the last row and column.
    """
    room = jnp.stack([height - side, width - side]) + int(last_corner)
    corner = jnp.floor(uniform * room[None]).astype(jnp.int32)
    # Where the window is the whole image, or a uniform number rounds up to 1.
    corner = jnp.clip(corner, 0, jnp.stack([height - side, width - side])[None])
    rows, columns = corner[:, :1], corner[:, 1:]
    in_rows = (jnp.arange(height)[None] >= rows) & (jnp.arange(height)[None] < rows + side)
    in_columns = (jnp.arange(width)[None] >= columns) & (jnp.arange(width)[None] < columns + side)
    return in_rows[:, :, None] & in_columns[:, None, :], rows, columns


def _linf_step(
    threat: ThreatModel, inputs: Array, points: Array, drawn: Draw, side: Array, last_corner: bool
) -> Array:
    """Moves one window to the face of the ball, channel by channel."""
    _, height, width, _ = inputs.shape
    mask, _, _ = _window(drawn.corners[:, 0], side, height, width, last_corner)
    # From anywhere in the ball, a move by the diameter ends at its face.
    move = 2 * threat.epsilon * drawn.signs[:, None, None, :].astype(inputs.dtype)
    return threat.project(inputs, jnp.where(mask[..., None], points + move, points))


def _lp_step(
    threat: ThreatModel,
    inputs: Array,
    points: Array,
    drawn: Draw,
    side: Array,
    pattern: Array,
    last_corner: bool,
) -> Array:
    """Moves the perturbation's mass of two windows, and what radius is left, into a bump in one.

    Args:
      threat: l_2 or l_1.
      inputs: clean images.
      points: the current images.
      drawn: the random numbers.
      side: of the windows.
      pattern: the bump, in the corner of a canvas at least as large as it.
      last_corner: as in ``_window``.
    """
    _, height, width, channels = inputs.shape
    perturbation = points - inputs
    mask, rows, columns = _window(drawn.corners[:, 0], side, height, width, last_corner)
    other_mask, _, _ = _window(drawn.corners[:, 1], side, height, width, last_corner)

    def shifted(row: Array, column: Array, flip: Array) -> Array:
        down = jnp.clip(jnp.arange(height) - row, 0, pattern.shape[0] - 1)
        right = jnp.clip(jnp.arange(width) - column, 0, pattern.shape[0] - 1)
        return jnp.where(flip, pattern[right][:, down].T, pattern[down][:, right])

    bump = jax.vmap(shifted)(rows[:, 0], columns[:, 0], drawn.flip)
    inside = mask[..., None]
    in_either = (mask | other_mask)[..., None]

    def size(values: Array) -> Array:
        """Returns the norm of each channel, ``[B, 1, 1, C]``."""
        if threat.norm == "l1":
            return jnp.sum(jnp.abs(values), axis=(1, 2), keepdims=True)
        return jnp.sqrt(jnp.sum(values * values, axis=(1, 2), keepdims=True))

    old = jnp.where(inside, perturbation, 0)
    signs = drawn.signs[:, None, None, :].astype(inputs.dtype)
    new = jnp.where(inside, bump[..., None] * signs, 0) + old / (_TINY + size(old))
    moved = size(jnp.where(in_either, perturbation, 0))
    total = norms.expand(norms.vector_norm(perturbation, threat.norm), inputs)
    if threat.norm == "l2":
        left = jnp.maximum(threat.epsilon**2 - total**2, 0) / channels
        budget = jnp.sqrt(left + moved**2)
    else:
        left = jnp.maximum(threat.epsilon - total, 0) / channels
        budget = (left + moved) * channels
    new = new / (_TINY + size(new)) * budget
    changed = jnp.where(inside, new, jnp.where(in_either, 0, perturbation))
    return _to_surface(threat, inputs, changed)


def _to_surface(threat: ThreatModel, inputs: Array, perturbation: Array) -> Array:
    """Returns allowed images: scaled to the sphere in l_2, projected in l_1."""
    if threat.norm == "l1":
        return threat.project(inputs, inputs + perturbation)
    size = norms.expand(norms.vector_norm(perturbation, "l2"), inputs)
    moved = inputs + threat.epsilon * perturbation / (_TINY + size)
    return jnp.clip(moved, *threat.bounds).astype(inputs.dtype)


def _start(threat: ThreatModel, keys: Array, inputs: Array) -> Array:
    """Returns vertical stripes at the faces of the ball (l_inf), or a grid of signed tiles."""
    _, height, width, channels = inputs.shape
    if threat.norm == "linf":
        shape: tuple[int, ...] = (1, width, channels)
        signs = jax.vmap(lambda key: jax.random.rademacher(key, shape, inputs.dtype))(keys)
        return threat.project(inputs, inputs + threat.epsilon * signs)
    side = max(1, min(height, width) // 5)
    tile = _pattern(side, threat.norm)
    counts = (height // side, width // side)
    offsets = [
        (size - count * side) // 2 for size, count in zip((height, width), counts, strict=True)
    ]
    last = [
        size - offset - count * side
        for size, offset, count in zip((height, width), offsets, counts, strict=True)
    ]
    canvas = np.pad(np.tile(tile, counts), list(zip(offsets, last, strict=True)))
    row_of, column_of = (
        np.clip((np.arange(size) - offset) // side, 0, count - 1)
        for size, offset, count in zip((height, width), offsets, counts, strict=True)
    )
    shape = (*counts, channels)
    signs = jax.vmap(lambda key: jax.random.rademacher(key, shape, inputs.dtype))(keys)
    spread = signs[:, row_of][:, :, column_of]
    perturbation = jnp.asarray(canvas, inputs.dtype)[None, :, :, None] * spread
    return _to_surface(threat, inputs, perturbation)


def _bump(height: int, width: int, norm: str) -> np.ndarray:
    """Returns a rectangle that rises to its middle, of unit norm; zeros where it is empty."""
    rows, columns = np.indices((height, width))
    from_centre = np.maximum(np.abs(rows - height // 2), np.abs(columns - width // 2))
    num_layers = max(height // 2 + 1, width // 2 + 1)
    power = 2 if norm == "l2" else 4
    # Layer k adds 1 / (k + 1)^power to everything within k of the centre.
    layers = np.arange(num_layers)
    weights = 1 / (layers + 1.0) ** power
    bump = ((layers[:, None, None] >= from_centre[None]) * weights[:, None, None]).sum(axis=0)
    size = np.linalg.norm(bump.ravel(), ord=2 if norm == "l2" else 1)
    return bump / size if size > 0 else bump


def _pattern(side: int, norm: str) -> np.ndarray:
    """Returns the square pattern of the attack: a bump above, a dip below; unit norm."""
    upper = side // 2
    pattern = np.concatenate([_bump(upper, side, norm), -_bump(side - upper, side, norm)])
    return pattern / np.linalg.norm(pattern.ravel(), ord=2 if norm == "l2" else 1)


def _padded_patterns(sides: np.ndarray, norm: str) -> np.ndarray:
    """Returns the patterns of all sides in the corner of equal canvases, ``[len(sides), S, S]``."""
    largest = int(sides.max())
    return np.stack([np.pad(_pattern(side, norm), (0, largest - side)) for side in sides.tolist()])
