"""Tests of the parsers of gfa_jax.data.archives, against the code of tfds's own builders."""

import functools
import glob
import hashlib
import http.server
import io
import os
import pathlib
import sys
import tarfile
import threading
import types
import zipfile

import numpy as np
import pytest
import scipy.io

from gfa_jax.data import load, prepare
from gfa_jax.data.archives import base, imagenet_resized, tiny_imagenet

tfds = pytest.importorskip("tensorflow_datasets")
pytest.importorskip("array_record")
Image = pytest.importorskip("PIL.Image")


def random_images(seed, num, shape=(32, 32, 3)):
    return np.random.default_rng(seed).integers(0, 256, (num, *shape), np.uint8)


def encoded(seed, size=(20, 30), mode="RGB", kind="jpeg"):
    width, height = size
    pixels = random_images(seed, 1, (height, width, 3))[0]
    stream = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(stream, format=kind)
    return stream.getvalue()


def write_tar(path, members, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def write_zip(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def tar_bytes(members):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def files_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


class DownloadManager:
    """What stock builders ask of tfds's manager, with the archives in one folder."""

    def __init__(self, folder):
        self.manual_dir = str(folder)

    def download(self, urls):
        if isinstance(urls, dict):
            return {key: self.download(url) for key, url in urls.items()}
        if isinstance(urls, list):
            return [self.download(url) for url in urls]
        return os.path.join(self.manual_dir, urls.rpartition("/")[2])

    def download_and_extract(self, url):
        target = pathlib.Path(self.manual_dir) / "extracted"
        with tarfile.open(self.download(url)) as archive:
            archive.extractall(target, filter="data")
        return str(target)

    def iter_archive(self, path):
        methods = tfds.download.ExtractMethod
        kind = methods.ZIP if path.endswith(".zip") else methods.TAR_STREAM
        return tfds.download.iter_archive(path, kind)


def stock_examples(name, folder, tmp_path, monkeypatch):
    """Returns (key, record) pairs by split, from the stock builder with Python's files for tf's."""
    from tensorflow_datasets.core.download import extractor
    from tensorflow_datasets.datasets.imagenet2012 import imagenet_common

    gfile = types.SimpleNamespace(
        GFile=open, exists=os.path.exists, listdir=os.listdir, glob=glob.glob
    )
    tf = types.SimpleNamespace(io=types.SimpleNamespace(gfile=gfile))
    base_name, _, config = name.partition("/")
    builder = tfds.builder_cls(base_name)(data_dir=str(tmp_path / "stock"), config=config or None)
    for module in (sys.modules[type(builder).__module__], extractor, imagenet_common):
        if hasattr(module, "tf"):
            monkeypatch.setattr(module, "tf", tf)
    splits = {}
    for generator in builder._split_generators(DownloadManager(folder)):
        pairs = []
        for key, record in builder._generate_examples(**generator.gen_kwargs):
            # Archives are streams: a file object must be read before the next is asked for.
            image = record["image"]
            if isinstance(image, str):
                image = pathlib.Path(image).read_bytes()
            elif not isinstance(image, np.ndarray):
                image = image.read()
            pairs.append((key, {**record, "image": image}))
        splits[str(generator.name)] = pairs
    return splits


def assert_same_examples(ours, stock):
    assert ours.keys() == stock.keys()
    for split, pairs in stock.items():
        found = list(ours[split])
        # tfds orders a split by its keys, whatever the order in which they come.
        assert len(found) == len(pairs)
        found, pairs = dict(found), dict(pairs)
        assert {type(key) for key in found} == {type(key) for key in pairs}
        assert found.keys() == pairs.keys()
        for key, expected in pairs.items():
            record = found[key]
            assert record.keys() == expected.keys()
            for feature, value in expected.items():
                if isinstance(value, np.ndarray) and value.ndim:
                    np.testing.assert_array_equal(np.asarray(record[feature]), value, strict=True)
                else:
                    assert record[feature] == value


def paths_in(folder, name):
    return {file: folder / file for file in prepare.RECIPES[name].files}


def refuse(name, archive, tmp_path, message, **options):
    """Expects an error that names the archive's folder, and nothing left behind."""
    before = files_below(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        prepare.prepare(name, tmp_path / "data", archive=archive, verify=False, **options)
    assert str(tmp_path) in str(caught.value)
    assert not (tmp_path / "data").exists()
    assert files_below(tmp_path) == before


def cut(path, fraction):
    content = path.read_bytes()
    path.write_bytes(content[: int(fraction * len(content))])


def flip_byte(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 0xFF
    path.write_bytes(content)


# SVHN.

SVHN = {"train": 7, "test": 4, "extra": 5}


def svhn_images(split):
    return random_images(list(SVHN).index(split), SVHN[split])


def svhn_labels(split):
    return np.array([10, 1, 9, 10, 2, 5, 7])[: SVHN[split]]


def write_svhn(folder, split, **changes):
    content = {
        "X": svhn_images(split).transpose(1, 2, 3, 0),
        "y": svhn_labels(split).astype(np.uint8)[:, None],
        **changes,
    }
    path = folder / f"{split}_32x32.mat"
    scipy.io.savemat(path, {k: v for k, v in content.items() if v is not None}, do_compression=True)
    return path


@pytest.fixture
def svhn_folder(tmp_path):
    folder = tmp_path / "svhn"
    folder.mkdir()
    for split in SVHN:
        write_svhn(folder, split)
    return folder


def test_svhn_is_that_of_the_stock_builder(svhn_folder, tmp_path, monkeypatch):
    ours = prepare.RECIPES["svhn_cropped"].parse(paths_in(svhn_folder, "svhn_cropped"))
    stock = stock_examples("svhn_cropped", svhn_folder, tmp_path, monkeypatch)
    assert_same_examples(ours.splits, stock)


def test_svhn_is_read_by_load_and_by_stock_tfds(svhn_folder, tmp_path):
    folder = prepare.prepare("svhn_cropped", tmp_path / "data", archive=svhn_folder, verify=False)
    assert folder == tmp_path / "data" / "svhn_cropped" / "3.1.0"
    test = load("tfds:svhn_cropped", "test", data_dir=str(tmp_path / "data"))
    records = tfds.data_source(
        "svhn_cropped", split="test", data_dir=str(tmp_path / "data"), download=False
    )
    assert len(test) == len(records) == 4
    for image, label, record in zip(test.images, test.labels, records, strict=True):
        index = int(record["id"].decode().removeprefix("test_"))
        np.testing.assert_array_equal(image, svhn_images("test")[index])
        np.testing.assert_array_equal(record["image"], image)
        assert label == record["label"] == [0, 1, 9, 0][index]
    assert test.label_names == tuple("0123456789")
    assert len(load("tfds:svhn_cropped", "train", data_dir=str(tmp_path / "data"))) == 7


def test_svhn_holds_one_split_in_memory(svhn_folder, monkeypatch):
    loaded = []
    loadmat = scipy.io.loadmat
    monkeypatch.setattr(scipy.io, "loadmat", lambda path: loaded.append(path.name) or loadmat(path))
    splits = prepare.RECIPES["svhn_cropped"].parse(paths_in(svhn_folder, "svhn_cropped")).splits
    assert not loaded
    next(iter(splits["extra"]))
    assert loaded == ["extra_32x32.mat"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"X": None}, r"extra_32x32.mat must hold X of shape \(32, 32, 3, N\)"),
        ({"X": np.zeros((32, 32, 3, 4), np.uint8)}, "must hold X of shape"),
        ({"X": np.zeros((3, 32, 32, 5), np.uint8)}, "must hold X of shape"),
        ({"X": np.zeros((32, 32, 3, 5))}, "must hold bytes X and integers y, got float64"),
        ({"y": np.arange(1, 6)}, "must hold X of shape"),
        ({"y": np.zeros((5, 1), np.uint8)}, r"labels in 1\.\.10, got \[0\]"),
        ({"y": np.full((5, 1), 11)}, r"labels in 1\.\.10, got \[11\]"),
        ({"y": np.full((5, 1), 1.5)}, "bytes X and integers y, got uint8 and float64"),
    ],
)
def test_svhn_that_breaks_a_rule(changes, message, svhn_folder, tmp_path):
    write_svhn(svhn_folder, "extra", **changes)
    refuse("svhn_cropped", svhn_folder, tmp_path, message)


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.01, 0.3, 0.7, 0.99])
def test_svhn_cut_short(fraction, svhn_folder, tmp_path):
    cut(svhn_folder / "extra_32x32.mat", fraction)
    refuse("svhn_cropped", svhn_folder, tmp_path, "extra_32x32.mat (is not a MATLAB|must hold)")


def test_svhn_damaged_or_something_else(svhn_folder, tmp_path):
    path = svhn_folder / "extra_32x32.mat"
    flip_byte(path, path.stat().st_size // 2)
    refuse("svhn_cropped", svhn_folder, tmp_path, "extra_32x32.mat is not a MATLAB")
    path.write_bytes(b"<html>404</html>" * 100)
    refuse("svhn_cropped", svhn_folder, tmp_path, "extra_32x32.mat is not a MATLAB")


# Downsampled ImageNet.


def npz_bytes(images, labels, save=np.savez_compressed, **others):
    stream = io.BytesIO()
    rows = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    save(stream, data=rows, labels=labels, **others)
    return stream.getvalue()


RESIZED_LABELS = np.array([1, 1000, 500, 2, 3, 1000, 7, 8, 9, 10, 11])


def resized_members(size):
    images = random_images(size, 11, (size, size, 3))
    mean = images[:9].mean(0)
    members = {
        f"train_data_batch_{index + 1}.npz": npz_bytes(
            images[start:stop], RESIZED_LABELS[start:stop], mean=mean
        )
        for index, (start, stop) in enumerate([(0, 5), (5, 9)])
    }
    return members, {"val_data.npz": npz_bytes(images[9:], RESIZED_LABELS[9:], save=np.savez)}


@pytest.fixture(params=[8, 32, 64])
def resized(request, tmp_path):
    size = request.param
    folder = tmp_path / "archives"
    folder.mkdir()
    train, validation = resized_members(size)
    *train_files, validation_file = imagenet_resized.files(size)
    for file, (name, content) in zip(
        train_files, [*train.items()] if size == 64 else [(None, None)], strict=True
    ):
        write_zip(folder / file, train if name is None else {name: content})
    write_zip(folder / validation_file, validation)
    return f"imagenet_resized/{size}x{size}", folder, size


def test_imagenet_resized_is_that_of_the_stock_builder(resized, tmp_path, monkeypatch):
    name, folder, _ = resized
    monkeypatch.setattr(imagenet_resized, "_ROWS_AT_ONCE", 2)
    ours = prepare.RECIPES[name].parse(paths_in(folder, name))
    assert_same_examples(ours.splits, stock_examples(name, folder, tmp_path, monkeypatch))


def test_imagenet_resized_is_read_by_load(resized, tmp_path):
    name, archives, size = resized
    folder = prepare.prepare(name, tmp_path / "data", archive=archives, verify=False)
    assert folder == tmp_path / "data" / name / "0.1.0"
    images = random_images(size, 11, (size, size, 3))
    names = tfds.builder(name, data_dir=str(tmp_path / "data")).info.features["label"].names
    for split, part in (("train", slice(9)), ("test", slice(9, 11))):
        dataset = load(f"tfds:{name}", split, data_dir=str(tmp_path / "data"))
        assert dataset.label_names == tuple(names)
        order = [
            int(np.flatnonzero((images == image).all((1, 2, 3)))[0]) for image in dataset.images
        ]
        assert sorted(order) == list(range(11))[part]
        np.testing.assert_array_equal(dataset.labels, RESIZED_LABELS[order] - 1)


BAD_NPZ = {
    "label 0": ({"labels": np.array([0, 1])}, r"1\.\.1000, got values from 0 to 1"),
    "label 1001": ({"labels": np.array([5, 1001])}, r"1\.\.1000, got values from 5 to 1001"),
    "float labels": ({"labels": np.ones(2)}, "must be integers"),
    "too few labels": ({"labels": np.ones(1, int)}, r"uint8 of shape \(1, 192\)"),
    "other size": ({"data": np.zeros((2, 48), np.uint8)}, r"shape \(2, 192\).* got .*\(2, 48\)"),
    "floats": ({"data": np.zeros((2, 192))}, "must be uint8"),
    "Fortran": ({"data": np.zeros((2, 192), np.uint8, order="F")}, "in C order"),
    "pickled": ({"labels": np.array([1, 2], object)}, "allow_pickle"),
    "no data": ({"data": None}, "data.npy"),
    "no labels": ({"labels": None}, "labels.npy"),
}


@pytest.mark.parametrize("case", BAD_NPZ)
def test_imagenet_resized_that_breaks_a_rule(case, tmp_path):
    changes, message = BAD_NPZ[case]
    folder = tmp_path / "archives"
    folder.mkdir()
    train, validation = resized_members(8)
    write_zip(folder / "Imagenet8_train_npz.zip", train)
    content = {"data": np.zeros((2, 192), np.uint8), "labels": np.array([1, 2]), **changes}
    stream = io.BytesIO()
    np.savez(stream, **{key: value for key, value in content.items() if value is not None})
    path = write_zip(folder / "Imagenet8_val_npz.zip", {"val_data.npz": stream.getvalue()})
    refuse("imagenet_resized/8x8", folder, tmp_path, f"Imagenet8_val.*{message}")

    content = [b"x" * 999, b""][case == "floats"]
    write_zip(path, {"val_data.npz": content})
    refuse("imagenet_resized/8x8", folder, tmp_path, "Imagenet8_val.*not a zip file")
    write_zip(path, {})
    refuse("imagenet_resized/8x8", folder, tmp_path, "holds no files")
    write_zip(path, validation)
    for fraction in (0.0, 0.2, 0.9):
        cut(path, fraction)
        refuse("imagenet_resized/8x8", folder, tmp_path, "Imagenet8_val.*damaged")
        write_zip(path, validation)
    # Within the pixels: found by the checksum of the archive, or of the file in it.
    flip_byte(path, path.stat().st_size // 3)
    refuse("imagenet_resized/8x8", folder, tmp_path, "Imagenet8_val.*damaged")


# ImageNet and Imagenette.

WNIDS = ("n01440764", "n03394916")
JPEGS = {
    f"{wnid}_{index}.JPEG": encoded(10 * number + index, size, mode)
    for number, wnid in enumerate(WNIDS)
    for index, (size, mode) in enumerate(
        [((40, 30), "RGB"), ((25, 60), "L"), ((32, 32), "RGB"), ((28, 36), "CMYK")]
    )
}
VALIDATION_JPEGS = {
    f"ILSVRC2012_val_{index:08d}.JPEG": encoded(90 + index, (30 + index, 33)) for index in (1, 2, 3)
}


def imagenet_train():
    return {
        f"{wnid}.tar": tar_bytes({k: v for k, v in JPEGS.items() if k.startswith(wnid)})
        for wnid in WNIDS
    }


@pytest.fixture
def imagenet_folder(tmp_path):
    folder = tmp_path / "archives"
    folder.mkdir()
    write_tar(folder / "ILSVRC2012_img_train.tar", imagenet_train())
    # Labels are by name, not by place.
    write_tar(folder / "ILSVRC2012_img_val.tar", dict(reversed(VALIDATION_JPEGS.items())))
    return folder


def test_imagenet_is_that_of_the_stock_builder(imagenet_folder, tmp_path, monkeypatch):
    ours = prepare.RECIPES["imagenet2012"].parse(paths_in(imagenet_folder, "imagenet2012"))
    stock = stock_examples("imagenet2012", imagenet_folder, tmp_path, monkeypatch)
    assert set(stock) == {"train", "validation"}
    assert_same_examples(ours.splits, stock)


def test_imagenet_resized_by_prepare_is_read_by_load(imagenet_folder, tmp_path):
    data_dir = tmp_path / "data"
    folder = prepare.prepare(
        "imagenet2012", data_dir, archive=imagenet_folder, verify=False, size=16
    )
    assert folder == data_dir / "imagenet2012_16" / "5.1.0"
    names = (tfds.core.tfds_path("datasets/imagenet2012/labels.txt")).read_text().split()
    validation_names = (
        (tfds.core.tfds_path("datasets/imagenet2012/validation_labels.txt")).read_text().split()
    )
    seen = []
    for split, stored in (("train", "train"), ("test", "validation")):
        dataset = load("tfds:imagenet2012_16", split, data_dir=str(data_dir))
        assert dataset.image_shape == (16, 16, 3)
        info = tfds.builder("imagenet2012_16", data_dir=str(data_dir)).info
        assert info.features["image"].shape == (16, 16, 3)
        assert dataset.label_names == tuple(names)
        records = tfds.data_source(
            "imagenet2012_16", split=stored, data_dir=str(data_dir), download=False
        )
        for position, image, label in zip(dataset.ids, dataset.images, dataset.labels, strict=True):
            record = records[int(position)]
            name = record["file_name"].decode()
            seen.append(name)
            with Image.open(io.BytesIO({**JPEGS, **VALIDATION_JPEGS}[name])) as source:
                pixels = np.asarray(source.convert("RGB"))
                grey = source.mode == "L"
            np.testing.assert_array_equal(record["image"], image)
            if pixels.shape[:2] == (32, 32):
                # The mean of the triangle filter's weights: no pixel is far from the area's mean.
                area = pixels.reshape(16, 2, 16, 2, 3).mean((1, 3))
                assert np.corrcoef(area.ravel(), image.ravel())[0, 1] > 0.8
            assert grey == (np.ptp(image, axis=-1).max() == 0)
            wnid = (
                name.partition("_")[0]
                if split == "train"
                else validation_names[int(name[15:23]) - 1]
            )
            assert names[label] == wnid
    assert sorted(seen) == sorted({**JPEGS, **VALIDATION_JPEGS})


def test_imagenet_order_is_the_stock_one(imagenet_folder, tmp_path):
    # tfds orders by a hash of key and split; the stock name plays no part.
    from tensorflow_datasets.core import hashing

    prepare.prepare("imagenet2012", tmp_path, archive=imagenet_folder, verify=False, size=8)
    records = tfds.data_source(
        "imagenet2012_8", split="train", data_dir=str(tmp_path), download=False
    )
    found = [record["file_name"].decode() for record in records]
    assert found == sorted(JPEGS, key=hashing.Hasher("train").hash_key)


BAD_IMAGENET = {
    "unknown class": ("train", lambda: {"n99999999.tar": b""}, "it holds n99999999.tar"),
    "class no archive": ("train", lambda: {"n01440764.tar": b"x" * 2000}, "n01440764.tar in"),
    "class cut short": (
        "train",
        lambda: {"n01440764.tar": imagenet_train()["n01440764.tar"][:1800]},
        "n01440764.tar in .* damaged",
    ),
    "empty": ("train", lambda: {}, "holds no images"),
    "no image": (
        "train",
        lambda: {"n01440764.tar": tar_bytes({"n01440764_7.JPEG": b"no"})},
        "n01440764_7.JPEG in split train of imagenet2012_8 is not an image",
    ),
    "image cut short": (
        "train",
        lambda: {"n01440764.tar": tar_bytes({"a.JPEG": JPEGS["n01440764_0.JPEG"][:500]})},
        "a.JPEG in .* is not an image, or is damaged",
    ),
    "validation name": ("val", lambda: {"a.JPEG": b"x"}, "it holds a.JPEG"),
    "validation number": (
        "val",
        lambda: {"ILSVRC2012_val_00050001.JPEG": b"x"},
        r"numbers in 1\.\.50000",
    ),
    "validation number 0": ("val", lambda: {"ILSVRC2012_val_00000000.JPEG": b"x"}, "numbers in 1"),
}


@pytest.mark.parametrize("case", BAD_IMAGENET)
def test_imagenet_that_breaks_a_rule(case, imagenet_folder, tmp_path):
    split, members, message = BAD_IMAGENET[case]
    write_tar(imagenet_folder / f"ILSVRC2012_img_{split}.tar", members())
    with pytest.raises(ValueError, match=message):
        prepare.prepare(
            "imagenet2012", tmp_path / "data", archive=imagenet_folder, verify=False, size=8
        )
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("damage", ["header", "boundary"])
def test_imagenet_that_ends_early_is_damaged(damage, imagenet_folder, tmp_path):
    """Where tarfile itself sees an end: at a damaged header, and at the end of a file."""
    path = imagenet_folder / "ILSVRC2012_img_val.tar"
    with tarfile.open(path) as archive:
        second = archive.getmembers()[1].offset
    content = bytearray(path.read_bytes())
    if damage == "header":
        content[second] ^= 0xFF
    else:
        del content[second:]
    path.write_bytes(content)
    refuse("imagenet2012", imagenet_folder, tmp_path, "not a .tar archive, or is damaged", size=8)


def test_images_of_other_formats_are_refused():
    """Pillow would start another program for this one."""
    with pytest.raises(ValueError, match="x is not an image, or is damaged"):
        base.decode_rgb(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "x")


def test_imagenet_cut_short_or_twice_the_same(imagenet_folder, tmp_path):
    path = imagenet_folder / "ILSVRC2012_img_val.tar"
    cut(path, 0.3)
    refuse("imagenet2012", imagenet_folder, tmp_path, "not a .tar archive, or is damaged", size=8)
    path.write_bytes(b"<html>404</html>" * 100)
    refuse("imagenet2012", imagenet_folder, tmp_path, "not a .tar archive, or is damaged", size=8)
    write_tar(path, VALIDATION_JPEGS)
    write_tar(path, dict([next(iter(VALIDATION_JPEGS.items()))]), "a")
    with pytest.raises(ValueError, match=r"split validation .* holds 'ILSVRC.*1\.JPEG' twice"):
        prepare.prepare(
            "imagenet2012", tmp_path / "data", archive=imagenet_folder, verify=False, size=8
        )
    assert not (tmp_path / "data").exists()


def imagenette_members(folder):
    files = {
        f"{folder}/{part}/{name.partition('_')[0]}/{part}_{name}": content
        for part in ("train", "val")
        for name, content in JPEGS.items()
    }
    return {**files, f"{folder}/noisy_imagenette.csv": b"x", f"{folder}/train/.DS_Store": b"x"}


@pytest.mark.parametrize(
    ("config", "folder"),
    [("160px-v2", "imagenette2-160"), ("full-size", "imagenette"), ("320px", "imagenette-320")],
)
def test_imagenette_is_that_of_the_stock_builder(config, folder, tmp_path, monkeypatch):
    members = imagenette_members(folder)
    del members[f"{folder}/train/.DS_Store"]
    archive = write_tar(tmp_path / f"{folder}.tgz", members, "w:gz")
    name = f"imagenette/{config}"
    ours = prepare.RECIPES[name].parse({archive.name: archive})
    assert_same_examples(ours.splits, stock_examples(name, tmp_path, tmp_path, monkeypatch))


def test_imagenette_is_read_by_load(tmp_path):
    folder = "imagenette2-160"
    archive = write_tar(tmp_path / f"{folder}.tgz", imagenette_members(folder), "w:gz")
    name = "imagenette/160px-v2"
    prepared = prepare.prepare(name, tmp_path / "data", archive=archive, verify=False, size=24)
    assert prepared == tmp_path / "data" / "imagenette_24" / "160px-v2" / "1.0.0"
    for split in ("train", "test"):
        dataset = load("tfds:imagenette_24/160px-v2", split, data_dir=str(tmp_path / "data"))
        assert dataset.images.shape == (8, 24, 24, 3)
        assert np.bincount(dataset.labels).tolist() == [4, 0, 0, 0, 0, 4]
        assert dataset.num_classes == 10


def test_imagenette_that_breaks_a_rule(tmp_path):
    folder = "imagenette2-160"
    path = tmp_path / f"{folder}.tgz"
    name = "imagenette/160px-v2"
    write_tar(
        path, {k: v for k, v in imagenette_members(folder).items() if "/val/" not in k}, "w:gz"
    )
    refuse(name, path, tmp_path, "imagenette2-160/val in .* holds no images", size=8)
    write_tar(path, {f"{folder}/train/n00000001/a.JPEG": b""}, "w:gz")
    refuse(name, path, tmp_path, "it holds .*n00000001/a.JPEG", size=8)
    write_tar(path, imagenette_members(folder), "w:gz")
    cut(path, 0.7)
    refuse(name, path, tmp_path, "not a .tar.gz archive, or is damaged", size=8)
    write_tar(path, imagenette_members("imagenette-160"), "w:gz")
    refuse(name, path, tmp_path, "imagenette2-160/train in .* holds no images", size=8)


def test_size_is_asked_for_where_images_differ(imagenet_folder, tmp_path, svhn_folder, capsys):
    data_dir = tmp_path / "data"
    message = "images of imagenet2012 differ in size.* 16.4 GB for size=64, 200 GB for size=224"
    with pytest.raises(ValueError, match=message):
        prepare.prepare("imagenet2012", data_dir, archive=imagenet_folder, verify=False)
    with pytest.raises(ValueError, match="images of svhn_cropped have one size already"):
        prepare.prepare("svhn_cropped", data_dir, archive=svhn_folder, verify=False, size=8)
    with pytest.raises(ValueError, match="size=0 must be an integer >= 1"):
        prepare.prepare("imagenet2012", data_dir, archive=imagenet_folder, verify=False, size=0)
    with pytest.raises(ValueError, match=r"without an account: get ILSVRC.*image-net\.org"):
        prepare.prepare("imagenet2012", data_dir, download=True, size=8)
    with pytest.raises(ValueError, match=r"train\.tar is not the official archive.* 147897477120"):
        prepare.prepare("imagenet2012", data_dir, archive=imagenet_folder, size=8)
    assert not data_dir.exists()
    arguments = ["imagenet2012", "--data_dir", str(data_dir), "--archive", str(imagenet_folder)]
    assert prepare.main([*arguments, "--no_verify"]) == 1
    assert "give size" in capsys.readouterr().err
    assert prepare.main([*arguments, "--no_verify", "--size", "8"]) == 0
    assert "is now prepared" in capsys.readouterr().out
    assert prepare.main([*arguments, "--size", "8"]) == 0
    assert "was already prepared" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("svhn_cropped", "prepare svhn_cropped --data_dir .* --download.$"),
        ("tiny_imagenet", "prepare tiny_imagenet "),
        ("imagenet_resized/32x32", "prepare imagenet_resized/32x32 "),
        ("imagenet_resized", "prepare imagenet_resized/8x8 "),
        ("imagenet2012", "--size SIZE, and read it as tfds:imagenet2012_SIZE"),
        ("imagenet2012_64", "prepare imagenet2012 --data_dir [^(]* --archive PATH --size 64$"),
        ("imagenette/160px-v2", "read it as tfds:imagenette_SIZE/160px-v2"),
        ("imagenette_128/160px-v2", "prepare imagenette/160px-v2 .* --size 128$"),
        ("imagenette", "prepare imagenette/full-size-v2 "),
    ],
)
def test_what_is_not_prepared_says_how_to(name, command, tmp_path):
    with pytest.raises(FileNotFoundError, match=command) as caught:
        load(f"tfds:{name}", "test", data_dir=str(tmp_path))
    assert str(tmp_path) in str(caught.value)
    assert not files_below(tmp_path)


@pytest.mark.parametrize("name", ["cifar10_64", "imagenette_128", "imagenet2012_x"])
def test_names_that_nothing_makes(name, tmp_path):
    with pytest.raises(ValueError, match=f"knows no data set '{name}'"):
        load(f"tfds:{name}", "test", data_dir=str(tmp_path))


# Tiny-ImageNet.

TINY_CLASSES = [f"n{99999999 - 37 * index:08d}" for index in range(200)]
TINY = "tiny-imagenet-200/"


def tiny_members():
    labels = {"a": TINY_CLASSES[0], "b": TINY_CLASSES[199], "c": TINY_CLASSES[7]}
    members = {
        TINY + "wnids.txt": "\n".join(TINY_CLASSES).encode(),
        TINY + "words.txt": b"not read",
        TINY + "test/images/test_0.JPEG": b"not read",
    }
    for seed, (name, wnid) in enumerate(labels.items()):
        image = encoded(seed, (64, 64), "L" if name == "b" else "RGB")
        members[f"{TINY}train/{wnid}/images/{wnid}_{seed}.JPEG"] = image
        members[f"{TINY}train/{wnid}/{wnid}_boxes.txt"] = b"not read"
        members[f"{TINY}val/images/val_{seed}.JPEG"] = encoded(10 + seed, (64, 64))
    lines = [f"val_{seed}.JPEG\t{TINY_CLASSES[5 * seed]}\t0\t0\t62\t61\n" for seed in range(3)]
    members[TINY + "val/val_annotations.txt"] = "".join(lines).encode()
    return members


def test_tiny_imagenet_is_read_by_load_and_by_stock_tfds(tmp_path):
    members = tiny_members()
    archive = write_zip(tmp_path / "tiny-imagenet-200.zip", members)
    folder = prepare.prepare("tiny_imagenet", tmp_path / "data", archive=archive, verify=False)
    assert folder == tmp_path / "data" / "tiny_imagenet" / "1.0.0"
    classes = sorted(TINY_CLASSES)
    for split, stored in (("train", "train"), ("test", "validation")):
        dataset = load("tfds:tiny_imagenet", split, data_dir=str(tmp_path / "data"))
        assert dataset.images.shape == (3, 64, 64, 3)
        assert dataset.label_names == tuple(classes)
        records = tfds.data_source(
            "tiny_imagenet", split=stored, data_dir=str(tmp_path / "data"), download=False
        )
        names = set()
        for position, image, label in zip(dataset.ids, dataset.images, dataset.labels, strict=True):
            record = records[int(position)]
            name = record["id"].decode()
            names.add(name)
            if split == "train":
                wnid = name.partition("_")[0]
                member = f"{TINY}train/{wnid}/images/{name}.JPEG"
            else:
                wnid = TINY_CLASSES[5 * int(name.removeprefix("val_"))]
                member = f"{TINY}val/images/{name}.JPEG"
            assert classes[label] == wnid
            with Image.open(io.BytesIO(members[member])) as source:
                expected = np.asarray(source.convert("RGB"))
            np.testing.assert_array_equal(image, expected)
            np.testing.assert_array_equal(record["image"], expected)
        assert len(names) == 3


def tiny_with(**changes):
    members = tiny_members()
    for name, content in changes.items():
        members[TINY + name] = content
    return {name: content for name, content in members.items() if content is not None}


TRAIN_NAME = f"train/{TINY_CLASSES[0]}/images/{TINY_CLASSES[0]}_0.JPEG"
BAD_TINY = {
    "no wnids": ({"wnids.txt": None}, "wnids.txt"),
    "too few classes": ({"wnids.txt": b"n1 n2"}, "must hold 200 different classes, it holds 2"),
    "a class twice": (
        {"wnids.txt": "\n".join([*TINY_CLASSES[:199], TINY_CLASSES[0]]).encode()},
        "it holds 199",
    ),
    "no annotations": ({"val/val_annotations.txt": None}, "val_annotations.txt"),
    "no tabs": ({"val/val_annotations.txt": b"val_0.JPEG n1\n"}, "or is damaged"),
    "not text": ({"val/val_annotations.txt": b"\xff\xfe"}, "or is damaged"),
    "no line": (
        {"val/images/val_9.JPEG": encoded(0, (64, 64))},
        "val_annotations.txt in .* has no line for val_9.JPEG",
    ),
    "no image": ({"val/images/val_1.JPEG": None}, "has 3 lines for 2 images"),
    "unknown class": ({"train/n1/images/n1_0.JPEG": b""}, "classes that wnids.txt lacks: n1"),
    "another size": ({TRAIN_NAME: encoded(0, (64, 63))}, "must be 64x64, got 64x63"),
    "no JPEG": ({TRAIN_NAME: b"x"}, f"{TRAIN_NAME} in .* is not an image, or is damaged"),
    "cut JPEG": ({TRAIN_NAME: encoded(0, (64, 64))[:900]}, "is not an image, or is damaged"),
}


@pytest.mark.parametrize("case", BAD_TINY)
def test_tiny_imagenet_that_breaks_a_rule(case, tmp_path):
    changes, message = BAD_TINY[case]
    archive = write_zip(tmp_path / "tiny-imagenet-200.zip", tiny_with(**changes))
    refuse("tiny_imagenet", archive, tmp_path, message)


def test_tiny_imagenet_without_images_or_damaged(tmp_path):
    path = tmp_path / "tiny-imagenet-200.zip"
    members = {name: data for name, data in tiny_members().items() if "/train/" not in name}
    write_zip(path, members)
    refuse("tiny_imagenet", path, tmp_path, "lacks images of train")
    for content in (b"", b"<html>404</html>"):
        path.write_bytes(content)
        refuse("tiny_imagenet", path, tmp_path, "is not the archive of Tiny-ImageNet")
    write_zip(path, tiny_members())
    cut(path, 0.8)
    refuse("tiny_imagenet", path, tmp_path, "is not the archive of Tiny-ImageNet")
    write_zip(path, tiny_members())
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(TINY + "val/images/val_1.JPEG")
    flip_byte(path, info.header_offset + 30 + len(info.filename) + info.compress_size // 2)
    refuse("tiny_imagenet", path, tmp_path, "or is damaged")


def test_tiny_imagenet_that_is_not_the_official_archive(tmp_path):
    archive = write_zip(tmp_path / "tiny-imagenet-200.zip", tiny_members())
    with pytest.raises(ValueError, match="not the official archive.* has 248100043 bytes"):
        prepare.prepare("tiny_imagenet", tmp_path / "data", archive=archive)
    assert not (tmp_path / "data").exists()


def test_tiny_imagenet_is_downloaded_and_checked(tmp_path, monkeypatch, capsys):
    archive = write_zip(tmp_path / "tiny-imagenet-200.zip", tiny_members())

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            del args

    for variable in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(variable, "127.0.0.1")
    handler = functools.partial(Handler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}/{archive.name}"
        monkeypatch.setattr(tiny_imagenet, "_URL", url)
        monkeypatch.setattr(tiny_imagenet, "_NUM_BYTES", archive.stat().st_size)
        arguments = ["tiny_imagenet", "--data_dir", str(tmp_path / "data"), "--download"]
        try:
            assert prepare.main(arguments) == 1
            assert "wrong checksum" in capsys.readouterr().err
            checksum = hashlib.sha256(archive.read_bytes()).hexdigest()
            monkeypatch.setattr(tiny_imagenet, "_SHA256", checksum)
            assert prepare.main(arguments) == 0
        finally:
            server.shutdown()
            thread.join()
    assert len(load("tfds:tiny_imagenet", "train", data_dir=str(tmp_path / "data"))) == 3
