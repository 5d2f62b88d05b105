"""What training did to the geometry.

That is alignment, radial degree, and how the loss changes along radial and tangential directions
and over a plane through the input.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from gfa_jax import alignment, losses, norms, taps
from gfa_jax.types import ApplyFn, Array, Features, LogitsFn

DIRECTIONS = ("radial", "random_tangential", "worst_tangential")


def layer_geometry(
    apply_fn: ApplyFn, inputs: Array, labels: Array, layer_norms: Mapping[str, str]
) -> dict[str, dict[str, Array]]:
    """Returns alignment and radial degree by tap name, each ``[B]``.

    The entries of each tap are ``alignment``, with the log-odds target, and ``radial_degree``, of
    the true logit.

    Args:
      apply_fn: ``(taps, inputs) -> (logits, features)``.
      inputs: ``[B, ...]``.
      labels: int ``[B]``.
      layer_norms: the norm of each tap that is not l2.
    """
    logits, features, grads = taps.feature_gradients(apply_fn, inputs, labels, target="log_odds")

    def true_logit(logits: Array, labels: Array) -> Array:
        return jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]

    _, _, logit_grads = taps.feature_gradients(apply_fn, inputs, labels, target=true_logit)
    label_logits = true_logit(logits, labels)
    return {
        name: {
            "alignment": alignment.alignment(
                features[name], grads[name], layer_norms.get(name, "l2")
            ),
            "radial_degree": alignment.radial_degree(
                features[name], logit_grads[name], label_logits
            ),
        }
        for name in features
    }


def tangential_shares(apply_fn: ApplyFn, inputs: Array, adv_inputs: Array) -> Features:
    """Returns for each tap the tangential share of the feature's displacement under attack.

    It is ``|d_t|^2 / |d|^2``, ``[B]`` in [0, 1]. The two parts are orthogonal, so the radial share
    of a feature that moved is what is missing to 1; where it did not move, the share is 0.

    Args:
      apply_fn: ``(taps, inputs) -> (logits, features)``.
      inputs: ``[B, ...]``.
      adv_inputs: the same shape.
    """
    _, clean = apply_fn({}, inputs)
    _, moved = apply_fn({}, adv_inputs)
    return {
        name: alignment.tangential_share(moved[name] - clean[name], clean[name]) for name in clean
    }


def loss_along_directions(
    apply_fn: ApplyFn, key: Array, inputs: Array, labels: Array, *, layer: str, lengths: Array
) -> dict[str, Array]:
    """Returns the log-odds of being wrong where a feature is moved along three directions.

    *Radial*: along the feature itself. *Worst tangential*: along the tangential part of the
    log-odds gradient. *Random tangential*: a random direction orthogonal to the feature. Each has
    the l_2 length of the feature.

    Args:
      apply_fn: ``(taps, inputs) -> (logits, features)``.
      key: typed PRNG key, for the random directions.
      inputs: ``[B, ...]``.
      labels: int ``[B]``.
      layer: the tap to move.
      lengths: signed lengths ``[K]``, as shares of the feature's norm.

    Returns:
      For each of ``DIRECTIONS``, ``[K, B]``.
    """
    _, features, grads = taps.feature_gradients(apply_fn, inputs, labels, target="log_odds")
    zeros = taps.zero_taps(apply_fn, inputs)
    feature = features[layer]
    size = norms.vector_norm(feature, "l2")

    def of_feature_length(direction: Array) -> Array:
        length = norms.vector_norm(direction, "l2")
        return direction * norms.expand(size / jnp.where(length > 0, length, 1), direction)

    def tangential(vectors: Array) -> Array:
        return of_feature_length(alignment.radial_tangential(vectors, feature)[1])

    directions = {
        "radial": feature,
        "random_tangential": tangential(jax.random.normal(key, feature.shape, feature.dtype)),
        "worst_tangential": tangential(grads[layer]),
    }

    def at(direction: Array) -> Callable[[Array], Array]:
        return lambda length: losses.log_odds(
            apply_fn({**zeros, layer: length * direction}, inputs)[0], labels
        )

    return {name: jax.lax.map(at(direction), lengths) for name, direction in directions.items()}


def loss_surface(
    logits_fn: LogitsFn,
    inputs: Array,
    labels: Array,
    first: Array,
    second: Array,
    lengths: Array,
    *,
    bounds: tuple[float, float] | None = (0.0, 1.0),
) -> Array:
    """Returns the log-odds of being wrong over a plane through each input.

    Each point ``inputs + a first + b second`` is clipped to the box, since no attacker may leave
    it: where the plane leaves the box, the surface is that of the nearest allowed image. Points are
    evaluated one after another, so that memory is that of one batch.

    Args:
      logits_fn: ``inputs -> logits``.
      inputs: ``[B, ...]``.
      labels: int ``[B]``.
      first: ``[B, ...]``, the direction of each example along axis 0 of the result, such as an
        attack's perturbation.
      second: the same along axis 1.
      lengths: signed lengths ``[K]``, as multiples of the directions.
      bounds: the box; ``None`` leaves points where they are.

    Returns:
      ``[K, K, B]``: entry ``[i, j]`` is at ``lengths[i] first + lengths[j] second``; above 0 the
      true class has less than half of the probability.

    Raises:
      ValueError: for lengths that are not one-dimensional, or directions of another shape than the
        inputs.
    """
    if lengths.ndim != 1:
        raise ValueError(f"lengths has shape {lengths.shape}; it must be one-dimensional, [K].")
    for name, direction in (("first", first), ("second", second)):
        if direction.shape != inputs.shape:
            raise ValueError(
                f"{name} has shape {direction.shape}; it must be that of inputs, {inputs.shape}."
            )

    def at(point: tuple[Array, Array]) -> Array:
        moved = inputs + point[0] * first + point[1] * second
        if bounds is not None:
            moved = jnp.clip(moved, *bounds)
        return losses.log_odds(logits_fn(moved), labels)

    size = lengths.shape[0]
    along_first, along_second = jnp.meshgrid(lengths, lengths, indexing="ij")
    surface = jax.lax.map(at, (along_first.reshape(-1), along_second.reshape(-1)))
    return surface.reshape(size, size, -1)
