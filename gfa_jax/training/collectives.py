"""Counts what devices send each other in a compiled program, loops included."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_BYTES = {"token": 0, "pred": 1, "s4": 1, "u4": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2}
_BYTES |= {"s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8}
_BYTES |= {"c64": 8, "c128": 16}
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) .*\{$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"^(?:ROOT )?%?[\w.-]+ = (\(.*?\)|\S+) ([\w-]+)\(")
"""``%name = result operation(arguments), ...``; several results are in parentheses."""
_CALLED = re.compile(
    r"(?:body|condition|calls|to_apply|called_computations|branch_computations"
    r"|true_computation|false_computation)="
    r"\{?(%[\w.-]+(?:, *%[\w.-]+)*)"
)
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')


class Traffic(NamedTuple):
    """What one kind of collective does in a call of a program.

    Attributes:
      num_times: how often it runs.
      num_bytes: of its results on one device.
    """

    num_times: int
    num_bytes: int


def count(hlo: str) -> dict[str, Traffic]:
    """Returns the collectives of a compiled program by kind, those of loops as often as they run.

    Args:
      hlo: ``compiled.as_text()``.

    Raises:
      ValueError: for collectives in a loop of which XLA does not know the number of iterations.
    """
    bodies: dict[str, list[str]] = {}
    entry = ""
    lines: list[str] = []
    for line in hlo.splitlines():
        if header := _COMPUTATION.match(line):
            lines = bodies.setdefault(header.group(1), [])
            if line.startswith("ENTRY"):
                entry = header.group(1)
        elif " = " in line:
            lines.append(line.strip())
    return {kind: traffic for kind, traffic in _of(entry, bodies).items() if traffic.num_times}


def _of(name: str, bodies: Mapping[str, Sequence[str]]) -> dict[str, Traffic]:
    totals = dict.fromkeys(KINDS, Traffic(0, 0))

    def add(kind: str, times: int, traffic: Traffic) -> None:
        before = totals[kind]
        totals[kind] = Traffic(
            before.num_times + times * traffic.num_times,
            before.num_bytes + times * traffic.num_bytes,
        )

    for line in bodies.get(name, ()):
        match = _INSTRUCTION.match(line)
        if match is None:
            continue
        result, operation = match.groups()
        if operation.endswith(("-done", "-update")):
            continue  # Counted where it started.
        kind = operation.removesuffix("-start")
        if kind in KINDS:
            add(kind, 1, Traffic(1, _size(_received(result, operation))))
        called = [
            _of(inner.strip().lstrip("%"), bodies)
            for names in _CALLED.findall(line)
            for inner in names.split(",")
        ]
        if operation == "conditional":  # one branch runs: the dearest
            called = [max(called, key=lambda found: sum(one.num_bytes for one in found.values()))]
        for found in called:
            times = _iterations(line, found) if operation == "while" else 1
            for other, traffic in found.items():
                add(other, times, traffic)
    return totals


def _received(result: str, operation: str) -> str:
    """Returns the part of a result that holds what was received.

    Collectives that only start give ``(operands, results, contexts...)``; an
    all-reduce its results.
    """
    if not operation.endswith("-start") or operation == "all-reduce-start":
        return result
    parts, depth, start = [], 0, 1
    for index, character in enumerate(result):
        depth += (character in "([{") - (character in ")]}")
        if (character == "," and depth == 1) or (character == ")" and depth == 0):
            parts.append(result[start:index])
            start = index + 1
    return parts[1] if len(parts) > 1 else result


def _iterations(line: str, found: dict[str, Traffic]) -> int:
    trips = _TRIPS.search(line)
    if trips:
        return int(trips.group(1))
    if any(traffic.num_times for traffic in found.values()):
        raise ValueError(
            "a loop with collectives in it has no known number of iterations: give it a fixed one."
        )
    return 1


def _size(result: str) -> int:
    total = 0
    for dtype, shape in _ARRAY.findall(result):
        width = 1 if dtype.startswith("f8") else _BYTES.get(dtype)
        if width is None:
            raise ValueError(f"the program sends {dtype}[{shape}], an unknown type.")
        total += width * math.prod(int(size) for size in shape.split(",") if size)
    return total


def sent_bytes(traffic: Mapping[str, Traffic], num_devices: int) -> float:
    """Returns what a device sends over a ring of all devices, in bytes.

    With n devices and R bytes of results: ``2 (n - 1) / n R`` for an all-reduce (a reduce-scatter
    and an all-gather), ``(n - 1) / n R`` for an all-gather and an all-to-all, ``(n - 1) R`` for a
    reduce-scatter, whose result is a share, and R for a permutation.
    """
    others = num_devices - 1
    factors = {
        "all-reduce": 2 * others / num_devices,
        "all-gather": others / num_devices,
        "all-to-all": others / num_devices,
        "reduce-scatter": float(others),
        "collective-permute": 1.0,
    }
    return sum(factors[kind] * one.num_bytes for kind, one in traffic.items())
