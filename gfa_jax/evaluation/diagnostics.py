"""Signs of gradient masking (attacks that are being fooled), judged from an evaluation's numbers.

Each diagnostic has an id, a name, a value, a threshold, a status (PASS, WARN, FAIL, NA), the number
of examples behind it and a meaning in plain words. Where one that invalidates the attacks fails,
the headline robust accuracy is only an upper bound. What is measured on the model for it comes from
``probes.measure``.

Sources: Athalye et al. 2018 (arXiv 1802.00420), Carlini et al. 2019 (arXiv 1902.06705), Pintor et
al. 2022 (arXiv 2106.09947), Zimmermann et al. 2022 (arXiv 2206.13991). Thresholds are theirs or
AutoAttack's where they give any; the others are named in the constants below.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

Diagnostic = dict[str, Any]
Curve = Sequence[tuple[float, float]]
"""``(epsilon, accuracy)``, epsilon rising."""

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
MAX_GAIN = 0.01
"""Twice the steps, or more restarts, should not find more than one point."""
MANY_RESTARTS = 20
"""A gain from fewer restarts than these is a warning only."""
MAX_DERIVATIVE_ERROR = 0.5
"""Median relative error of derivatives against finite differences."""
MIN_COSINE = 0.1
"""Median cosine of gradients an eighth of epsilon apart; a choice of this library's own."""
MAX_NONLINEARITY = 0.5
"""Median of the largest error of the linearised loss, as a share of the loss plus one; a choice of
this library's own."""
MAX_INSTABILITY = 0.5
"""Mean relative change of the loss under faint noise, where there is no reference model; a choice
of this library's own."""
REFERENCE_FACTOR = 2.0
"""A loss may change so many times as much under noise as that of the reference models."""
MIN_GRADIENT_RATIO = 1e-3
"""Median gradient, as a share of the smallest of the reference models."""
MAX_LATE_RISE = 0.05
"""Share of the rise of the loss that may fall to an attack's last steps."""
MAX_INCONSISTENCY = 1e-4
"""Relative difference of logits between passes (AutoAttack's check of randomness)."""
MIN_PLANTED_FOUND = 0.95
"""Share of planted adversarial examples that an attack should find."""
MAX_PLANTED_BY_CHANCE = 0.5
"""Share of planted examples that random points may find before the test says little; a choice of
this library's own."""

_SEVERITY = ("NA", "PASS", "WARN", "FAIL")


def _diagnostic(
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


def _missing(identifier: str, reason: str) -> Diagnostic:
    return _diagnostic(identifier, None, None, None, f"Not measured: {reason}")


def _worst(*parts: Diagnostic) -> Diagnostic:
    """Returns the part of a diagnostic that is judged worst, the first of equals."""
    return max(parts, key=lambda part: _SEVERITY.index(part["status"]))


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
    return excess, _paired_allowance(int(np.sum(stronger != weaker)), len(stronger))


def _paired_allowance(num_differing: int, n: int, least: float = MIN_TOLERANCE) -> float:
    return max(least, 2 * math.sqrt(num_differing) / n)


_ITERATIVE = ("pgd", "pgd-margin", "pgd-dlr", "apgd-ce", "apgd-dlr", "apgd-t")


def _name_of(attack: str) -> str:
    return attack.split(":")[0]


def _black_box_gain(robust: Mapping[str, np.ndarray]) -> tuple[float | None, float]:
    """Returns the share of examples that Square alone breaks, and what is tolerated.

    AutoAttack warns from 0.2 %; one example is tolerated.
    """
    named = [(_name_of(attack), value) for attack, value in robust.items()]
    gradient = [value for name, value in named if name in _ITERATIVE]
    square = [value for name, value in named if name == "square"]
    if not gradient or not square:
        return None, 0.002
    left = np.logical_and.reduce(gradient)
    alone = left & ~np.logical_and.reduce(square)
    return float(np.mean(alone)), max(0.002, 1 / len(left))


def _rise(curves: Mapping[str, Curve], n: int | None) -> Diagnostic:
    """D3: accuracy that rises with epsilon, on the curve where it rises most."""
    rises = [
        after - before
        for curve in curves.values()
        for (_, before), (_, after) in itertools.pairwise(curve)
    ]
    allowance = max(MIN_TOLERANCE, 2 * math.sqrt(0.5 / n)) if n else MIN_TOLERANCE
    return _diagnostic(
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
) -> Diagnostic:
    """D4: what is left where no model can resist."""
    nearly = 1 - 1e-6
    whole = _accuracy_from(curves, nearly * box, math.inf) if box else []
    half = _accuracy_from(curves, nearly * box / 2, nearly * box) if box else []
    parts = [
        _diagnostic(
            "D4",
            max(whole, default=None),
            MIN_TOLERANCE,
            n,
            "With the whole image free to change, every example should be broken. If some resist, "
            "gradients are masked or the attack is too weak.",
        )
    ]
    if num_classes:
        chance = 1 / num_classes
        error = math.sqrt(chance * (1 - chance) / n) if n else 0.0
        parts.append(
            _diagnostic(
                "D4",
                max(half, default=None),
                chance + max(MIN_TOLERANCE, 2 * error),
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
            _diagnostic(
                "D4",
                share,
                0.0,
                count,
                "An attack that looks for the smallest perturbation, at any distance, should "
                "always find one. If it does not, it is too weak or gradients are masked.",
                bad="WARN",
            )
        )
    return _worst(*parts)


def _unbounded(curves: Mapping[str, Curve], n: int | None, box: float | None) -> Diagnostic:
    """D19: what the best attack leaves in the whole box."""
    whole = _accuracy_from(curves, (1 - 1e-6) * box, math.inf) if box else []
    return _diagnostic(
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
) -> Diagnostic:
    """D21: examples that only a minimum-norm attack breaks within epsilon."""
    inside = [value for attack, value in robust.items() if attack not in minimum_norms]
    if epsilon is None or not inside or not minimum_norms:
        return _missing("D21", "needs an attack within epsilon and one for the smallest norm.")
    left = np.logical_and.reduce(inside)
    close = np.logical_or.reduce(
        [
            success & (distance <= epsilon) & right
            for success, distance, right in minimum_norms.values()
        ]
    )
    return _diagnostic(
        "D21",
        int(np.sum(left & close)),
        0.0,
        len(left),
        "Number of examples that resist all attacks within the radius, though an attack that looks "
        "for the smallest perturbation finds one inside it: those attacks are too weak. The worst "
        "case counts both.",
        bad="WARN",
    )


def _transfer(
    robust: Mapping[str, np.ndarray], transfer: Mapping[str, np.ndarray] | None
) -> Diagnostic:
    """D8: adversarial examples of other models that do more harm than the model's own."""
    white_box = [value for attack, value in robust.items() if _name_of(attack) in _ITERATIVE]
    if not transfer or not white_box:
        return _missing("D8", "needs adversarial examples of other models.")
    left = np.logical_and.reduce(white_box)
    return _worst(
        *(
            _diagnostic(
                "D8",
                *_paired_excess(left, np.asarray(value)),
                len(left),
                f"Adversarial examples made on another model ({name}) should break fewer examples "
                "than the attacks on this one. If they break more, gradients are masked.",
            )
            for name, value in transfer.items()
        )
    )


def _planted(binarization: Mapping[str, Any] | None) -> Diagnostic:
    """D20: the binarisation test."""
    if not binarization or not binarization.get("n") or binarization.get("asr") is None:
        return _missing("D20", "the binarisation test was not run.")
    n = int(binarization["n"])
    return _worst(
        _diagnostic(
            "D20",
            binarization["asr"],
            MIN_PLANTED_FOUND,
            n,
            "The attack should find adversarial examples that are known to be there, because they "
            "were planted. If it misses many, it is too weak for this model.",
            at_least=True,
        ),
        _diagnostic(
            "D20",
            binarization.get("r_asr"),
            MAX_PLANTED_BY_CHANCE,
            n,
            "Random points find many of the planted adversarial examples, too: the test was too "
            "easy to say much about the attack.",
            bad="WARN",
        ),
    )


def _gain(
    identifier: str, found: Mapping[str, Any], meaning: str, *, bad: str = "FAIL"
) -> Diagnostic:
    """Judges what the largest count of steps or restarts finds that the one before did not."""
    n, accuracy = found["n"], found["accuracy"]
    if len(accuracy) < 2:
        return _missing(identifier, "needs two counts to compare.")
    return _diagnostic(
        identifier,
        accuracy[-2] - accuracy[-1],
        _paired_allowance(found["num_differing"][-1], n, MAX_GAIN),
        n,
        meaning.format(*found["counts"][-2:]),
        bad=bad,
    )


def _judge_steps(found: Mapping[str, Any]) -> Diagnostic:
    n = found["n"]
    rises = [
        (after - before, _paired_allowance(differing, n))
        for (before, after), differing in zip(
            itertools.pairwise(found["accuracy"]), found["num_differing"], strict=True
        )
    ]
    rise, allowance = max(rises, key=lambda rise: rise[0] - rise[1], default=(None, MIN_TOLERANCE))
    return _worst(
        _gain(
            "D2",
            found,
            "An attack of {1} steps should find little more than one of {0}. If it does, it has "
            "not converged: use more steps.",
        ),
        _diagnostic(
            "D2",
            rise,
            allowance,
            n,
            "An attack of more steps should find no less. If it does, gradients are noise.",
        ),
    )


def _judge_draws(found: Mapping[str, Any]) -> Diagnostic:
    n = found["n"]
    if not n:
        return _missing("D7", "no example resisted the attacks.")
    return _diagnostic(
        "D7",
        found["num_broken"] / n,
        0.0,
        n,
        f"Share of the examples that resisted the attacks which {found['num_draws']} random points "
        "of the ball break: an attack that misses them is fooled.",
    )


def _judge_restarts(found: Mapping[str, Any]) -> Diagnostic:
    return _gain(
        "D9",
        found,
        "{1} restarts should find little more than {0}. If they do, the loss is rugged: use more "
        "restarts.",
        # The first restarts may well find something; the later ones should not.
        bad="FAIL" if found["counts"][-1] >= MANY_RESTARTS else "WARN",
    )


def _reference(
    references: Mapping[str, Mapping[str, Any]] | None, identifier: str
) -> list[Mapping[str, Any]]:
    return [found[identifier] for found in (references or {}).values() if identifier in found]


def _judge_gradient_sizes(
    found: Mapping[str, Any], references: Mapping[str, Mapping[str, Any]] | None
) -> Diagnostic:
    known = [
        other["median_gradient"]["clean"]
        for other in _reference(references, "D11")
        if other["median_gradient"]["clean"]
    ]
    own = found["median_gradient"]["clean"]
    meaning = (
        "Gradients are far smaller than those of the reference models: they may vanish by design. "
        "Attack with losses that do not depend on their size."
    )
    ratio = None if not known else math.nan if own is None else own / min(known)
    return _diagnostic(
        "D11", ratio, MIN_GRADIENT_RATIO, found["n"], meaning, bad="WARN", at_least=True
    )


def _judge_agreement(found: Mapping[str, Any]) -> Diagnostic:
    errors = [_or_nan(value) for row in found["median_error"].values() for value in row]
    # NaN first: max would skip it.
    error = math.nan if any(map(math.isnan, errors)) else max(errors)
    return _worst(
        _diagnostic(
            "D12",
            error,
            MAX_DERIVATIVE_ERROR,
            found["n"],
            "Gradients should foretell how the loss changes a tiny step away. If they do not, "
            "they are wrong, and attacks that follow them are lost.",
        ),
        _diagnostic(
            "D12",
            _or_nan(found["median_cosine"][0]),
            MIN_COSINE,
            found["n"],
            "Gradients should point the same way at an input and close to it. If they do not, the "
            "loss is so rough that following them leads nowhere.",
            at_least=True,
        ),
    )


def _judge_linearity(found: Mapping[str, Any]) -> Diagnostic:
    return _diagnostic(
        "D13",
        _or_nan(found["median"]),
        MAX_NONLINEARITY,
        found["n"],
        "How far the loss is from a straight line within the radius. If it is far, single steps go "
        "astray: use attacks of many small ones.",
        bad="WARN",
    )


def _judge_missing_gradients(found: Mapping[str, Any]) -> Diagnostic:
    operations = found["operations"]
    return _worst(
        _diagnostic(
            "D14",
            found["zero_share"],
            0.0,
            found["n"],
            "Share of examples whose gradient is exactly zero: attacks that follow it do nothing "
            "there.",
        ),
        _diagnostic(
            "D14",
            float(len(operations)),
            0.0,
            found["n"],
            "Number of kinds of operations between input and output that have no useful derivative"
            + (f" ({', '.join(operations)})" if operations else "")
            + ": attack through a smooth stand-in for them.",
        ),
    )


def _judge_stability(
    found: Mapping[str, Any], references: Mapping[str, Mapping[str, Any]] | None
) -> Diagnostic:
    known = [other["mean"] for other in _reference(references, "D15") if other["mean"] is not None]
    return _diagnostic(
        "D15",
        _or_nan(found["mean"]),
        REFERENCE_FACTOR * max(known) if known else MAX_INSTABILITY,
        found["n"],
        "How much faint noise changes the loss. If it changes a lot, the loss is too noisy to "
        "follow.",
        bad="WARN",
    )


def _judge_results(found: Mapping[str, Any]) -> Diagnostic:
    return _diagnostic(
        "D16",
        found["num_contradictions"],
        0.0,
        found["n"],
        "Number of examples where an attack says that it misled the model, or that it did not, and "
        "a new pass shows otherwise. Its results cannot be trusted.",
    )


def _judge_late_rise(found: Mapping[str, Any]) -> Diagnostic:
    return _diagnostic(
        "D17",
        _or_nan(found["mean_rise"]),
        MAX_LATE_RISE,
        found["n"],
        f"Share of the rise of the loss in the last {found['last_steps']} of {found['num_steps']} "
        "steps. If it still rises, the attack was stopped too early.",
    )


def _judge_consistency(found: Mapping[str, Any]) -> Diagnostic:
    return _worst(
        _diagnostic(
            "D22",
            _or_nan(found["max_difference"]),
            MAX_INCONSISTENCY,
            found["n"],
            "The output for an image should not depend on the pass or on the other images of the "
            "batch. If it does, the model draws at random or is in training mode.",
        ),
        _diagnostic(
            "D22",
            float(found["probabilities"]),
            0.0,
            found["n"],
            "Outputs look like probabilities, not like logits: a second softmax in the loss hides "
            "gradients. Attack the logits.",
        ),
    )


def _judge_saturation(found: Mapping[str, Any]) -> Diagnostic:
    return _diagnostic(
        "D23",
        found["saturated_share"],
        0.0,
        found["n"],
        "Share of examples on which the model is so certain that the cross-entropy is rounded to "
        "its limit: its gradient says little. Believe losses on the logits.",
        bad="WARN",
    )


def _or_nan(value: float | None) -> float:
    """A measured value that was not finite comes as ``None``, and is bad."""
    return math.nan if value is None else value


def _from_probes(
    probes: Mapping[str, Any] | None, references: Mapping[str, Mapping[str, Any]] | None
) -> Iterator[Diagnostic]:
    """Judges what was measured on the model."""
    judges: dict[str, Callable[[Mapping[str, Any]], Diagnostic]] = {
        "D2": _judge_steps,
        "D7": _judge_draws,
        "D9": _judge_restarts,
        "D12": _judge_agreement,
        "D13": _judge_linearity,
        "D14": _judge_missing_gradients,
        "D15": lambda found: _judge_stability(found, references),
        "D16": _judge_results,
        "D17": _judge_late_rise,
        "D22": _judge_consistency,
        "D23": _judge_saturation,
    }
    for identifier, judge in judges.items():
        found = (probes or {}).get(identifier)
        yield judge(found) if found else _missing(identifier, "the model was not probed.")


def diagnose(
    robust: Mapping[str, np.ndarray],
    *,
    curves: Mapping[str, Curve] | None = None,
    curve_examples: int | None = None,
    box: float | None = None,
    epsilon: float | None = None,
    zero_gradient_share: float | None = None,
    num_classes: int | None = None,
    probes: Mapping[str, Any] | None = None,
    binarization: Mapping[str, Any] | None = None,
    minimum_norms: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]] | None = None,
    transfer: Mapping[str, np.ndarray] | None = None,
    references: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[Diagnostic]:
    """Returns all diagnostics, in the order of ``NAMES``; what is missing is NA.

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
      zero_gradient_share: share of gradient evaluations of the attacks that were exactly zero.
      num_classes: for D4 at half the box; classes are taken to be equally frequent.
      probes: from ``probes.measure``.
      binarization: the test of planted adversarial examples: ``asr``, the share that the attack
        found, ``r_asr``, that of random points, and ``n``.
      minimum_norms: for each attack that looks for the smallest perturbation, ``(success [N],
        distance [N], right without it [N])``. It may be in ``robust`` under the same name.
      transfer: for adversarial examples of each other model, bool ``[N]``: which examples stayed
        right.
      references: ``probes`` of models known to be sound, such as one without defence and one
        trained with PGD, by name: D11 and D15 are compared with them.

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
    zero_gradients = _diagnostic(
        "D11",
        zero_gradient_share,
        0.0,
        size,
        "Some gradients are exactly zero: those steps of the attack did nothing.",
    )
    sizes = (probes or {}).get("D11")
    found = [
        _diagnostic(
            "D1",
            *_paired_excess(strongest(*_ITERATIVE), strongest("fgsm")),
            size,
            "Many small steps should beat one big step. If they do not, gradients mislead near the "
            "input.",
        ),
        _rise(curves, curve_examples),
        _large_radius(curves, curve_examples, box, num_classes, minimum_norms),
        _diagnostic(
            "D5",
            *_black_box_gain(robust),
            size,
            "Square, which uses no gradients, should break nothing that gradient attacks do not. "
            "If it does, gradients are masked or the gradient attacks too weak.",
        ),
        _missing("D6", "needs an attack that sees labels alone, which this library has not."),
        _transfer(robust, transfer),
        _diagnostic(
            "D10",
            *_paired_excess(cross_entropy, margin),
            size,
            "The cross-entropy attack should be as strong as the margin attack. If it is weaker, "
            "its gradient vanishes on confident examples. Believe the margin.",
            bad="WARN",
        ),
        _worst(zero_gradients, _judge_gradient_sizes(sizes, references))
        if sizes
        else zero_gradients,
        _missing("D18", "needs an undefended or differentiable twin of the model."),
        _unbounded(curves, curve_examples, box),
        _planted(binarization),
        _overlooked(robust, minimum_norms, epsilon),
        _missing("D24", "needs models whose robust accuracy is known."),
        *_from_probes(probes, references),
    ]
    order = list(NAMES)
    return sorted(found, key=lambda entry: order.index(entry["id"]))


INVALIDATING = frozenset({"D1", "D3", "D4", "D5", "D7", "D14", "D19", "D20"})
"""Diagnostics whose failure makes the robust accuracy an upper bound only."""


def masking_suspected(diagnostics: Sequence[Diagnostic]) -> bool:
    """Returns whether a diagnostic that invalidates the attacks failed."""
    return any(entry["status"] == "FAIL" and entry["id"] in INVALIDATING for entry in diagnostics)
