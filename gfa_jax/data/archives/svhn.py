"""The cropped digits of SVHN: one MATLAB file a split."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import scipy.io  # type: ignore[import-untyped]
from scipy.io.matlab import MatReadError  # type: ignore[import-untyped]

from gfa_jax.data.archives import base

_FILES = {
    "train": "train_32x32.mat",
    "test": "test_32x32.mat",
    "extra": "extra_32x32.mat",
}

FILES = tuple(_FILES.values())
"""Names of the three archives, as published."""

# What scipy raises, beside ValueError, for a file that is damaged or is something else.
_DAMAGE = (MatReadError, ValueError, TypeError, KeyError, IndexError, MemoryError)


def parse(paths: Mapping[str, pathlib.Path]) -> base.Contents:
    """Parses the files: `X` `uint8 [32, 32, 3, N]` and `y` `[N, 1]` in 1..10, where 10 is digit 0.

    Shapes are checked at once, from headers. Pixels are read when a split is iterated and given up
    after it, so no more than one split is in memory: 1.6 GB for `extra`.

    Source: http://ufldl.stanford.edu/housenumbers/, "Format 2"; the stock builder of tfds for the
    features, ids and splits.
    """
    for path in paths.values():
        variables = {name: shape for name, shape, _ in _scipy(scipy.io.whosmat, path)}
        images, labels = variables.get("X", ()), variables.get("y", ())
        if images[:3] != (32, 32, 3) or len(images) != 4 or labels != (images[3], 1):
            raise ValueError(
                f"{path} must hold X of shape (32, 32, 3, N) and y of shape (N, 1), it holds "
                f"{variables}"
            )
    return base.Contents(
        splits={split: _records(split, paths[file]) for split, file in _FILES.items()}
    )


def _records(split: str, path: pathlib.Path) -> Iterator[tuple[int, base.Record]]:
    variables = _scipy(scipy.io.loadmat, path)
    images, labels = variables["X"], variables["y"][:, 0]
    if images.dtype != np.uint8 or labels.dtype.kind not in "iu":
        raise ValueError(
            f"{path} must hold bytes X and integers y, got {images.dtype} and {labels.dtype}"
        )
    if labels.size == 0 or labels.min() < 1 or labels.max() > 10:
        raise ValueError(
            f"y in {path} must be one or more labels in 1..10, got {np.unique(labels)}"
        )
    # MATLAB's order keeps an image together, so this is a view and each image a copy of 3 KB.
    yield from base.indexed_records(
        np.moveaxis(images, -1, 0), {"label": labels % 10}, id_format=split + "_{:06d}"
    )


def _scipy(function: Any, path: pathlib.Path) -> Any:
    with base.report_damage(f"{path} is not a MATLAB file, or is damaged", *_DAMAGE):
        return function(path)
