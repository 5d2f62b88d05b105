"""The first batch seen closely: features, directions, a plane of the loss, and images to show."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gfa_jax import data, norms
from gfa_jax.evaluation import geometry
from gfa_jax.evaluation.outcomes import Outcome
from gfa_jax.evaluation.subject import ApplyFeatures, Subject
from gfa_jax.threat import ThreatModel
from gfa_jax.types import Array, LogitsFn

LENGTHS = tuple(np.linspace(-0.5, 0.5, 21).round(3).tolist())
SURFACE_LENGTHS = tuple(np.linspace(-2.0, 2.0, 17).round(3).tolist())
"""In units of epsilon."""

_SHOWN_EXAMPLES = 8


def _measure_fn(
    apply_features: ApplyFeatures,
    threat: ThreatModel,
    layer: str,
    layer_norms: tuple[tuple[str, str], ...],
    shown_spec: str,
    variables: Any,
    batch: dict[str, Any],
    key: Array,
) -> dict[str, Any]:
    inputs, labels = data.to_float(batch["inputs"]), batch["labels"]
    apply_fn = functools.partial(apply_features, variables)
    return {
        "layers": geometry.layer_geometry(apply_fn, inputs, labels, dict(layer_norms)),
        "shares": {
            spec: geometry.tangential_shares(apply_fn, inputs, adv_inputs)
            for spec, adv_inputs in batch["adversarial"].items()
        },
        "directions": geometry.loss_along_directions(
            apply_fn,
            key,
            inputs,
            labels,
            layer=layer,
            lengths=jnp.asarray(LENGTHS, jnp.float32),
        ),
        "clean_predictions": jnp.argmax(apply_fn({}, inputs)[0], axis=1),
        "surface": _surface(
            threat,
            lambda x: apply_fn({}, x)[0],
            key,
            inputs,
            labels,
            batch["adversarial"][shown_spec],
        ),
    }


_measure = jax.jit(_measure_fn, static_argnums=(0, 1, 2, 3, 4))


def close_up(
    subject: Subject,
    threat: ThreatModel,
    key: Array,
    batch_size: int,
    outcomes: Mapping[str, Outcome],
    images: Mapping[str, np.ndarray],
) -> tuple[dict[str, Any], Outcome]:
    """Returns what the geometry of the first batch is, and a few of its examples to show.

    The geometry is alignment, radial degree, the radial and tangential shares of every attack's
    perturbations, and the loss along directions and over a plane.

    Args:
      subject: the classifier.
      threat: norm, box and radius.
      key: typed PRNG key of random directions.
      batch_size: examples on all devices at once, a multiple of their number.
      outcomes: of each attack, by its spec.
      images: that each attack ended at, ``[N, H, W, C]``.

    Returns:
      JSON-ready results, and arrays of the images to show.
    """
    shown_spec = max(outcomes, key=lambda spec: outcomes[spec]["success"].mean())
    layer = subject.layers[0]
    batch = next(iter(data.eval_batches(subject.test_set, batch_size)))
    mask = batch["mask"]
    size = int(mask.sum())

    def padded(values: np.ndarray) -> np.ndarray:
        return np.concatenate([values[:size], np.repeat(values[:1], len(mask) - size, axis=0)])

    given = {
        "inputs": batch["inputs"],
        "labels": batch["labels"],
        "adversarial": {spec: padded(values) for spec, values in images.items()},
    }
    measured = jax.device_get(
        _measure(
            subject.apply_features,
            threat,
            layer,
            tuple(sorted(subject.layer_norms.items())),
            shown_spec,
            subject.variables,
            subject.put(given),
            key,
        )
    )
    right = mask & (measured["clean_predictions"] == batch["labels"])
    attacked = {spec: right & padded(outcome["success"]) for spec, outcome in outcomes.items()}

    def share(spec: str, name: str) -> float | None:
        chosen = measured["shares"][spec][name][attacked[spec]]
        return float(chosen.mean()) if chosen.size else None

    layers = {
        name: {
            "alignment_mean": float(values["alignment"][mask].mean()),
            "radial_degree_median": _median(values["radial_degree"][mask]),
            "tangential_share_mean": share(shown_spec, name),
            "tangential_shares": {spec: share(spec, name) for spec in outcomes},
        }
        for name, values in sorted(measured["layers"].items(), key=lambda item: item[0] != layer)
    }
    results = {
        "geometry": {"num_examples": size, "attack": shown_spec},
        "layers": layers,
        "directions": {
            "layer": layer,
            "lengths": list(LENGTHS),
            "median_log_odds": {
                name: [_median(values) for values in curve[:, mask]]
                for name, curve in measured["directions"].items()
            },
        },
    }
    seen = attacked[shown_spec]
    if seen.any():
        results["loss_surface"] = {
            "lengths": list(SURFACE_LENGTHS),
            "unit": "epsilon",
            "axes": [f"along {shown_spec}", "random direction"],
            "num_examples": int(seen.sum()),
            "median_log_odds": [
                [_median(values) for values in row] for row in measured["surface"][..., seen]
            ],
        }
    rows = slice(0, min(_SHOWN_EXAMPLES, size))
    shown = {
        "clean": np.asarray(data.to_float(batch["inputs"]))[rows],
        "adversarial": images[shown_spec][rows],
        "success": outcomes[shown_spec]["success"][rows],
        "predictions": outcomes[shown_spec]["reached"][rows],
        "clean_predictions": measured["clean_predictions"][rows],
        "labels": batch["labels"][rows],
    }
    return results, shown


def _surface(
    threat: ThreatModel,
    logits_fn: LogitsFn,
    key: Array,
    inputs: Array,
    labels: Array,
    adv_inputs: Array,
) -> Array:
    """Returns the log-odds over the plane of an attack and of a random direction.

    Both have the threat norm epsilon; the plane of an example that the attack failed on means
    nothing.
    """
    change = adv_inputs - inputs
    length = norms.vector_norm(change, threat.norm)
    along = change / norms.expand(jnp.where(length > 0, length, 1), change)
    noise = jax.random.normal(key, inputs.shape, inputs.dtype)
    across = threat.steepest_step(inputs, noise)
    return geometry.loss_surface(
        logits_fn,
        inputs,
        labels,
        float(threat.epsilon) * along,
        float(threat.epsilon) * across,
        jnp.asarray(SURFACE_LENGTHS, jnp.float32),
        bounds=threat.bounds,
    )


def _median(values: np.ndarray) -> float | None:
    """Returns the median of the finite values; ``None`` without any, as in a dead network."""
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if finite.size else None
