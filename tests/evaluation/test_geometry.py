"""Directions and shares against closed forms on a linear model."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gfa_jax import losses
from gfa_jax.evaluation import geometry

WEIGHTS = jnp.array([[1.0, -1.0], [0.5, 2.0], [0.0, 1.0]])


def apply_fn(tap_values, inputs):
    shifted = inputs + tap_values.get("input", 0)
    return shifted @ WEIGHTS, {"input": shifted}


def test_directions_have_the_features_length_and_meet_at_zero(key):
    inputs, labels = jax.random.normal(jax.random.key(9), (5, 3)), jnp.array([0, 1, 0, 1, 0])
    lengths = jnp.array([-0.5, 0.0, 0.5])
    curves = geometry.loss_along_directions(
        apply_fn, key, inputs, labels, layer="input", lengths=lengths
    )
    clean = losses.log_odds(inputs @ WEIGHTS, labels)
    for curve in curves.values():
        chex.assert_trees_all_close(curve[1], clean, rtol=1e-5)
    for index, length in enumerate(lengths):
        expected = losses.log_odds((1 + length) * inputs @ WEIGHTS, labels)
        chex.assert_trees_all_close(curves["radial"][index], expected, rtol=1e-5, atol=1e-6)
    # With two classes the log-odds are linear: the tangential part of the gradient is the worst
    # tangential move.
    assert np.all(curves["worst_tangential"][2] >= curves["random_tangential"][2] - 1e-5)
    gradient = np.asarray(jax.grad(lambda x: losses.log_odds(x @ WEIGHTS, labels).sum())(inputs))
    unit = np.asarray(inputs) / np.linalg.norm(inputs, axis=1, keepdims=True)
    tangential = gradient - np.sum(gradient * unit, axis=1, keepdims=True) * unit
    rise = 0.5 * np.linalg.norm(inputs, axis=1) * np.linalg.norm(tangential, axis=1)
    chex.assert_trees_all_close(curves["worst_tangential"][2], clean + rise, rtol=1e-4)


def test_tangential_shares():
    inputs = jnp.array([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
    moved = inputs + jnp.array([[0.0, 1.0, 1.0], [0.0, -1.0, 0.0]])
    shares = geometry.tangential_shares(apply_fn, inputs, moved)
    chex.assert_trees_all_close(shares["input"], jnp.array([1.0, 0.0]), atol=1e-6)


def test_a_features_move_is_split_by_pythagoras():
    inputs = jnp.array([[2.0, 0.0, 0.0], [0.0, 3.0, 0.0], [1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    moves = jnp.array([[1.0, 2.0, 2.0], [0.0, 3.0, 4.0], [1.0, -1.0, 0.0], [0.0, 0.0, 0.0]])
    shares = geometry.tangential_shares(apply_fn, inputs, inputs + moves)["input"]
    chex.assert_trees_all_close(shares, jnp.array([8 / 9, 16 / 25, 1.0, 0.0]), rtol=1e-5)


def planes(size=4):
    return (jax.random.normal(jax.random.key(seed), (size, 3)) for seed in range(3))


def test_the_surface_of_a_linear_model_is_a_plane():
    inputs, first, second = planes()
    labels = jnp.array([0, 1, 1, 0])
    lengths = jnp.array([-1.0, 0.0, 0.5, 2.0, 3.0])
    surface = jax.jit(
        lambda *args: geometry.loss_surface(lambda x: x @ WEIGHTS, *args, bounds=None)
    )(inputs, labels, first, second, lengths)
    chex.assert_shape(surface, (5, 5, 4))
    # Of two classes, the log-odds are the difference of the logits.
    sign = np.where(labels == 0, 1, -1)
    normal = sign[:, None] * np.asarray(WEIGHTS[:, 1] - WEIGHTS[:, 0])
    value, along_first, along_second = (
        np.sum(normal * np.asarray(vectors), axis=1) for vectors in (inputs, first, second)
    )
    expected = (
        value[None, None]
        + np.asarray(lengths)[:, None, None] * along_first[None, None]
        + np.asarray(lengths)[None, :, None] * along_second[None, None]
    )
    chex.assert_trees_all_close(surface, expected.astype(np.float32), rtol=1e-4, atol=1e-4)


def test_the_surface_stays_in_the_box():
    inputs = jnp.array([[0.5, 0.5, 0.5]])
    first, second = jnp.array([[1.0, 0.0, 0.0]]), jnp.array([[0.0, 0.0, 1.0]])
    labels, lengths = jnp.array([0]), jnp.array([-2.0, 0.0, 2.0])
    surface = geometry.loss_surface(lambda x: x @ WEIGHTS, inputs, labels, first, second, lengths)
    moved = jnp.array([[1.0, 0.5, 0.0], [0.0, 0.5, 1.0]])
    expected = losses.log_odds(moved @ WEIGHTS, jnp.array([0, 0]))
    chex.assert_trees_all_close(surface[2, 0, 0], expected[0], rtol=1e-6)
    chex.assert_trees_all_close(surface[0, 2, 0], expected[1], rtol=1e-6)
    wider = geometry.loss_surface(
        lambda x: x @ WEIGHTS, inputs, labels, first, second, lengths, bounds=(-9.0, 9.0)
    )
    free = geometry.loss_surface(
        lambda x: x @ WEIGHTS, inputs, labels, first, second, lengths, bounds=None
    )
    chex.assert_trees_all_close(wider, free)
    assert not np.allclose(surface, free)


def test_bad_planes_are_refused():
    inputs, first, second = planes()
    labels = jnp.zeros(4, jnp.int32)
    with pytest.raises(ValueError, match=r"lengths has shape \(1, 2\)"):
        geometry.loss_surface(lambda x: x, inputs, labels, first, second, jnp.zeros((1, 2)))
    with pytest.raises(ValueError, match=r"second has shape \(4, 2\).*\(4, 3\)"):
        geometry.loss_surface(lambda x: x, inputs, labels, first, second[:, :2], jnp.zeros(3))
