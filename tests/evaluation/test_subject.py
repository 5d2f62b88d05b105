"""Tests of classifiers that this project did not train: refusals, and what is flagged."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest

from gfa_jax import ThreatModel
from gfa_jax.evaluation import evaluate_model, records, subject

RNG = np.random.default_rng(0)
IMAGES = RNG.uniform(size=(12, 4, 4, 1)).astype(np.float32)
WEIGHTS = RNG.normal(size=(16, 3)).astype(np.float32)
THREAT = ThreatModel("linf", 0.05)


def linear(weights, inputs):
    return (inputs - 0.5).reshape(len(inputs), -1) @ weights


LABELS = np.argmax(linear(WEIGHTS, IMAGES), axis=1)


def test_a_function_is_tapped_at_its_input():
    model = subject.from_function(linear, IMAGES, LABELS, variables=WEIGHTS)
    logits, features = model.apply_features(model.variables, {}, IMAGES)
    np.testing.assert_allclose(logits, linear(WEIGHTS, IMAGES), rtol=1e-5)
    np.testing.assert_array_equal(features["input"], IMAGES)
    tapped, _ = model.apply_features(
        model.variables, {"input": 0.1 * jnp.ones(IMAGES.shape)}, IMAGES
    )
    np.testing.assert_allclose(tapped, linear(WEIGHTS, IMAGES + 0.1), rtol=1e-4, atol=1e-5)
    closed = subject.from_function(functools.partial(linear, WEIGHTS), IMAGES, LABELS)
    np.testing.assert_allclose(closed.apply_logits(closed.variables, IMAGES), logits, rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inputs": IMAGES * 255}, r"inputs hold values outside of \[0, 1\]"),
        ({"inputs": np.full_like(IMAGES, np.nan)}, r"outside of \[0, 1\], or NaN"),
        ({"inputs": IMAGES[..., 0]}, r"inputs have shape \(12, 4, 4\); expected images"),
        ({"labels": LABELS.astype(np.float32)}, "dtype float32; expected integers"),
        ({"labels": LABELS + 3}, r"labels must lie in \[0, num_classes\) = \[0, 3\)"),
        ({"labels": LABELS[:5]}, r"labels must be int32 of shape \(12,\)"),
        (
            {"logits_fn": lambda weights, inputs: linear(weights, inputs)[:, 0]},
            r"expected an array",
        ),
        ({"logits_fn": lambda weights, inputs: linear(weights, inputs)[:, :1]}, "with C >= 2"),
    ],
)
def test_what_does_not_fit_is_named(arguments, message):
    given = {"logits_fn": linear, "inputs": IMAGES, "labels": LABELS, "variables": WEIGHTS}
    with pytest.raises(ValueError, match=message):
        subject.from_function(**{**given, **arguments})


def test_bad_arguments_write_nothing(tmp_path):
    evaluate = functools.partial(evaluate_model, linear, IMAGES, LABELS, variables=WEIGHTS)
    for threat, options, message in (
        (ThreatModel("linf", 0.05, bounds=(-1.0, 1.0)), {}, "threat.bounds=.* must be"),
        (THREAT, {"attacks": "pdg"}, "attack='pdg'.*Did you mean 'pgd'"),
        (THREAT, {"batch_size": 0}, "batch_size=0"),
        (THREAT, {"mode": "both"}, "mode='both'"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(threat, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def run(out, logits_fn=linear, variables=WEIGHTS, threat=THREAT, **options):
    options = {"attacks": "apgd-t:num_steps=3,deepfool:num_steps=5", "batch_size": 12, **options}
    return evaluate_model(logits_fn, IMAGES, LABELS, threat, out, variables=variables, **options)


def test_three_classes_are_fewer_than_the_targets_asked_for(tmp_path):
    results = run(tmp_path, diagnostics="off")
    assert results["clean_accuracy"] == 1
    # Two other classes, three steps each: both are tried on what resists.
    outcomes = np.load(tmp_path / "outcomes.npz")
    assert results["counts"]["apgd-t:num_steps=3"]["num_backwards"] <= 12 * 2 * 4
    distances = outcomes["distance/deepfool:num_steps=5"]
    margins = np.sort(linear(WEIGHTS, IMAGES), axis=1)
    assert np.all(distances > 0)
    assert np.all(margins[:, 2] > margins[:, 1])


def test_other_weights_are_refused(tmp_path):
    run(tmp_path, diagnostics="off")
    with pytest.raises(records.RecordsMismatchError, match="weights_hash"):
        run(tmp_path, variables=WEIGHTS + 1, diagnostics="off")


def test_nan_is_never_right(tmp_path):
    def broken(weights, inputs):
        logits = linear(weights, inputs)
        return jnp.where(jnp.arange(len(inputs))[:, None] % 2 == 0, jnp.nan, logits)

    # An epsilon computed by JAX serves as well.
    threat = dataclasses.replace(THREAT, epsilon=jnp.float32(THREAT.epsilon))
    found = run(tmp_path, broken, threat=threat, diagnostics="off")
    assert found["clean_accuracy"] == 0.5
    assert found["threat"]["epsilon"] == pytest.approx(THREAT.epsilon)
