"""Several real processes on this machine: training, validation, checkpoints, SIGTERM, resuming.

Processes talk through gloo, as hosts with CPUs would; on GPUs and TPUs the same code runs.
"""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import chex
import numpy as np
import pytest

from gfa_jax.training import metrics

ROOT = pathlib.Path(__file__).parents[2]
RECIPE = [
    "--config=configs/smoke.py",
    "--config.train_steps=1000",
    "--config.gfa.weight=0.1",
    "--config.threat.epsilon=0.02",
    "--config.model.width=0.5",
    "--config.optimizer.learning_rate=0.02",
    "--config.optimizer.schedule=constant",
    "--config.optimizer.warmup_fraction=0",
    "--config.ema_decay=0.9",
    "--config.loop.log_every=1",
    "--config.loop.eval_every=10",
]


def start(workdir, *flags, num_processes=1, num_devices=1, script="train.py"):
    """Starts the processes of one run, each with so many devices."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(num_devices),
        "XLA_FLAGS": "",
    }
    processes = []
    for index in range(num_processes):
        cluster = [
            f"--coordinator_address=127.0.0.1:{port}",
            f"--num_processes={num_processes}",
            f"--process_id={index}",
        ]
        command = [sys.executable, *str(script).split(), f"--workdir={workdir}", *flags]
        processes.append(
            subprocess.Popen(
                command + (cluster if num_processes > 1 else []),
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return processes


def finish(processes):
    """Waits for them; returns their exit codes and what they said."""
    try:
        said = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], said


def rows_of(workdir):
    """Returns the lines of a run's metrics by step and kind."""
    return {
        (row["step"], "eval/cross_entropy" in row): row
        for row in metrics.read(workdir / "metrics.jsonl")
    }


def assert_same_losses(one, other, steps):
    """Rounding grows from step to step where training moves fast; losses show it least."""
    for step in steps:
        for validated in (False, True):
            if (step, validated) not in one:
                continue
            row, same = one[step, validated], other[step, validated]
            assert set(row) == set(same)
            names = row.keys() - {"examples_per_second"}
            if step > 20:
                names = {name for name in names if name.endswith(("loss", "cross_entropy"))}
            for name in names:
                rel = 2e-3 if step <= 20 else 2e-2
                assert same[name] == pytest.approx(row[name], rel=rel, abs=1e-4), (step, name)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The metrics of sixty steps on one device in one process."""
    workdir = tmp_path_factory.mktemp("alone")
    codes, said = finish(start(workdir, *RECIPE, "--stop_after=60"))
    assert codes == [0], said
    rows = rows_of(workdir)
    assert rows[60, False]["train/cross_entropy"] < 0.8 * rows[1, False]["train/cross_entropy"]
    return rows


def test_two_processes_stop_together_and_one_goes_on(alone, tmp_path):
    """A signal to one of them saves the same step on both; fewer devices resume; both evaluate."""
    processes = start(tmp_path, *RECIPE, num_processes=2, num_devices=2)
    deadline = time.monotonic() + 200
    while (10, True) not in rows_of(tmp_path) and time.monotonic() < deadline:
        assert all(process.poll() is None for process in processes), finish(processes)
        time.sleep(0.02)
    processes[1].send_signal(signal.SIGTERM)
    codes, said = finish(processes)
    assert codes == [0, 0], said
    last = max(step for step, _ in rows_of(tmp_path))
    assert 10 <= last < 1000
    assert f"SIGTERM: saved step {last}" in said[0]
    assert "4 x cpu (cpu) in 2 processes" in said[0]
    assert "saved" not in said[1]
    assert (tmp_path / "checkpoints" / str(last)).is_dir()
    assert_same_losses(alone, rows_of(tmp_path), range(1, min(last, 60) + 1))

    codes, said = finish(start(tmp_path, *RECIPE, f"--stop_after={last + 10}"))
    assert codes == [0], said
    assert f"resumed at step {last}" in said[0]
    rows = rows_of(tmp_path)
    assert [step for step, validated in sorted(rows) if not validated] == [*range(1, last + 11)]
    assert_same_losses(alone, rows, range(last, min(last + 10, 60) + 1))

    flags = ["--attacks=pgd:num_steps=2", "--num_examples=60", "--batch_size=8"]
    outcomes = {}
    for num_processes in (1, 2):
        out = tmp_path / f"eval_{num_processes}"
        codes, said = finish(
            start(
                tmp_path,
                *flags,
                f"--out={out}",
                "--diagnostics=off",
                script="eval.py",
                num_processes=num_processes,
                num_devices=2,
            )
        )
        assert set(codes) == {0}, said
        assert ["worst case" in text for text in said] == [True, False][:num_processes]
        with np.load(out / "outcomes.npz") as stored:
            outcomes[num_processes] = dict(stored)
        assert len([*(out / "records").glob("pgd*/*.npz")]) == 2
    chex.assert_trees_all_equal(outcomes[1], outcomes[2])


@pytest.mark.slow
def test_state_split_over_two_processes_gives_the_losses_of_one_device(tmp_path):
    """At this width the widest kernel has 9,216 scalars, enough to be split."""
    recipe = [*RECIPE, "--config.model.width=1"]
    codes, said = finish(start(tmp_path / "one", *recipe, "--stop_after=30"))
    assert codes == [0], said
    one = rows_of(tmp_path / "one")
    flags = [*recipe, "--config.fsdp=4", "--stop_after=20"]
    split = tmp_path / "split"
    codes, said = finish(start(split, *flags, num_processes=2, num_devices=2))
    assert codes == [0, 0], said
    assert_same_losses(one, rows_of(split), range(1, 21))
    codes, said = finish(start(split, *recipe, "--config.fsdp=2", "--stop_after=30", num_devices=4))
    assert codes == [0], said
    assert "resumed at step 20" in said[0]
    assert_same_losses(one, rows_of(split), range(20, 31))


@pytest.mark.slow
def test_eight_devices_give_the_losses_of_one(alone, tmp_path):
    codes, said = finish(start(tmp_path, *RECIPE, "--stop_after=60", num_devices=8))
    assert codes == [0], said
    assert_same_losses(alone, rows_of(tmp_path), range(1, 61))


@pytest.mark.slow
def test_compiled_programs_are_kept(alone, tmp_path):
    """A second run finds the step that the first has compiled, and takes the same steps."""
    entries = []
    for name in ("first", "second"):
        flags = [*RECIPE, f"--compile_cache={tmp_path / 'cache'}", "--stop_after=3"]
        codes, said = finish(start(tmp_path / name, *flags))
        assert codes == [0], said
        entries.append(
            sorted(path.name for path in (tmp_path / "cache").glob("*train_step*-cache"))
        )
        assert_same_losses(alone, rows_of(tmp_path / name), range(1, 4))
    assert len(entries[0]) == 1
    assert entries[0] == entries[1]


def test_what_one_process_refuses_ends_all(tmp_path):
    """The others do not wait for it."""
    (tmp_path / "config.json").write_text("{}")
    codes, said = finish(start(tmp_path, *RECIPE, num_processes=2))
    assert codes == [2, 2], said
    assert all("config.json' is damaged" in text for text in said)


@pytest.mark.slow
def test_a_checkpoint_that_only_one_process_cannot_write_or_read(tmp_path):
    """All end with its message; what is damaged for all is moved aside by process 0."""
    broken = tmp_path / "broken.py"
    broken.write_text(
        "import sys, jax, orbax.checkpoint as ocp\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import train\n"
        "method = sys.argv.pop(1)\n"
        "good = getattr(ocp.CheckpointManager, method)\n"
        "def bad(self, step, *args, **kwargs):\n"
        "    if jax.process_index() == 1 and step > 10:\n"
        "        raise OSError(28, 'No space left on device')\n"
        "    return good(self, step, *args, **kwargs)\n"
        "setattr(ocp.CheckpointManager, method, bad)\n"
        "train.main()\n"
    )
    workdir = tmp_path / "run"
    two = {"num_processes": 2, "num_devices": 2}
    began = time.monotonic()
    codes, said = finish(start(workdir, *RECIPE, script=f"{broken} save", **two))
    assert codes == [2, 2], said
    assert time.monotonic() - began < 100
    assert "error: process 1: a checkpoint could not be written" in said[0]
    assert "No space left on device" in said[0]

    codes, said = finish(start(workdir, *RECIPE, "--stop_after=30", **two))
    assert codes == [0, 0], said
    assert "resumed at step 10" in said[0]

    codes, said = finish(
        start(workdir, *RECIPE, "--stop_after=40", script=f"{broken} restore", **two)
    )
    assert codes == [2, 2], said
    assert "cannot be read" in said[0]
    assert sorted(path.name for path in (workdir / "checkpoints").glob("*0")) == ["20", "30"]

    for path in (workdir / "checkpoints/30/model/d").iterdir():
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    codes, said = finish(start(workdir, *RECIPE, "--stop_after=40", **two))
    assert codes == [0, 0], said
    assert "resumed at step 20" in said[0]
    assert (workdir / "damaged_checkpoints/30-0").is_dir()
    assert [step for step, validated in sorted(rows_of(workdir)) if not validated] == [
        *range(1, 41)
    ]


@pytest.mark.slow
def test_an_attack_that_fails_on_one_process_ends_both(tmp_path):
    codes, said = finish(start(tmp_path / "run", *RECIPE, "--stop_after=10"))
    assert codes == [0], said
    broken = tmp_path / "broken.py"
    broken.write_text(
        "import sys, jax\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from gfa_jax.evaluation import records\n"
        "good = records.Records.save\n"
        "def bad(self, *args):\n"
        "    if jax.process_index() == 1:\n"
        "        raise OSError(28, 'No space left on device')\n"
        "    return good(self, *args)\n"
        "records.Records.save = bad\n"
        "import eval\n"
        "eval.main()\n"
    )
    flags = ["--attacks=pgd:num_steps=2", "--num_examples=60", "--batch_size=8"]
    codes, said = finish(
        start(tmp_path / "run", *flags, "--diagnostics=off", script=broken, num_processes=2)
    )
    assert codes == [2, 2], said
    assert "error: process 1: [Errno 28] No space left on device" in said[0]
