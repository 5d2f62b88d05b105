"""The benchmark of faults: what breaks a training, and whether it goes on as if nothing was."""

import contextlib
import dataclasses
import os
import pathlib
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from gfa_jax import files
from gfa_jax.evaluation import loading
from gfa_jax.training import metrics

ROOT = pathlib.Path(__file__).resolve().parents[1]
NUM_STEPS, CHECKPOINT_EVERY, EVAL_EVERY = 1000, 50, 200
RECIPE = (
    "--config=configs/smoke.py",
    f"--config.train_steps={NUM_STEPS}",
    "--config.gfa.weight=0.1",
    "--config.model.width=1",
    f"--config.loop.eval_every={EVAL_EVERY}",
    f"--config.loop.checkpoint_every={CHECKPOINT_EVERY}",
    "--config.loop.log_every=1",
)

# Programs around train.py's, for faults from within.
_NAN_AT = 333
_NAN_IN_A_BATCH = f"""
import jax.numpy as jnp, train
from gfa_jax import data
make = data.train_input
def faulty(*args, **options):
    batch_at = make(*args, **options)
    def at(step):
        batch = batch_at(step)
        if step == {_NAN_AT}:
            batch["inputs"] = batch["inputs"].at[0, 0, 0, 0].set(jnp.nan)
        return batch
    return at
data.train_input = faulty
train.main()
"""
_CLOCK_THAT_JUMPS = """
import time
real = time.time
time.time = lambda: real() + (86400 if int(real() * 5) % 2 else -86400)
import train
train.main()
"""


@dataclasses.dataclass(frozen=True)
class Flags:
    """Flags of the benchmark."""

    out: str = "runs/faults"
    """Folder of the runs and of faults.json; what is in it is deleted."""
    kills: int = 20
    """Runs that are killed, each at a random moment."""
    seed: int = 0
    """Of the moments."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """One broken run.

    Attributes:
      fault: what was done to it.
      found: what the process said or where it was.
      exit_code: of the process that met the fault.
      lost: steps done again, of those logged before the fault.
      recovery_seconds: from the restart to the first step that had not been there.
      identical: whether metrics and weights in the end are those of the undisturbed run.
    """

    fault: str
    found: str
    exit_code: int
    lost: int
    recovery_seconds: float
    identical: bool


def start(
    workdir: pathlib.Path,
    *flags: str,
    program: str | None = None,
    prefix: Sequence[str] = (),
) -> subprocess.Popen[str]:
    """Starts training; ``program`` replaces train.py's own, ``prefix`` runs before Python."""
    script = ["-c", program] if program else ["train.py"]
    with (workdir.parent / f"{workdir.name}.log").open("w") as log:
        return subprocess.Popen(
            [*prefix, sys.executable, *script, *RECIPE, f"--workdir={workdir}", *flags],
            cwd=ROOT,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
            stderr=log,
            text=True,
        )


def said(workdir: pathlib.Path) -> str:
    """Returns what the last process of a run has printed."""
    return (workdir.parent / f"{workdir.name}.log").read_text()


def error_of(workdir: pathlib.Path) -> str:
    """Returns the line with which the last process of a run has ended."""
    lines = said(workdir).splitlines() or ["(nothing)"]
    return next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1])


def last_step(workdir: pathlib.Path) -> int:
    """Returns the last logged step; 0 before the first."""
    return max((int(row["step"]) for row in metrics.read(workdir / "metrics.jsonl")), default=0)


def wait_for_step(workdir: pathlib.Path, step: int, process: subprocess.Popen[str]) -> None:
    """Returns once a step is logged, or the process has ended."""
    while process.poll() is None and last_step(workdir) < step:
        time.sleep(0.01)


class Outcome(NamedTuple):
    """What must not depend on faults: the metrics without times, and the weights in the end."""

    rows: list[dict[str, float]]
    weights: str


def outcome(workdir: pathlib.Path) -> Outcome:
    """Returns the outcome of a run."""
    rows = metrics.read(workdir / "metrics.jsonl")
    for row in rows:
        row.pop("examples_per_second", None)
    return Outcome(rows, loading.load_run(workdir).weights_hash)


def resume(
    workdir: pathlib.Path,
    fault: str,
    exit_code: int,
    found: str,
    expected: Outcome,
    stop_after: int = NUM_STEPS,
) -> Trial:
    """Trains a broken run to its end, or to a step up to which its metrics are compared."""
    before = last_step(workdir)
    started = time.monotonic()
    process = start(workdir, f"--stop_after={stop_after}")
    wait_for_step(workdir, min(before + 1, stop_after), process)
    recovery = time.monotonic() - started
    if process.wait(timeout=600):
        raise RuntimeError(f"{fault}: resuming failed: {said(workdir)}")
    match = re.search(r"resumed at step (\d+)", said(workdir))
    resumed = int(match.group(1)) if match else (before if before == NUM_STEPS else 0)
    got = outcome(workdir)
    identical = got.rows == [row for row in expected.rows if row["step"] <= stop_after]
    if stop_after == NUM_STEPS:
        identical = identical and got.weights == expected.weights
    return Trial(fault, found, exit_code, max(0, before - resumed), recovery, identical)


def kill(workdir: pathlib.Path, after: float, expected: Outcome) -> Trial:
    """Kills a run so many seconds after its start, wherever it is then.

    One that has ended by then is begun again, with less time.
    """
    process = start(workdir)
    time.sleep(after)
    process.send_signal(signal.SIGKILL)
    code = process.wait()
    if code == 0:
        shutil.rmtree(workdir)
        return kill(workdir, 0.8 * after, expected)
    rows = metrics.read(workdir / "metrics.jsonl")
    if any((workdir / "checkpoints").glob("*orbax-checkpoint-tmp*")):
        where = "while a checkpoint was written"
    elif not rows:
        where = "before the first step"
    elif rows[-1]["step"] % EVAL_EVERY == 0 and "train/loss" in rows[-1]:
        where = "in a validation"
    else:
        where = "between"
    return resume(workdir, "kill -9", code, where, expected)


def stopped_at(workdir: pathlib.Path, step: int) -> None:
    """Trains up to some step and stops by SIGTERM, saved."""
    process = start(workdir)
    wait_for_step(workdir, step, process)
    process.send_signal(signal.SIGTERM)
    if process.wait(timeout=600):
        raise RuntimeError(said(workdir))


def checkpoints_of(workdir: pathlib.Path) -> list[pathlib.Path]:
    """Returns the folders of a run's checkpoints, the latest last."""
    found = [path for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()]
    return sorted(found, key=lambda path: int(path.name))


def damaged_files(
    folder: pathlib.Path, expected: Outcome, copy_of: pathlib.Path
) -> Iterator[Trial]:
    """Cuts each file of the latest checkpoint in half, one at a time."""
    latest = checkpoints_of(copy_of)[-1]
    paths = [path.relative_to(copy_of) for path in latest.rglob("*") if path.is_file()]
    for number, path in enumerate(sorted(paths)):
        workdir = folder / f"truncated_{number}"
        shutil.copytree(copy_of, workdir)
        whole = (workdir / path).read_bytes()
        (workdir / path).write_bytes(whole[: len(whole) // 2])
        name = "/".join(path.parts[2:])
        name = re.sub(r"[0-9a-f]{32}", "...", name)
        yield resume(workdir, "checkpoint file cut in half", 0, name, expected, 250)


def run(flags: Flags) -> list[Trial]:
    """Makes all trials and writes them to ``faults.json``."""
    folder = pathlib.Path(flags.out)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    started = time.monotonic()
    whole = folder / "whole"
    if start(whole).wait(timeout=600):
        raise RuntimeError(said(whole))
    seconds = time.monotonic() - started
    expected = outcome(whole)
    draw = random.Random(flags.seed)
    trials: list[Trial] = []

    def note(trial: Trial) -> None:
        trials.append(trial)
        print(trial, file=sys.stderr, flush=True)

    saved = folder / "saved"
    stopped_at(saved, 220)
    for name, chosen in (("latest", 1), ("all", 100)):
        workdir = folder / f"deleted_{name}"
        shutil.copytree(saved, workdir)
        for path in checkpoints_of(workdir)[-chosen:]:
            shutil.rmtree(path)
        note(resume(workdir, f"{name} checkpoint{'s' * (name == 'all')} deleted", 0, "", expected))
    for fault in (clock_jumps, nan_in_a_batch, full_disk, read_only_checkpoints):
        if (found := fault(folder, expected)) is not None:
            note(found)
    note(read_only_folder(folder))
    for number in range(flags.kills):
        note(kill(folder / f"killed_{number}", draw.uniform(0.5, seconds), expected))
    for trial in damaged_files(folder, expected, saved):
        note(trial)
    files.write_json(folder / "faults.json", {"trials": [dataclasses.asdict(t) for t in trials]})
    return trials


def clock_jumps(folder: pathlib.Path, expected: Outcome) -> Trial:
    """Moves the time of day by two days, back and forth, five times a second."""
    workdir = folder / "clock"
    process = start(workdir, program=_CLOCK_THAT_JUMPS)
    wait_for_step(workdir, 300, process)
    process.send_signal(signal.SIGTERM)
    code = process.wait(timeout=600)
    return resume(workdir, "clock jumps by two days", code, "trains on", expected)


def nan_in_a_batch(folder: pathlib.Path, expected: Outcome) -> Trial:
    """Puts a NaN into one pixel of one batch."""
    workdir = folder / "nan"
    code = start(workdir, program=_NAN_IN_A_BATCH).wait(timeout=600)
    return resume(workdir, "NaN in a batch", code, error_of(workdir), expected)


def full_disk(folder: pathlib.Path, expected: Outcome) -> Trial | None:
    """Fills the disk while training goes on; ``None`` where none can be mounted."""
    mount = folder / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(mount)]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        print("full disk: left out, it needs the right to mount one", file=sys.stderr)
        return None
    try:
        workdir = mount / "run"
        process = start(workdir)
        wait_for_step(workdir, 220, process)
        filler = mount / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        code = process.wait(timeout=600)
        shutil.copy(mount / "run.log", folder / "full.log")
        filler.unlink()
        return resume(workdir, "full disk", code, error_of(workdir), expected)
    finally:
        subprocess.run(["umount", "--lazy", str(mount)], check=True)


def _respecting_permissions() -> Sequence[str]:
    """Returns what makes permissions count for root too."""
    return ["setpriv", "--bounding-set=-dac_override"] if os.geteuid() == 0 else []


def read_only_checkpoints(folder: pathlib.Path, expected: Outcome) -> Trial:
    """Takes the right to write checkpoints away."""
    workdir = folder / "read_only_checkpoints"
    process = start(workdir, prefix=_respecting_permissions())
    wait_for_step(workdir, 220, process)
    (workdir / "checkpoints").chmod(0o555)
    code = process.wait(timeout=600)
    last = error_of(workdir)
    (workdir / "checkpoints").chmod(0o755)
    return resume(workdir, "checkpoints folder read-only", code, last, expected)


def read_only_folder(folder: pathlib.Path) -> Trial:
    """Trains in a folder that may not be written: nothing begins."""
    workdir = folder / "read_only"
    workdir.mkdir()
    workdir.chmod(0o555)
    started = time.monotonic()
    code = start(workdir, prefix=_respecting_permissions()).wait(timeout=600)
    untouched = not list(workdir.iterdir())
    workdir.chmod(0o755)
    return Trial(
        "workdir read-only from the start",
        error_of(workdir),
        code,
        0,
        time.monotonic() - started,
        untouched,
    )


def table(trials: Sequence[Trial]) -> str:
    """Returns a Markdown table with a line for each fault and exit code."""
    lines = [
        "| fault | runs | exit code | steps lost, median (most) | seconds to recover "
        "| as if undisturbed |",
        "|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, int], list[Trial]] = {}
    for trial in trials:
        name = f"{trial.fault}, {trial.found}" if trial.fault == "kill -9" else trial.fault
        groups.setdefault((name, trial.exit_code), []).append(trial)
    for (name, code), group in sorted(groups.items(), key=lambda item: item[0][0]):
        lost = [trial.lost for trial in group]
        recovery = [trial.recovery_seconds for trial in group]
        same = sum(trial.identical for trial in group)
        lines.append(
            f"| {name} | {len(group)} | {code} | {statistics.median(lost):.0f} ({max(lost)}) "
            f"| {statistics.median(recovery):.1f} ({max(recovery):.1f}) | {same} of {len(group)} |"
        )
    return "\n".join(lines)
