"""Directions and shares against closed forms on a linear model."""

import chex
import jax
import jax.numpy as jnp
import numpy as np

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
