"""Signs of gradient masking (attacks that are being fooled), judged from an evaluation's numbers.

Each diagnostic has an id, a name, a value, a threshold, a status (PASS, WARN, FAIL, NA), the number
of examples behind it and a meaning in plain words. Where one that invalidates the attacks fails,
the headline robust accuracy is only an upper bound. What is measured on the model for it comes from
``probing.measure``.

Sources: Athalye et al. 2018 (arXiv 1802.00420), Carlini et al. 2019 (arXiv 1902.06705), Pintor et
al. 2022 (arXiv 2106.09947), Zimmermann et al. 2022 (arXiv 2206.13991). Thresholds are theirs or
AutoAttack's where they give any; the others are named in the constants below.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gfa_jax.evaluation import judgement, probe_diagnostics

Curve = Sequence[tuple[float, float]]
"""``(epsilon, accuracy)``, epsilon rising."""

MIN_PLANTED_FOUND = 0.95
"""Share of planted adversarial examples that an attack should find."""
MAX_UNDEFENDED = 0.1
"""Accuracy that attacks may leave of a model without defence; a choice of this library's own."""
MAX_PLANTED_BY_CHANCE = 0.5
"""Share of planted examples that random points may find before the test says little; a choice of
this library's own."""


def _paired_excess(
    stronger: np.ndarray | None, weaker: np.ndarray | None
) -> tuple[float | None, float]:
    """Returns how much more accuracy ``stronger`` left than ``weaker``, and what chance allows.

    Both are bool ``[N]`` on the same examples, so only those on which they differ carry noise: the
    allowance is two standard errors of their difference (as in McNemar's test), at least half a
    point.
    """
    if stronger is None or weaker is None:
        return None, judgement.MIN_TOLERANCE
    excess = float(np.mean(stronger) - np.mean(weaker))
    return excess, judgement.paired_allowance(int(np.sum(stronger != weaker)), len(stronger))


_ITERATIVE = ("pgd", "pgd-margin", "pgd-dlr", "apgd-ce", "apgd-dlr", "apgd-t")


def _name_of(attack: str) -> str:
    return attack.split(":")[0]


def _black_box_gain(
    robust: Mapping[str, np.ndarray], black_box: Sequence[np.ndarray]
) -> tuple[float | None, float]:
    """Returns the share of examples that Square alone breaks, and what is tolerated.

    AutoAttack warns from 0.2 %; one example is tolerated.
    """
    named = [(_name_of(attack), value) for attack, value in robust.items()]
    gradient = [value for name, value in named if name in _ITERATIVE]
    square = [~value for name, value in named if name == "square"] if gradient else []
    found = [*square, *black_box]
    if not found:
        return None, 0.002
    alone = np.logical_and.reduce([np.logical_or.reduce(found), *gradient])
    return float(np.mean(alone)), max(0.002, 1 / len(alone))


def _rise(curves: Mapping[str, Curve], n: int | None) -> judgement.Diagnostic:
    """D3: accuracy that rises with epsilon, on the curve where it rises most."""
    rises = [
        after - before
        for curve in curves.values()
        for (_, before), (_, after) in itertools.pairwise(curve)
    ]
    allowance = (
        max(judgement.MIN_TOLERANCE, 2 * math.sqrt(0.5 / n)) if n else judgement.MIN_TOLERANCE
    )
    return judgement.judge(
        "D3",
        max(rises, default=None),
        allowance,
        n,
        "Accuracy should fall as the radius grows: an attack that may do more finds no less. If it "
        "rises, the attack is broken.",
    )


def _accuracy_from(curves: Mapping[str, Curve], lower: float, upper: float) -> list[float]:
    """Returns each curve's accuracy at its first radius in ``[lower, upper)``, if there is any."""
    found = (
        next((value for epsilon, value in curve if lower <= epsilon < upper), None)
        for curve in curves.values()
    )
    return [value for value in found if value is not None]


def _large_radius(
    curves: Mapping[str, Curve],
    n: int | None,
    box: float | None,
    num_classes: int | None,
    minimum_norms: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]],
) -> judgement.Diagnostic:
    """D4: what is left where no model can resist."""
    nearly = 1 - 1e-6
    whole = _accuracy_from(curves, nearly * box, math.inf) if box else []
    half = _accuracy_from(curves, nearly * box / 2, nearly * box) if box else []
    parts = [
        judgement.judge(
            "D4",
            max(whole, default=None),
            judgement.MIN_TOLERANCE,
            n,
            "With the whole image free to change, every example should be broken. If some resist, "
            "gradients are masked or the attack is too weak.",
        )
    ]
    if num_classes:
        chance = 1 / num_classes
        error = math.sqrt(chance * (1 - chance) / n) if n else 0.0
        parts.append(
            judgement.judge(
                "D4",
                max(half, default=None),
                chance + max(judgement.MIN_TOLERANCE, 2 * error),
                n,
                "At half the width of the box every image can be turned grey, so that no model can "
                "do better than guess. If it does, gradients are masked or the attack is too weak.",
            )
        )
    failures = [
        (float(np.mean(~success[right])), int(right.sum()))
        for success, _, right in minimum_norms.values()
        if right.any()
    ]
    if failures:
        share, count = max(failures)
        parts.append(
            judgement.judge(
                "D4",
                share,
                0.0,
                count,
                "An attack that looks for the smallest perturbation, at any distance, should "
                "always find one. If it does not, it is too weak or gradients are masked.",
                bad="WARN",
            )
        )
    return judgement.worst(*parts)


def _unbounded(
    curves: Mapping[str, Curve], n: int | None, box: float | None
) -> judgement.Diagnostic:
    """D19: what the best attack leaves in the whole box."""
    whole = _accuracy_from(curves, (1 - 1e-6) * box, math.inf) if box else []
    return judgement.judge(
        "D19",
        min(whole, default=None),
        0.0,
        n,
        "The strongest attack with no radius at all should break every single example. If it does "
        "not, it fails for reasons other than the radius.",
    )


def _overlooked(
    robust: Mapping[str, np.ndarray],
    minimum_norms: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]],
    epsilon: float | None,
) -> judgement.Diagnostic:
    """D21: examples that only a minimum-norm attack breaks within epsilon."""
    inside = [value for attack, value in robust.items() if attack not in minimum_norms]
    if epsilon is None or not inside or not minimum_norms:
        return judgement.missing(
            "D21", "needs an attack within epsilon and one for the smallest norm."
        )
    left = np.logical_and.reduce(inside)
    close = np.logical_or.reduce(
        [
            success & (distance <= epsilon) & right
            for success, distance, right in minimum_norms.values()
        ]
    )
    return judgement.judge(
        "D21",
        int(np.sum(left & close)),
        0.0,
        len(left),
        "Number of examples that resist all attacks within the radius, though an attack that looks "
        "for the smallest perturbation finds one inside it: those attacks are too weak. The worst "
        "case counts both.",
        bad="WARN",
    )


_MINIMISED = {"cw": ("l2",), "ead-en": ("l1", "l2"), "ead-l1": ("l1",)}
"""The norms that attacks make small, where it is not the threat's whatever it is."""


def _labels_alone(
    found: Mapping[str, Any] | None,
    minimum_norms: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]],
    norm: str | None,
) -> judgement.Diagnostic:
    """D6: what a search that sees labels alone finds and the attacks do not."""
    if not found:
        return judgement.missing("D6", "the model was not probed.")
    fitting = {
        attack: value
        for attack, value in minimum_norms.items()
        if norm in (None, *_MINIMISED.get(_name_of(attack), (norm,)))
    }
    return probe_diagnostics.judge_labels(found, fitting)


def _transfer(
    robust: Mapping[str, np.ndarray], transfer: Mapping[str, np.ndarray] | None
) -> judgement.Diagnostic:
    """D8: adversarial examples of other models that do more harm than the model's own."""
    white_box = [value for attack, value in robust.items() if _name_of(attack) in _ITERATIVE]
    if not transfer or not white_box:
        return judgement.missing("D8", "needs adversarial examples of other models.")
    left = np.logical_and.reduce(white_box)
    return judgement.worst(
        *(
            judgement.judge(
                "D8",
                *_paired_excess(left, np.asarray(value)),
                len(left),
                f"Adversarial examples made on another model ({name}) should break fewer examples "
                "than the attacks on this one. If they break more, gradients are masked.",
            )
            for name, value in transfer.items()
        )
    )


def _sanity(accuracies: Mapping[str, float] | None) -> judgement.Diagnostic:
    """D24: what attacks leave of the least robust of other models."""
    if not accuracies:
        return judgement.missing("D24", "needs the evaluation of a model without defence.")
    name = min(accuracies, key=lambda other: accuracies[other])
    return judgement.judge(
        "D24",
        accuracies[name],
        MAX_UNDEFENDED,
        None,
        f"Attacks at this radius should leave next to nothing of a model without defence (here "
        f"{name}, the least robust of the other models). If much is left, it is defended, the "
        "attacks are broken, or the radius is too small to tell.",
        bad="WARN",
    )


def _planted(binarization: Mapping[str, Any] | None) -> judgement.Diagnostic:
    """D20: the binarisation test."""
    if not binarization or not binarization.get("n") or binarization.get("asr") is None:
        return judgement.missing("D20", "the binarisation test was not run.")
    n = int(binarization["n"])
    return judgement.worst(
        judgement.judge(
            "D20",
            binarization["asr"],
            MIN_PLANTED_FOUND,
            n,
            "The attack should find adversarial examples that are known to be there, because they "
            "were planted. If it misses many, it is too weak for this model.",
            at_least=True,
        ),
        judgement.judge(
            "D20",
            binarization.get("r_asr"),
            MAX_PLANTED_BY_CHANCE,
            n,
            "Random points find many of the planted adversarial examples, too: the test was too "
            "easy to say much about the attack.",
            bad="WARN",
        ),
    )


def diagnose(
    robust: Mapping[str, np.ndarray],
    *,
    curves: Mapping[str, Curve] | None = None,
    curve_examples: int | None = None,
    box: float | None = None,
    epsilon: float | None = None,
    norm: str | None = None,
    zero_gradient_share: float | None = None,
    num_classes: int | None = None,
    probes: Mapping[str, Any] | None = None,
    binarization: Mapping[str, Any] | None = None,
    minimum_norms: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]] | None = None,
    transfer: Mapping[str, np.ndarray] | None = None,
    references: Mapping[str, Mapping[str, Any]] | None = None,
    reference_accuracies: Mapping[str, float] | None = None,
    black_box: Sequence[np.ndarray] = (),
) -> list[judgement.Diagnostic]:
    """Returns all diagnostics, in the order of ``judgement.NAMES``; what is missing is NA.

    The worst case over all attacks counts the better attack already where D1, D8, D10 or D21 say
    that one was better.

    Args:
      robust: for each attack, bool ``[N]``: which examples stayed right. FGSM, PGD and Auto-PGD
        with its losses, and Square (options after a colon are allowed) are compared.
      curves: accuracy against epsilon by attack. D3 and D4 judge the worst curve, D19 the strongest
        attack.
      curve_examples: examples behind each curve.
      box: the epsilon at which the ball holds the whole box.
      epsilon: the radius of ``robust``, for D21.
      norm: of the threat; D6 compares attacks that make it small. By default it compares all.
      zero_gradient_share: share of the attacks' gradients that were exactly zero, each attack's on
        the examples that it did not break.
      num_classes: for D4 at half the box; classes are taken to be equally frequent.
      probes: from ``probing.measure``, of the first of the examples of ``minimum_norms``.
      binarization: the test of planted adversarial examples: ``asr``, the share that the attack
        found, ``r_asr``, that of random points, and ``n``.
      minimum_norms: for each attack that looks for the smallest perturbation, ``(success [N],
        distance [N], right without it [N])``. It may be in ``robust`` under the same name.
      transfer: for adversarial examples of each other model, bool ``[N]``: which examples stayed
        right.
      references: ``probes`` of models known to be sound, such as one without defence and one
        trained with PGD, by name: D11 and D15 are compared with them.
      reference_accuracies: what the attacks left of those models, by name, for D24.
      black_box: for each ensemble that ends with Square, bool ``[N]``: which examples Square broke
        that the members before it did not, for D5.

    Returns:
      Dicts of ``id``, ``name``, ``value`` (``None`` where there is no finite one), ``threshold``
      (``None`` where nothing was measured), ``status``, ``n`` and ``meaning``. Of several values,
      the one that is judged worst.
    """
    curves, minimum_norms = curves or {}, minimum_norms or {}
    size = len(next(iter(robust.values()))) if robust else None

    def strongest(*names: str) -> np.ndarray | None:
        matching = [value for attack, value in robust.items() if _name_of(attack) in names]
        return min(matching, key=np.mean) if matching else None

    cross_entropy = strongest("pgd", "apgd-ce")
    margin = strongest("pgd-margin", "pgd-dlr", "apgd-dlr", "apgd-t")
    zero_gradients = judgement.judge(
        "D11",
        zero_gradient_share,
        0.0,
        size,
        "Some gradients are exactly zero: those steps of the attack did nothing.",
    )
    sizes = (probes or {}).get("D11")
    found = [
        judgement.judge(
            "D1",
            *_paired_excess(strongest(*_ITERATIVE), strongest("fgsm")),
            size,
            "Many small steps should beat one big step. If they do not, gradients mislead near the "
            "input.",
        ),
        _rise(curves, curve_examples),
        _large_radius(curves, curve_examples, box, num_classes, minimum_norms),
        judgement.judge(
            "D5",
            *_black_box_gain(robust, black_box),
            size,
            "Square, which uses no gradients, should break nothing that gradient attacks do not. "
            "If it does, gradients are masked or the gradient attacks too weak.",
        ),
        _labels_alone((probes or {}).get("D6"), minimum_norms, norm),
        _transfer(robust, transfer),
        judgement.worst(
            judgement.judge(
                "D10",
                *_paired_excess(cross_entropy, margin),
                size,
                "The cross-entropy attack should be as strong as the margin attack. If it is "
                "weaker, its gradient vanishes on confident examples. Believe the margin.",
                bad="WARN",
            ),
            probe_diagnostics.judge_scaled_loss((probes or {}).get("D10")),
        ),
        judgement.worst(zero_gradients, probe_diagnostics.judge_gradient_sizes(sizes, references))
        if sizes
        else zero_gradients,
        judgement.missing("D18", "needs an undefended or differentiable twin of the model."),
        _unbounded(curves, curve_examples, box),
        _planted(binarization),
        _overlooked(robust, minimum_norms, epsilon),
        _sanity(reference_accuracies),
        *probe_diagnostics.judge_probes(probes, references),
    ]
    order = list(judgement.NAMES)
    return sorted(found, key=lambda entry: order.index(entry["id"]))


INVALIDATING = frozenset({"D1", "D3", "D4", "D5", "D6", "D7", "D14", "D19", "D20"})
"""Diagnostics whose failure makes the robust accuracy an upper bound only."""


def masking_suspected(diagnostics: Sequence[judgement.Diagnostic]) -> bool:
    """Returns whether a diagnostic that invalidates the attacks failed."""
    return any(entry["status"] == "FAIL" and entry["id"] in INVALIDATING for entry in diagnostics)
