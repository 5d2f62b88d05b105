"""Probes that attack: PGD of more steps, restarts or scaled logits, and random points.

See ``probes`` for what a probe is.
"""

import jax
import jax.numpy as jnp

from gfa_jax import losses
from gfa_jax.attacks import base
from gfa_jax.attacks.gradient import pgd
from gfa_jax.evaluation import probes
from gfa_jax.threat import ThreatModel
from gfa_jax.types import Array, LogitsFn

ROUNDING = 1e-4
"""Relative differences of logits below this are rounding (AutoAttack's check of randomness)."""


def resists_steps(
    logits_fn: LogitsFn,
    keys: Array,
    inputs: Array,
    labels: Array,
    threat: ThreatModel,
    num_steps: int | Array,
    *,
    loss: probes.Loss = "margin",
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
        points, here = probes.uphill_step(logits_fn, threat, inputs, goal, step_size, points)
        return points, broken | here.reached

    start = threat.random_start(keys, inputs)
    broken = goal.reached(logits_fn(inputs))
    points, broken = jax.lax.fori_loop(0, num_steps, body, (start, broken))
    return ~(broken | goal.reached(logits_fn(points)))


def resists_cross_entropy(
    logits_fn: LogitsFn,
    keys: Array,
    inputs: Array,
    labels: Array,
    threat: ThreatModel,
    temperature: float | Array,
    *,
    num_steps: int,
) -> Array:
    """Returns which examples resist PGD on the cross-entropy of scaled logits (D10).

    Logits that are far apart saturate the softmax, so that the gradient of the cross-entropy
    vanishes or is rounded to nothing; divided by a temperature, they do not (Carlini & Wagner 2016,
    arXiv 1607.04311, on defensive distillation).

    Args:
      logits_fn: the model.
      keys: typed PRNG keys ``[B]``.
      inputs: float ``[B, ...]`` within the bounds.
      labels: int ``[B]``.
      threat: ball and box.
      temperature: that logits are divided by, > 0; may be traced.
      num_steps: see ``resists_steps``.

    Returns:
      bool ``[B]``.
    """

    def scaled(logits: Array, labels: Array) -> Array:
        return losses.cross_entropy(logits / temperature, labels)

    return resists_steps(logits_fn, keys, inputs, labels, threat, num_steps, loss=scaled)


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

    Points of the surface and of the ball take turns (``probes.ball_points``). The loop ends early
    when all examples are broken.

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
        wrong = base.is_misclassified(
            logits_fn(probes.ball_points(threat, keys, inputs, number)), labels
        )
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
    loss: probes.Loss = "margin",
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
