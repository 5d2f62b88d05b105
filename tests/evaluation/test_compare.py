"""Comparison of evaluations on written folders; the real ones are in test_evaluate."""

import json

import numpy as np
import pytest

from gfa_jax.evaluation import compare, comparison_tables, report

CLEAN = np.array([1] * 16 + [0] * 4, bool)
HERE = np.array([1] * 12 + [0] * 8, bool)
DISTANCE = np.linspace(0.1, 2.0, 20, dtype=np.float32)


def write_run(path, name, robust=HERE, *, results=(), outcomes=()):
    path.mkdir()
    success = np.arange(20) != 0
    arrays = {
        "ids": np.arange(20),
        "labels": np.zeros(20, np.int32),
        "clean_correct": CLEAN,
        "robust/fgsm": robust,
        "robust/deepfool": CLEAN,
        "worst_case": robust,
        "distance/deepfool": DISTANCE,
        "success/deepfool": success,
    } | dict(outcomes)
    content = {
        "name": name,
        "threat": {"norm": "l2", "epsilon": 0.5, "bounds": [0.0, 1.0]},
        "data": {"name": "toy", "split": "test"},
        "num_examples": 20,
        "counts": {"fgsm": {}, "deepfool": {}},
        "clean_accuracy": 0.8,
        "robust_accuracy": {
            "fgsm": float(robust.mean()),
            "deepfool": 0.8,
            "worst_case": float(robust.mean()),
        },
        "minimum_norm": {"deepfool": {}},
        "diagnostics": [{"id": "D1", "name": "one|step", "status": "PASS"}],
    } | dict(results)
    (path / "results.json").write_text(json.dumps(content))
    np.savez(path / "outcomes.npz", **arrays)
    np.savez(path / "examples.npz", clean=np.zeros((1, 2, 2, 1)))
    return str(path)


@pytest.fixture(autouse=True)
def _plain_page(monkeypatch):
    monkeypatch.setattr(report, "write_report", lambda runs, path: path.write_text("page"))


def test_tables_say_what_the_outcomes_hold(tmp_path):
    better = HERE | (np.arange(20) == 12) | (np.arange(20) == 13)
    better[0] = False
    training = {"training": {"steps": 30, "seconds": 12.4, "examples": 960}}
    far = {"distance/deepfool": DISTANCE * 2}
    runs = [
        write_run(tmp_path / "a", "first"),
        write_run(tmp_path / "b", "second", better, results=training, outcomes=far),
    ]
    compare.compare(runs, str(tmp_path / "out.html"))
    found = json.loads((tmp_path / "out.json").read_text())
    accuracy = {(row["run"], row["attack"]): row for row in found["accuracy"]}
    assert accuracy["second", "fgsm"]["accuracy"] == 13 / 20
    assert accuracy["first", "worst_case"]["low"] < 0.6 < accuracy["first", "worst_case"]["high"]
    worst = next(row for row in found["differences"] if row["attack"] == "worst_case")
    assert worst["difference"] == pytest.approx(1 / 20)
    assert (worst["only_here"], worst["only_first"], worst["p"]) == (2, 1, 1.0)
    first, second = found["minimum_norms"]
    # The 16 right inputs; the first of them is a failure.
    expected = np.median(np.where(np.arange(16) == 0, np.inf, DISTANCE[:16]))
    assert first["median"] == pytest.approx(expected)
    assert (first["num_inputs"], first["success_rate"]) == (16, 15 / 16)
    assert (first["ratio"], second["ratio"]) == (1.0, pytest.approx(2.0))
    text = (tmp_path / "out.md").read_text()
    assert text.index("* first: 80.0%") < text.index("## Accuracy")
    assert "| D1 | one\\|step | PASS | PASS |" in text
    assert "| second | 30 | 960 | 12 |" in text
    assert "| first | - | - | - |" in text
    assert (tmp_path / "out.html").read_text() == "page"


def test_failures_leave_an_infinite_median(tmp_path):
    none = {"success/deepfool": np.zeros(20, bool)}
    run = write_run(tmp_path / "a", "a", outcomes=none)
    compare.compare([run], str(tmp_path / "out.html"))
    (row,) = json.loads((tmp_path / "out.json").read_text())["minimum_norms"]
    assert (row["median"], row["low"], row["high"], row["ratio"]) == (None,) * 4
    assert "[inf, inf]" in (tmp_path / "out.md").read_text()


@pytest.mark.parametrize(
    ("results", "outcomes", "message"),
    [
        ({"threat": {"norm": "l2", "epsilon": 1.0}}, {}, "differ in threat.*1.0"),
        ({"data": {"name": "other"}}, {}, "differ in data.*other"),
        ({"counts": {"fgsm": {}}}, {}, "differ in attacks"),
        ({"mode": "sequential"}, {}, "differ in mode.*sequential"),
        ({}, {"ids": np.arange(20) + 1}, "differ in ids of 20 examples.*row 0"),
        ({}, {"labels": np.eye(20, dtype=np.int32)[7]}, "differ in labels of 1 examples.*row 7"),
        ({}, {"worst_case": CLEAN}, "does not belong to results.json.*worst_case"),
        ({}, {"worst_case": CLEAN[:3]}, "damaged: 'worst_case' has dtype bool"),
    ],
)
def test_what_does_not_compare_is_refused_and_nothing_written(tmp_path, results, outcomes, message):
    runs = [
        write_run(tmp_path / "a", "a"),
        write_run(tmp_path / "b", "b", results=results, outcomes=outcomes),
    ]
    with pytest.raises(ValueError, match=message):
        compare.compare(runs, str(tmp_path / "out.html"))
    assert not list(tmp_path.glob("out*"))


def test_missing_and_damaged_outcomes_are_named(tmp_path):
    run = write_run(tmp_path / "a", "a")
    path = tmp_path / "a" / "outcomes.npz"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match=r"outcomes.npz' is damaged.*run eval.py again"):
        compare.load([run])
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"no outcomes.npz: run eval.py again"):
        compare.load([run])


def test_the_page_must_be_html(tmp_path):
    run = write_run(tmp_path / "a", "a")
    with pytest.raises(ValueError, match=r"must end in .html"):
        compare.compare([run], str(tmp_path / "out.md"))
    assert not list(tmp_path.glob("out*"))


def test_printed_differences_keep_their_brackets(tmp_path, capsys):
    runs = [write_run(tmp_path / "a", "first"), write_run(tmp_path / "b", "second", CLEAN)]
    found = compare.load(runs)
    compare.print_differences(comparison_tables.difference_table(found.runs, found.outcomes))
    printed = capsys.readouterr().out
    assert "difference to first" in printed
    assert "[" in printed
    assert "+20.0" in printed
