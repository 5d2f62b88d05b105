"""The "binary version" archives of CIFAR-10 and CIFAR-100."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from gfa_jax.data.archives import base

_SHAPE = (3, 32, 32)


def parse(
    paths: Mapping[str, pathlib.Path],
    *,
    folder: str,
    members: Mapping[str, Sequence[str]],
    label_files: Mapping[str, str],
) -> base.Contents:
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
    data = base.read_tar_gz(path, [f"{folder}/{member}" for member in wanted])

    label_names = {}
    for feature, member in label_files.items():
        text = data[f"{folder}/{member}"].decode("utf-8", errors="replace")
        label_names[feature] = [line for line in text.split("\n") if line]
    num_labels = len(label_files)
    record_size = num_labels + math.prod(_SHAPE)
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
            base.check_labels(f"{feature} of {split} in {path}", values, len(label_names[feature]))
        images = records[:, num_labels:].reshape(-1, *_SHAPE).transpose(0, 2, 3, 1)
        splits[split] = base.indexed_records(images, labels, id_format=split + "_{:05d}")
    return base.Contents(splits=splits, label_names=label_names)
