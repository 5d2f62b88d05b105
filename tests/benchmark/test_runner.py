"""The command measures what is asked for, goes on, and refuses what it cannot mean."""

import json

import pytest

from gfa_jax.benchmark import __main__ as command
from gfa_jax.benchmark import runner, tables

SMALL = {
    "models": "cnn4",
    "image_size": 8,
    "channels": 1,
    "batch_sizes": "8",
    "rounds": 2,
    "samples": 1,
    "sample_seconds": 1e-3,
}


def flags(out, **changes):
    return runner.Flags(out=str(out), **(SMALL | {"steps": "standard,gfa_input"} | changes))


def test_steps_and_attacks_are_measured_once(tmp_path):
    results = runner.run(flags(tmp_path, attacks="fgsm"), "the command")
    assert [(group["kind"], group["names"]) for group in results["groups"]] == [
        ("step", ["standard", "gfa_input"]),
        ("attack", ["fgsm"]),
    ]
    stored = json.loads((tmp_path / "results.json").read_text())
    assert stored == results
    page = (tmp_path / "results.md").read_text()
    assert "`the command`" in page
    assert "| gfa_input |" in page
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
    standard, aligned = tables.rows(results["groups"][0])
    assert standard["summary"].ratio == standard["floor"] == standard["memory_ratio"] == 1
    program = results["groups"][0]["programs"][1]
    assert aligned["examples_per_second"] == pytest.approx(8 / aligned["summary"].median)
    assert aligned["flops_per_second"] == pytest.approx(
        program["flops"] / aligned["summary"].median
    )

    again = runner.run(flags(tmp_path, attacks="fgsm"), "again")
    assert again == results
    more = runner.run(flags(tmp_path, batch_sizes="8,16"), "more")
    assert more["groups"][:2] == results["groups"]
    assert [group["batch_size"] for group in more["groups"]] == [8, 8, 16]
    with pytest.raises(ValueError, match="rounds"):
        runner.run(flags(tmp_path, rounds=3), "other")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": "cnn5"}, "model='cnn5' is not one of"),
        ({"dtypes": "float16"}, "dtypes='float16' is not one of"),
        ({"precision": "low"}, "precision='low' is not one of"),
        ({"batch_sizes": "0"}, "batch_sizes='0' must be positive multiples"),
        ({"batch_sizes": "six"}, "batch_sizes='six' must be positive multiples"),
        ({"batch_sizes": "6"}, "number of devices, 4"),
        ({"rounds": 0}, "rounds=0"),
        ({"sample_seconds": 0}, "sample_seconds=0"),
        ({"peak_flops": -1.0}, "peak_flops=-1"),
        ({"steps": "gafa"}, "steps='gafa' is unknown"),
        ({"steps": "", "attacks": ""}, "leave nothing to measure"),
        ({"attacks": "pdg"}, "pdg"),
        ({"attacks": "fgsm,autoattack"}, "attacks='autoattack' is an ensemble"),
        ({"models": "cnn4,cnn7"}, "needs images of at least 20x20"),
        ({"num_classes": 1}, "num_classes=1 must be at least 2"),
        ({"norm": "l3"}, "norm='l3'"),
        ({"epsilon": -1.0}, "epsilon=-1"),
        ({"configs": "missing.py"}, "config file 'missing.py' does not exist"),
    ],
)
def test_bad_flags_are_refused_before_anything_is_written(tmp_path, changes, message):
    with pytest.raises((ValueError, OSError), match=message):
        runner.run(flags(tmp_path / "out", **changes), "")
    assert not (tmp_path / "out").exists()


def test_the_command_prints_the_page(tmp_path, capsys):
    arguments = [f"--{name}={value}" for name, value in SMALL.items()]
    command.main([*arguments, "--steps=standard", f"--out={tmp_path}"])
    printed = capsys.readouterr().out
    assert "# Compiled throughput" in printed
    assert "python -m gfa_jax.benchmark --models=cnn4" in printed
    assert printed.count("| standard |") == 1
