"""When the multi-process runtime starts, and that flags which do not fit are refused.

What several processes do together is tested in ``training/test_processes``.
"""

import jax
import pytest

from gfa_jax import distributed
from gfa_jax.distributed import Cluster


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"num_processes": 2}, "num_processes=2 needs --coordinator_address, --process_id too"),
        ({"distributed": "maybe"}, "distributed='maybe' is not one of"),
        (
            {"coordinator_address": "here", "num_processes": 2, "process_id": 0},
            "coordinator_address='here' must be HOST:PORT",
        ),
        (
            {"coordinator_address": "here:99999", "num_processes": 2, "process_id": 0},
            "coordinator_address='here:99999' must be HOST:PORT",
        ),
        (
            {"coordinator_address": "127.0.0.1:1", "num_processes": 0, "process_id": 0},
            "num_processes=0 must be",
        ),
        (
            {"coordinator_address": "127.0.0.1:1", "num_processes": 2, "process_id": 2},
            r"process_id=2 must lie in \[0, num_processes\) = \[0, 2\)",
        ),
        (
            {
                "coordinator_address": "127.0.0.1:1",
                "num_processes": 2,
                "process_id": 1,
                "distributed": "off",
            },
            "distributed='off' does not go with",
        ),
    ],
)
def test_bad_flags_are_refused(flags, message, monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: pytest.fail("started"))
    with pytest.raises(ValueError, match=message):
        distributed.initialize(Cluster(**flags))


def test_a_runtime_that_cannot_start_is_explained(monkeypatch):
    def fail(**_):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(ValueError, match=r"did not start: coordinator_address.*--distributed=off"):
        distributed.initialize(Cluster(distributed="on"), {})


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({}, False),
        ({"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234"}, True),
        ({"SLURM_STEP_NUM_TASKS": "4"}, True),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "4"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
        ({"TPU_WORKER_HOSTNAMES": "host-0,host-1"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"MEGASCALE_COORDINATOR_ADDRESS": "slice-0"}, True),
    ],
)
def test_auto_starts_where_several_processes_are_evident(environment, several, monkeypatch):
    started = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **given: started.append(given))
    environment = {"JAX_PLATFORMS": "cpu", **environment}
    distributed.initialize(Cluster(), environment)
    assert started == ([{}] if several else [])
    distributed.initialize(Cluster(distributed="off"), environment)
    assert len(started) == several


def test_explicit_flags_are_handed_on(monkeypatch):
    started = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **given: started.append(given))
    given = {"coordinator_address": "10.0.0.1:1234", "num_processes": 2, "process_id": 0}
    distributed.initialize(Cluster(**given), {})
    assert started == [given]


def test_one_process_agrees_with_itself():
    done = []
    distributed.on_primary(lambda: done.append(1))
    assert done == [1]
    assert distributed.is_primary()
    assert [distributed.any_process(flag) for flag in (True, False)] == [True, False]
