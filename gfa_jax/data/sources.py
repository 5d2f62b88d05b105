"""Data sets in memory: where images and labels come from, and which example belongs to which split.

Three kinds of source, each by name: `digits` (real 8x8 scans that ship with scikit-learn, no
download), `arrays:PATH.npz` (the user's own arrays) and `tfds:BUILDER` (any prepared
tensorflow-datasets image classification set; TensorFlow is not needed). Whatever the source, a
split is one `Dataset` held in memory, so an epoch costs an index operation and no decoding.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import importlib
import io
import os
import pathlib
import re
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from gfa_jax import _validate

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
)

# Fixed for ever: published numbers depend on which examples these two partitions select.
_VALIDATION_SEED = 0x67666176
_DIGITS_SEED = 0x67666164
_DIGITS_TEST_PER_CLASS = 40

_DECODE_CHUNK = 512

# Far above any real number of classes; a label beyond it is an id, or -1 in an unsigned type.
_MAX_UNNAMED_CLASSES = 1 << 20


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


@dataclasses.dataclass(frozen=True)
class _Source:
    """What `load` needs of a source; `read` is called once, with the positions that are wanted."""

    sizes: Mapping[str, int]
    label_names: tuple[str, ...]
    read: Callable[[str, np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]
    """(split, positions in it) -> (images, labels, ids)."""


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
      ValueError: for an unknown name or split, a number out of range, or data that breaks the rules
        above; the message names the file, the key and what would be valid.
      FileNotFoundError: if the file, or a prepared tfds folder, is not there.
      ImportError: if an optional package that the source needs is not installed.
    """
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
    images, labels, ids = source.read(pool, positions[:max_examples])
    return Dataset(
        images=np.ascontiguousarray(images),
        labels=labels.astype(np.int32),
        ids=ids.astype(np.int64),
        num_classes=len(source.label_names),
        label_names=source.label_names,
    )


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


def _open_source(name: str, data_dir: str | None) -> _Source:
    kind, colon, rest = name.partition(":")
    if name == "digits":
        return _open_digits()
    if kind == "arrays" and (rest or not colon):
        return _open_arrays(rest, data_dir)
    if kind == "tfds" and rest:
        return _open_tfds(rest, data_dir)
    hint = _validate.suggestion(name, _SUGGESTIONS)
    raise ValueError(f"unknown data set name {name!r}; valid forms: {', '.join(_FORMS)}.{hint}")


def _open_digits() -> _Source:
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

    return _Source(
        sizes={split: len(ids) for split, ids in members.items()},
        label_names=tuple(str(digit) for digit in range(10)),
        read=read,
    )


def _open_arrays(name_path: str, data_dir: str | None) -> _Source:
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

    def read(split: str, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
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
        selected = images[positions]
        if selected.dtype != np.uint8:
            selected = selected.astype(np.float32)
        return selected, labels[split][positions], positions

    return _Source(
        sizes={split: shape[0] for split, shape in shapes.items()},
        label_names=label_names,
        read=read,
    )


_ArrayHeader = tuple[tuple[int, ...], np.dtype[Any]]

# What zipfile, zlib and NumPy raise for a file that is damaged or is something else.
_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, ValueError, OSError, RuntimeError)


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


_TFDS_NAME = re.compile(
    r"(?P<builder>[A-Za-z_]\w*)"
    r"(?:[/:](?P<config>(?!\d+\.\d+\.\d+$)[^/:]+))?"
    r"(?::(?P<version>\d+\.\d+\.\d+))?"
)


def _open_tfds(spec: str, data_dir: str | None) -> _Source:
    match = _TFDS_NAME.fullmatch(spec)
    if match is None:
        raise ValueError(
            f"cannot read the tfds name {spec!r}; valid: BUILDER, BUILDER/CONFIG, "
            "BUILDER:VERSION, BUILDER/CONFIG:VERSION, such as 'cifar10' or 'cifar10:3.0.2'"
        )
    tfds = import_tfds()
    builder = _prepared_builder(tfds, match, data_dir)
    features = builder.info.features
    _check_tfds_features(tfds, spec, features)

    # Some sets are for testing only, such as cifar10_corrupted.
    sizes = {split: info.num_examples for split, info in builder.info.splits.items()}
    if "test" not in sizes and "validation" in sizes:
        sizes["test"], source_of_test = sizes["validation"], "validation"
    else:
        source_of_test = "test"

    def read(split: str, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        source_split = source_of_test if split == "test" else split
        channels = features["image"].shape[-1]
        what = f"{spec} {source_split}"
        try:
            records = builder.as_data_source(
                source_split, decoders={"image": tfds.decode.SkipDecoding()}
            )
            images, labels = _decode_records(records, positions, channels, what)
        except (RuntimeError, OSError) as error:
            # array_record raises RuntimeError for a damaged or missing file, Pillow OSError.
            raise ValueError(
                f"tfds data set {what} in {builder.data_path} cannot be read; delete that folder "
                f"and prepare it again: {error}"
            ) from error
        return images, labels, positions

    return _Source(
        sizes=sizes,
        label_names=tuple(features["label"].names),
        read=read,
    )


def _prepared_builder(tfds: Any, match: re.Match[str], data_dir: str | None) -> Any:
    """Returns the builder of a data set whose array_record files exist."""
    name, config, version = match.group("builder", "config", "version")
    full_name = name + (f"/{config}" if config else "") + (f":{version}" if version else "")
    try:
        builder = tfds.builder(full_name, data_dir=data_dir and os.path.expanduser(data_dir))
    except tfds.core.DatasetNotFoundError as error:
        known = tfds.list_builders(with_community_datasets=False)
        raise ValueError(
            f"tfds knows no data set {name!r}, and none is prepared in "
            f"{data_dir or tfds.core.constants.DATA_DIR}.{_validate.suggestion(name, known)}"
        ) from error
    except (AssertionError, ValueError) as error:
        # tfds raises AssertionError for a version that it does not have.
        raise ValueError(f"tfds cannot open {full_name!r}: {error}") from error

    # Asked to read what is not there, tfds reports a wrong file format or tries to download.
    folder = pathlib.Path(builder.data_path)
    if is_prepared(folder):
        return builder
    from gfa_jax.data import prepare

    if name in prepare.RECIPES:
        how = (
            f"python -m gfa_jax.data.prepare {name} --data_dir {builder.data_dir_root} "
            "(--archive PATH | --download)"
        )
    else:
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


_Mode = Literal["L", "RGB", "RGBA"]
_PIL_MODES: dict[int, _Mode] = {1: "L", 3: "RGB", 4: "RGBA"}


def _decode_image(encoded: bytes, mode: _Mode) -> np.ndarray:
    from PIL import Image

    with Image.open(io.BytesIO(encoded)) as image:
        pixels = np.asarray(image.convert(mode))
    return pixels if pixels.ndim == 3 else pixels[..., None]


def _decode_records(
    records: Any, positions: np.ndarray, channels: int, what: str
) -> tuple[np.ndarray, np.ndarray]:
    """Reads and decodes records into one array, in the order of `positions`.

    Reading and parsing hold the GIL and decoding does not, so chunks are decoded by a small thread
    pool while the next are read.
    """
    if channels not in _PIL_MODES:
        raise ValueError(
            f"images of tfds data set {what} must have 1, 3 or 4 channels, got {channels}"
        )
    mode = _PIL_MODES[channels]
    shape = _decode_image(records[int(positions[0])]["image"], mode).shape
    images = np.empty((len(positions), *shape), np.uint8)
    labels = np.empty(len(positions), np.int64)

    def decode(start: int, encoded: Sequence[bytes]) -> None:
        for offset, data in enumerate(encoded, start):
            pixels = _decode_image(data, mode)
            if pixels.shape != shape:
                raise ValueError(
                    f"images of tfds data set {what} differ in size: {shape} at position "
                    f"{positions[0]}, {pixels.shape} at position {positions[offset]}; use a "
                    "version of the data set that is resized to one size"
                )
            images[offset] = pixels

    num_threads = min(8, os.cpu_count() or 1)
    with concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
        pending = []
        for start in range(0, len(positions), _DECODE_CHUNK):
            chunk = records.__getitems__(positions[start : start + _DECODE_CHUNK].tolist())
            labels[start : start + len(chunk)] = [record["label"] for record in chunk]
            pending.append(pool.submit(decode, start, [record["image"] for record in chunk]))
        for future in pending:
            future.result()
    return images, labels
