"""What compiled steps need, as numbers that do not depend on the machine's mood: a guard.

    python benchmarks/guard.py                 compares with the stored figures
    python benchmarks/guard.py --write True    stores new ones, for a change that means to move them
    python benchmarks/guard.py --steps cnn6/standard,cnn6/gfa    looks at some alone

Floating-point operations and the number of times that a step traces its model are exact. Memory is
what the compiler plans for this backend, by version of JAX. ``tests/benchmarks/test_guard.py``
makes the comparison: of some steps in every run of the tests, of all in the slow ones.
"""

import dataclasses
import json
import os
import pathlib
import sys
from typing import Any

if __name__ == "__main__":
    # A script finds the modules of its own folder, not those of the project.
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])
    # Figures are those of one CPU device and of the compiler's own choices, but for its machine
    # code: that takes half of the time, and no figure depends on it.
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"

import flax.linen as nn
import jax

from gfa_jax import _validate, cli, files
from gfa_jax.benchmark import programs

PATH = pathlib.Path(__file__).with_name("guard.json")
TASKS = {
    "cnn6": (programs.Task("cnn6", batch_size=16), tuple(programs.STEPS)),
    "preact_resnet18": (programs.Task("preact_resnet18", batch_size=4), ("standard", "gfa")),
    "vit_tiny": (programs.Task("vit_tiny", batch_size=4), ("standard", "gfa")),
}
NAMES = tuple(f"{model}/{step}" for model, (_, steps) in TASKS.items() for step in steps)
MEMORY_TOLERANCE = 0.05


@dataclasses.dataclass(frozen=True)
class Flags:
    """Flags of the guard."""

    write: bool = False
    """Store the figures instead of comparing them."""
    steps: str = ""
    """Comma-separated MODEL/STEP to look at; all by default."""


def figures(model: str, step: str) -> dict[str, int]:
    """Compiles a step and returns its ``flops``, ``memory_bytes`` and ``traces`` of the model."""
    task, _ = TASKS[model]
    traces = 0

    def count(next_fun: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        nonlocal traces
        traces += context.method_name == "__call__" and not context.module.path
        return next_fun(*args, **kwargs)

    config = programs.step_config(step, task)
    with nn.intercept_methods(count):
        program = programs.train_step(config, task)
    return {
        "flops": program.flops or 0,
        "memory_bytes": program.memory_bytes or 0,
        "traces": traces,
    }


def differences(stored: dict[str, Any], found: dict[str, int], version: str) -> list[str]:
    """Returns what has changed, in words; memory of an unknown version is not compared."""
    changed = [
        f"{name}: {found[name]:,} where {stored[name]:,} is stored"
        for name in ("flops", "traces")
        if found[name] != stored[name]
    ]
    memory = stored["memory_bytes"].get(version)
    if memory and abs(found["memory_bytes"] / memory - 1) > MEMORY_TOLERANCE:
        changed.append(f"memory_bytes: {found['memory_bytes']:,} where {memory:,} is stored")
    return changed


def run(flags: Flags) -> None:
    """Compares or stores the figures.

    Raises:
      ValueError: for an unknown step.
      SystemExit: with 1 where something differs.
    """
    for name in cli.split_names(flags.steps):
        _validate.one_of(NAMES, steps=name)
    stored = json.loads(PATH.read_text()) if PATH.exists() else {}
    failed = False
    for name in cli.split_names(flags.steps) or NAMES:
        found = figures(*name.split("/"))
        if flags.write:
            memory = stored.get(name, {}).get("memory_bytes", {})
            memory[jax.__version__] = found["memory_bytes"]
            stored[name] = {**found, "memory_bytes": memory}
            print(f"{name}: {stored[name]}")
            continue
        changed = differences(stored[name], found, jax.__version__)
        failed |= bool(changed)
        print(f"{name}: {'; '.join(changed) or 'as stored'}")
    if flags.write:
        files.write_json(PATH, stored)
    raise SystemExit(int(failed))


if __name__ == "__main__":
    flags = cli.parse(Flags, description="Compares what compiled steps need with stored figures.")
    cli.run_or_fail(lambda: run(flags))
