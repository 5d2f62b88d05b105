"""Measurements on a model that show whether gradient attacks can be trusted on it.

Each probe is a pure function of ``(logits_fn, keys, inputs, labels, threat)``, of static options,
and returns one value for each example along the last axis. ``probing.measure`` runs them on a fixed
subset and sums them up in plain numbers; ``diagnostics.diagnose`` judges those.

Gradients are those of the log-odds of being wrong unless said otherwise: they have the direction of
the cross-entropy's but do not vanish on confident examples, so that a saturated loss, which has
probes of its own (D10, D11, D23), is not taken for a masked gradient.

Sources: Carlini et al. 2019 (arXiv 1902.06705), Athalye et al. 2018 (arXiv 1802.00420), Pintor et
al. 2022 (arXiv 2106.09947; "indicators of attack failure"), Qin et al. 2019 (arXiv 1907.02610;
local linearity), Andriushchenko & Flammarion 2020 (arXiv 2007.02617; gradient agreement).
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from gfa_jax import losses, norms
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
