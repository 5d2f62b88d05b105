"""A study end to end on a tiny network: records, resuming, sharing, refusals, and the page."""

import dataclasses
import fcntl
import json
import shutil
import statistics
import textwrap

import pytest

from configs import smoke
from gfa_jax.config import AttackConfig, GFAConfig, OptimizerConfig, ThreatConfig
from gfa_jax.evaluation import curves, evaluate
from gfa_jax.study import (
    Claim,
    Protocol,
    Study,
    Trial,
    figures,
    judge,
    load_study,
    page,
    plan,
    records,
    runner,
)
from gfa_jax.training import guards, loop, run_folder

COMMAND = "python -m gfa_jax.study --study tiny.py"
PROTOCOL = Protocol(
    num_validation_examples=24,
    validation_attacks="fgsm,pgd:num_steps=2",
    num_test_examples=24,
    paper_attacks="fgsm",
    paper_distances="deepfool:num_steps=20",
    honest_attacks="pgd-margin:num_steps=3,deepfool:num_steps=20",
    diagnostics="off",
    batch_size=12,
)


def tiny(**parts):
    base = smoke.get_config()
    return dataclasses.replace(
        base,
        train_steps=200,
        attack=AttackConfig(),
        model=dataclasses.replace(base.model, width=0.5),
        optimizer=OptimizerConfig(learning_rate=5e-3),
        loop=dataclasses.replace(base.loop, eval_every=0, eval_attack_steps=0),
        **parts,
    )


def tiny_study(**parts):
    trials = {
        "standard": Trial(
            label="plain", config=tiny(gfa=GFAConfig()), seeds=(0, 3), is_tested=True
        ),
        "gfa": Trial(
            label="aligned",
            config=tiny(gfa=GFAConfig(weight=1.0)),
            hypothesis="alignment defends",
            outcome="too short to tell",
            is_tested=True,
        ),
        "searched": Trial(
            label="aligned less", config=tiny(gfa=GFAConfig(weight=0.1)), hypothesis="less is more"
        ),
    }
    claims = (
        Claim(
            text="defends against FGSM",
            ours="gfa",
            baseline="standard",
            attack="fgsm",
            claimed="+99 points",
            at_least=99.0,
        ),
        Claim(
            text="farther away",
            ours="gfa",
            baseline="standard",
            attack="deepfool:num_steps=20",
            measure="distance",
            claimed="0 times",
            at_least=0.0,
        ),
    )
    study = Study(
        title="Tiny", about="Of digits.", trials=trials, standard="standard", protocol=PROTOCOL
    )
    return dataclasses.replace(study, claims=claims, **parts)


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
    assert [line.split("|")[7].strip() for line in claims] == ["no", "yes"]
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
        page.gather(fewer, worked / "records")
    shutil.copytree(worked / "records", tmp_path / "records")
    path = tmp_path / "records" / "gfa-seed0.json"
    record = json.loads(path.read_text())
    record["validation"]["data"]["hash"] = "other"
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"were judged on other images \(validation\)"):
        page.gather(study, tmp_path / "records")


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
    monkeypatch.setattr(runner.page, "gather", lambda *args: {})
    path.parent.mkdir()
    del record["radii"]
    path.write_text(json.dumps(record | {"weights_hash": "of other weights"}))
    flags = runner.Flags("tiny.py", out=str(tmp_path), trials="gfa")
    runner.run(flags, COMMAND)
    again = json.loads(path.read_text())
    assert judged == ["validation", "test", "distances", "radii"]
    assert again["weights_hash"] == record["weights_hash"]
    assert again["test"]["clean_accuracy"] == 0.0
    # Unless test images are to be left for later.
    judged.clear()
    del record["validation"]
    path.write_text(json.dumps(record | {"weights_hash": "of other weights"}))
    runner.run(dataclasses.replace(flags, validation_only=True), COMMAND)
    assert judged == ["validation"]
    assert not json.loads(path.read_text()).keys() & {"test", "distances", "radii"}
    # Nothing is kept of a model whose training fails the second time.

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


def test_damaged_records_are_named(tmp_path):
    path = tmp_path / "a-seed0.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match="a-seed0.json' is damaged: it holds no config"):
        records.read(path, tiny())
    path.write_text("{")
    with pytest.raises(ValueError, match="a-seed0.json' is damaged"):
        records.read(path, tiny())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"trials": "gfaa"}, "trials='gfaa' is not one of.*Did you mean 'gfa'"),
        ({"max_seeds": 0}, "max_seeds=0"),
    ],
)
def test_bad_flags_are_refused(use, tmp_path, flags, message):
    use(tiny_study())
    with pytest.raises(ValueError, match=message):
        runner.run(runner.Flags("tiny.py", out=str(tmp_path), **flags), COMMAND)


def changed(study, name, **fields):
    trial = dataclasses.replace(study.trials[name], **fields)
    return dataclasses.replace(study, trials={**study.trials, name: trial})


def claim(study, **fields):
    return dataclasses.replace(study, claims=(dataclasses.replace(study.claims[0], **fields),))


def protocol(study, **fields):
    return dataclasses.replace(study, protocol=dataclasses.replace(study.protocol, **fields))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda study: dataclasses.replace(study, trials={}), "study.trials is empty"),
        (lambda study: dataclasses.replace(study, standard="plain"), "study.standard='plain'"),
        (
            lambda study: dataclasses.replace(
                study, trials={**study.trials, "a/b": study.trials["searched"]}
            ),
            r"study.trials\['a/b'\]: a name has letters",
        ),
        (lambda study: changed(study, "gfa", seeds=()), r"\['gfa'\].seeds=\(\)"),
        (lambda study: changed(study, "gfa", seeds=(1, 1)), r"seeds=\(1, 1\) must be different"),
        (
            lambda study: changed(
                study,
                "gfa",
                config=dataclasses.replace(
                    tiny(), data=dataclasses.replace(tiny().data, num_validation=0)
                ),
            ),
            "num_validation=0: without a validation split",
        ),
        (
            lambda study: changed(study, "gfa", config=tiny(gfa=GFAConfig(form="logg"))),
            r"study.trials\['gfa'\]: config.gfa.form='logg'",
        ),
        (lambda study: protocol(study, honest_attacks=""), "protocol.honest_attacks is empty"),
        (lambda study: protocol(study, diagnostics="quik"), "protocol.diagnostics='quik'"),
        (lambda study: protocol(study, batch_size=0), "study.protocol.batch_size=0"),
        (lambda study: protocol(study, paper_attacks="pgd:num_steps=0"), "num_steps=0"),
        (
            lambda study: protocol(study, validation_attacks="apgd-feature-tangential"),
            "validation_attacks: 'apgd-feature-tangential' needs features",
        ),
        (
            lambda study: protocol(study, validation_attacks="deepfool"),
            "validation_attacks: 'deepfool' succeeds at any distance",
        ),
        (
            lambda study: protocol(study, paper_distances="pgd"),
            "paper_distances: 'pgd' does not look for the smallest",
        ),
        (lambda study: changed(study, "gfa", label="plain"), "labels of tested trials must differ"),
        (
            lambda study: changed(
                study, "gfa", config=dataclasses.replace(tiny(), threat=ThreatConfig(epsilon=0.2))
            ),
            r"study.trials\['gfa'\].config.threat .*one table cannot hold both",
        ),
        (
            lambda study: changed(
                study,
                "gfa",
                config=dataclasses.replace(
                    tiny(), data=dataclasses.replace(tiny().data, num_validation=100)
                ),
            ),
            r"config.data is digits with num_validation=100, that of 'standard' digits with",
        ),
        (lambda study: protocol(study, paper_attacks="pgdd"), "'pgdd'"),
        (lambda study: protocol(study, distance_norm="l3"), "study.protocol.distance_norm='l3'"),
        (lambda study: claim(study, ours="nobody"), "claim.ours='nobody'"),
        (lambda study: claim(study, ours="searched"), "'searched' is a trial that is not tested"),
        (lambda study: claim(study, attack="pgd"), "claim.attack='pgd'"),
        (lambda study: claim(study, measure="distance"), "claim.attack='fgsm'"),
        (lambda study: claim(study, measure="length"), "claim.measure='length'"),
    ],
)
def test_studies_that_do_not_fit_are_refused(change, message):
    plan.validate(tiny_study())
    with pytest.raises(ValueError, match=message):
        plan.validate(change(tiny_study()))


def test_studies_are_files(tmp_path):
    study = load_study("configs/study/cifar10.py")
    assert study.standard in study.trials
    with pytest.raises(FileNotFoundError, match=r"study='nowhere.py' does not exist"):
        load_study("nowhere.py")
    file = tmp_path / "other.py"
    file.write_text("x = 1")
    with pytest.raises(ValueError, match=r"has no get_study\(\)"):
        load_study(str(file))
    file.write_text("def get_study():\n    return 1")
    with pytest.raises(ValueError, match="returns int, not gfa_jax.study.Study"):
        load_study(str(file))


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
    far["validation"] = {"environment": {"jax": "2", "python": "3", "devices": "1 x cpu"}}
    far["validation"] |= {"clean_accuracy": 0.9, "num_examples": 20}
    far["validation"]["robust_accuracy"] = {"fgsm": 0.5, "pgd:num_steps=2": 0.4}
    far["distances"]["minimum_norm"]["deepfool:num_steps=20"] = {
        "mean_of_successes": 1.25,
        "success_rate": 0.5,
    }
    second = json.loads(json.dumps(one)) | {"seed": 3}
    second["test"]["clean_accuracy"] = 0.7
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
    assert "**20.0 (8.1-41.6)** | **D1**, D2 fail; not measured: D5 |" in aligned
    assert "with jax 1, Python 3, 1 x cpu; jax 2, Python 3, 1 x cpu." in text
    assert "epsilon 8/255" in text
    # Of the seed that both have: Newcombe's interval of 10 in 20 against 10 in 20.
    verdict = "| +99 points | +0.0 points (50.0 against 50.0) | -28.4 to +28.4 | 1 | no | 20.0 and"
    assert verdict in text
    assert "| 0 times | 2.5 times; 50 and 100 % found | - | 1 | yes | 20.0 and 20.0 |" in text
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
    lines = page._claims(study, gathered, {name: some for name, some in judged.items() if some})
    assert expected in lines[0]


def test_radii_are_compared_image_by_image():
    promised = [0.1, 0.2, 0.4, 0.0, 0.5]
    found = [0.2, 0.2, 0.2, 0.1, None]  # Nothing found is farther than all.
    whole = {"radii": {"norm": "linf", "linear": promised[:4], "measured": found[:4]}}
    last = {"radii": {"norm": "linf", "linear": promised[4:], "measured": found[4:]}}
    lines = page._radii_table(tiny_study(), {"standard": [whole, last], "gfa": [last]})
    table = lines[0].splitlines()
    assert "promised beyond 38.25/255" in table[0]
    # Ratios 2, 1, 1/2 and infinity; three of five are promised beyond .15, four found.
    assert table[2] == "| plain | 5 | 0.2000 | 0.2000 | 1.50 (0.50-inf) | 60 % | 80 % |"
    assert table[3] == "| aligned | 1 | - | - | - | - | - |"


def test_surfaces_of_dead_networks_are_left_out():
    whole = {"lengths": [-1, 1], "median_log_odds": [[-1.0, 0.5], [2.0, 3.0]]}
    dead = {"lengths": [-1, 1], "median_log_odds": [[-1.0, None], [2.0, 3.0]]}
    series = {
        label: [{"test": {} if surface is None else {"loss_surface": surface}}]
        for label, surface in (("whole", whole), ("dead", dead), ("never broken", None))
    }
    assert figures.surfaces(series)
    del series["whole"]
    assert figures.surfaces(series) is None


def test_help_and_a_missing_study(capsys):
    from gfa_jax.study import __main__

    with pytest.raises(SystemExit) as stop:
        __main__.main(["--study", "nowhere.py"])
    assert "study='nowhere.py' does not exist" in textwrap.dedent(
        str(stop.value) + capsys.readouterr().err
    )
