"""No change makes a step dearer unseen: operations, memory and traces are those that are stored."""

import json
import pathlib
import subprocess
import sys

import pytest

from benchmarks import guard

ROOT = pathlib.Path(__file__).parents[2]


QUICK = ("cnn6/standard", "cnn6/gfa", "cnn6/gfa_finite_difference", "preact_resnet18/gfa")
"""They have most of what the others are made of."""


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(QUICK, id="some"),
        pytest.param(guard.NAMES, id="all", marks=pytest.mark.slow),
    ],
)
def test_compiled_steps_need_what_is_stored(names):
    done = subprocess.run(
        [sys.executable, "benchmarks/guard.py", "--steps", ",".join(names)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines() == [f"{name}: as stored" for name in names]


def test_gfa_costs_twice_a_standard_step():
    """The floor of the method, from the stored figures: a double backward pass and no more."""
    stored = json.loads(guard.PATH.read_text())
    for model in guard.TASKS:
        ratio = stored[f"{model}/gfa"]["flops"] / stored[f"{model}/standard"]["flops"]
        assert 1.9 < ratio < 2.1, model


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, []),
        ({"flops": 101}, ["flops: 101 where 100 is stored"]),
        ({"traces": 2}, ["traces: 2 where 1 is stored"]),
        ({"memory_bytes": 1040}, []),
        ({"memory_bytes": 1060}, ["memory_bytes: 1,060 where 1,000 is stored"]),
        ({"memory_bytes": 900}, ["memory_bytes: 900 where 1,000 is stored"]),
    ],
)
def test_differences_are_named(change, said):
    stored = {"flops": 100, "traces": 1, "memory_bytes": {"0.10.2": 1000}}
    found = {"flops": 100, "traces": 1, "memory_bytes": 1000} | change
    assert guard.differences(stored, found, "0.10.2") == said
    unknown = [text for text in said if not text.startswith("memory")]
    assert guard.differences(stored, found, "0.99") == unknown
