"""Killed evaluations: resumed, they end with the same numbers and repeat nothing."""

import dataclasses
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import sklearn.datasets

from gfa_jax.training import loop
from tests.evaluation.test_evaluate import tiny_config

ROOT = pathlib.Path(__file__).parents[2]
ATTACKS = "autoattack:num_steps=10:num_queries=200,apgd-ce:num_steps=5,deepfool:num_steps=10"


def start(workdir, out, *flags, attacks=ATTACKS, num_devices=1):
    """Starts eval.py in a process of its own."""
    command = [sys.executable, "eval.py", "--workdir", str(workdir), "--out", str(out)]
    command += ["--attacks", attacks, "--diagnostics", "off", *flags]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(num_devices)}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def finish(process):
    _, errors = process.communicate(timeout=1800)
    assert process.returncode == 0, errors.decode()


def outcomes(out):
    with np.load(out / "outcomes.npz") as stored:
        return dict(stored)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "tiny"
    loop.train_and_evaluate(tiny_config(), path)
    return path


@pytest.fixture(scope="module")
def whole(workdir, tmp_path_factory):
    """An evaluation that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole")
    finish(start(workdir, out, "--batch_size", "32"))
    return out


def kill_five_times(rng, out, most_new, start_again):
    """Starts, and kills after some new files; returns whole records and when they were written."""
    folder = out / "records"
    for _ in range(5):
        # Parts of records count, too; they are gone once a record is whole.
        seen, num_new, target = set(folder.rglob("*.npz")), 0, rng.randint(1, most_new)
        process = start_again()
        while process.poll() is None and num_new < target:
            new = set(folder.rglob("*.npz")) - seen
            num_new += len(new)
            seen |= new
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it ended before it could be killed"
    return {
        path: path.stat().st_mtime_ns
        for path in folder.rglob("*.npz")
        if not path.parent.name.endswith(".parts")
    }


def assert_same(one, other):
    """Compares everything that two evaluations wrote but the time they took."""
    for name in ("outcomes.npz", "adversarial.npz"):
        with np.load(one / name) as expected, np.load(other / name) as found:
            assert set(expected) == set(found)
            for field in expected:
                np.testing.assert_array_equal(found[field], expected[field], field)
    results = [json.loads((folder / "results.json").read_text()) for folder in (one, other)]
    for result in results:
        del result["seconds"]
    assert results[0] == results[1]


@pytest.mark.slow
def test_an_evaluation_killed_at_five_moments_ends_with_the_same_numbers(workdir, whole, tmp_path):
    def start_again():
        return start(workdir, tmp_path, "--batch_size", "32")

    kept = kill_five_times(random.Random(0), tmp_path, 3, start_again)
    finish(start_again())
    for path, changed in kept.items():
        assert path.stat().st_mtime_ns == changed
    assert_same(whole, tmp_path)


def digits_size():
    """1,000 test images of 8x8."""
    digits = sklearn.datasets.load_digits()
    return (digits.images[..., None] / 16).astype(np.float32), digits.target, 1000, 0.08


def cifar_size():
    """500 test images of 32x32 in colour: coarse patterns, one for each class, and noise."""
    rng = np.random.default_rng(0)
    patterns = rng.uniform(0.1, 0.9, (10, 4, 4, 3)).repeat(8, axis=1).repeat(8, axis=2)
    labels = np.arange(1300) % 10
    images = patterns[labels] + rng.normal(0, 0.2, (1300, 32, 32, 3))
    return np.clip(images, 0, 1).astype(np.float32), labels, 500, 8 / 255


@pytest.mark.slow
@pytest.mark.parametrize("make", [digits_size, cifar_size])
def test_standard_autoattack_killed_at_five_moments_ends_with_the_same_numbers(make, tmp_path):
    images, labels, num_test, epsilon = make()
    np.savez(
        tmp_path / "images.npz",
        train_images=images[num_test:],
        train_labels=labels[num_test:],
        test_images=images[:num_test],
        test_labels=labels[:num_test],
    )
    config = tiny_config()
    config = dataclasses.replace(
        config,
        batch_size=48,
        train_steps=400,
        gfa=dataclasses.replace(config.gfa, weight=0.0),
        data=dataclasses.replace(
            config.data, name=f"arrays:{tmp_path}/images.npz", max_train_examples=None
        ),
        model=dataclasses.replace(config.model, input_mean=(0.5,), input_std=(0.3,)),
        threat=dataclasses.replace(config.threat, epsilon=epsilon),
    )
    loop.train_and_evaluate(config, tmp_path / "run")
    jax.clear_caches()

    def start_in(out):
        return start(tmp_path / "run", out, "--batch_size", "100", attacks="autoattack")

    kept = kill_five_times(
        random.Random(0), tmp_path / "killed", 15, lambda: start_in(tmp_path / "killed")
    )
    finish(start_in(tmp_path / "killed"))
    for path, changed in kept.items():
        assert path.stat().st_mtime_ns == changed
    finish(start_in(tmp_path / "whole"))
    assert_same(tmp_path / "whole", tmp_path / "killed")
    results = json.loads((tmp_path / "whole" / "results.json").read_text())
    # Some images resist to the end, so that all members have work to do.
    assert 0.1 < results["robust_accuracy"]["worst_case"] < results["clean_accuracy"] - 0.1


@pytest.mark.slow
@pytest.mark.parametrize(("num_devices", "batch_size"), [(1, 100), (2, 32), (8, 256)])
def test_devices_and_batch_sizes_change_no_flag(workdir, whole, tmp_path, num_devices, batch_size):
    finish(start(workdir, tmp_path, "--batch_size", str(batch_size), num_devices=num_devices))
    one, other = outcomes(whole), outcomes(tmp_path)
    for name, value in one.items():
        if value.dtype == bool:
            np.testing.assert_array_equal(other[name], value, name)
    np.testing.assert_array_equal(other["first_broken_by"], one["first_broken_by"])
