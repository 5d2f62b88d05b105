"""Projections against closed forms, and the command on compiled programs of several sizes."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from configs import smoke
from gfa_jax.training import scaling
from gfa_jax.training.devices import DEVICES, Device, Hosts

ROOT = pathlib.Path(__file__).parents[2]
RING = Device({"default": 1e12}, 2e12, 1e9, Hosts(1e9, 1e8, launch=0.0, hop=1e-6, network_hop=5e-6))


def plan(num_devices, flops, num_bytes, num_times=1, forward=0.0):
    transfer = {"kind": "all-reduce", "size": num_devices, "stride": 1}
    transfer |= {"num_times": num_times, "num_bytes": num_bytes}
    return {
        "devices": num_devices,
        "flops": flops,
        "forward_flops": forward,
        "transfers": [transfer] if num_bytes else [],
    }


def test_without_communication_the_efficiency_is_one():
    free = scaling.project(plan(8, 8e12, 0), RING, 1e12, 0.5)
    assert free.step == free.overlapped_step == pytest.approx(2.0)
    assert free.efficiency == free.overlapped_efficiency == pytest.approx(1.0)


def test_efficiency_is_the_share_of_products():
    # A second of products, and as long in collectives.
    num_bytes = 8 / 14 * (1 - 14e-6) * 1e9
    half = scaling.project(plan(8, 8e12, num_bytes), RING, 1e12, 1.0)
    assert half.bandwidth + half.latency == pytest.approx(1.0)
    assert half.efficiency == half.overlapped_efficiency == pytest.approx(0.5)
    # Half as fast products make the same collectives a third of the step.
    slow = scaling.project(plan(8, 8e12, num_bytes), RING, 1e12, 0.5)
    assert slow.efficiency == pytest.approx(2 / 3)


def test_one_backward_pass_hides_bytes_but_no_latency():
    num_bytes = 8 / 14 * 1e9  # a second
    # Of a second of products, a backward pass is twice the forward's tenth.
    some = scaling.project(plan(8, 8e12, num_bytes, 10**5, 0.8e12), RING, 1e12, 1.0)
    assert some.bandwidth == pytest.approx(1.0)
    assert some.latency == pytest.approx(1.4)
    assert some.step == pytest.approx(3.4)
    assert some.overlapped_step == pytest.approx(3.2)
    # No more than all products, and no more than there is to hide.
    whole = scaling.project(plan(8, 8e12, num_bytes / 2, 10**5, 6e12), RING, 1e12, 1.0)
    assert whole.overlapped_step == pytest.approx(2.4)


def test_efficiency_falls_with_devices_and_with_utilisation():
    found = [
        scaling.project(plan(count, 8e12, 10**8, 1, 2e12), RING, 1e12, 1.0)
        for count in (1, 2, 8, 16, 64)
    ]
    for name in ("efficiency", "overlapped_efficiency"):
        values = [getattr(one, name) for one in found]
        assert values == sorted(values, reverse=True)
        assert values[0] == 1
        assert values[-1] < 0.5
    shares = [scaling.project(plan(8, 8e12, 10**8), RING, 1e12, u).efficiency for u in (0.2, 0.9)]
    assert shares[0] > shares[1]


def table(printed, num_rows):
    found = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in printed.splitlines()
        if line.startswith(("| weak", "| strong"))
    ]
    return found[:num_rows], found[num_rows:]


SMOKE = ("--config=configs/smoke.py", "--config.attack.name=none")


@pytest.mark.slow
def test_the_command_compiles_in_processes_of_their_own(tmp_path):
    """The caller touches no device: it works where JAX has none of the platform asked for."""
    command = [sys.executable, "-m", "gfa_jax.training.scaling", *SMOKE, "--devices=4,8"]
    done = subprocess.run(
        [*command, f"--out={tmp_path}/new"],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "no_such_platform"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    programs, projections = table(done.stdout, 4)
    # The recipe's 16 images over four devices are one program of both regimes.
    assert [row[:3] for row in programs] == [
        ["weak", "4", "16"],
        ["weak", "8", "32"],
        ["strong", "4", "16"],
        ["strong", "8", "16"],
    ]
    assert done.stderr.count("planned in") == 3
    flops = [float(row[3]) for row in programs]
    assert flops[0] == flops[1] == flops[2]  # of a device
    assert flops[3] == pytest.approx(flops[2] / 2, rel=0.01)
    # Gradients of both orders are reduced, each once, whatever the number of devices.
    assert {row[5] for row in programs} == {"1 all-reduce"}
    assert {row[6] for row in programs} == {programs[0][6]}
    assert all("images/s" in cell for row in projections for cell in row[2:])
    assert (tmp_path / "new" / "scaling.md").read_text() == done.stdout
    plans = json.loads((tmp_path / "new" / "plans.json").read_text())
    assert [row["plan"]["devices"] for row in plans] == [4, 8, 4, 8]
    traffic = plans[0]["plan"]["collectives"]["all-reduce"]["num_bytes"]
    # Beside both gradients, scalars and biases of the head, which only one of them has.
    assert 0 <= traffic - 2 * plans[0]["plan"]["parameter_bytes"] < 200


def fake(config, count):
    return {
        "devices": count,
        "flops": 1e9 * config.batch_size,
        "forward_flops": 3e8 * config.batch_size,
        "parameters": 10,
        "parameter_bytes": 40,
        "memory_bytes": 20e9,
        "collectives": {"all-reduce": {"num_times": 1, "num_bytes": 40}},
        "transfers": plan(count, 0, 40)["transfers"],
    }


def test_batches_that_cannot_be_split_are_said(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(scaling, "plan_for", fake)
    out = tmp_path / "plan.md"
    flags = ["--config=configs/smoke.py", "--devices=2,32", "--batch_per_device=3"]
    scaling.main([*flags, f"--out={out}"])
    printed = capsys.readouterr().out
    programs, projections = table(printed, 4)
    assert [row[2] for row in programs] == ["6", "96", "16", "16"]
    assert "cannot be split" in programs[3][3]
    assert [row[:2] for row in projections] == [["weak", "2"], ["weak", "32"], ["strong", "2"]]
    columns = dict(zip(DEVICES, projections[1][2:], strict=True))
    assert "DOES NOT FIT" in columns["TPU v5e"]
    assert not any("DOES NOT FIT" in columns[name] for name in DEVICES if name != "TPU v5e")
    assert projections[0][2:4] == ["no such slice", "no such slice"]
    assert out.read_text() == printed


def test_the_batch_of_a_device_is_the_recipes_on_the_fewest(monkeypatch):
    monkeypatch.setattr(scaling, "plan_for", fake)
    found = scaling.rows(smoke.get_config(), [2, 8], 8)
    assert [(row.regime, row.num_devices, row.batch_size) for row in found] == [
        ("weak", 2, 16),
        ("weak", 8, 64),
        ("strong", 2, 16),
        ("strong", 8, 16),
    ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--config FILE is required"),
        (["--config=configs/nothing.py"], "configs/nothing.py"),
        (["--config=configs/smoke.py", "--devices=8,x"], "devices='8,x' must be positive integers"),
        (["--config=configs/smoke.py", "--devices=0"], "devices='0' must be positive integers"),
        (["--config=configs/smoke.py", "--batch_per_device=0"], "batch_per_device=0"),
        (
            ["--config=configs/smoke.py", "--devices=3,8"],
            "config.batch_size=16 must be divisible by the smallest number of devices, 3,",
        ),
        (
            [
                *("--config=configs/smoke.py", "--config.accumulation_steps=4"),
                *("--devices=2", "--batch_per_device=6"),
            ],
            "batch_per_device=6 must be divisible by config.accumulation_steps=4",
        ),
        (
            ["--config=configs/smoke.py", "--config.fsdp=3", "--devices=2"],
            "2 devices: config.fsdp=3 must be a divisor of the 2 devices",
        ),
    ],
)
def test_wrong_flags_are_named(flags, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        scaling.main(flags)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
