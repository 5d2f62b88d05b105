"""How training would scale on pods: the step compiled for many virtual devices, and a projection.

    python -m gfa_jax.training.scaling --config configs/cifar10_gfa.py --devices 8,64,256

For each number of devices a process of its own compiles the step for as many virtual CPU devices,
and counts floating-point operations and the bytes in collectives of that program. The projection
from these counts is arithmetic with stated assumptions (docs/scaling.md); nothing is run.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from gfa_jax import _validate, cli
from gfa_jax import config as config_lib
from gfa_jax.config import TrainConfig
from gfa_jax.training.devices import DEVICES, Device

UTILISATIONS = (0.2, 0.4, 0.6)
"""Shares of the peak that projections suppose, the middle one in the tables."""

_PLAN = "from gfa_jax.training import scaling; scaling.print_plan()"
_MARK = "plan: "


class Projection(NamedTuple):
    """What a step would take on some devices.

    Attributes:
      compute: seconds of products on each device.
      network: seconds of collectives.
      alone: seconds of the same global batch on one device.
      num_devices: that share it.
    """

    compute: float
    network: float
    alone: float
    num_devices: int

    @property
    def efficiency(self) -> float:
        """The speed of a device beside that of one alone, collectives after the products."""
        return self.alone / (self.num_devices * (self.compute + self.network))

    @property
    def overlapped_efficiency(self) -> float:
        """The same where products hide the collectives as far as they can."""
        return self.alone / (self.num_devices * max(self.compute, self.network))


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
    # Other kinds are few; an all-reduce's time bounds theirs.
    num_bytes = sum(one["num_bytes"] for one in plan["collectives"].values())
    num_times = sum(one["num_times"] for one in plan["collectives"].values())
    network = device.all_reduce_seconds(num_bytes, num_times, num_devices)
    return Projection(alone / num_devices, network, alone, num_devices)


def print_plan() -> None:
    """Compiles the config on standard input for this process's devices and prints the plan."""
    from gfa_jax.training import dry_run

    config = config_lib.from_dict(json.load(sys.stdin))
    print(_MARK + json.dumps(cli.run_or_fail(lambda: dry_run.plan(config))))


def plan_for(config: TrainConfig, num_devices: int) -> dict[str, Any]:
    """Returns ``dry_run.plan`` of a config on so many virtual CPU devices.

    Raises:
      ValueError: for what the plan refuses.
    """
    done = subprocess.run(
        [sys.executable, "-c", _PLAN],
        input=json.dumps(config_lib.to_dict(config)),
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(num_devices)},
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
    """One compiled step: the regime, the global batch, and the plan."""

    regime: str
    batch_size: int
    plan: dict[str, Any]


def rows(config: TrainConfig, counts: Sequence[int], batch_per_device: int) -> list[Row]:
    """Compiles the step for each number of devices, in both regimes.

    *Weak* scaling keeps the batch of a device, *strong* scaling the global batch, which is that of
    the largest number of devices with one example each at least.

    Args:
      config: the recipe; its ``batch_size`` is the global batch of strong scaling, rounded up to a
        multiple of the largest number of devices.
      counts: numbers of devices.
      batch_per_device: of weak scaling.
    """
    step = max(counts) * config.accumulation_steps
    whole = -(-config.batch_size // step) * step
    found = []
    for regime in ("weak", "strong"):
        for count in counts:
            batch_size = count * batch_per_device if regime == "weak" else whole
            print(f"{regime}: {count} devices, batch {batch_size}", file=sys.stderr)
            chosen = dataclasses.replace(config, batch_size=batch_size)
            found.append(Row(regime, batch_size, plan_for(chosen, count)))
    return found


def text(config: TrainConfig, found: Sequence[Row]) -> str:
    """Returns the plans and projections as Markdown tables."""
    first = found[0].plan
    lines = [
        f"{config.model.name}, {first['parameters']:,} parameters "
        f"({first['parameter_bytes'] / 1e6:,.1f} MB), precision {config.precision!r}, dtype "
        f"{config.model.dtype!r}, parallelism {config.parallelism!r}, fsdp {config.fsdp}",
        "",
        "| scaling | devices | global batch | GFLOPs of a device | peak memory, MB "
        "| collectives of a step | MB in them | times the parameters |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for regime, batch_size, plan in found:
        kinds = plan["collectives"]
        num_bytes = sum(one["num_bytes"] for one in kinds.values())
        named = ", ".join(f"{one['num_times']} {kind}" for kind, one in kinds.items()) or "none"
        lines.append(
            f"| {regime} | {plan['devices']} | {batch_size:,} "
            f"| {plan['flops'] / plan['devices'] / 1e9:,.1f} | {plan['memory_bytes'] / 1e6:,.0f} "
            f"| {named} | {num_bytes / 1e6:,.2f} | {num_bytes / plan['parameter_bytes']:.2f} |"
        )
    low, middle, high = UTILISATIONS
    lines += [
        "",
        f"Projected at {middle:.0%} of the peak; efficiencies beside one device alone, collectives "
        f"after the products, and in parentheses hidden behind them; in brackets without hiding at "
        f"{low:.0%} and {high:.0%} of the peak.",
        "",
        "| scaling | devices | " + " | ".join(DEVICES) + " |",
        "|---|---|" + "---|" * len(DEVICES),
    ]
    for regime, batch_size, plan in found:
        cells = []
        for device in DEVICES.values():
            peak = device.peak_of(config.precision, config.model.dtype)
            if plan["devices"] > device.most:
                cells.append("no such slice")
                continue
            at = {share: project(plan, device, peak, share) for share in UTILISATIONS}
            one = at[middle]
            seconds = one.compute + one.network
            fits = "" if plan["memory_bytes"] <= device.memory else ", DOES NOT FIT"
            cells.append(
                f"{1e3 * seconds:.3g} ms, {batch_size / seconds:,.0f} images/s, "
                f"{one.efficiency:.0%} ({one.overlapped_efficiency:.0%}) "
                f"[{at[low].efficiency:.0%}, {at[high].efficiency:.0%}]{fits}"
            )
        lines.append(f"| {regime} | {plan['devices']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Flags:
    """Flags of the command beside ``--config FILE``."""

    config: TrainConfig
    """Fields of the recipe."""
    devices: str = "8,64,256"
    """Numbers of devices, comma-separated."""
    batch_per_device: int = 128
    """Of weak scaling."""


def main(argv: Sequence[str] | None = None) -> None:
    """Parses flags, compiles, and prints the tables."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE")
    known, rest = parser.parse_known_args(argv)
    default = None
    if known.config is not None:
        default = Flags(cli.run_or_fail(lambda: config_lib.load_file(known.config)))
    elif not any(flag in rest for flag in ("-h", "--help")):
        cli.fail("--config FILE is required, such as --config configs/cifar10_gfa.py.")
    flags = cli.parse(
        Flags, rest, description="Plans training on pods from compiled steps.", default=default
    )
    cli.run_or_fail(lambda: print(text(flags.config, _checked_rows(flags))))


def _checked_rows(flags: Flags) -> list[Row]:
    parts = [part.strip() for part in flags.devices.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"devices={flags.devices!r} must be positive integers, such as 8,64,256.")
    _validate.positive_integer(batch_per_device=flags.batch_per_device)
    return rows(flags.config, sorted({int(part) for part in parts}), flags.batch_per_device)


if __name__ == "__main__":
    main()
