"""Counts what devices send each other in a compiled program, loops included."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

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
_LISTED = re.compile(r"replica_groups=\{\{([\d,]+)\}")
_IOTA = re.compile(r"replica_groups=\[\d+,(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(
    r"replica_groups=mesh\[([^\]]*)\]"
    r"(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}"
)
"""The forms in which groups of devices are written; a mesh's with the axes that a group spans."""


class Traffic(NamedTuple):
    """What one kind of collective does in a call of a program.

    Attributes:
      num_times: how often it runs.
      num_bytes: of its results on one device.
    """

    num_times: int
    num_bytes: int


class Transfer(NamedTuple):
    """What collectives of one kind do among groups of devices in a call of a program.

    Attributes:
      kind: one of ``KINDS``.
      size: devices of a group.
      stride: from one device of a group to the next.
      num_times: how often they run.
      num_bytes: of their results on one device, all runs together.
    """

    kind: str
    size: int
    stride: int
    num_times: int
    num_bytes: int


_Key = tuple[str, int, int]
_Totals = dict[_Key, Traffic]


def count(hlo: str) -> dict[str, Traffic]:
    """Returns the collectives of a compiled program by kind, those of loops as often as they run.

    Args:
      hlo: ``compiled.as_text()``.

    Raises:
      ValueError: for collectives in a loop of which XLA does not know the number of iterations.
    """
    found: dict[str, Traffic] = {}
    for kind, _, _, num_times, num_bytes in transfers(hlo, 1):
        before = found.get(kind, Traffic(0, 0))
        found[kind] = Traffic(before.num_times + num_times, before.num_bytes + num_bytes)
    return found


def transfers(hlo: str, num_devices: int) -> list[Transfer]:
    """Returns the collectives of a compiled program by kind and group, loops as in ``count``.

    Args:
      hlo: ``compiled.as_text()``.
      num_devices: of the program; a collective whose groups are not understood is taken for one of
        all devices.

    Raises:
      ValueError: as ``count``.
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
    totals = _of(entry, bodies, num_devices)
    return [Transfer(*key, *totals[key]) for key in sorted(totals, key=_order)]


def _order(key: _Key) -> tuple[int, int, int]:
    kind, size, stride = key
    return KINDS.index(kind), -size, stride


def _of(name: str, bodies: Mapping[str, Sequence[str]], num_devices: int) -> _Totals:
    totals: _Totals = {}

    def add(key: _Key, times: int, traffic: Traffic) -> None:
        before = totals.get(key, Traffic(0, 0))
        totals[key] = Traffic(
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
            key = (kind, *_group(line, num_devices))
            add(key, 1, Traffic(1, _size(_received(result, operation))))
        called = [
            _of(inner.strip().lstrip("%"), bodies, num_devices)
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


def _group(line: str, num_devices: int) -> tuple[int, int]:
    """Returns the size and stride of the groups of a collective, by that of device 0."""
    if match := _LISTED.search(line):
        members = np.array(_integers(match[1]))
    elif match := _IOTA.search(line):
        members = _devices(match[2], match[3])[: int(match[1])]
    elif match := _MESH.search(line):
        names, sizes = zip(*re.findall(r"'([^']+)'=(\d+)", match[1]), strict=True)
        shape = [int(size) for size in sizes]
        spanned = re.findall(r"'([^']+)'", match[4])
        devices = _devices(match[2] or str(math.prod(shape)), match[3]).reshape(shape)
        if ":" in match[4]:  # part of an axis
            return num_devices, 1
        members = devices[tuple(slice(None) if n in spanned else 0 for n in names)].ravel()
    else:
        return num_devices, 1
    members = np.sort(members)
    return len(members), int(members[1] - members[0]) if len(members) > 1 else 1


def _integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _devices(shape: str, order: str | None) -> np.ndarray:
    """Returns device numbers in the order that ``[4,2]T(1,0)`` says."""
    numbers = np.arange(math.prod(_integers(shape))).reshape(_integers(shape))
    return (numbers.transpose(_integers(order)) if order else numbers).ravel()


def _iterations(line: str, found: _Totals) -> int:
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
