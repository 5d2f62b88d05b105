"""The user's own regulariser of docs/objectives.md, run as it stands there beside GFA."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "objectives.md").read_text()
FILES = dict(re.findall(r"^```python\n# (my_\w+\.py)\n(.*?)^```", PAGE, re.M | re.S))
SHORT = ["--config.train_steps=6", "--config.loop.log_every=2", "--config.model.width=0.25"]


def run(folder, script, *arguments):
    # Not the project's folder: the user's own, where the files lie.
    return subprocess.run(
        [sys.executable, str(ROOT / script), *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def folder(tmp_path):
    assert set(FILES) == {"my_regularizers.py", "my_config.py"}
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def test_the_page_trains_and_evaluates(folder):
    """With GFA, by file name; the evaluation does without the file."""
    done = run(folder, "train.py", "--config=my_config.py", "--workdir=run", *SHORT)
    assert done.returncode == 0, done.stderr
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    last = [row for row in rows if "train/confidence_penalty" in row][-1]
    assert last["train/confidence_penalty"] > 0
    assert last["train/alignment_penalty"] > 0
    total = (
        last["train/cross_entropy"]
        + last["train/alignment_weight"] * last["train/alignment_penalty"]
        + last["train/confidence_weight"] * last["train/confidence_penalty"]
    )
    assert last["train/loss"] == pytest.approx(total, rel=1e-4)
    assert last["train/confidence_weight"] == pytest.approx(0.01)
    (folder / "my_regularizers.py").unlink()
    done = run(
        folder,
        "eval.py",
        "--workdir=run",
        "--attacks=fgsm",
        "--diagnostics=off",
        "--num_examples=20",
    )
    assert done.returncode == 0, done.stderr


def test_a_misspelt_function_is_one_line_and_writes_nothing(folder):
    done = run(
        folder,
        "train.py",
        "--config=my_config.py",
        "--workdir=run",
        "--config.regularizers.0.name=my_regularizers.py:confidnce",
    )
    assert done.returncode == 2
    assert "has no function 'confidnce'. Did you mean 'confidence'" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (folder / "run").exists()
