"""Measurements on a model that show whether gradient attacks can be trusted on it.

Each probe is a pure function of ``(logits_fn, keys, inputs, labels, threat)``, of static options,
and returns one value for each example along the last axis. ``measure`` runs them on a fixed subset
and sums them up in plain numbers; ``diagnostics.diagnose`` judges those.

Gradients are those of the log-odds of being wrong unless said otherwise: they have the direction of
the cross-entropy's but do not vanish on confident examples, so that a saturated loss, which has
probes of its own (D10, D11, D23), is not taken for a masked gradient.

Sources: Carlini et al. 2019 (arXiv 1902.06705), Athalye et al. 2018 (arXiv 1802.00420), Pintor et
al. 2022 (arXiv 2106.09947; "indicators of attack failure"), Qin et al. 2019 (arXiv 1907.02610;
local linearity), Andriushchenko & Flammarion 2020 (arXiv 2007.02617; gradient agreement).
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from gfa_jax import _validate, losses, norms
from gfa_jax.attacks import base
from gfa_jax.attacks.estimators import fold_in
from gfa_jax.attacks.gradient import pgd
from gfa_jax.threat import ThreatModel
from gfa_jax.types import Array, LogitsFn, LossFn

Loss = str | LossFn

LAST_STEPS = 10
"""The last steps of an attack, in which its loss should not rise any more (D17)."""
RADII = (1 / 8, 1 / 2, 1.0)
"""Shares of epsilon at which gradients are compared with the clean one's (D12)."""
DIFFERENCE_STEPS = (0.01, 0.1)
"""Shares of epsilon by which finite differences step (D12)."""
DIRECTIONS = ("gradient", "random")
"""Directions of the finite differences (D12)."""
NOISE_RADIUS = 8 / 255
"""Width of the noise of the unstable predictions, for inputs in [0, 1] (Pintor et al. 2022)."""
ROUNDING = 1e-4
"""Relative differences of logits below this are rounding (AutoAttack's check of randomness)."""


@dataclasses.dataclass(frozen=True)
class Level:
    """How much ``measure`` spends.

    Attributes:
      num_steps: of the attacks that are compared by their steps (D2), rising.
      num_restarts: numbers of restarts that are compared (D9), rising.
      restart_steps: steps of each restart.
      path_steps: steps of the attack whose losses are kept (D16, D17).
      num_draws: random points for each example (D7).
      num_drawn_examples: examples at most for which they are drawn.
      num_noise: random points for the linearity of the loss (D13) and its stability (D15).
      num_compared: examples at most whose logits are compared between passes (D22).
    """

    num_steps: tuple[int, ...]
    num_restarts: tuple[int, ...]
    restart_steps: int
    path_steps: int
    num_draws: int
    num_drawn_examples: int
    num_noise: int
    num_compared: int


LEVELS = {
    "quick": Level((1, 5, 10, 20, 50), (1, 5), 20, 50, 1000, 100, 20, 64),
    "full": Level((1, 5, 10, 20, 50, 100, 200), (1, 5, 20), 50, 200, 10_000, 100, 100, 256),
}
"""The levels of ``measure`` by name."""


def _loss_at(logits_fn: LogitsFn, labels: Array, loss: Loss, points: Array) -> Array:
    return losses.get(loss)(logits_fn(points), labels).astype(jnp.float32)


def _gradient_at(logits_fn: LogitsFn, labels: Array, loss: Loss, points: Array) -> Array:
    goal = base.untargeted(losses.get(loss), labels)
    return base.evaluate(logits_fn, goal, points).gradient


def _step(
    logits_fn: LogitsFn,
    threat: ThreatModel,
    inputs: Array,
    goal: base.Goal,
    step_size: float | Array,
    points: Array,
) -> tuple[Array, base.Evaluation]:
    """Returns the points after one step of PGD, and what was found before it."""
    here = base.evaluate(logits_fn, goal, points)
    moved = points + step_size * threat.steepest_step(points, here.gradient)
    return threat.project(inputs, moved), here


def resists_steps(
    logits_fn: LogitsFn,
    keys: Array,
    inputs: Array,
    labels: Array,
    threat: ThreatModel,
    num_steps: int | Array,
    *,
    loss: Loss = "margin",
) -> Array:
    """Returns which examples resist PGD with so many steps (D2).

    All numbers of steps move by 2.5 epsilon in all, from the same random start, and count any point
    on the way, the clean one too: more steps should find no less.

    Args:
      logits_fn: the model.
      keys: typed PRNG keys ``[B]``.
      inputs: float ``[B, ...]`` within the bounds.
      labels: int ``[B]``.
      threat: ball and box.
      num_steps: >= 1; may be traced, so that one program serves all numbers.
      loss: to maximise.

    Returns:
      bool ``[B]``.
    """
    goal = base.untargeted(losses.get(loss), labels)
    step_size = 2.5 * threat.epsilon / num_steps

    def body(_: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        points, broken = carry
        points, here = _step(logits_fn, threat, inputs, goal, step_size, points)
        return points, broken | here.reached

    start = threat.random_start(keys, inputs)
    broken = goal.reached(logits_fn(inputs))
    points, broken = jax.lax.fori_loop(0, num_steps, body, (start, broken))
    return ~(broken | goal.reached(logits_fn(points)))


def loss_path(
    logits_fn: LogitsFn,
    keys: Array,
    inputs: Array,
    labels: Array,
    threat: ThreatModel,
    *,
    num_steps: int,
    loss: Loss = "log_odds",
) -> tuple[Array, Array]:
    """Returns the losses along a run of PGD, and whether they mislead the model.

    Args:
      logits_fn: the model.
      keys: typed PRNG keys ``[B]``.
      inputs: float ``[B, ...]`` within the bounds.
      labels: int ``[B]``.
      threat: ball and box.
      num_steps: steps of 2.5 epsilon in all, from a random start.
      loss: to maximise.

    Returns:
      ``(loss float32 [num_steps + 1, B], reached bool [num_steps + 1, B])``.
    """
    goal = base.untargeted(losses.get(loss), labels)
    step_size = 2.5 * threat.epsilon / num_steps

    def body(points: Array, _: None) -> tuple[Array, tuple[Array, Array]]:
        points, here = _step(logits_fn, threat, inputs, goal, step_size, points)
        return points, (here.loss, here.reached)

    start = threat.random_start(keys, inputs)
    points, (path, reached) = jax.lax.scan(body, start, length=num_steps)
    logits = logits_fn(points)
    last, last_reached = goal.loss(logits).astype(jnp.float32), goal.reached(logits)
    return (
        jnp.concatenate([path, last[None]]),
        jnp.concatenate([reached, last_reached[None]]),
    )


def late_rise(path: Array) -> Array:
    """Returns how much of the rise of a loss falls to the last steps (D17).

    The path is rescaled to [0, 1] and made cumulative; the value is what it gains in the last
    ``LAST_STEPS`` steps (Pintor et al. 2022, indicator 4). 0 for a path that is level.

    Args:
      path: float ``[K, B]``, K > ``LAST_STEPS``.

    Returns:
      ``[B]``, in [0, 1].

    Raises:
      ValueError: for a path that is too short.
    """
    if len(path) <= LAST_STEPS:
        raise ValueError(
            f"path has {len(path)} points; the rise over the last {LAST_STEPS} steps needs more."
        )
    best = jax.lax.cummax(path, axis=0)
    height = best[-1] - jnp.min(path, axis=0)
    return jnp.where(
        height > 0, (best[-1] - best[-1 - LAST_STEPS]) / jnp.where(height > 0, height, 1), 0
    )


def late_rise_on_path(
    logits_fn: LogitsFn,
    keys: Array,
    inputs: Array,
    labels: Array,
    threat: ThreatModel,
    *,
    num_steps: int,
) -> tuple[Array, Array]:
    """Returns the late rise of a run of PGD, and where it passed an adversarial point, ``[B]``.

    The latter is whether it misled the model on the way but not in the end.
    """
    path, reached = loss_path(logits_fn, keys, inputs, labels, threat, num_steps=num_steps)
    return late_rise(path), jnp.any(reached, axis=0) & ~reached[-1]


def surface_points(threat: ThreatModel, keys: Array, inputs: Array) -> Array:
    """Returns a random point on the surface of each ball, as far as the box allows.

    l_inf: a corner, which changes logits more than a uniform draw does. l_2: a uniform direction.
    l_1: a Laplace direction.

    Args:
      threat: ball and box.
      keys: typed PRNG keys ``[B]``.
      inputs: ``[B, ...]``.
    """
    shape, dtype = inputs.shape[1:], inputs.dtype

    def draw(key: Array) -> Array:
        if threat.norm == "linf":
            return jax.random.rademacher(key, shape, dtype)
        if threat.norm == "l2":
            return jax.random.normal(key, shape, dtype)
        return jax.random.laplace(key, shape, dtype)

    directions = jax.vmap(draw)(keys)
    length = norms.vector_norm(directions, threat.norm)
    unit = directions / norms.expand(jnp.where(length > 0, length, 1), directions)
    return threat.project(inputs, inputs + threat.epsilon * unit)


def _ball_points(threat: ThreatModel, keys: Array, inputs: Array, number: int | Array) -> Array:
    """Returns the random points of a number: of the surface if it is even, else of the ball."""
    keys = fold_in(keys, number)
    return jax.lax.cond(
        jnp.asarray(number) % 2 == 0,
        lambda: surface_points(threat, keys, inputs),
        lambda: threat.random_start(keys, inputs),
    )


def random_draws(
    logits_fn: LogitsFn,
    keys: Array,
    inputs: Array,
    labels: Array,
    threat: ThreatModel,
    *,
    num_draws: int,
) -> Array:
    """Returns the first of many random allowed points that misleads the model (D7).

    Points of the surface (``surface_points``) and of the ball (``ThreatModel.random_start``) take
    turns. The loop ends early when all examples are broken.

    Args:
      logits_fn: the model.
      keys: typed PRNG keys ``[B]``.
      inputs: float ``[B, ...]`` within the bounds.
      labels: int ``[B]``.
      threat: ball and box.
      num_draws: points for each example.

    Returns:
      int32 ``[B]``, the number of the draw from 0, or -1 where none misled.
    """

    def proceeds(carry: tuple[Array, Array]) -> Array:
        number, first = carry
        return (number < num_draws) & jnp.any(first < 0)

    def body(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        number, first = carry
        wrong = base.is_misclassified(logits_fn(_ball_points(threat, keys, inputs, number)), labels)
        return number + 1, jnp.where((first < 0) & wrong, number, first)

    none = jnp.full(labels.shape, -1, jnp.int32)
    return jax.lax.while_loop(proceeds, body, (jnp.zeros((), jnp.int32), none))[1]


def restarts(
    logits_fn: LogitsFn,
    keys: Array,
    inputs: Array,
    labels: Array,
    threat: ThreatModel,
    *,
    num_restarts: int,
    num_steps: int = 20,
    loss: Loss = "margin",
) -> tuple[Array, Array]:
    """Returns which restarts of PGD break an example (D9), and where they say so wrongly (D16).

    An attack is wrong where its ``success`` is not what a new pass at ``adv_inputs`` shows, by more
    than rounding.

    Args:
      logits_fn: the model.
      keys: typed PRNG keys ``[B]``.
      inputs: float ``[B, ...]`` within the bounds.
      labels: int ``[B]``.
      threat: ball and box.
      num_restarts: independent random starts.
      num_steps: of each.
      loss: to maximise.

    Returns:
      ``(success bool [num_restarts, B], wrong bool [num_restarts, B])``.
    """
    attack = pgd(threat, loss=loss, num_steps=num_steps, num_restarts=num_restarts)

    def make(index: Array) -> tuple[Array, Array]:
        result = attack(logits_fn, keys, inputs, labels, run=index)
        logits = logits_fn(result.adv_inputs)
        return result.success, contradicts(logits, labels, result.success)

    return jax.lax.map(make, jnp.arange(num_restarts))


def contradicts(logits: Array, labels: Array, success: Array) -> Array:
    """Returns where logits do not show what an attack claims about them, by more than rounding.

    Args:
      logits: ``[B, C]`` at the points that an attack returned.
      labels: int ``[B]``.
      success: bool ``[B]``, what it claimed.

    Returns:
      bool ``[B]``.
    """
    decided = jnp.abs(losses.margin(logits, labels)) > ROUNDING * jnp.max(jnp.abs(logits), axis=1)
    return (base.is_misclassified(logits, labels) != success) & decided


def _cosine(left: Array, right: Array) -> Array:
    """Returns the cosines ``[B]``; 0 where either vector is zero."""
    (left, _), (right, _) = norms.rescale(left), norms.rescale(right)
    length = norms.vector_norm(left, "l2") * norms.vector_norm(right, "l2")
    return jnp.where(length > 0, norms.dot(left, right) / jnp.where(length > 0, length, 1), 0)


def gradient_cosines(
    logits_fn: LogitsFn,
    keys: Array,
    inputs: Array,
    labels: Array,
    threat: ThreatModel,
    *,
    radii: Sequence[float] = RADII,
    loss: Loss = "log_odds",
) -> Array:
    """Returns how well the gradient at a random point nearby agrees with that at the input (D12).

    Args:
      logits_fn: the model.
      keys: typed PRNG keys ``[B]``.
      inputs: float ``[B, ...]`` within the bounds.
      labels: int ``[B]``.
      threat: ball and box.
      radii: of the balls that the points are drawn from, as shares of epsilon.
      loss: whose gradients.

    Returns:
      Cosines ``[len(radii), B]``; 0 where a gradient is zero.
    """
    gradient = _gradient_at(logits_fn, labels, loss, inputs)

    def agree(number_and_radius: tuple[Array, Array]) -> Array:
        number, radius = number_and_radius
        ball = dataclasses.replace(threat, epsilon=radius * threat.epsilon)
        nearby = ball.random_start(fold_in(keys, number), inputs)
        return _cosine(gradient, _gradient_at(logits_fn, labels, loss, nearby))

    return jax.lax.map(agree, (jnp.arange(len(radii)), jnp.asarray(radii, jnp.float32)))


def derivative_errors(
    logits_fn: LogitsFn,
    keys: Array,
    inputs: Array,
    labels: Array,
    threat: ThreatModel,
    *,
    steps: Sequence[float] = DIFFERENCE_STEPS,
    loss: Loss = "log_odds",
) -> Array:
    """Returns how far derivatives are from central differences of the loss itself (D12).

    Along the gradient, and along a random direction of signs. The point is moved inwards where a
    step would leave the box, since a model may clip its inputs.

    Args:
      logits_fn: the model.
      keys: typed PRNG keys ``[B]``.
      inputs: float ``[B, ...]`` within the bounds.
      labels: int ``[B]``.
      threat: ball and box.
      steps: lengths in the threat norm, as shares of epsilon.
      loss: whose derivatives.

    Returns:
      ``|difference - derivative| / max(|difference|, |derivative|)``, ``[2, len(steps), B]`` in the
      order of ``DIRECTIONS``; in [0, 2], and 0 where both are zero.
    """
    lower, upper = threat.bounds
    signs = jax.vmap(lambda key: jax.random.rademacher(key, inputs.shape[1:], inputs.dtype))(keys)
    gradient, _ = norms.rescale(_gradient_at(logits_fn, labels, loss, inputs))
    directions = jnp.stack([gradient, signs])

    def measure_error(direction_and_step: tuple[Array, Array]) -> Array:
        direction, step = direction_and_step
        length = norms.vector_norm(direction, threat.norm)
        unit = direction / norms.expand(jnp.where(length > 0, length, 1), direction)
        # At most a quarter of the box, so that both ends of the step fit in.
        largest = (upper - lower) / 4 / jnp.maximum(norms.vector_norm(unit, "linf"), 1e-12)
        size = jnp.minimum(step * threat.epsilon, largest)
        move = norms.expand(size, unit) * unit
        middle = jnp.clip(inputs, lower + jnp.abs(move), upper - jnp.abs(move))
        slope = norms.dot(_gradient_at(logits_fn, labels, loss, middle), move)
        rise = _loss_at(logits_fn, labels, loss, middle + move) - _loss_at(
            logits_fn, labels, loss, middle - move
        )
        difference = rise / 2
        scale = jnp.maximum(jnp.abs(difference), jnp.abs(slope))
        return jnp.where(scale > 0, jnp.abs(difference - slope) / jnp.where(scale > 0, scale, 1), 0)

    pairs = (
        jnp.repeat(directions, len(steps), axis=0),
        jnp.tile(jnp.asarray(steps, jnp.float32), 2),
    )
    return jax.lax.map(measure_error, pairs).reshape(2, len(steps), -1)


def linearity_errors(
    logits_fn: LogitsFn,
    keys: Array,
    inputs: Array,
    labels: Array,
    threat: ThreatModel,
    *,
    num_draws: int,
    loss: Loss = "log_odds",
    offset: float = 1.0,
) -> Array:
    """Returns how far the loss is from linear in the ball (D13; Qin et al. 2019).

    Args:
      logits_fn: the model.
      keys: typed PRNG keys ``[B]``.
      inputs: float ``[B, ...]`` within the bounds.
      labels: int ``[B]``.
      threat: ball and box.
      num_draws: random points, of the surface and of the ball by turns.
      loss: the loss.
      offset: keeps the ratio finite where the loss is near zero, > 0.

    Returns:
      ``max_u |L(x + u) - L(x) - <u, grad L(x)>| / (|L(x)| + offset)``, ``[B]``.
    """
    goal = base.untargeted(losses.get(loss), labels)
    here = base.evaluate(logits_fn, goal, inputs)

    def body(number: Array, largest: Array) -> Array:
        points = _ball_points(threat, keys, inputs, number)
        linear = here.loss + norms.dot(points - inputs, here.gradient)
        return jnp.maximum(largest, jnp.abs(_loss_at(logits_fn, labels, loss, points) - linear))

    largest = jax.lax.fori_loop(0, num_draws, body, jnp.zeros_like(here.loss))
    return largest / (jnp.abs(here.loss) + offset)


def instability(
    logits_fn: LogitsFn,
    keys: Array,
    inputs: Array,
    labels: Array,
    threat: ThreatModel,
    *,
    num_draws: int,
    radius: float = NOISE_RADIUS,
    loss: Loss = "log_odds",
) -> Array:
    """Returns how much the loss changes under faint noise (D15; Pintor et al. 2022, indicator 2).

    Args:
      logits_fn: the model.
      keys: typed PRNG keys ``[B]``.
      inputs: float ``[B, ...]`` within the bounds.
      labels: int ``[B]``.
      threat: its box is used.
      num_draws: random points.
      radius: each coordinate moves by a uniform number within half of it.
      loss: the loss.

    Returns:
      The mean of ``min(|L(x + u) - L(x)| / |L(x)|, 1)``, ``[B]``.
    """
    lower, upper = threat.bounds
    clean = _loss_at(logits_fn, labels, loss, inputs)
    size = jnp.maximum(jnp.abs(clean), jnp.finfo(jnp.float32).tiny)

    def draw(key: Array) -> Array:
        return jax.random.uniform(key, inputs.shape[1:], inputs.dtype, -radius / 2, radius / 2)

    def body(number: Array, total: Array) -> Array:
        points = jnp.clip(inputs + jax.vmap(draw)(fold_in(keys, number)), lower, upper)
        change = jnp.abs(_loss_at(logits_fn, labels, loss, points) - clean)
        return total + jnp.minimum(change / size, 1)

    return jax.lax.fori_loop(0, num_draws, body, jnp.zeros_like(clean)) / num_draws


def gradient_sizes(
    logits_fn: LogitsFn, keys: Array, inputs: Array, labels: Array, threat: ThreatModel
) -> Array:
    """Returns l_1 norms of gradients; 0 is a gradient that is not there (D11, D14).

    Args:
      logits_fn: the model.
      keys: typed PRNG keys ``[B]``.
      inputs: float ``[B, ...]`` within the bounds.
      labels: int ``[B]``.
      threat: ball and box.

    Returns:
      ``[3, B]``: of the log-odds at the input and at a random point of the ball, and of the
      cross-entropy at the input.
    """
    start = threat.random_start(keys, inputs)
    places = ((inputs, "log_odds"), (start, "log_odds"), (inputs, "cross_entropy"))
    return jnp.stack(
        [
            norms.vector_norm(_gradient_at(logits_fn, labels, loss, points), "l1")
            for points, loss in places
        ]
    )


def logit_statistics(
    logits_fn: LogitsFn, keys: Array, inputs: Array, labels: Array, threat: ThreatModel
) -> tuple[Array, Array, Array]:
    """Returns how large and how far apart logits are (D23).

    Args:
      logits_fn: the model.
      keys: not used; every probe takes them.
      inputs: float ``[B, ...]``.
      labels: int ``[B]``.
      threat: not used.

    Returns:
      ``(largest |logit| [B], lead of the label over all other classes [B], saturated bool [B])``.
      An example is saturated where the cross-entropy is exactly 0 in float32, or the label's
      probability exactly 0 or 1.
    """
    logits = logits_fn(inputs).astype(jnp.float32)
    probabilities = jax.nn.softmax(logits)
    own = jnp.take_along_axis(probabilities, labels[:, None], axis=1)[:, 0]
    saturated = (losses.cross_entropy(logits, labels) == 0) | (own == 0) | (own == 1)
    return jnp.max(jnp.abs(logits), axis=1), -losses.margin(logits, labels), saturated


def _as_pytree(logits_fn: LogitsFn) -> LogitsFn:
    """Returns the model as an argument that compiled functions take."""
    if isinstance(logits_fn, jax.tree_util.Partial):
        return logits_fn
    return jax.tree_util.Partial(logits_fn)


@jax.jit
def _logits(logits_fn: LogitsFn, inputs: Array) -> Array:
    return logits_fn(inputs)


def inconsistency(
    logits_fn: LogitsFn,
    inputs: Array | np.ndarray,
    *,
    num_passes: int = 5,
    num_single: int = 4,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns how much logits depend on the pass and on the rest of the batch (D22).

    Compares passes of the same batch, of the batch in reverse order, of the batch with as many
    blank inputs after it, and of single examples. Runs from the host.

    Args:
      logits_fn: the model.
      inputs: float ``[B, ...]``.
      num_passes: passes of the same batch.
      num_single: the first so many examples are also passed alone.

    Returns:
      ``(largest difference from the first pass [B], as a share of the example's largest |logit|;
      logits [B, C])``.
    """
    call = functools.partial(_logits, _as_pytree(logits_fn))
    inputs = jnp.asarray(inputs)
    size = len(inputs)
    first = np.asarray(call(inputs), np.float32)
    largest = np.zeros(size, np.float32)

    def compare(logits: Array, examples: slice) -> None:
        difference = np.abs(np.asarray(logits, np.float32) - first[examples]).max(axis=1)
        # What is not a number differs from everything.
        difference = np.where(np.isnan(difference), np.inf, difference)
        largest[examples] = np.maximum(largest[examples], difference)

    for _ in range(num_passes - 1):
        compare(call(inputs), slice(None))
    compare(call(inputs[::-1])[::-1], slice(None))
    compare(call(jnp.concatenate([inputs, jnp.zeros_like(inputs)]))[:size], slice(None))
    for index in range(min(num_single, size)):
        alone = slice(index, index + 1)
        compare(call(inputs[alone]), alone)
    scale = np.maximum(np.abs(first).max(axis=1), np.finfo(np.float32).tiny)
    return largest / scale, first


_WITHOUT_DERIVATIVE = frozenset(
    {
        "argmax",
        "argmin",
        "bitcast_convert_type",
        "ceil",
        "floor",
        "io_callback",
        "nextafter",
        "pure_callback",
        "round",
        "sign",
        "stop_gradient",
    }
)
_LOOPS = frozenset({"scan", "while"})
_PASSES_ON = frozenset(
    {
        "broadcast_in_dim",
        "closed_call",
        "convert_element_type",
        "copy",
        "jit",
        "max",
        "pjit",
        "reshape",
        "select_n",
        "squeeze",
    }
)
"""Operations that a maximum may pass before it is held constant."""


def nondifferentiable(logits_fn: LogitsFn, inputs: Array | np.ndarray) -> list[str]:
    """Returns the operations between inputs and logits that have no useful derivative (D14).

    These are roundings, signs, choices of an index, casts to integers, callbacks and
    ``stop_gradient``. ReLU, maxima, poolings and selections are fine, and so is the maximum that a
    softmax or logsumexp subtracts and holds constant. An operation counts only if it depends on the
    inputs and the logits on it. A part with a derivative of its own (``jax.custom_vjp``) is looked
    into: a rounding is found there too, whatever derivative it pretends to have.

    Args:
      logits_fn: the model.
      inputs: ``[B, ...]``; shape and dtype are used.

    Returns:
      Sorted names of ``jax.lax`` operations.
    """
    jaxpr = jax.make_jaxpr(logits_fn)(jax.ShapeDtypeStruct(inputs.shape, inputs.dtype)).jaxpr
    found: set[str] = set()
    _follow(jaxpr, [True] * len(jaxpr.invars), found)
    return sorted(found)


def _inner_jaxprs(eqn: core.JaxprEqn) -> list[core.Jaxpr]:
    leaves = jax.tree.leaves(
        list(eqn.params.values()), is_leaf=lambda value: isinstance(value, core.Jaxpr)
    )
    return [
        leaf.jaxpr if isinstance(leaf, core.ClosedJaxpr) else leaf
        for leaf in leaves
        if isinstance(leaf, core.Jaxpr | core.ClosedJaxpr)
    ]


def _name_of_break(eqn: core.JaxprEqn) -> str | None:
    """Returns the name of an operation without a useful derivative; ``None`` for others."""
    name = eqn.primitive.name
    if name == "convert_element_type":
        old = eqn.invars[0].aval.dtype  # type: ignore[attr-defined]
        new = eqn.params["new_dtype"]
        if jnp.issubdtype(old, jnp.floating) and jnp.issubdtype(new, jnp.integer):
            return f"convert_element_type to {np.dtype(new).name}"
    return name if name in _WITHOUT_DERIVATIVE else None


def _follow(jaxpr: core.Jaxpr, of_inputs: Sequence[bool], found: set[str]) -> list[bool]:
    """Adds the breaks between inputs and outputs; returns which outputs depend on the inputs."""
    # With a literal in place of a variable, nothing is followed.
    dependent = {var for var, flag in zip(jaxpr.invars, of_inputs, strict=True) if flag}
    needed = {var for var in jaxpr.outvars if isinstance(var, core.Var)}
    for eqn in reversed(jaxpr.eqns):
        if any(var in needed for var in eqn.outvars):
            needed.update(var for var in eqn.invars if isinstance(var, core.Var))
    producers: dict[core.Var, core.JaxprEqn] = {}
    for eqn in jaxpr.eqns:
        producers.update(dict.fromkeys(eqn.outvars, eqn))
        flags = [isinstance(var, core.Var) and var in dependent for var in eqn.invars]
        if not any(flags) or not any(var in needed for var in eqn.outvars):
            continue
        name = _name_of_break(eqn)
        if name is not None and not (
            name == "stop_gradient" and _is_maximum(eqn.invars[0], producers)
        ):
            found.add(name)
        inner = _inner_jaxprs(eqn)
        outputs = [True] * len(eqn.outvars)
        # A call maps arguments one to one; what a loop or a branch does is taken to mix them all.
        is_call = (
            len(inner) == 1
            and eqn.primitive.name not in _LOOPS
            and len(inner[0].invars) == len(flags)
            and len(inner[0].outvars) == len(outputs)
        )
        for part in inner:
            result = _follow(part, flags if is_call else [True] * len(part.invars), found)
            if is_call:
                outputs = result
        dependent.update(var for var, flag in zip(eqn.outvars, outputs, strict=True) if flag)
    return [isinstance(var, core.Var) and var in dependent for var in jaxpr.outvars]


def _is_maximum(var: Any, producers: dict[core.Var, core.JaxprEqn]) -> bool:
    """Returns whether a value is a maximum of others, up to its shape."""
    eqn = producers.get(var) if isinstance(var, core.Var) else None
    if eqn is None:
        return False
    if eqn.primitive.name == "reduce_max":
        return True
    return eqn.primitive.name in _PASSES_ON and (
        any(_is_maximum(operand, producers) for operand in eqn.invars)
        or any(
            inner_eqn.primitive.name == "reduce_max"
            for part in _inner_jaxprs(eqn)
            for inner_eqn in part.eqns
        )
    )


Probe = Callable[..., Any]


@functools.lru_cache(maxsize=64)
def _compiled(probe: Probe, options: tuple[tuple[str, Any], ...]) -> Probe:
    """Returns the probe with its static options, compiled once for the process."""
    return jax.jit(functools.partial(probe, **dict(options)))


@dataclasses.dataclass(frozen=True)
class _Subset:
    """Examples that are probed batch by batch.

    Attributes:
      logits_fn: the model, as a pytree.
      keys: typed PRNG keys ``[N]``.
      inputs: ``[N, ...]``.
      labels: int32 ``[N]``.
      threat: ball and box.
      batch_size: examples at once.
      sharding: how a batch is spread over devices, or ``None``.
      known: what probes have returned already.
    """

    logits_fn: LogitsFn
    keys: Array
    inputs: np.ndarray
    labels: np.ndarray
    threat: ThreatModel
    batch_size: int
    sharding: jax.sharding.Sharding | None
    known: dict[Any, Any] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        """Returns the number of examples."""
        return len(self.labels)

    def take(self, indices: np.ndarray) -> "_Subset":
        """Returns some of the examples."""
        return dataclasses.replace(
            self,
            keys=self.keys[indices],
            inputs=self.inputs[indices],
            labels=self.labels[indices],
            batch_size=self.batch_size if self.sharding else min(self.batch_size, len(indices)),
            known={},
        )

    def probe(self, number: int, probe: Probe, *arguments: Any, **options: Any) -> Any:
        """Returns a probe's values for all examples, in NumPy, examples along the last axis.

        The last batch is filled with copies of the last example.

        Args:
          number: of the keys, so that probes draw apart.
          probe: the function.
          *arguments: NumPy scalars, traced, after the threat model.
          **options: static.
        """
        static = tuple(sorted(options.items()))
        called = (number, probe, arguments, static)
        if called not in self.known:
            function = _compiled(probe, static)
            parts = [self._batch(function, number, first, arguments) for first in self._firsts()]
            self.known[called] = jax.tree.map(
                lambda *values: np.concatenate(values, axis=-1), *parts
            )
        return self.known[called]

    def _firsts(self) -> range:
        return range(0, len(self), self.batch_size)

    def _batch(self, function: Probe, number: int, first: int, arguments: tuple[Any, ...]) -> Any:
        indices = np.minimum(np.arange(first, first + self.batch_size), len(self) - 1)
        batch = (fold_in(self.keys[indices], number), self.inputs[indices], self.labels[indices])
        if self.sharding is not None:
            batch = jax.device_put(batch, self.sharding)
        values = jax.device_get(function(self.logits_fn, *batch, self.threat, *arguments))
        kept = min(self.batch_size, len(self) - first)
        return jax.tree.map(lambda value: value[..., :kept], values)


def measure(
    logits_fn: LogitsFn,
    keys: Array,
    inputs: np.ndarray,
    labels: np.ndarray,
    threat: ThreatModel,
    *,
    level: str | Level = "quick",
    survived: np.ndarray | None = None,
    only: Collection[str] | None = None,
    batch_size: int = 256,
    sharding: jax.sharding.Sharding | None = None,
) -> dict[str, dict[str, Any]]:
    """Runs probes on a subset of examples; from the host.

    Args:
      logits_fn: the model. ``jax.tree_util.Partial(apply, variables)`` keeps the variables out of
        the compiled programs, which later models of the same ``apply`` then share.
      keys: typed PRNG keys ``[N]`` (``attacks.example_keys``).
      inputs: float ``[N, ...]`` within the bounds.
      labels: int ``[N]``.
      threat: ball and box; epsilon > 0.
      level: a key of ``LEVELS``, or how much to spend.
      survived: bool ``[N]``, the examples that resisted the attacks: random points are drawn around
        the first of these. By default those that are right and resist the restarts.
      only: the ids of ``MEASURED`` to run; all by default.
      batch_size: examples at once.
      sharding: how a batch is spread over devices; the model's variables must be there already.

    Returns:
      A dict that JSON can hold: by diagnostic id, ``n`` (examples) and what was found, with the
      curves behind it. What is not a finite number is ``None``.

    Raises:
      ValueError: for inputs or labels that an attack cannot work on, an unknown level or id, or
        sizes that do not fit.
    """
    base.check_inputs(threat, inputs, labels)
    _validate.positive_integer(batch_size=batch_size)
    _validate.positive(epsilon=threat.epsilon)
    if isinstance(level, str):
        _validate.one_of(LEVELS, level=level)
        level = LEVELS[level]
    for identifier in only or ():
        _validate.one_of(MEASURED, only=identifier)
    size = len(inputs)
    if not size:
        raise ValueError(f"inputs has shape {inputs.shape}; probes need at least one example.")
    if keys.shape != (size,):
        raise ValueError(f"keys has shape {keys.shape}; expected {(size,)}.")
    if survived is not None and (survived.shape != (size,) or survived.dtype != bool):
        raise ValueError(
            f"survived has shape {survived.shape} and dtype {survived.dtype}; expected bool of "
            f"shape {(size,)}."
        )
    if sharding is not None and batch_size % sharding.num_devices:
        raise ValueError(
            f"batch_size={batch_size} must be a multiple of the {sharding.num_devices} devices."
        )
    subset = _Subset(
        _as_pytree(logits_fn),
        keys,
        np.asarray(inputs),
        np.asarray(labels, np.int32),
        threat,
        batch_size if sharding else min(batch_size, size),
        sharding,
    )
    return {
        identifier: {"n": size, **summarise(subset, level, survived)}
        for identifier, summarise in _SUMMARIES.items()
        if only is None or identifier in only
    }


def _number(value: Any) -> float | None:
    """Returns a float; ``None`` for what is not finite, which JSON cannot hold."""
    return float(value) if np.isfinite(value) else None


def _numbers(values: Any) -> list[float | None]:
    return [_number(value) for value in values]


def _compared(counts: Sequence[int], resist: np.ndarray) -> dict[str, Any]:
    """Returns accuracies along ``resist [K, N]``, and on how many examples neighbours differ."""
    return {
        "counts": list(counts),
        "accuracy": _numbers(resist.mean(axis=1)),
        "num_differing": (resist[1:] != resist[:-1]).sum(axis=1).tolist(),
    }


Survived = np.ndarray | None


def _sum_up_steps(subset: _Subset, level: Level, survived: Survived) -> dict[str, Any]:
    resist = [subset.probe(2, resists_steps, np.int32(count)) for count in level.num_steps]
    return _compared(level.num_steps, np.stack(resist))


def _make_restarts(subset: _Subset, level: Level) -> tuple[np.ndarray, np.ndarray]:
    return subset.probe(
        9, restarts, num_restarts=max(level.num_restarts), num_steps=level.restart_steps
    )


def _sum_up_draws(subset: _Subset, level: Level, survived: Survived) -> dict[str, Any]:
    # Inputs that are wrong without an attack count as broken by any run.
    left = ~_make_restarts(subset, level)[0].any(axis=0) if survived is None else survived
    drawn = np.flatnonzero(left)[: level.num_drawn_examples]
    first = (
        subset.take(drawn).probe(7, random_draws, num_draws=level.num_draws)
        if drawn.size
        else np.zeros(0, np.int32)
    )
    return {
        "n": len(first),
        "num_draws": level.num_draws,
        "num_broken": int((first >= 0).sum()),
        "first": first[first >= 0].tolist(),
    }


def _sum_up_restarts(subset: _Subset, level: Level, survived: Survived) -> dict[str, Any]:
    broken, _ = _make_restarts(subset, level)
    resist = [~broken[:count].any(axis=0) for count in level.num_restarts]
    return {**_compared(level.num_restarts, np.stack(resist)), "num_steps": level.restart_steps}


def _sum_up_sizes(subset: _Subset, level: Level, survived: Survived) -> dict[str, Any]:
    sizes = subset.probe(11, gradient_sizes)
    names = ("clean", "random_start", "cross_entropy")
    return {"median_gradient": dict(zip(names, _numbers(np.median(sizes, axis=1)), strict=True))}


def _sum_up_agreement(subset: _Subset, level: Level, survived: Survived) -> dict[str, Any]:
    cosines = subset.probe(12, gradient_cosines)
    errors = np.median(subset.probe(12, derivative_errors), axis=-1)
    return {
        "radii": list(RADII),
        "median_cosine": _numbers(np.median(cosines, axis=1)),
        "steps": list(DIFFERENCE_STEPS),
        "median_error": {name: _numbers(row) for name, row in zip(DIRECTIONS, errors, strict=True)},
    }


def _sum_up_linearity(subset: _Subset, level: Level, survived: Survived) -> dict[str, Any]:
    errors = subset.probe(13, linearity_errors, num_draws=level.num_noise)
    return {
        "num_draws": level.num_noise,
        "median": _number(np.median(errors)),
        "quantile_95": _number(np.quantile(errors, 0.95)),
    }


def _sum_up_missing(subset: _Subset, level: Level, survived: Survived) -> dict[str, Any]:
    clean, _, cross_entropy = subset.probe(11, gradient_sizes)
    return {
        "zero_share": float(np.mean(clean == 0)),
        "zero_share_cross_entropy": float(np.mean(cross_entropy == 0)),
        "operations": nondifferentiable(subset.logits_fn, subset.inputs[:2]),
    }


def _sum_up_stability(subset: _Subset, level: Level, survived: Survived) -> dict[str, Any]:
    lower, upper = subset.threat.bounds
    radius = NOISE_RADIUS * (upper - lower)
    values = subset.probe(15, instability, num_draws=level.num_noise, radius=radius)
    return {"num_draws": level.num_noise, "radius": radius, "mean": _number(values.mean())}


def _make_path(subset: _Subset, level: Level) -> tuple[np.ndarray, np.ndarray]:
    return subset.probe(17, late_rise_on_path, num_steps=level.path_steps)


def _sum_up_results(subset: _Subset, level: Level, survived: Survived) -> dict[str, Any]:
    _, wrong = _make_restarts(subset, level)
    _, passed = _make_path(subset, level)
    return {
        "num_contradictions": int(wrong.any(axis=0).sum()),
        "passed_share": float(passed.mean()),
    }


def _sum_up_late_rise(subset: _Subset, level: Level, survived: Survived) -> dict[str, Any]:
    rise, _ = _make_path(subset, level)
    return {
        "num_steps": level.path_steps,
        "last_steps": LAST_STEPS,
        "mean_rise": _number(rise.mean()),
        "quantiles": [0.5, 0.9, 1.0],
        "rise": _numbers(np.quantile(rise, (0.5, 0.9, 1.0))),
    }


def _sum_up_consistency(subset: _Subset, level: Level, survived: Survived) -> dict[str, Any]:
    difference, logits = inconsistency(subset.logits_fn, subset.inputs[: level.num_compared])
    sums_to_one = np.allclose(logits.sum(axis=1), 1, atol=1e-3)
    return {
        "n": len(difference),
        "max_difference": _number(difference.max()),
        "probabilities": bool(sums_to_one and np.all(logits >= 0)),
    }


def _sum_up_logits(subset: _Subset, level: Level, survived: Survived) -> dict[str, Any]:
    largest, lead, saturated = subset.probe(23, logit_statistics)
    quantiles = (0.05, 0.25, 0.5, 0.75, 0.95)
    return {
        "max_logit": _number(largest.max()),
        "quantiles": list(quantiles),
        "lead": _numbers(np.quantile(lead, quantiles)),
        "saturated_share": float(saturated.mean()),
    }


_SUMMARIES: dict[str, Callable[[_Subset, Level, Survived], dict[str, Any]]] = {
    "D2": _sum_up_steps,
    "D7": _sum_up_draws,
    "D9": _sum_up_restarts,
    "D11": _sum_up_sizes,
    "D12": _sum_up_agreement,
    "D13": _sum_up_linearity,
    "D14": _sum_up_missing,
    "D15": _sum_up_stability,
    "D16": _sum_up_results,
    "D17": _sum_up_late_rise,
    "D22": _sum_up_consistency,
    "D23": _sum_up_logits,
}

MEASURED = tuple(_SUMMARIES)
"""The ids of the diagnostics that ``measure`` measures."""
