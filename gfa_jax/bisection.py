"""Searches over floating-point numbers by their bits: exact, and free of sorting.

XLA sorts slowly, above all on CPU. Non-negative floats are ordered as their bit patterns are, so
that one pass over the data for each bit finds a threshold exactly.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from gfa_jax.types import Array


def largest_float(predicate: Callable[[Array], Array], like: Array) -> Array:
    """Returns the largest finite ``t >= 0`` of each example at which a predicate holds.

    Args:
      predicate: ``t [B] -> bool [B]``, true at 0, and once false, false for all larger ``t``.
      like: ``[B]``, of the dtype of ``t``.
    """
    bits = jnp.finfo(like.dtype).bits
    unsigned = jnp.dtype(f"uint{bits}")

    def as_float(pattern: Array) -> Array:
        return jax.lax.bitcast_convert_type(pattern, like.dtype)

    def set_bit(index: Array, pattern: Array) -> Array:
        shift = (bits - 2 - index).astype(unsigned)
        tried = pattern | (jnp.ones((), unsigned) << shift)
        value = as_float(tried)
        return jnp.where(jnp.isfinite(value) & predicate(value), tried, pattern)

    start = jnp.zeros_like(like, unsigned)
    found = as_float(jax.lax.fori_loop(0, bits - 1, set_bit, start))
    # XLA takes numbers below the smallest normal one for zero, NumPy does not.
    return jnp.where(found < jnp.finfo(like.dtype).tiny, 0, found)


def order_statistic(values: Array, ranks: Array) -> Array:
    """Returns the entry of rank ``ranks [B]``, counted from 0 at the smallest, of ``[B, D]``.

    The same as ``sort(values)[rank]``, for finite values >= 0.
    """

    def is_low(threshold: Array) -> Array:
        return jnp.sum(values < threshold[:, None], axis=1) <= ranks

    return largest_float(is_low, values[:, 0])
