"""Tests of searches over the bits of floats, against sorting and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gfa_jax import bisection

_order_statistic = jax.jit(bisection.order_statistic)
_largest_below = jax.jit(lambda limit: bisection.largest_float(lambda t: t <= limit, limit))


@given(
    st.lists(
        st.lists(st.floats(0, 2.0**127, width=32), min_size=6, max_size=6), min_size=3, max_size=3
    ),
    st.lists(st.integers(0, 5), min_size=3, max_size=3),
)
@settings(deadline=None, max_examples=60)
def test_order_statistic_is_that_of_sorting(values, ranks):
    values = np.array(values, np.float32)
    values = np.where(values < 1.2e-38, 0, values)  # XLA flushes denormal numbers to zero
    expected = np.sort(values, axis=1)[np.arange(3), ranks]
    np.testing.assert_array_equal(_order_statistic(values, np.array(ranks)), expected)


def test_order_statistic_with_ties_and_zeros():
    values = jnp.array([[0, 0, 2, 2, 2, 5.0]])
    for rank, expected in enumerate([0, 0, 2, 2, 2, 5]):
        assert _order_statistic(values, jnp.array([rank]))[0] == expected


@given(st.floats(0, 2.0**127, width=32))
@settings(deadline=None, max_examples=60)
def test_largest_float_is_exact(limit):
    limit = np.array([limit if limit >= 1.2e-38 else 0], np.float32)
    np.testing.assert_array_equal(_largest_below(limit), limit)


def test_largest_float_stays_finite_where_the_predicate_always_holds():
    always = bisection.largest_float(lambda t: t >= 0, jnp.ones(2))
    np.testing.assert_array_equal(always, np.full(2, np.finfo(np.float32).max))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_floats(dtype):
    values = jnp.array([[0.5, 0.25, 3.0, 0.0]], dtype)
    found = bisection.order_statistic(values, jnp.array([2]))
    assert found.dtype == dtype
    assert found[0] == 0.5


def test_float64():
    with jax.enable_x64(True):
        limit = jnp.array([np.pi])
        assert limit.dtype == jnp.float64
        assert bisection.largest_float(lambda t: t <= limit, limit)[0] == np.pi
