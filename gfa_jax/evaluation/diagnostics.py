"""Signs of gradient masking (attacks that are being fooled), read from an evaluation's numbers.

Each diagnostic has an id, a value, a threshold, a status (PASS, WARN, FAIL, NA) and a meaning in
plain words. Where one that invalidates the attacks fails, the headline robust accuracy is only an
upper bound.

Sources: Athalye et al. 2018 (arXiv 1802.00420), Carlini et al. 2019 (arXiv 1902.06705).
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Diagnostic = dict[str, Any]


def _diagnostic(
    identifier: str, value: float | None, threshold: float, meaning: str, *, bad: str = "FAIL"
) -> Diagnostic:
    """Judges a value that must not exceed a threshold; a missing value is not judged."""
    status = "NA" if value is None else bad if value > threshold else "PASS"
    return {
        "id": identifier,
        "value": value,
        "threshold": threshold,
        "status": status,
        "meaning": meaning,
    }


MIN_TOLERANCE = 0.005
"""Differences of accuracies below half a point are never held against a model."""


def _paired_excess(
    stronger: np.ndarray | None, weaker: np.ndarray | None
) -> tuple[float | None, float]:
    """Returns how much more accuracy ``stronger`` left than ``weaker``, and what chance allows.

    Both are bool ``[N]`` on the same examples, so only those on which they differ carry noise: the
    allowance is two standard errors of their difference (as in McNemar's test), at least half a
    point.
    """
    if stronger is None or weaker is None:
        return None, MIN_TOLERANCE
    excess = float(np.mean(stronger) - np.mean(weaker))
    error = math.sqrt(np.sum(stronger != weaker)) / len(stronger)
    return excess, max(MIN_TOLERANCE, 2 * error)


_ITERATIVE = ("pgd", "pgd-margin", "pgd-dlr", "apgd-ce", "apgd-dlr", "apgd-t")


def _black_box_gain(robust: Mapping[str, np.ndarray]) -> tuple[float | None, float]:
    """Returns the share of examples that Square alone breaks, and what is tolerated.

    AutoAttack warns from 0.2 %; one example is tolerated.
    """
    named = [(attack.split(":")[0], value) for attack, value in robust.items()]
    gradient = [value for name, value in named if name in _ITERATIVE]
    square = [value for name, value in named if name == "square"]
    if not gradient or not square:
        return None, 0.002
    left = np.logical_and.reduce(gradient)
    alone = left & ~np.logical_and.reduce(square)
    return float(np.mean(alone)), max(0.002, 1 / len(left))


def diagnose(
    robust: Mapping[str, np.ndarray],
    *,
    curve: Sequence[tuple[float, float]],
    curve_examples: int,
    box: float,
    zero_gradient_share: float,
) -> list[Diagnostic]:
    """Returns the diagnostics that the attacks allow.

    Args:
      robust: for each attack, bool ``[N]``: which examples stayed right. FGSM, PGD and Auto-PGD
        with its losses, and Square (options after a colon are allowed) are compared.
      curve: ``(epsilon, accuracy)`` of one strong attack, epsilon rising.
      curve_examples: examples behind the curve.
      box: the epsilon at which the ball holds the whole box.
      zero_gradient_share: share of gradient evaluations of the attacks that were exactly zero.
    """

    def strongest(*names: str) -> np.ndarray | None:
        matching = [value for attack, value in robust.items() if attack.split(":")[0] in names]
        return min(matching, key=np.mean) if matching else None

    cross_entropy = strongest("pgd", "apgd-ce")
    margin = strongest("pgd-margin", "pgd-dlr", "apgd-dlr", "apgd-t")
    gap, gap_allowance = _paired_excess(strongest(*_ITERATIVE), strongest("fgsm"))
    loss_gap, loss_gap_allowance = _paired_excess(cross_entropy, margin)
    rises = [after - before for (_, before), (_, after) in itertools.pairwise(curve)]
    rise = max(rises) if rises else None
    rise_allowance = max(MIN_TOLERANCE, 2 * math.sqrt(0.5 / curve_examples))
    left = [value for epsilon, value in curve if epsilon >= box]
    left_in_box = left[-1] if left else None
    return [
        _diagnostic(
            "D1",
            gap,
            gap_allowance,
            "One big step beats many small ones: gradients mislead near the input.",
        ),
        _diagnostic(
            "D3",
            rise,
            rise_allowance,
            "Accuracy rises with a larger radius: the attack is broken.",
        ),
        _diagnostic(
            "D4",
            left_in_box,
            MIN_TOLERANCE,
            "With the whole image free to change, some examples still resist: gradients are masked "
            "or the attack is too weak.",
        ),
        _diagnostic(
            "D5",
            *_black_box_gain(robust),
            "Square, which uses no gradients, breaks examples that no gradient attack breaks: "
            "gradients are masked or the gradient attacks too weak.",
        ),
        _diagnostic(
            "D10",
            loss_gap,
            loss_gap_allowance,
            "The cross-entropy attack is weaker than the margin attack: its gradient vanishes on "
            "confident examples. Believe the margin.",
            bad="WARN",
        ),
        _diagnostic(
            "D11",
            zero_gradient_share,
            0.0,
            "Some gradients are exactly zero: those steps of the attack did nothing.",
        ),
    ]


INVALIDATING = frozenset({"D1", "D3", "D4", "D5"})
"""Diagnostics whose failure makes the robust accuracy an upper bound only."""


def masking_suspected(diagnostics: Sequence[Diagnostic]) -> bool:
    """Returns whether a diagnostic that invalidates the attacks failed."""
    return any(entry["status"] == "FAIL" and entry["id"] in INVALIDATING for entry in diagnostics)
