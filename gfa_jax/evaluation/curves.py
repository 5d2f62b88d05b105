"""Accuracy against the radius of an attack, from nothing to the whole box."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gfa_jax import attacks, data
from gfa_jax.evaluation.subject import Subject, box_radius
from gfa_jax.threat import ThreatModel
from gfa_jax.training.progress import Progress
from gfa_jax.types import Array

CURVES: dict[str, tuple[str, dict[str, Any]]] = {
    "apgd-ce:loss=margin:num_steps=20": ("apgd-ce", {"loss": "margin", "num_steps": 20}),
    "square:num_queries=200": ("square", {"num_queries": 200}),
}
"""The attacks of the accuracy curves, with a gradient and without."""

CURVE_FACTORS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
_CURVE_EXAMPLES = 500


def accuracy_curves(
    subject: Subject, threat: ThreatModel, key: Array, batch_size: int
) -> list[dict[str, Any]]:
    """Returns accuracy against epsilon, at radii that include the one that frees the whole box.

    One compilation for each attack serves all radii.

    Args:
      subject: the classifier; its first 500 examples are attacked.
      threat: norm, box, and the radius that the others are multiples of.
      key: typed PRNG key of the attacks' draws.
      batch_size: examples on all devices at once, a multiple of their number.

    Returns:
      For each of ``CURVES``, ``attack``, ``num_examples`` and ``points`` of ``epsilon`` and
      ``accuracy``, epsilon rising.
    """
    box = box_radius(threat.norm, threat.bounds, subject.test_set.image_shape)
    factors = {factor * float(threat.epsilon) for factor in CURVE_FACTORS}
    epsilons = sorted({*factors, box / 2, box})
    test_set = subject.test_set.take(_CURVE_EXAMPLES)
    progress = Progress("accuracy against epsilon", len(CURVES) * len(epsilons))
    curves: list[dict[str, Any]] = []
    try:
        for text, (name, options) in CURVES.items():

            @jax.jit
            def resist(
                variables: Any,
                batch: dict[str, Array],
                epsilon: Array,
                name: str = name,
                options: dict[str, Any] = options,
            ) -> Array:
                ball = dataclasses.replace(threat, epsilon=epsilon)
                attack = attacks.create(name, ball, **options)
                keys = attacks.example_keys(key, batch["ids"])
                logits_fn = functools.partial(subject.apply_logits, variables)
                inputs = data.to_float(batch["inputs"])
                return ~attack(logits_fn, keys, inputs, batch["labels"]).success

            points = []
            for epsilon in epsilons:
                parts = [
                    np.asarray(
                        resist(
                            subject.variables,
                            subject.put(batch),
                            jnp.float32(epsilon),
                        )
                    )[batch["mask"]]
                    for batch in data.eval_batches(test_set, batch_size)
                ]
                accuracy = float(np.concatenate(parts).mean())
                points.append({"epsilon": epsilon, "accuracy": accuracy})
                progress.update(len(curves) * len(epsilons) + len(points))
            curves.append({"attack": text, "num_examples": len(test_set), "points": points})
    finally:
        progress.close()
    return curves
