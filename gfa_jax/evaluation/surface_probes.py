"""Probes of the loss and the logits themselves: how straight, how steady and how large they are.

See ``probes`` for what a probe is.
"""

import jax
import jax.numpy as jnp

from gfa_jax import losses, norms
from gfa_jax.attacks import base
from gfa_jax.attacks.estimators import fold_in
from gfa_jax.evaluation import probes
from gfa_jax.threat import ThreatModel
from gfa_jax.types import Array, LogitsFn

NOISE_RADIUS = 8 / 255
"""Width of the noise of the unstable predictions, for inputs in [0, 1] (Pintor et al. 2022)."""


def linearity_errors(
    logits_fn: LogitsFn,
    keys: Array,
    inputs: Array,
    labels: Array,
    threat: ThreatModel,
    *,
    num_draws: int,
    loss: probes.Loss = "log_odds",
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
        points = probes.ball_points(threat, keys, inputs, number)
        linear = here.loss + norms.dot(points - inputs, here.gradient)
        return jnp.maximum(
            largest, jnp.abs(probes.loss_at(logits_fn, labels, loss, points) - linear)
        )

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
    loss: probes.Loss = "log_odds",
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
    clean = probes.loss_at(logits_fn, labels, loss, inputs)
    size = jnp.maximum(jnp.abs(clean), jnp.finfo(jnp.float32).tiny)

    def draw(key: Array) -> Array:
        return jax.random.uniform(key, inputs.shape[1:], inputs.dtype, -radius / 2, radius / 2)

    def body(number: Array, total: Array) -> Array:
        points = jnp.clip(inputs + jax.vmap(draw)(fold_in(keys, number)), lower, upper)
        change = jnp.abs(probes.loss_at(logits_fn, labels, loss, points) - clean)
        return total + jnp.minimum(change / size, 1)

    return jax.lax.fori_loop(0, num_draws, body, jnp.zeros_like(clean)) / num_draws


def logit_statistics(
    logits_fn: LogitsFn, keys: Array, inputs: Array, labels: Array, threat: ThreatModel
) -> tuple[Array, Array, Array, Array]:
    """Returns how large and how far apart logits are (D10, D23).

    Args:
      logits_fn: the model.
      keys: not used; every probe takes them.
      inputs: float ``[B, ...]``.
      labels: int ``[B]``.
      threat: not used.

    Returns:
      ``(largest |logit| [B], lead of the label over all other classes [B], saturated bool [B], gap
      between the two largest logits [B])``.
      An example is saturated where the cross-entropy is exactly 0 in float32, or the label's
      probability exactly 0 or 1.
    """
    logits = logits_fn(inputs).astype(jnp.float32)
    probabilities = jax.nn.softmax(logits)
    own = jnp.take_along_axis(probabilities, labels[:, None], axis=1)[:, 0]
    saturated = (losses.cross_entropy(logits, labels) == 0) | (own == 0) | (own == 1)
    return (
        jnp.max(jnp.abs(logits), axis=1),
        -losses.margin(logits, labels),
        saturated,
        -losses.margin(logits, jnp.argmax(logits, axis=1)),
    )
