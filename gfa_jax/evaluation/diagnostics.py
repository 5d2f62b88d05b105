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

Diagnostic = dict[str, Any]


def _diagnostic(
    identifier: str,
    value: float | None,
    threshold: float,
    failed: bool,
    meaning: str,
    *,
    bad: str = "FAIL",
) -> Diagnostic:
    status = "NA" if value is None else bad if failed else "PASS"
    return {
        "id": identifier,
        "value": value,
        "threshold": threshold,
        "status": status,
        "meaning": meaning,
    }


def tolerance(num_examples: int) -> float:
    """Returns the difference of two accuracies that chance alone may give.

    It is the larger of 0.5 points and two standard errors at 1/2.
    """
    return max(0.005, 2 * math.sqrt(0.25 / max(num_examples, 1)))


def diagnose(
    robust_accuracy: Mapping[str, float],
    *,
    num_examples: int,
    curve: Sequence[tuple[float, float]],
    box: float,
    zero_gradient_share: float,
) -> list[Diagnostic]:
    """Returns the diagnostics that FGSM and PGD allow.

    Args:
      robust_accuracy: accuracy by attack name; ``fgsm``, ``pgd`` and ``pgd-margin`` (options after
        a colon are allowed) are compared.
      num_examples: examples behind each accuracy.
      curve: ``(epsilon, accuracy)`` of one strong attack, epsilon rising.
      box: the epsilon at which the ball holds the whole box.
      zero_gradient_share: share of gradient evaluations of the attacks that were exactly zero.
    """
    tau = tolerance(num_examples)

    def accuracy(name: str) -> float | None:
        matching = [
            value for attack, value in robust_accuracy.items() if attack.split(":")[0] == name
        ]
        return min(matching) if matching else None

    fgsm, ce, margin = accuracy("fgsm"), accuracy("pgd"), accuracy("pgd-margin")
    iterative = min((value for value in (ce, margin) if value is not None), default=None)
    gap = None if fgsm is None or iterative is None else iterative - fgsm
    loss_gap = None if ce is None or margin is None else ce - margin
    rises = [after - before for (_, before), (_, after) in itertools.pairwise(curve)]
    whole_box = [value for epsilon, value in curve if epsilon >= box]
    return [
        _diagnostic(
            "D1",
            gap,
            tau,
            gap is not None and gap > tau,
            "One big step beats many small ones: gradients mislead near the input.",
        ),
        _diagnostic(
            "D3",
            max(rises) if rises else None,
            tau,
            bool(rises) and max(rises) > tau,
            "Accuracy rises with a larger radius: the attack is broken.",
        ),
        _diagnostic(
            "D4",
            whole_box[-1] if whole_box else None,
            tau,
            bool(whole_box) and whole_box[-1] > tau,
            "With the whole image free to change, some examples still resist: gradients are masked "
            "or the attack is too weak.",
        ),
        _diagnostic(
            "D10",
            loss_gap,
            tau,
            loss_gap is not None and loss_gap > tau,
            "The cross-entropy attack is weaker than the margin attack: its gradient vanishes on "
            "confident examples. Believe the margin.",
            bad="WARN",
        ),
        _diagnostic(
            "D11",
            zero_gradient_share,
            0.0,
            zero_gradient_share > 0,
            "Some gradients are exactly zero: those steps of the attack did nothing.",
            bad="WARN",
        ),
    ]


INVALIDATING = frozenset({"D1", "D3", "D4"})
"""Diagnostics whose failure makes the robust accuracy an upper bound only."""


def masking_suspected(diagnostics: Sequence[Diagnostic]) -> bool:
    """Returns whether a diagnostic that invalidates the attacks failed."""
    return any(entry["status"] == "FAIL" and entry["id"] in INVALIDATING for entry in diagnostics)
