"""Projections against closed forms, and the command on compiled programs of several sizes."""

import dataclasses

import pytest

from configs import smoke
from gfa_jax.training import scaling
from gfa_jax.training.devices import DEVICES, Device

RING = Device(
    {"default": 1e12}, half_peak=2e12, link=1e9, memory=1e9, neighbours=8, network=1e8, latency=1e-6
)


def test_a_ring_sends_every_byte_almost_twice():
    assert RING.all_reduce_seconds(8e6, 0, 1) == 0
    assert RING.all_reduce_seconds(8e6, 0, 2) == pytest.approx(8e6 / 1e9)
    assert RING.all_reduce_seconds(8e6, 0, 8) == pytest.approx(2 * 7 / 8 * 8e6 / 1e9)
    # Each of eight neighbours reduces an eighth with those of the other three groups.
    beyond = 2 * 3 / 4 * 1e6 / 1e8
    assert RING.all_reduce_seconds(8e6, 0, 32) == pytest.approx(2 * 7 / 8 * 8e6 / 1e9 + beyond)


def test_latency_grows_with_hops_and_collectives():
    assert RING.all_reduce_seconds(0, 3, 8) == pytest.approx(3 * 2 * 3 * 1e-6)
    assert RING.all_reduce_seconds(0, 1, 32) == pytest.approx(2 * 5 * 1e-6)


def test_a_part_of_a_torus_has_half_its_speed():
    torus = dataclasses.replace(RING, neighbours=256, network=0.0, torus=16)
    part, whole = (
        torus.all_reduce_seconds(8e6, 0, count) * count / (count - 1) for count in (64, 256)
    )
    assert part == pytest.approx(2 * whole)
    assert torus.all_reduce_seconds(0, 1, 256) == pytest.approx(32e-6)
    assert torus.most == 256
    assert RING.most == float("inf")


def plan(num_devices, flops, num_bytes):
    collectives = {"all-reduce": {"num_times": 1, "num_bytes": num_bytes}} if num_bytes else {}
    return {"devices": num_devices, "flops": flops, "collectives": collectives}


def test_efficiency():
    free = scaling.project(plan(8, 8e12, 0), RING, 1e12, 0.5)
    assert free.compute == pytest.approx(2.0)
    assert free.efficiency == free.overlapped_efficiency == pytest.approx(1.0)
    # A second of products, and as long in collectives.
    num_bytes = 8 / 14 * (1 - 6e-6) * 1e9
    half = scaling.project(plan(8, 8e12, num_bytes), RING, 1e12, 1.0)
    assert half.network == pytest.approx(1.0)
    assert half.efficiency == pytest.approx(0.5)
    assert half.overlapped_efficiency == pytest.approx(1.0)
    more = [
        scaling.project(plan(count, 8e12, num_bytes), RING, 1e12, 1.0).efficiency
        for count in (1, 2, 8, 16, 64)
    ]
    assert more == sorted(more, reverse=True)


def test_bfloat16_has_a_peak_of_its_own():
    v5e = DEVICES["TPU v5e"]
    assert v5e.peak_of("default", "float32") == v5e.peak_of("highest", "bfloat16") == 197e12
    assert v5e.peak_of("highest", "float32") == pytest.approx(197e12 / 6)
    assert DEVICES["H100 SXM"].peak_of("default", "bfloat16") == 989e12


def test_the_command_compiles_for_more_devices_than_there_are(capsys):
    flags = ["--config=configs/smoke.py", "--config.attack.name=none", "--batch_per_device=4"]
    scaling.main([*flags, "--config.batch_size=16", "--devices=2,8"])
    printed = capsys.readouterr().out
    table = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in printed.splitlines()
        if line.startswith(("| weak", "| strong"))
    ]
    programs, projections = table[:4], table[4:]
    assert [row[:3] for row in programs] == [
        ["weak", "2", "8"],
        ["weak", "8", "32"],
        ["strong", "2", "16"],
        ["strong", "8", "16"],
    ]
    flops = [float(row[3]) for row in programs]
    assert flops[0] == flops[1]  # of a device
    # Gradients of both orders are reduced, each once, whatever the number of devices.
    assert {row[5] for row in programs} == {"1 all-reduce"}
    assert {row[6] for row in programs} == {programs[0][6]}
    assert 2 <= float(programs[0][7]) < 2.2
    assert all("images/s" in cell for row in projections for cell in row[2:])


def test_strong_scaling_rounds_the_batch_up_to_the_devices(monkeypatch):
    monkeypatch.setattr(scaling, "plan_for", lambda config, count: {"devices": count})
    found = scaling.rows(smoke.get_config(), [4, 24], 2)
    assert [(row.regime, row.batch_size) for row in found] == [
        ("weak", 8),
        ("weak", 48),
        ("strong", 24),
        ("strong", 24),
    ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--config FILE is required"),
        (["--config=configs/nothing.py"], "configs/nothing.py"),
        (["--config=configs/smoke.py", "--devices=8,x"], "devices='8,x' must be positive integers"),
        (["--config=configs/smoke.py", "--batch_per_device=0"], "batch_per_device=0"),
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
