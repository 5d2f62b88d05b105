"""Tests of gfa_jax.norms: values against NumPy, duality, and derivatives at zero."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gfa_jax import norms

NORMS = ("linf", "l2", "l1")
ORDERS = {"linf": np.inf, "l2": 2, "l1": 1}

# Values whose squares neither underflow nor overflow in float32.
components = st.floats(-1e3, 1e3, width=32).map(lambda value: 0.0 if abs(value) < 1e-3 else value)
batches = hnp.arrays(np.float32, (3, 5), elements=components)
fast = settings(max_examples=25, deadline=None, derandomize=True)


@pytest.mark.parametrize("shape", [(1, 7), (3, 2, 4, 3)])
@pytest.mark.parametrize("norm", NORMS)
def test_vector_norm_equals_numpy_on_each_example(norm, shape):
    vectors = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    expected = np.linalg.norm(vectors.reshape(shape[0], -1), ord=ORDERS[norm], axis=1)
    values = norms.vector_norm(jnp.asarray(vectors), norm)
    assert values.shape == shape[:1]
    assert values.dtype == jnp.float32
    np.testing.assert_allclose(values, expected, rtol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_dual_is_an_involution(norm):
    assert norms.dual(norms.dual(norm)) == norm


def test_duals_of_the_three_norms():
    assert {norm: norms.dual(norm) for norm in NORMS} == {"linf": "l1", "l2": "l2", "l1": "linf"}


@pytest.mark.parametrize("norm", NORMS)
@given(left=batches, right=batches)
@fast
def test_hoelder_inequality(norm, left, right):
    bound = norms.vector_norm(left, norm) * norms.vector_norm(right, norms.dual(norm))
    assert np.all(np.abs(norms.dot(left, right)) <= np.asarray(bound) * (1 + 1e-5))


def attaining(vectors, norm):
    """Vectors of unit dual norm whose inner product with ``vectors`` is their norm."""
    if norm == "l1":
        return np.sign(vectors)
    if norm == "l2":
        length = np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors / np.where(length > 0, length, 1)
    unit = np.zeros_like(vectors)
    largest = np.argmax(np.abs(vectors), axis=1)
    rows = np.arange(len(vectors))
    unit[rows, largest] = np.sign(vectors[rows, largest])
    return unit


@pytest.mark.parametrize("norm", NORMS)
@given(vectors=batches)
@fast
def test_dual_norm_attains_equality(norm, vectors):
    unit = attaining(vectors, norm)
    assert np.all(np.asarray(norms.vector_norm(unit, norms.dual(norm))) <= 1 + 1e-6)
    np.testing.assert_allclose(
        norms.dot(vectors, unit), norms.vector_norm(vectors, norm), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("norm", NORMS)
@given(vectors=batches)
@fast
def test_gradient_of_the_norm_is_a_unit_vector_of_the_dual_norm(norm, vectors):
    gradient = jax.grad(lambda v: jnp.sum(norms.vector_norm(v, norm)))(jnp.asarray(vectors))
    assert np.all(np.asarray(norms.vector_norm(gradient, norms.dual(norm))) <= 1 + 1e-5)
    # Euler: a norm has degree 1.
    np.testing.assert_allclose(
        norms.dot(vectors, gradient), norms.vector_norm(vectors, norm), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("norm", NORMS)
def test_norm_and_gradient_are_zero_at_zero(norm):
    vectors = jnp.stack([jnp.zeros((2, 3)), jnp.ones((2, 3))])
    gradient = jax.grad(lambda v: jnp.sum(norms.vector_norm(v, norm)))(vectors)
    assert norms.vector_norm(vectors, norm)[0] == 0
    np.testing.assert_array_equal(gradient[0], np.zeros((2, 3)))
    assert np.all(np.asarray(gradient[1]) > 0)


def test_l1_gradient_is_the_sign():
    gradient = jax.grad(lambda v: norms.vector_norm(v, "l1")[0])(jnp.array([[0.0, -2.0, 3.0]]))
    np.testing.assert_array_equal(gradient, [[0, -1, 1]])


def test_second_derivative_of_the_l2_norm_is_finite_at_zero():
    hessian = jax.hessian(lambda v: norms.vector_norm(v[None], "l2")[0])(jnp.zeros(3))
    np.testing.assert_array_equal(hessian, np.zeros((3, 3)))


@pytest.mark.parametrize("norm", NORMS)
def test_norm_of_no_coordinates_is_zero(norm):
    np.testing.assert_array_equal(norms.vector_norm(jnp.zeros((2, 0)), norm), np.zeros(2))


@pytest.mark.parametrize("norm", NORMS)
def test_norm_keeps_the_dtype(norm):
    assert norms.vector_norm(jnp.ones((2, 3), jnp.bfloat16), norm).dtype == jnp.bfloat16


@pytest.mark.parametrize("norm", NORMS)
def test_norm_under_jit_and_vmap_equals_eager(norm, key):
    vectors = jax.random.normal(key, (2, 3, 4))
    eager = jnp.stack([norms.vector_norm(part, norm) for part in vectors])
    batched = jax.jit(jax.vmap(lambda v: norms.vector_norm(v, norm)))(vectors)
    np.testing.assert_allclose(batched, eager, rtol=1e-6)


def test_expand_broadcasts_one_scalar_to_each_example():
    vectors = jnp.ones((2, 3, 4, 1))
    scaled = norms.expand(jnp.array([2.0, 3.0]), vectors) * vectors
    np.testing.assert_array_equal(scaled[:, 0, 0, 0], [2, 3])
    assert scaled.shape == vectors.shape


def test_dot_is_per_example():
    left = jnp.arange(12.0).reshape(2, 3, 2)
    np.testing.assert_allclose(norms.dot(left, left + 1), [70, 502])


@pytest.mark.parametrize("factor", [1e-30, 1.0, 1e30])
def test_rescale_reads_directions_at_every_magnitude(factor):
    vectors = jnp.array([[3.0, -4.0], [0.0, 0.0], [0.0, 1.0]])
    scaled, scale = norms.rescale(factor * vectors)
    np.testing.assert_allclose(scaled, [[0.75, -1], [0, 0], [0, 1]], rtol=1e-6)
    np.testing.assert_allclose(scale, [4 * factor, 1, factor], rtol=1e-6)


def test_rescale_leaves_the_gradient_of_a_cosine_unchanged():
    direction = jnp.array([[1.0, 2.0, -1.0]])

    def cosine(vectors):
        length = norms.vector_norm(vectors, "l2") * norms.vector_norm(direction, "l2")
        return (norms.dot(vectors, direction) / length)[0]

    vectors = jnp.array([[0.3, -2.0, 1.5]])
    expected = jax.grad(cosine)(vectors)
    gradient = jax.grad(lambda v: cosine(norms.rescale(v)[0]))(vectors)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)


def test_rescale_has_finite_derivatives_at_zero():
    gradient = jax.grad(lambda v: jnp.sum(norms.rescale(v)[0]))(jnp.zeros((1, 3)))
    np.testing.assert_array_equal(gradient, np.ones((1, 3)))


def test_unknown_norm_is_named_with_what_is_valid():
    message = r"norm='l3' is not one of \['l1', 'l2', 'linf'\]"
    with pytest.raises(ValueError, match=message):
        norms.dual("l3")
    with pytest.raises(ValueError, match=message):
        norms.vector_norm(jnp.ones((1, 2)), "l3")
