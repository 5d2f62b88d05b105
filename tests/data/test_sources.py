"""Tests of gfa_jax.data.sources on real digits, on .npz files and on prepared tfds folders."""

import dataclasses
import gzip
import io
import os
import pathlib
import pickle
import subprocess
import sys
import warnings
import zipfile

import numpy as np
import pytest

from gfa_jax.data import Dataset, load, prepare, sources


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


# Arrays.


def arrays(dtype=np.uint8, num_train=7, num_test=3, shape=(4, 5, 3)):
    rng = np.random.default_rng(0)

    def images(num):
        values = rng.integers(0, 256, (num, *shape), np.uint8)
        return values if dtype == np.uint8 else (values / 255).astype(dtype)

    return {
        "train_images": images(num_train),
        "train_labels": np.arange(num_train) % 3,
        "test_images": images(num_test),
        "test_labels": np.array([3, 0, 1])[:num_test],
    }


def save(path, **content):
    np.savez(path, **content)
    return f"arrays:{path}"


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
def test_arrays_round_trip(dtype, tmp_path):
    content = arrays(dtype)
    name = save(tmp_path / "set.npz", **content)
    for split in ("train", "test"):
        dataset = load(name, split)
        images = content[f"{split}_images"]
        assert dataset.images.dtype == (np.uint8 if dtype == np.uint8 else np.float32)
        np.testing.assert_array_equal(
            dataset.images, images[dataset.ids].astype(dataset.images.dtype), strict=True
        )
        np.testing.assert_array_equal(dataset.labels, content[f"{split}_labels"][dataset.ids])
        assert sorted(dataset.ids) == list(range(len(images)))
        # The largest label occurs in the test split only.
        assert dataset.num_classes == 4
        assert dataset.label_names == ("0", "1", "2", "3")
    assert load(name, "test").ids.tolist() == [0, 1, 2]
    validation = load(name, "validation", num_validation=2)
    train = load(name, "train", num_validation=2)
    assert sorted([*train.ids, *validation.ids]) == list(range(7))


def test_arrays_without_channels_get_one(tmp_path):
    content = arrays(shape=(4, 5))
    dataset = load(save(tmp_path / "set.npz", **content), "test")
    np.testing.assert_array_equal(dataset.images, content["test_images"][..., None], strict=True)


def test_arrays_label_names_set_the_number_of_classes(tmp_path):
    names = np.array(["ant", "bee", "cat", "dog", "emu"])
    dataset = load(save(tmp_path / "set.npz", **arrays(), label_names=names), "test")
    assert dataset.num_classes == 5
    assert dataset.label_names == ("ant", "bee", "cat", "dog", "emu")


@pytest.mark.parametrize("label_dtype", [np.uint8, np.int16, np.uint64])
def test_arrays_take_any_integer_labels(label_dtype, tmp_path):
    content = arrays()
    content["train_labels"] = content["train_labels"].astype(label_dtype)
    assert load(save(tmp_path / "set.npz", **content), "train").labels.dtype == np.int32


def test_arrays_are_found_by_name_and_by_data_dir(tmp_path, monkeypatch):
    save(tmp_path / "set.npz", **arrays())
    np.savez_compressed(tmp_path / "small.npz", **arrays(num_test=2))
    assert len(load("arrays:set.npz", "test", data_dir=str(tmp_path))) == 3
    assert len(load("arrays", "test", data_dir=str(tmp_path / "set.npz"))) == 3
    assert len(load("arrays:small.npz", "test", data_dir=str(tmp_path))) == 2
    monkeypatch.chdir(tmp_path)
    assert len(load("arrays:set.npz", "test")) == 3
    for name, data_dir in (("arrays:sets.npz", None), ("arrays", str(tmp_path))):
        with pytest.raises(FileNotFoundError, match=r"needs an \.npz file"):
            load(name, "test", data_dir=data_dir)


def nan_images():
    images = np.zeros((3, 4, 5, 3), np.float32)
    images[1, 2, 3, 0] = np.nan
    return images


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_images": np.zeros((3, 4), np.uint8)}, r"test_images .* got \(3, 4\)"),
        ({"test_images": np.zeros((3, 4, 5, 3, 1), np.uint8)}, "test_images .* must have shape"),
        ({"test_images": np.zeros((3, 4, 5, 3), np.int32)}, "uint8, float32 or float64, got int32"),
        ({"test_images": np.zeros((3, 4, 5, 3), bool)}, "uint8, float32 or float64, got bool"),
        ({"test_images": np.zeros((0, 4, 5, 3), np.uint8)}, "test_images .* is empty"),
        ({"test_images": np.zeros((3, 8, 5, 3), np.uint8)}, "must have the same image shape"),
        ({"test_images": np.full((3, 4, 5, 3), 1.5)}, r"in \[0, 1\] .* got values from 1.5 to 1.5"),
        ({"test_images": np.full((3, 4, 5, 3), -0.1, np.float32)}, r"in \[0, 1\] .* from -0.1"),
        ({"test_images": np.full((3, 4, 5, 3), np.inf)}, r"finite and in \[0, 1\]"),
        ({"test_images": nan_images()}, r"finite and in \[0, 1\] .* from nan"),
        ({"test_labels": np.zeros(3)}, "test_labels .* must be integers, got float64"),
        ({"test_labels": np.zeros(3, bool)}, "test_labels .* must be integers, got bool"),
        ({"test_labels": np.zeros((3, 1), int)}, r"test_labels .* shape \(3,\).* got \(3, 1\)"),
        ({"test_labels": np.zeros(2, int)}, r"test_labels .* shape \(3,\).* got \(2,\)"),
        (
            {"test_labels": np.array([0, -1, 2])},
            r"test_labels .* \[0, 3\), got values from -1 to 2",
        ),
        ({"test_labels": np.array([0, 1, 2**32 - 1], np.uint32)}, "labels .* reach 4294967295"),
        ({"label_names": np.array(["a", "b", "c"])}, r"test_labels .* \[0, 3\), got .* 0 to 3"),
        ({"label_names": np.array([1, 2, 3, 4])}, "label_names .* must be strings"),
        ({"label_names": np.array([["a", "b"]])}, "label_names .* must be strings"),
    ],
)
def test_arrays_that_break_a_rule(changes, message, tmp_path):
    name = save(tmp_path / "set.npz", **{**arrays(), **changes})
    with pytest.raises(ValueError, match=message) as caught:
        load(name, "test")
    assert "set.npz" in str(caught.value)


def test_arrays_with_a_missing_key_list_what_is_there(tmp_path):
    content = arrays()
    content["x_test"] = content.pop("test_images")
    with pytest.raises(ValueError, match="lacks test_images; it holds test_labels, train_images"):
        load(save(tmp_path / "set.npz", **content), "test")


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


@pytest.mark.parametrize("key", ["test_images", "train_labels", "label_names"])
def test_pickled_arrays_are_refused_and_not_run(key, tmp_path):
    marker = tmp_path / "ran"
    payload = np.array([Payload(marker)], dtype=object)
    np.savez(tmp_path / "set.npz", **{**arrays(), key: payload})
    with pytest.raises(ValueError, match=f"{key} .* pickled arrays are refused"):
        load(f"arrays:{tmp_path / 'set.npz'}", "test")
    assert not marker.exists()
    # The payload would have run.
    pickle.loads(pickle.dumps(Payload(marker)))
    assert marker.exists()


def test_pickle_file_is_refused_and_not_run(tmp_path):
    marker = tmp_path / "ran"
    (tmp_path / "set.npz").write_bytes(pickle.dumps(Payload(marker)))
    with pytest.raises(ValueError, match=r"set\.npz is not an \.npz file"):
        load(f"arrays:{tmp_path / 'set.npz'}", "test")
    assert not marker.exists()


def test_every_read_forbids_pickle(tmp_path, monkeypatch):
    allowed = []
    np_load = np.load
    monkeypatch.setattr(
        np, "load", lambda *args, **kw: allowed.append(kw["allow_pickle"]) or np_load(*args, **kw)
    )
    load(save(tmp_path / "set.npz", **arrays(), label_names=np.array(list("abcd"))), "test")
    assert set(allowed) == {False}


def npy_bytes(array):
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


@pytest.mark.parametrize("second", ["test_images", "test_images.npy"])
def test_two_members_for_one_key_are_refused(second, tmp_path):
    save(tmp_path / "set.npz", **arrays())
    with warnings.catch_warnings(), zipfile.ZipFile(tmp_path / "set.npz", "a") as archive:
        # zipfile warns about the duplicate that it writes.
        warnings.simplefilter("ignore")
        archive.writestr(second, npy_bytes(np.zeros((3, 4, 5, 3), np.uint8)))
    with pytest.raises(ValueError, match="ambiguous"):
        load(f"arrays:{tmp_path / 'set.npz'}", "test")


@pytest.mark.parametrize(
    "content",
    [b"", b"hello", npy_bytes(np.zeros((3, 4, 5, 3))), gzip.compress(b"x")],
    ids=["", "text", "npy", "gzip"],
)
def test_a_file_that_is_no_npz(content, tmp_path):
    (tmp_path / "set.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"set\.npz is not an \.npz file, or is damaged"):
        load(f"arrays:{tmp_path / 'set.npz'}", "test")


@pytest.mark.parametrize("saver", [np.savez, np.savez_compressed])
def test_truncated_and_damaged_npz(saver, tmp_path):
    path = tmp_path / "set.npz"
    saver(path, **arrays())
    content = path.read_bytes()
    for fraction in (0.1, 0.5, 0.9, 0.999):
        path.write_bytes(content[: int(fraction * len(content))])
        with pytest.raises(ValueError, match="damaged"):
            load(f"arrays:{path}", "train")
    changed = bytearray(content)
    changed[400] ^= 0xFF
    path.write_bytes(changed)
    with pytest.raises(ValueError, match="damaged"):
        load(f"arrays:{path}", "train")


# tensorflow-datasets.


@pytest.fixture(scope="module")
def tfds():
    pytest.importorskip("array_record")
    pytest.importorskip("PIL")
    return pytest.importorskip("tensorflow_datasets")


MNIST_LABELS = {"train": np.arange(20) % 10, "test": np.array([4, 4, 9, 0])}


@pytest.fixture(scope="module")
def mnist_dir(tfds, tmp_path_factory):
    """A prepared tfds folder; image `i` of the archive is all `i` in train, `100 + i` in test."""
    archives = tmp_path_factory.mktemp("archives")
    for split, prefix, first in (("train", "train", 0), ("test", "t10k", 100)):
        labels = MNIST_LABELS[split]
        images = np.repeat(np.arange(first, first + len(labels)), 28 * 28)
        for kind, dims, data in (("images-idx3", 3, images), ("labels-idx1", 1, labels)):
            shape = (len(labels), 28, 28)[:dims]
            header = bytes([0, 0, 8, dims]) + np.array(shape, ">u4").tobytes()
            path = archives / f"{prefix}-{kind}-ubyte.gz"
            path.write_bytes(gzip.compress(header + data.astype(np.uint8).tobytes()))
    data_dir = tmp_path_factory.mktemp("tfds")
    prepare.prepare("mnist", data_dir, archive=archives, verify=False)
    return str(data_dir)


def write_tfds(tfds, data_dir, set_name, splits, image=None, label=None):
    """Prepares a data set that only its files describe; `splits` maps to lists of records."""
    features = {
        "image": image or tfds.features.Image(shape=(None, None, 3)),
        "label": label or tfds.features.ClassLabel(names=["no", "yes"]),
    }
    features = {key: value for key, value in features.items() if value != "absent"}

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = set_name
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
            )

        def _split_generators(self, dl_manager):
            del dl_manager
            return {split: enumerate(records) for split, records in splits.items()}

        def _generate_examples(self):
            raise NotImplementedError

    Builder(data_dir=str(data_dir)).download_and_prepare(
        download_dir=str(data_dir / "downloads"),
        file_format="array_record",
        download_config=tfds.download.DownloadConfig(try_download_gcs=False),
    )


def picture(value, size=(6, 4), mode="RGB"):
    from PIL import Image

    return Image.new(mode, size, (value,) * 3 if mode == "RGB" else value)


@pytest.mark.parametrize("chunk", [3, 4, 512])
def test_tfds_order_labels_and_ids(mnist_dir, chunk, monkeypatch, tfds):
    monkeypatch.setattr(sources, "_DECODE_CHUNK", chunk)
    stored = {
        split: [
            int(record["image"][0, 0, 0])
            for record in tfds.data_source("mnist", split=split, data_dir=mnist_dir, download=False)
        ]
        for split in ("train", "test")
    }
    assert sorted(stored["train"]) == list(range(20))
    test = load("tfds:mnist", "test", data_dir=mnist_dir)
    assert test.ids.tolist() == [0, 1, 2, 3]
    assert test.images.shape == (4, 28, 28, 1)
    assert test.images.dtype == np.uint8
    assert test.images[:, 0, 0, 0].tolist() == stored["test"]
    assert np.all(test.images == test.images[:, :1, :1])
    np.testing.assert_array_equal(test.labels, MNIST_LABELS["test"][test.images[:, 0, 0, 0] - 100])
    assert test.num_classes == 10

    train = load("tfds:mnist", "train", data_dir=mnist_dir, num_validation=6)
    validation = load("tfds:mnist", "validation", data_dir=mnist_dir, num_validation=6)
    assert sorted([*train.ids, *validation.ids]) == list(range(20))
    for dataset in (train, validation):
        values = dataset.images[:, 3, 5, 0]
        np.testing.assert_array_equal(values, np.array(stored["train"])[dataset.ids])
        np.testing.assert_array_equal(dataset.labels, MNIST_LABELS["train"][values])


def test_tfds_decodes_only_what_is_asked_for(mnist_dir, monkeypatch):
    decoded = []
    decode = sources._decode_image
    monkeypatch.setattr(
        sources, "_decode_image", lambda *args: decoded.append(args) or decode(*args)
    )
    full = load("tfds:mnist", "train", data_dir=mnist_dir)
    # One more than the images: the first tells the shape.
    assert len(decoded) == 21
    decoded.clear()
    part = load("tfds:mnist", "train", data_dir=mnist_dir, max_examples=5)
    assert len(decoded) == 6
    np.testing.assert_array_equal(part.images, full.images[:5])
    np.testing.assert_array_equal(part.ids, full.ids[:5])


@pytest.mark.parametrize("name", ["tfds:mnist:3.0.1", "tfds:mnist"])
def test_tfds_version_in_the_name(name, mnist_dir):
    assert len(load(name, "test", data_dir=mnist_dir)) == 4


@pytest.mark.parametrize("config", ["/16x16", ":16x16", "/16x16:0.1.0"])
def test_tfds_config_in_the_name(config, tmp_path, tfds):
    del tfds
    with pytest.raises(FileNotFoundError, match=r"imagenet_resized.16x16.0\.1\.0"):
        load(f"tfds:imagenet_resized{config}", "test", data_dir=str(tmp_path))


def test_tfds_not_prepared_says_how_to(tmp_path, tfds):
    del tfds
    with pytest.raises(FileNotFoundError) as caught:
        load("tfds:cifar10", "train", data_dir=str(tmp_path))
    assert f"python -m gfa_jax.data.prepare cifar10 --data_dir {tmp_path}" in str(caught.value)
    assert str(tmp_path / "cifar10") in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"tfds build svhn_cropped .*array_record"):
        load("tfds:svhn_cropped", "train", data_dir=str(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tfds:cifar01", "knows no data set 'cifar01'.* Did you mean 'cifar10'"),
        ("tfds:cifar10:1.0.0", "cannot open 'cifar10:1.0.0'.*3.0.2"),
        ("tfds:imagenet_resized/9x9", "cannot open 'imagenet_resized/9x9'"),
        ("tfds:a/b/c", "cannot read the tfds name 'a/b/c'; valid: BUILDER"),
        ("tfds:../x", "cannot read the tfds name"),
    ],
)
def test_tfds_names_that_are_wrong(name, message, tmp_path, tfds):
    del tfds
    with pytest.raises(ValueError, match=message):
        load(name, "test", data_dir=str(tmp_path))


def test_tfds_validation_split_serves_as_test(tfds, tmp_path):
    records = [{"image": picture(value), "label": value % 2} for value in range(5)]
    splits = {"train": records[:3], "validation": records[3:]}
    write_tfds(tfds, tmp_path, "with_validation", splits)
    test = load("tfds:with_validation", "test", data_dir=str(tmp_path))
    assert test.images.shape == (2, 4, 6, 3)
    assert test.images[:, 0, 0, 0].tolist() == [3, 4]
    assert test.label_names == ("no", "yes")
    # Held-out examples still come from the training split.
    validation = load(
        "tfds:with_validation", "validation", data_dir=str(tmp_path), num_validation=1
    )
    assert validation.images[0, 0, 0, 0] in (0, 1, 2)


def test_tfds_set_for_testing_only(tfds, tmp_path):
    write_tfds(tfds, tmp_path, "only_test", {"test": [{"image": picture(7), "label": 1}]})
    assert len(load("tfds:only_test", "test", data_dir=str(tmp_path))) == 1
    with pytest.raises(ValueError, match="has no train split; its splits: test"):
        load("tfds:only_test", "train", data_dir=str(tmp_path))


def test_tfds_converts_to_the_declared_channels(tfds, tmp_path):
    records = [{"image": picture(9, mode="L"), "label": 0}, {"image": picture(8), "label": 1}]
    write_tfds(tfds, tmp_path, "gray_and_colour", {"test": records})
    dataset = load("tfds:gray_and_colour", "test", data_dir=str(tmp_path))
    assert dataset.image_shape == (4, 6, 3)
    assert dataset.images[:, 0, 0].tolist() == [[9, 9, 9], [8, 8, 8]]


def test_tfds_images_of_different_sizes(tfds, tmp_path):
    records = [{"image": picture(0, (6, 4 + index // 2)), "label": 0} for index in range(4)]
    write_tfds(tfds, tmp_path, "sizes", {"test": records})
    with pytest.raises(ValueError, match=r"\(4, 6, 3\) at position 0, \(5, 6, 3\) at position 2"):
        load("tfds:sizes", "test", data_dir=str(tmp_path))
    assert len(load("tfds:sizes", "test", data_dir=str(tmp_path), max_examples=2)) == 2


def test_tfds_features_that_do_not_fit(tfds, tmp_path):
    record = {"image": picture(0), "label": 0}
    write_tfds(
        tfds, tmp_path, "scalar_label", {"test": [record]}, label=tfds.features.Scalar(np.int64)
    )
    with pytest.raises(ValueError, match="it has image: Image, label: Scalar"):
        load("tfds:scalar_label", "test", data_dir=str(tmp_path))
    write_tfds(tfds, tmp_path, "no_image", {"test": [{"label": 0}]}, image="absent")
    with pytest.raises(ValueError, match="it has label: ClassLabel"):
        load("tfds:no_image", "test", data_dir=str(tmp_path))
    deep = tfds.features.Image(shape=(None, None, 1), dtype=np.uint16)
    write_tfds(
        tfds, tmp_path, "deep", {"test": [{**record, "image": picture(0, mode="I;16")}]}, image=deep
    )
    with pytest.raises(ValueError, match=r"must be uint8, got .*uint16"):
        load("tfds:deep", "test", data_dir=str(tmp_path))


def test_tfds_folder_that_is_damaged(tfds, tmp_path):
    records = [{"image": picture(value), "label": 0} for value in range(3)]
    write_tfds(tfds, tmp_path, "broken", {"test": records})
    (shard,) = tmp_path.glob("broken/*/*.array_record*")
    shard.write_bytes(shard.read_bytes()[:40_000])
    with pytest.raises(ValueError, match=r"broken test in .* cannot be read; delete that folder"):
        load("tfds:broken", "test", data_dir=str(tmp_path))
    bad_image = {"image": b"not an image", "label": 0}
    write_tfds(tfds, tmp_path, "bad_image", {"test": [bad_image]})
    with pytest.raises(ValueError, match=r"bad_image test in .* cannot be read"):
        load("tfds:bad_image", "test", data_dir=str(tmp_path))


@pytest.mark.parametrize("module", ["tensorflow_datasets", "array_record", "importlib_resources"])
def test_tfds_not_installed(module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=f"'{module}': pip install tensorflow-datasets"):
        load("tfds:cifar10", "test")


def real_cifar10_dir():
    root = pathlib.Path(__file__).parents[2]
    folder = pathlib.Path(os.environ.get("GFA_JAX_TFDS_DIR", root / "../shared/data/tfds"))
    return folder if (folder / "cifar10").is_dir() else None


@pytest.mark.skipif(
    real_cifar10_dir() is None, reason="no prepared CIFAR-10: set GFA_JAX_TFDS_DIR to its folder"
)
def test_real_cifar10(tfds):
    del tfds
    data_dir = str(real_cifar10_dir())
    dataset = load("tfds:cifar10", "test", data_dir=data_dir, max_examples=300)
    assert dataset.images.shape == (300, 32, 32, 3)
    assert dataset.label_names[:3] == ("airplane", "automobile", "bird")
    assert set(np.unique(dataset.labels)) == set(range(10))
    # Means of the whole training set: 125.3, 123.0, 113.9.
    np.testing.assert_allclose(dataset.images.mean((0, 1, 2)), [125.3, 123.0, 113.9], atol=8)
    validation = load(
        "tfds:cifar10", "validation", data_dir=data_dir, num_validation=5000, max_examples=16
    )
    train = load("tfds:cifar10", "train", data_dir=data_dir, num_validation=16, max_examples=16)
    assert not set(validation.ids) & set(train.ids)
    assert max(*validation.ids, *train.ids) < 50_000


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


def test_tfds_is_read_and_written_without_tensorflow(mnist_dir):
    load("tfds:mnist", "test", data_dir=mnist_dir)
    assert "tensorflow" not in sys.modules


def test_dataset_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_dataset().labels = np.zeros(6, np.int32)
