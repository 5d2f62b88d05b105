"""Claims hold as far as their intervals say."""

import pytest

from gfa_jax.study import claims
from tests.study.tiny import changed, claim, tiny_study


def record_of(name, seed, fgsm, **fields):
    accuracies = {"fgsm": fgsm, "pgd-margin:num_steps=3": fgsm, "deepfool:num_steps=20": fgsm}
    record = {
        "trial": name,
        "seed": seed,
        "test": {
            "clean_accuracy": 0.9,
            "robust_accuracy": {**accuracies, "worst_case": fgsm},
            "num_examples": 500,
            "data": {"name": "digits"},
            "threat": {"norm": "linf", "epsilon": 0.1},
            "diagnostics": [],
        },
    }
    return record | fields


@pytest.mark.parametrize(
    ("ours", "theirs", "at_least", "expected"),
    [
        # One seed: Newcombe's interval, of 150 and 100 in 500.
        ([0.3], [0.2], 4.0, "+10.0 points (30.0 against 20.0) | +4.6 to +15.3 | 1 | yes"),
        ([0.3], [0.2], 5.0, "+4.6 to +15.3 | 1 | within chance"),
        ([0.3], [0.2], 15.3, "+4.6 to +15.3 | 1 | no"),
        # Student's of differences of .1, .2 and .3: 4.303 standard errors.
        (
            [0.3, 0.4, 0.5],
            [0.2] * 3,
            0.0,
            "(40.0 against 20.0) | -4.8 to +44.8 | 3 | within chance",
        ),
        ([0.3, 0.4, 0.5], [0.2] * 3, -5.0, "-4.8 to +44.8 | 3 | yes"),
        # Seeds that both have; exact ties in spite of rounding.
        ([0.3, 0.4, 0.5], [0.2], 4.0, "(30.0 against 20.0) | +4.6 to +15.3 | 1 | yes"),
        ([9 / 500, 9 / 500], [14 / 500, 14 / 500], -1.0, "-1.0 to -1.0 | 2 | yes"),
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
