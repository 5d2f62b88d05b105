"""A killed process: resumed training is bit-identical to an uninterrupted one."""

import json
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from gfa_jax.training import metrics

ROOT = pathlib.Path(__file__).parents[2]
COMMAND = [
    sys.executable,
    "train.py",
    "--config",
    "configs/smoke.py",
    "--config.train_steps=400",
    "--config.loop.eval_every=0",
    "--config.loop.checkpoint_every=50",
    "--config.loop.log_every=1",
]


def run(workdir, *, kill_after=None):
    """Trains; with ``kill_after``, sends SIGKILL once the metrics have reached that step."""
    process = subprocess.Popen(
        [*COMMAND, "--workdir", str(workdir)], cwd=ROOT, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 300
    while kill_after is not None and process.poll() is None and time.monotonic() < deadline:
        rows = metrics.read(workdir / "metrics.jsonl")
        if rows and rows[-1]["step"] >= kill_after:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.02)
    process.communicate(timeout=300)
    return process.returncode


@pytest.mark.slow
def test_training_killed_with_sigkill_resumes_bit_identically(tmp_path):
    assert run(tmp_path / "whole") == 0
    for kill_after in (30, 120, 260):
        assert run(tmp_path / "killed", kill_after=kill_after) == -signal.SIGKILL
    assert run(tmp_path / "killed") == 0
    whole, killed = (
        metrics.read(tmp_path / name / "metrics.jsonl") for name in ("whole", "killed")
    )
    for row in (*whole, *killed):
        row.pop("examples_per_second", None)
    assert json.dumps(killed) == json.dumps(whole)
