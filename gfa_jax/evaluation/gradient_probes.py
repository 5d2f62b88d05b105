"""Probes of the gradient: its size, its neighbours, and the loss that it should foretell.

See ``probes`` for what a probe is.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from gfa_jax import losses, norms
from gfa_jax.attacks import base
from gfa_jax.attacks.estimators import fold_in
from gfa_jax.evaluation import probes
from gfa_jax.threat import ThreatModel
from gfa_jax.types import Array, LogitsFn

RADII = (1 / 8, 1 / 2, 1.0)
"""Shares of epsilon at which gradients are compared with the clean one's (D12)."""
DIFFERENCE_STEPS = (0.01, 0.1)
"""Shares of epsilon by which finite differences step (D12)."""
DIRECTIONS = ("gradient", "random")
"""Directions of the finite differences (D12)."""
UNDERFLOW_LOSS = 1e-6
"""A cross-entropy below this is close to what float32 can tell from 0 (D11)."""
UNDERFLOW_GRADIENT = 1e-12
"""l_1 norm below which the gradient of such a loss is lost (D11)."""


def _cosine(left: Array, right: Array) -> Array:
    """Returns the cosines ``[B]``; 0 where either vector is zero."""
    (left, _), (right, _) = norms.rescale(left), norms.rescale(right)
    length = norms.vector_norm(left, "l2") * norms.vector_norm(right, "l2")
    return jnp.where(length > 0, norms.dot(left, right) / jnp.where(length > 0, length, 1), 0)


def _sign_agreement(left: Array, right: Array) -> Array:
    """Returns the shares ``[B]`` of the coordinates with the same sign, but for those both zero."""
    left, right = jnp.sign(norms.flatten(left)), jnp.sign(norms.flatten(right))
    counted = (left != 0) | (right != 0)
    same = jnp.sum(counted & (left == right), axis=1)
    return same / jnp.maximum(jnp.sum(counted, axis=1), 1)


def gradient_agreement(
    logits_fn: LogitsFn,
    keys: Array,
    inputs: Array,
    labels: Array,
    threat: ThreatModel,
    *,
    radii: Sequence[float] = RADII,
    loss: probes.Loss = "log_odds",
) -> tuple[Array, Array]:
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
      ``(cosines, shares of the coordinates whose signs agree)``, each ``[len(radii), B]``.
      Coordinates that are zero in both gradients do not count. Both are 0 where a gradient is zero;
      gradients that have nothing in common have a cosine of 0 and agree in half of their signs.
    """
    gradient = probes.gradient_at(logits_fn, labels, loss, inputs)

    def agree(number_and_radius: tuple[Array, Array]) -> tuple[Array, Array]:
        number, radius = number_and_radius
        ball = dataclasses.replace(threat, epsilon=radius * threat.epsilon)
        nearby = ball.random_start(fold_in(keys, number), inputs)
        other = probes.gradient_at(logits_fn, labels, loss, nearby)
        return _cosine(gradient, other), _sign_agreement(gradient, other)

    return jax.lax.map(agree, (jnp.arange(len(radii)), jnp.asarray(radii, jnp.float32)))


def derivative_errors(
    logits_fn: LogitsFn,
    keys: Array,
    inputs: Array,
    labels: Array,
    threat: ThreatModel,
    *,
    steps: Sequence[float] = DIFFERENCE_STEPS,
    loss: probes.Loss = "log_odds",
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
    gradient, _ = norms.rescale(probes.gradient_at(logits_fn, labels, loss, inputs))
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
        slope = norms.dot(probes.gradient_at(logits_fn, labels, loss, middle), move)
        rise = probes.loss_at(logits_fn, labels, loss, middle + move) - probes.loss_at(
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


def gradient_sizes(
    logits_fn: LogitsFn, keys: Array, inputs: Array, labels: Array, threat: ThreatModel
) -> tuple[Array, Array]:
    """Returns l_1 norms of gradients, and where rounding takes them (D11, D14).

    Args:
      logits_fn: the model.
      keys: typed PRNG keys ``[B]``.
      inputs: float ``[B, ...]`` within the bounds.
      labels: int ``[B]``.
      threat: ball and box.

    Returns:
      ``(sizes [3, B], underflows bool [B])``: the sizes are of the log-odds at the input and at a
      random point of the ball, and of the cross-entropy at the input; 0 is a gradient that is not
      there. An example underflows where its cross-entropy is below ``UNDERFLOW_LOSS`` and its
      gradient below ``UNDERFLOW_GRADIENT``.
    """
    start = threat.random_start(keys, inputs)
    entropy = base.evaluate(logits_fn, base.untargeted(losses.cross_entropy, labels), inputs)
    gradients = (
        probes.gradient_at(logits_fn, labels, "log_odds", inputs),
        probes.gradient_at(logits_fn, labels, "log_odds", start),
        entropy.gradient,
    )
    sizes = jnp.stack([norms.vector_norm(gradient, "l1") for gradient in gradients])
    underflows = (entropy.loss < UNDERFLOW_LOSS) & (sizes[2] < UNDERFLOW_GRADIENT)
    return sizes, underflows
