"""Tests of the diagnostics on made-up numbers."""

import numpy as np
import pytest

from gfa_jax.evaluation import diagnostics


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
    robust = {"fgsm": 0.5, "pgd": 0.4, "pgd-margin:num_steps=100": 0.396, "square": 0.55}
    statuses, suspected = diagnose(robust)
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
        ({"robust": {"fgsm": 0.3, "apgd-ce:num_steps=50": 0.4}}, "D1", "FAIL", True),
        ({"robust": {"apgd-ce": 0.5, "apgd-dlr": 0.4}}, "D10", "WARN", False),
        ({"robust": {"apgd-dlr": 0.4, "square:num_queries=9": 0.39}}, "D5", "FAIL", True),
        ({"robust": {"pgd": 0.4, "square": 0.6}}, "D5", "PASS", False),
        ({"robust": {"pgd": 0.4}}, "D5", "NA", False),
        ({"zero": 0.001}, "D11", "FAIL", False),
        ({"robust": {"fgsm": 0.6}}, "D10", "NA", False),
    ],
)
def test_each_sign_of_masking_is_seen(arguments, identifier, status, suspected):
    robust = {"fgsm": 0.5, "pgd": 0.4, "pgd-margin": 0.4}
    statuses, found = diagnose(**{"robust": robust, **arguments})
    assert statuses[identifier] == status
    assert found == suspected


@pytest.mark.parametrize(("num_alone", "status"), [(2, "PASS"), (10, "FAIL")])
def test_what_square_alone_breaks_counts_though_it_is_the_weaker_attack(num_alone, status):
    square = np.arange(1000) < 700
    square[:num_alone] = False
    found = diagnostics.diagnose(
        {"apgd-t": np.arange(1000) < 400, "square": square},
        curve=[(0.0, 0.9), (1.0, 0.0)],
        curve_examples=500,
        box=1.0,
        zero_gradient_share=0.0,
    )
    (entry,) = [entry for entry in found if entry["id"] == "D5"]
    assert entry["value"] == pytest.approx(num_alone / 1000)
    assert entry["status"] == status
