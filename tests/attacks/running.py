"""Runs attacks in tests: one compilation serves all radii, scales of the logits and inputs."""

import functools

import jax
import numpy as np

from gfa_jax import ThreatModel
from tests.attacks import toy

NORMS = ("linf", "l2", "l1")
ORDERS = {"linf": np.inf, "l2": 2, "l1": 1}


@functools.partial(jax.jit, static_argnames=("factory", "norm", "options", "logits_fn"))
def _run(factory, norm, options, logits_fn, epsilon, scale, keys, inputs, labels, extra):
    attack = factory(ThreatModel(norm, epsilon), **dict(options))
    return attack(lambda points: scale * logits_fn(points), keys, inputs, labels, **extra)


def run(
    factory,
    norm,
    epsilon,
    *,
    logits_fn=toy.logits_fn,
    scale=1.0,
    keys=toy.KEYS,
    inputs=toy.INPUTS,
    labels=toy.LABELS,
    extra=None,
    **options,
):
    """Attacks ``scale * logits_fn``; ``extra`` holds targets, start, active and run."""
    options = tuple(sorted(options.items()))
    data = (epsilon, scale, keys, inputs, labels, extra or {})
    return jax.device_get(_run(factory, norm, options, logits_fn, *data))


def sizes(perturbations, norm):
    """The norms of perturbations, in float64."""
    flat = np.asarray(perturbations, np.float64).reshape(len(perturbations), -1)
    return np.linalg.norm(flat, ord=ORDERS[norm], axis=1)


def rows(result, indices):
    """Some examples of a result."""
    return jax.tree.map(lambda field: field[indices], result)


def assert_same(left, right, rtol=1e-5, atol=1e-5):
    for name in set(left._fields) - {"members"}:
        one, other = getattr(left, name), getattr(right, name)
        np.testing.assert_allclose(one, other, rtol=rtol, atol=atol, err_msg=name)


def assert_allowed(result, norm, epsilon, inputs=toy.INPUTS):
    """Inside box and ball up to the rounding of ``inputs + perturbation``; no NaN."""
    adv_inputs = np.asarray(result.adv_inputs)
    assert np.all(np.isfinite(adv_inputs))
    assert np.all(np.isfinite(result.loss))
    assert adv_inputs.min() >= 0
    assert adv_inputs.max() <= 1
    num_coordinates = inputs[0].size
    slack = {"linf": 1, "l2": num_coordinates**0.5, "l1": num_coordinates}[norm] * 6e-8
    measured = sizes(adv_inputs.astype(np.float64) - inputs, norm)
    assert np.all(measured <= epsilon * (1 + 1e-6) + slack)
    np.testing.assert_allclose(result.distance, measured, rtol=1e-5, atol=1e-7)


def assert_judged(result, logits_fn, labels, inputs=toy.INPUTS):
    """Success is what the model says of the returned points; failures come back clean."""
    logits = np.asarray(logits_fn(result.adv_inputs))
    lead = np.max(np.where(np.arange(logits.shape[1]) == labels[:, None], -np.inf, logits), axis=1)
    lead = lead - logits[np.arange(len(labels)), labels]
    # At a tie, programs that round differently may disagree.
    clear = np.abs(lead) > 1e-6 * np.abs(logits).max()
    np.testing.assert_array_equal(result.success[clear], lead[clear] > 0)
    failed = ~result.success
    np.testing.assert_array_equal(result.adv_inputs[failed], np.asarray(inputs)[failed])
