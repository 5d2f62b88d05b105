"""Per-example vector norms and their duals.

Every function treats axis 0 as the batch and all other axes as one vector.
"""

import jax
import jax.numpy as jnp

from gfa_jax import _validate
from gfa_jax.types import Array

DUALS = {"linf": "l1", "l2": "l2", "l1": "linf"}
"""The dual of each norm: Hoelder's inequality ``|<u, v>| <= |u|_p |v|_q`` holds for ``p``, ``q =
DUALS[p]``."""


def dual(norm: str) -> str:
    """Returns the name of the dual norm; ValueError for an unknown norm."""
    _validate.one_of(DUALS, norm=norm)
    return DUALS[norm]


def flatten(vectors: Array) -> Array:
    """Returns ``vectors [B, ...]`` as ``[B, D]``."""
    return vectors.reshape(vectors.shape[0], -1)


def expand(scalars: Array, vectors: Array) -> Array:
    """Returns ``scalars [B]`` with the axes that let it broadcast against ``vectors [B, ...]``."""
    return scalars.reshape(scalars.shape + (1,) * (vectors.ndim - 1))


def wide(values: Array) -> Array:
    """Returns half precision as float32, and wider dtypes as they are."""
    return values.astype(jnp.promote_types(values.dtype, jnp.float32))


def dot(left: Array, right: Array) -> Array:
    """Returns the inner products ``[B]`` of two ``[B, ...]`` arrays."""
    return jnp.sum(flatten(left) * flatten(right), axis=1)


def vector_norm(vectors: Array, norm: str) -> Array:
    """Returns the norm of each example.

    The derivative at a zero vector is 0, and in l_1 and l_inf that of a zero coordinate, where
    ``jnp.linalg.norm`` gives NaN and ``jnp.abs`` 1.

    Args:
      vectors: ``[B, ...]``.
      norm: ``linf``, ``l2`` or ``l1``.

    Returns:
      ``[B]``, in the dtype of ``vectors``.

    Raises:
      ValueError: for an unknown norm.
    """
    _validate.one_of(DUALS, norm=norm)
    flat = flatten(vectors)
    if norm == "linf":
        return jnp.max(flat * jnp.sign(flat), axis=1, initial=0)
    if norm == "l1":
        return jnp.sum(flat * jnp.sign(flat), axis=1)
    squared = jnp.sum(flat * flat, axis=1)
    positive = squared > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squared, 1)), 0)


def rescale(vectors: Array) -> tuple[Array, Array]:
    """Divides each example by its largest magnitude.

    Sums of squares then neither underflow nor overflow. The scale is held constant under
    differentiation: for functions of degree 0, such as a cosine, the value and all derivatives are
    unchanged.

    Args:
      vectors: ``[B, ...]``.

    Returns:
      ``(vectors / scale, scale)`` with scale ``[B]``; the scale of a zero vector is 1.
    """
    largest = jax.lax.stop_gradient(vector_norm(vectors, "linf"))
    scale = jnp.where(largest > 0, largest, 1)
    return vectors / expand(scale, vectors), scale
