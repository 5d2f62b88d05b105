"""The benchmark of objectives on some steps: its table, what it does again, and what it refuses."""

import json

import pytest

from benchmarks import objective_study as study
from gfa_jax.training import loop

pytestmark = pytest.mark.slow
FLAGS = {"recipes": "standard,pgd_at", "seeds": 1, "rounds": 1, "train_steps": 8}


def test_a_stopped_benchmark_goes_on_and_refuses_other_recipes(tmp_path, monkeypatch, capsys):
    out = tmp_path / "study"
    study.run(study.Flags(str(out), **FLAGS | {"recipes": "pgd_at"}))
    page = (out / "results.md").read_text()
    assert page in capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    # An attack of seven steps: a forward and a backward pass each beside the three passes.
    assert results["costs"]["pgd_at"]["flops"] == pytest.approx((3 + 2 * 7) / 3, rel=0.01)
    row = next(line for line in page.splitlines() if line.startswith("| pgd_at | 1 |"))
    accuracies = results["accuracies"]["pgd_at/seed0"]
    assert f" {100 * accuracies['worst case']:.1f} |" in row
    others = [accuracies[column] for column in ("clean", *study.ATTACKS)]
    assert accuracies["worst case"] <= min(others) <= accuracies["clean"] < 1

    trained, train = [], loop.train_and_evaluate
    monkeypatch.setattr(
        loop, "train_and_evaluate", lambda *args: (trained.append(args[1]), train(*args))
    )
    study.run(study.Flags(str(out), **FLAGS))
    assert trained == [out / "standard" / "seed0"]
    again = json.loads((out / "results.json").read_text())
    assert again["costs"]["pgd_at"] == results["costs"]["pgd_at"]
    assert again["accuracies"]["pgd_at/seed0"] == accuracies
    with pytest.raises(ValueError, match="another config"):
        study.run(study.Flags(str(out), **FLAGS | {"train_steps": 9, "rounds": 0}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipes": "trade"}, "recipe='trade' is not one of.*Did you mean 'trades'"),
        ({"seeds": 0}, "seeds=0 must be an integer >= 1"),
        ({"rounds": -1}, "rounds=-1 must be a finite number >= 0"),
    ],
)
def test_bad_flags_are_refused_before_anything_is_written(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        study.run(study.Flags(str(tmp_path / "out"), **FLAGS | changes))
    assert not (tmp_path / "out").exists()
