"""A study end to end on a tiny network: records, resuming, sharing, refusals, and the page."""

import dataclasses
import fcntl
import json
import shutil
import statistics
import textwrap

import numpy as np
import pytest

from gfa_jax import files
from gfa_jax.config import GFAConfig
from gfa_jax.evaluation import curves, evaluate
from gfa_jax.study import judge, plan, records, runner
from gfa_jax.training import guards, loop, run_folder
from tests.study.tiny import COMMAND, changed, protocol, tiny, tiny_study


@pytest.fixture
def use(monkeypatch):
    """Makes a study the one that the runner loads."""

    def use(study):
        plan.validate(study)
        monkeypatch.setattr(plan, "load_study", lambda path: study)

    return use


@pytest.fixture
def ready(worked, monkeypatch):
    """Lets trainings take over the runs of ``worked``."""

    def train(config, workdir):
        shutil.copytree(worked / workdir.name, workdir, dirs_exist_ok=True)

    monkeypatch.setattr(loop, "train_and_evaluate", train)


@pytest.fixture(scope="module")
def worked(tmp_path_factory):
    """A study that is worked through."""
    out = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "load_study", lambda path: tiny_study())
        # The curves' own attacks take as long to compile as all else.
        patch.setattr(curves, "CURVES", {"fgsm": ("fgsm", ())})
        runner.run(runner.Flags("tiny.py", out=str(out)), COMMAND)
    return out


def test_every_seed_has_a_record_of_what_was_measured(worked):
    names = ("standard-seed0", "standard-seed3", "gfa-seed0", "searched-seed0")
    assert {path.stem for path in (worked / "records").iterdir()} == set(names)
    for name in names:
        record = json.loads((worked / "records" / f"{name}.json").read_text())
        judged = record["validation"]
        assert judged["protocol"] == {
            "num_validation_examples": 24,
            "validation_attacks": "fgsm,pgd:num_steps=2",
        }
        assert (judged["data"]["name"], judged["data"]["split"]) == ("digits", "validation")
        after_fgsm, after_both = judged["robust_accuracy"].values()
        assert after_both <= after_fgsm <= judged["clean_accuracy"]
        assert record["config"]["data"]["data_dir"] is None
        assert record["training"]["steps"] == 200
        assert record["step_flops"] > 0
        is_tested = not name.startswith("searched")
        assert ("test" in record) == ("distances" in record) == ("radii" in record) == is_tested
        if is_tested:
            (found,) = record["distances"]["minimum_norm"].values()
            assert found["norm"] == "l2"
            assert found["num_examples"] <= 24
            radii = record["radii"]
            # Right images have positive margins, so they are aligned, and what alignment promises
            # is found, roughly.
            assert min(radii["alignment"]) > 0
            ratios = [
                measured / linear
                for linear, measured in zip(radii["linear"], radii["measured"], strict=True)
                if measured is not None
            ]
            assert len(ratios) >= 3
            assert 0.3 < statistics.median(ratios) < 3
    for name in ("standard-seed0", "gfa-seed0", "standard-seed3"):
        tested = json.loads((worked / name / "eval" / "results.json").read_text())
        record = json.loads((worked / "records" / f"{name}.json").read_text())
        assert record["test"]["robust_accuracy"] == tested["robust_accuracy"]
        with np.load(worked / name / "eval" / "outcomes.npz") as outcomes:
            for attack, field in (("clean", "clean_correct"), ("fgsm", "robust/fgsm")):
                found = records.right(record, attack)
                np.testing.assert_array_equal(found, outcomes[field])
            assert records.right(record, "worst_case").mean() == pytest.approx(
                tested["robust_accuracy"]["worst_case"]
            )
    assert set(tested["robust_accuracy"]) == {
        *("fgsm", "pgd-margin:num_steps=3", "deepfool:num_steps=20", "worst_case")
    }
    other = json.loads((worked / "records" / "standard-seed3.json").read_text())
    assert other["config"]["seed"] == 3


def test_the_page_has_what_the_records_have(worked):
    text = (worked / "study.md").read_text()
    record = json.loads((worked / "records" / "gfa-seed0.json").read_text())
    worst = 100 * record["test"]["robust_accuracy"]["worst_case"]
    rows = [line for line in text.splitlines() if line.startswith("| aligned |")]
    assert [f"**{worst:.1f} (" in row for row in rows] == [True, False]
    assert f"| aligned | {len(record['radii']['linear'])} | " in rows[1]
    assert f"    {COMMAND}" in text
    assert "| plain | 2 | 1.00 |" in text
    claims = [line for line in text.splitlines() if line.startswith(("| defends", "| farther"))]
    assert [line.split("|")[7].strip() for line in claims] == ["no", "no"]
    assert "too short to tell" in text
    assert "Still to do" not in text
    pictures = {"curves", "distances", "alignment", "radii", "surfaces", "shares"}
    assert {path.stem for path in (worked / "study").iterdir()} == pictures
    for name in pictures:
        assert f"(study/{name}.png)" in text
        assert (worked / "study" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_recorded_is_not_made_again(worked, use, monkeypatch, tmp_path):
    use(tiny_study())
    monkeypatch.setattr(loop, "train_and_evaluate", lambda *args: pytest.fail("trained again"))
    before = (worked / "study.md").read_text()
    # The records are enough: the weights may be gone.
    flags = runner.Flags(
        "tiny.py",
        out=str(tmp_path),
        records=str(worked / "records"),
        page=str(tmp_path / "study.md"),
    )
    runner.run(flags, COMMAND)
    assert (tmp_path / "study.md").read_text() == before
    # Groups are drawn apart.
    use(changed(tiny_study(), "gfa", group="deeper nets"))
    runner.run(flags, COMMAND)
    text = (tmp_path / "study.md").read_text()
    assert text.count("a dot an image](study/radii.png)") == 1
    assert text.count("a dot an image, deeper nets](study/radii-deeper-nets.png)") == 1
    pictures = (tmp_path / "study").glob("radii*.png")
    assert len({path.read_bytes() for path in pictures}) == 2


def test_test_images_may_be_left_for_later(ready, use, monkeypatch, tmp_path):
    use(tiny_study())
    monkeypatch.setattr(evaluate, "evaluate", lambda flags: pytest.fail("tested"))
    for name in ("distances", "radii"):
        monkeypatch.setattr(judge.Judge, name, lambda *args: pytest.fail("tested"))
    flags = runner.Flags("tiny.py", out=str(tmp_path), trials="gfa", validation_only=True)
    runner.run(flags, COMMAND)
    record = json.loads((tmp_path / "records" / "gfa-seed0.json").read_text())
    assert "validation" in record
    page_text = (tmp_path / "study.md").read_text()
    assert "`standard`, seed 3; `gfa`, seed 0 (test, distances, radii); `searched`" in page_text
    runner.run(flags, COMMAND)
    with pytest.raises(pytest.fail.Exception, match="tested"):
        runner.run(dataclasses.replace(flags, validation_only=False), COMMAND)


def test_a_trial_that_fails_is_recorded_and_the_others_go_on(
    worked, ready, use, monkeypatch, tmp_path
):
    use(tiny_study())
    results = json.loads((worked / "standard-seed0" / "eval" / "results.json").read_text())
    monkeypatch.setattr(evaluate, "evaluate", lambda flags: results)
    train = loop.train_and_evaluate

    def fail(config, workdir):
        if config.gfa.weight == 0.1:
            raise guards.TrainingFailedError("step 7: collapsed.")
        return train(config, workdir)

    monkeypatch.setattr(loop, "train_and_evaluate", fail)
    flags = runner.Flags("tiny.py", out=str(tmp_path), trials="searched,gfa")
    runner.run(flags, COMMAND)
    text = (tmp_path / "study.md").read_text()
    assert "Training stopped: step 7: collapsed." in text
    assert "| aligned |" in text
    assert "`standard`, seed 0; `standard`, seed 3." in text
    assert "not measured yet" in text
    monkeypatch.setattr(loop, "train_and_evaluate", lambda *args: pytest.fail("trained again"))
    runner.run(flags, COMMAND)


def test_a_training_that_was_stopped_is_not_judged(worked, use, monkeypatch, tmp_path):
    use(tiny_study())
    train = loop.train_and_evaluate
    monkeypatch.setattr(
        loop, "train_and_evaluate", lambda config, workdir: train(config, workdir, stop_after=5)
    )
    flags = runner.Flags("tiny.py", out=str(tmp_path), trials="searched")
    with pytest.raises(SystemExit, match="the same command goes on"):
        runner.run(flags, COMMAND)
    assert not (tmp_path / "records").exists()

    def go_on(config, workdir):
        shutil.rmtree(workdir / "checkpoints")
        shutil.copytree(worked / workdir.name, workdir, dirs_exist_ok=True)

    monkeypatch.setattr(loop, "train_and_evaluate", go_on)
    runner.run(flags, COMMAND)
    assert json.loads((tmp_path / "records" / "searched-seed0.json").read_text())["validation"]


def test_processes_share_a_study(use, tmp_path, capsys):
    use(tiny_study())
    workdir = tmp_path / "searched-seed0"
    workdir.mkdir()
    flags = runner.Flags("tiny.py", out=str(tmp_path), trials="searched")
    with (workdir / ".study-lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        runner.run(flags, COMMAND)
    assert "searched, seed 0: another process is at it" in capsys.readouterr().err
    assert "No trial has a record yet" in (tmp_path / "study.md").read_text()


def test_seeds_may_be_left_for_later(use, monkeypatch, tmp_path):
    use(tiny_study())
    seen = []

    def note(config, workdir):
        seen.append((workdir.name, config.seed))
        raise guards.TrainingFailedError("no time")

    monkeypatch.setattr(loop, "train_and_evaluate", note)
    flags = runner.Flags("tiny.py", out=str(tmp_path), max_seeds=1)
    runner.run(flags, COMMAND)
    assert seen == [("standard-seed0", 0), ("gfa-seed0", 0), ("searched-seed0", 0)]
    runner.run(dataclasses.replace(flags, max_seeds=None), COMMAND)
    assert seen[3:] == [("standard-seed3", 3)]
    runner.run(dataclasses.replace(flags, max_seeds=None, write_only=True), COMMAND)


def test_records_of_another_recipe_are_refused_before_anything_is_trained(
    worked, use, monkeypatch, tmp_path
):
    study = tiny_study()
    changed = dataclasses.replace(study.trials["searched"], config=tiny(gfa=GFAConfig(weight=0.2)))
    use(dataclasses.replace(study, trials={**study.trials, "searched": changed}))
    monkeypatch.setattr(loop, "train_and_evaluate", lambda *args: pytest.fail("trained"))
    flags = runner.Flags("tiny.py", out=str(tmp_path), records=str(worked / "records"))
    with pytest.raises(ValueError, match=r"searched-seed0.json.*\n.*gfa.weight: 0.1.*0.2"):
        runner.run(flags, COMMAND)
    assert not list(tmp_path.iterdir())


def test_records_of_another_protocol_or_other_images_are_refused(worked, tmp_path):
    study = tiny_study()
    fewer = protocol(study, num_validation_examples=12)
    with pytest.raises(ValueError, match="'standard', seed 0, was judged by .*24.*12"):
        records.gather(fewer, worked / "records")
    shutil.copytree(worked / "records", tmp_path / "records")
    path = tmp_path / "records" / "gfa-seed0.json"
    record = json.loads(path.read_text())
    record["validation"]["data"]["hash"] = "other"
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"were judged on other images \(validation\)"):
        records.gather(study, tmp_path / "records")


def test_a_model_that_is_trained_anew_is_judged_anew(worked, ready, use, monkeypatch, tmp_path):
    """Its weights may differ from those that were judged before."""
    use(tiny_study())
    path = tmp_path / "records" / "gfa-seed0.json"
    record = json.loads((worked / "records" / "gfa-seed0.json").read_text())
    judged = []

    def note(stage, *args):
        judged.append(stage)
        return {"clean_accuracy": 0.0}

    monkeypatch.setattr(runner, "_judge", note)
    monkeypatch.setattr(runner.page, "write", lambda *args: None)
    monkeypatch.setattr(runner.records, "gather", lambda *args: {})
    path.parent.mkdir()
    del record["radii"]
    path.write_text(json.dumps(record | {"weights_hash": "of other weights"}))
    flags = runner.Flags("tiny.py", out=str(tmp_path), trials="gfa")
    runner.run(flags, COMMAND)
    again = json.loads(path.read_text())
    assert judged == ["validation", "test", "distances", "radii"]
    aside = json.loads(path.with_name(f"{path.name}.old-1").read_text())
    assert aside == record | {"weights_hash": "of other weights"}
    assert again["weights_hash"] == record["weights_hash"]
    assert again["test"]["clean_accuracy"] == 0.0
    # Unless test images are to be left for later.
    judged.clear()
    del record["validation"]
    path.write_text(json.dumps(record | {"weights_hash": "of other weights"}))
    runner.run(dataclasses.replace(flags, validation_only=True), COMMAND)
    assert judged == ["validation"]
    assert not json.loads(path.read_text()).keys() & {"test", "distances", "radii"}
    # A model whose training fails the second time has nothing of the first in its record.

    def fail(config, workdir):
        raise guards.TrainingFailedError("collapsed")

    monkeypatch.setattr(loop, "train_and_evaluate", fail)
    runner.run(flags, COMMAND)
    assert json.loads(path.read_text()).keys() == {"trial", "seed", "config", "failure"}


def test_runs_of_another_recipe_are_refused_before_anything_is_trained(use, monkeypatch, tmp_path):
    use(tiny_study())
    other = dataclasses.replace(tiny(gfa=GFAConfig(weight=0.7)), seed=0)
    run_folder.claim(tmp_path / "searched-seed0", other)
    monkeypatch.setattr(loop, "train_and_evaluate", lambda *args: pytest.fail("trained"))
    with pytest.raises(ValueError, match="searched-seed0.*another config"):
        runner.run(runner.Flags("tiny.py", out=str(tmp_path)), COMMAND)


def test_missing_data_is_said_before_anything_is_written(use, tmp_path):
    study = tiny_study()
    nowhere = dataclasses.replace(tiny().data, name=f"arrays:{tmp_path / 'nowhere.npz'}")
    trials = {
        name: dataclasses.replace(trial, config=dataclasses.replace(trial.config, data=nowhere))
        for name, trial in study.trials.items()
    }
    use(dataclasses.replace(study, trials=trials))
    with pytest.raises(FileNotFoundError, match="nowhere.npz"):
        runner.run(runner.Flags("tiny.py", out=str(tmp_path / "out")), COMMAND)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"trials": "gfaa"}, "trials='gfaa' is not one of.*Did you mean 'gfa'"),
        ({"trials": ","}, "trials=',' names no trial"),
        ({"max_seeds": 0}, "max_seeds=0"),
        ({"page": "notes"}, "page='notes' must be a file with an ending"),
        ({"records": __file__}, "records='.*test_runner.py' cannot be a folder: .* is a file"),
        ({"out": f"{__file__}/a/b"}, "out='.*test_runner.py/a/b' cannot be a folder: .*py' is a"),
        ({"page": f"{__file__}/a.md"}, "page='.*test_runner.py/a' cannot be a folder"),
    ],
)
def test_bad_flags_are_refused(use, tmp_path, flags, message):
    use(tiny_study())
    with pytest.raises(ValueError, match=message):
        runner.run(runner.Flags(**{"study": "tiny.py", "out": str(tmp_path), **flags}), COMMAND)
    assert not list(tmp_path.iterdir())


def test_a_page_that_is_a_folder_is_refused(use, tmp_path):
    use(tiny_study())
    folder = tmp_path / "study.md"
    folder.mkdir()
    with pytest.raises(ValueError, match="page='.*study.md' must be a file with an ending"):
        runner.run(runner.Flags("tiny.py", out=str(tmp_path), page=str(folder)), COMMAND)


def test_what_another_process_recorded_is_kept(worked, ready, use, monkeypatch, tmp_path):
    """Processes with other folders of runs may share the records."""
    use(tiny_study())
    path = tmp_path / "records" / "gfa-seed0.json"
    whole = json.loads((worked / "records" / "gfa-seed0.json").read_text())

    def meanwhile(stage, *args):
        files.write_json(path, whole)
        return {"clean_accuracy": 0.0, "data": {"hash": whole["validation"]["data"]["hash"]}}

    monkeypatch.setattr(runner, "_judge", meanwhile)
    monkeypatch.setattr(runner.page, "write", lambda *args: None)
    flags = runner.Flags("tiny.py", out=str(tmp_path), trials="gfa", validation_only=True)
    runner.run(flags, COMMAND)
    kept = json.loads(path.read_text())
    assert {stage: kept[stage] for stage in ("test", "distances", "radii")} == {
        stage: whole[stage] for stage in ("test", "distances", "radii")
    }
    assert kept["validation"]["clean_accuracy"] == 0.0
    # What it found of other weights lies beside this one's.
    path.unlink()
    whole["weights_hash"] = "of other weights"
    runner.run(flags, COMMAND)
    assert json.loads(path.with_name(f"{path.name}.old-1").read_text()) == whole
    assert json.loads(path.read_text())["weights_hash"] == kept["weights_hash"]


def test_an_evaluation_of_something_else_is_put_aside(worked, use, tmp_path, monkeypatch):
    """It may be of another protocol or version: its folder is not to stop a study."""
    use(protocol(tiny_study(), batch_size=24))
    monkeypatch.setattr(curves, "CURVES", {"fgsm": ("fgsm", ())})
    shutil.copytree(worked, tmp_path, dirs_exist_ok=True)
    for path in (tmp_path / "records").iterdir():
        record = json.loads(path.read_text())
        if path.stem == "gfa-seed0":
            record.pop("test")
        elif "test" in record:
            record["test"]["protocol"]["batch_size"] = 24
        path.write_text(json.dumps(record))
    runner.run(runner.Flags("tiny.py", out=str(tmp_path), trials="gfa"), COMMAND)
    before = worked / "gfa-seed0" / "eval" / "results.json"
    aside = tmp_path / "gfa-seed0" / "eval.old-1" / "results.json"
    assert aside.read_bytes() == before.read_bytes()
    record = json.loads((tmp_path / "records" / "gfa-seed0.json").read_text())
    after = json.loads(before.read_text())["robust_accuracy"]
    assert record["test"]["robust_accuracy"] == after


def test_the_page_says_what_the_study_says_when_the_work_is_done(
    worked, ready, monkeypatch, tmp_path
):
    texts = iter(["at first", "in the end"])
    monkeypatch.setattr(plan, "load_study", lambda path: tiny_study(conclusions=next(texts)))
    flags = runner.Flags("tiny.py", out=str(tmp_path), records=str(worked / "records"))
    runner.run(flags, COMMAND)
    assert "in the end" in (tmp_path / "study.md").read_text()


def test_help_and_a_missing_study(capsys):
    from gfa_jax.study import __main__

    with pytest.raises(SystemExit) as stop:
        __main__.main(["--study", "nowhere.py"])
    assert "study='nowhere.py' does not exist" in textwrap.dedent(
        str(stop.value) + capsys.readouterr().err
    )
