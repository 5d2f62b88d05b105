"""Minimal filtering equals the plain sum: exactly in integers, closely in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from gfa_jax.models import winograd


def reference(padded, kernel):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(padded, kernel, (1, 1), "VALID", dimension_numbers=numbers)


def minimal(padded, kernel):
    return winograd.convolve(padded, winograd.transform_kernel(kernel), None)


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.tuples(*[st.integers(1, 4)] * 5),
    seed=st.integers(0, 2**32 - 1),
)
def test_is_exact_in_integers(sizes, seed):
    """All that it computes are quarters of small integers, which floats hold exactly."""
    batch, rows, columns, before, after = sizes
    rng = np.random.default_rng(seed)
    padded = rng.integers(-8, 9, (batch, 2 * rows + 2, 2 * columns + 2, before))
    kernel = rng.integers(-8, 9, (3, 3, before, after))
    arrays = [jnp.asarray(array, jnp.float32) for array in (padded, kernel)]
    np.testing.assert_array_equal(minimal(*arrays), reference(*arrays))


def test_odd_sizes_are_refused():
    with pytest.raises(TypeError, match="reshape"):
        minimal(jnp.zeros((1, 7, 6, 2)), jnp.zeros((3, 3, 2, 2)))


def test_rounding_is_that_of_a_few_plain_sums(key):
    left, right = jax.random.split(key)
    padded, kernel = (
        jax.random.normal(left, (2, 18, 18, 64)),
        jax.random.normal(right, (3, 3, 64, 64)),
    )
    with jax.enable_x64(True):
        wide = (jnp.asarray(np.asarray(array), jnp.float64) for array in (padded, kernel))
        exact = np.asarray(reference(*wide))
    size = np.abs(exact).mean()
    errors = [np.abs(found(padded, kernel) - exact).mean() / size for found in (minimal, reference)]
    assert errors[0] < 5 * errors[1] < 1e-5
