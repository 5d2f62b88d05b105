"""What a diagnostic is: a value held against a threshold, with its meaning in plain words."""

import math
from typing import Any

Diagnostic = dict[str, Any]
"""``id``, ``name``, ``value`` (``None`` where there is no finite one), ``threshold``, ``status``
(PASS, WARN, FAIL, NA), ``n`` (the examples behind it) and ``meaning``; ready for JSON."""

NAMES = {
    "D1": "One step against many",
    "D2": "More steps",
    "D3": "Larger radius",
    "D4": "Very large radius",
    "D5": "Attack without gradients",
    "D6": "Attack on labels alone",
    "D7": "Random points",
    "D8": "Transferred examples",
    "D9": "More restarts",
    "D10": "Choice of loss",
    "D11": "Vanishing gradients",
    "D12": "Gradient against loss",
    "D13": "Linearity of the loss",
    "D14": "Missing gradients",
    "D15": "Unstable loss",
    "D16": "Results of attacks",
    "D17": "Attack stopped too early",
    "D18": "Transfer to a twin",
    "D19": "Attack without a radius",
    "D20": "Planted adversarial examples",
    "D21": "Smallest perturbations",
    "D22": "Same input, same output",
    "D23": "Saturated loss",
    "D24": "Attacks on known models",
}

MIN_TOLERANCE = 0.005
"""Differences of accuracies below half a point are never held against a model."""
_SEVERITY = ("NA", "PASS", "WARN", "FAIL")


def judge(
    identifier: str,
    value: float | None,
    threshold: float | None,
    n: int | None,
    meaning: str,
    *,
    bad: str = "FAIL",
    at_least: bool = False,
) -> Diagnostic:
    """Judges a value that must not exceed a threshold, or fall below it; a missing one is not.

    A value that is not a number is bad.
    """
    status = "NA"
    if value is not None and threshold is not None:
        good = value >= threshold if at_least else value <= threshold
        status = "PASS" if good else bad
        # JSON holds finite numbers only.
        value = float(value) if math.isfinite(value) else None
    return {
        "id": identifier,
        "name": NAMES[identifier],
        "value": value,
        "threshold": threshold,
        "status": status,
        "n": n,
        "meaning": meaning,
    }


def missing(identifier: str, reason: str) -> Diagnostic:
    """Returns the entry of what was not measured, with the reason."""
    return judge(identifier, None, None, None, f"Not measured: {reason}")


def worst(*parts: Diagnostic) -> Diagnostic:
    """Returns the part of a diagnostic that is judged worst, the first of equals."""
    return max(parts, key=lambda part: _SEVERITY.index(part["status"]))


def paired_allowance(num_differing: int, n: int, least: float = MIN_TOLERANCE) -> float:
    """Returns how far chance takes two accuracies on the same examples apart.

    Two standard errors of their difference where so many of ``n`` examples differ (McNemar), at
    least ``least``.
    """
    return max(least, 2 * math.sqrt(num_differing) / n)
