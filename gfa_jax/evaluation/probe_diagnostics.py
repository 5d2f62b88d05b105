"""The diagnostics that judge measurements on the model itself (``probing.measure``).

Sources: Pintor et al. 2022 (arXiv 2106.09947), Carlini et al. 2019 (arXiv 1902.06705). Thresholds
of this library's own are named.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from gfa_jax.evaluation import judgement

MAX_GAIN = 0.01
"""Twice the steps, or more restarts, should not find more than one point."""
MAX_CLOSER_BY_LABELS = 0.05
"""Share of examples for which labels alone may lead closer than minimum-norm attacks; a choice of
this library's own."""
MANY_RESTARTS = 20
"""A gain from fewer restarts than these is a warning only."""
MAX_DERIVATIVE_ERROR = 0.5
"""Median relative error of derivatives against finite differences."""
MIN_COSINE = 0.1
"""Median cosine of gradients an eighth of epsilon apart; a choice of this library's own."""
MAX_NONLINEARITY = 0.5
"""Median of the largest error of the linearised loss, as a share of the loss plus one; a choice of
this library's own."""
MAX_FALLING_SHARE = 0.1
"""Share of small steps uphill after which the loss may be lower."""
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


def _gain(
    identifier: str, found: Mapping[str, Any], meaning: str, *, bad: str = "FAIL"
) -> judgement.Diagnostic:
    """Judges what the largest count of steps or restarts finds that the one before did not."""
    n, accuracy = found["n"], found["accuracy"]
    if len(accuracy) < 2:
        return judgement.missing(identifier, "needs two counts to compare.")
    return judgement.judge(
        identifier,
        accuracy[-2] - accuracy[-1],
        judgement.paired_allowance(found["num_differing"][-1], n, MAX_GAIN),
        n,
        meaning.format(*found["counts"][-2:]),
        bad=bad,
    )


def _judge_steps(found: Mapping[str, Any]) -> judgement.Diagnostic:
    n = found["n"]
    rises = [
        (after - before, judgement.paired_allowance(differing, n))
        for (before, after), differing in zip(
            itertools.pairwise(found["accuracy"]), found["num_differing"], strict=True
        )
    ]
    rise, allowance = max(
        rises, key=lambda rise: rise[0] - rise[1], default=(None, judgement.MIN_TOLERANCE)
    )
    return judgement.worst(
        _gain(
            "D2",
            found,
            "An attack of {1} steps should find little more than one of {0}. If it does, it has "
            "not converged: use more steps.",
        ),
        judgement.judge(
            "D2",
            rise,
            allowance,
            n,
            "An attack of more steps should find no less. If it does, gradients are noise.",
        ),
    )


def judge_labels(
    found: Mapping[str, Any],
    minimum_norms: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]],
) -> judgement.Diagnostic:
    """Judges what a search that sees labels alone found (D6).

    Args:
      found: the entry D6 of ``probing.measure``, of the first examples.
      minimum_norms: as those of ``diagnostics.diagnose``, whose first examples they are.
    """
    within = judgement.missing("D6", "no example resisted the attacks.")
    if found["num_survivors"]:
        within = judgement.judge(
            "D6",
            found["num_within"] / found["num_survivors"],
            0.0,
            found["num_survivors"],
            f"Share of the examples that resisted the attacks which a search along "
            f"{found['num_directions']} random directions breaks within the radius, though it "
            "sees only the predicted class: the attacks are fooled.",
        )
    closer = judgement.missing("D6", "no attack looked for the smallest perturbation.")
    right = [right[: found["n"]] for _, _, right in minimum_norms.values()]
    if right and np.any(right[0]):
        nearest = np.min(
            [
                np.where(success, distance, np.inf)[: found["n"]]
                for success, distance, _ in minimum_norms.values()
            ],
            axis=0,
        )
        labelled = np.array([math.inf if value is None else value for value in found["distances"]])
        closer = judgement.judge(
            "D6",
            float(np.mean((labelled < nearest)[right[0]])),
            MAX_CLOSER_BY_LABELS,
            int(right[0].sum()),
            "Share of examples for which a search that sees only the predicted class finds a "
            "smaller perturbation than all attacks that look for the smallest one. If it does so "
            "often, gradients mislead those attacks.",
        )
    return judgement.worst(within, closer)


def _judge_draws(found: Mapping[str, Any]) -> judgement.Diagnostic:
    n = found["n"]
    if not n:
        return judgement.missing("D7", "no example resisted the attacks.")
    return judgement.judge(
        "D7",
        found["num_broken"] / n,
        0.0,
        n,
        f"Share of the examples that resisted the attacks which {found['num_draws']} random points "
        "of the ball break: an attack that misses them is fooled.",
    )


def _judge_restarts(found: Mapping[str, Any]) -> judgement.Diagnostic:
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


def judge_gradient_sizes(
    found: Mapping[str, Any], references: Mapping[str, Mapping[str, Any]] | None
) -> judgement.Diagnostic:
    """Judges the size of gradients beside that of models known to be sound (D11).

    Args:
      found: the entry D11 of ``probing.measure``.
      references: the same of other models, by name; without any, nothing is judged.
    """
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
    return judgement.judge(
        "D11", ratio, MIN_GRADIENT_RATIO, found["n"], meaning, bad="WARN", at_least=True
    )


def judge_scaled_loss(found: Mapping[str, Any] | None) -> judgement.Diagnostic:
    """Judges whether the cross-entropy is stronger on logits of a moderate scale (D10).

    Args:
      found: the entry D10 of ``probing.measure``, or ``None``.
    """
    if not found:
        return judgement.missing("D10", "the model was not probed.")
    plain, scaled = found["accuracy"]
    return judgement.judge(
        "D10",
        plain - scaled,
        judgement.paired_allowance(found["num_differing"], found["n"]),
        found["n"],
        "The cross-entropy should be as strong on the model's own logits as on logits that are "
        f"divided by {found['temperature']:.3g}, which brings them about 1 apart. If it is weaker, "
        "it is saturated. Believe losses on the logits.",
        bad="WARN",
    )


def _judge_agreement(found: Mapping[str, Any]) -> judgement.Diagnostic:
    errors = [_or_nan(value) for row in found["median_error"].values() for value in row]
    # NaN first: max would skip it.
    error = math.nan if any(map(math.isnan, errors)) else max(errors)
    return judgement.worst(
        judgement.judge(
            "D12",
            error,
            MAX_DERIVATIVE_ERROR,
            found["n"],
            "Gradients should foretell how the loss changes a tiny step away. If they do not, "
            "they are wrong, and attacks that follow them are lost.",
        ),
        judgement.judge(
            "D12",
            _or_nan(found["median_cosine"][0]),
            MIN_COSINE,
            found["n"],
            "Gradients should point the same way at an input and close to it. If they do not, the "
            "loss is so rough that following them leads nowhere.",
            at_least=True,
        ),
    )


def _judge_surface(found: Mapping[str, Any]) -> judgement.Diagnostic:
    return judgement.worst(
        judgement.judge(
            "D13",
            _or_nan(found["median"]),
            MAX_NONLINEARITY,
            found["n"],
            "How far the loss is from a straight line within the radius. If it is far, single "
            "steps go astray: use attacks of many small ones.",
            bad="WARN",
        ),
        judgement.judge(
            "D13",
            _or_nan(found["falling_share"]),
            MAX_FALLING_SHARE,
            found["n"],
            f"Share of {found['num_steps']} small steps uphill that end lower than they began. If "
            "there are many, the loss is full of small hills that hold an attack up: use restarts "
            "and gradients averaged over noise.",
            bad="WARN",
        ),
    )


def _judge_missing_gradients(found: Mapping[str, Any]) -> judgement.Diagnostic:
    operations = found["operations"]
    return judgement.worst(
        judgement.judge(
            "D14",
            found["zero_share"],
            0.0,
            found["n"],
            "Share of examples whose gradient is exactly zero: attacks that follow it do nothing "
            "there.",
        ),
        judgement.judge(
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
) -> judgement.Diagnostic:
    known = [other["mean"] for other in _reference(references, "D15") if other["mean"] is not None]
    return judgement.judge(
        "D15",
        _or_nan(found["mean"]),
        REFERENCE_FACTOR * max(known) if known else MAX_INSTABILITY,
        found["n"],
        "How much faint noise changes the loss. If it changes a lot, the loss is too noisy to "
        "follow.",
        bad="WARN",
    )


def _judge_results(found: Mapping[str, Any]) -> judgement.Diagnostic:
    return judgement.judge(
        "D16",
        found["num_contradictions"],
        0.0,
        found["n"],
        "Number of examples where an attack says that it misled the model, or that it did not, and "
        "a new pass shows otherwise. Its results cannot be trusted.",
    )


def _judge_late_rise(found: Mapping[str, Any]) -> judgement.Diagnostic:
    return judgement.judge(
        "D17",
        _or_nan(found["mean_rise"]),
        MAX_LATE_RISE,
        found["n"],
        f"Share of the rise of the loss in the last {found['last_steps']} of {found['num_steps']} "
        "steps. If it still rises, the attack was stopped too early.",
    )


def _judge_consistency(found: Mapping[str, Any]) -> judgement.Diagnostic:
    return judgement.worst(
        judgement.judge(
            "D22",
            _or_nan(found["max_difference"]),
            MAX_INCONSISTENCY,
            found["n"],
            "The output for an image should not depend on the pass or on the other images of the "
            "batch. If it does, the model draws at random or is in training mode.",
        ),
        judgement.judge(
            "D22",
            float(found["probabilities"]),
            0.0,
            found["n"],
            "Outputs look like probabilities, not like logits: a second softmax in the loss hides "
            "gradients. Attack the logits.",
        ),
    )


def _judge_saturation(found: Mapping[str, Any]) -> judgement.Diagnostic:
    return judgement.judge(
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


def judge_probes(
    probes: Mapping[str, Any] | None, references: Mapping[str, Mapping[str, Any]] | None
) -> Iterator[judgement.Diagnostic]:
    """Judges what was measured on the model.

    Args:
      probes: from ``probing.measure``; what is missing is NA.
      references: the same of models known to be sound, by name.
    """
    judges: dict[str, Callable[[Mapping[str, Any]], judgement.Diagnostic]] = {
        "D2": _judge_steps,
        "D7": _judge_draws,
        "D9": _judge_restarts,
        "D12": _judge_agreement,
        "D13": _judge_surface,
        "D14": _judge_missing_gradients,
        "D15": lambda found: _judge_stability(found, references),
        "D16": _judge_results,
        "D17": _judge_late_rise,
        "D22": _judge_consistency,
        "D23": _judge_saturation,
    }
    for identifier, judge in judges.items():
        found = (probes or {}).get(identifier)
        yield judge(found) if found else judgement.missing(identifier, "the model was not probed.")
