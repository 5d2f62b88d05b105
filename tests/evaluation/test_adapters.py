"""The examples of docs/adapters.md that evaluate, run as they stand there."""

import functools
import json
import pathlib
import re

import numpy as np
import pytest

from gfa_jax import evaluation

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "adapters.md"
PART = re.search(r"^## Evaluating\n(.*?)^## ", PAGE.read_text(), re.M | re.S)[1]
BLOCKS = dict(re.findall(r"^### ([^\n]+)\n+```python\n(.*?)^```", PART, re.M | re.S))
MODULES = {"Flax linen": "flax", "Flax nnx": "flax", "Equinox": "equinox", "Haiku": "haiku"}


def test_every_framework_has_an_example():
    assert set(BLOCKS) == set(MODULES)


@pytest.mark.parametrize(
    "framework",
    # One of them shows that an evaluation takes any function; the others compile as long.
    [
        name if name == "Flax linen" else pytest.param(name, marks=pytest.mark.slow)
        for name in MODULES
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_example_evaluates_its_model(framework, tmp_path, monkeypatch):
    pytest.importorskip(MODULES[framework], reason=f"{framework} is an extra of the tests")
    without_diagnostics = functools.partial(evaluation.evaluate_model, diagnostics="off")
    if framework != "Flax linen":
        # Diagnostics see the same function of arrays, whatever it comes from, and compile long.
        monkeypatch.setattr(evaluation, "evaluate_model", without_diagnostics)
    rng = np.random.default_rng(0)
    images = rng.uniform(size=(12, 8, 8, 1)).astype(np.float32)
    names = {"images": images, "labels": np.zeros(12, np.int32), "folder": tmp_path / "zeros"}
    example = compile(BLOCKS[framework], str(PAGE), "exec")
    exec(example, names)
    results = names["results"]
    assert results["name"] == framework.split()[-1].lower()
    assert json.loads((tmp_path / "zeros" / "results.json").read_text()) == results
    outcomes = np.load(tmp_path / "zeros" / "outcomes.npz")
    np.testing.assert_array_equal(outcomes["clean_correct"], outcomes["predicted"] == 0)
    # The classes that the untrained model predicts are right by definition.
    labels = outcomes["predicted"].astype(int)
    labels[0] = (labels[0] + 1) % 10
    monkeypatch.setattr(evaluation, "evaluate_model", without_diagnostics)
    exec(example, {**names, "labels": labels, "folder": tmp_path / "predicted"})
    again = json.loads((tmp_path / "predicted" / "results.json").read_text())
    assert again["clean_accuracy"] == pytest.approx(11 / 12)
    assert again["robust_accuracy"]["worst_case"] < 11 / 12
    assert again["weights_hash"] == results["weights_hash"]
