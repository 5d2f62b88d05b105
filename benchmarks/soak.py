"""Trains for a while, with evaluations and checkpoints, and watches what the process holds on to.

    python benchmarks/soak.py --out runs/soak --minutes 30

Linux only: memory, open files and threads are those in /proc.
"""

import dataclasses
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import time

# A script finds the modules of its own folder, not those of the project.
sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from gfa_jax import cli, files  # noqa: E402
from gfa_jax.training import metrics  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parents[1]
CHECKPOINT_EVERY = 250
RECIPE = (
    "--config=configs/digits_gfa.py",
    "--config.train_steps=100000000",
    "--config.optimizer.schedule=constant",
    "--config.optimizer.learning_rate=0.0005",
    "--config.gfa.weight=0.1",
    "--config.gfa.warmup_fraction=0",
    "--config.loop.eval_every=1000",
    f"--config.loop.checkpoint_every={CHECKPOINT_EVERY}",
    "--config.data.placement=stream",
)
_SECONDS_BETWEEN = 5.0


@dataclasses.dataclass(frozen=True)
class Flags:
    """Flags of the benchmark."""

    out: str = "runs/soak"
    """Folder of the run and of soak.json; must be new."""
    minutes: float = 30.0
    """How long to train."""


def sample(pid: int) -> dict[str, float]:
    """Returns resident memory in MB, open files and threads of a process."""
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return {
        "memory": int(fields["VmRSS"].split()[0]) / 1024,
        "files": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": int(fields["Threads"]),
    }


def run(flags: Flags) -> list[dict[str, float]]:
    """Trains and samples; the samples go to ``soak.json``."""
    folder = pathlib.Path(flags.out)
    if folder.exists():
        raise ValueError(f"out={flags.out!r} exists already: choose a new folder.")
    folder.mkdir(parents=True)
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "train.py", *RECIPE, f"--workdir={folder / 'run'}"],
            cwd=ROOT,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            stderr=log,
        )
    started = time.monotonic()
    samples = []
    while time.monotonic() - started < 60 * flags.minutes and process.poll() is None:
        time.sleep(_SECONDS_BETWEEN)
        samples.append({"minutes": (time.monotonic() - started) / 60, **sample(process.pid)})
    process.send_signal(signal.SIGTERM)
    if process.wait(timeout=300):
        raise ValueError(f"training failed: {(folder / 'log').read_text()[-2000:]}")
    files.write_json(folder / "soak.json", {"samples": samples})
    return samples


def text(flags: Flags, samples: list[dict[str, float]]) -> str:
    """Returns a Markdown table of six equal parts of the time, and the growth after the first."""
    rows = metrics.read(pathlib.Path(flags.out) / "run" / "metrics.jsonl")
    evaluations = sum("eval/cross_entropy" in row for row in rows)
    parts = [
        [s for s in samples if part <= 6 * s["minutes"] / flags.minutes < part + 1]
        for part in range(6)
    ]
    lines = [
        f"{int(rows[-1]['step']):,} steps, {evaluations} evaluations, a checkpoint every "
        f"{CHECKPOINT_EVERY} steps",
        "",
        "| minutes | memory, MB, median (most) | open files, median (most) | threads, most |",
        "|---|---|---|---|",
    ]
    for number, part in enumerate(parts):
        memory, opened, threads = ([s[key] for s in part] for key in ("memory", "files", "threads"))
        lines.append(
            f"| {number * flags.minutes / 6:.0f} to {(number + 1) * flags.minutes / 6:.0f} "
            f"| {statistics.median(memory):.0f} ({max(memory):.0f}) "
            f"| {statistics.median(opened):.0f} ({max(opened):.0f}) | {max(threads):.0f} |"
        )
    later = [s for part in parts[1:] for s in part]
    slope = statistics.linear_regression(
        [s["minutes"] for s in later], [s["memory"] for s in later]
    )
    checkpoints = int(rows[-1]["step"]) / CHECKPOINT_EVERY / flags.minutes  # a minute
    lines += [
        "",
        f"memory after the first part: {60 * slope.slope:+.1f} MB an hour, "
        f"{1e3 * slope.slope / checkpoints:+.0f} KB a checkpoint",
    ]
    return "\n".join(lines)


def main() -> None:
    """Parses flags, trains and prints the table."""
    flags = cli.parse(Flags, description="Trains for a while and watches memory and open files.")
    cli.run_or_fail(lambda: print(text(flags, run(flags))))


if __name__ == "__main__":
    main()
