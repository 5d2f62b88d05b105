"""Tests of the diagnostics on made-up numbers."""

import math

import numpy as np
import pytest

from gfa_jax.evaluation import diagnostics, judgement


def some_right(*accuracies):
    """Nested outcomes on 1000 examples: the first so many stay right."""
    return [np.arange(1000) < 1000 * accuracy for accuracy in accuracies]


ROBUST = {"fgsm": 0.5, "pgd": 0.4, "pgd-margin": 0.4, "square": 0.55}
CURVES = {"pgd-margin": ((0.0, 0.9), (0.1, 0.3), (0.5, 0.1), (1.0, 0.0))}
PROBES = {
    "D2": {"n": 500, "counts": [10, 20], "accuracy": [0.4, 0.396], "num_differing": [2]},
    "D6": {
        "n": 100,
        "num_directions": 10,
        "num_survivors": 40,
        "num_within": 0,
        "distances": [0.5] * 99 + [None],
    },
    "D7": {"n": 100, "num_draws": 1000, "num_broken": 0, "first": []},
    "D9": {"n": 500, "counts": [1, 5], "accuracy": [0.4, 0.398], "num_differing": [1]},
    "D10": {
        "n": 500,
        "temperature": 3.0,
        "num_steps": 20,
        "accuracy": [0.4, 0.398],
        "num_differing": 1,
    },
    "D11": {"n": 500, "median_gradient": {"clean": 1.0}},
    "D12": {
        "n": 500,
        "median_cosine": [0.9, 0.7, 0.5],
        "median_error": {"gradient": [0.01, 0.02], "random": [0.05, 0.03]},
    },
    "D13": {"n": 500, "median": 0.1, "num_steps": 50, "falling_share": 0.02},
    "D14": {"n": 500, "zero_share": 0.0, "operations": []},
    "D15": {"n": 500, "mean": 0.1},
    "D16": {"n": 500, "num_contradictions": 0},
    "D17": {"n": 500, "num_steps": 50, "last_steps": 10, "mean_rise": 0.01},
    "D22": {"n": 64, "max_difference": 1e-6, "probabilities": False},
    "D23": {"n": 500, "saturated_share": 0.0},
}


def nearest(success=True, distance=0.3):
    """What a minimum-norm attack found for 1000 examples, the first of which is special."""
    distances = np.full(1000, 0.3)
    distances[0] = distance
    successes = np.ones(1000, bool)
    successes[0] = success
    return successes, distances, np.ones(1000, bool)


def diagnose(robust=ROBUST, **changes):
    outcomes = dict(zip(robust, some_right(*robust.values()), strict=True))
    options = {
        "curves": CURVES,
        "curve_examples": 500,
        "box": 1.0,
        "epsilon": 0.1,
        "zero_gradient_share": 0.0,
        "num_classes": 10,
        "probes": PROBES,
        "binarization": {"asr": 0.99, "r_asr": 0.02, "n": 512},
        "minimum_norms": {"fab": nearest()},
        "transfer": {"plain": some_right(0.7)[0]},
        "references": {"plain": PROBES},
    }
    found = diagnostics.diagnose(outcomes, **{**options, **changes})
    return {entry["id"]: entry for entry in found}, diagnostics.masking_suspected(found)


@pytest.mark.parametrize(
    ("robust", "broken", "value", "status"),
    [
        # AutoAttack's Square alone; beside gradient attacks, what these break does not count.
        ({"autoattack": 0.3}, [(300, 301)], 0.001, "PASS"),
        ({"autoattack": 0.3}, [(300, 310)], 0.01, "FAIL"),
        ({"autoattack": 0.3}, [(300, 310), (305, 320)], 0.02, "FAIL"),
        ({"autoattack": 0.3, "pgd": 0.305}, [(300, 310)], 0.005, "FAIL"),
        ({"pgd": 0.5, "square": 0.45}, [], 0.05, "FAIL"),
        ({"pgd": 0.5, "square": 0.45}, [(440, 445)], 0.055, "FAIL"),
        ({"autoattack": 0.3}, [], None, "NA"),
        ({"square": 0.3}, [], None, "NA"),
    ],
)
def test_square_is_compared_alone_and_within_ensembles(robust, broken, value, status):
    number = np.arange(1000)
    black_box = [(number >= low) & (number < high) for low, high in broken]
    found, _ = diagnose(robust, minimum_norms={}, black_box=black_box)
    assert found["D5"]["status"] == status
    assert found["D5"]["value"] == (None if value is None else pytest.approx(value))


def test_a_sound_evaluation_passes():
    entries, suspected = diagnose()
    assert list(entries) == list(judgement.NAMES)
    statuses = {identifier: entry["status"] for identifier, entry in entries.items()}
    missing = {identifier for identifier, status in statuses.items() if status == "NA"}
    assert missing == {"D18", "D24"}
    assert {statuses[identifier] for identifier in set(statuses) - missing} == {"PASS"}
    assert not suspected
    for entry in entries.values():
        assert set(entry) == {"id", "name", "value", "threshold", "status", "n", "meaning"}
        assert entry["status"] == "NA" or entry["n"] > 0


def test_what_is_not_given_is_not_judged():
    found = diagnostics.diagnose({})
    assert [entry["id"] for entry in found] == list(judgement.NAMES)
    assert {entry["status"] for entry in found} == {"NA"}
    assert not diagnostics.masking_suspected(found)


def test_chance_differences_between_attacks_are_allowed_and_one_sided_ones_are_not():
    """Ten examples more either way: noise where 200 differ, a sign where only those ten do."""
    scattered = np.zeros(1000, bool), np.zeros(1000, bool)
    scattered[0][:105], scattered[1][105:200] = True, True
    nested = np.arange(1000) < 110, np.arange(1000) < 100
    for (pgd, fgsm), expected in ((scattered, "PASS"), (nested, "FAIL")):
        found = diagnostics.diagnose({"pgd": pgd, "fgsm": fgsm})
        assert found[0]["id"] == "D1"
        assert found[0]["value"] == pytest.approx(0.01)
        assert found[0]["status"] == expected


def probed(identifier, **changes):
    return {"probes": {**PROBES, identifier: {**PROBES[identifier], **changes}}}


def curve(*points):
    return {"curves": {**CURVES, "pgd": points}}


@pytest.mark.parametrize(
    ("changes", "identifier", "status", "suspected"),
    [
        ({"robust": {"fgsm": 0.3, "pgd": 0.4, "pgd-margin": 0.4}}, "D1", "FAIL", True),
        ({"robust": {"fgsm": 0.3, "pgd-dlr": 0.4}}, "D1", "FAIL", True),
        ({"robust": {"fgsm": 0.3, "apgd-ce:num_steps=50": 0.4}}, "D1", "FAIL", True),
        (
            probed("D2", accuracy=[0.4, 0.37], num_differing=[15]),
            "D2",
            "FAIL",
            False,
        ),
        (probed("D2", accuracy=[0.4, 0.43], num_differing=[15]), "D2", "FAIL", False),
        (probed("D2", accuracy=[0.4, 0.42], num_differing=[100]), "D2", "PASS", False),
        (curve((0.0, 0.9), (0.1, 0.3), (0.2, 0.5), (1.0, 0.0)), "D3", "FAIL", True),
        (curve((0.0, 0.9), (1.0, 0.01)), "D4", "FAIL", True),
        (curve((0.0, 0.9), (0.5, 0.12), (1.0, 0.0)), "D4", "PASS", False),
        (curve((0.0, 0.9), (0.5, 0.2), (1.0, 0.0)), "D4", "FAIL", True),
        ({"minimum_norms": {"fab": nearest(success=False)}}, "D4", "WARN", False),
        ({"robust": {"apgd-dlr": 0.4, "square:num_queries=9": 0.39}}, "D5", "FAIL", True),
        ({"robust": {"pgd": 0.4, "square": 0.6}}, "D5", "PASS", False),
        ({"robust": {"pgd": 0.4}}, "D5", "NA", False),
        (probed("D6", num_within=1), "D6", "FAIL", True),
        (probed("D6", distances=[0.2] * 5 + [0.5] * 95), "D6", "PASS", False),
        (probed("D6", distances=[0.2] * 6 + [0.5] * 94), "D6", "FAIL", True),
        # Without an attack for the smallest norm, the examples that resisted are looked at alone.
        ({**probed("D6", distances=[0.2] * 100), "minimum_norms": {}}, "D6", "PASS", False),
        ({**probed("D6", num_survivors=0), "minimum_norms": {}}, "D6", "NA", False),
        (probed("D6", num_survivors=0), "D6", "PASS", False),
        # One that makes another norm small may well be beaten in this one.
        (
            {
                **probed("D6", distances=[0.2] * 100),
                "minimum_norms": {"cw:num_steps=9": nearest(), "ead-l1": nearest()},
                "norm": "linf",
            },
            "D6",
            "PASS",
            False,
        ),
        (
            {
                **probed("D6", distances=[0.2] * 100),
                "minimum_norms": {"cw:num_steps=9": nearest(), "ead-l1": nearest()},
                "norm": "l2",
            },
            "D6",
            "FAIL",
            True,
        ),
        (probed("D7", num_broken=1), "D7", "FAIL", True),
        (probed("D7", n=0), "D7", "NA", False),
        ({"transfer": {"plain": some_right(0.3)[0]}}, "D8", "FAIL", False),
        ({"transfer": None}, "D8", "NA", False),
        (probed("D9", accuracy=[0.4, 0.37], num_differing=[15]), "D9", "WARN", False),
        (
            probed("D9", counts=[5, 20], accuracy=[0.4, 0.37], num_differing=[15]),
            "D9",
            "FAIL",
            False,
        ),
        ({"robust": {"fgsm": 0.6, "pgd": 0.5, "pgd-margin": 0.4}}, "D10", "WARN", False),
        ({"robust": {"apgd-ce": 0.5, "apgd-dlr": 0.4}}, "D10", "WARN", False),
        ({"robust": {"fgsm": 0.6}}, "D10", "PASS", False),
        ({"robust": {"fgsm": 0.6}, "probes": None}, "D10", "NA", False),
        (probed("D10", accuracy=[0.4, 0.37], num_differing=15), "D10", "WARN", False),
        (probed("D10", accuracy=[0.4, 0.37], num_differing=100), "D10", "PASS", False),
        (probed("D10", accuracy=[0.37, 0.4], num_differing=15), "D10", "PASS", False),
        ({"zero_gradient_share": 0.001}, "D11", "FAIL", False),
        (probed("D11", median_gradient={"clean": 1e-4}), "D11", "WARN", False),
        (probed("D12", median_cosine=[0.05, 0.0, 0.0]), "D12", "FAIL", False),
        (probed("D12", median_error={"gradient": [0.1], "random": [0.6]}), "D12", "FAIL", False),
        (probed("D12", median_error={"gradient": [0.1, None]}), "D12", "FAIL", False),
        (probed("D13", median=0.6), "D13", "WARN", False),
        (probed("D13", falling_share=0.11), "D13", "WARN", False),
        (probed("D13", falling_share=None), "D13", "WARN", False),
        (probed("D14", zero_share=0.01), "D14", "FAIL", True),
        (probed("D14", operations=["round"]), "D14", "FAIL", True),
        (probed("D15", mean=0.3), "D15", "WARN", False),
        ({**probed("D15", mean=0.3), "references": None}, "D15", "PASS", False),
        ({**probed("D15", mean=0.6), "references": None}, "D15", "WARN", False),
        (probed("D16", num_contradictions=1), "D16", "FAIL", False),
        (probed("D17", mean_rise=0.06), "D17", "FAIL", False),
        ({"curves": {"pgd": [(0.0, 0.9), (1.0, 0.002)]}}, "D19", "FAIL", True),
        # Another attack breaks what this one leaves.
        (curve((0.0, 0.9), (1.0, 0.002)), "D19", "PASS", False),
        ({"binarization": {"asr": 0.9, "r_asr": 0.0, "n": 512}}, "D20", "FAIL", True),
        ({"binarization": {"asr": 1.0, "r_asr": 0.7, "n": 512}}, "D20", "WARN", False),
        ({"binarization": {"asr": None, "r_asr": None, "n": 0}}, "D20", "NA", False),
        ({"minimum_norms": {"fab": nearest(distance=0.05)}}, "D21", "WARN", False),
        ({"minimum_norms": {"fab": nearest(False, 0.05)}}, "D21", "PASS", False),
        (probed("D22", max_difference=1e-3), "D22", "FAIL", False),
        (probed("D22", max_difference=None), "D22", "FAIL", False),
        (probed("D22", probabilities=True), "D22", "FAIL", False),
        (probed("D23", saturated_share=0.1), "D23", "WARN", False),
    ],
)
def test_each_sign_of_masking_is_seen(changes, identifier, status, suspected):
    entries, found = diagnose(**changes)
    assert entries[identifier]["status"] == status
    assert found == suspected
    value = entries[identifier]["value"]
    assert value is None or math.isfinite(value)


def test_labels_alone_are_compared_with_the_best_attack_on_what_is_right():
    """Ten of 100 are closer than DeepFool, but FAB is closer still on all but the last, wrong."""
    closer = {**PROBES["D6"], "distances": [0.25] * 10 + [0.5] * 90}
    wrong = np.arange(1000) >= 2
    weak, strong = nearest(), nearest()
    strong[1][2:10] = 0.2
    norms = {"deepfool": (*weak[:2], wrong), "fab": (*strong[:2], wrong)}
    entries, _ = diagnose(probes={**PROBES, "D6": closer}, minimum_norms=norms)
    assert (entries["D6"]["value"], entries["D6"]["status"]) == (0, "PASS")
    del norms["fab"]
    entries, _ = diagnose(probes={**PROBES, "D6": closer}, minimum_norms=norms)
    assert entries["D6"]["value"] == pytest.approx(8 / 98)
    assert (entries["D6"]["status"], entries["D6"]["n"]) == ("FAIL", 98)
    # What no attack breaks is infinitely far.
    norms["fab"] = (np.zeros(1000, bool), np.zeros(1000), wrong)
    assert diagnose(probes={**PROBES, "D6": closer}, minimum_norms=norms)[0]["D6"]["n"] == 98


def test_operations_are_named():
    entries, _ = diagnose(**probed("D14", operations=["floor", "round"]))
    assert "floor, round" in entries["D14"]["meaning"]


def test_a_minimum_norm_attack_among_the_attacks_does_not_hide_what_others_overlook():
    robust = dict(zip(("pgd", "fab"), some_right(0.4, 0.4), strict=True))
    robust["fab"][0] = False
    found = diagnostics.diagnose(robust, epsilon=0.1, minimum_norms={"fab": nearest(distance=0.05)})
    (entry,) = [entry for entry in found if entry["id"] == "D21"]
    assert (entry["value"], entry["status"], entry["n"]) == (1, "WARN", 1000)


@pytest.mark.parametrize(("num_alone", "status"), [(2, "PASS"), (10, "FAIL")])
def test_what_square_alone_breaks_counts_though_it_is_the_weaker_attack(num_alone, status):
    square = np.arange(1000) < 700
    square[:num_alone] = False
    found = diagnostics.diagnose({"apgd-t": np.arange(1000) < 400, "square": square})
    (entry,) = [entry for entry in found if entry["id"] == "D5"]
    assert entry["value"] == pytest.approx(num_alone / 1000)
    assert entry["status"] == status
