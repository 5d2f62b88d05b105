"""The loop end to end on tiny runs: resuming, checkpoints, metrics, guards, and its refusals."""

import dataclasses
import json
import signal
import threading
import time

import chex
import jax
import numpy as np
import pytest

from configs import smoke
from gfa_jax import config as config_lib
from gfa_jax.evaluation import loading
from gfa_jax.training import checkpoint, guards, layout, loop, metrics, recipe, run_folder


def tiny_config(**changes):
    """A run of seconds: 12 steps of GFA on FGSM examples."""
    base = smoke.get_config()
    defaults = {
        "train_steps": 12,
        "attack": config_lib.AttackConfig(name="fgsm"),
        "loop": dataclasses.replace(base.loop, log_every=1, eval_every=6, checkpoint_every=5),
    }
    return dataclasses.replace(base, **{**defaults, **changes})


def final_model(workdir, config):
    """Returns the parameters of the latest checkpoint."""
    built = recipe.build(config, num_classes=10, image_shape=(8, 8, 1))
    template = built.template(layout.data_mesh())
    checkpoints = checkpoint.Checkpoints(workdir / "checkpoints", metric="eval/robust_accuracy")
    restored, _ = checkpoints.restore_latest(template)
    checkpoints.close()
    return restored


def without_timing(rows):
    return [{k: v for k, v in row.items() if k != "examples_per_second"} for row in rows]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """One whole run: its folder and validation metrics."""
    workdir = tmp_path_factory.mktemp("uninterrupted")
    return workdir, loop.train_and_evaluate(tiny_config(), workdir)


def test_a_run_writes_config_metrics_and_checkpoints(uninterrupted):
    workdir, result = uninterrupted
    saved = json.loads((workdir / "config.json").read_text())
    assert config_lib.from_dict(saved["config"]) == tiny_config()
    assert {"jax", "flax", "devices"} <= set(saved["versions"])
    rows = metrics.read(workdir / "metrics.jsonl")
    train_steps = [row["step"] for row in rows if "train/loss" in row]
    assert train_steps == list(range(1, 13))
    assert {
        "train/cross_entropy",
        "train/accuracy",
        "train/alignment/normalize",
        "train/alignment/block_3",
        "train/alignment_penalty",
        "train/grad_norm",
        "train/learning_rate",
        "examples_per_second",
    } <= set(rows[0])
    assert set(result) >= {"eval/clean_accuracy", "eval/robust_accuracy", "eval/cross_entropy"}
    assert 0 <= result["eval/robust_accuracy"] <= result["eval/clean_accuracy"] <= 1
    assert final_model(workdir, tiny_config()).step == 12


@pytest.mark.parametrize("stops", [(5,), pytest.param((3, 6, 11), marks=pytest.mark.slow)])
def test_a_resumed_run_is_bit_identical(uninterrupted, tmp_path, stops):
    workdir, result = uninterrupted
    for stop in stops:
        loop.train_and_evaluate(tiny_config(), tmp_path, stop_after=stop)
    resumed = loop.train_and_evaluate(tiny_config(), tmp_path)
    assert resumed == result
    chex.assert_trees_all_equal(
        final_model(tmp_path, tiny_config()), final_model(workdir, tiny_config())
    )
    expected = metrics.read(workdir / "metrics.jsonl")
    got = metrics.read(tmp_path / "metrics.jsonl")
    assert without_timing(got) == without_timing(expected)


def test_a_finished_run_is_not_trained_again(uninterrupted):
    workdir, result = uninterrupted
    before = final_model(workdir, tiny_config())
    assert loop.train_and_evaluate(tiny_config(), workdir) == pytest.approx(result)
    chex.assert_trees_all_equal(final_model(workdir, tiny_config()), before)


@pytest.mark.parametrize("placement", [pytest.param("device", marks=pytest.mark.slow), "stream"])
def test_where_the_data_lies_changes_nothing(uninterrupted, tmp_path, placement):
    """Also when a run moves on to another placement."""
    workdir, result = uninterrupted
    moved = dataclasses.replace(tiny_config().data, placement=placement)
    loop.train_and_evaluate(tiny_config(), tmp_path, stop_after=5)
    assert loop.train_and_evaluate(tiny_config(data=moved), tmp_path) == result
    chex.assert_trees_all_equal(
        final_model(tmp_path, tiny_config()), final_model(workdir, tiny_config())
    )


@pytest.mark.slow
def test_how_a_run_computes_may_be_chosen(tmp_path):
    """Accumulation, averages, bfloat16 and rematerialisation together, stopped and resumed."""
    options = {
        "accumulation_steps": 2,
        "ema_decay": 0.5,
        "model": dataclasses.replace(tiny_config().model, dtype="bfloat16", remat=True),
    }
    config = tiny_config(**options)
    result = loop.train_and_evaluate(config, tmp_path / "whole")
    loop.train_and_evaluate(config, tmp_path / "parts", stop_after=7)
    assert loop.train_and_evaluate(config, tmp_path / "parts") == result
    whole, parts = (final_model(tmp_path / name, config) for name in ("whole", "parts"))
    chex.assert_trees_all_equal(whole, parts)
    assert {leaf.dtype for leaf in jax.tree.leaves((whole.params, whole.ema))} == {
        np.dtype("float32")
    }
    # What is evaluated later is the average, in float32.
    run = loading.load_run(tmp_path / "whole")
    chex.assert_trees_all_equal(jax.device_get(run.params), jax.device_get(whole.ema[0]))
    assert run.classifier.module.dtype is None


def test_split_state_trains_validates_and_resumes_as_whole_state_does(
    uninterrupted, tmp_path, monkeypatch
):
    monkeypatch.setattr(layout, "MIN_SPLIT_SIZE", 64)
    config = tiny_config(fsdp=2)
    template = recipe.build(config, num_classes=10, image_shape=(8, 8, 1)).template(
        layout.data_mesh(fsdp=2)
    )
    assert not all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(template))
    loop.train_and_evaluate(config, tmp_path, stop_after=7)
    result = loop.train_and_evaluate(config, tmp_path)
    assert result == pytest.approx(uninterrupted[1], rel=2e-3, abs=1e-3)


def test_pmap_trains_as_jit_does(tmp_path):
    plain = tiny_config(
        attack=config_lib.AttackConfig(),
        gfa=dataclasses.replace(tiny_config().gfa, target="log_odds"),
    )
    results = [
        loop.train_and_evaluate(dataclasses.replace(plain, parallelism=kind), tmp_path / kind)
        for kind in ("jit", "pmap")
    ]
    assert results[0] == pytest.approx(results[1], rel=1e-3, abs=1e-4)


def test_sigterm_saves_and_returns(tmp_path):
    config = tiny_config(train_steps=100_000)

    def terminate_once_training():
        while len(metrics.read(tmp_path / "metrics.jsonl")) < 3:
            time.sleep(0.05)
        signal.raise_signal(signal.SIGTERM)

    threading.Thread(target=terminate_once_training, daemon=True).start()
    loop.train_and_evaluate(config, tmp_path)
    saved = int(final_model(tmp_path, config).step)
    assert 0 < saved < 100_000
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_non_finite_loss_stops_with_the_last_good_checkpoint(tmp_path):
    config = tiny_config(
        train_steps=40,
        optimizer=config_lib.OptimizerConfig(
            name="sgd", learning_rate=1e25, schedule="constant", warmup_fraction=0, clip_norm=0
        ),
    )
    with pytest.raises(
        guards.TrainingFailedError, match="not finite. What was saved before is intact"
    ):
        loop.train_and_evaluate(config, tmp_path)
    rows = metrics.read(tmp_path / "metrics.jsonl")
    assert all(np.isfinite(list(row.values())).all() for row in rows)


def test_log_and_save_intervals_may_change_on_resuming(uninterrupted):
    workdir, result = uninterrupted
    changed = dataclasses.replace(tiny_config().loop, log_every=7, checkpoint_every=1)
    assert loop.train_and_evaluate(tiny_config(loop=changed), workdir) == pytest.approx(result)


def test_a_failing_evaluation_does_not_cost_the_training(tmp_path, monkeypatch):
    make = loop._make_evaluator

    def broken(run):
        make(run)

        def evaluate(current):
            raise MemoryError("validation")

        return evaluate

    monkeypatch.setattr(loop, "_make_evaluator", broken)
    with pytest.raises(MemoryError):
        loop.train_and_evaluate(tiny_config(), tmp_path)
    assert final_model(tmp_path, tiny_config()).step == 6


def test_a_second_trainer_in_the_folder_is_refused(uninterrupted):
    workdir, _ = uninterrupted
    with (
        run_folder.only_trainer(workdir),
        pytest.raises(ValueError, match="another process trains"),
    ):
        loop.train_and_evaluate(tiny_config(), workdir)


@pytest.mark.parametrize("content", ["", "[1]", "{}", '{"config": 3}', '{"config": {"gfa": 3}}'])
def test_a_damaged_config_is_named(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config.json' is damaged|config.gfa=3 must hold fields"):
        run_folder.claim(tmp_path, tiny_config())


def test_a_folder_of_another_config_is_refused_and_left_alone(uninterrupted):
    workdir, _ = uninterrupted
    before = (workdir / "config.json").read_bytes()
    other = tiny_config(seed=3, gfa=config_lib.GFAConfig(weight=2.0))
    with pytest.raises(
        run_folder.WorkdirMismatchError,
        match=r"config.gfa.weight: 1.0 there, 2.0 now\n.*config.seed",
    ):
        loop.train_and_evaluate(other, workdir)
    assert (workdir / "config.json").read_bytes() == before


def test_bad_configs_are_refused_before_anything_is_written(tmp_path):
    cases = [
        (tiny_config(batch_size=6), "config.batch_size=6 must be divisible by the 4 devices"),
        (
            tiny_config(threat=config_lib.ThreatConfig(epsilon=-0.1)),
            "config.threat.epsilon=-0.1 must be a finite number >= 0",
        ),
        (
            tiny_config(model=config_lib.ModelConfig(name="cnn7")),
            "'cnn7' needs images of at least 20x20; config.data.name='digits' has 8x8",
        ),
        (
            tiny_config(model=config_lib.ModelConfig(input_mean=(0.1, 0.2))),
            "config.model.input_mean=.* must have one value, or 1 for images of 1",
        ),
        (
            tiny_config(gfa=config_lib.GFAConfig(weight=1.0, input_weight=0, hidden_weight=0)),
            "leave no layer to align",
        ),
    ]
    for config, message in cases:
        with pytest.raises(ValueError, match=message):
            loop.train_and_evaluate(config, tmp_path / "run")
        assert not (tmp_path / "run").exists()
    with pytest.raises(FileNotFoundError, match=r"cifar10.*gfa_jax.data.prepare"):
        data = config_lib.DataConfig(name="tfds:cifar10", data_dir=str(tmp_path))
        loop.train_and_evaluate(tiny_config(data=data), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_layer_pattern_that_matches_nothing_is_refused(tmp_path):
    for weight in (1.0, 0.0):
        config = tiny_config(gfa=config_lib.GFAConfig(weight=weight, hidden_layers="blok_.*"))
        with pytest.raises(
            ValueError, match=r"'blok_.\*' matches no layer of CNN.*Its layers are: block_0"
        ):
            loop.train_and_evaluate(config, tmp_path / "run")
    broken = tiny_config(gfa=config_lib.GFAConfig(weight=1.0, hidden_layers="block_["))
    with pytest.raises(
        ValueError, match=r"hidden_layers='block_\[' is not a valid regular expression"
    ):
        loop.train_and_evaluate(broken, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_collapse_is_recognised():
    guard = guards.CollapseGuard(num_classes=10, window=5, grace_steps=5)
    collapsed = {"accuracy": 0.1, "cross_entropy": 2.3, "zero_gradients": 0.0, "alignment/a": 0.8}
    healthy = {**collapsed, "accuracy": 0.6, "cross_entropy": 1.1}
    untrained = {**collapsed, "alignment/a": 0.01}
    for number in range(20):
        guard.check(number, healthy)
    for number in range(20, 40):
        guard.check(number, untrained)
    with pytest.raises(
        guards.TrainingFailedError, match="alignment collapse.*one class became the dump"
    ):
        for number in range(40, 50):
            guard.check(number, collapsed)


def test_a_dead_network_is_recognised():
    guard = guards.CollapseGuard(num_classes=10, window=5, grace_steps=5)
    dead = {"accuracy": 0.1, "cross_entropy": 2.3, "zero_gradients": 1.0, "alignment/a": 0.0}
    for number in range(4):
        guard.check(number, dead)
    with pytest.raises(guards.TrainingFailedError, match="the network is dead"):
        guard.check(6, dead)


def test_plain_training_is_never_called_collapsed():
    guard = guards.CollapseGuard(num_classes=10, window=2, grace_steps=0)
    for number in range(10):
        guard.check(number, {"accuracy": 0.1, "cross_entropy": 2.3})
