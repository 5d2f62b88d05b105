"""The compiled step: the same on one device and four, and donation of the state."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gfa_jax import ThreatModel, attacks, objectives
from gfa_jax.data import to_float
from gfa_jax.models import create
from gfa_jax.training import collectives, layout, optimizers, state, step

LAYERS = ("normalize", "block_[0-9]+")


def build(objective, num_devices, module, *, fsdp=1, augment=None, **options):
    mesh = layout.data_mesh(jax.devices()[:num_devices], fsdp=fsdp)
    schedule = optimizers.schedule("constant", learning_rate=0.1, num_steps=10, warmup_fraction=0)
    tx = optimizers.create("sgd", schedule, momentum=0.9, weight_decay=1e-4, clip_norm=0.0)

    def create(key):
        return state.create(module, tx, key, (8, 8, 1), with_ema=options.get("ema_decay", 0) > 0)

    shardings = layout.of_state(mesh, jax.eval_shape(create, jax.random.key(0)))
    train_step = step.make_train_step(
        module,
        lambda number: objective,
        tx,
        layers=LAYERS,
        augment=augment or (lambda key, images: to_float(images)),
        mesh=mesh,
        shardings=shardings,
        **options,
    )
    return train_step, jax.jit(create, out_shardings=shardings), mesh


def take_steps(objective, num_devices, module, key, *, num_steps=2, batch_size=16, **options):
    """Returns the state after some steps and the last metrics, on the host."""
    train_step, init, mesh = build(objective, num_devices, module, **options)
    current, metrics = init(key), {}
    for number in range(num_steps):
        batch = {
            "inputs": np.asarray(
                jax.random.uniform(jax.random.fold_in(key, number), (batch_size, 8, 8, 1))
            ),
            "labels": np.arange(batch_size, dtype=np.int32) % 4,
        }
        current, metrics = train_step(current, jax.device_put(batch, layout.split(mesh)), key)
    return jax.device_get(current), jax.device_get(metrics)


def assert_close(one, other, *, rtol=1e-4):
    """Compares whole trees: a ReLU unit at the edge of zero may flip with the rounding."""
    flat = [
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (one, other)
    ]
    assert np.linalg.norm(flat[0] - flat[1]) <= rtol * np.linalg.norm(flat[0])


OBJECTIVES = {
    "gfa_exact": objectives.gfa(1.0, target="log_odds"),
    "gfa_sampled": objectives.gfa(1.0),
    "gfa_finite_difference": objectives.gfa(
        1.0, second_order="finite_difference", target="log_odds"
    ),
    "tangential": objectives.gfa(1.0, form="tangential", target="log_odds"),
    "pgd_at": objectives.adversarial(
        attacks.pgd(ThreatModel(epsilon=0.1), num_steps=2, keep="last"), objectives.cross_entropy()
    ),
    "pgd_at_without_draws": objectives.adversarial(
        attacks.pgd(ThreatModel(epsilon=0.1), num_steps=2, keep="last", random_start=False),
        objectives.cross_entropy(),
    ),
}

TWINS = ("gfa_sampled", "tangential")
"""They compile as long as the others, which are made of the same parts."""


@pytest.mark.parametrize(
    ("name", "fsdp"),
    [
        *((name, 1) for name in OBJECTIVES if name not in ("pgd_at_without_draws", *TWINS)),
        *(pytest.param(name, 1, marks=pytest.mark.slow) for name in TWINS),
        ("gfa_exact", 2),
        ("gfa_exact", 4),
    ],
)
def test_the_step_does_not_depend_on_the_devices(name, fsdp, key, monkeypatch):
    """Gradients of a mean over a device's share would differ here: the tangential form sees their
    size."""
    monkeypatch.setattr(layout, "MIN_SPLIT_SIZE", 64)
    module = create("cnn4", num_classes=4, width=0.25)
    one, one_metrics = take_steps(OBJECTIVES[name], 1, module, key)
    four, four_metrics = take_steps(OBJECTIVES[name], 4, module, key, fsdp=fsdp)
    assert_close(one, four)
    chex.assert_trees_all_close(one_metrics, four_metrics, rtol=1e-3, atol=1e-5)


def test_fsdp_splits_large_arrays_and_their_moments(key, monkeypatch):
    monkeypatch.setattr(layout, "MIN_SPLIT_SIZE", 100)
    module = create("cnn4", num_classes=4, width=0.25)
    train_step, init, mesh = build(OBJECTIVES["gfa_exact"], 4, module, fsdp=4)
    batch = {"inputs": np.ones((8, 8, 8, 1), np.float32), "labels": np.zeros(8, np.int32)}
    current, _ = train_step(init(key), jax.device_put(batch, layout.split(mesh)), key)
    kernels = {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path((current.params, current.opt_state))
    }
    split = {name for name, leaf in kernels.items() if not leaf.sharding.is_fully_replicated}
    assert split == {name for name, leaf in kernels.items() if leaf.size >= 100}
    assert len(split) == 6  # three kernels and their momentum
    for name in split:
        shard = kernels[name].addressable_shards[0].data
        assert shard.size == kernels[name].size // 4


def test_fsdp_gathers_parameters_and_sends_no_activations(key, monkeypatch):
    """Left to itself, XLA splits layers as their kernels are: hundreds of times the parameters."""
    monkeypatch.setattr(layout, "MIN_SPLIT_SIZE", 100)
    module = create("cnn4", num_classes=4, width=2)
    train_step, init, mesh = build(OBJECTIVES["gfa_exact"], 4, module, fsdp=4)
    current = init(key)
    batch = {"inputs": np.ones((64, 8, 8, 1), np.float32), "labels": np.zeros(64, np.int32)}
    compiled = train_step.lower(current, jax.device_put(batch, layout.split(mesh)), key).compile()
    found = collectives.count(compiled.as_text())
    whole = 4 * state.num_params(current.params)
    assert set(found) <= {"all-gather", "all-reduce", "reduce-scatter"}
    assert found["all-gather"].num_bytes <= 1.01 * whole
    assert sum(one.num_bytes for one in found.values()) <= 3.2 * whole


@pytest.mark.parametrize("name", ["gfa_exact", "gfa_finite_difference", "pgd_at_without_draws"])
def test_pmap_equals_jit(name, key):
    module = create("cnn4", num_classes=4, width=0.25)
    expected, expected_metrics = take_steps(OBJECTIVES[name], 4, module, key)
    got, metrics = take_steps(OBJECTIVES[name], 4, module, key, parallelism="pmap")
    assert_close(expected, got)
    chex.assert_trees_all_close(expected_metrics, metrics, rtol=1e-3, atol=1e-5)


def test_devices_draw_for_themselves_under_pmap(key):
    """The same draws on every device would halve nothing but the noise that training is to see."""

    def augment(key, images):
        return to_float(images) + jax.random.uniform(key, (len(images), 1, 1, 1))

    seen = []

    def objective(model, params, batch, key):
        jax.debug.callback(lambda value: seen.append(np.ravel(value)), batch["inputs"][:, 0, 0, 0])
        return objectives.cross_entropy()(model, params, batch, key)

    module = create("cnn4", num_classes=4, width=0.25)
    train_step, init, mesh = build(objective, 4, module, parallelism="pmap", augment=augment)
    batch = {"inputs": np.zeros((8, 8, 8, 1), np.float32), "labels": np.zeros(8, np.int32)}
    jax.block_until_ready(train_step(init(key), jax.device_put(batch, layout.split(mesh)), key))
    jax.effects_barrier()
    drawn = np.concatenate(seen)
    assert len(drawn) == len(np.unique(drawn)) == 8


@pytest.mark.parametrize(
    ("name", "num_devices"),
    [("gfa_exact", 1), ("gfa_exact", 4), ("pgd_at_without_draws", 1)],
)
def test_accumulated_gradients_are_those_of_the_whole_batch(name, num_devices, key):
    module = create("cnn4", num_classes=4, width=0.25)
    whole, metrics = take_steps(OBJECTIVES[name], num_devices, module, key)
    parts, parts_metrics = take_steps(
        OBJECTIVES[name], num_devices, module, key, accumulation_steps=4
    )
    assert_close(whole, parts)
    chex.assert_trees_all_close(metrics, parts_metrics, rtol=1e-3, atol=1e-5)


def test_parts_of_a_batch_draw_different_noise(key):
    """The sampled classes of two equal halves differ, or accumulation would repeat itself."""
    losses = []

    def objective(model, params, batch, key):
        loss, aux = objectives.cross_entropy()(model, params, batch, key)
        drawn = jax.random.uniform(key)
        return loss, aux._replace(metrics={**aux.metrics, "drawn": drawn, "drawn_2": drawn**2})

    module = create("cnn4", num_classes=4, width=0.25)
    for parts in (1, 2):
        _, metrics = take_steps(objective, 1, module, key, accumulation_steps=parts)
        losses.append(metrics["drawn_2"] - metrics["drawn"] ** 2)
    assert losses[0] == pytest.approx(0, abs=1e-6)
    assert losses[1] > 1e-4


def test_accumulation_keeps_batches_on_their_devices_and_takes_less_memory(key):
    module = create("cnn4", num_classes=4)
    found = {}
    for parts in (1, 8):
        train_step, init, mesh = build(OBJECTIVES["gfa_exact"], 4, module, accumulation_steps=parts)
        batch = {"inputs": np.ones((256, 8, 8, 1), np.float32), "labels": np.zeros(256, np.int32)}
        found[parts] = train_step.lower(
            init(key), jax.device_put(batch, layout.split(mesh)), key
        ).compile()
    memory = {parts: one.memory_analysis().temp_size_in_bytes for parts, one in found.items()}
    assert memory[8] < 0.5 * memory[1]
    assert set(collectives.count(found[8].as_text())) == {"all-reduce"}


def test_accumulation_passes_batch_statistics_on(key):
    module = create("cnn4", num_classes=4, width=0.25, homogeneous=False)
    module = module.clone(batch_norm=True)
    parts, _ = take_steps(
        objectives.cross_entropy(), 1, module, key, accumulation_steps=2, num_steps=1
    )
    halves = np.asarray(jax.random.uniform(jax.random.fold_in(key, 0), (16, 8, 8, 1)))
    variables = jax.jit(lambda key: module.init(key, halves[:1]))(key)
    for half in (halves[::2], halves[1::2]):
        _, changed = module.apply(variables, half, train=True, mutable=["batch_stats"])
        variables = {**variables, **changed}
    chex.assert_trees_all_close(
        parts.model_state["batch_stats"], variables["batch_stats"], rtol=1e-4, atol=1e-6
    )


def test_the_average_of_weights_follows_its_formula(key):
    module = create("cnn4", num_classes=4, width=0.25)
    decay = 0.2
    expected = None
    for number in range(4):
        current, _ = take_steps(
            objectives.cross_entropy(), 4, module, key, num_steps=number, ema_decay=decay
        )
        if expected is None:
            expected = current.params
        else:
            kept = min(decay, number / (9 + number))  # its step has the number before
            expected = optax.incremental_update(current.params, expected, 1 - kept)
        chex.assert_trees_all_close(current.ema[0], expected, rtol=1e-5, atol=1e-7)
        assert current.evaluated is current.ema


def test_the_state_is_donated_and_counts_steps(key):
    module = create("cnn4", num_classes=4, width=0.25)
    train_step, init, mesh = build(objectives.cross_entropy(), 1, module)
    batch = {"inputs": jnp.zeros((4, 8, 8, 1), jnp.uint8), "labels": jnp.zeros(4, jnp.int32)}
    before = init(key)
    after, _ = train_step(before, jax.device_put(batch, layout.split(mesh)), key)
    assert before.params["head"]["kernel"].is_deleted()
    assert after.step == 1


def test_eval_sums_ignore_padding(key):
    module = create("cnn4", num_classes=4, width=0.25)
    mesh = layout.data_mesh(jax.devices()[:1])
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
