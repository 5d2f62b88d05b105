"""Says where a training step's time goes, by layer and by kind of pass.

    python benchmarks/step_profile.py --model cnn6 --batch_size 128 --steps standard,gfa

The compiled step runs under JAX's profiler; every operation's own time is put down to the layer and
the pass that its name in the program tells, as a share of all of them. Operations that the compiler
made without a name are left out. On several threads, times add up to more than the step's.
"""

import collections
import dataclasses
import gzip
import json
import pathlib
import re
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

# A script finds the modules of its own folder, not those of the project.
sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

import jax  # noqa: E402

from gfa_jax import _validate, cli  # noqa: E402
from gfa_jax.benchmark import programs  # noqa: E402

_METADATA = re.compile(r"%?([\w.-]+) = [^\n]*?metadata=\{[^}]*?op_name=\"([^\"]*)\"")


@dataclasses.dataclass(frozen=True)
class Flags:
    """Flags of the profile."""

    model: str = "cnn6"
    """A key of gfa_jax.models.MODELS."""
    batch_size: int = 128
    """Examples of a step."""
    steps: str = "standard,gfa"
    """As for python -m gfa_jax.benchmark."""
    runs: int = 10
    """Runs under the profiler, after two that warm up and as many that are timed."""


def run(flags: Flags) -> None:
    """Prints a table for each step.

    Raises:
      ValueError: for flags that do not fit.
    """
    _validate.positive_integer(batch_size=flags.batch_size, runs=flags.runs)
    task = programs.Task(flags.model, batch_size=flags.batch_size)
    for name in cli.split_names(flags.steps):
        program = programs.train_step(programs.step_config(name, task), task)
        for _ in range(2):
            jax.block_until_ready(program.start())
        started = time.perf_counter()
        for _ in range(flags.runs):
            jax.block_until_ready(program.start())
        seconds = (time.perf_counter() - started) / flags.runs
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                for _ in range(flags.runs):
                    jax.block_until_ready(program.start())
            events = read_events(pathlib.Path(folder))
        parts = by_part(own_times(events), names_of(program.compiled.as_text() or ""), flags.runs)
        print(table(f"{flags.model}, batch {flags.batch_size}, {name}", seconds, parts))


def read_events(folder: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the events of a trace that have a duration."""
    (path,) = folder.rglob("*.trace.json.gz")
    events: list[dict[str, Any]] = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return [event for event in events if event.get("ph") == "X" and event.get("dur")]


def own_times(events: list[dict[str, Any]]) -> dict[str, float]:
    """Returns what each operation takes without those inside it, in microseconds, by its name."""
    threads: dict[Any, list[dict[str, Any]]] = collections.defaultdict(list)
    for event in events:
        threads[event["pid"], event["tid"]].append(event)
    totals: dict[str, float] = collections.defaultdict(float)
    for thread in threads.values():
        open_events: list[dict[str, Any]] = []
        for event in sorted(thread, key=lambda one: (one["ts"], -one["dur"])):
            while open_events and event["ts"] >= open_events[-1]["ts"] + open_events[-1]["dur"]:
                open_events.pop()
            if open_events:
                totals[operation(open_events[-1])] -= event["dur"]
            totals[operation(event)] += event["dur"]
            open_events.append(event)
    return dict(totals)


def operation(event: Mapping[str, Any]) -> str:
    """Returns the name of the operation in the compiled program."""
    name: str = event.get("args", {}).get("hlo_op", event["name"])
    return name


def names_of(text: str) -> dict[str, str]:
    """Returns what operations of a compiled program were in the traced one."""
    return dict(_METADATA.findall(text))


def by_part(
    times: Mapping[str, float], names: Mapping[str, str], runs: int
) -> dict[tuple[str, str], float]:
    """Returns milliseconds of a run by layer and pass."""
    parts: dict[tuple[str, str], float] = collections.defaultdict(float)
    for name, microseconds in times.items():
        if name in names:
            parts[part_of(names[name])] += microseconds / 1000 / runs
    return dict(parts)


def part_of(path: str) -> tuple[str, str]:
    """Returns layer and pass of an operation's name in the traced program.

    A pass is ``forward``, ``backward`` (one transposition) or ``second backward`` (of a derivative
    of a derivative).
    """
    layer = next(
        iter(re.findall(r"\b(block_\d+|dense_\d+|stem|embedding|head|normalize)\b", path)), "rest"
    )
    depth = path.count("transpose(")
    return layer, ("forward", "backward", "second backward")[min(depth, 2)]


def table(title: str, seconds: float, parts: Mapping[tuple[str, str], float]) -> str:
    """Returns shares of the operations' time by layer and pass as Markdown."""
    passes = ("forward", "backward", "second backward")
    layers, total = sorted({layer for layer, _ in parts}), sum(parts.values())
    lines = [
        f"## {title}: {1000 * seconds:.0f} ms a step, operations {total:.0f} ms",
        "",
        "| layer | " + " | ".join(passes) + " |",
        "|---|" + "---:|" * len(passes),
    ]
    for layer in layers:
        cells = [f"{parts.get((layer, one), 0) / total:.1%}" for one in passes]
        lines.append(f"| {layer} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Parses flags and prints the tables."""
    flags = cli.parse(Flags, description="Says where a training step's time goes.")
    cli.run_or_fail(lambda: run(flags))


if __name__ == "__main__":
    main()
