"""Directions and shares against closed forms on a linear model; diagnostics on made-up numbers."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gfa_jax import losses
from gfa_jax.evaluation import diagnostics, geometry

WEIGHTS = jnp.array([[1.0, -1.0], [0.5, 2.0], [0.0, 1.0]])


def apply_fn(tap_values, inputs):
    shifted = inputs + tap_values.get("input", 0)
    return shifted @ WEIGHTS, {"input": shifted}


def test_directions_have_the_features_length_and_meet_at_zero(key):
    inputs, labels = jax.random.normal(jax.random.key(9), (5, 3)), jnp.array([0, 1, 0, 1, 0])
    lengths = jnp.array([-0.5, 0.0, 0.5])
    curves = geometry.loss_along_directions(
        apply_fn, key, inputs, labels, layer="input", lengths=lengths
    )
    clean = losses.log_odds(inputs @ WEIGHTS, labels)
    for curve in curves.values():
        chex.assert_trees_all_close(curve[1], clean, rtol=1e-5)
    for index, length in enumerate(lengths):
        expected = losses.log_odds((1 + length) * inputs @ WEIGHTS, labels)
        chex.assert_trees_all_close(curves["radial"][index], expected, rtol=1e-5, atol=1e-6)
    # With two classes the log-odds are linear: the tangential part of the gradient is the worst
    # tangential move.
    assert np.all(curves["worst_tangential"][2] >= curves["random_tangential"][2] - 1e-5)
    gradient = np.asarray(jax.grad(lambda x: losses.log_odds(x @ WEIGHTS, labels).sum())(inputs))
    unit = np.asarray(inputs) / np.linalg.norm(inputs, axis=1, keepdims=True)
    tangential = gradient - np.sum(gradient * unit, axis=1, keepdims=True) * unit
    rise = 0.5 * np.linalg.norm(inputs, axis=1) * np.linalg.norm(tangential, axis=1)
    chex.assert_trees_all_close(curves["worst_tangential"][2], clean + rise, rtol=1e-4)


def test_tangential_shares():
    inputs = jnp.array([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
    moved = inputs + jnp.array([[0.0, 1.0, 1.0], [0.0, -1.0, 0.0]])
    shares = geometry.tangential_shares(apply_fn, inputs, moved)
    chex.assert_trees_all_close(shares["input"], jnp.array([1.0, 0.0]), atol=1e-6)


def some_right(*accuracies):
    """Nested outcomes on 1000 examples: the first so many stay right."""
    return [np.arange(1000) < 1000 * accuracy for accuracy in accuracies]


def diagnose(robust, curve=((0.0, 0.9), (0.1, 0.3), (1.0, 0.0)), zero=0.0):
    outcomes = dict(zip(robust, some_right(*robust.values()), strict=True))
    found = diagnostics.diagnose(
        outcomes, curve=curve, curve_examples=500, box=1.0, zero_gradient_share=zero
    )
    return {entry["id"]: entry["status"] for entry in found}, diagnostics.masking_suspected(found)


def test_a_sound_evaluation_passes():
    statuses, suspected = diagnose({"fgsm": 0.5, "pgd": 0.4, "pgd-margin:num_steps=100": 0.396})
    assert set(statuses.values()) == {"PASS"}
    assert not suspected


def test_chance_differences_between_attacks_are_allowed_and_one_sided_ones_are_not():
    """Ten examples more either way: noise where 200 differ, a sign where only those ten do."""
    scattered = np.zeros(1000, bool), np.zeros(1000, bool)
    scattered[0][:105], scattered[1][105:200] = True, True
    nested = np.arange(1000) < 110, np.arange(1000) < 100
    for (pgd, fgsm), expected in ((scattered, "PASS"), (nested, "FAIL")):
        found = diagnostics.diagnose(
            {"pgd": pgd, "fgsm": fgsm},
            curve=[(0.0, 0.9), (1.0, 0.0)],
            curve_examples=500,
            box=1.0,
            zero_gradient_share=0.0,
        )
        assert found[0]["id"] == "D1"
        assert found[0]["value"] == pytest.approx(0.01)
        assert found[0]["status"] == expected


@pytest.mark.parametrize(
    ("arguments", "identifier", "status", "suspected"),
    [
        ({"robust": {"fgsm": 0.3, "pgd": 0.4, "pgd-margin": 0.4}}, "D1", "FAIL", True),
        ({"robust": {"fgsm": 0.3, "pgd-dlr": 0.4}}, "D1", "FAIL", True),
        ({"curve": ((0.0, 0.9), (0.1, 0.3), (0.2, 0.5), (1.0, 0.0))}, "D3", "FAIL", True),
        ({"curve": ((0.0, 0.9), (1.0, 0.01))}, "D4", "FAIL", True),
        ({"robust": {"fgsm": 0.6, "pgd": 0.5, "pgd-margin": 0.4}}, "D10", "WARN", False),
        ({"zero": 0.001}, "D11", "FAIL", False),
        ({"robust": {"fgsm": 0.6}}, "D10", "NA", False),
    ],
)
def test_each_sign_of_masking_is_seen(arguments, identifier, status, suspected):
    robust = {"fgsm": 0.5, "pgd": 0.4, "pgd-margin": 0.4}
    statuses, found = diagnose(**{"robust": robust, **arguments})
    assert statuses[identifier] == status
    assert found == suspected
