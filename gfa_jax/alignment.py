"""The contribution: alignment of gradients with features, on arrays alone.

For a feature ``h_l`` of an example and the gradient ``g_l`` of a loss-like target at that feature,

    alignment  a_l = -<g_l, h_l> / (|g_l|_q |h_l|_p),    1/p + 1/q = 1

is the share of the target's first-order decrease that lies along the feature itself, the *radial*
direction. The rest is *tangential*, where adversarial perturbations act. The sign makes 1 the goal:
moving out along the feature lowers the target as fast as any move can. In a network without biases
or additive normalisation, Euler's theorem gives ``<h, -g> = margin`` for the margin target, so that
the locally linear l_p radius is ``margin / |g|_q = |h|_p a`` (the radius identity).

All arrays are ``[B, ...]`` and each example is one vector; results are float32 ``[B]`` or wider.
Exact zeros (dead units, saturated losses) give an alignment of 0 with zero derivative, never NaN.

Source: "DeepDefense", arXiv 2511.13749, whose abstract fixes the idea; the formula and its options
are this project's (docs/method.md).
"""

import chex
import jax
import jax.numpy as jnp

from gfa_jax import _validate, norms
from gfa_jax.types import Array

FORMS = ("linear", "log", "squared", "absolute", "tangential")
"""The penalty forms of ``penalty``."""

_LOG_SHARPNESS = 20.0


def alignment(features: Array, grads: Array, norm: str = "l2") -> Array:
    """Returns the alignment of each example, in [-1, 1].

    Args:
      features: ``[B, ...]``.
      grads: gradients of the *summed* target with respect to the features, the same shape.
      norm: the norm ``p`` of the features; the gradients are measured in its dual. At the input,
        the norm of the threat model.

    Returns:
      ``[B]``; 1 where ``-grads`` is a positive multiple of the feature (for l_2) and 0 where either
      vector is zero.

    Raises:
      ValueError: for an unknown norm.
      AssertionError: for shapes that differ.
    """
    chex.assert_equal_shape([features, grads])
    dual_norm = norms.dual(norm)
    features, grads = norms.rescale(norms.wide(features))[0], norms.rescale(norms.wide(grads))[0]
    product = norms.vector_norm(features, norm) * norms.vector_norm(grads, dual_norm)
    nonzero = product > 0
    return jnp.where(nonzero, -norms.dot(features, grads) / jnp.where(nonzero, product, 1), 0)


def penalty(
    features: Array, grads: Array, *, form: str = "log", norm: str = "l2", ceiling: float = 1.0
) -> Array:
    """Returns the penalty ``[B]`` that training minimises.

    The forms, with ``a`` the alignment:

    * ``linear``: ``1 - a``.
    * ``log``: ``-log(softplus(20 a) / 20)``, close to ``-log a`` for positive ``a``; its slope
      grows where alignment is small.
    * ``squared``: ``1 - a^2`` and ``absolute``: ``1 - |a|``. Unsigned: they also reward confident
      errors.
    * ``tangential``: ``|g_t|_2 |h|_2``, the tangential part of the gradient without normalisation
      by ``|g|``; l_2 only.

    Args:
      features: ``[B, ...]``.
      grads: the same shape.
      form: one of ``FORMS``.
      norm: as in ``alignment``.
      ceiling: alignment (its size, where unsigned) in (0, 1] beyond which nothing more is asked:
        the penalty is that at the ceiling, without slope. By the radius identity it is a radius as
        a share of the feature's norm. Not for ``tangential``.

    Raises:
      ValueError: for an unknown form or norm, a ceiling out of range, or ``tangential`` with
        another norm than l_2 or with a ceiling.
    """
    _validate.one_of(FORMS, form=form)
    if not 0 < ceiling <= 1:
        raise ValueError(f"ceiling={ceiling!r} must lie in (0, 1].")
    if form == "tangential":
        if ceiling < 1:
            raise ValueError(f"ceiling={ceiling!r}: the form 'tangential' has none.")
        if norm != "l2":
            raise ValueError(
                f"norm={norm!r}: the form 'tangential' is defined for the norm 'l2' alone."
            )
        features, grads = norms.wide(features), norms.wide(grads)
        tangential = radial_tangential(grads, features)[1]
        return norms.vector_norm(tangential, "l2") * norms.vector_norm(features, "l2")
    cosine = alignment(features, grads, norm)
    if form in ("squared", "absolute"):
        cosine = jnp.abs(cosine)
    if ceiling < 1:
        cosine = jnp.minimum(cosine, ceiling)
    if form == "linear":
        return 1 - cosine
    if form == "log":
        return -jnp.log(jax.nn.softplus(_LOG_SHARPNESS * cosine) / _LOG_SHARPNESS)
    return 1 - cosine**2 if form == "squared" else 1 - cosine


def radial_tangential(vectors: Array, reference: Array) -> tuple[Array, Array]:
    """Splits vectors into the part along a reference and the part orthogonal to it.

    ``v_r = (<v, h> / |h|^2) h`` and ``v_t = v - v_r``.

    Args:
      vectors: ``[B, ...]``: gradients, perturbations, or measured moves.
      reference: the features, the same shape. Where it is zero, all is tangential.

    Returns:
      ``(radial, tangential)``, each ``[B, ...]`` in their dtype; they sum to ``vectors``.
    """
    chex.assert_equal_shape([vectors, reference])
    direction, _ = norms.rescale(reference)
    squared = norms.dot(direction, direction)
    coefficient = norms.dot(vectors, direction) / jnp.where(squared > 0, squared, 1)
    radial = norms.expand(coefficient, vectors) * direction
    return radial, vectors - radial


def tangential_share(vectors: Array, reference: Array) -> Array:
    """Returns ``|v_t|_2^2 / |v|_2^2`` in [0, 1], float ``[B]``; 0 for a zero vector."""
    vectors, _ = norms.rescale(norms.wide(vectors))
    tangential = radial_tangential(vectors, norms.wide(reference))[1]
    total = norms.dot(vectors, vectors)
    return jnp.where(
        total > 0, norms.dot(tangential, tangential) / jnp.where(total > 0, total, 1), 0
    )


def radial_degree(features: Array, logit_grads: Array, logits: Array) -> Array:
    """Returns the degree ``[B]`` to which a logit is homogeneous in the feature.

    It is ``<h, grad_h z> / z``. At 1, scaling the feature scales the logit (no biases, no
    normalisation after it), so alignment can be high. At 0, the logit does not change with the
    feature's length (a normalisation layer follows), and alignment is impossible by construction.

    Args:
      features: ``[B, ...]``.
      logit_grads: the gradient of ``sum(logits)`` with respect to the features, the same shape.
      logits: one logit for each example, ``[B]``; where it is exactly 0 the result is NaN, to be
        left out of averages.
    """
    chex.assert_equal_shape([features, logit_grads])
    radial = norms.dot(norms.wide(features), norms.wide(logit_grads))
    return jnp.where(logits == 0, jnp.nan, radial / jnp.where(logits == 0, 1, logits))
