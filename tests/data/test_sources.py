"""Tests of gfa_jax.data.sources: what a data set is, its splits, and the real digits."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest

from gfa_jax.data import Dataset, load, sources


def make_dataset(num=6, **changes):
    fields = {
        "images": np.zeros((num, 4, 5, 3), np.uint8),
        "labels": (np.arange(num) % 2).astype(np.int32),
        "ids": np.arange(num),
        "num_classes": 2,
        "label_names": ("cat", "dog"),
    }
    return Dataset(**{**fields, **changes})


def test_dataset_length_shape_and_take():
    dataset = make_dataset()
    assert len(dataset) == 6
    assert dataset.image_shape == (4, 5, 3)
    part = dataset.take(4)
    assert part.ids.tolist() == [0, 1, 2, 3]
    assert len(part.images) == len(part.labels) == 4
    assert part.images.base is dataset.images
    assert len(dataset.take(100)) == 6
    with pytest.raises(ValueError, match="num=0"):
        dataset.take(0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": np.zeros((6, 4, 5), np.uint8)}, r"images must be .* shape \(6, 4, 5\)"),
        ({"images": np.zeros((6, 4, 5, 3), np.float64)}, "images must be .* got float64"),
        ({"labels": np.zeros(6, np.int64)}, "labels must be int32 .* got int64"),
        ({"labels": np.zeros(5, np.int32)}, r"labels must be .* got int32 of shape \(5,\)"),
        ({"ids": np.zeros(6, np.int32)}, "ids must be int64"),
        ({"label_names": ("cat",)}, "label_names must hold num_classes = 2 names, got 1"),
        ({"labels": np.full(6, 2, np.int32)}, r"labels must lie in .* \[0, 2\)"),
        ({"labels": np.full(6, -1, np.int32)}, r"labels must lie in .* from -1"),
    ],
)
def test_dataset_refuses_what_does_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        make_dataset(**changes)


def test_dataset_refuses_no_examples():
    with pytest.raises(ValueError, match="at least one example"):
        make_dataset(0)


# Splits.


@pytest.mark.parametrize("num", [1, 2, 17, 1000])
def test_seeded_permutation_is_one(num):
    order = sources.seeded_permutation(num, 3, 4)
    assert sorted(order.tolist()) == list(range(num))
    assert order.dtype == np.int64


def test_seeded_permutation_is_pinned():
    assert sources.seeded_permutation(8, 1, 2).tolist() == [7, 1, 3, 0, 4, 2, 6, 5]
    assert sources.seeded_permutation(5, 0).tolist() == [0, 3, 1, 2, 4]


def test_seeded_permutation_is_uniform():
    # All 24 orders of four elements occur about equally often over 4800 seeds.
    orders = np.stack([sources.seeded_permutation(4, seed) for seed in range(4800)])
    counts = np.unique(orders, axis=0, return_counts=True)[1]
    assert len(counts) == 24
    assert counts.min() > 200 - 5 * 14
    assert counts.max() < 200 + 5 * 14


def test_train_and_validation_are_disjoint_and_complete():
    whole = load("digits", "train")
    train = load("digits", "train", num_validation=200)
    validation = load("digits", "validation", num_validation=200)
    assert (len(whole), len(train), len(validation)) == (1397, 1197, 200)
    assert sorted([*train.ids, *validation.ids]) == sorted(whole.ids)
    # A larger validation set contains the smaller one.
    larger = load("digits", "validation", num_validation=300)
    np.testing.assert_array_equal(larger.ids[:200], validation.ids)
    np.testing.assert_array_equal(larger.images[:200], validation.images)


def test_validation_is_pinned():
    # A change of these numbers makes every published validation result a different one.
    validation = load("digits", "validation", num_validation=8)
    assert validation.ids.tolist() == [1069, 1027, 1568, 995, 780, 276, 1380, 851]


def test_max_examples_is_a_prefix_and_leaves_validation_out():
    for split in ("train", "validation", "test"):
        full = load("digits", split, num_validation=50)
        part = load("digits", split, num_validation=50, max_examples=20)
        assert len(part) == 20
        for field in ("images", "labels", "ids"):
            np.testing.assert_array_equal(getattr(part, field), getattr(full, field)[:20])
    assert len(load("digits", "test", max_examples=5000)) == 400


@pytest.mark.parametrize(
    ("split", "arguments", "message"),
    [
        ("val", {}, "split='val' .*test.*train.*validation"),
        ("validation", {}, "num_validation is 0"),
        ("train", {"num_validation": -1}, "num_validation=-1"),
        ("train", {"num_validation": 1397}, "at most 1396 for 'digits', got 1397"),
        ("test", {"max_examples": 0}, "max_examples=0"),
    ],
)
def test_split_errors(split, arguments, message):
    with pytest.raises(ValueError, match=message):
        load("digits", split, **arguments)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digit", "valid forms: digits, arrays:PATH.npz, tfds:.* Did you mean 'digits'"),
        ("cifar10", "Did you mean 'tfds:cifar10'"),
        ("tfds", "unknown data set name 'tfds'"),
        ("tfds:", "unknown data set name 'tfds:'"),
        ("arrays:", "unknown data set name 'arrays:'"),
        ("digits:2", "unknown data set name 'digits:2'"),
        ("", "unknown data set name ''"),
        ("arrays", "name 'arrays:PATH.npz', or data_dir=PATH"),
    ],
)
def test_unknown_name(name, message):
    with pytest.raises(ValueError, match=message):
        load(name, "test")


# Digits.


def test_digits_are_the_real_ones():
    from sklearn.datasets import load_digits

    bunch = load_digits()
    train, test = load("digits", "train"), load("digits", "test")
    assert sorted([*train.ids, *test.ids]) == list(range(1797))
    for dataset in (train, test):
        assert dataset.images.dtype == np.float32
        assert dataset.image_shape == (8, 8, 1)
        assert dataset.images.min() == 0.0
        assert dataset.images.max() == 1.0
        np.testing.assert_array_equal(dataset.images[..., 0] * 16, bunch.images[dataset.ids])
        np.testing.assert_array_equal(dataset.labels, bunch.target[dataset.ids])
        assert dataset.num_classes == 10
        assert dataset.label_names == tuple("0123456789")


def test_digits_test_set_is_balanced_and_pinned():
    test = load("digits", "test")
    np.testing.assert_array_equal(np.bincount(test.labels), np.full(10, 40))
    assert test.ids[:8].tolist() == [2, 3, 13, 25, 28, 31, 33, 44]
    assert np.all(np.diff(test.ids) > 0)


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        load("digits", "test")


def test_import_is_light():
    code = (
        "import sys, gfa_jax.data, gfa_jax.data.prepare\n"
        "heavy = {'tensorflow', 'tensorflow_datasets', 'sklearn', 'PIL', 'array_record'}\n"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_dataset_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_dataset().labels = np.zeros(6, np.int32)


def test_descriptions_are_those_of_what_is_loaded(tmp_path):
    digits = sources.describe("digits")
    assert digits == sources.Description((8, 8, 1), np.dtype(np.float32), 10)
    path = tmp_path / "own.npz"
    arrays = {f"{split}_labels": np.array([0, 2, 1]) for split in ("train", "test")}
    arrays |= {f"{split}_images": np.zeros((3, 5, 6), np.uint8) for split in ("train", "test")}
    np.savez(path, **arrays)
    assert sources.describe(f"arrays:{path}") == sources.Description(
        (5, 6, 1), np.dtype(np.uint8), 3
    )
    with pytest.raises(ValueError, match="unknown data set name 'digit'.*Did you mean 'digits'"):
        sources.describe("digit")


@pytest.mark.parametrize(
    ("name", "shape", "num_classes"),
    [("cifar100", (32, 32, 3), 100), ("mnist", (28, 28, 1), 10)],
)
def test_sets_of_tfds_are_described_before_they_are_prepared(tmp_path, name, shape, num_classes):
    found = sources.describe(f"tfds:{name}", data_dir=str(tmp_path))
    assert found == sources.Description(shape, np.dtype(np.uint8), num_classes)
    assert not list(tmp_path.iterdir())


def test_sets_without_one_size_or_a_description_are_refused(tmp_path):
    with pytest.raises(ValueError, match="have no size of their own"):
        sources.describe("tfds:imagenette/160px-v2", data_dir=str(tmp_path))
    with pytest.raises(FileNotFoundError, match="tiny_imagenet.*is not prepared in"):
        sources.describe("tfds:tiny_imagenet", data_dir=str(tmp_path))
    with pytest.raises(ValueError, match="cannot read the tfds name 'cifar10:x:y'"):
        sources.describe("tfds:cifar10:x:y", data_dir=str(tmp_path))
