"""Claims hold as far as their intervals say."""

import numpy as np
import pytest

from gfa_jax.study import claims, records
from tests.study.tiny import changed, claim, tiny_study


def record_of(name, seed, fgsm, **fields):
    accuracies = {"fgsm": fgsm, "pgd-margin:num_steps=3": fgsm, "deepfool:num_steps=20": fgsm}
    # Ours is right where the baseline is, and further.
    outcomes = {"clean_correct": np.arange(500) < 450, "worst_case": np.arange(500) < 500 * fgsm}
    outcomes["robust/fgsm"] = outcomes["worst_case"]
    right = records.summary({"minimum_norm": {}, "layers": {}, "diagnostics": []}, outcomes)[
        "right"
    ]
    record = {
        "trial": name,
        "seed": seed,
        "test": {
            "clean_accuracy": 0.9,
            "robust_accuracy": {**accuracies, "worst_case": fgsm},
            "num_examples": 500,
            "right": right,
            "data": {"name": "digits"},
            "threat": {"norm": "linf", "epsilon": 0.1},
            "diagnostics": [],
        },
    }
    return record | fields


@pytest.mark.parametrize(
    ("ours", "theirs", "at_least", "expected"),
    [
        # One seed: Newcombe's interval, of 150 and 100 in 500, where 100 are right in both.
        ([0.3], [0.2], 7.0, "+10.0 points (30.0 against 20.0) | +7.4 to +12.7 | 1 | yes"),
        ([0.3], [0.2], 8.0, "+7.4 to +12.7 | 1 | within chance"),
        ([0.3], [0.2], 12.8, "+7.4 to +12.7 | 1 | no"),
        # Student's of differences of .1, .2 and .3 is 24.8 points, that of images 3.0.
        (
            [0.3, 0.4, 0.5],
            [0.2] * 3,
            0.0,
            "(40.0 against 20.0) | -5.0 to +45.0 | 3 | within chance",
        ),
        ([0.3, 0.4, 0.5], [0.2] * 3, -6.0, "-5.0 to +45.0 | 3 | yes"),
        # Seeds that both have; what seeds agree on is still a matter of images.
        ([0.3, 0.4, 0.5], [0.2], 4.0, "(30.0 against 20.0) | +7.4 to +12.7 | 1 | yes"),
        ([9 / 500, 9 / 500], [14 / 500, 14 / 500], -1.0, "-1.9 to -0.1 | 2 | within chance"),
        # Trainings that never differ on 500 images: up to Wilson's 3.84 in 503.84.
        ([9 / 500, 9 / 500], [9 / 500, 9 / 500], 0.0, "-0.8 to +0.8 | 2 | within chance"),
        ([0.0] * 3, [0.0] * 3, -0.8, "-0.8 to +0.8 | 3 | yes"),
        (
            [0.3, None, 0.5],
            [0.2, 0.2, None],
            4.0,
            "| 1, 1 of aligned failed, 1 of plain failed | yes",
        ),
        ([0.3], [None], 4.0, "| not measured yet | - | 0, 1 of plain failed | - |"),
        ([None, None, None], [0.2], 4.0, "| training failed: aligned | - | 0 | no |"),
    ],
)
def test_claims_hold_as_far_as_intervals_say(ours, theirs, at_least, expected):
    study = claim(changed(tiny_study(), "gfa", seeds=(0, 1, 2)), at_least=at_least)
    gathered = {
        name: [
            {"trial": name, "seed": seed, "failure": "collapsed"}
            if value is None
            else record_of(name, seed, value)
            for seed, value in enumerate(values)
        ]
        for name, values in (("gfa", ours), ("standard", theirs))
    }
    judged = {
        name: [record for record in some if "test" in record] for name, some in gathered.items()
    }
    lines = claims.claims_table(
        study, gathered, {name: some for name, some in judged.items() if some}
    )
    assert expected in lines[0]


@pytest.mark.parametrize(
    ("ours", "at_least", "expected"),
    [
        # Ratios 1, 2 and 3: Student's of their mean is 2 +- 4.303 / sqrt(3).
        ([0.5, 1.0, 1.5], 2.5, "| 2.0 times; 100 and 50 % found | -0.5 to 4.5 | 3 | within chance"),
        ([0.5, 1.0, 1.5], 4.5, "| -0.5 to 4.5 | 3 | no"),
        ([0.5, 1.0, 1.5], -0.5, "| -0.5 to 4.5 | 3 | yes"),
        ([1.0, 1.0], 2.0, "| 2.0 times; 100 and 50 % found | 2.0 to 2.0 | 2 | yes"),
        ([1.0], 2.0, "| 2.0 times; 100 and 50 % found | - | 1 | yes"),
        ([1.0], 2.1, "| - | 1 | no"),
    ],
)
def test_ratios_of_distances_hold_as_far_as_seeds_say(ours, at_least, expected):
    study = changed(tiny_study(), "gfa", seeds=(0, 1, 2))
    attack = "deepfool:num_steps=20"
    study = claim(study, measure="distance", attack=attack, at_least=at_least)

    def distances(mean, rate):
        found = {"mean_of_successes": mean, "success_rate": rate}
        return {"minimum_norm": {attack: found}}

    gathered = {
        "gfa": [
            record_of("gfa", seed, 0.3, distances=distances(mean, 1.0))
            for seed, mean in enumerate(ours)
        ],
        "standard": [
            record_of("standard", seed, 0.2, distances=distances(0.5, 0.5)) for seed in range(3)
        ],
    }
    lines = claims.claims_table(study, gathered, gathered)
    assert expected in lines[0]
