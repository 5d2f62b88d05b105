"""What a study says of claims, published and hoped for, and how sure that is."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gfa_jax.evaluation import intervals
from gfa_jax.study import plan, records, tables
from gfa_jax.study.records import Gathered, Record

_Pairs = Sequence[tuple[Record, Record]]
"""Records of ours and of the baseline, of the same seed."""


class _Measured(NamedTuple):
    """How far ours is ahead, in points or times.

    Attributes:
      text: the figure, and what it comes from.
      low: end of the 95 % interval; the figure itself where there is no interval.
      high: the other end.
      interval: as text; ``-`` where there is none.
    """

    text: str
    low: float
    high: float
    interval: str


def claims_table(study: plan.Study, gathered: Gathered, tested: Gathered) -> list[str]:
    """Returns whether each claim of a study holds, as a Markdown table and a note.

    Args:
      study: with its claims.
      gathered: all records.
      tested: those that were judged on test images.
    """
    header = ["claim", "claimed", "at least", "measured so", "95 % interval", "seeds", "holds"]
    header.append("worst case, ours and baseline")
    rows = []
    for claim in study.claims:
        title = (
            f"{claim.text} ({study.trials[claim.ours].label} against "
            f"{study.trials[claim.baseline].label}, `{claim.attack}`)"
        )
        is_distance = claim.measure == "distance"
        at_least = f"{claim.at_least:g} times" if is_distance else f"{claim.at_least:+g} points"
        rows.append([title, claim.claimed, at_least, *_verdict(study, claim, gathered, tested)])
    note = (
        "Intervals: of one seed, over images (Newcombe 1998, paired proportions); of several, over "
        "images and over the seeds that both have (Student's of either, squared and added); of "
        "ratios, over seeds alone, so that one seed has none. What its interval neither bears out "
        "nor refutes is within chance."
    )
    return [tables.markdown(header, rows), note]


def _verdict(
    study: plan.Study, claim: plan.Claim, gathered: Gathered, tested: Gathered
) -> tuple[str, str, str, str, str]:
    """Returns what was measured, its interval, seeds, the verdict, and both worst cases."""
    failed = {
        name: sum(bool(record.get("failure")) for record in gathered[name])
        for name in (claim.ours, claim.baseline)
    }
    if failed[claim.ours] == len(study.trials[claim.ours].seeds):
        return f"training failed: {study.trials[claim.ours].label}", "-", "0", "no", "-"
    is_distance = claim.measure == "distance"
    stage = "distances" if is_distance else "test"
    pairs = [
        (ours, baseline)
        for ours in tested.get(claim.ours, [])
        for baseline in tested.get(claim.baseline, [])
        if ours["seed"] == baseline["seed"] and stage in ours and stage in baseline
    ]
    seeds = str(len(pairs)) + "".join(
        f", {count} of {study.trials[name].label} failed" for name, count in failed.items() if count
    )
    if not pairs:
        return "not measured yet", "-", seeds, "-", "-"
    worst = " and ".join(
        f"{100 * statistics.mean(records.right(one, tables.WORST).mean() for one in side):.1f}"
        for side in zip(*pairs, strict=True)
    )
    found = _ratio(pairs, claim.attack) if is_distance else _difference(pairs, claim.attack)
    return found.text, found.interval, seeds, _holds(found, claim.at_least), worst


def _holds(found: _Measured, at_least: float) -> str:
    if math.isnan(found.low):
        return "-"
    # Differences of shares are rounded in their last bits.
    if round(found.low, 6) >= at_least:
        return "yes"
    return "no" if round(found.high, 6) < at_least else "within chance"


def _difference(pairs: _Pairs, attack: str) -> _Measured:
    """Returns the difference of accuracies in points."""
    ours, baseline = (
        np.stack([records.right(one, attack) for one in side]) for side in zip(*pairs, strict=True)
    )
    value, low, high = (
        100 * found for found in intervals.paired_trainings_difference(ours, baseline)
    )
    text = f"{value:+.1f} points ({100 * ours.mean():.1f} against {100 * baseline.mean():.1f})"
    return _Measured(text, low, high, f"{low:+.1f} to {high:+.1f}")


def _ratio(pairs: _Pairs, spec: str) -> _Measured:
    """Returns the ratio of mean distances."""
    values = [
        tables.mean_distance([ours], spec) / tables.mean_distance([baseline], spec)
        for ours, baseline in pairs
    ]
    rates = [
        "-" if rate is None else f"{100 * rate:.0f}"
        for rate in (tables.success_rate(side, spec) for side in zip(*pairs, strict=True))
    ]
    found = f"{rates[0]} and {rates[1]} % found"
    value = statistics.mean(values)
    if math.isnan(value):
        return _Measured(f"no ratio: {found}", value, value, "-")
    text, interval = f"{value:.1f} times; {found}", intervals.student(values)
    if interval is None:
        return _Measured(text, value, value, "-")
    return _Measured(text, *interval, f"{interval[0]:.1f} to {interval[1]:.1f}")
