"""Counts what devices send each other in a compiled program, loops included."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}
_BYTES |= {"f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8}
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) .*\{$")
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"^(?:ROOT )?%?[\w.-]+ = (\(.*?\)|\S+) ([\w-]+)\(")
"""``%name = result operation(arguments), ...``; several results are in parentheses."""
_CALLED = re.compile(
    r"(?:body|calls|to_apply|called_computations|branch_computations)="
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
            before.num_times + times * traffic.num_times, before.num_bytes + times * traffic.num_bytes
        )

    for line in bodies.get(name, ()):
        match = _INSTRUCTION.match(line)
        if match is None:
            continue
        result, operation = match.groups()
        kind = operation.removesuffix("-start")
        if kind in KINDS:
            # Some that only start give the operand too, before the result.
            last = operation.endswith("-start") and kind in ("all-gather", "collective-permute")
            add(kind, 1, Traffic(1, _size(result, last_only=last)))
        for called in _CALLED.findall(line):
            for inner in called.split(","):
                found = _of(inner.strip().lstrip("%"), bodies)
                times = _iterations(line, found) if operation == "while" else 1
                for other, traffic in found.items():
                    add(other, times, traffic)
    return totals


def _iterations(line: str, found: dict[str, Traffic]) -> int:
    trips = _TRIPS.search(line)
    if trips:
        return int(trips.group(1))
    if any(traffic.num_times for traffic in found.values()):
        raise ValueError("a loop with collectives in it has no known number of iterations.")
    return 1


def _size(result: str, *, last_only: bool) -> int:
    arrays = _ARRAY.findall(result)
    return sum(
        _BYTES.get(dtype, 0) * math.prod(int(size) for size in shape.split(",") if size)
        for dtype, shape in (arrays[-1:] if last_only else arrays)
    )
