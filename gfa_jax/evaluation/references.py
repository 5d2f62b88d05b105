"""Evaluations of other models on the same images, as a yardstick for one.

Their adversarial images are tried on the model under evaluation, as one more attack that no
gradient of it can mislead. What was probed on them says what is usual, and the accuracy that is
left of an undefended one whether the attacks work at all.
"""

import io
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from gfa_jax import data, files
from gfa_jax.evaluation.outcomes import ROUNDING, Outcome
from gfa_jax.evaluation.subject import Subject, hash_examples
from gfa_jax.threat import ThreatModel


class Reference(NamedTuple):
    """Another model's evaluation.

    Attributes:
      name: of its run.
      rows: the examples that were broken, int ``[K]``.
      images: their adversarial images, ``[K, H, W, C]``.
      worst_case: the accuracy that its attacks left, or ``None`` where its radius is another.
      probes: of ``probing.measure``; empty where its diagnostics were off.
    """

    name: str
    rows: np.ndarray
    images: np.ndarray
    worst_case: float | None
    probes: Mapping[str, Any]

    @property
    def spec(self) -> str:
        """Returns what its images are called among the attacks."""
        return f"transfer:{self.name}"


def load(
    directories: Sequence[str | pathlib.Path], subject: Subject, threat: ThreatModel
) -> tuple[Reference, ...]:
    """Reads evaluations of other models.

    Args:
      directories: output folders of ``eval.py``.
      subject: the classifier under evaluation, which gives the examples.
      threat: its threat model.

    Raises:
      FileNotFoundError: for a folder without results.
      ValueError: for damaged or older results, those of other images or another norm, or two of
        one name.
    """
    found: dict[str, Reference] = {}
    for directory in map(pathlib.Path, directories):
        for name in ("results.json", "adversarial.npz"):
            if not (directory / name).is_file():
                raise FileNotFoundError(
                    f"references: {str(directory)!r} holds no {name}; expected the output folder "
                    "of an evaluation."
                )
        results, rows, images = _read(directory)
        if results["threat"]["norm"] != threat.norm:
            raise ValueError(
                f"references: {str(directory)!r} was evaluated in {results['threat']['norm']}; "
                f"expected {threat.norm}."
            )
        if results["data"].get("hash") != hash_examples(subject.test_set):
            raise ValueError(
                f"references: {str(directory)!r} was evaluated on other examples: evaluate both on "
                "the same data set with the same num_examples."
            )
        name = str(results["name"])
        if name in found:
            raise ValueError(f"references: two of the evaluations are of a run named {name!r}.")
        same_radius = np.isclose(results["threat"]["epsilon"], float(threat.epsilon), rtol=1e-6)
        found[name] = Reference(
            name,
            rows,
            images,
            results["robust_accuracy"]["worst_case"] if same_radius else None,
            results.get("probes") or {},
        )
    return tuple(found.values())


def _read(directory: pathlib.Path) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """Returns an evaluation's results, the rows it broke, and their images."""
    try:
        results = files.read_json(directory / "results.json")
        missing = {"name", "threat", "data", "robust_accuracy"} - set(results)
        # Through memory: NumPy leaves a damaged file open.
        content = io.BytesIO((directory / "adversarial.npz").read_bytes())
        with np.load(content, allow_pickle=False) as stored:
            rows, images = stored["rows"], stored["images"]
    except Exception as error:  # whatever JSON, ZIP and NumPy raise for damage
        raise ValueError(
            f"references: the results in {str(directory)!r} are damaged: evaluate that model again "
            "in another --out folder."
        ) from error
    if missing:
        raise ValueError(
            f"references: the results in {str(directory)!r} lack {', '.join(sorted(missing))}: "
            "they were written by an older version. Evaluate that model again."
        )
    return results, rows, images


def transfer(
    reference: Reference,
    subject: Subject,
    threat: ThreatModel,
    batch_size: int,
    rest: np.ndarray,
) -> tuple[Outcome, np.ndarray]:
    """Tries another model's adversarial images.

    Args:
      reference: the other model's evaluation.
      subject: the classifier under evaluation.
      threat: its threat model; images outside of the ball do not count.
      batch_size: examples on all devices at once, a multiple of their number.
      rest: bool ``[N]``, the examples to try.

    Returns:
      ``(outcome, images [N, H, W, C])`` as those of an attack that took no gradients and one
      query for each image that it tried; elsewhere the images are clean.
    """
    clean = np.asarray(data.to_float(subject.test_set.images))
    tried = np.zeros(len(clean), bool)
    tried[reference.rows] = True
    tried &= rest
    images = clean.copy()
    images[reference.rows] = reference.images
    distance = np.asarray(threat.distance(jnp.asarray(clean), jnp.asarray(images)), np.float32)
    tried &= distance <= float(threat.epsilon) * (1 + ROUNDING)
    images[~tried] = clean[~tried]
    wrong, reached, margin = subject.judge(images, subject.test_set.labels, batch_size)
    none = np.zeros(len(clean), np.int32)
    outcome = {
        "ids": subject.test_set.ids,
        "labels": subject.test_set.labels,
        "attacked": rest,
        "success": wrong & rest,
        "distance": np.where(tried, distance, 0).astype(np.float32),
        "loss": margin,
        "margin": margin,
        "reached": reached,
        "num_forwards": tried.astype(np.int32),
        "num_backwards": none,
        "num_zero_gradients": none,
    }
    return outcome, images
