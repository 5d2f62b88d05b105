"""Placements of training data: the same batches, wherever they lie."""

import dataclasses
import gc
import os
import pathlib
import socket
import subprocess
import sys
import threading
import time
import types

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from gfa_jax import distributed
from gfa_jax.data import inputs, load, open_lazily, pipeline, train_batch, train_input

ROOT = pathlib.Path(__file__).parents[2]


def sharding_over(num_devices):
    mesh = jax.make_mesh(
        (num_devices,),
        ("data",),
        devices=jax.devices()[:num_devices],
        axis_types=(AxisType.Auto,),
    )
    return NamedSharding(mesh, PartitionSpec("data"))


def digits(placement="host"):
    opened = open_lazily if placement == "stream" else load
    return opened("digits", "train", num_validation=100, max_examples=50)


@pytest.mark.parametrize("num_devices", [1, 4])
@pytest.mark.parametrize("placement", ["host", "device", "stream"])
def test_placements_give_the_same_batches(placement, num_devices):
    """Over the end of an epoch: fifty examples, batches of sixteen."""
    sharding = sharding_over(num_devices)
    batch_at = train_input(digits(placement), 16, seed=3, sharding=sharding, placement=placement)
    # Training that resumes starts anywhere; an endless one passes 2**31 examples.
    for step in (*range(5), 40, 41, 7, 0, 2**31, 2**31 + 1):
        expected = train_batch(digits(), 16, seed=3, step=step)
        batch = batch_at(step)
        assert set(batch) == {"inputs", "labels"}
        for name, value in batch.items():
            assert value.sharding.is_equivalent_to(sharding, value.ndim)
            assert value.dtype == expected[name].dtype
            np.testing.assert_array_equal(value, expected[name])


def test_a_lazy_set_has_the_examples_of_the_loaded_one():
    for split in ("train", "validation", "test"):
        options = {"num_validation": 100, "max_examples": 40}
        whole = load("digits", split, **options)
        lazy = open_lazily("digits", split, **options)
        assert (len(lazy), lazy.num_classes, lazy.image_shape) == (
            len(whole),
            whole.num_classes,
            whole.image_shape,
        )
        positions = np.array([5, 0, 39, 5])
        for got, expected in zip(lazy.read(positions), whole.read(positions), strict=True):
            assert got.dtype == expected.dtype
            np.testing.assert_array_equal(got, expected)


def counted(lazy):
    """Returns the set with a list of the positions that its source is asked for."""
    read = []

    def note(pool, positions):
        read.extend(positions.tolist())
        return lazy.source.read(pool, positions)

    return dataclasses.replace(lazy, source=dataclasses.replace(lazy.source, read=note)), read


def test_only_a_process_s_share_is_read(monkeypatch):
    lazy, read = counted(digits("stream"))
    whole = train_batch(digits(), 16, seed=3, step=2)["ids"]
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    for process in range(4):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        share = inputs._share(lazy, 16, 3, 2)
        assert share["inputs"].shape[0] == 4
    positions = pipeline.batch_positions(50, 16, seed=3, step=2)
    assert read == lazy.positions[positions].tolist()  # all of them together, each once
    np.testing.assert_array_equal(whole, digits().ids[positions])


def test_a_stream_reads_a_few_batches_ahead_and_no_more():
    lazy, read = counted(digits("stream"))
    batch_at = train_input(lazy, 10, seed=0, sharding=sharding_over(1), placement="stream")
    assert read == []
    for step in range(3):
        batch_at(step)
    assert 30 <= len(read) <= 10 * (3 + inputs._BATCHES_AHEAD + 2)


def test_a_stream_leaves_no_threads_behind():
    before = set(threading.enumerate())
    for _ in range(5):
        batch_at = train_input(
            digits("stream"), 10, seed=0, sharding=sharding_over(1), placement="stream"
        )
        batch_at(0)
        batch_at(9)
    started = set(threading.enumerate()) - before
    assert started
    del batch_at
    deadline = time.monotonic() + 60
    while any(thread.is_alive() for thread in started):
        assert time.monotonic() < deadline, started
        gc.collect()
        time.sleep(0.02)


_TWO_PROCESSES = """
import dataclasses, sys
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from gfa_jax.data import load, open_lazily, pipeline, train_batch, train_input

address, index = sys.argv[1], int(sys.argv[2])
jax.distributed.initialize(address, 2, index)
mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
sharding = NamedSharding(mesh, PartitionSpec("data"))
options = {"num_validation": 100, "max_examples": 50}
whole, lazy = (opened("digits", "train", **options) for opened in (load, open_lazily))
read = []

def note(pool, positions):
    read.extend(positions.tolist())
    return source.read(pool, positions)

source = lazy.source
lazy = dataclasses.replace(lazy, source=dataclasses.replace(source, read=note))
for placement in ("host", "device", "stream", "auto"):
    dataset = lazy if placement == "stream" else whole
    batch_at = train_input(dataset, 16, seed=3, sharding=sharding, placement=placement)
    for step in (0, 1, 2, 3, 40, 41):
        expected = train_batch(whole, 16, seed=3, step=step)
        for name, value in batch_at(step).items():
            assert value.shape == expected[name].shape
            assert value.sharding.is_equivalent_to(sharding, value.ndim)
            assert len(value.addressable_shards) == 2
            for shard in value.addressable_shards:
                np.testing.assert_array_equal(shard.data, expected[name][shard.index])
assert len(read) >= 6 * 8
own = set()
for step in [*range(20), *range(40, 60)]:
    positions = pipeline.batch_positions(50, 16, seed=3, step=step)[8 * index : 8 * index + 8]
    own |= {tuple(lazy.positions[positions])}
shares = {tuple(read[start : start + 8]) for start in range(0, len(read), 8)}
assert shares <= own, shares - own
"""


def test_two_processes_have_the_same_batch_and_read_their_shares_alone():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _TWO_PROCESSES, address, str(index)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    try:
        said = [process.communicate(timeout=200)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], said


def test_errors_of_reading_reach_the_training():
    lazy = digits("stream")

    def broken(pool, positions):
        raise ValueError("record 7 is damaged")

    lazy = dataclasses.replace(lazy, source=dataclasses.replace(lazy.source, read=broken))
    batch_at = train_input(lazy, 10, seed=0, sharding=sharding_over(1), placement="stream")
    with pytest.raises(ValueError, match="record 7 is damaged"):
        batch_at(0)


def test_auto_fills_devices_that_tell_their_memory():
    def device(limit):
        return types.SimpleNamespace(memory_stats=lambda: limit and {"bytes_limit": limit})

    assert inputs.choose_placement(250, [device(1000), device(1000)]) == "device"
    assert inputs.choose_placement(251, [device(1000), device(1000)]) == "host"
    assert inputs.choose_placement(200, [device(1000), device(500)]) == "host"
    assert inputs.choose_placement(1, [device(None)]) == "host"


@pytest.mark.parametrize("fits_elsewhere", [True, False])
def test_auto_fills_devices_only_where_every_process_would(fits_elsewhere, monkeypatch):
    monkeypatch.setattr(inputs, "choose_placement", lambda *args: "device")
    monkeypatch.setattr(distributed, "any_process", lambda flag: flag or not fits_elsewhere)
    filled = []
    monkeypatch.setattr(inputs, "_on_device", lambda *args: filled.append(args))
    train_input(digits(), 10, seed=0, sharding=sharding_over(1), placement="auto")
    assert len(filled) == fits_elsewhere


def test_what_does_not_fit_is_refused(monkeypatch):
    options = {"seed": 0, "sharding": sharding_over(1)}
    with pytest.raises(ValueError, match="placement='disk' is not one of"):
        train_input(digits(), 10, placement="disk", **options)
    with pytest.raises(ValueError, match="placement='stream' does not fit a Dataset"):
        train_input(digits(), 10, placement="stream", **options)
    with pytest.raises(ValueError, match="placement='device' does not fit a LazyDataset"):
        train_input(digits("stream"), 10, placement="device", **options)

    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(ImportError, match=r"pip install 'gfa_jax\[grain\]'"):
        train_input(digits("stream"), 10, placement="stream", **options)
