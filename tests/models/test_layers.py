"""Layers equal flax's and their formulas."""

import chex
import flax.linen as nn
import jax
import numpy as np
import pytest

from gfa_jax.models import layers


@pytest.mark.parametrize("shape", [(2, 6, 8, 3), (2, 5, 7, 3), (1, 2, 3, 1)])
def test_average_pool_is_that_of_flax(shape, key):
    images = jax.random.normal(key, shape)
    found, pull_back = jax.vjp(layers.average_pool, images)
    expected, expected_pull_back = jax.vjp(lambda x: nn.avg_pool(x, (2, 2), (2, 2)), images)
    cotangent = jax.random.normal(key, expected.shape)
    chex.assert_trees_all_close(found, expected, rtol=1e-6)
    chex.assert_trees_all_close(pull_back(cotangent), expected_pull_back(cotangent), rtol=1e-6)


def test_normalize_uses_one_value_or_one_for_each_channel(key):
    inputs = jax.random.uniform(key, (2, 3, 3, 2))
    one = layers.Normalize((0.5,), (0.25,)).apply({}, inputs)
    chex.assert_trees_all_close(one, (inputs - 0.5) / 0.25, rtol=1e-6)
    each = layers.Normalize((0.5, 0.1), (0.25, 2.0)).apply({}, inputs)
    expected = (np.asarray(inputs) - np.array([0.5, 0.1])) / np.array([0.25, 2.0])
    chex.assert_trees_all_close(each, expected, rtol=1e-5)
