"""The results of the attack benchmark as a Markdown page."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import measure

_BUSY = 1.25
"""Load for each thread beyond which others must have been at work too."""


def render(results: Mapping[str, Any]) -> str:
    """Returns the page: environment, a table for each norm, footnotes."""
    environment, settings = results["environment"], results["settings"]
    lines = [
        "# Attacks: time and strength",
        "",
        f"Device: {environment['device']}, {environment['threads']} threads. "
        f"Precision: {environment['precision']}. {environment['started']}.",
        "",
        "Versions: "
        + ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
        + ".",
        "",
        f"Network: {settings['model']} on {settings['data']}, trained for {settings['epochs']} "
        "epochs against PGD; the same weights and images for all. Clean accuracy "
        f"{environment['clean_accuracy']:.1%}.",
        "",
        "Seconds per 1,000 images: median (fastest to slowest) over rounds in which the libraries "
        "take turns, scaled from the number of images named. Compilation, once for a program, has "
        "a column of its own. Network alone: the forward passes and gradients that were counted, "
        "at what these take in a compiled loop with nothing else in it. Strength: robust accuracy "
        "within epsilon, or the median norm of what was found among images classified correctly "
        "(failures count as infinite); lower is stronger.",
        "",
    ]
    load = max((one["load"] for one in results["measurements"]), default=0)
    if load > _BUSY * environment["threads"]:
        lines += [
            f"**The machine was busy with something else (load {load:.1f} before a run): these "
            "times say little.**",
            "",
        ]
    notes: dict[str, int] = {}
    norms = [norm for norm in ("linf", "l2", "l1") if _rows(results, norm)]
    for norm in norms:
        lines += [f"## {norm}, epsilon = {settings['epsilons'][norm]:g}", ""]
        lines += [
            "| attack | library | images | rounds | s / 1,000 images | network alone, s / 1,000 "
            "images | compilation, s | strength |",
            "|---|---|---:|---:|---:|---:|---:|---|",
        ]
        for row in _rows(results, norm):
            known = results["notes"].get(row["library"], {})
            note = known.get(f"{row['attack']} {norm}", known.get(row["attack"]))
            mark = f" [{notes.setdefault(note, len(notes) + 1)}]" if note else ""
            lines.append(_line(row, mark))
        lines.append("")
    lines += [f"[{number}] {note}" + "\n" for note, number in notes.items()]
    if results["skipped"]:
        lines += ["Not measured:", ""]
        lines += [f"- {what}: {reason}" for what, reason in sorted(results["skipped"].items())]
    return "\n".join(lines).rstrip() + "\n"


def _rows(results: Mapping[str, Any], norm: str) -> list[dict[str, Any]]:
    """Returns the measurements of a norm, rounds gathered, in the order of attacks."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for one in results["measurements"]:
        if one["norm"] == norm:
            groups.setdefault((one["attack"], one["library"]), []).append(one)
    order = list(measure.NORMS)
    return [
        {"attack": attack, "library": library, "rounds": rounds}
        for (attack, library), rounds in sorted(
            groups.items(), key=lambda item: order.index(item[0][0])
        )
    ]


def _line(row: Mapping[str, Any], mark: str) -> str:
    rounds: Sequence[Mapping[str, Any]] = row["rounds"]
    size = rounds[0]["num_images"]
    seconds = [one["seconds"] * 1000 / size for one in rounds]
    time = f"{statistics.median(seconds):.3g}"
    if len(rounds) > 1:
        time += f" ({min(seconds):.3g} to {max(seconds):.3g})"
    alone = [one["network_seconds"] for one in rounds if one.get("network_seconds") is not None]
    network = f"{statistics.median(alone) * 1000 / size:.3g}" if alone else ""
    compilation = max(one["compile_seconds"] for one in rounds)
    return (
        f"| {row['attack']} | {row['library']}{mark} | {size} | {len(rounds)} | {time} | "
        f"{network} | {f'{compilation:.1f}' if compilation else ''} | "
        f"{_strength(row['attack'], rounds[0])} |"
    )


def _strength(attack: str, one: Mapping[str, Any]) -> str:
    if "robust_accuracy" in one:
        return f"{one['robust_accuracy']:.1%} robust"
    unit = "l2² + β l1" if attack == "ead-en" else one["norm"]
    median = f"{one['median_norm']:.4g}" if "median_norm" in one else "infinite"
    return f"{median} ({unit}), {one['success_rate']:.1%} found"
