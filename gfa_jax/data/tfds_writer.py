"""Writes parsed archives as tfds folders, with the stock builders and without TensorFlow."""

from __future__ import annotations

import contextlib
import importlib.util
import pathlib
import tempfile
import threading
import types
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from gfa_jax.data import resizing
from gfa_jax.data.archives import base

_BUFFER_SIZE = 1 << 17
_SPILL_LOCK = threading.Lock()


def resized_name(name: str, size: int | str) -> str:
    """Returns the tfds name of a data set that was resized while it was prepared."""
    return f"{name}_{size}"


def resized_builder(tfds: Any, stock: Any, size: int) -> Any:
    """Returns a builder class like `stock`, of another name, for images of one size.

    Another name, because what is found under the stock name is taken for the stock data set.
    """

    def info(self: Any) -> Any:
        stock_info = stock._info(self)
        features = dict(stock_info.features.items())
        features["image"] = tfds.features.Image(shape=(size, size, 3))
        return tfds.core.DatasetInfo(
            builder=self,
            description=(
                f"{stock.name} with images resized, the shorter side to {size} pixels, and cut to "
                "the central square."
            ),
            features=tfds.features.FeaturesDict(features),
            supervised_keys=stock_info.supervised_keys,
            homepage=stock_info.homepage,
            citation=stock_info.citation,
        )

    return _subclass(stock, resized_name(stock.name, size), _info=info)


def write(
    tfds: Any,
    builder_cls: Any,
    config: str | None,
    data_dir: pathlib.Path,
    contents: base.Contents,
    size: int | None = None,
) -> None:
    """Writes the contents of archives in array_record format.

    Args:
      tfds: the module.
      builder_cls: gives everything but the examples.
      config: name of a config of it, or `None` where it has none.
      data_dir: the folder of all tfds data sets.
      contents: what is written.
      size: pixels on a side for images that are to be resized; `None` where they all have one size.

    Raises:
      ValueError: for examples that `contents` finds to be damaged, or two with the same key.
    """

    def split_generators(self: Any, dl_manager: Any) -> dict[str, Any]:
        del dl_manager
        for feature, names in contents.label_names.items():
            self.info.features[feature].names = list(names)
        generators = {}
        for split, records in contents.splits.items():
            what = f"split {split} of {self.name}"
            unique = _unique(records, what)
            generators[split] = (
                unique if size is None else resizing.resized_records(unique, size, what)
            )
        return generators

    own_cls = _subclass(builder_cls, builder_cls.name, _split_generators=split_generators)
    # tfds makes its download folders even where nothing is downloaded.
    with tempfile.TemporaryDirectory() as scratch, _spill_without_tensorflow():
        own_cls(data_dir=data_dir, config=config).download_and_prepare(
            download_dir=scratch,
            download_config=tfds.download.DownloadConfig(try_download_gcs=False),
            file_format="array_record",
        )


def _subclass(cls: Any, name: str, **members: Any) -> Any:
    inherited = {
        "__module__": cls.__module__,
        "name": name,
        "pkg_dir_path": cls.pkg_dir_path,
    }
    return type(cls)(cls.__name__, (cls,), {**inherited, **members}, skip_registration=True)


def _unique(
    records: Iterable[tuple[base.Key, base.Record]], what: str
) -> Iterator[tuple[base.Key, base.Record]]:
    """Refuses a key that comes twice; tfds does so too, but late and without naming the key."""
    seen = set()
    for key, record in records:
        if key in seen:
            raise ValueError(f"{what} holds {key!r} twice: an archive is damaged or another")
        seen.add(key)
        yield key, record


@contextlib.contextmanager
def _spill_without_tensorflow() -> Iterator[None]:
    """Lets tfds order a split on disk, which it does above 1 GB and by TensorFlow's file system."""
    if importlib.util.find_spec("tensorflow") is not None:
        yield
        return
    from tensorflow_datasets.core import shuffle

    files = types.SimpleNamespace(
        GFile=_open_spill,
        exists=lambda path: pathlib.Path(path).exists(),
        remove=lambda path: pathlib.Path(path).unlink(),
    )
    stand_in = types.SimpleNamespace(
        io=types.SimpleNamespace(gfile=files),
        errors=types.SimpleNamespace(ResourceExhaustedError=_NeverRaised),
    )
    with _SPILL_LOCK:  # of two threads, one would take the other's stand-in for the original
        original = shuffle.tf
        shuffle.tf = stand_in
        try:
            yield
        finally:
            shuffle.tf = original


class _NeverRaised(Exception):  # noqa: N818
    """Stands for TensorFlow's error of too many open files, of which there are none here."""


class _SpillWriter:
    """Appends to a file that is open only while a buffer is written.

    tfds writes a thousand of them at the same time, about as many as a process may open.
    """

    def __init__(self, path: Any) -> None:
        self._path = pathlib.Path(path)
        self._buffer = bytearray()
        self._path.write_bytes(b"")

    def write(self, content: bytes) -> None:
        self._buffer += content
        if len(self._buffer) >= _BUFFER_SIZE:
            self.flush()

    def flush(self) -> None:
        with self._path.open("ab") as stream:
            stream.write(self._buffer)
        self._buffer.clear()

    def close(self) -> None:
        self.flush()


def _open_spill(path: Any, mode: Literal["wb", "rb"]) -> Any:
    return _SpillWriter(path) if mode == "wb" else pathlib.Path(path).open("rb")
