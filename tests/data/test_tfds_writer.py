"""Tests of gfa_jax.data.tfds_writer: a split that is ordered on disk."""

import gzip
import importlib.util
import resource

import numpy as np
import pytest

from gfa_jax.data import prepare, tfds_source, tfds_writer

tfds = pytest.importorskip("tensorflow_datasets")
pytest.importorskip("array_record")
pytest.importorskip("PIL")

without_tensorflow = pytest.mark.skipif(
    importlib.util.find_spec("tensorflow") is not None, reason="tfds uses TensorFlow where it is"
)


@pytest.fixture
def archives(tmp_path):
    folder = tmp_path / "archives"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for prefix, num in (("train", 3000), ("t10k", 5)):
        for kind, array in (
            ("images-idx3", rng.integers(0, 256, (num, 28, 28), np.uint8)),
            ("labels-idx1", rng.integers(0, 10, num, np.uint8)),
        ):
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
            path = folder / f"{prefix}-{kind}-ubyte.gz"
            path.write_bytes(gzip.compress(header + array.tobytes(), 1))
    return folder


def read(folder):
    builder = tfds.builder("mnist", data_dir=str(folder))
    return [
        [
            (record["image"].tobytes(), int(record["label"]))
            for record in builder.as_data_source(split)
        ]
        for split in ("train", "test")
    ]


@without_tensorflow
def test_a_split_that_is_ordered_on_disk_is_the_same(archives, tmp_path, monkeypatch):
    from tensorflow_datasets.core import shuffle

    prepare.prepare("mnist", tmp_path / "memory", archive=archives, verify=False)
    written = []
    write = tfds_writer._SpillWriter.write
    monkeypatch.setattr(
        tfds_writer._SpillWriter, "write", lambda *args: written.append(args[0]) or write(*args)
    )
    # 1 GB otherwise, which the extra digits of SVHN exceed.
    monkeypatch.setattr(shuffle, "MAX_MEM_BUFFER_SIZE", 10_000)
    monkeypatch.setattr(tfds_writer, "_BUFFER_SIZE", 2000)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, limit[1]), limit[1]))
    try:
        prepare.prepare("mnist", tmp_path / "disk", archive=archives, verify=False)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    assert len(set(map(id, written))) > 900
    assert read(tmp_path / "memory") == read(tmp_path / "disk")
    assert not list(tmp_path.rglob("bucket_*"))
    assert not list(tmp_path.rglob("incomplete*"))


@without_tensorflow
def test_tensorflow_is_asked_for_again_afterwards(archives, tmp_path):
    from tensorflow_datasets.core import shuffle

    before = shuffle.tf
    prepare.prepare("mnist", tmp_path, archive=archives, verify=False)
    assert shuffle.tf is before
    with pytest.raises(KeyError), tfds_writer._spill_without_tensorflow():
        assert shuffle.tf is not before
        raise KeyError
    assert shuffle.tf is before


def test_what_does_not_fit_in_memory_is_refused_before_it_is_read(archives, tmp_path, monkeypatch):
    from gfa_jax.data import load

    prepare.prepare("mnist", tmp_path, archive=archives, verify=False)
    sysconf = {"SC_PAGE_SIZE": 1000, "SC_PHYS_PAGES": 1000}
    monkeypatch.setattr(tfds_source.os, "sysconf", sysconf.__getitem__)
    message = r"mnist train needs 0\.00235 GB in memory at 28x28 .* has 0\.001 GB.* max_examples"
    with pytest.raises(ValueError, match=message):
        load("tfds:mnist", "train", data_dir=str(tmp_path))
    assert len(load("tfds:mnist", "train", data_dir=str(tmp_path), max_examples=1200)) == 1200
