"""The compiled step: the same on one device and four, and donation of the state."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gfa_jax import ThreatModel, attacks, objectives
from gfa_jax.data import to_float
from gfa_jax.models import create
from gfa_jax.training import optimizers, state, step

LAYERS = ("normalize", "block_[0-9]+")


def build(objective, num_devices, module):
    mesh = step.data_mesh(jax.devices()[:num_devices])
    schedule = optimizers.schedule("constant", learning_rate=0.1, num_steps=10, warmup_fraction=0)
    tx = optimizers.create("sgd", schedule, momentum=0.9, weight_decay=1e-4, clip_norm=0.0)
    train_step = step.make_train_step(
        module,
        lambda number: objective,
        tx,
        layers=LAYERS,
        augment=lambda key, images: to_float(images),
        mesh=mesh,
    )
    init = jax.jit(
        lambda key: state.create(module, tx, key, (8, 8, 1)), out_shardings=step.replicated(mesh)
    )
    return train_step, init, mesh


OBJECTIVES = {
    "gfa_exact": objectives.gfa(1.0, target="log_odds"),
    "gfa_sampled": objectives.gfa(1.0),
    "gfa_finite_difference": objectives.gfa(1.0, second_order="finite_difference"),
    "tangential": objectives.gfa(1.0, form="tangential", target="log_odds"),
    "pgd_at": objectives.adversarial(
        attacks.pgd(ThreatModel(epsilon=0.1), num_steps=2, keep="last"), objectives.cross_entropy()
    ),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_step_does_not_depend_on_the_number_of_devices(name, key):
    """Gradients of a mean over a device's share would differ here: the tangential form sees their
    size."""
    module = create("cnn4", num_classes=4, width=0.25)
    batch = {
        "inputs": np.asarray(jax.random.uniform(key, (8, 8, 8, 1))),
        "labels": np.arange(8, dtype=np.int32) % 4,
    }
    results = []
    for num_devices in (1, 4):
        train_step, init, mesh = build(OBJECTIVES[name], num_devices, module)
        placed = jax.device_put(batch, step.split(mesh))
        current, metrics = train_step(init(key), placed, key)
        results.append((current.params, metrics))
    # A ReLU unit at the edge of zero may flip with the rounding; the whole must agree.
    (one, one_metrics), (four, four_metrics) = jax.device_get(results)
    flat = [
        np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)]) for tree in (one, four)
    ]
    assert np.linalg.norm(flat[0] - flat[1]) <= 1e-4 * np.linalg.norm(flat[0])
    chex.assert_trees_all_close(one_metrics, four_metrics, rtol=1e-3, atol=1e-5)


def test_the_state_is_donated_and_counts_steps(key):
    module = create("cnn4", num_classes=4, width=0.25)
    train_step, init, mesh = build(objectives.cross_entropy(), 1, module)
    batch = {"inputs": jnp.zeros((4, 8, 8, 1), jnp.uint8), "labels": jnp.zeros(4, jnp.int32)}
    before = init(key)
    after, _ = train_step(before, jax.device_put(batch, step.split(mesh)), key)
    assert before.params["head"]["kernel"].is_deleted()
    assert after.step == 1


def test_eval_sums_ignore_padding(key):
    module = create("cnn4", num_classes=4, width=0.25)
    mesh = step.data_mesh(jax.devices()[:1])
    params = jax.jit(module.init)(key, jnp.zeros((1, 8, 8, 1)))["params"]
    eval_step = step.make_eval_step(
        module,
        layers=LAYERS,
        layer_norms={"normalize": "linf"},
        attack=attacks.fgsm(ThreatModel(epsilon=0.1)),
        to_float=to_float,
        mesh=mesh,
    )
    batch = {
        "inputs": jax.random.uniform(key, (6, 8, 8, 1)),
        "labels": jnp.arange(6) % 4,
        "ids": jnp.arange(6),
        "mask": jnp.ones(6, bool),
    }
    whole = eval_step(params, {}, batch, key)
    mask = jnp.array([True] * 3 + [False] * 3)
    parts = [eval_step(params, {}, {**batch, "mask": m}, key) for m in (mask, ~mask)]
    chex.assert_trees_all_close(jax.tree.map(jnp.add, *parts), whole, rtol=1e-5, atol=1e-6)
    assert whole["num_examples"] == 6
    assert parts[0]["num_examples"] == 3
