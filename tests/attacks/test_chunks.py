"""Tests of loops that set finished examples aside: the same results from fewer evaluations."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gfa_jax.attacks import chunks


class Walk(NamedTuple):
    """Examples that go until they have made the steps that they need."""

    needed: jax.Array
    made: jax.Array
    trail: jax.Array
    shared: jax.Array
    key: jax.Array


NEEDED = np.array([3, 0, 7, 1, 20, 3, 9], np.int32)
seen: list[int] = []


@functools.partial(jax.jit, static_argnames=("num_steps", "chunk_size", "steps_between"))
def run(needed, num_steps, chunk_size=None, steps_between=1):
    def step(number, walk):
        going = walk.made < walk.needed
        jax.debug.callback(lambda going: seen.append(len(going)), going)
        return Walk(
            walk.needed,
            walk.made + going,
            walk.trail.at[:, number].set(jnp.where(going, walk.shared, walk.trail[:, number])),
            walk.shared + 2,
            jnp.where(going, jax.vmap(jax.random.fold_in, (0, None))(walk.key, number), walk.key),
        )

    size = len(needed)
    start = Walk(
        needed,
        jnp.zeros(size, jnp.int32),
        jnp.zeros((size, num_steps), jnp.int32),
        jnp.ones((), jnp.int32),
        jax.random.split(jax.random.key(0), size),
    )
    return chunks.loop(
        step,
        start,
        lambda walk: walk.made < walk.needed,
        num_steps=num_steps,
        chunk_size=chunk_size,
        steps_between=steps_between,
    )


@pytest.mark.parametrize("chunk_size", [None, 1, 3, 7, 100])
@pytest.mark.parametrize("steps_between", [1, 4, 50])
@pytest.mark.parametrize("needed", [NEEDED, NEEDED[::-1].copy(), np.sort(NEEDED)[::-1].copy()])
def test_each_example_makes_its_own_steps(chunk_size, steps_between, needed):
    walk = run(needed, 9, chunk_size, steps_between)
    np.testing.assert_array_equal(walk.made, np.minimum(needed, 9))
    # What all examples share has made as many steps, in whichever chunk they are, and whether the
    # last chunk ended early or not.
    expected = np.where(np.arange(9) < needed[:, None], 1 + 2 * np.arange(9), 0)
    np.testing.assert_array_equal(walk.trail, expected)
    whole = run(needed, 9)
    np.testing.assert_array_equal(jax.random.key_data(walk.key), jax.random.key_data(whole.key))


@pytest.mark.parametrize(
    ("chunk_size", "steps_between", "expected"),
    [
        (None, 1, 7 * 9),
        # Going at each step: 6 5 5 3 3 3 3 2 2 of 7, rounded up to chunks.
        (1, 1, 6 + 5 + 5 + 3 + 3 + 3 + 3 + 2 + 2),
        (2, 1, 6 + 6 + 6 + 4 + 4 + 4 + 4 + 2 + 2),
        # A chunk ends with its last example; chunks of two steps begin with 6 5 3 3 2 examples.
        (1, 2, 6 + 5 + 5 + 3 + 3 + 3 + 3 + 2 + 2),
    ],
)
def test_finished_examples_are_not_looked_at(chunk_size, steps_between, expected):
    seen.clear()
    jax.block_until_ready(run(NEEDED, 9, chunk_size, steps_between))
    jax.effects_barrier()
    assert sum(seen) == expected


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_it_ends_once_all_have_stopped(chunk_size):
    seen.clear()
    walk = run(np.array([2, 1, 0], np.int32), 1000, chunk_size)
    jax.effects_barrier()
    assert len(seen) == 2
    np.testing.assert_array_equal(walk.made, [2, 1, 0])
