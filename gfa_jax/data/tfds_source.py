"""Reads `tfds:BUILDER`: data sets that tensorflow-datasets has prepared, without TensorFlow.

tfds, array_record and Pillow are imported when a data set is opened, not with this module.
"""

from __future__ import annotations

import concurrent.futures
import functools
import importlib
import io
import math
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from gfa_jax import _validate
from gfa_jax.data.base import Source

_DECODE_CHUNK = 512

_Mode = Literal["L", "RGB", "RGBA"]
_PIL_MODES: dict[int, _Mode] = {1: "L", 3: "RGB", 4: "RGBA"}

_TFDS_NAME = re.compile(
    r"(?P<builder>[A-Za-z_]\w*)"
    r"(?:[/:](?P<config>(?!\d+\.\d+\.\d+$)[^/:]+))?"
    r"(?::(?P<version>\d+\.\d+\.\d+))?"
)


def open_tfds(spec: str, data_dir: str | None) -> Source:
    """Opens a data set that is prepared in array_record format; see `sources.load`.

    Args:
      spec: BUILDER, BUILDER/CONFIG, BUILDER:VERSION or BUILDER/CONFIG:VERSION.
      data_dir: folder of prepared data; `None` means tfds's own default.

    Returns:
      The source, with the splits of the data set; `validation` is also `test` where there is none.

    Raises:
      ValueError: for a name that tfds cannot read or does not know, or features that do not fit.
      FileNotFoundError: if the data set is not prepared; the message says how to prepare it.
      ImportError: if a package that tfds needs is not installed.
    """
    tfds = import_tfds()
    builder = _prepared_builder(tfds, _parse_name(spec), data_dir)
    features = builder.info.features
    _check_tfds_features(tfds, spec, features)

    # Some sets are for testing only, such as cifar10_corrupted.
    sizes = {split: info.num_examples for split, info in builder.info.splits.items()}
    if "test" not in sizes and "validation" in sizes:
        sizes["test"], source_of_test = sizes["validation"], "validation"
    else:
        source_of_test = "test"

    @functools.cache  # Opening costs more than reading a batch.
    def records_of(source_split: str) -> Any:
        return builder.as_data_source(source_split, decoders={"image": tfds.decode.SkipDecoding()})

    def read(split: str, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        source_split = source_of_test if split == "test" else split
        channels = features["image"].shape[-1]
        what = f"{spec} {source_split}"
        try:
            images, labels = _decode_records(records_of(source_split), positions, channels, what)
        except (RuntimeError, OSError) as error:
            # array_record raises RuntimeError for a damaged or missing file, Pillow OSError.
            raise ValueError(
                f"tfds data set {what} in {builder.data_path} cannot be read; delete that folder "
                f"and prepare it again: {error}"
            ) from error
        return images, labels, positions

    return Source(
        sizes=sizes,
        label_names=tuple(features["label"].names),
        read=read,
    )


def describe_tfds(spec: str, data_dir: str | None) -> tuple[tuple[int, int, int], int]:
    """Returns image shape `(H, W, C)` and number of classes, from tfds's own metadata.

    Raises:
      ValueError: as `open_tfds`, and for images of more than one size.
      FileNotFoundError: for a set that only its prepared files describe.
      ImportError: as `open_tfds`.
    """
    tfds = import_tfds()
    features = _builder(tfds, _parse_name(spec), data_dir).info.features
    _check_tfds_features(tfds, spec, features)
    shape = features["image"].shape
    if None in shape:
        raise ValueError(
            f"images of tfds data set {spec!r} have no size of their own, {shape}: name the set "
            "that was resized when it was prepared."
        )
    return shape, features["label"].num_classes


def _parse_name(spec: str) -> re.Match[str]:
    match = _TFDS_NAME.fullmatch(spec)
    if match is None:
        raise ValueError(
            f"cannot read the tfds name {spec!r}; valid: BUILDER, BUILDER/CONFIG, "
            "BUILDER:VERSION, BUILDER/CONFIG:VERSION, such as 'cifar10' or 'cifar10:3.0.2'"
        )
    return match


def import_tfds() -> Any:
    """Imports tensorflow-datasets together with what it needs to read and write without TensorFlow.

    Returns:
      The module `tensorflow_datasets`.

    Raises:
      ImportError: naming the package that is missing and the pip command.
    """
    try:
        # importlib_resources and Pillow are needed by tfds here, but its metadata does not say so.
        for module in ("importlib_resources", "array_record", "PIL"):
            importlib.import_module(module)
        return importlib.import_module("tensorflow_datasets")
    except ModuleNotFoundError as error:
        raise ImportError(
            f"tfds data sets need the package that provides {error.name!r}: pip install "
            "tensorflow-datasets array_record importlib_resources pillow"
        ) from error


def is_prepared(folder: pathlib.Path) -> bool:
    """Returns whether a tfds folder `NAME/[CONFIG/]VERSION` is complete and in array_record format.

    tfds writes `dataset_info.json` last.
    """
    return (folder / "dataset_info.json").is_file() and any(folder.glob("*.array_record*"))


def _full_name(match: re.Match[str]) -> str:
    name, config, version = match.group("builder", "config", "version")
    return name + (f"/{config}" if config else "") + (f":{version}" if version else "")


def _builder(tfds: Any, match: re.Match[str], data_dir: str | None) -> Any:
    """Returns the builder of a data set, prepared or not."""
    from gfa_jax.data import prepare

    name, config = match.group("builder", "config")
    full_name = _full_name(match)
    root = pathlib.Path(data_dir or tfds.core.constants.DATA_DIR).expanduser()
    try:
        return tfds.builder(full_name, data_dir=data_dir and os.path.expanduser(data_dir))
    except tfds.core.DatasetNotFoundError as error:
        # tfds itself knows the sets that only files describe from these files.
        how = prepare.how_to_prepare(name + (f"/{config}" if config else ""), root)
        if how is not None:
            raise FileNotFoundError(
                f"tfds data set {full_name!r} is not prepared in {root}. Prepare it with: {how}"
            ) from error
        known = tfds.list_builders(with_community_datasets=False)
        raise ValueError(
            f"tfds knows no data set {name!r}, and none is prepared in {root}."
            f"{_validate.suggestion(name, known)}"
        ) from error
    except (AssertionError, ValueError) as error:
        # tfds raises AssertionError for a version that it does not have.
        raise ValueError(f"tfds cannot open {full_name!r}: {error}") from error


def _prepared_builder(tfds: Any, match: re.Match[str], data_dir: str | None) -> Any:
    """Returns the builder of a data set whose array_record files exist."""
    from gfa_jax.data import prepare

    name, full_name = match.group("builder"), _full_name(match)
    builder = _builder(tfds, match, data_dir)
    # Asked to read what is not there, tfds reports a wrong file format or tries to download.
    folder = pathlib.Path(builder.data_path)
    if is_prepared(folder):
        return builder
    # Without a config in the name, tfds takes its first.
    chosen = getattr(builder.builder_config, "name", None)
    how = prepare.how_to_prepare(name + (f"/{chosen}" if chosen else ""), builder.data_dir_root)
    if how is None:
        how = (
            f"tfds build {full_name} --file_format=array_record --data_dir "
            f"{builder.data_dir_root}, on a machine with TensorFlow"
        )
    found = " (it is incomplete, or in another format)" if folder.exists() else ""
    raise FileNotFoundError(
        f"tfds data set {full_name!r} is not prepared in array_record format: looked in "
        f"{folder}{found}. Prepare it with: {how}"
    )


def _check_tfds_features(tfds: Any, spec: str, features: Any) -> None:
    by_name = dict(features.items())
    there = ", ".join(f"{key}: {type(value).__name__}" for key, value in sorted(by_name.items()))
    image, label = by_name.get("image"), by_name.get("label")
    if not isinstance(image, tfds.features.Image) or not isinstance(
        label, tfds.features.ClassLabel
    ):
        raise ValueError(
            f"tfds data set {spec!r} must have features image: Image and label: ClassLabel, "
            f"it has {there}"
        )
    if image.np_dtype != np.uint8:
        raise ValueError(f"images of tfds data set {spec!r} must be uint8, got {image.np_dtype}")


def _decode_image(encoded: bytes, mode: _Mode) -> np.ndarray:
    from PIL import Image

    with Image.open(io.BytesIO(encoded)) as image:
        pixels = np.asarray(image.convert(mode))
    return pixels if pixels.ndim == 3 else pixels[..., None]


def _check_memory(needed: int, shape: tuple[int, ...], what: str) -> None:
    """Refuses what cannot fit, before the system kills the process in the middle of reading."""
    if not hasattr(os, "sysconf"):  # Windows.
        return
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > physical:
        raise ValueError(
            f"tfds data set {what} needs {needed / 1e9:.3g} GB in memory at {shape[0]}x{shape[1]} "
            f"pixels, and this machine has {physical / 1e9:.3g} GB: use a version of the data set "
            "with smaller images, max_examples, or placement 'stream' in training"
        )


def _decode_records(
    records: Any, positions: np.ndarray, channels: int, what: str
) -> tuple[np.ndarray, np.ndarray]:
    """Reads and decodes records into one array, in the order of `positions`.

    Reading and parsing hold the GIL and decoding does not, so each chunk is decoded by all threads
    of a small pool while the next is read. Every record is decoded once.
    """
    if channels not in _PIL_MODES:
        raise ValueError(
            f"images of tfds data set {what} must have 1, 3 or 4 channels, got {channels}"
        )
    mode = _PIL_MODES[channels]
    first = _decode_image(records[int(positions[0])]["image"], mode)
    shape = first.shape
    _check_memory(len(positions) * math.prod(shape), shape, what)
    images = np.empty((len(positions), *shape), np.uint8)
    labels = np.empty(len(positions), np.int64)

    def decode(start: int, encoded: Sequence[bytes]) -> None:
        for offset, data in enumerate(encoded, start):
            pixels = _decode_image(data, mode) if offset else first
            if pixels.shape != shape:
                raise ValueError(
                    f"images of tfds data set {what} differ in size: {shape} at position "
                    f"{positions[0]}, {pixels.shape} at position {positions[offset]}; use a "
                    "version of the data set that is resized to one size (gfa_jax.data.prepare "
                    "makes one of imagenet2012 and imagenette)"
                )
            images[offset] = pixels

    num_threads = min(8, os.cpu_count() or 1)
    with concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
        pending = []
        for start in range(0, len(positions), _DECODE_CHUNK):
            chunk = records.__getitems__(positions[start : start + _DECODE_CHUNK].tolist())
            labels[start : start + len(chunk)] = [record["label"] for record in chunk]
            # A batch is often a single chunk, and has to occupy every thread too.
            size = -(-len(chunk) // num_threads)
            for part in range(0, len(chunk), size):
                encoded = [record["image"] for record in chunk[part : part + size]]
                pending.append(pool.submit(decode, start + part, encoded))
        for future in pending:
            future.result()
    return images, labels
