"""Tests of gfa_jax.data.prepare with archives of the official layout and few images."""

import functools
import gzip
import hashlib
import http.server
import io
import json
import subprocess
import sys
import tarfile
import threading
import types

import numpy as np
import pytest

from gfa_jax.data import load, prepare
from gfa_jax.data.archives import base, mnist

tfds = pytest.importorskip("tensorflow_datasets")
pytest.importorskip("array_record")
pytest.importorskip("PIL")

CIFAR10_NAMES = [f"class {index}" for index in range(10)]
COARSE_NAMES = [f"coarse {index}" for index in range(20)]
FINE_NAMES = [f"fine {index}" for index in range(100)]


def random_images(seed, num, shape):
    return np.random.default_rng(seed).integers(0, 256, (num, *shape), np.uint8)


def tar_gz(members):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for name, content in members.items():
            if isinstance(content, bytes):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
            else:
                archive.addfile(content)
    return stream.getvalue()


def cifar_records(images, *labels):
    pixels = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    columns = [np.asarray(values, np.uint8)[:, None] for values in labels]
    return np.concatenate([*columns, pixels], axis=1).tobytes()


CIFAR10_TRAIN = random_images(0, 15, (32, 32, 3))
CIFAR10_TEST = random_images(1, 4, (32, 32, 3))
CIFAR10_TRAIN_LABELS = np.arange(15) % 10
CIFAR10_TEST_LABELS = np.array([9, 0, 3, 3])


def cifar10_members():
    folder = "cifar-10-batches-bin/"
    members = {
        folder + "batches.meta.txt": ("\n".join(CIFAR10_NAMES) + "\n\n").encode(),
        folder + "readme.html": b"not read",
        folder + "test_batch.bin": cifar_records(CIFAR10_TEST, CIFAR10_TEST_LABELS),
    }
    for index in range(5):
        part = slice(3 * index, 3 * index + 3)
        members[f"{folder}data_batch_{index + 1}.bin"] = cifar_records(
            CIFAR10_TRAIN[part], CIFAR10_TRAIN_LABELS[part]
        )
    return members


@pytest.fixture
def cifar10_archive(tmp_path):
    path = tmp_path / "cifar-10-binary.tar.gz"
    path.write_bytes(tar_gz(cifar10_members()))
    return path


def idx(array):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return header + array.astype(np.uint8).tobytes()


MNIST_TRAIN = random_images(2, 6, (28, 28))
MNIST_TEST = random_images(3, 3, (28, 28))
MNIST_TRAIN_LABELS = np.array([5, 0, 4, 1, 9, 2])
MNIST_TEST_LABELS = np.array([7, 2, 1])


@pytest.fixture
def mnist_folder(tmp_path):
    folder = tmp_path / "archives"
    folder.mkdir()
    for name, array in (
        ("train-images-idx3-ubyte.gz", MNIST_TRAIN),
        ("train-labels-idx1-ubyte.gz", MNIST_TRAIN_LABELS),
        ("t10k-images-idx3-ubyte.gz", MNIST_TEST),
        ("t10k-labels-idx1-ubyte.gz", MNIST_TEST_LABELS),
    ):
        (folder / name).write_bytes(gzip.compress(idx(array)))
    return folder


def read_stock(name, split, data_dir):
    """Reads with tfds alone, decoding included."""
    source = tfds.data_source(name, split=split, data_dir=str(data_dir), download=False)
    return [source[index] for index in range(len(source))]


def files_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_cifar10_is_read_pixel_exact_by_stock_tfds(cifar10_archive, tmp_path):
    data_dir = tmp_path / "data"
    folder = prepare.prepare("cifar10", data_dir, archive=cifar10_archive, verify=False)
    stock_version = str(tfds.builder_cls("cifar10").VERSION)
    assert folder == data_dir / "cifar10" / stock_version
    # Nothing but the data set: no download folder, no extracted archive.
    assert {path.split("/")[0] for path in files_below(data_dir)} == {"cifar10"}
    for split, images, labels in (
        ("train", CIFAR10_TRAIN, CIFAR10_TRAIN_LABELS),
        ("test", CIFAR10_TEST, CIFAR10_TEST_LABELS),
    ):
        records = read_stock("cifar10", split, data_dir)
        assert sorted(record["id"].decode() for record in records) == [
            f"{split}_{index:05d}" for index in range(len(images))
        ]
        for record in records:
            index = int(record["id"].decode().removeprefix(f"{split}_"))
            np.testing.assert_array_equal(record["image"], images[index], strict=True)
            assert record["label"] == labels[index]
    info = tfds.builder("cifar10", data_dir=str(data_dir)).info
    assert info.features["label"].names == CIFAR10_NAMES
    assert info.splits["train"].num_examples == 15


def test_cifar10_is_read_by_load_in_the_stored_order(cifar10_archive, tmp_path):
    prepare.prepare("cifar10", tmp_path, archive=cifar10_archive, verify=False)
    dataset = load("tfds:cifar10", "test", data_dir=str(tmp_path))
    records = read_stock("cifar10", "test", tmp_path)
    np.testing.assert_array_equal(dataset.images, [record["image"] for record in records])
    np.testing.assert_array_equal(dataset.labels, [record["label"] for record in records])
    assert dataset.images.dtype == np.uint8
    assert dataset.label_names == tuple(CIFAR10_NAMES)


def test_cifar100_has_fine_and_coarse_labels(tmp_path):
    images = random_images(4, 5, (32, 32, 3))
    coarse, fine = np.array([19, 0, 7, 7, 1]), np.array([99, 0, 50, 51, 3])
    folder = "cifar-100-binary/"
    archive = tmp_path / "cifar-100-binary.tar.gz"
    archive.write_bytes(
        tar_gz(
            {
                folder + "coarse_label_names.txt": "\n".join(COARSE_NAMES).encode(),
                folder + "fine_label_names.txt": "\n".join(FINE_NAMES).encode(),
                folder + "train.bin": cifar_records(images, coarse, fine),
                folder + "test.bin": cifar_records(images[:2], coarse[:2], fine[:2]),
            }
        )
    )
    prepare.prepare("cifar100", tmp_path, archive=archive, verify=False)
    records = read_stock("cifar100", "train", tmp_path)
    assert len(records) == 5
    for record in records:
        index = int(record["id"].decode().removeprefix("train_"))
        np.testing.assert_array_equal(record["image"], images[index])
        assert (record["coarse_label"], record["label"]) == (coarse[index], fine[index])
    dataset = load("tfds:cifar100", "test", data_dir=str(tmp_path))
    assert set(dataset.labels) == {99, 0}
    assert dataset.label_names == tuple(FINE_NAMES)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "kmnist"])
def test_mnist_and_its_likes(name, mnist_folder, tmp_path):
    prepare.prepare(name, tmp_path, archive=mnist_folder, verify=False)
    for split, images, labels in (
        ("train", MNIST_TRAIN, MNIST_TRAIN_LABELS),
        ("test", MNIST_TEST, MNIST_TEST_LABELS),
    ):
        records = read_stock(name, split, tmp_path)
        order = [int(np.flatnonzero(labels == record["label"])[0]) for record in records]
        assert sorted(order) == list(range(len(images)))
        for record, index in zip(records, order, strict=True):
            np.testing.assert_array_equal(record["image"], images[index][..., None], strict=True)
    dataset = load(f"tfds:{name}", "test", data_dir=str(tmp_path))
    assert dataset.image_shape == (28, 28, 1)
    expected_name = {"mnist": "0", "fashion_mnist": "T-shirt/top", "kmnist": "o"}[name]
    assert dataset.label_names[0] == expected_name


def test_order_is_that_of_the_stock_builder(cifar10_archive, tmp_path, monkeypatch):
    # The stock builder as it is, but for what needs TensorFlow: extraction and PNG encoding.
    from PIL import Image
    from tensorflow_datasets.image_classification import cifar

    extracted = tmp_path / "extracted"
    with tarfile.open(cifar10_archive) as archive:
        archive.extractall(extracted, filter="data")
    stock_load_data = cifar._load_data

    def load_data(path, num_labels):
        for labels, image in stock_load_data(path, num_labels):
            yield labels, Image.fromarray(np.ascontiguousarray(image))

    open_without_tensorflow = types.SimpleNamespace(
        io=types.SimpleNamespace(gfile=types.SimpleNamespace(GFile=open))
    )
    monkeypatch.setattr(cifar, "tf", open_without_tensorflow)
    monkeypatch.setattr(cifar, "_load_data", load_data)
    monkeypatch.setattr(
        tfds.download.DownloadManager, "download_and_extract", lambda self, url: str(extracted)
    )
    stock_dir = tmp_path / "stock"
    builder = tfds.builder("cifar10", data_dir=str(stock_dir))
    builder.download_and_prepare(
        file_format="array_record",
        download_config=tfds.download.DownloadConfig(try_download_gcs=False),
    )
    folder = prepare.prepare("cifar10", tmp_path / "ours", archive=cifar10_archive, verify=False)
    for split in ("train", "test"):
        ids = [
            [record["id"] for record in read_stock("cifar10", split, data_dir)]
            for data_dir in (stock_dir, tmp_path / "ours")
        ]
        assert ids[0] == ids[1]
    stock_folder = stock_dir / "cifar10" / folder.name
    assert files_below(folder) == files_below(stock_folder)
    ours, stock = (
        json.loads((path / "dataset_info.json").read_text()) for path in (folder, stock_folder)
    )
    assert ours == stock


def test_prepared_data_is_never_written_again(cifar10_archive, tmp_path, capsys):
    arguments = ["cifar10", "--data_dir", str(tmp_path), "--archive", str(cifar10_archive)]
    assert prepare.main([*arguments, "--no_verify"]) == 0
    assert "is now prepared" in capsys.readouterr().out
    folder = next((tmp_path / "cifar10").iterdir())
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    cifar10_archive.write_bytes(b"something else")
    assert prepare.main(arguments) == 0
    assert "was already prepared" in capsys.readouterr().out
    # Neither option is needed any more.
    assert prepare.main(arguments[:3]) == 0
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_a_folder_in_another_format_is_left_as_it_is(cifar10_archive, tmp_path):
    folder = tmp_path / "cifar10" / str(tfds.builder_cls("cifar10").VERSION)
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text("{}")
    (folder / "cifar10-test.tfrecord-00000-of-00001").write_text("")
    with pytest.raises(ValueError, match="not in array_record format"):
        prepare.prepare("cifar10", tmp_path, archive=cifar10_archive, verify=False)
    assert len(list(folder.iterdir())) == 2


def test_unofficial_archive_is_refused_unless_told_otherwise(cifar10_archive, tmp_path, capsys):
    data_dir = tmp_path / "data"
    arguments = ["cifar10", "--data_dir", str(data_dir), "--archive", str(cifar10_archive)]
    assert prepare.main(arguments) == 1
    error = capsys.readouterr().err
    official = next(iter(tfds.builder_cls("cifar10").url_infos.values()))
    assert official.checksum in error
    assert hashlib.sha256(cifar10_archive.read_bytes()).hexdigest() in error
    assert not data_dir.exists()


def with_member(name, content):
    members = cifar10_members()
    members[f"cifar-10-batches-bin/{name}"] = content
    return tar_gz(members)


def link_member(name, link_type):
    info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
    info.type = link_type
    info.linkname = "/etc/hostname"
    return with_member(name, info)


def without_member(name):
    members = cifar10_members()
    del members[f"cifar-10-batches-bin/{name}"]
    return tar_gz(members)


def traversing_archive():
    return tar_gz({f"../{name}": content for name, content in cifar10_members().items()})


def damaged(content, position, change=0xFF):
    changed = bytearray(content)
    changed[position] ^= change
    return bytes(changed)


BAD_CIFAR_ARCHIVES = {
    "not an archive": (lambda: b"<html>404</html>", "not a .tar.gz archive, or is damaged"),
    "empty": (lambda: b"", "not a .tar.gz archive, or is damaged"),
    "gzip of something else": (lambda: gzip.compress(b"x" * 2000), "or is damaged"),
    "cut short": (lambda: tar_gz(cifar10_members())[:30_000], "or is damaged"),
    "wrong gzip checksum": (lambda: damaged(tar_gz(cifar10_members()), -8), "or is damaged"),
    "damaged inside": (lambda: damaged(tar_gz(cifar10_members()), 20_000), "or is damaged"),
    "member missing": (lambda: without_member("data_batch_3.bin"), "lacks .*data_batch_3.bin"),
    "other folder": (traversing_archive, "lacks .*batches.meta.txt"),
    "symbolic link": (lambda: link_member("test_batch.bin", tarfile.SYMTYPE), "lacks .*test_batch"),
    "hard link": (lambda: link_member("test_batch.bin", tarfile.LNKTYPE), "lacks .*test_batch"),
    "short record": (lambda: with_member("test_batch.bin", b"\0" * 3072), "records of 3073 bytes"),
    "no records": (lambda: with_member("test_batch.bin", b""), "records of 3073 bytes"),
    "label too large": (
        lambda: with_member("data_batch_2.bin", b"\x0a" + b"\0" * 3072),
        r"labels in \[0, 10\), got 10 at position 3",
    ),
    "too few names": (
        lambda: with_member("batches.meta.txt", b"cat\ndog\n"),
        r"labels in \[0, 2\), got 9",
    ),
}


@pytest.mark.parametrize("case", BAD_CIFAR_ARCHIVES)
def test_bad_cifar_archive_leaves_nothing(case, tmp_path):
    make, message = BAD_CIFAR_ARCHIVES[case]
    archive = tmp_path / "in" / "cifar-10-binary.tar.gz"
    archive.parent.mkdir()
    archive.write_bytes(make())
    data_dir = tmp_path / "data"
    with pytest.raises(ValueError, match=message) as caught:
        prepare.prepare("cifar10", data_dir, archive=archive, verify=False)
    assert str(archive) in str(caught.value)
    assert files_below(tmp_path) == ["in", "in/cifar-10-binary.tar.gz"]


BAD_IDX_FILES = {
    "not gzip": (idx(MNIST_TEST_LABELS), "not a .gz file, or is damaged"),
    "cut short": (gzip.compress(idx(MNIST_TEST_LABELS))[:-9], "or is damaged"),
    "wrong checksum": (damaged(gzip.compress(idx(MNIST_TEST_LABELS)), -8), "or is damaged"),
    "empty": (gzip.compress(b""), "must be an IDX file"),
    "header cut": (gzip.compress(b"\0\0\x08\x01\0"), "must be an IDX file"),
    "images for labels": (gzip.compress(idx(MNIST_TEST)), "starting with 00000801"),
    "fewer than announced": (gzip.compress(idx(MNIST_TEST_LABELS)[:-1]), "announces 3 .* holds 2"),
    "more than announced": (
        gzip.compress(idx(MNIST_TEST_LABELS) + b"\0"),
        "announces 3 .* holds 4",
    ),
    "another number": (gzip.compress(idx(MNIST_TEST_LABELS[:2])), r"\(3, 28, 28\) and \(2,\)"),
    "label too large": (gzip.compress(idx(np.array([1, 10, 2]))), "got 10 at position 1"),
}


@pytest.mark.parametrize("case", BAD_IDX_FILES)
def test_bad_idx_file_leaves_nothing(case, mnist_folder, tmp_path):
    content, message = BAD_IDX_FILES[case]
    (mnist_folder / "t10k-labels-idx1-ubyte.gz").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        prepare.prepare("mnist", tmp_path / "data", archive=mnist_folder, verify=False)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_interrupt_while_writing_leaves_nothing(error, mnist_folder, tmp_path, monkeypatch):
    seen = []

    def interrupted(records):
        for record in records:
            seen.append(record)
            if len(seen) == 8:
                # The training split is written by now, the test split is not.
                seen.extend(files_below(tmp_path / "data"))
                raise error
            yield record

    def parse(paths):
        contents = mnist.parse(paths)
        return base.Contents({k: interrupted(v) for k, v in contents.splits.items()})

    recipe = prepare.Recipe(prepare.RECIPES["mnist"].files, parse)
    monkeypatch.setattr(prepare, "RECIPES", {"mnist": recipe})
    with pytest.raises(error):
        prepare.prepare("mnist", tmp_path / "data", archive=mnist_folder, verify=False)
    assert any("incomplete" in str(entry) and "train" in str(entry) for entry in seen[8:])
    assert not (tmp_path / "data").exists()
    monkeypatch.undo()
    prepare.prepare("mnist", tmp_path / "data", archive=mnist_folder, verify=False)
    assert len(load("tfds:mnist", "train", data_dir=str(tmp_path / "data"))) == 6


def test_leftovers_of_a_killed_run_are_not_taken_for_prepared(mnist_folder, tmp_path):
    folder = prepare.prepare("mnist", tmp_path / "data", archive=mnist_folder, verify=False)
    leftover = folder.rename(folder.with_name("incomplete.ABCDEF_" + folder.name))
    (leftover / "dataset_info.json").unlink()
    with pytest.raises(FileNotFoundError, match="not prepared"):
        load("tfds:mnist", "train", data_dir=str(tmp_path / "data"))
    prepare.prepare("mnist", tmp_path / "data", archive=mnist_folder, verify=False)
    assert len(load("tfds:mnist", "train", data_dir=str(tmp_path / "data"))) == 6


def test_half_copied_folder_is_not_taken_for_prepared(mnist_folder, tmp_path):
    folder = prepare.prepare("mnist", tmp_path, archive=mnist_folder, verify=False)
    (folder / "dataset_info.json").unlink()
    with pytest.raises(FileNotFoundError, match="incomplete"):
        load("tfds:mnist", "train", data_dir=str(tmp_path))
    with pytest.raises(ValueError, match="exists but is incomplete"):
        prepare.prepare("mnist", tmp_path, archive=mnist_folder, verify=False)


@pytest.fixture
def served_cifar10(cifar10_archive, monkeypatch):
    """Serves the archive on this machine, at an address that tfds takes for the official one."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            del args

    handler = functools.partial(Handler, directory=str(cifar10_archive.parent))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()

        def serve(checksum):
            url = f"http://127.0.0.1:{server.server_port}/{cifar10_archive.name}"
            content = cifar10_archive.read_bytes()
            info = type(next(iter(tfds.builder_cls("cifar10").url_infos.values())))(
                size=len(content), checksum=checksum, filename=cifar10_archive.name
            )
            monkeypatch.setattr(tfds.builder_cls("cifar10"), "url_infos", {url: info})
            return url

        yield serve
        server.shutdown()
        thread.join()


def test_download_is_checked_and_kept(served_cifar10, cifar10_archive, tmp_path, capsys):
    content = cifar10_archive.read_bytes()
    url = served_cifar10(hashlib.sha256(content).hexdigest())
    data_dir = tmp_path / "data"
    assert prepare.main(["cifar10", "--data_dir", str(data_dir), "--download"]) == 0
    captured = capsys.readouterr()
    assert url in captured.err
    assert str(data_dir / "downloads") in captured.err
    kept = [path for path in (data_dir / "downloads").rglob("*.gz") if path.is_file()]
    assert [path.read_bytes() for path in kept] == [content]
    assert len(load("tfds:cifar10", "train", data_dir=str(data_dir))) == 15


def test_download_with_another_checksum_is_refused(served_cifar10, tmp_path, capsys):
    url = served_cifar10("0" * 64)
    data_dir = tmp_path / "data"
    assert prepare.main(["cifar10", "--data_dir", str(data_dir), "--download"]) == 1
    error = capsys.readouterr().err
    assert "wrong checksum" in error
    assert f"Fetch {url} by other means" in error
    assert not (data_dir / "cifar10").exists()


def test_every_recipe_names_the_files_that_tfds_downloads():
    covered: dict[str, list[str]] = {}
    for name, recipe in prepare.RECIPES.items():
        covered.setdefault(name.partition("/")[0], []).extend(recipe.files)
    for name, files in covered.items():
        maker = prepare.RECIPES[name].make_builder if name in prepare.RECIPES else None
        infos = (maker(tfds) if maker else tfds.builder_cls(name)).url_infos
        names = [info.filename or url.rpartition("/")[2] for url, info in infos.items()]
        assert sorted(files) == sorted(names)
        assert {len(info.checksum) for info in infos.values()} == {64}


def test_errors_say_what_would_be_valid(cifar10_archive, mnist_folder, tmp_path):
    data_dir = tmp_path / "data"
    with pytest.raises(ValueError, match=r"name='cifar11' .*Did you mean 'cifar10'"):
        prepare.prepare("cifar11", data_dir, archive=cifar10_archive)
    with pytest.raises(ValueError, match=r"the path of cifar-10-binary\.tar\.gz .*download"):
        prepare.prepare("cifar10", data_dir)
    with pytest.raises(ValueError, match="either archive"):
        prepare.prepare("cifar10", data_dir, archive=cifar10_archive, download=True)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.tar\.gz"):
        prepare.prepare("cifar10", data_dir, archive=tmp_path / "nowhere.tar.gz")
    with pytest.raises(ValueError, match=r"folder that holds train-images-idx3-ubyte\.gz"):
        prepare.prepare("mnist", data_dir, archive=mnist_folder / "train-images-idx3-ubyte.gz")
    (mnist_folder / "t10k-images-idx3-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"t10k-images-idx3-ubyte\.gz"):
        prepare.prepare("mnist", data_dir, archive=mnist_folder)
    assert not data_dir.exists()


def test_command_line_errors(tmp_path, capsys):
    assert prepare.main(["mnist", "--data_dir", str(tmp_path)]) == 1
    assert "error: mnist is not prepared" in capsys.readouterr().err
    for arguments in (["imagenet", "--data_dir", "x"], ["mnist"], []):
        with pytest.raises(SystemExit) as caught:
            prepare.main(arguments)
        assert caught.value.code == 2


def test_runs_as_a_module():
    # As an error, runpy's warning about a module that its own package imports already.
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "gfa_jax.data.prepare", "-h"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "cifar100" in result.stdout


@pytest.mark.parametrize("size", ["0", "064", "x"])
def test_no_command_is_suggested_for_what_is_no_size(size):
    assert prepare.how_to_prepare(f"imagenet2012_{size}", "DIR") is None
    assert "--size 64" in prepare.how_to_prepare("imagenet2012_64", "DIR")
