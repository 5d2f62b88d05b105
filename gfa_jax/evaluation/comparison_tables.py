"""The tables of a comparison, as plain data: accuracies, differences, norms, diagnostics, costs."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gfa_jax.evaluation import intervals, report

Outcomes = Mapping[str, np.ndarray]
"""What ``outcomes.npz`` holds: ``ids``, ``labels``, ``clean_correct``, ``worst_case``, and for each
attack ``robust/...``, ``distance/...`` and ``success/...``, each ``[N]``."""

CONFIDENCE = 0.95
"""Of all intervals."""


def was_right(outcomes: Outcomes, name: str) -> np.ndarray:
    """Returns which examples are right: ``clean``, under an attack, or in the ``worst_case``."""
    keys = {"clean": "clean_correct", "worst_case": "worst_case"}
    return outcomes[keys.get(name, f"robust/{name}")]


def _accuracies(runs: Sequence[report.Results]) -> list[str]:
    return ["clean", *report.attack_names(runs)]


def _finite(value: float) -> float | None:
    """JSON holds finite numbers only."""
    return value if math.isfinite(value) else None


def accuracy_table(
    runs: Sequence[report.Results], outcomes: Sequence[Outcomes]
) -> list[dict[str, Any]]:
    """Returns for each run and accuracy ``accuracy`` in [0, 1] with Wilson's ``low`` and ``high``.

    The accuracies (``attack``) are ``clean``, each attack, and ``worst_case``.
    """
    rows = []
    for run, found in zip(runs, outcomes, strict=True):
        for name in _accuracies(runs):
            right = was_right(found, name)
            num_correct = int(right.sum())
            low, high = intervals.wilson(num_correct, len(right), CONFIDENCE)
            rows.append(
                {
                    "run": run["name"],
                    "attack": name,
                    "num_correct": num_correct,
                    "num_examples": len(right),
                    "accuracy": num_correct / len(right),
                    "low": low,
                    "high": high,
                }
            )
    return rows


def difference_table(
    runs: Sequence[report.Results], outcomes: Sequence[Outcomes]
) -> list[dict[str, Any]]:
    """Returns how every other run differs from the first in each accuracy, on the same examples.

    ``difference`` is this run's accuracy less the first's, in [-1, 1], with ``low``, ``high`` and
    the ``p`` of equal accuracies; ``only_here`` and ``only_first`` count the examples that are
    right in one of the two alone.
    """
    rows = []
    for run, found in zip(runs[1:], outcomes[1:], strict=True):
        for name in _accuracies(runs):
            here, first = was_right(found, name), was_right(outcomes[0], name)
            difference, low, high = intervals.paired_difference(here, first, CONFIDENCE)
            rows.append(
                {
                    "run": run["name"],
                    "first": runs[0]["name"],
                    "attack": name,
                    "difference": difference,
                    "low": low,
                    "high": high,
                    "p": intervals.paired_test(here, first),
                    "only_here": int(np.sum(here & ~first)),
                    "only_first": int(np.sum(first & ~here)),
                }
            )
    return rows


def minimum_norm_table(
    runs: Sequence[report.Results], outcomes: Sequence[Outcomes]
) -> list[dict[str, Any]]:
    """Returns the median smallest perturbation of each run and minimum-norm attack.

    It is over the ``num_inputs`` that are right without an attack and were attacked; failures are
    infinite, which JSON says as ``None``. ``ratio`` is to the first run's median: ``None`` where
    one of them is infinite or zero, or the attack left inputs of one of them out (sequential mode).
    """
    rows = []
    for spec in runs[0]["minimum_norm"]:
        first: float | None = None
        for number, (run, found) in enumerate(zip(runs, outcomes, strict=True)):
            right = found["clean_correct"]
            chosen = right & found.get(f"attacked/{spec}", np.ones_like(right))
            success = found[f"success/{spec}"][chosen]
            values = np.where(success, found[f"distance/{spec}"][chosen], np.inf)
            size = int(values.size)
            median = _finite(float(np.median(values))) if size else None
            low, high = (
                intervals.median_interval(values, CONFIDENCE) if size else (-math.inf, math.inf)
            )
            comparable = median if np.array_equal(chosen, right) else None
            if number == 0:
                first = comparable
            rows.append(
                {
                    "run": run["name"],
                    "attack": spec,
                    "num_inputs": size,
                    "success_rate": float(success.mean()) if size else None,
                    "median": median,
                    # Norms are never negative.
                    "low": _finite(max(low, 0.0)),
                    "high": _finite(high),
                    "ratio": comparable / first if comparable is not None and first else None,
                }
            )
    return rows


def diagnostics_table(runs: Sequence[report.Results]) -> list[dict[str, Any]]:
    """Returns for each diagnostic its ``id``, ``name`` and the ``status`` in each run, in order.

    The status of a run that does not have it is ``None``.
    """
    by_run = [{entry["id"]: entry for entry in run["diagnostics"]} for run in runs]
    entries = {identifier: entry for run in reversed(by_run) for identifier, entry in run.items()}
    order = dict.fromkeys(identifier for run in by_run for identifier in run)
    return [
        {
            "id": identifier,
            "name": entries[identifier].get("name", ""),
            "status": [run.get(identifier, {}).get("status") for run in by_run],
        }
        for identifier in order
    ]


def training_table(runs: Sequence[report.Results]) -> list[dict[str, Any]]:
    """Returns ``steps``, ``examples`` and ``seconds`` of each training; ``None`` if unknown."""
    fields = ("steps", "examples", "seconds")
    return [
        {
            "run": run["name"],
            **{field: (run.get("training") or {}).get(field) for field in fields},
        }
        for run in runs
    ]
