"""The gzipped IDX files of MNIST and of the sets made in its likeness."""

from __future__ import annotations

import gzip
import math
import pathlib
import zlib
from collections.abc import Mapping

import numpy as np

from gfa_jax.data.archives import base

_FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}

FILES = tuple(file for files in _FILES.values() for file in files)
"""Names of the four archives, as published."""


def parse(paths: Mapping[str, pathlib.Path]) -> base.Contents:
    """Parses the four gzipped IDX files of MNIST and the sets made in its likeness.

    Source: http://yann.lecun.com/exdb/mnist/, "FILE FORMATS FOR THE MNIST DATABASE".
    """
    splits = {}
    for split, (image_file, label_file) in _FILES.items():
        images = _read_idx(paths[image_file], num_dims=3)
        labels = _read_idx(paths[label_file], num_dims=1)
        if images.shape[1:] != (28, 28) or len(images) != len(labels) or len(images) == 0:
            raise ValueError(
                f"{paths[image_file]} and {paths[label_file]} must hold N images of 28x28 and N "
                f"labels, got shapes {images.shape} and {labels.shape}"
            )
        base.check_labels(str(paths[label_file]), labels, num_classes=10)
        splits[split] = base.indexed_records(images, {"label": labels})
    return base.Contents(splits=splits)


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
