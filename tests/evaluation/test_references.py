"""Other models' evaluations as a yardstick: their images as an attack, and what is refused."""

import json
import shutil

import numpy as np
import pytest

from gfa_jax import ThreatModel
from gfa_jax.evaluation import diagnostics, evaluate_model, references, subject

RNG = np.random.default_rng(0)
IMAGES = RNG.uniform(0.2, 0.8, size=(20, 3, 3, 1)).astype(np.float32)
WEIGHTS = RNG.normal(size=(9, 3)).astype(np.float32)
THREAT = ThreatModel("linf", 0.05)


def linear(weights, inputs):
    return (inputs - 0.5).reshape(len(inputs), -1) @ weights


def rounded(weights, inputs):
    """The same logits, of an image whose pixels are rounded: without any gradient."""
    pixels = 0.5 + (inputs - 0.5).round(2)
    return linear(weights, pixels)


LABELS = np.argmax(linear(WEIGHTS, IMAGES), axis=1)


def evaluate(function, out, name, **options):
    options = {"attacks": "pgd:num_steps=5", "diagnostics": "off", "batch_size": 20, **options}
    return evaluate_model(
        function, IMAGES, LABELS, options.pop("threat", THREAT), out, variables=WEIGHTS,
        name=name, **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The evaluation of a model that hides nothing."""
    out = tmp_path_factory.mktemp("plain")
    return evaluate(linear, out, "plain"), out


@pytest.fixture(scope="module")
def masked(plain, tmp_path_factory):
    """The evaluation of one that hides its gradients, beside it."""
    out = tmp_path_factory.mktemp("masked")
    return evaluate(rounded, out, "masked", references=[plain[1]]), out


def by_id(results):
    return {entry["id"]: entry for entry in results["diagnostics"]}


def test_images_of_another_model_find_what_masked_gradients_hide(plain, masked):
    (open_results, _), (results, out) = plain, masked
    assert 0.2 < open_results["robust_accuracy"]["worst_case"] < 0.8
    robust = results["robust_accuracy"]
    assert robust["pgd:num_steps=5"] == results["clean_accuracy"] > 0.9
    assert robust["transfer:plain"] < 0.85
    assert robust["worst_case"] == robust["transfer:plain"]
    assert by_id(results)["D8"]["status"] == "FAIL"
    assert by_id(open_results)["D8"]["status"] == "NA"
    found = np.load(out / "adversarial.npz")
    np.testing.assert_array_equal(found["attacks"], ["pgd:num_steps=5", "transfer:plain"])
    assert len(found["rows"]) == round(20 * (results["clean_accuracy"] - robust["worst_case"]))
    assert results["verification"]["transfer:plain"] | {"num_successes": 0} == {
        "num_successes": 0, "not_misled": 0, "outside": 0, "other_distance": 0,
    }  # fmt: skip
    # One look at each image that there is, and no gradient.
    num_images = len(np.load(plain[1] / "adversarial.npz")["rows"])
    assert results["counts"]["transfer:plain"] == {
        "num_forwards": num_images, "num_backwards": 0, "num_zero_gradients": 0,
    }  # fmt: skip
    assert "transfer:plain" in (out / "report.html").read_text()


@pytest.mark.parametrize(("epsilon", "status"), [(0.2, "PASS"), (0.05, "WARN"), (None, "NA")])
def test_attacks_should_break_the_least_robust_of_them(epsilon, status, tmp_path):
    others = []
    if epsilon is not None:
        evaluate(linear, tmp_path / "other", "other", threat=ThreatModel("linf", epsilon))
        others = [tmp_path / "other"]
    results = evaluate(
        linear, tmp_path / "out", "own", references=others,
        threat=ThreatModel("linf", epsilon or 0.05),
    )  # fmt: skip
    assert by_id(results)["D24"]["status"] == status


def test_only_what_lies_in_the_ball_counts(plain):
    model = subject.from_function(linear, IMAGES, LABELS, variables=WEIGHTS, name="again")
    (other,) = references.load([plain[1]], model, THREAT)
    everything = np.ones(20, bool)
    outcome, images = references.transfer(other, model, THREAT, 20, everything)
    # The model that they were made on.
    np.testing.assert_array_equal(np.flatnonzero(outcome["success"]), other.rows)
    np.testing.assert_array_equal(images[other.rows], other.images)
    np.testing.assert_allclose(outcome["distance"][other.rows], 0.05, rtol=1e-4)

    rest = everything.copy()
    rest[other.rows[0]] = False
    outcome, _ = references.transfer(other, model, THREAT, 20, rest)
    np.testing.assert_array_equal(np.flatnonzero(outcome["success"]), other.rows[1:])

    small = ThreatModel("linf", 0.04)
    (other,) = references.load([plain[1]], model, small)
    assert other.worst_case is None
    outcome, images = references.transfer(other, model, small, 20, everything)
    assert not outcome["success"].any()
    assert not outcome["num_forwards"].any()
    np.testing.assert_array_equal(images, IMAGES)


def test_probes_are_compared_with_theirs(plain, tmp_path, monkeypatch):
    out = tmp_path / "probed"
    shutil.copytree(plain[1], out)
    results = json.loads((out / "results.json").read_text())
    results |= {"name": "probed", "probes": {"D15": {"mean": 0.25}}}
    (out / "results.json").write_text(json.dumps(results))
    given = {}

    def diagnose(*args, **kwargs):
        given.update(kwargs)
        return judge(*args, **kwargs)

    judge = diagnostics.diagnose
    monkeypatch.setattr(diagnostics, "diagnose", diagnose)
    evaluate(linear, tmp_path / "own", "own", references=[plain[1], out])
    assert given["references"] == {"plain": {}, "probed": {"D15": {"mean": 0.25}}}
    worst = plain[0]["robust_accuracy"]["worst_case"]
    assert given["reference_accuracies"] == {"plain": worst, "probed": worst}


def test_refusals_come_before_any_attack(plain, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(FileNotFoundError, match=r"references: .*nowhere.* holds no results.json"):
        evaluate(linear, out, "own", references=[tmp_path / "nowhere"])
    with pytest.raises(ValueError, match=r"evaluated in linf; expected l2"):
        evaluate(linear, out, "own", references=[plain[1]], threat=ThreatModel("l2", 0.1))
    with pytest.raises(ValueError, match=r"two of the evaluations .* 'plain'"):
        evaluate(linear, out, "own", references=[plain[1], plain[1]])
    model = subject.from_function(linear, IMAGES[:19], LABELS[:19], variables=WEIGHTS)
    with pytest.raises(ValueError, match="other examples.*num_examples"):
        references.load([plain[1]], model, THREAT)
    damaged = tmp_path / "damaged"
    for name in ("results.json", "adversarial.npz"):
        shutil.copytree(plain[1], damaged)
        (damaged / name).write_bytes((damaged / name).read_bytes()[:100])
        with pytest.raises(ValueError, match="references: the results in .*damaged.* are damaged"):
            evaluate(linear, out, "own", references=[damaged])
        shutil.rmtree(damaged)
    shutil.copytree(plain[1], damaged)
    (damaged / "results.json").write_text("{}")
    with pytest.raises(ValueError, match="lack data, name, robust_accuracy, threat"):
        evaluate(linear, out, "own", references=[damaged])
    assert not out.exists()


def test_a_finished_evaluation_takes_references_without_repeating_attacks(plain, tmp_path):
    alone = evaluate(rounded, tmp_path, "masked")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "records").rglob("*.npz")}
    beside = evaluate(rounded, tmp_path, "masked", references=[plain[1]])
    assert before == {
        path: path.stat().st_mtime_ns for path in (tmp_path / "records").rglob("*.npz")
    }
    assert "transfer:plain" not in alone["robust_accuracy"]
    assert "transfer:plain" in json.loads((tmp_path / "results.json").read_text())["intervals"]
    assert beside["robust_accuracy"]["worst_case"] < alone["robust_accuracy"]["worst_case"]
