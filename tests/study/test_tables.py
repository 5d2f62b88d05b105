"""Numbers of a page by hand, of records that are written out here."""

import json

from gfa_jax.study import page, tables
from tests.study.tiny import COMMAND, tiny_study


def test_numbers_of_a_page_by_hand():
    """Of records that are written out here."""
    one = {
        "trial": "standard",
        "seed": 0,
        "config": {"train_steps": 10},
        "step_flops": 7,
        "training": {},
        "environment": {"jax": "1", "python": "3", "devices": "1 x cpu"},
        "test": {
            "clean_accuracy": 0.9,
            "robust_accuracy": {
                "fgsm": 0.5,
                "pgd-margin:num_steps=3": 0.25,
                "deepfool:num_steps=20": 0.3,
                "worst_case": 0.2,
            },
            "num_examples": 20,
            # Bits: the first 10 of 20, and the first 4.
            "right": {"clean": "ffffc0", "fgsm": "ffc000", "worst_case": "f00000"},
            "data": {"name": "digits"},
            "threat": {"norm": "linf", "epsilon": 8 / 255},
            "layers": {},
            "curves": [],
            "diagnostics": [
                {"id": "D1", "status": "FAIL", "value": 1.0},
                {"id": "D2", "status": "FAIL", "value": 1.0},
                {"id": "D3", "status": "PASS", "value": 1.0},
                {"id": "D5", "status": "NA", "value": None},
                {"id": "D8", "status": "NA", "value": None},
                {"id": "D10", "status": "WARN", "value": 1.0},
            ],
        },
        "distances": {
            "minimum_norm": {
                "deepfool:num_steps=20": {"mean_of_successes": 0.5, "success_rate": 1.0}
            }
        },
    }
    far = json.loads(json.dumps(one))
    far |= {"trial": "gfa", "step_flops": 14}
    far["test"]["right"]["fgsm"] = "07fe00"  # 10 from the sixth on, 5 of them in common.
    far["validation"] = {"environment": {"jax": "2", "python": "3", "devices": "1 x cpu"}}
    far["validation"] |= {"clean_accuracy": 0.9, "num_examples": 20}
    far["validation"]["robust_accuracy"] = {"fgsm": 0.5, "pgd:num_steps=2": 0.4}
    far["distances"]["minimum_norm"]["deepfool:num_steps=20"] = {
        "mean_of_successes": 1.25,
        "success_rate": 0.5,
    }
    second = json.loads(json.dumps(one)) | {"seed": 3}
    second["test"]["clean_accuracy"] = 0.7
    second["test"]["diagnostics"] = second["test"]["diagnostics"][1:4]
    gathered = {"standard": [one, second], "gfa": [far], "searched": []}
    text = page.render(tiny_study(), gathered, COMMAND, {})
    plain, aligned = (
        next(line for line in text.splitlines() if line.startswith(f"| {label} |"))
        for label in ("plain", "aligned")
    )
    # Two seeds: mean and standard deviation. One: Wilson's interval, of 4 in 20.
    assert "| 2 | 1.00 | 80.0 +- 14.1 |" in plain
    assert "| 0.5 (1.0x) |" in plain
    assert "| 1.25 (2.5x), 50 % found |" in aligned
    assert "| 1 | 2.00 | 90.0 (69.9-97.2) |" in aligned
    assert "**20.0 (8.1-41.6)** | fail: **D1**, D2; warn: D10; not measured: D5 |" in aligned
    seeds = "fail: **D1** (1 of 2 seeds), D2 (2 of 2 seeds); warn: D10 (1 of 2 seeds); not"
    assert f"| {seeds} measured: D5 |" in plain
    assert "those that nothing was measured for (measured for none: D5)." in text
    assert "with jax 1, Python 3, 1 x cpu; jax 2, Python 3, 1 x cpu." in text
    assert "epsilon 8/255" in text
    # Of the seed that both have: Newcombe's interval of 10 in 20 against 10 in 20, uncorrelated.
    verdict = "| +99 points | +0.0 points (50.0 against 50.0) | -28.4 to +28.4 | 1 | no | 20.0 and"
    assert verdict in text
    assert "| 99 times | 2.5 times; 50 and 100 % found | - | 1 | no | 20.0 and 20.0 |" in text
    # A seed whose distances are still to come, and one that failed.
    del second["distances"]
    failed = {"trial": "gfa", "seed": 0, "config": far["config"], "failure": "collapsed"}
    text = page.render(tiny_study(), gathered | {"gfa": [failed]}, COMMAND, {})
    assert "| 2 | 1.00 | 80.0 +- 14.1 |" in text
    assert "| 0.5 (1.0x) |" in text
    assert text.count("| training failed: aligned | - | 0 | no | - |") == 2
    assert "| 0 of 1, 1 failed |" in text
    far["distances"]["minimum_norm"]["deepfool:num_steps=20"] = {
        "mean_of_successes": None,
        "success_rate": 0.0,
    }
    text = page.render(tiny_study(), gathered, COMMAND, {})
    assert "| no ratio: 0 and 100 % found | - | 1 | - | 20.0 and 20.0 |" in text
    # Operations of other devices do not compare.
    far["environment"]["devices"] = "8 x tpu"
    text = page.render(tiny_study(), gathered, COMMAND, {})
    assert "| aligned | 1 | - | 90.0" in text


def test_radii_are_compared_image_by_image():
    promised = [0.1, 0.2, 0.4, 0.0, 0.5]
    found = [0.2, 0.2, 0.2, 0.1, None]  # Nothing found is farther than all.
    # Right are images 1 to 4 of 8, of which 1, 2 and 4 resist; the last resists, too.
    right = {"clean": "78", "worst_case": "68"}
    whole = {
        "radii": {"norm": "linf", "linear": promised[:4], "measured": found[:4]},
        "test": {"right": right, "num_examples": 8},
    }
    last = {
        "radii": {"norm": "linf", "linear": promised[4:], "measured": found[4:]},
        "test": {"right": {"clean": "80", "worst_case": "80"}, "num_examples": 8},
    }
    lines = tables.radii_table(tiny_study(), {"standard": [whole, last], "gfa": [last]})
    table = lines[0].splitlines()
    assert "promised beyond 38.25/255" in table[0]
    # Ratios 2, 1, 1/2 and infinity; three of five are promised beyond .15, four found.
    ratio = "1.50 (0.50-inf) of 4"
    shares = "60 %, 33 % broken | 80 %, 25 % broken"
    assert table[2] == f"| plain | 5 | 0.2000 | 0.2000 | {ratio} | {shares} |"
    assert table[3] == "| aligned | 1 | - | - | - | - | - |"
