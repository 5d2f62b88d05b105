"""The benchmark of faults: what breaks a training, and whether it goes on as if nothing was."""

import contextlib
import dataclasses
import functools
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
from collections.abc import Callable, Sequence
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

_PATIENCE = 180
"""Seconds after which a program is taken to hang."""

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
    """Folder of the runs and of faults.json; a stopped benchmark goes on in it."""
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
    if process.wait(timeout=_PATIENCE):
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
    if process.wait(timeout=_PATIENCE):
        raise RuntimeError(said(workdir))


def checkpoints_of(workdir: pathlib.Path) -> list[pathlib.Path]:
    """Returns the folders of a run's checkpoints, the latest last."""
    found = [path for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()]
    return sorted(found, key=lambda path: int(path.name))


def files_of_latest(workdir: pathlib.Path) -> list[pathlib.Path]:
    """Returns the files of a run's latest checkpoint, relative to the run."""
    latest = checkpoints_of(workdir)[-1]
    return sorted(path.relative_to(workdir) for path in latest.rglob("*") if path.is_file())


def cut(workdir: pathlib.Path, saved: pathlib.Path, path: pathlib.Path, expected: Outcome) -> Trial:
    """Cuts a file of a saved run's checkpoint in half."""
    shutil.copytree(saved, workdir)
    whole = (workdir / path).read_bytes()
    (workdir / path).write_bytes(whole[: len(whole) // 2])
    name = re.sub(r"[0-9a-f]{32}", "...", "/".join(path.parts[2:]))
    return resume(workdir, "checkpoint file cut in half", 0, name, expected, 250)


def delete(workdir: pathlib.Path, saved: pathlib.Path, which: str, expected: Outcome) -> Trial:
    """Deletes the latest, or all, checkpoints of a saved run."""
    shutil.copytree(saved, workdir)
    for path in checkpoints_of(workdir)[-1 if which == "latest" else 0 :]:
        shutil.rmtree(path)
    fault = "latest checkpoint deleted" if which == "latest" else "all checkpoints deleted"
    return resume(workdir, fault, 0, "", expected)


def run(flags: Flags) -> list[Trial]:
    """Makes the trials that ``faults.json`` does not have yet.

    Raises:
      ValueError: for a folder that holds something else, or trials of another seed.
    """
    folder = pathlib.Path(flags.out)
    path = folder / "faults.json"
    if folder.exists() and any(folder.iterdir()) and not path.exists():
        raise ValueError(f"out={flags.out!r} holds something else: choose a new folder.")
    record = files.read_json(path) if path.exists() else {"seed": flags.seed, "trials": {}}
    if record["seed"] != flags.seed:
        raise ValueError(f"out={flags.out!r} holds trials of seed {record['seed']}.")
    whole, saved = folder / "whole", folder / "saved"
    if "seconds" not in record:
        files.write_json(path, record)
        for workdir in (whole, saved):
            shutil.rmtree(workdir, ignore_errors=True)
        started = time.monotonic()
        if start(whole).wait(timeout=_PATIENCE):
            raise RuntimeError(said(whole))
        record["seconds"] = time.monotonic() - started
        stopped_at(saved, 220)
        files.write_json(path, record)
    expected = outcome(whole)
    draw = random.Random(flags.seed)
    moments = [draw.uniform(0.5, record["seconds"]) for _ in range(flags.kills)]
    makers: dict[str, Callable[[pathlib.Path], Trial | None]] = {
        **{
            f"deleted_{which}": functools.partial(
                delete, saved=saved, which=which, expected=expected
            )
            for which in ("latest", "all")
        },
        **{
            fault.__name__: functools.partial(fault, expected=expected)
            for fault in (clock_jumps, nan_in_a_batch, full_disk, read_only_checkpoints)
        },
        "read_only_folder": read_only_folder,
        **{
            f"killed_{number}": functools.partial(kill, after=after, expected=expected)
            for number, after in enumerate(moments)
        },
        **{
            f"cut_{number}": functools.partial(cut, saved=saved, path=file, expected=expected)
            for number, file in enumerate(files_of_latest(saved))
        },
    }
    for name, make in makers.items():
        if name in record["trials"]:
            continue
        shutil.rmtree(folder / name, ignore_errors=True)
        if (trial := make(folder / name)) is not None:
            record["trials"][name] = dataclasses.asdict(trial)
            files.write_json(path, record)
            print(f"{len(record['trials'])} of {len(makers)}: {trial}", file=sys.stderr, flush=True)
    return [Trial(**record["trials"][name]) for name in makers if name in record["trials"]]


def clock_jumps(workdir: pathlib.Path, expected: Outcome) -> Trial:
    """Moves the time of day by two days, back and forth, five times a second."""
    process = start(workdir, program=_CLOCK_THAT_JUMPS)
    wait_for_step(workdir, 300, process)
    process.send_signal(signal.SIGTERM)
    code = process.wait(timeout=_PATIENCE)
    return resume(workdir, "clock jumps by two days", code, "trains on", expected)


def nan_in_a_batch(workdir: pathlib.Path, expected: Outcome) -> Trial:
    """Puts a NaN into one pixel of one batch."""
    code = start(workdir, program=_NAN_IN_A_BATCH).wait(timeout=_PATIENCE)
    return resume(workdir, "NaN in a batch", code, error_of(workdir), expected)


def full_disk(mount: pathlib.Path, expected: Outcome) -> Trial | None:
    """Fills the disk while training goes on; ``None`` where none can be mounted."""
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
        code = process.wait(timeout=_PATIENCE)
        filler.unlink()
        return resume(workdir, "full disk", code, error_of(workdir), expected)
    finally:
        subprocess.run(["umount", "--lazy", str(mount)], check=True)


def _respecting_permissions() -> Sequence[str]:
    """Returns what makes permissions count for root too."""
    return ["setpriv", "--bounding-set=-dac_override"] if os.geteuid() == 0 else []


def read_only_checkpoints(workdir: pathlib.Path, expected: Outcome) -> Trial:
    """Takes the right to write checkpoints away."""
    process = start(workdir, prefix=_respecting_permissions())
    wait_for_step(workdir, 220, process)
    (workdir / "checkpoints").chmod(0o555)
    code = process.wait(timeout=_PATIENCE)
    last = error_of(workdir)
    (workdir / "checkpoints").chmod(0o755)
    return resume(workdir, "checkpoints folder read-only", code, last, expected)


def read_only_folder(workdir: pathlib.Path) -> Trial:
    """Trains in a folder that may not be written: nothing begins."""
    workdir.mkdir()
    workdir.chmod(0o555)
    started = time.monotonic()
    code = start(workdir, prefix=_respecting_permissions()).wait(timeout=_PATIENCE)
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
