"""Writes tensorflow-datasets folders in array_record format, without TensorFlow.

    python -m gfa_jax.data.prepare cifar10 --data_dir DIR --archive cifar-10-binary.tar.gz
    python -m gfa_jax.data.prepare mnist --data_dir DIR --download
    python -m gfa_jax.data.prepare imagenet2012 --data_dir DIR --archive FOLDER --size 64

The stock builders of these data sets read and encode images with TensorFlow. Here the official
archives are parsed with NumPy and the images encoded by Pillow; everything else is the stock
builder: features, version, ids, the order of examples. The result is what
`tfds.data_source(name, data_dir=DIR, download=False)` and `gfa_jax.data.load("tfds:NAME", ...)`
read. Sets whose images differ in size are resized to `--size`, and get the name NAME_SIZE;
tiny_imagenet, which tfds does not have, has a builder here.

A data set is one entry of `RECIPES`. Parsers are in `archives`, `tfds_writer` writes.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import pathlib
import posixpath
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gfa_jax import _validate
from gfa_jax.data import tfds_writer
from gfa_jax.data.archives import (
    cifar,
    imagenet,
    imagenet_resized,
    mnist,
    svhn,
    tiny_imagenet,
)
from gfa_jax.data.archives.base import Recipe
from gfa_jax.data.tfds_source import import_tfds, is_prepared

_IMAGENETTE_SIZES = {"full-size": "", "320px": "-320", "160px": "-160"}


def prepare(
    name: str,
    data_dir: str | pathlib.Path,
    *,
    archive: str | pathlib.Path | None = None,
    download: bool = False,
    verify: bool = True,
    size: int | None = None,
) -> pathlib.Path:
    """Prepares a data set for reading without TensorFlow; one that is prepared stays as it is.

    The folder appears under its final name only when it is complete: tfds writes into a folder
    `incomplete.*` beside it and renames that at the end. A failure, or an interrupt, removes it;
    after a kill it stays behind, is never read, and can be deleted.

    Args:
      name: a key of `RECIPES`, with the config of sets that have configs.
      data_dir: the folder that holds all tfds data sets; `NAME/[CONFIG/]VERSION` is made in it.
      archive: the official archive, or a folder that holds the archives. Nothing of them is
        extracted to disk.
      download: fetch the archives into `data_dir/downloads` with tfds's download manager, from the
        addresses and with the SHA-256 sums that tfds records.
      verify: compare `archive` with those sums. Without it, only the format is checked.
      size: for sets whose images differ in size, which are to be read into one array: the shorter
        side becomes `size` pixels and the centre is cut out, see `resizing.resize`. The set is
        then called NAME_SIZE.

    Returns:
      The prepared folder.

    Raises:
      ValueError: for an unknown name, both or neither of `archive` and `download`, a download
        that needs an account, a size that is missing or not wanted, an archive that is damaged or
        not the official one, or a folder that was prepared in another format.
      FileNotFoundError: if an archive is not there.
      OSError: if a download fails or the disk is full.
      ImportError: if tfds, or a package that it needs here, is not installed.
    """
    recipe, stock, folder = _target(name, data_dir, size)
    data_dir = pathlib.Path(data_dir).expanduser()
    tfds = import_tfds()
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

    if download and recipe.registration is not None:
        raise ValueError(
            f"{name} cannot be downloaded without an account: get {' and '.join(recipe.files)} "
            f"from {recipe.registration} and give their folder as archive"
        )

    # Old records of tfds have no file name.
    url_infos = {
        info.filename or posixpath.basename(url): (url, info)
        for url, info in stock.url_infos.items()
    }
    new_folders = [folder.parents[1], folder.parent] if "/" in name else [folder.parent]
    with _remove_empty_folders_on_error(data_dir, *new_folders):
        if archive is None:
            urls = {file: url_infos[file][0] for file in recipe.files}
            paths = _download(tfds, stock, urls, data_dir / "downloads")
        else:
            paths = _locate(pathlib.Path(archive).expanduser(), recipe.files)
            if verify:
                for file, path in paths.items():
                    _verify(path, *url_infos[file])
        builder_cls = stock if size is None else tfds_writer.resized_builder(tfds, stock, size)
        config = name.partition("/")[2] or None
        tfds_writer.write(tfds, builder_cls, config, data_dir, recipe.parse(paths), size)
    return folder


def how_to_prepare(name: str, data_dir: str | pathlib.Path) -> str | None:
    """Returns the command that prepares a data set, for messages.

    Args:
      name: a tfds name, NAME or NAME/CONFIG, with NAME_SIZE for a set that is resized.
      data_dir: the folder of all tfds data sets.

    Returns:
      The command, and the name to read where that is another; `None` for a set that is not among
      `RECIPES`.
    """
    base_name, slash, config = name.partition("/")
    stock, _, size = base_name.rpartition("_")
    unsized = name if name in RECIPES else stock + slash + config
    recipe = RECIPES.get(unsized)
    if recipe is None:
        return None
    is_size = size.isdecimal() and not size.startswith("0")
    if unsized != name and not (recipe.varied_size and is_size):
        return None
    source = "--archive PATH" if recipe.registration else "(--archive PATH | --download)"
    command = f"python -m gfa_jax.data.prepare {unsized} --data_dir {data_dir} {source}"
    if unsized != name:
        return f"{command} --size {size}"
    if recipe.varied_size:
        resized = tfds_writer.resized_name(base_name, "SIZE") + slash + config
        return f"{command} --size SIZE, and read it as tfds:{resized}: its images differ in size"
    return command


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m gfa_jax.data.prepare",
        description="Write a tensorflow-datasets folder that is read without TensorFlow.",
    )
    parser.add_argument("name", choices=sorted(RECIPES), help="data set")
    parser.add_argument(
        "--data_dir",
        required=True,
        help="folder of all tfds data sets; NAME/[CONFIG/]VERSION is made in it",
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
    parser.add_argument(
        "--size",
        type=int,
        help="pixels on a side, for sets whose images differ in size: the shorter side is resized "
        "to it and the centre cut out; the set is then called NAME_SIZE",
    )
    args = parser.parse_args(argv)
    try:
        was_there = is_prepared(_target(args.name, args.data_dir, args.size)[-1])
        folder = prepare(
            args.name,
            args.data_dir,
            archive=args.archive,
            download=args.download,
            verify=not args.no_verify,
            size=args.size,
        )
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{args.name} {'was already' if was_there else 'is now'} prepared in {folder}")
    return 0


def _target(
    name: str, data_dir: str | pathlib.Path, size: int | None
) -> tuple[Recipe, Any, pathlib.Path]:
    """Returns the recipe, the stock builder class and the folder that is made."""
    _validate.one_of(RECIPES, name=name)
    recipe = RECIPES[name]
    if recipe.varied_size and size is None:
        gigabytes = recipe.num_examples * 3 / 1e9
        raise ValueError(
            f"images of {name} differ in size, and a data set in memory has one: give size, the "
            f"pixels on a side that they are resized to; in memory it takes "
            f"{gigabytes * 64**2:.3g} GB for size=64, {gigabytes * 224**2:.3g} GB for size=224"
        )
    if size is not None:
        _validate.positive_integer(size=size)
        if not recipe.varied_size:
            raise ValueError(f"images of {name} have one size already: leave size out, got {size}")
    tfds = import_tfds()
    base_name, _, config = name.partition("/")
    stock = recipe.make_builder(tfds) if recipe.make_builder else tfds.builder_cls(base_name)
    folder = pathlib.Path(data_dir).expanduser()
    folder /= base_name if size is None else tfds_writer.resized_name(base_name, size)
    version = stock.VERSION
    if config:
        folder /= config
        (builder_config,) = (each for each in stock.BUILDER_CONFIGS if each.name == config)
        version = builder_config.version or version
    return recipe, stock, folder / str(version)


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
    tfds: Any, stock: Any, urls: Mapping[str, str], download_dir: pathlib.Path
) -> dict[str, pathlib.Path]:
    print(
        f"downloading {', '.join(urls.values())} into {download_dir} (kept there; tfds tries for "
        "some minutes before it gives up)",
        file=sys.stderr,
    )
    manager = tfds.download.DownloadManager(
        download_dir=download_dir,
        manual_dir=download_dir / "manual",
        url_infos=stock.url_infos,
        dataset_name=stock.name,
    )
    try:
        return {file: pathlib.Path(path) for file, path in manager.download(dict(urls)).items()}
    except Exception as error:
        # tfds lets through whatever its transport raises; its checksum error is a bare Exception.
        raise OSError(
            f"download of {stock.name} failed: {error}. Fetch {', '.join(urls.values())} by other "
            "means and pass the path as archive"
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
                # tfds notes the configs of a data set before it writes one.
                if [path.name for path in folder.iterdir()] == [".config"]:
                    shutil.rmtree(folder / ".config")
                folder.rmdir()
        raise


_MNIST_RECIPE = Recipe(files=mnist.FILES, parse=mnist.parse)

RECIPES: Mapping[str, Recipe] = {
    "cifar10": Recipe(
        files=("cifar-10-binary.tar.gz",),
        parse=functools.partial(
            cifar.parse,
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
            cifar.parse,
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
    "svhn_cropped": Recipe(files=svhn.FILES, parse=svhn.parse),
    "tiny_imagenet": Recipe(
        files=(tiny_imagenet.FILE,),
        parse=tiny_imagenet.parse,
        make_builder=tiny_imagenet.make_builder,
    ),
    **{
        f"imagenet_resized/{size}x{size}": Recipe(
            files=imagenet_resized.files(size),
            parse=functools.partial(imagenet_resized.parse, size=size),
        )
        for size in imagenet_resized.SIZES
    },
    "imagenet2012": Recipe(
        files=(imagenet.TRAIN_FILE, imagenet.VALIDATION_FILE),
        parse=imagenet.parse,
        varied_size=True,
        num_examples=1_281_167 + 50_000,
        registration="https://image-net.org/download-images",
    ),
    **{
        f"imagenette/{config}{suffix}": Recipe(
            files=(f"{folder}{part}.tgz",),
            parse=functools.partial(imagenet.parse_imagenette, folder=folder + part),
            varied_size=True,
            num_examples=num_examples,
        )
        for folder, suffix, num_examples in (
            ("imagenette2", "-v2", 9_469 + 3_925),
            ("imagenette", "", 12_894 + 500),
        )
        for config, part in _IMAGENETTE_SIZES.items()
    },
}
"""The data sets that can be prepared here, by tfds name and config."""


if __name__ == "__main__":
    sys.exit(main())
