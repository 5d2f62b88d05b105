"""Tests of gfa_jax.data.tfds_source on prepared tfds folders."""

import gc
import gzip
import os
import pathlib
import sys
import threading
import time

import jax
import numpy as np
import pytest

from gfa_jax.data import load, open_lazily, prepare, tfds_source, train_batch, train_input


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
    monkeypatch.setattr(tfds_source, "_DECODE_CHUNK", chunk)
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
    decode = tfds_source._decode_image
    monkeypatch.setattr(
        tfds_source, "_decode_image", lambda *args: decoded.append(args) or decode(*args)
    )
    full = load("tfds:mnist", "train", data_dir=mnist_dir)
    assert len(decoded) == 20
    decoded.clear()
    part = load("tfds:mnist", "train", data_dir=mnist_dir, max_examples=5)
    assert len(decoded) == 5
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
    with pytest.raises(FileNotFoundError, match=r"tfds build eurosat/rgb .*array_record"):
        load("tfds:eurosat/rgb", "train", data_dir=str(tmp_path))
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


def test_tfds_is_read_and_written_without_tensorflow(mnist_dir):
    load("tfds:mnist", "test", data_dir=mnist_dir)
    assert "tensorflow" not in sys.modules


def test_lazy_reads_decode_what_is_asked_for_and_open_files_once(mnist_dir, monkeypatch):
    decoded = []
    decode = tfds_source._decode_image
    monkeypatch.setattr(
        tfds_source, "_decode_image", lambda *args: decoded.append(1) or decode(*args)
    )
    lazy = open_lazily("tfds:mnist", "train", data_dir=mnist_dir, num_validation=5)
    assert len(decoded) == 1  # the first one, for its shape
    whole = load("tfds:mnist", "train", data_dir=mnist_dir, num_validation=5)
    decoded.clear()
    for positions in (np.array([3, 1]), np.array([14]), np.array([0, 7, 3])):
        for got, expected in zip(lazy.read(positions), whole.read(positions), strict=True):
            np.testing.assert_array_equal(got, expected)
    assert len(decoded) == 6
    assert lazy.image_shape == (28, 28, 1)
    assert lazy.label_names == whole.label_names == tuple("0123456789")


def test_a_small_read_is_decoded_by_several_threads(mnist_dir, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    lazy = open_lazily("tfds:mnist", "train", data_dir=mnist_dir)
    decode = tfds_source._decode_image
    meeting = threading.Barrier(4, timeout=60)
    met = {threading.get_ident()}  # the caller decodes the first image, for the shape

    def decode_together(*args):
        if threading.get_ident() not in met:
            met.add(threading.get_ident())
            meeting.wait()
        return decode(*args)

    monkeypatch.setattr(tfds_source, "_decode_image", decode_together)
    images, labels, ids = lazy.read(np.arange(20))
    assert len(met) == 1 + 4
    monkeypatch.undo()
    whole = load("tfds:mnist", "train", data_dir=mnist_dir)
    np.testing.assert_array_equal(images, whole.images)
    np.testing.assert_array_equal(labels, whole.labels)
    np.testing.assert_array_equal(ids, whole.ids)


def test_a_stream_of_tfds_gives_the_batches_of_the_set_in_memory_and_closes_its_files(mnist_dir):
    pytest.importorskip("grain")
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    threads = threading.active_count()
    lazy = open_lazily("tfds:mnist", "train", data_dir=mnist_dir, num_validation=5)
    whole = load("tfds:mnist", "train", data_dir=mnist_dir, num_validation=5)
    batch_at = train_input(lazy, 8, seed=1, sharding=sharding, placement="stream")
    for step in (0, 1, 2, 3, 30, 31, 2):  # fifteen examples an epoch
        batch, expected = batch_at(step), train_batch(whole, 8, seed=1, step=step)
        np.testing.assert_array_equal(batch["inputs"], expected["inputs"], strict=True)
        np.testing.assert_array_equal(batch["labels"], expected["labels"], strict=True)
    if pathlib.Path("/proc/self/fd").is_dir():
        assert open_files(mnist_dir)
    del batch_at, lazy, whole
    deadline = time.monotonic() + 30
    while threading.active_count() > threads or open_files(mnist_dir):
        assert time.monotonic() < deadline, (threading.enumerate(), open_files(mnist_dir))
        gc.collect()
        time.sleep(0.02)


def open_files(folder):
    """Returns the files in a folder that this process has open; none where it cannot be told."""
    links = pathlib.Path("/proc/self/fd")
    targets = []
    for link in links.iterdir() if links.is_dir() else ():
        try:
            targets.append(os.readlink(link))
        except FileNotFoundError:  # closed meanwhile
            continue
    return [target for target in targets if target.startswith(folder)]
