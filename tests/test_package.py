"""The package as a user meets it: lazy imports, the README's example, the two scripts."""

import pathlib
import re
import subprocess
import sys

import jax
import pytest

ROOT = pathlib.Path(__file__).parents[1]


def test_importing_the_package_loads_no_data_plots_or_checkpoints():
    heavy = ("tensorflow_datasets", "sklearn", "matplotlib", "orbax", "tyro", "PIL", "jinja2")
    code = f"import sys, gfa_jax; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    # flax itself loads orbax for its deprecated checkpoints.
    assert set(eval(done.stdout)) <= {"orbax"}


def test_the_examples_of_the_readme_run():
    text = (ROOT / "README.md").read_text()
    examples = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    names: dict = {}
    for example in examples:  # the second builds on the first
        exec(compile(example, "README.md", "exec"), names)
    assert names["alignment"].shape == (32,)
    assert names["result"].success.shape == (32,)
    assert jax.tree.structure(names["steps"]) == jax.tree.structure(names["params"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train.py", "--config", "configs/none.py", "--workdir", "x"], "does not exist"),
        (["train.py", "--config", "configs/smoke.py"], "workdir"),
        (["eval.py", "--workdir", "nowhere"], "holds no run"),
        (["eval.py", "--wrokdir", "nowhere"], "workdir"),
        (["-m", "gfa_jax.evaluation.compare", "nowhere"], "holds no results.json"),
        (["-m", "gfa_jax.data.prepare", "cifar11"], "cifar10"),
    ],
)
def test_a_wrong_command_ends_with_a_plain_message(arguments, message):
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 2
    assert message in done.stderr + done.stdout
    assert "Traceback" not in done.stderr
