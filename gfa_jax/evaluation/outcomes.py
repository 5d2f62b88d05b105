"""What attacks did to each example, and what follows from it."""

import collections
from collections.abc import Mapping
from typing import Any

import numpy as np

from gfa_jax import data
from gfa_jax.evaluation.subject import Subject
from gfa_jax.threat import ThreatModel

Outcome = dict[str, np.ndarray]
"""What an attack did, by field of ``AttackResult``; ``attacked`` says to which examples, and
``reached`` and ``margin`` what the model says at the end."""

MEMBERS = "members/"
"""Before the name of an ensemble's member: which examples it broke, bool ``[N]``."""

_CDF_POINTS = 101
ROUNDING = 1e-5
"""How far beyond epsilon, as a share of it, float32 may end."""


def broken(outcome: Mapping[str, np.ndarray], epsilon: float, *, any_distance: bool) -> np.ndarray:
    """Returns what an attack broke within epsilon, bool ``[N]``.

    Args:
      outcome: of the attack.
      epsilon: the radius.
      any_distance: whether the attack succeeds at any distance, as minimum-norm attacks do.
    """
    return outcome["success"] & ((outcome["distance"] <= epsilon) | (not any_distance))


def verify(
    subject: Subject,
    threat: ThreatModel,
    batch_size: int,
    outcome: Mapping[str, np.ndarray],
    images: np.ndarray,
    *,
    any_distance: bool,
) -> dict[str, int]:
    """Looks at all successes once more, without the attack's own code, distances in float64.

    Args:
      subject: the classifier.
      threat: norm, box and radius.
      batch_size: examples on all devices at once, a multiple of their number.
      outcome: of the attack.
      images: that it ended at, ``[N, H, W, C]``.
      any_distance: as in ``broken``.

    Returns:
      ``num_successes``, and how many of them do not mislead the model, leave the box, or lie
      elsewhere than the attack says: none, if all is well.
    """
    rows = np.flatnonzero(outcome["success"])
    found = {"num_successes": len(rows), "not_misled": 0, "outside": 0, "other_distance": 0}
    if not len(rows):
        return found
    wrong, _, _ = subject.judge(images[rows], subject.test_set.labels[rows], batch_size)
    clean = np.asarray(data.to_float(subject.test_set.images[rows]))
    change = (images[rows].astype(np.float64) - clean).reshape(len(rows), -1)
    order = {"linf": np.inf, "l2": 2, "l1": 1}[threat.norm]
    size = np.linalg.norm(change, ord=order, axis=1)
    lower, upper = threat.bounds
    inside = np.all((images[rows] >= lower) & (images[rows] <= upper), axis=(1, 2, 3))
    if not any_distance:
        inside &= size <= float(threat.epsilon) * (1 + ROUNDING) + 1e-7
    found["not_misled"] = int(np.sum(~wrong))
    found["outside"] = int(np.sum(~inside))
    found["other_distance"] = int(
        np.sum(~np.isclose(size, outcome["distance"][rows], rtol=1e-4, atol=1e-6))
    )
    return found


def first_broken(broken: Mapping[str, np.ndarray], clean_correct: np.ndarray) -> np.ndarray:
    """Returns the number of the first attack that broke each example, int32 ``[N]``.

    It is -1 where none did, and -2 where the model was wrong without an attack.
    """
    first = np.full(len(clean_correct), -1, np.int32)
    for number, value in enumerate(broken.values()):
        first[(first == -1) & value] = number
    first[~clean_correct] = -2
    return first


def adversarial_images(
    first_broken: np.ndarray, outcomes: Mapping[str, Outcome], images: Mapping[str, np.ndarray]
) -> Outcome:
    """Returns the broken examples: rows, images, attacks and what these found and took."""
    rows = np.flatnonzero(first_broken >= 0)
    specs = list(outcomes)
    by_field: dict[str, list[Any]] = collections.defaultdict(list)
    for row in rows:
        spec = specs[first_broken[row]]
        by_field["images"].append(images[spec][row])
        for field in ("distance", "margin", "reached", "num_forwards", "num_backwards"):
            by_field[field].append(outcomes[spec][field][row])
    empty = {"images": next(iter(images.values()))[:0]}
    return {
        "rows": rows,
        "attack": first_broken[rows],
        "attacks": np.array(specs),
        **empty,
        **{field: np.stack(values) for field, values in by_field.items()},
    }


def minimum_norm(
    outcome: Mapping[str, np.ndarray], clean_correct: np.ndarray, norm: str
) -> dict[str, Any]:
    """Returns what a minimum-norm attack found for the inputs that are right without it.

    Failures count as infinite: the median is ``None`` where it is, and the last share of the CDF
    stays below 1.

    Args:
      outcome: ``success``, ``distance`` and ``attacked``, each ``[N]``.
      clean_correct: bool ``[N]``.
      norm: of the distances.
    """
    chosen = clean_correct & outcome["attacked"]
    success, distance = outcome["success"][chosen], outcome["distance"][chosen]
    median = float(np.median(np.where(success, distance, np.inf))) if success.size else np.inf
    found = np.sort(distance[success])
    shares = np.arange(1, len(found) + 1) / max(success.size, 1)
    kept = np.unique(np.linspace(0, len(found) - 1, _CDF_POINTS).round().astype(int))
    cdf = [[float(found[i]), float(shares[i])] for i in kept] if len(found) else []
    return {
        "norm": norm,
        "num_examples": int(success.size),
        "success_rate": float(success.mean()) if success.size else None,
        "median": median if np.isfinite(median) else None,
        "mean_of_successes": float(found.mean()) if len(found) else None,
        "cdf": cdf,
    }
