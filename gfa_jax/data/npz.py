"""Reads `arrays:PATH.npz`: the user's own arrays, checked, and never unpickled."""

from __future__ import annotations

import functools
import pathlib
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from gfa_jax.data.base import Source

# Far above any real number of classes; a label beyond it is an id, or -1 in an unsigned type.
_MAX_UNNAMED_CLASSES = 1 << 20

_ArrayHeader = tuple[tuple[int, ...], np.dtype[Any]]

# What zipfile, zlib and NumPy raise for a file that is damaged or is something else.
_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, ValueError, OSError, RuntimeError)


def open_arrays(name_path: str, data_dir: str | None) -> Source:
    """Opens the arrays of an .npz file; see `sources.load` for its keys.

    Shapes, dtypes and labels are checked here, from headers where they suffice; images are read,
    and float values checked, by `read`.

    Args:
      name_path: the file, relative to `data_dir` where that is given; empty for `data_dir` itself.
      data_dir: folder or file.

    Returns:
      The source, with splits `train` and `test`; ids are positions in them. It holds the images of
      a split from the first `read` on.

    Raises:
      ValueError: if no file is named, or it breaks a rule; the message names the file and the key.
      FileNotFoundError: if the file is not there.
    """
    if not name_path and data_dir is None:
        raise ValueError("data set 'arrays' needs a file: name 'arrays:PATH.npz', or data_dir=PATH")
    path = pathlib.Path(data_dir or "", name_path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"data set 'arrays' needs an .npz file, and {path} is not one")

    headers = _npz_headers(path)
    required = [f"{split}_{kind}" for split in ("train", "test") for kind in ("images", "labels")]
    missing = [key for key in required if key not in headers]
    if missing:
        raise ValueError(
            f"{path} lacks {', '.join(missing)}; it holds {', '.join(sorted(headers)) or 'nothing'}"
        )
    for key in [*required, "label_names"]:
        if key in headers and headers[key][1].hasobject:
            raise ValueError(
                f"{key} in {path} is an object array; pickled arrays are refused because "
                "unpickling can run code: save it with a numeric or string dtype"
            )
    for split in ("train", "test"):
        _check_array_headers(path, split, headers)
    shapes = {split: _with_channel(headers[f"{split}_images"][0]) for split in ("train", "test")}
    if shapes["train"][1:] != shapes["test"][1:]:
        raise ValueError(
            f"train_images and test_images in {path} must have the same image shape, got "
            f"{shapes['train'][1:]} and {shapes['test'][1:]}"
        )

    labels = {split: _read_npz(path, f"{split}_labels") for split in ("train", "test")}
    largest = max(int(array.max()) for array in labels.values())
    if "label_names" in headers:
        names = _read_npz(path, "label_names")
        if names.ndim != 1 or names.dtype.kind != "U":
            raise ValueError(
                f"label_names in {path} must be strings of shape [num_classes], got {names.dtype} "
                f"of shape {names.shape}"
            )
        label_names = tuple(str(value) for value in names)
    elif largest < _MAX_UNNAMED_CLASSES:
        label_names = tuple(str(value) for value in range(largest + 1))
    else:
        raise ValueError(
            f"labels in {path} reach {largest}, which would make {largest + 1} classes; without "
            f"label_names they must lie below {_MAX_UNNAMED_CLASSES}"
        )
    for split, array in labels.items():
        if int(array.min()) < 0 or int(array.max()) >= len(label_names):
            raise ValueError(
                f"{split}_labels in {path} must lie in [0, {len(label_names)}), got values from "
                f"{array.min()} to {array.max()}"
            )

    @functools.cache  # A member of an .npz file is read whole, however few of it are wanted.
    def images_of(split: str) -> np.ndarray:
        key = f"{split}_images"
        images = _read_npz(path, key).reshape(shapes[split])
        if images.dtype.kind == "f":
            low, high = images.min(), images.max()
            # Written so that NaN, for which every comparison is false, is refused too.
            if not (low >= 0.0 and high <= 1.0):
                raise ValueError(
                    f"{key} in {path} must be finite and in [0, 1] (or uint8 in 0..255), got "
                    f"values from {low} to {high}"
                )
        return images

    def read(split: str, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        selected = images_of(split)[positions]
        if selected.dtype != np.uint8:
            selected = selected.astype(np.float32)
        return selected, labels[split][positions], positions

    return Source(
        sizes={split: shape[0] for split, shape in shapes.items()},
        label_names=label_names,
        read=read,
    )


def _npz_headers(path: pathlib.Path) -> dict[str, _ArrayHeader]:
    """Returns shape and dtype by key, without reading the arrays (or unpickling anything)."""
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    headers: dict[str, _ArrayHeader] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                with archive.open(member) as stream:
                    version = np.lib.format.read_magic(stream)
                    if version not in readers:
                        raise ValueError(f"{member} has .npy format version {version}")
                    shape, _, dtype = readers[version](stream)
                key = member.removesuffix(".npy")
                if key in headers or key == member:
                    # np.load could read another member for this key than the one checked here.
                    raise ValueError(f"member {member!r} is ambiguous")
                headers[key] = (shape, dtype)
    except _DAMAGE as error:
        raise ValueError(f"{path} is not an .npz file, or is damaged: {error}") from error
    return headers


def _read_npz(path: pathlib.Path, key: str) -> np.ndarray:
    try:
        with np.load(path, allow_pickle=False) as archive:
            array: np.ndarray = archive[key]
    except _DAMAGE as error:
        raise ValueError(f"{key} in {path} cannot be read, the file is damaged: {error}") from error
    return array


def _with_channel(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape, 1) if len(shape) == 3 else shape


def _check_array_headers(
    path: pathlib.Path, split: str, headers: Mapping[str, _ArrayHeader]
) -> None:
    image_shape, image_dtype = headers[f"{split}_images"]
    label_shape, label_dtype = headers[f"{split}_labels"]
    if len(image_shape) not in (3, 4):
        raise ValueError(
            f"{split}_images in {path} must have shape [N, H, W, C], or [N, H, W] for one channel, "
            f"got {image_shape}"
        )
    if image_dtype not in (np.uint8, np.float32, np.float64):
        raise ValueError(
            f"{split}_images in {path} must be uint8, float32 or float64, got {image_dtype}"
        )
    if 0 in image_shape:
        raise ValueError(f"{split}_images in {path} is empty: its shape is {image_shape}")
    if label_dtype.kind not in "iu":
        raise ValueError(f"{split}_labels in {path} must be integers, got {label_dtype}")
    if label_shape != image_shape[:1]:
        raise ValueError(
            f"{split}_labels in {path} must have shape ({image_shape[0]},), one label for each of "
            f"{split}_images, got {label_shape}"
        )
