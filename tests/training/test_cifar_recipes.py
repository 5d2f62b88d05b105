"""The published CIFAR-10 recipes, narrow and on random images: each trains with its BatchNorm."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import cifar10_baselines
from gfa_jax.training import layout, recipe

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", cifar10_baselines.RECIPES)
def test_a_step_is_finite_and_moves_weights_and_statistics(key, name):
    config = cifar10_baselines.get_config(name)
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, width=0.05), batch_size=8
    )
    built = recipe.build(config, num_classes=10, image_shape=(32, 32, 3))
    train_step = built.train_step(layout.data_mesh(jax.devices()[:1]))
    rng = np.random.default_rng(0)
    batch = {
        "inputs": jnp.asarray(rng.integers(0, 256, (8, 32, 32, 3), np.uint8)),
        "labels": jnp.arange(8),
    }
    first = built.init(key)
    before = jax.tree.map(np.asarray, first)
    # Late enough for all weights of the objective to be there.
    current = dataclasses.replace(first, step=jnp.asarray(config.train_steps // 2))
    for _ in range(3):
        current, metrics = train_step(current, batch, key)
    chex.assert_tree_all_finite((current, metrics))
    assert metrics["update_norm"] > 0
    assert current.model_state["batch_stats"]
    for part in ("params", "model_state"):
        moved = jax.tree.map(
            lambda a, b: np.max(np.abs(np.asarray(a) - b)),
            getattr(current, part),
            getattr(before, part),
        )
        assert max(jax.tree.leaves(moved)) > 0
