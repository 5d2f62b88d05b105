"""Activation functions that flax does not have."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from gfa_jax.models import activations


def test_scaled_silu_is_silu_at_unit_scale_and_of_degree_one(key):
    images = jax.random.normal(key, (3, 4, 4, 2))
    rms = jnp.sqrt(jnp.mean(images**2, axis=(1, 2, 3), keepdims=True))
    expected = nn.silu(images / rms)
    chex.assert_trees_all_close(activations.scaled_silu(images / rms), expected, rtol=1e-5)
    chex.assert_trees_all_close(
        activations.scaled_silu(images), rms * expected, rtol=1e-5, atol=1e-6
    )
    # Euler's theorem, which the derivative of the scale is needed for.
    value, slope = jax.jvp(activations.scaled_silu, (images,), (images,))
    chex.assert_trees_all_close(slope, value, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(activations.scaled_silu(jnp.zeros((2, 4))), jnp.zeros((2, 4)))
    half = activations.scaled_silu(images.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    chex.assert_trees_all_close(half.astype(jnp.float32), rms * expected, rtol=0.05, atol=0.01)
