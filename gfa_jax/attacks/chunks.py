"""Loops inside a compiled attack that leave examples alone once they are done.

A compiled batch costs the same whether one example is still going or all are. Where most are done
early, it pays to gather those that are not, so many at a time, and to loop over them alone.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp

from gfa_jax.types import Array, PyTree

Examples = TypeVar("Examples", bound=PyTree)
"""A pytree of arrays ``[B, ...]``; scalars are shared by all examples, and depend on the number of
steps alone."""


def loop(
    step: Callable[[Array, Examples], Examples],
    examples: Examples,
    is_going: Callable[[Examples], Array],
    *,
    num_steps: int,
    chunk_size: int | None = None,
    steps_between: int = 1,
) -> Examples:
    """Makes a number of steps, or fewer where no example is going any more.

    Args:
      step: ``(number, examples) -> examples``. What it does to an example must not depend on the
        others, and it leaves those that are not going as they are.
      examples: at the start.
      is_going: ``examples -> bool [B]``; an example that has stopped never goes again.
      num_steps: at most.
      chunk_size: examples that a step sees at once. By default, and for smaller batches, the whole
        batch, which suits one that is spread over devices: a chunk's examples lie anywhere in it.
      steps_between: steps after which chunks are formed anew. More of them move examples less often
        and look longer at those that have stopped.

    Returns:
      The examples at the end. They are the same for all ``chunk_size``, up to the rounding of other
      batch sizes.
    """

    def advance(first: Array, last: Array, some: Examples) -> tuple[Array, Examples]:
        def proceeds(carry: tuple[Array, Examples]) -> Array:
            number, some = carry
            return (number < last) & jnp.any(is_going(some))

        def body(carry: tuple[Array, Examples]) -> tuple[Array, Examples]:
            number, some = carry
            return number + 1, step(number, some)

        return jax.lax.while_loop(proceeds, body, (first, some))

    zero = jnp.zeros((), jnp.int32)
    size = is_going(examples).shape[0]
    if chunk_size is None or chunk_size >= size:
        return advance(zero, zero + num_steps, examples)[1]

    def proceeds(carry: tuple[Array, Examples]) -> Array:
        first, every = carry
        return (first < num_steps) & jnp.any(is_going(every))

    def body(carry: tuple[Array, Examples]) -> tuple[Array, Examples]:
        first, every = carry
        last = jnp.minimum(first + steps_between, num_steps)
        going = is_going(every)
        order = jnp.argsort(~going, stable=True)
        order = jnp.concatenate([order, jnp.full(chunk_size, size, order.dtype)])

        def chunk(index: Array, carry: tuple[Array, Examples]) -> tuple[Array, Examples]:
            reached, advanced = carry
            chosen = jax.lax.dynamic_slice(order, (index * chunk_size,), (chunk_size,))
            # Beyond the end, the last example is read and nothing is written. Every chunk begins
            # with the scalars of before.
            some = jax.tree.map(
                lambda leaf: leaf.at[chosen].get(mode="clip") if leaf.ndim else leaf, every
            )
            number, done = advance(first, last, some)

            def write(old: Array, new: Array) -> Array:
                if old.ndim:
                    return old.at[chosen].set(new, mode="drop")
                # A chunk that ended early has the scalars of fewer steps.
                return jnp.where(number > reached, new, old)

            return jnp.maximum(number, reached), jax.tree.map(write, advanced, done)

        num_chunks = (jnp.sum(going) + chunk_size - 1) // chunk_size
        return last, jax.lax.fori_loop(0, num_chunks, chunk, (first, every))[1]

    return jax.lax.while_loop(proceeds, body, (zero, examples))[1]
