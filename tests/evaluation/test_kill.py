"""Killed evaluations: resumed, they end with the same numbers and repeat nothing."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from gfa_jax.training import loop
from tests.evaluation.test_evaluate import tiny_config

ROOT = pathlib.Path(__file__).parents[2]
ATTACKS = "autoattack:num_steps=10:num_queries=200,apgd-ce:num_steps=5,deepfool:num_steps=10"


def start(workdir, out, *flags, num_devices=1):
    """Starts eval.py in a process of its own."""
    command = [sys.executable, "eval.py", "--workdir", str(workdir), "--out", str(out)]
    command += ["--attacks", ATTACKS, "--diagnostics", "off", *flags]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(num_devices)}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def finish(process):
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors.decode()


def outcomes(out):
    with np.load(out / "outcomes.npz", allow_pickle=False) as stored:
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


@pytest.mark.slow
def test_an_evaluation_killed_at_five_moments_ends_with_the_same_numbers(workdir, whole, tmp_path):
    rng = random.Random(0)
    for _ in range(5):
        process = start(workdir, tmp_path, "--batch_size", "32")
        before = len(list((tmp_path / "records").rglob("*.npz")))
        target = before + rng.randint(1, 6)
        while process.poll() is None:
            # A part counts, too; whole records replace theirs.
            if len(list((tmp_path / "records").rglob("*.npz"))) >= target:
                time.sleep(rng.uniform(0, 0.2))
                break
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if process.returncode == 0:
            break
    kept = {
        path: path.stat().st_mtime_ns
        for path in (tmp_path / "records").rglob("*.npz")
        if not path.parent.name.endswith(".parts")
    }
    finish(start(workdir, tmp_path, "--batch_size", "32"))
    for path, changed in kept.items():
        assert path.stat().st_mtime_ns == changed
    one, other = outcomes(whole), outcomes(tmp_path)
    assert one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(other[name], value, name)
    results = [json.loads((folder / "results.json").read_text()) for folder in (whole, tmp_path)]
    for result in results:
        del result["seconds"]
    assert results[0] == results[1]


@pytest.mark.slow
@pytest.mark.parametrize(("num_devices", "batch_size"), [(1, 100), (2, 32), (8, 256)])
def test_devices_and_batch_sizes_change_no_flag(workdir, whole, tmp_path, num_devices, batch_size):
    finish(start(workdir, tmp_path, "--batch_size", str(batch_size), num_devices=num_devices))
    one, other = outcomes(whole), outcomes(tmp_path)
    for name, value in one.items():
        if value.dtype == bool:
            np.testing.assert_array_equal(other[name], value, name)
    np.testing.assert_array_equal(other["first_broken_by"], one["first_broken_by"])
