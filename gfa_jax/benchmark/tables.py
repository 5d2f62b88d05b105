"""The results of the benchmark as a Markdown page and a picture."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from gfa_jax.benchmark import timing

Results = Mapping[str, Any]

_BUSY = 1.25
"""Load for each thread beyond which others must have been at work too."""


def page(results: Results) -> str:
    """Returns the page: command, environment, and a table for each group."""
    environment, settings = results["environment"], results["settings"]
    lines = [
        "# Compiled throughput",
        "",
        f"`{results['command']}`",
        "",
        ", ".join(f"{name} {value}" for name, value in environment.items()) + ".",
        "",
        f"Median and 90th percentile of a run's time over {settings['rounds']} rounds of "
        f"{settings['samples']} samples, in which programs take turns, after compilation and two "
        "runs. *Times* the first program of a table: the median (lowest to highest) over rounds. "
        "FLOPs are those of matrix products and convolutions, loops as often as they run; *of the "
        "floor* divides the ratio of times by that of FLOPs: 1 where an operation costs what it "
        "costs in the first program. Memory is that of one device, as its compiler plans it.",
        "",
    ]
    threads = environment["threads"]
    load = max((group["load"] for group in results["groups"]), default=0.0)
    if load > _BUSY * threads:
        lines += [
            f"**The machine was busy with something else (load {load:.1f}): these times say "
            "little.**",
            "",
        ]
    for group in results["groups"]:
        lines += _group(group)
    return "\n".join(lines)


def rows(group: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns what the table shows of each program, as numbers.

    Keys: ``name``, ``summary`` (``timing.Summary``; its ratios are those to the group's first
    program), ``examples_per_second``, ``flops_per_second``, ``floor`` and ``memory_ratio`` (beside
    the first program; ``None`` where unknown).
    """
    programs = group["programs"]
    first = programs[0]
    found = []
    for program in programs:
        summary = timing.summary(program["seconds"], first["seconds"])
        known = program["flops"] and first["flops"]
        found.append(
            {
                "name": program["name"],
                "summary": summary,
                "examples_per_second": program["batch_size"] / summary.median,
                "flops_per_second": program["flops"] and program["flops"] / summary.median,
                "floor": summary.ratio * first["flops"] / program["flops"] if known else None,
                "memory_ratio": (
                    program["memory_bytes"] / first["memory_bytes"]
                    if program["memory_bytes"] and first["memory_bytes"]
                    else None
                ),
            }
        )
    return found


def _group(group: Mapping[str, Any]) -> list[str]:
    num_devices, peak = group["num_devices"], group["peak_flops"]
    first = group["programs"][0]
    image = "x".join(map(str, group["image_shape"]))
    lines = [
        f"## {group['model']}, {group['kind']}, batch {group['batch_size']}, {group['dtype']}",
        "",
        f"Images of {image}; "
        + (
            f"peak: {peak / 1e12:,.4g} TFLOP/s a device"
            if peak
            else f"a product of large matrices: {group['product_flops'] / 1e9:,.0f} GFLOP/s"
        )
        + f"; load {group['load']:.1f}.",
        "",
        f"| {group['kind']} | ms, median | p90 | examples/s | per device | times {first['name']} "
        "| GFLOPs | of the floor | GFLOP/s | "
        + ("MFU" if peak else "of a product")
        + f" | memory, MB | times {first['name']} | trace, s | compile, s |",
        "|---|" + "---:|" * 13,
    ]
    reached = peak or group["product_flops"]
    for program, row in zip(group["programs"], rows(group), strict=True):
        summary, rate = row["summary"], row["flops_per_second"]
        each = rate and rate / num_devices
        cells = [
            program["name"],
            f"{1e3 * summary.median:.4g}",
            f"{1e3 * summary.p90:.4g}",
            f"{row['examples_per_second']:,.0f}",
            f"{row['examples_per_second'] / num_devices:,.0f}",
            f"{summary.ratio:.2f} ({summary.lowest:.2f}-{summary.highest:.2f})",
            f"{program['flops'] / 1e9:,.4g}" if program["flops"] else "-",
            f"{row['floor']:.2f}" if row["floor"] else "-",
            f"{rate / 1e9:,.4g}" if rate else "-",
            f"{each / reached:.0%}" if each else "-",
            f"{program['memory_bytes'] / 1e6:,.0f}" if program["memory_bytes"] else "-",
            f"{row['memory_ratio']:.2f}" if row["memory_ratio"] else "-",
            f"{program['trace_seconds']:.1f}",
            f"{program['compile_seconds']:.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def picture(results: Results) -> bytes:
    """Returns a PNG: a panel of bars for each group, times beside its first program."""
    groups: Sequence[Mapping[str, Any]] = results["groups"]
    heights = [0.9 + 0.28 * len(group["programs"]) for group in groups]
    figure = Figure(figsize=(7, sum(heights)), layout="constrained")
    panels = figure.subplots(len(groups), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, group in zip(panels, groups, strict=True):
        found = rows(group)
        names = [row["name"] for row in found]
        ratios = [row["summary"].ratio for row in found]
        spread = [
            [row["summary"].ratio - row["summary"].lowest for row in found],
            [row["summary"].highest - row["summary"].ratio for row in found],
        ]
        panel.barh(names, ratios, xerr=spread, color="#0072B2", ecolor="#1c1c1e")
        floors = [row["floor"] and row["summary"].ratio / row["floor"] for row in found]
        for position, floor in enumerate(floors):
            if floor:
                panel.plot([floor, floor], [position - 0.4, position + 0.4], color="#D55E00")
        panel.invert_yaxis()
        panel.set_xlabel(f"time of a run, times {names[0]}; orange: its FLOPs")
        panel.set_title(
            f"{group['model']}, {group['kind']}, batch {group['batch_size']}, {group['dtype']}",
            fontsize=9,
        )
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150)
    return file.getvalue()
