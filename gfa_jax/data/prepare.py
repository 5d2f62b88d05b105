"""Writes tensorflow-datasets folders in array_record format, without TensorFlow.

    python -m gfa_jax.data.prepare cifar10 --data_dir DIR --archive cifar-10-binary.tar.gz
    python -m gfa_jax.data.prepare mnist --data_dir DIR --download

The stock builders of these data sets read and encode images with TensorFlow. Here the official
archives are parsed with NumPy and the images encoded by Pillow; everything else is the stock
builder: features, version, ids, the order of examples. The result is what
`tfds.data_source(name, data_dir=DIR, download=False)` and `gfa_jax.data.load("tfds:NAME", ...)`
read.

A data set is one entry of `RECIPES`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import gzip
import hashlib
import math
import pathlib
import posixpath
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gfa_jax import _validate
from gfa_jax.data.tfds_source import import_tfds, is_prepared

Record = dict[str, Any]
"""One example, by feature name, as tfds takes it; images as PIL images."""


@dataclasses.dataclass(frozen=True)
class Contents:
    """A parsed archive.

    Attributes:
      splits: the records of each split, in the order of the archive.
      label_names: class names by label feature, for the features whose builder does not name them.
    """

    splits: Mapping[str, Iterable[Record]]
    label_names: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to read a data set's official archives.

    Attributes:
      files: names of the archives, as published.
      parse: takes their paths by name and returns the contents. It raises `ValueError` for a
        damaged or foreign file, while parsing or while its records are iterated.
    """

    files: tuple[str, ...]
    parse: Callable[[Mapping[str, pathlib.Path]], Contents]


def prepare(
    name: str,
    data_dir: str | pathlib.Path,
    *,
    archive: str | pathlib.Path | None = None,
    download: bool = False,
    verify: bool = True,
) -> pathlib.Path:
    """Prepares a data set for reading without TensorFlow; one that is prepared stays as it is.

    The folder appears under its final name only when it is complete: tfds writes into a folder
    `incomplete.*` beside it and renames that at the end. A failure, or an interrupt, removes it;
    after a kill it stays behind, is never read, and can be deleted.

    Args:
      name: a key of `RECIPES`.
      data_dir: the folder that holds all tfds data sets; `NAME/VERSION` is made in it.
      archive: the official archive, or a folder that holds the archives. They are read in memory,
        nothing is extracted to disk.
      download: fetch the archives into `data_dir/downloads` with tfds's download manager, from the
        addresses and with the SHA-256 sums that tfds records.
      verify: compare `archive` with those sums. Without it, only the format is checked.

    Returns:
      The prepared folder.

    Raises:
      ValueError: for an unknown name, both or neither of `archive` and `download`, an archive that
        is damaged or not the official one, or a folder that was prepared in another format.
      FileNotFoundError: if an archive is not there.
      OSError: if a download fails or the disk is full.
      ImportError: if tfds, or a package that it needs here, is not installed.
    """
    _validate.one_of(RECIPES, name=name)
    recipe = RECIPES[name]
    tfds = import_tfds()
    stock = tfds.builder_cls(name)
    data_dir = pathlib.Path(data_dir).expanduser()
    folder = _folder(stock, data_dir)
    if is_prepared(folder):
        return folder
    if folder.exists():
        raise ValueError(
            f"{folder} exists but is incomplete, or not in array_record format (the one that is "
            "read without TensorFlow); it is left as it is: remove it or choose another data_dir"
        )
    if (archive is None) == (not download):
        raise ValueError(
            f"{name} is not prepared in {data_dir}: give either archive, the path of "
            f"{' and '.join(recipe.files)} (or of their folder), or download"
        )

    url_infos = {info.filename: (url, info) for url, info in stock.url_infos.items()}
    with _remove_empty_folders_on_error(data_dir, folder.parent):
        if archive is None:
            urls = {file: url_infos[file][0] for file in recipe.files}
            paths = _download(tfds, name, urls, data_dir / "downloads")
        else:
            paths = _locate(pathlib.Path(archive).expanduser(), recipe.files)
            if verify:
                for file, path in paths.items():
                    _verify(path, *url_infos[file])
        _write(tfds, stock, data_dir, recipe.parse(paths))
    return folder


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m gfa_jax.data.prepare",
        description="Write a tensorflow-datasets folder that is read without TensorFlow.",
    )
    parser.add_argument("name", choices=sorted(RECIPES), help="data set")
    parser.add_argument(
        "--data_dir", required=True, help="folder of all tfds data sets; NAME/VERSION is made in it"
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--archive", help="the official archive, or a folder with the official archives"
    )
    source.add_argument(
        "--download",
        action="store_true",
        help="download the archives from the addresses that tfds records into DATA_DIR/downloads",
    )
    parser.add_argument(
        "--no_verify",
        action="store_true",
        help="accept an archive whose SHA-256 is not the one that tfds records",
    )
    args = parser.parse_args(argv)
    try:
        stock = import_tfds().builder_cls(args.name)
        was_there = is_prepared(_folder(stock, pathlib.Path(args.data_dir).expanduser()))
        folder = prepare(
            args.name,
            args.data_dir,
            archive=args.archive,
            download=args.download,
            verify=not args.no_verify,
        )
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{args.name} {'was already' if was_there else 'is now'} prepared in {folder}")
    return 0


def _folder(stock: Any, data_dir: pathlib.Path) -> pathlib.Path:
    return data_dir.joinpath(stock.name, str(stock.VERSION))


def _locate(archive: pathlib.Path, files: Sequence[str]) -> dict[str, pathlib.Path]:
    if archive.is_dir():
        paths = {file: archive / file for file in files}
    elif len(files) == 1:
        paths = {files[0]: archive}
    else:
        raise ValueError(f"archive must be a folder that holds {', '.join(files)}, got {archive}")
    missing = [str(path) for path in paths.values() if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"archive not found: {', '.join(missing)}")
    return paths


def _verify(path: pathlib.Path, url: str, expected: Any) -> None:
    with path.open("rb") as stream:
        checksum = hashlib.file_digest(stream, "sha256").hexdigest()
    if checksum != expected.checksum:
        raise ValueError(
            f"{path} is not the official archive, or is damaged: it has {path.stat().st_size} "
            f"bytes and SHA-256 {checksum}, that of {url} has {int(expected.size)} bytes and "
            f"SHA-256 {expected.checksum}"
        )


def _download(
    tfds: Any, name: str, urls: Mapping[str, str], download_dir: pathlib.Path
) -> dict[str, pathlib.Path]:
    print(
        f"downloading {', '.join(urls.values())} into {download_dir} (kept there; tfds tries for "
        "some minutes before it gives up)",
        file=sys.stderr,
    )
    manager = tfds.download.DownloadManager(
        download_dir=download_dir,
        manual_dir=download_dir / "manual",
        url_infos=tfds.builder_cls(name).url_infos,
        dataset_name=name,
    )
    try:
        return {file: pathlib.Path(path) for file, path in manager.download(dict(urls)).items()}
    except Exception as error:
        # tfds lets through whatever its transport raises; its checksum error is a bare Exception.
        raise OSError(
            f"download of {name} failed: {error}. Fetch {', '.join(urls.values())} by other means "
            "and pass the path as archive"
        ) from error


@contextlib.contextmanager
def _remove_empty_folders_on_error(*folders: pathlib.Path) -> Iterator[None]:
    """Removes the folders that did not exist before, where a failure leaves them empty."""
    new = [folder for folder in folders if not folder.exists()]
    try:
        yield
    except BaseException:
        for folder in reversed(new):
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def _write(tfds: Any, stock: Any, data_dir: pathlib.Path, contents: Contents) -> None:
    def split_generators(self: Any, dl_manager: Any) -> dict[str, Iterable[tuple[int, Record]]]:
        del dl_manager
        for feature, names in contents.label_names.items():
            self.info.features[feature].names = list(names)
        # The stock builders use the index as key too: tfds orders examples by a hash of it.
        return {split: enumerate(records) for split, records in contents.splits.items()}

    builder_cls = type(
        stock.__name__,
        (stock,),
        {
            "__module__": stock.__module__,
            "name": stock.name,
            "pkg_dir_path": stock.pkg_dir_path,
            "_split_generators": split_generators,
        },
        skip_registration=True,
    )
    # tfds makes its download folders even where nothing is downloaded.
    with tempfile.TemporaryDirectory() as scratch:
        builder_cls(data_dir=data_dir).download_and_prepare(
            download_dir=scratch,
            download_config=tfds.download.DownloadConfig(try_download_gcs=False),
            file_format="array_record",
        )


_CIFAR_SHAPE = (3, 32, 32)


def _parse_cifar(
    paths: Mapping[str, pathlib.Path],
    *,
    folder: str,
    members: Mapping[str, Sequence[str]],
    label_files: Mapping[str, str],
) -> Contents:
    """Parses a CIFAR "binary version" archive: records of label bytes and then 3072 pixel bytes.

    Source: https://www.cs.toronto.edu/~kriz/cifar.html, "Binary version".

    Args:
      paths: the one archive.
      folder: the folder of all members.
      members: the record files of each split.
      label_files: file of class names by label feature, in the order of a record's label bytes.
    """
    (path,) = paths.values()
    wanted = [*label_files.values(), *(member for names in members.values() for member in names)]
    data = _read_tar(path, [f"{folder}/{member}" for member in wanted])

    label_names = {}
    for feature, member in label_files.items():
        text = data[f"{folder}/{member}"].decode("utf-8", errors="replace")
        label_names[feature] = [line for line in text.split("\n") if line]
    num_labels = len(label_files)
    record_size = num_labels + math.prod(_CIFAR_SHAPE)
    splits = {}
    for split, names in members.items():
        parts = []
        for member in names:
            raw = np.frombuffer(data[f"{folder}/{member}"], np.uint8)
            if raw.size == 0 or raw.size % record_size:
                raise ValueError(
                    f"{member} in {path} must hold records of {record_size} bytes, got "
                    f"{raw.size} bytes in all"
                )
            parts.append(raw.reshape(-1, record_size))
        records = np.concatenate(parts)
        labels = dict(zip(label_files, records[:, :num_labels].T, strict=True))
        for feature, values in labels.items():
            _check_labels(f"{feature} of {split} in {path}", values, len(label_names[feature]))
        images = records[:, num_labels:].reshape(-1, *_CIFAR_SHAPE).transpose(0, 2, 3, 1)
        splits[split] = _records(images, labels, id_format=split + "_{:05d}")
    return Contents(splits=splits, label_names=label_names)


_IDX_FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}


def _parse_mnist(paths: Mapping[str, pathlib.Path]) -> Contents:
    """Parses the four gzipped IDX files of MNIST and the sets made in its likeness.

    Source: http://yann.lecun.com/exdb/mnist/, "FILE FORMATS FOR THE MNIST DATABASE".
    """
    splits = {}
    for split, (image_file, label_file) in _IDX_FILES.items():
        images = _read_idx(paths[image_file], num_dims=3)
        labels = _read_idx(paths[label_file], num_dims=1)
        if images.shape[1:] != (28, 28) or len(images) != len(labels) or len(images) == 0:
            raise ValueError(
                f"{paths[image_file]} and {paths[label_file]} must hold N images of 28x28 and N "
                f"labels, got shapes {images.shape} and {labels.shape}"
            )
        _check_labels(str(paths[label_file]), labels, num_classes=10)
        splits[split] = _records(images, {"label": labels})
    return Contents(splits=splits)


def _records(
    images: np.ndarray, labels: Mapping[str, np.ndarray], id_format: str | None = None
) -> Iterator[Record]:
    """Yields records of `uint8` images `[N, H, W]` or `[N, H, W, 3]` and integer labels `[N]`."""
    # Pillow comes with the tfds installation, which a plain import of this module does not need.
    from PIL import Image

    for index, pixels in enumerate(images):
        record: Record = {feature: int(values[index]) for feature, values in labels.items()}
        if id_format is not None:
            record["id"] = id_format.format(index)
        # PIL images are the one in-memory form that tfds encodes without TensorFlow.
        record["image"] = Image.fromarray(np.ascontiguousarray(pixels))
        yield record


def _check_labels(what: str, labels: np.ndarray, num_classes: int) -> None:
    if labels.max() >= num_classes:
        raise ValueError(
            f"{what} must be labels in [0, {num_classes}), got {labels.max()} at position "
            f"{labels.argmax()}"
        )


def _read_tar(path: pathlib.Path, members: Sequence[str]) -> dict[str, bytes]:
    """Reads members of a gzipped tar file in one pass, in memory; nothing is extracted to disk."""
    data: dict[str, bytes] = {}
    try:
        with gzip.open(path) as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
            for info in archive:
                member = posixpath.normpath(info.name)
                # Links and devices have no data of their own.
                if member in members and info.isreg():
                    content = archive.extractfile(info)
                    assert content is not None
                    data[member] = content.read()
            # gzip compares its checksum, which ends the file, only once that is read.
            while stream.read(1 << 20):
                pass
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise ValueError(f"{path} is not a .tar.gz archive, or is damaged: {error}") from error
    missing = [member for member in members if member not in data]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}: it is cut short or another archive")
    return data


def _read_idx(path: pathlib.Path, num_dims: int) -> np.ndarray:
    """Reads a gzipped IDX file of unsigned bytes: magic number, big-endian sizes, data."""
    try:
        with gzip.open(path) as stream:
            content = stream.read()
    except (EOFError, zlib.error, OSError) as error:
        raise ValueError(f"{path} is not a .gz file, or is damaged: {error}") from error
    start = 4 + 4 * num_dims
    magic = bytes([0, 0, 8, num_dims])
    if len(content) < start or content[:4] != magic:
        raise ValueError(
            f"{path} must be an IDX file of bytes in {num_dims} dimensions, starting with "
            f"{magic.hex()}, it starts with {content[:4].hex()}"
        )
    shape = tuple(int(size) for size in np.frombuffer(content[4:start], ">u4"))
    if len(content) - start != math.prod(shape):
        raise ValueError(
            f"{path} announces {math.prod(shape)} bytes of data and holds {len(content) - start}"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


_MNIST_RECIPE = Recipe(
    files=tuple(file for files in _IDX_FILES.values() for file in files), parse=_parse_mnist
)

RECIPES: Mapping[str, Recipe] = {
    "cifar10": Recipe(
        files=("cifar-10-binary.tar.gz",),
        parse=functools.partial(
            _parse_cifar,
            folder="cifar-10-batches-bin",
            members={
                "train": [f"data_batch_{index}.bin" for index in range(1, 6)],
                "test": ["test_batch.bin"],
            },
            label_files={"label": "batches.meta.txt"},
        ),
    ),
    "cifar100": Recipe(
        files=("cifar-100-binary.tar.gz",),
        parse=functools.partial(
            _parse_cifar,
            folder="cifar-100-binary",
            members={"train": ["train.bin"], "test": ["test.bin"]},
            label_files={
                "coarse_label": "coarse_label_names.txt",
                "label": "fine_label_names.txt",
            },
        ),
    ),
    "mnist": _MNIST_RECIPE,
    "fashion_mnist": _MNIST_RECIPE,
    "kmnist": _MNIST_RECIPE,
}
"""The data sets that can be prepared here, by tfds name."""


if __name__ == "__main__":
    sys.exit(main())
