"""How training would scale on pods: the step compiled for many virtual devices, and a projection.

    python -m gfa_jax.training.scaling --config configs/cifar10_gfa.py --devices 8,64,256

For each number of devices a process of its own compiles the step for as many virtual CPU devices,
and counts floating-point operations and the bytes in collectives of that program. The projection
from these counts is arithmetic with stated assumptions (docs/scaling.md); nothing is run.
"""

import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from gfa_jax import _validate, cli, files
from gfa_jax import config as config_lib
from gfa_jax.config import TrainConfig
from gfa_jax.training.collectives import Transfer
from gfa_jax.training.devices import DEVICES, Device

UTILISATIONS = (0.2, 0.4, 0.6)
"""Shares of the peak that projections suppose, the middle one in the tables."""

_PLAN = "from gfa_jax.training import scaling; scaling.print_plan()"
_MARK = "plan: "


class Projection(NamedTuple):
    """What a step would take on some devices, in seconds.

    Attributes:
      compute: of products on each device.
      bandwidth: in which the bytes of collectives travel.
      latency: of collectives beside.
      backward: of the products behind which bytes can travel: one backward pass.
      alone: of the same global batch on one device.
      num_devices: that share it.
    """

    compute: float
    bandwidth: float
    latency: float
    backward: float
    alone: float
    num_devices: int

    @property
    def step(self) -> float:
        """Seconds of a step with all collectives after the products."""
        return self.compute + self.bandwidth + self.latency

    @property
    def overlapped_step(self) -> float:
        """Seconds of a step whose backward pass hides what it can; latencies stay."""
        return self.step - min(self.bandwidth, self.backward)

    @property
    def efficiency(self) -> float:
        """The speed of a device beside that of one alone."""
        return self.alone / (self.num_devices * self.step)

    @property
    def overlapped_efficiency(self) -> float:
        """The same with overlap."""
        return self.alone / (self.num_devices * self.overlapped_step)


def project(plan: Mapping[str, Any], device: Device, peak: float, utilisation: float) -> Projection:
    """Projects a step from the counts of its compiled program.

    Args:
      plan: from ``dry_run.plan``.
      device: on which.
      peak: its operations per second in the recipe's precision.
      utilisation: share of the peak that products reach.
    """
    num_devices = plan["devices"]
    alone = plan["flops"] / (utilisation * peak)
    bandwidth, latency = device.seconds(Transfer(**one) for one in plan["transfers"])
    # A backward pass costs two forward passes. What comes before it, such as attacks, and the first
    # of two derivatives, leaves nothing to send yet.
    backward = min(plan["flops"], 2 * plan["forward_flops"]) / (utilisation * peak)
    return Projection(
        alone / num_devices, bandwidth, latency, backward / num_devices, alone, num_devices
    )


def print_plan() -> None:
    """Compiles the config on standard input for this process's devices and prints the plan."""
    from gfa_jax.training import dry_run

    config = config_lib.from_dict(json.load(sys.stdin))
    print(_MARK + json.dumps(cli.run_or_fail(lambda: dry_run.plan(config))))


def plan_for(config: TrainConfig, num_devices: int) -> dict[str, Any]:
    """Returns ``dry_run.plan`` of a config on so many virtual CPU devices.

    The number of devices is fixed when JAX starts: a process of its own has them, whatever devices
    this process or its environment's ``XLA_FLAGS`` ask for.

    Raises:
      ValueError: for what the plan refuses.
    """
    flags = re.sub(
        r"--xla_force_host_platform_device_count=\S*", "", os.environ.get("XLA_FLAGS", "")
    )
    virtual = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(num_devices), "XLA_FLAGS": flags}
    done = subprocess.run(
        [sys.executable, "-c", _PLAN],
        input=json.dumps(config_lib.to_dict(config)),
        env=os.environ | virtual,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith(_MARK)]
    if done.returncode or not lines:
        raise ValueError(
            f"{num_devices} devices: {done.stderr.strip().removeprefix('error: ') or 'no plan'}"
        )
    plan: dict[str, Any] = json.loads(lines[-1].removeprefix(_MARK))
    return plan


class Row(NamedTuple):
    """One compiled step: the regime, the global batch, and the plan; none if it cannot be split."""

    regime: str
    num_devices: int
    batch_size: int
    plan: dict[str, Any] | None


def rows(config: TrainConfig, counts: Sequence[int], batch_per_device: int) -> list[Row]:
    """Compiles the step for each number of devices, in both regimes.

    *Weak* scaling keeps the batch of a device, *strong* scaling the recipe's global batch, which
    some numbers of devices may not divide. A step of both regimes is compiled once.

    Args:
      config: the recipe.
      counts: numbers of devices.
      batch_per_device: of weak scaling; a multiple of ``config.accumulation_steps``.
    """
    plans: dict[tuple[int, int], dict[str, Any]] = {}
    found = []
    for regime in ("weak", "strong"):
        for count in counts:
            batch_size = count * batch_per_device if regime == "weak" else config.batch_size
            if batch_size % (count * config.accumulation_steps):
                found.append(Row(regime, count, batch_size, None))
                continue
            if (count, batch_size) not in plans:
                start = time.monotonic()
                chosen = dataclasses.replace(config, batch_size=batch_size)
                plans[count, batch_size] = plan_for(chosen, count)
                print(
                    f"{count} devices, batch {batch_size}: planned in "
                    f"{time.monotonic() - start:.0f} s",
                    file=sys.stderr,
                )
            found.append(Row(regime, count, batch_size, plans[count, batch_size]))
    return found


def text(config: TrainConfig, found: Sequence[Row]) -> str:
    """Returns the plans and projections as Markdown tables."""
    first = next(row.plan for row in found if row.plan)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib"))
    low, middle, high = UTILISATIONS
    return "\n".join(
        [
            f"{config.model.name}, {first['parameters']:,} parameters "
            f"({first['parameter_bytes'] / 1e6:,.1f} MB), precision {config.precision!r}, dtype "
            f"{config.model.dtype!r}, parallelism {config.parallelism!r}, fsdp {config.fsdp}; "
            f"programs of XLA:CPU, {versions}, Python {platform.python_version()}",
            "",
            "| scaling | devices | global batch | GFLOPs of a device | peak memory, MB "
            "| collectives of a step | MB in them | times the parameters |",
            "|---|---|---|---|---|---|---|---|",
            *map(_program, found),
            "",
            f"Projected at {middle:.0%} of the peak; efficiencies beside one device alone, "
            "collectives after the products, and in parentheses behind one backward pass; in "
            f"brackets after the products at {low:.0%} and {high:.0%} of the peak.",
            "",
            "| scaling | devices | " + " | ".join(DEVICES) + " |",
            "|---|---|" + "---|" * len(DEVICES),
            *(_projected(config, row) for row in found if row.plan),
        ]
    )


def _program(row: Row) -> str:
    start = f"| {row.regime} | {row.num_devices} | {row.batch_size:,} |"
    plan = row.plan
    if plan is None:
        return f"{start} cannot be split over so many devices | | | | |"
    each = plan["flops"] / plan["devices"] / 1e9
    gflops = f"{each:,.0f}" if each >= 1000 else f"{each:.4g}"
    kinds = plan["collectives"]
    num_bytes = sum(one["num_bytes"] for one in kinds.values())
    named = ", ".join(f"{one['num_times']} {kind}" for kind, one in kinds.items()) or "none"
    return (
        f"{start} {gflops} | {plan['memory_bytes'] / 1e6:,.0f} "
        f"| {named} | {num_bytes / 1e6:,.2f} | {num_bytes / plan['parameter_bytes']:.2f} |"
    )


def _projected(config: TrainConfig, row: Row) -> str:
    plan = row.plan
    assert plan is not None
    cells = []
    for device in DEVICES.values():
        if not device.network.has(row.num_devices):
            cells.append("no such slice")
            continue
        peak = device.peak_of(config.precision, config.model.dtype)
        low, one, high = (project(plan, device, peak, share) for share in UTILISATIONS)
        fits = "" if plan["memory_bytes"] <= device.memory else ", DOES NOT FIT"
        cells.append(
            f"{1e3 * one.step:.3g} ms, {row.batch_size / one.step:,.0f} images/s, "
            f"{one.efficiency:.0%} ({one.overlapped_efficiency:.0%}) "
            f"[{low.efficiency:.0%}, {high.efficiency:.0%}]{fits}"
        )
    return f"| {row.regime} | {row.num_devices} | " + " | ".join(cells) + " |"


@dataclasses.dataclass(frozen=True)
class Flags:
    """Flags of the command beside ``--config FILE``."""

    config: TrainConfig
    """Fields of the recipe."""
    devices: str = "8,64,256"
    """Numbers of devices, comma-separated."""
    batch_per_device: int | None = None
    """Of weak scaling; by default the recipe's batch over the smallest number of devices."""
    out: str | None = None
    """FILE.md for the tables too, or a folder for them and the plans (scaling.md, plans.json)."""


def main(argv: Sequence[str] | None = None) -> None:
    """Parses flags, compiles, and prints the tables."""
    argv = sys.argv[1:] if argv is None else list(argv)
    config, rest = cli.split_config(argv)
    description = "Plans training on pods from compiled steps."
    flags = cli.parse(Flags, rest, description=description, default=Flags(config))
    cli.run_or_fail(lambda: _run(flags, argv))


def _run(flags: Flags, argv: Sequence[str]) -> None:
    counts = _counts(flags.devices)
    found = rows(flags.config, counts, _batch_per_device(flags, min(counts)))
    command = f"`python -m gfa_jax.training.scaling {shlex.join(argv)}`"
    tables = f"{command}\n\n{text(flags.config, found)}"
    print(tables)
    if flags.out is None:
        return
    out = pathlib.Path(flags.out)
    is_file = out.suffix == ".md"
    (out.parent if is_file else out).mkdir(parents=True, exist_ok=True)
    files.write_bytes(out if is_file else out / "scaling.md", f"{tables}\n".encode())
    if not is_file:
        files.write_json(out / "plans.json", [row._asdict() for row in found])


def _counts(devices: str) -> list[int]:
    parts = [part.strip() for part in devices.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"devices={devices!r} must be positive integers, such as 8,64,256.")
    return sorted({int(part) for part in parts})


def _batch_per_device(flags: Flags, fewest: int) -> int:
    config, chosen = flags.config, flags.batch_per_device
    if chosen is None:
        if config.batch_size % (fewest * config.accumulation_steps):
            raise ValueError(
                f"config.batch_size={config.batch_size} must be divisible by the smallest number "
                f"of devices, {fewest}, times config.accumulation_steps="
                f"{config.accumulation_steps}; or say --batch_per_device."
            )
        return config.batch_size // fewest
    _validate.positive_integer(batch_per_device=chosen)
    if chosen % config.accumulation_steps:
        raise ValueError(
            f"batch_per_device={chosen} must be divisible by config.accumulation_steps="
            f"{config.accumulation_steps}."
        )
    return chosen


if __name__ == "__main__":
    main()
