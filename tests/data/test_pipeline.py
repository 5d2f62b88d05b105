"""Tests of gfa_jax.data.pipeline: batches are a pure function of (seed, step, process)."""

import inspect

import jax
import numpy as np
import pytest

from gfa_jax.data import Dataset, eval_batches, to_float, train_batch
from gfa_jax.data.pipeline import batch_positions, num_eval_batches


def make_dataset(num):
    images = np.arange(num * 6, dtype=np.uint8).reshape(num, 2, 3, 1)
    return Dataset(
        images=images,
        labels=(np.arange(num) % 3).astype(np.int32),
        ids=np.arange(1000, 1000 + num),
        num_classes=3,
        label_names=("a", "b", "c"),
    )


@pytest.mark.parametrize(
    ("num_examples", "batch_size"), [(10, 5), (10, 3), (7, 7), (5, 12), (1, 4), (4, 1), (13, 26)]
)
def test_each_epoch_of_the_stream_holds_every_example_once(num_examples, batch_size):
    num_epochs = 6
    num_steps = -(-num_epochs * num_examples // batch_size)
    stream = np.concatenate(
        [batch_positions(num_examples, batch_size, seed=3, step=step) for step in range(num_steps)]
    )
    assert len(stream) == num_steps * batch_size
    epochs = stream[: num_epochs * num_examples].reshape(num_epochs, num_examples)
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(num_examples), (6, 1)))


def test_epochs_and_seeds_have_different_orders():
    epochs = [batch_positions(50, 50, seed=0, step=step) for step in range(4)]
    epochs += [batch_positions(50, 50, seed=seed, step=0) for seed in (1, 2)]
    assert len({tuple(epoch) for epoch in epochs}) == 6


def test_stream_does_not_depend_on_the_batch_size():
    streams = [
        np.concatenate([batch_positions(9, size, seed=4, step=step) for step in range(60 // size)])
        for size in (1, 4, 6, 30, 60)
    ]
    for stream in streams[1:]:
        np.testing.assert_array_equal(stream, streams[0])


def test_random_access_equals_sequential_access():
    steps = [17, 3, 250, 3, 0, 17]
    sequential = [batch_positions(11, 4, seed=9, step=step) for step in range(251)]
    for step in steps:
        np.testing.assert_array_equal(
            batch_positions(11, 4, seed=9, step=step), sequential[step], strict=True
        )
    assert batch_positions(11, 4, seed=9, step=10**9).shape == (4,)


def test_order_is_pinned():
    # A change of these numbers makes every resumed and every published run a different run.
    assert batch_positions(10, 10, seed=0, step=0).tolist() == [0, 8, 9, 3, 7, 5, 1, 2, 6, 4]
    assert batch_positions(10, 4, seed=123, step=7).tolist() == [9, 8, 7, 5]


def test_returned_arrays_are_the_callers_own():
    first = batch_positions(8, 8, seed=1, step=0)
    kept = first.copy()
    first[:] = 0
    np.testing.assert_array_equal(batch_positions(8, 8, seed=1, step=0), kept)
    assert first.dtype == np.int64


def test_train_batch_gathers_images_labels_and_ids_together():
    dataset = make_dataset(10)
    batch = train_batch(dataset, 6, seed=2, step=5)
    positions = batch_positions(10, 6, seed=2, step=5)
    np.testing.assert_array_equal(batch["inputs"], dataset.images[positions], strict=True)
    np.testing.assert_array_equal(batch["labels"], dataset.labels[positions], strict=True)
    np.testing.assert_array_equal(batch["ids"], positions + 1000, strict=True)
    batch["inputs"][:] = 0
    assert dataset.images.any()


@pytest.mark.parametrize("process_count", [1, 2, 3, 6])
def test_processes_share_one_global_batch(process_count):
    dataset = make_dataset(8)
    parts = [
        train_batch(dataset, 12, seed=0, step=3, process_index=index, process_count=process_count)
        for index in range(process_count)
    ]
    whole = train_batch(dataset, 12, seed=0, step=3)
    for key in ("inputs", "labels", "ids"):
        assert {len(part[key]) for part in parts} == {12 // process_count}
        np.testing.assert_array_equal(
            np.concatenate([part[key] for part in parts]), whole[key], strict=True
        )


@pytest.mark.parametrize(("num", "batch_size"), [(10, 4), (8, 4), (3, 8), (1, 1)])
def test_eval_batches_cover_the_set_in_order_with_one_shape(num, batch_size):
    dataset = make_dataset(num)
    batches = list(eval_batches(dataset, batch_size))
    assert len(batches) == num_eval_batches(num, batch_size)
    for batch in batches:
        assert batch["inputs"].shape == (batch_size, 2, 3, 1)
        assert batch["mask"].shape == batch["labels"].shape == batch["ids"].shape == (batch_size,)
        assert batch["mask"].dtype == np.bool_
        assert batch["labels"].dtype == np.int32
    mask = np.concatenate([batch["mask"] for batch in batches])
    assert mask.sum() == num
    assert mask[:num].all()
    for key, expected in (("inputs", dataset.images), ("labels", dataset.labels)):
        joined = np.concatenate([batch[key] for batch in batches])
        np.testing.assert_array_equal(joined[mask], expected, strict=True)
    ids = np.concatenate([batch["ids"] for batch in batches])
    np.testing.assert_array_equal(ids[mask], dataset.ids)
    assert set(ids[~mask]) <= {1000}


@pytest.mark.parametrize("process_count", [2, 3, 6])
def test_processes_share_every_eval_batch(process_count):
    dataset = make_dataset(14)
    wholes = list(eval_batches(dataset, 6))
    shares = [
        list(eval_batches(dataset, 6, process_index=index, process_count=process_count))
        for index in range(process_count)
    ]
    assert {len(share) for share in shares} == {len(wholes)} == {3}
    for whole, *parts in zip(wholes, *shares, strict=True):
        for key, value in whole.items():
            joined = np.concatenate([part[key] for part in parts])
            np.testing.assert_array_equal(joined, value, strict=True)
    with pytest.raises(ValueError, match="divisible by process_count = 4, got 6"):
        eval_batches(dataset, 6, process_count=4)


def test_eval_batches_is_lazy_but_checks_at_once():
    assert inspect.isgenerator(eval_batches(make_dataset(3), 2))
    with pytest.raises(ValueError, match="batch_size=0"):
        eval_batches(make_dataset(3), 0)


@pytest.mark.parametrize(("num", "size", "expected"), [(0, 4, 0), (1, 4, 1), (4, 4, 1), (5, 4, 2)])
def test_num_eval_batches(num, size, expected):
    assert num_eval_batches(num, size) == expected


@pytest.mark.parametrize("transform", [lambda fun: fun, jax.jit], ids=["eager", "jit"])
def test_to_float_of_all_bytes(transform):
    values = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    output = transform(to_float)(values)
    assert isinstance(output, jax.Array)
    assert output.dtype == np.float32
    # Compilers may multiply by the reciprocal, one rounding away.
    np.testing.assert_allclose(output, values.astype(np.float64) / 255, rtol=1.2e-7, atol=0)
    assert output.min() == 0.0
    assert output.max() == 1.0


@pytest.mark.parametrize("transform", [lambda fun: fun, jax.jit], ids=["eager", "jit"])
def test_to_float_keeps_floats(transform):
    images = np.random.default_rng(0).random((2, 3, 3, 1), np.float32)
    np.testing.assert_array_equal(transform(to_float)(images), images, strict=True)


def test_to_float_refuses_other_dtypes():
    with pytest.raises(ValueError, match="uint8 or float32, got int32"):
        to_float(np.zeros((1, 2, 2, 1), np.int32))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": -4}, "batch_size=-4"),
        ({"batch_size": 2.5}, "batch_size=2.5"),
        ({"step": -1}, "step=-1"),
        ({"seed": -1}, "seed=-1"),
        ({"process_count": 0}, "process_count=0"),
        ({"process_count": 3}, "divisible by process_count = 3, got 4"),
        ({"process_count": 2, "process_index": 2}, "process_index must lie in .* got 2"),
        ({"process_index": -1}, "process_index must lie in .* got -1"),
    ],
)
def test_train_batch_errors_name_the_argument(arguments, message):
    valid = {"batch_size": 4, "seed": 0, "step": 0}
    with pytest.raises(ValueError, match=message):
        train_batch(make_dataset(5), **{**valid, **arguments})


def test_batch_positions_needs_examples():
    with pytest.raises(ValueError, match="num_examples=0"):
        batch_positions(0, 4, seed=0, step=0)
