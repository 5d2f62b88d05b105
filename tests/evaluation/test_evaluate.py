"""The evaluation end to end on a tiny run: results, records, resuming, reports, comparison,
refusals."""

import dataclasses
import hashlib
import json
import re
import shutil

import numpy as np
import pytest

from configs import smoke
from gfa_jax import attacks, data
from gfa_jax.evaluation import compare, evaluate, loading, records, report
from gfa_jax.training import checkpoint, loop

SPECS = "fgsm,pgd-margin:num_steps=3:num_restarts=2"


def tiny_config():
    """A run of some steps."""
    base = smoke.get_config()
    return dataclasses.replace(
        base,
        train_steps=150,
        loop=dataclasses.replace(base.loop, eval_every=0, eval_attack_steps=0),
    )


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "tiny"
    loop.train_and_evaluate(tiny_config(), path)
    return path


def flags_for(workdir, out, **changes):
    defaults = {"attacks": SPECS, "num_examples": 50, "batch_size": 12, "diagnostics": "off"}
    return evaluate.EvalFlags(str(workdir), out=str(out), **{**defaults, **changes})


@pytest.fixture(scope="module")
def evaluated(workdir, tmp_path_factory):
    """Results and their folder."""
    out = tmp_path_factory.mktemp("eval")
    return evaluate.evaluate(flags_for(workdir, out)), out


def test_results_have_the_documented_fields(evaluated, workdir):
    results, out = evaluated
    assert json.loads((out / "results.json").read_text()) == results
    assert set(results["robust_accuracy"]) == {*SPECS.split(","), "worst_case"}
    worst = results["robust_accuracy"]["worst_case"]
    assert worst <= min(results["robust_accuracy"].values()) <= results["clean_accuracy"] <= 1
    assert results["threat"] == {"norm": "linf", "epsilon": 0.15, "bounds": [0.0, 1.0]}
    assert results["num_examples"] == 50
    assert results["checkpoint_step"] == 150
    assert results["weights_hash"] == loading.load_run(workdir).weights_hash
    counts = results["counts"]["pgd-margin:num_steps=3:num_restarts=2"]
    # What is misclassified already is looked at once.
    num_attacked = round(50 * results["clean_accuracy"])
    assert 0 < num_attacked < 50
    assert counts["num_forwards"] == 50 + num_attacked * 2 * 4
    assert counts["num_backwards"] == num_attacked * 2 * 3
    assert {"versions", "precision", "seconds", "diagnostics", "minimum_norm"} <= set(results)


def test_the_validation_split_has_a_folder_of_its_own(workdir):
    flags = evaluate.EvalFlags(
        str(workdir),
        attacks="fgsm",
        split="validation",
        num_examples=24,
        batch_size=12,
        diagnostics="off",
    )
    results = evaluate.evaluate(flags)
    assert results["data"]["split"] == "validation"
    assert not (workdir / "eval").exists()
    outcomes = np.load(workdir / "eval-validation" / "outcomes.npz", allow_pickle=False)
    config = tiny_config().data
    held_out = data.load(config.name, "validation", num_validation=config.num_validation)
    np.testing.assert_array_equal(outcomes["ids"], held_out.ids[:24])
    with pytest.raises(ValueError, match="split='train' is not one of"):
        evaluate.evaluate(dataclasses.replace(flags, split="train"))


def test_accuracies_are_those_of_the_records(evaluated):
    results, out = evaluated
    robust = None
    for spec in SPECS.split(","):
        folder = out / "records" / spec.replace(":", "_")
        parts = [np.load(path, allow_pickle=False) for path in sorted(folder.glob("*.npz"))]
        assert [len(part["ids"]) for part in parts] == [48, 2]
        assert not list(folder.glob("*.parts"))
        success = np.concatenate([part["success"] for part in parts])
        distance = np.concatenate([part["distance"] for part in parts])
        assert np.all(distance <= 0.15 * (1 + 1e-5))
        robust = ~success if robust is None else robust & ~success
    assert results["robust_accuracy"]["worst_case"] == pytest.approx(robust.mean())
    low, high = results["intervals"]["worst_case"]
    assert low <= robust.mean() <= high


def test_outcomes_and_adversarial_images_tell_what_happened_to_each_example(evaluated, workdir):
    results, out = evaluated
    outcomes = np.load(out / "outcomes.npz", allow_pickle=False)
    found = np.load(out / "adversarial.npz", allow_pickle=False)
    run = loading.load_run(workdir, num_examples=50)
    np.testing.assert_array_equal(outcomes["ids"], run.test_set.ids)
    np.testing.assert_array_equal(outcomes["labels"], run.test_set.labels)
    right, robust = outcomes["clean_correct"], outcomes["worst_case"]
    assert right.mean() == pytest.approx(results["clean_accuracy"])
    np.testing.assert_array_equal(right, outcomes["predicted"] == outcomes["labels"])
    rows = found["rows"]
    np.testing.assert_array_equal(rows, np.flatnonzero(right & ~robust))
    assert len(rows) > 3
    names = SPECS.split(",")
    np.testing.assert_array_equal(found["attacks"], names)
    # The first attack in order is named, and its own image kept.
    broken = np.stack([right & ~outcomes[f"robust/{name}"] for name in names])
    np.testing.assert_array_equal(found["attack"], np.argmax(broken[:, rows], axis=0))
    assert results["first_broken_by"] == {
        name: np.sum(found["attack"] == number) for number, name in enumerate(names)
    }
    logits = run.apply(run.params, run.model_state, {}, found["images"])[0]
    np.testing.assert_array_equal(np.argmax(logits, axis=1), found["reached"])
    assert np.all(found["reached"] != run.test_set.labels[rows])
    assert np.all(found["margin"] >= 0)
    for field in ("num_forwards", "num_backwards"):
        counts = np.stack([outcomes[f"{field}/{name}"] for name in names])
        assert {name: int(row.sum()) for name, row in zip(names, counts, strict=True)} == {
            name: results["counts"][name][field] for name in names
        }
        np.testing.assert_array_equal(found[field], counts[found["attack"], rows])
    change = np.abs(found["images"] - run.test_set.images[rows]).max(axis=(1, 2, 3))
    np.testing.assert_allclose(change, found["distance"], atol=1e-6)
    assert change.max() <= 0.15 * (1 + 1e-5)
    for name in names:
        assert results["verification"][name] == {
            "num_successes": 50 - np.sum(outcomes[f"robust/{name}"]),
            "not_misled": 0,
            "outside": 0,
            "other_distance": 0,
        }


def test_one_attack_after_another_says_the_same_of_the_worst_case(evaluated, workdir, tmp_path):
    results, out = evaluated
    sequential = evaluate.evaluate(flags_for(workdir, tmp_path, mode="sequential"))
    assert sequential["robust_accuracy"]["worst_case"] == results["robust_accuracy"]["worst_case"]
    first, second = SPECS.split(",")
    alone, after = np.load(out / "outcomes.npz"), np.load(tmp_path / "outcomes.npz")
    np.testing.assert_array_equal(after["worst_case"], alone["worst_case"])
    # The second attack sees what the first left, and costs as much less.
    np.testing.assert_array_equal(after[f"attacked/{second}"], alone[f"robust/{first}"])
    assert sequential["counts"][second]["num_forwards"] < results["counts"][second]["num_forwards"]
    assert sequential["robust_accuracy"][second] == sequential["robust_accuracy"]["worst_case"]
    assert sequential["first_broken_by"] == results["first_broken_by"]


def test_a_second_evaluation_finds_its_programs_again(evaluated, workdir, tmp_path, monkeypatch):
    def apply(*args):
        raise AssertionError("the network is traced again")

    monkeypatch.setattr(loading, "apply", apply)
    again = evaluate.evaluate(flags_for(workdir, tmp_path))
    assert again["robust_accuracy"] == evaluated[0]["robust_accuracy"]
    assert again["layers"] == evaluated[0]["layers"]


def test_more_examples_take_over_whole_chunks(evaluated, workdir, tmp_path, monkeypatch):
    evaluate.evaluate(flags_for(workdir, tmp_path))
    saved = []
    save = records.Records.save

    def count(self, attack, first, last, record):
        saved.append((attack, first, last))
        save(self, attack, first, last, record)

    monkeypatch.setattr(records.Records, "save", count)
    evaluate.evaluate(flags_for(workdir, tmp_path, num_examples=60))
    assert saved == [(spec, 48, 59) for spec in SPECS.split(",")]
    again = np.load(tmp_path / "outcomes.npz")
    before = np.load(evaluated[1] / "outcomes.npz")
    for name in before.files:
        np.testing.assert_array_equal(again[name][:48], before[name][:48], name)


def test_minimum_norms_ensembles_and_feature_attacks(workdir, tmp_path):
    custom = "autoattack:version=custom:members=apgd-ce+square:num_steps=3:num_queries=5"
    features = "apgd-feature-tangential:num_steps=2:layers=block_0"
    flags = flags_for(workdir, tmp_path, attacks=f"deepfool:num_steps=10,{custom},{features}")
    results = evaluate.evaluate(flags)
    parts = [np.load(path) for path in sorted((tmp_path / "records").glob("deepfool*/*.npz"))]
    assert len(parts) == 2
    success, distance = (
        np.concatenate([part[name] for part in parts]) for name in ("success", "distance")
    )
    # DeepFool succeeds at any distance; robustness counts what lies within epsilon.
    robust = ~(success & (distance <= 0.15))
    assert results["robust_accuracy"]["deepfool:num_steps=10"] == pytest.approx(robust.mean())
    found = results["minimum_norm"]
    assert set(found) == {"deepfool:num_steps=10"}
    right = ~(success & (distance == 0))
    assert right.mean() == pytest.approx(results["clean_accuracy"])
    cdf = np.array(found["deepfool:num_steps=10"].pop("cdf"))
    assert np.all(np.diff(cdf, axis=0) >= 0)
    np.testing.assert_allclose(cdf[-1], [distance[right & success].max(), success[right].mean()])
    assert found["deepfool:num_steps=10"] == {
        "norm": "linf",
        "num_examples": right.sum(),
        "success_rate": pytest.approx(success[right].mean()),
        "median": pytest.approx(np.median(np.where(success, distance, np.inf)[right])),
        "mean_of_successes": pytest.approx(distance[right & success].mean()),
    }
    page = (tmp_path / "report.html").read_text()
    assert "<h2>Smallest perturbations</h2>" in page
    assert f"within {custom}: apgd-ce" in page
    broken = results["members"][custom]
    assert set(broken) == {"apgd-ce", "square"}
    share = results["clean_accuracy"] - results["robust_accuracy"][custom]
    assert sum(broken.values()) == round(50 * share)
    # Square counts within an ensemble, too.
    (black_box,) = (entry for entry in results["diagnostics"] if entry["id"] == "D5")
    assert black_box["value"] == broken["square"] / 50


def test_geometry_covers_every_layer_and_curves_end_at_the_whole_box(evaluated):
    results, _ = evaluated
    assert next(iter(results["layers"])) == "normalize"
    assert len(results["layers"]) == 5
    for values in results["layers"].values():
        assert -1 <= values["alignment_mean"] <= 1
        assert values["radial_degree_median"] == pytest.approx(1, abs=1e-3)
    assert [curve["attack"].split(":")[0] for curve in results["curves"]] == ["apgd-ce", "square"]
    for curve in results["curves"]:
        points = curve["points"]
        assert points[0] == {"epsilon": 0.0, "accuracy": results["clean_accuracy"]}
        assert points[-1]["epsilon"] == 1.0
    surface = results["loss_surface"]
    heights = np.array(surface["median_log_odds"])
    assert heights.shape == (len(surface["lengths"]),) * 2
    origin, one = surface["lengths"].index(0.0), surface["lengths"].index(1.0)
    # Wrong where the attack ends, one epsilon along it, and less so at the image.
    assert heights[one, origin] > max(0, heights[origin, origin])
    directions = results["directions"]
    assert len(directions["lengths"]) == len(directions["median_log_odds"]["radial"])
    middle = directions["lengths"].index(0.0)
    assert len({round(curve[middle], 4) for curve in directions["median_log_odds"].values()}) == 1


@pytest.mark.parametrize("num_writes", [1, 4])
def test_a_stopped_evaluation_goes_on_where_it_was(
    num_writes, evaluated, workdir, tmp_path, monkeypatch
):
    results, out = evaluated
    flags = flags_for(workdir, tmp_path)
    write, written = records._write, []

    def write_some(path, arrays):
        if len(written) == num_writes:
            raise KeyboardInterrupt
        written.append(path)
        write(path, arrays)

    monkeypatch.setattr(records, "_write", write_some)
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate(flags)
    assert not (tmp_path / "results.json").exists()
    first_written, again = list(written), []

    def write_counted(path, arrays):
        again.append(path)
        write(path, arrays)

    monkeypatch.setattr(records, "_write", write_counted)
    resumed = evaluate.evaluate(flags)
    assert not set(again) & set(first_written)
    assert {k: v for k, v in resumed.items() if k != "seconds"} == {
        k: v for k, v in results.items() if k != "seconds"
    }
    for name in ("outcomes", "adversarial"):
        one, other = (np.load(folder / f"{name}.npz") for folder in (tmp_path, out))
        assert one.files == other.files
        for field in one.files:
            np.testing.assert_array_equal(one[field], other[field], field)


def test_a_run_of_an_earlier_version_is_evaluated_as_it_was(evaluated, workdir, tmp_path):
    """Its config lacks later sections, and stays as it is: so do the records' fingerprints."""
    old = tmp_path / "old"
    shutil.copytree(workdir, old)
    content = json.loads((old / "config.json").read_text())
    for section in ("loss", "regularizers", "noise"):
        del content["config"][section]
    (old / "config.json").write_text(json.dumps(content))
    results = evaluate.evaluate(flags_for(old, tmp_path / "out"))
    assert results["config"] == content["config"]
    assert results["robust_accuracy"] == evaluated[0]["robust_accuracy"]
    header = next((tmp_path / "out" / "records").glob("*.json"))
    digest = hashlib.sha256(json.dumps(content["config"], sort_keys=True).encode()).hexdigest()
    assert digest in header.read_text()


def test_a_full_disk_loses_nothing(evaluated, workdir, tmp_path, monkeypatch):
    write, written = records._write, []

    def write_until_full(path, arrays):
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        written.append(path)
        write(path, arrays)

    monkeypatch.setattr(records, "_write", write_until_full)
    with pytest.raises(OSError, match="No space left"):
        evaluate.evaluate(flags_for(workdir, tmp_path))
    kept = {path: path.read_bytes() for path in written if path.exists()}
    assert kept
    monkeypatch.setattr(records, "_write", write)
    resumed = evaluate.evaluate(flags_for(workdir, tmp_path))
    assert resumed["robust_accuracy"] == evaluated[0]["robust_accuracy"]


def test_diagnostics_are_quick_full_or_off(evaluated, workdir, tmp_path):
    off = {entry["id"]: entry["status"] for entry in evaluated[0]["diagnostics"]}
    assert off["D2"] == off["D20"] == "NA"
    assert off["D1"] != "NA"
    specs = "fgsm,apgd-ce:num_steps=5"
    results = evaluate.evaluate(
        flags_for(workdir, tmp_path, attacks=specs, diagnostics="quick", num_examples=24)
    )
    quick = {entry["id"]: entry["status"] for entry in results["diagnostics"]}
    for identifier in ("D2", "D7", "D9", "D12", "D14", "D17", "D20", "D22", "D23"):
        assert quick[identifier] != "NA", identifier
    assert results["binarization"]["attack"] == "apgd-ce:num_steps=5"
    assert results["probes"]


def test_records_of_another_evaluation_are_refused(evaluated, workdir):
    _, out = evaluated
    with pytest.raises(records.RecordsMismatchError, match=r"epsilon: 0.15 there, 0.1 now"):
        evaluate.evaluate(flags_for(workdir, out, epsilon=0.1))
    with pytest.raises(records.RecordsMismatchError, match="seed: 0 there, 5 now"):
        evaluate.evaluate(flags_for(workdir, out, seed=5))


def test_the_report_is_one_self_contained_page(evaluated):
    results, out = evaluated
    page = (out / "report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page
    assert "tiny: " in page
    # Sections of what was not measured are left out.
    assert "Loss around an image" in page
    assert "<h2>Smallest perturbations</h2>" not in page
    low, high = results["intervals"]["worst_case"]
    worst = results["robust_accuracy"]["worst_case"]
    text = re.sub("<[^>]*>", "", page)
    assert f"{100 * worst:.1f} ({100 * low:.1f}-{100 * high:.1f})" in text
    for entry in results["diagnostics"]:
        assert f"<td>{entry['id']}</td>" in page
    assert "<script" not in page


def test_names_in_the_report_are_escaped(evaluated, tmp_path):
    results, examples = report.load_evaluation(evaluated[1])
    path = tmp_path / "report.html"
    report.write_report([({**results, "name": "<script>alert(1)</script>"}, examples)], path)
    assert "<script>" not in path.read_text()


def test_compare_prints_one_table_and_refuses_what_does_not_compare(
    evaluated, workdir, tmp_path, capsys
):
    _, out = evaluated
    runs = compare.compare([str(out), str(out)], str(tmp_path / "both.html"))
    assert [run["name"] for run in runs] == [str(out), str(out)]
    report.print_table([{**run, "name": "tiny"} for run in runs])
    printed = capsys.readouterr().out
    assert printed.count("tiny") >= 2
    assert "worst case" in printed
    other = tmp_path / "other"
    evaluate.evaluate(flags_for(workdir, other, attacks="fgsm", num_examples=20))
    with pytest.raises(ValueError, match="evaluations differ in num_examples"):
        compare.compare([str(out), str(other)], str(tmp_path / "x.html"))
    with pytest.raises(FileNotFoundError, match=r"holds no results.json: run eval.py first"):
        compare.compare([str(tmp_path)], str(tmp_path / "x.html"))
    with pytest.raises(ValueError, match="evaluations is empty"):
        compare.compare([], "x.html")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"attacks": "pdg"}, ValueError, "attack='pdg'.*Did you mean 'pgd'"),
        (
            {"attacks": "pgd:num_step=3"},
            ValueError,
            "no option 'num_step'.*Did you mean 'num_steps'",
        ),
        ({"attacks": "pgd:fast"}, ValueError, "'fast' is not option=value"),
        ({"attacks": " , "}, ValueError, "names no attack"),
        ({"attacks": "fgsm:random_start=no"}, ValueError, "random_start=no must be true or false"),
        ({"attacks": "pgd:step_size=big"}, ValueError, "step_size=big must be a number"),
        ({"attacks": "pgd:num_steps=2.5"}, ValueError, "num_steps=2.5 must be an integer"),
        ({"attacks": "apgd-ce:estimator=x"}, ValueError, "estimator cannot be given as text"),
        ({"attacks": "autoattack:version=rand"}, ValueError, "attacks randomised models"),
        ({"norm": "l2"}, ValueError, "norm='l2' needs an epsilon of its own"),
        ({"attacks": "pgd:num_steps=0"}, ValueError, "num_steps=0 must be an integer >= 1"),
        ({"epsilon": -0.1}, ValueError, "epsilon=-0.1 must be"),
        ({"norm": "linff"}, ValueError, "norm='linff'.*Did you mean 'linf'"),
        ({"num_examples": 0}, ValueError, "num_examples=0"),
        ({"batch_size": -1}, ValueError, "batch_size=-1"),
        ({"mode": "parallel"}, ValueError, "mode='parallel' is not one of"),
        ({"diagnostics": "some"}, ValueError, "diagnostics='some' is not one of"),
        ({"checkpoint": "17"}, FileNotFoundError, r"checkpoint='17' does not exist.*\[150\]"),
    ],
)
def test_bad_flags_are_refused_before_anything_is_written(
    workdir, tmp_path, changes, error, message
):
    with pytest.raises(error, match=message):
        evaluate.evaluate(flags_for(workdir, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no run: config.json is missing"):
        evaluate.evaluate(evaluate.EvalFlags(str(tmp_path)))


def test_a_checkpoint_of_another_model_names_the_leaf(workdir, tmp_path):
    other = tmp_path / "run"
    other.mkdir()
    (other / "checkpoints").symlink_to(workdir / "checkpoints")
    saved = json.loads((workdir / "config.json").read_text())
    saved["config"]["model"]["width"] = 0.5
    (other / "config.json").write_text(json.dumps(saved))
    with pytest.raises(
        checkpoint.IncompatibleCheckpointError, match="params/block_0/conv/kernel has shape"
    ):
        loading.load_run(other)


def test_damaged_records_are_named(tmp_path):
    kept = records.Records(tmp_path, {"seed": 0})
    kept.save("pgd:loss=x/../y", 0, 3, {"success": np.zeros(4, bool)})
    files = list(tmp_path.rglob("*.npz"))
    assert [path.parent.parent for path in files] == [tmp_path]
    np.testing.assert_array_equal(kept.load("pgd:loss=x/../y", 0, 3)["success"], np.zeros(4, bool))
    assert kept.load("pgd", 0, 3) is None
    files[0].write_bytes(files[0].read_bytes()[:20])
    with pytest.raises(ValueError, match="is damaged.*delete it"):
        kept.load("pgd:loss=x/../y", 0, 3)


def test_attack_specs():
    assert evaluate.parse_attack("fgsm") == ("fgsm", {})
    name, options = evaluate.parse_attack(
        "pgd:num_steps=7:step_size=2/255:random_start=false:loss=dlr"
    )
    assert name == "pgd"
    assert options == {
        "num_steps": 7,
        "step_size": pytest.approx(2 / 255),
        "random_start": False,
        "loss": "dlr",
    }
    assert set(attacks.REGISTRY) >= {"fgsm", "pgd", "pgd-margin", "pgd-dlr"}
