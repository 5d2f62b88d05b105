"""Looks for signs that gradients are masked: measures, and has the numbers judged."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gfa_jax import attacks, data
from gfa_jax.evaluation import binarization, diagnostics, judgement, probing
from gfa_jax.evaluation.outcomes import MEMBERS, Outcome
from gfa_jax.evaluation.references import Reference
from gfa_jax.evaluation.subject import INPUT, Subject, box_radius
from gfa_jax.threat import ThreatModel
from gfa_jax.training import layout
from gfa_jax.training.progress import Progress
from gfa_jax.types import Array

LEVELS = ("off", "quick", "full")
"""How long to look."""

_PROBED = {"quick": 500, "full": 1000}
_PLANTED = {"quick": 64, "full": 512}
_MAX_FEATURES = 1024


def diagnose(
    subject: Subject,
    threat: ThreatModel,
    key: Array,
    batch_size: int,
    built: Mapping[str, attacks.Attack | attacks.Ensemble],
    robust: Mapping[str, np.ndarray],
    outcomes: Mapping[str, Outcome],
    clean_correct: np.ndarray,
    curves: list[dict[str, Any]],
    worst: np.ndarray,
    level: str,
    others: Sequence[Reference] = (),
) -> tuple[list[judgement.Diagnostic], dict[str, Any]]:
    """Returns the judged diagnostics, and what was probed for them, JSON-ready.

    Args:
      subject: the classifier.
      threat: norm, box and radius.
      key: typed PRNG key of all draws.
      batch_size: examples on all devices at once, a multiple of their number.
      built: attacks by their spec.
      robust: what stayed right under each, bool ``[N]``; empty where attacks do not compare.
      outcomes: of each attack.
      clean_correct: bool ``[N]``.
      curves: from ``curves.accuracy_curves``.
      worst: what stayed right under all attacks, bool ``[N]``.
      level: one of ``LEVELS``.
      others: evaluations of other models.
    """
    probed: dict[str, Any] = {}
    if level != "off":
        probed["probes"] = _probe(subject, threat, key, batch_size, level, worst)
        probed["binarization"] = _plant(subject, key, built, level)
    judged = diagnostics.diagnose(
        robust,
        curves={
            curve["attack"]: [(point["epsilon"], point["accuracy"]) for point in curve["points"]]
            for curve in curves
        },
        curve_examples=curves[0]["num_examples"],
        box=box_radius(threat.norm, threat.bounds, subject.test_set.image_shape),
        epsilon=float(threat.epsilon),
        norm=threat.norm,
        zero_gradient_share=zero_gradient_share(outcomes),
        black_box=_broken_by_square_at_last(built, outcomes),
        num_classes=subject.test_set.num_classes,
        minimum_norms={
            spec: (outcome["success"], outcome["distance"], clean_correct)
            for spec, outcome in outcomes.items()
            if spec in built and built[spec].keep == "closest" and outcome["attacked"].all()
        },
        transfer={other.name: robust[other.spec] for other in others if other.spec in robust},
        references={other.name: other.probes for other in others},
        reference_accuracies={
            other.name: other.worst_case for other in others if other.worst_case is not None
        },
        **probed,
    )
    return judged, probed


def zero_gradient_share(outcomes: Mapping[str, Outcome]) -> float:
    """Returns the share of gradients that were exactly zero where the attack failed.

    Where it succeeded they say nothing: losses may be flat at points that are wrong already, as the
    DLR is where the true class comes third.

    Args:
      outcomes: of each attack, with ``success``, ``num_zero_gradients`` and ``num_backwards``.
    """
    zero, total = (
        sum(int(outcome[field][~outcome["success"]].sum()) for outcome in outcomes.values())
        for field in ("num_zero_gradients", "num_backwards")
    )
    return zero / max(total, 1)


def _broken_by_square_at_last(
    built: Mapping[str, attacks.Attack | attacks.Ensemble], outcomes: Mapping[str, Outcome]
) -> list[np.ndarray]:
    """Returns what Square broke, bool ``[N]``, of each ensemble that ends with it."""
    found = []
    for spec, attack in built.items():
        if isinstance(attack, attacks.Ensemble):
            *before, last = attack.members
            if before and last == "square":
                found.append(outcomes[spec][f"{MEMBERS}square"])
    return found


def _probe(
    subject: Subject,
    threat: ThreatModel,
    key: Array,
    batch_size: int,
    level: str,
    worst: np.ndarray,
) -> dict[str, Any]:
    size = min(len(worst), _PROBED[level])
    inputs = np.asarray(data.to_float(subject.test_set.images[:size]))
    progress = Progress("signs of masked gradients", 1)
    try:
        return probing.measure(
            jax.tree_util.Partial(subject.apply_logits, subject.variables),
            attacks.example_keys(key, jnp.asarray(subject.test_set.ids[:size])),
            inputs,
            subject.test_set.labels[:size],
            threat,
            level=level,
            survived=worst[:size],
            batch_size=batch_size,
            sharding=layout.split(subject.mesh),
        )
    finally:
        progress.close()


def _plant(
    subject: Subject, key: Array, built: Mapping[str, attacks.Attack | attacks.Ensemble], level: str
) -> dict[str, Any] | None:
    """Makes the binarisation test of the first gradient attack inside the ball."""
    parts = ((spec, part) for spec, attack in built.items() for part in attack.parts().values())
    suited = [
        (spec, part)
        for spec, part in parts
        if part.keep == "best"
        and not part.estimator.needs_features
        and spec.split(":")[0] not in ("fgsm", "square")
    ]
    if not suited:
        return None
    spec, attack = suited[0]
    size = min(len(subject.test_set), _PLANTED[level])
    is_opaque = subject.layers == (INPUT,)
    keys = attacks.example_keys(key, jnp.asarray(subject.test_set.ids[:size]))
    inputs = data.to_float(subject.test_set.images[:size])
    planted = _planted(
        subject.apply_logits if is_opaque else subject.apply_features,
        is_opaque,
        attack,
        subject.variables,
        inputs,
        keys,
    )
    return {**binarization.summary(jax.device_get(planted)), "attack": spec}


def _planted_fn(
    apply: Callable[..., Any],
    is_opaque: bool,
    attack: attacks.Attack,
    variables: Any,
    inputs: Array,
    keys: Array,
) -> binarization.BinarizationResult:
    def features_fn(inputs: Array) -> Array:
        if is_opaque:
            logits: Array = apply(variables, inputs)
            return logits
        # In the order of the forward pass: the last is what the head sees.
        feature = [*apply(variables, {}, inputs)[1].values()][-1]
        if feature.ndim == 4 and feature[0].size > _MAX_FEATURES:
            feature = feature.mean(axis=(1, 2))
        return feature.reshape(len(feature), -1)

    return binarization.binarization_test(features_fn, attack, keys, inputs)


_planted = jax.jit(_planted_fn, static_argnums=(0, 1, 2))
