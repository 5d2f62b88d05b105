"""Accuracy against the radius of an attack, from nothing to the whole box."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gfa_jax import attacks, data
from gfa_jax.evaluation.subject import Subject, box_radius
from gfa_jax.threat import ThreatModel
from gfa_jax.training.progress import Progress
from gfa_jax.types import Array

Options = tuple[tuple[str, Any], ...]

CURVES: dict[str, tuple[str, Options]] = {
    "apgd-ce:loss=margin:num_steps=20": ("apgd-ce", (("loss", "margin"), ("num_steps", 20))),
    "square:num_queries=200": ("square", (("num_queries", 200),)),
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
        for text in CURVES:
            points = []
            for epsilon in epsilons:
                parts = [
                    np.asarray(
                        _resist(
                            CURVES[text],
                            subject.apply_logits,
                            threat,
                            jnp.float32(epsilon),
                            key,
                            subject.variables,
                            subject.put(batch),
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


def _resist_fn(
    curve: tuple[str, Options],
    apply_logits: Callable[[Any, Array], Array],
    threat: ThreatModel,
    epsilon: Array,
    key: Array,
    variables: Any,
    batch: dict[str, Array],
) -> Array:
    """Returns which examples of a batch stay right within epsilon, bool ``[B]``."""
    name, options = curve
    attack = attacks.create(name, dataclasses.replace(threat, epsilon=epsilon), **dict(options))
    keys = attacks.example_keys(key, batch["ids"])
    inputs = data.to_float(batch["inputs"])
    logits_fn = functools.partial(apply_logits, variables)
    return ~attack(logits_fn, keys, inputs, batch["labels"]).success


_resist = jax.jit(_resist_fn, static_argnums=(0, 1, 2))
