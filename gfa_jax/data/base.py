"""What every reader of a data source gives to `sources.load` and `sources.open_lazily`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np


@dataclasses.dataclass(frozen=True)
class Source:
    """What a split is read from.

    `load` calls `read` once; a `LazyDataset` does for every batch, from several threads.
    """

    sizes: Mapping[str, int]
    label_names: tuple[str, ...]
    read: Callable[[str, np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]
    """(split, positions in it) -> (images, labels, ids)."""
