"""What every reader of a data source gives to `sources.load`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np


@dataclasses.dataclass(frozen=True)
class Source:
    """What `load` needs of a source; `read` is called once, with the positions that are wanted."""

    sizes: Mapping[str, int]
    label_names: tuple[str, ...]
    read: Callable[[str, np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]
    """(split, positions in it) -> (images, labels, ids)."""
