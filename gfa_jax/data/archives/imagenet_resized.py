"""Downsampled ImageNet: zip archives of .npz files, each with some hundred thousand images."""

from __future__ import annotations

import contextlib
import os
import pathlib
import zipfile
from collections.abc import Iterator, Mapping
from typing import IO, Any

import numpy as np

from gfa_jax.data.archives import base

SIZES = (8, 16, 32, 64)
"""Pixels on a side of the published versions, which are the configs `SIZExSIZE` of tfds."""

_NUM_CLASSES = 1000
_ROWS_AT_ONCE = 4096


def files(size: int) -> tuple[str, ...]:
    """Returns the names of the archives of a version, as published."""
    # 64x64 comes in two parts.
    parts = ("_part1", "_part2") if size == 64 else ("",)
    return (
        *(f"Imagenet{size}_train{part}_npz.zip" for part in parts),
        f"Imagenet{size}_val_npz.zip",
    )


def parse(paths: Mapping[str, pathlib.Path], *, size: int) -> base.Contents:
    """Parses archives whose members hold `data` `uint8 [N, 3 size size]` and `labels` in 1..1000.

    A row is the image in the order channel, row, column. Members are decompressed as a stream, some
    thousand rows at a time: one of 64x64 has 1.6 GB.

    Source: https://patrykchrabaszcz.github.io/Imagenet32/; the stock builder of tfds for keys,
    splits and the order of classes.

    Args:
      paths: the archives by name.
      size: pixels on a side.
    """
    *train, validation = (paths[file] for file in files(size))
    for path in (*train, validation):
        with _damage(path), zipfile.ZipFile(path) as archive:
            if not _members(archive):
                raise ValueError("it holds no files")
    return base.Contents(
        splits={
            "train": (pair for path in train for pair in _records(path, size)),
            "validation": _records(validation, size),
        }
    )


def _members(archive: zipfile.ZipFile) -> list[tuple[zipfile.ZipInfo, str]]:
    """Returns the files with their normalised names, which are part of the keys."""
    return [
        (info, os.path.normpath(info.filename)) for info in archive.infolist() if not info.is_dir()
    ]


def _records(path: pathlib.Path, size: int) -> Iterator[tuple[str, base.Record]]:
    with _damage(path), zipfile.ZipFile(path) as archive:
        for info, name in _members(archive):
            with archive.open(info) as member, zipfile.ZipFile(member) as arrays:
                labels = _read_labels(arrays, name)
                for index, pixels in enumerate(_rows(arrays, name, len(labels), size)):
                    image = base.pil_image(pixels.reshape(3, size, size).transpose(1, 2, 0))
                    yield f"{name}{index}", {"image": image, "label": int(labels[index]) - 1}


def _read_labels(arrays: zipfile.ZipFile, name: str) -> np.ndarray:
    with arrays.open("labels.npy") as stream:
        labels: np.ndarray = np.lib.format.read_array(stream, allow_pickle=False)
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or labels.size == 0:
        raise ValueError(
            f"labels in {name} must be integers of shape [N], got {labels.dtype} of shape "
            f"{labels.shape}"
        )
    if labels.min() < 1 or labels.max() > _NUM_CLASSES:
        raise ValueError(
            f"labels in {name} must lie in 1..{_NUM_CLASSES}, got values from {labels.min()} to "
            f"{labels.max()}"
        )
    return labels


def _rows(arrays: zipfile.ZipFile, name: str, num: int, size: int) -> Iterator[np.ndarray]:
    row_size = 3 * size * size
    with arrays.open("data.npy") as stream:
        shape, fortran_order, dtype = _read_header(stream)
        if shape != (num, row_size) or dtype != np.uint8 or fortran_order:
            raise ValueError(
                f"data in {name} must be uint8 of shape ({num}, {row_size}) in C order, got "
                f"{dtype} of shape {shape}"
            )
        for start in range(0, num, _ROWS_AT_ONCE):
            count = min(_ROWS_AT_ONCE, num - start)
            content = stream.read(count * row_size)
            if len(content) != count * row_size:
                raise EOFError(f"data in {name} is cut short")
            yield from np.frombuffer(content, np.uint8).reshape(count, row_size)
        # zipfile compares the checksum of a member at its end.
        if stream.read(1):
            raise ValueError(f"data in {name} is longer than its header says")


def _read_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    return np.lib.format.read_array_header_2_0(stream)


def _damage(path: pathlib.Path) -> contextlib.AbstractContextManager[None]:
    message = f"{path} is not an archive of downsampled ImageNet, or is damaged"
    return base.report_damage(message, ValueError, KeyError)
