"""Data sets: where images and labels come from, and which example belongs to which split.

Three kinds of source, each by name: `digits` (real 8x8 scans that ship with scikit-learn, no
download), `arrays:PATH.npz` (the user's own arrays) and `tfds:BUILDER` (any prepared
tensorflow-datasets image classification set; TensorFlow is not needed). Whatever the source, a
split is one `Dataset` held in memory, so an epoch costs an index operation and no decoding, or,
where it does not fit, a `LazyDataset` that reads the examples it is asked for. The readers of files
are in `npz` and `tfds_source`.
"""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import numpy as np

from gfa_jax import _validate
from gfa_jax.data import npz, tfds_source
from gfa_jax.data.base import Source

SPLITS = ("train", "validation", "test")
"""The splits that `load` knows."""

_FORMS = ("digits", "arrays:PATH.npz", "tfds:BUILDER[/CONFIG][:VERSION]")
_SUGGESTIONS = (
    "digits",
    "arrays",
    "arrays:PATH.npz",
    "tfds:cifar10",
    "tfds:cifar100",
    "tfds:mnist",
    "tfds:fashion_mnist",
    "tfds:kmnist",
    "tfds:svhn_cropped",
    "tfds:tiny_imagenet",
)

# Fixed for ever: published numbers depend on which examples these two partitions select.
_VALIDATION_SEED = 0x67666176
_DIGITS_SEED = 0x67666164
_DIGITS_TEST_PER_CLASS = 40


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """One split of an image classification data set, in memory.

    Attributes:
      images: `[N, H, W, C]`, either `uint8` in 0..255 or `float32` in `[0, 1]`.
      labels: `int32 [N]` in `[0, num_classes)`.
      ids: `int64 [N]`, the position of each example in its source split. An example keeps its id
        when the set is subset or reordered, so ids can seed per-example randomness.
      num_classes: number of classes.
      label_names: one name per class.

    Raises:
      ValueError: if ranks, dtypes, lengths or the number of label names do not agree.
    """

    images: np.ndarray
    labels: np.ndarray
    ids: np.ndarray
    num_classes: int
    label_names: tuple[str, ...]

    def __post_init__(self) -> None:
        """Checks everything that can be checked without reading the pixels."""
        if self.images.ndim != 4 or self.images.dtype not in (np.uint8, np.float32):
            raise ValueError(
                "images must be uint8 or float32 of shape [N, H, W, C], got "
                f"{self.images.dtype} of shape {self.images.shape}"
            )
        num = len(self.images)
        for field, dtype in (("labels", np.int32), ("ids", np.int64)):
            array = getattr(self, field)
            if array.shape != (num,) or array.dtype != dtype:
                raise ValueError(
                    f"{field} must be {np.dtype(dtype)} of shape ({num},) to match the images, got "
                    f"{array.dtype} of shape {array.shape}"
                )
        if num == 0:
            raise ValueError("images must hold at least one example, got none")
        if len(self.label_names) != self.num_classes:
            raise ValueError(
                f"label_names must hold num_classes = {self.num_classes} names, "
                f"got {len(self.label_names)}"
            )
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or high >= self.num_classes:
            raise ValueError(
                f"labels must lie in [0, num_classes) = [0, {self.num_classes}), "
                f"got values from {low} to {high}"
            )

    def __len__(self) -> int:
        """Returns the number of examples."""
        return len(self.images)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape `(H, W, C)` of one image."""
        height, width, channels = self.images.shape[1:]
        return height, width, channels

    def read(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns images, labels and ids of the examples at these positions of the split."""
        return self.images[positions], self.labels[positions], self.ids[positions]

    def take(self, num: int) -> Dataset:
        """Returns the first `num` examples, or all of them where there are fewer.

        The arrays are views of this set's arrays, not copies.

        Args:
          num: upper bound on the number of examples, at least 1.

        Raises:
          ValueError: if `num` is smaller than 1.
        """
        _validate.positive_integer(num=num)
        return dataclasses.replace(
            self, images=self.images[:num], labels=self.labels[:num], ids=self.ids[:num]
        )


@dataclasses.dataclass(frozen=True, eq=False)
class LazyDataset:
    """One split whose examples stay in their files until they are read.

    Attributes:
      source: of the examples.
      pool: the source's split.
      positions: `int64 [N]`, the examples' positions in it.
      image_shape: shape `(H, W, C)` of every image.
    """

    source: Source
    pool: str
    positions: np.ndarray
    image_shape: tuple[int, int, int]

    def __len__(self) -> int:
        """Returns the number of examples."""
        return len(self.positions)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.label_names)

    @property
    def label_names(self) -> tuple[str, ...]:
        """One name per class."""
        return self.source.label_names

    def read(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns images, labels and ids of the examples at these positions of the split.

        Nothing else is decoded.

        Args:
          positions: integers in `[0, N)`.

        Returns:
          As the fields of `Dataset`.

        Raises:
          ValueError: for images of another shape than the first one's.
        """
        images, labels, ids = self.source.read(self.pool, self.positions[positions])
        if images.shape[1:] != self.image_shape:
            raise ValueError(
                f"images must have one shape, got {self.image_shape} and {images.shape[1:]}"
            )
        return np.ascontiguousarray(images), labels.astype(np.int32), ids.astype(np.int64)


def load(
    name: str,
    split: str,
    *,
    data_dir: str | None = None,
    num_validation: int = 0,
    max_examples: int | None = None,
) -> Dataset:
    """Loads one split of a data set into memory.

    Names:

    * `digits`: scikit-learn's 1797 scans of handwritten digits, `float32 [N, 8, 8, 1]`, with a
      fixed partition into 1397 for training and 400 (40 a class) for testing; see
      `digits_partition`.
    * `arrays:PATH.npz`: keys `train_images`, `train_labels`, `test_images`, `test_labels` and,
      optionally, `label_names`. Images are `uint8` in 0..255, or `float32`/`float64` in `[0, 1]`,
      of shape `[N, H, W, C]`, or `[N, H, W]` for one channel; labels are integers of shape `[N]`.
      There are `len(label_names)` classes or, without it, one more than the largest label of both
      splits. A relative `PATH` is looked up in `data_dir` where that is given; plain `arrays` takes
      `data_dir` itself as the file. Files are read with `allow_pickle=False`: nothing in them runs.
    * `tfds:BUILDER`, also with `/CONFIG` and `:VERSION` in tfds's own syntax (`:CONFIG` is
      understood too): a data set prepared in `data_dir` in array_record format with features
      `image` and `label`. Without a `test` split the `validation` split serves as test, as for
      ImageNet.

    The source's training examples are put in one fixed random order that does not depend on any
    training seed. The first `num_validation` of them are `validation`, the rest `train`: the two
    never overlap, and together they are the whole. `test` keeps the order of its source.

    Args:
      name: one of the forms above.
      split: `train`, `validation` or `test`.
      data_dir: folder of prepared data (for `tfds:`, where `None` means tfds's own default), folder
        or file (for `arrays`); not used by `digits`.
      num_validation: how many training examples to hold out. Give the same number for every split
        of an experiment.
      max_examples: keep only the first `max_examples` of the split, at least 1; `None` keeps all.

    Returns:
      The split. Ids are positions in the source's training or test split (for `digits`, in
      scikit-learn's list).

    Raises:
      ValueError: for an unknown name or split, a number out of range, data that breaks the rules
        above, or that does not fit in this machine's memory (for `tfds:`); the message names the
        file, the key and what would be valid.
      FileNotFoundError: if the file, or a prepared tfds folder, is not there.
      ImportError: if an optional package that the source needs is not installed.
    """
    source, pool, positions = _select(name, split, data_dir, num_validation, max_examples)
    images, labels, ids = source.read(pool, positions)
    return Dataset(
        images=np.ascontiguousarray(images),
        labels=labels.astype(np.int32),
        ids=ids.astype(np.int64),
        num_classes=len(source.label_names),
        label_names=source.label_names,
    )


def open_lazily(
    name: str,
    split: str,
    *,
    data_dir: str | None = None,
    num_validation: int = 0,
    max_examples: int | None = None,
) -> LazyDataset:
    """Opens one split without reading it: the examples of `load`, in the same order.

    Of `tfds:` sets, one image is decoded now, and others when they are read; other sources are held
    in memory all the same.

    Args:
      name: as in `load`.
      split: as in `load`.
      data_dir: as in `load`.
      num_validation: as in `load`.
      max_examples: as in `load`.

    Raises:
      ValueError: as `load`.
      FileNotFoundError: as `load`.
      ImportError: as `load`.
    """
    source, pool, positions = _select(name, split, data_dir, num_validation, max_examples)
    height, width, channels = source.read(pool, positions[:1])[0].shape[1:]
    return LazyDataset(source, pool, positions, (height, width, channels))


def _select(
    name: str, split: str, data_dir: str | None, num_validation: int, max_examples: int | None
) -> tuple[Source, str, np.ndarray]:
    """Returns the source of a split, the source's own split, and the positions in it."""
    _validate.one_of(SPLITS, split=split)
    _validate.non_negative(num_validation=num_validation)
    if split == "validation" and num_validation == 0:
        raise ValueError(
            "split 'validation' is empty because num_validation is 0; hold out at least one example"
        )
    if max_examples is not None:
        _validate.positive_integer(max_examples=max_examples)

    source = _open_source(name, data_dir)
    pool = "test" if split == "test" else "train"
    if pool not in source.sizes:
        raise ValueError(
            f"data set {name!r} has no {pool} split; its splits: {', '.join(sorted(source.sizes))}"
        )
    positions = np.arange(source.sizes[pool])
    if pool == "train":
        if num_validation >= len(positions):
            raise ValueError(
                f"num_validation must leave examples to train on: at most {len(positions) - 1} for "
                f"{name!r}, got {num_validation}"
            )
        order = seeded_permutation(len(positions), _VALIDATION_SEED, len(positions))
        is_validation = split == "validation"
        positions = order[:num_validation] if is_validation else order[num_validation:]
    return source, pool, positions[:max_examples]


@dataclasses.dataclass(frozen=True)
class Description:
    """What a data set's examples are like.

    Attributes:
      image_shape: `(H, W, C)`.
      dtype: of images as stored, `uint8` or `float32`.
      num_classes: number of classes.
    """

    image_shape: tuple[int, int, int]
    dtype: np.dtype[Any]
    num_classes: int


def describe(name: str, *, data_dir: str | None = None) -> Description:
    """Describes a data set by its metadata.

    Of `arrays` the file must be there; a `tfds:` set that tfds itself defines need not be prepared.

    Args:
      name: as in `load`.
      data_dir: as in `load`.

    Raises:
      ValueError: for an unknown name, or images of more than one size.
      FileNotFoundError: for a missing file, or a set that only its prepared files describe.
      ImportError: if an optional package that the source needs is not installed.
    """
    kind, _, rest = name.partition(":")
    if kind == "tfds" and rest:
        shape, num_classes = tfds_source.describe_tfds(rest, data_dir)
        return Description(shape, np.dtype(np.uint8), num_classes)
    one = load(name, "train", data_dir=data_dir, max_examples=1)
    return Description(one.image_shape, one.images.dtype, one.num_classes)


def seeded_permutation(num: int, *seed: int) -> np.ndarray:
    """Returns a random permutation of `range(num)` that is the same under every NumPy version.

    NumPy promises stable streams for its bit generators but not for `Generator.permutation`, so the
    order is that of the raw Philox stream. Two of its 64-bit words tie with probability below
    `num**2 / 2**65`, and a stable sort makes even that case reproducible.

    Args:
      num: length of the permutation.
      *seed: non-negative integers that name the permutation.

    Returns:
      `int64 [num]`.
    """
    words = np.random.Philox(np.random.SeedSequence(seed)).random_raw(num)
    return np.argsort(words, kind="stable").astype(np.int64)


def digits_partition(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Splits scikit-learn's digits into training and test positions.

    scikit-learn keeps the digits of one writer together, so a cut at any position would put
    different writers, and different class frequencies, on each side. The partition draws 40
    examples of every class with a fixed seed instead; writers then occur on both sides, which makes
    the test easier than one on unseen writers.

    Args:
      labels: integer `[N]`, scikit-learn's order.

    Returns:
      Two ascending `int64` arrays of positions, training and test, disjoint and complete.
    """
    test = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        order = seeded_permutation(len(members), _DIGITS_SEED, int(label))
        test.append(members[order[:_DIGITS_TEST_PER_CLASS]])
    is_test = np.zeros(len(labels), bool)
    is_test[np.concatenate(test)] = True
    return np.flatnonzero(~is_test), np.flatnonzero(is_test)


def _open_source(name: str, data_dir: str | None) -> Source:
    kind, colon, rest = name.partition(":")
    if name == "digits":
        return _open_digits()
    if kind == "arrays" and (rest or not colon):
        return npz.open_arrays(rest, data_dir)
    if kind == "tfds" and rest:
        return tfds_source.open_tfds(rest, data_dir)
    hint = _validate.suggestion(name, _SUGGESTIONS)
    raise ValueError(f"unknown data set name {name!r}; valid forms: {', '.join(_FORMS)}.{hint}")


def _open_digits() -> Source:
    try:
        datasets = importlib.import_module("sklearn.datasets")
    except ModuleNotFoundError as error:
        raise ImportError(
            "data set 'digits' ships with scikit-learn: pip install scikit-learn"
        ) from error
    bunch = datasets.load_digits()
    # 16 is the largest ink count of a 4x4 cell, so this is exact in float32.
    images = (bunch.images / 16.0).astype(np.float32)[..., None]
    labels = bunch.target
    members = dict(zip(("train", "test"), digits_partition(labels), strict=True))

    def read(split: str, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        ids = members[split][positions]
        return images[ids], labels[ids], ids

    return Source(
        sizes={split: len(ids) for split, ids in members.items()},
        label_names=tuple(str(digit) for digit in range(10)),
        read=read,
    )
