"""A plan of a training: its figures against closed forms, and that it touches nothing."""

import dataclasses
import pathlib
import subprocess
import sys

import jax
import pytest

from configs import (
    cifar10_baselines,
    cifar10_standard,
    digits_baselines,
    digits_gfa,
    digits_pgd_at,
    digits_standard,
)
from gfa_jax.training import dry_run
from gfa_jax.training.devices import DEVICES

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def standard():
    return dry_run.plan(digits_standard.get_config())


def test_figures_of_a_step(standard):
    assert standard["parameters"] == 16_592
    assert standard["parameter_bytes"] == 4 * 16_592
    # Four 3x3 convolutions of 8x8 and 4x4 pixels and a dense layer, forward; two more backward,
    # but none to the images.
    first, second = 64 * 9 * 16, 64 * 9 * 16 * 16
    third, fourth = 16 * 9 * 16 * 32, 16 * 9 * 32 * 32
    forward = first + second + third + fourth + 32 * 10
    # (On CPU, the first kernel's gradient is a sum of products and not a convolution.)
    assert standard["flops"] == pytest.approx(64 * 2 * (3 * forward - first), rel=0.01)
    assert standard["forward_flops"] == pytest.approx(64 * 2 * (forward - first), rel=0.01)
    assert dry_run.step_flops(digits_standard.get_config()) == standard["flops"]
    assert standard["devices"] == jax.device_count()
    # Parameters, two moments of AdamW, and a share of the images at least.
    assert standard["memory_bytes"] > 3 * standard["parameter_bytes"]


def test_data_parallel_training_reduces_gradients_once_and_attacks_nothing(standard):
    """Steps of an attack need no device but their own."""
    assert jax.device_count() > 1
    attacked = dry_run.plan(digits_pgd_at.get_config())
    for found in (standard, attacked):
        assert set(found["collectives"]) == {"all-reduce"}
        sent = found["collectives"]["all-reduce"]["num_bytes"]
        # Beside the gradient some metrics.
        assert 0 <= sent - found["parameter_bytes"] < 200
    assert attacked["flops"] / standard["flops"] == pytest.approx((3 + 2 * 7) / 3, rel=0.01)


def test_expected_times_follow_from_the_data_sheets(standard):
    each = standard["flops"] / standard["devices"]
    # A ring of four sends every byte one and a half times: on two open axes of a TPU over half of
    # its links, whose hops are two, there and back.
    assert standard["devices"] == 4
    sent = 1.5 * standard["collectives"]["all-reduce"]["num_bytes"]
    network = sent / 100e9 + 4e-6
    assert standard["expected_seconds"]["TPU v5e"] == pytest.approx(each / (0.4 * 197e12) + network)
    config = dataclasses.replace(digits_standard.get_config(), precision="highest")
    precise = dry_run.plan(config)["expected_seconds"]
    assert precise["TPU v5e"] == pytest.approx(6 * each / (0.4 * 197e12) + network)
    network = sent / 450e9 + 6.8e-6 + 6 * 0.6e-6
    assert precise["H100 SXM"] == pytest.approx(each / (0.4 * 67e12) + network)


def test_bfloat16_counts_at_its_own_peak(standard):
    config = digits_standard.get_config()
    half = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="bfloat16"))
    faster = dry_run.plan(half)["expected_seconds"]
    for name, device in DEVICES.items():
        each = standard["flops"] / standard["devices"] / 0.4
        saved = each / device.peak["default"] - each / device.half_peak
        assert standard["expected_seconds"][name] - faster[name] == pytest.approx(saved, abs=1e-9)


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="config.batch_size=63 must be divisible by"):
        dry_run.plan(dataclasses.replace(digits_standard.get_config(), batch_size=63))


def test_what_does_not_fit_is_said(standard):
    config = digits_standard.get_config()
    assert "DOES NOT FIT" not in dry_run.text(config, standard)
    large = standard | {"memory_bytes": 20e9}
    lines = [line for line in dry_run.text(config, large).splitlines() if "DOES NOT FIT" in line]
    assert len(lines) == 1
    assert "TPU v5e" in lines[0]


def test_the_command_needs_no_data_and_writes_nothing(tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), "--config", "configs/cifar10_standard.py"]
    flags = ["--workdir", str(tmp_path / "run"), "--config.data.data_dir", str(tmp_path)]
    done = subprocess.run(
        [*command, *flags, "--config.model.width=0.1", "--dry_run"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"a step on {cifar10_standard.get_config().batch_size} images" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_batch_norm_sends_statistics_of_every_pass_in_training_mode():
    """Those of an attack, too: two all-reduces a layer and pass, forward and backward."""
    config = cifar10_baselines.get_config("pgd_at")
    num_layers, num_steps = 17, 2
    beside = {}  # the parameters' gradients, in scalars
    for train_mode in (True, False):
        attacked = dataclasses.replace(
            config,
            batch_size=16,
            model=dataclasses.replace(config.model, width=0.05),
            attack=dataclasses.replace(config.attack, num_steps=num_steps, train_mode=train_mode),
        )
        found = dry_run.plan(attacked)
        passes = 1 + num_steps * train_mode
        assert found["collectives"].keys() == {"all-reduce"}
        sent = found["collectives"]["all-reduce"]
        assert sent["num_times"] == 1 + 2 * num_layers * passes
        beside[train_mode] = sent["num_bytes"] / 4 - found["parameters"]
    # Mean and mean square forward, their derivatives backward; what the loss's own pass sends of
    # scales and biases is one vector more than their gradients. And three metrics.
    channels = (beside[True] - beside[False]) / (4 * num_steps)
    assert channels >= num_layers
    assert beside[False] == 3 * channels + 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "changes", "times"),
    [
        (digits_gfa.get_config(), {}, 2),
        (digits_gfa.get_config(), {"parallelism": "pmap"}, 1),
        (digits_gfa.get_config(), {"accumulation_steps": 4}, 8),
        (digits_standard.get_config(), {"accumulation_steps": 4}, 4),
        (digits_baselines.get_config("trades"), {}, 2),
    ],
)
def test_gradients_are_reduced_as_often_as_kernels_are_used(config, changes, times):
    """The table of docs/scaling.md: XLA reduces each use's gradient before they are added."""
    found = dry_run.plan(dataclasses.replace(config, **changes))
    assert set(found["collectives"]) == {"all-reduce"}
    sent = found["collectives"]["all-reduce"]["num_bytes"]
    assert 0 <= sent - times * found["parameter_bytes"] < 100 * times
