"""What every parser gives to `prepare`, and what parsers share."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import io
import pathlib
import posixpath
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import IO, Any, cast

import numpy as np

Record = dict[str, Any]
"""One example, by feature name, as tfds takes it; images as PIL images or encoded bytes."""

Key = int | str
"""Names an example within its split; tfds orders a split by a hash of it."""

DAMAGE = (
    tarfile.TarError,
    zipfile.BadZipFile,
    EOFError,
    zlib.error,
    OSError,
    NotImplementedError,  # zipfile: an unknown compression method.
    RuntimeError,  # zipfile: an encrypted member.
)
"""What tarfile, zipfile, gzip and zlib raise for a file that is damaged or is something else."""


@dataclasses.dataclass(frozen=True)
class Contents:
    """A parsed archive.

    Attributes:
      splits: the records of each split with their keys, those that the stock builder of tfds uses,
        so that the order is the stock one too. Each is iterated once, one after the other.
      label_names: class names by label feature, for the features whose builder does not name them.
    """

    splits: Mapping[str, Iterable[tuple[Key, Record]]]
    label_names: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to read a data set's official archives.

    Attributes:
      files: names of the archives, as published.
      parse: takes their paths by name and returns the contents. It raises `ValueError` for a
        damaged or foreign file, while parsing or while its records are iterated.
      varied_size: whether images differ in size; they are then resized while they are prepared, and
        `parse` gives them as encoded bytes.
      num_examples: in all splits, where `varied_size`: for the message that says what fits.
      make_builder: returns the builder class, given tfds, of a data set that tfds does not have.
      registration: where archives are to be had that cannot be downloaded without an account.
    """

    files: tuple[str, ...]
    parse: Callable[[Mapping[str, pathlib.Path]], Contents]
    varied_size: bool = False
    num_examples: int = 0
    make_builder: Callable[[Any], Any] | None = None
    registration: str | None = None


def indexed_records(
    images: np.ndarray, labels: Mapping[str, np.ndarray], id_format: str | None = None
) -> Iterator[tuple[int, Record]]:
    """Yields records of images in memory, with their index as key.

    Args:
      images: `uint8` `[N, H, W]` or `[N, H, W, 3]`.
      labels: integers `[N]` by feature.
      id_format: for the feature `id`, from the index; `None` for no such feature.
    """
    for index, pixels in enumerate(images):
        record: Record = {feature: int(values[index]) for feature, values in labels.items()}
        if id_format is not None:
            record["id"] = id_format.format(index)
        record["image"] = pil_image(pixels)
        yield index, record


def pil_image(pixels: np.ndarray) -> Any:
    """Returns `uint8` pixels `[H, W]` or `[H, W, 3]` in the one form that tfds encodes alone.

    tfds needs TensorFlow to encode arrays.
    """
    # Pillow comes with the tfds installation, which a plain import of this package does not need.
    from PIL import Image

    return Image.fromarray(np.ascontiguousarray(pixels))


def decode_rgb(encoded: bytes, what: str) -> Any:
    """Returns the PIL image, in RGB, of JPEG or PNG bytes.

    Grey images get three equal channels. Orientation tags are not followed: TensorFlow, which the
    stock builders decode with, does not know them.

    Raises:
      ValueError: for damaged bytes; the message starts with `what`.
    """
    from PIL import Image

    try:
        # Pillow would start other programs for some of the formats that it knows.
        with Image.open(io.BytesIO(encoded), formats=("JPEG", "PNG")) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        # Pillow raises SyntaxError for some broken PNG files.
        raise ValueError(f"{what} is not an image, or is damaged: {error}") from error


def check_labels(what: str, labels: np.ndarray, num_classes: int) -> None:
    """Raises ValueError, naming `what` and the position, for a label outside the classes."""
    if labels.max() >= num_classes:
        raise ValueError(
            f"{what} must be labels in [0, {num_classes}), got {labels.max()} at position "
            f"{labels.argmax()}"
        )


def read_tar_gz(path: pathlib.Path, members: Sequence[str]) -> dict[str, bytes]:
    """Reads members of a gzipped tar file in one pass, in memory.

    Args:
      path: the archive.
      members: which files of it.

    Returns:
      Their contents by name.

    Raises:
      ValueError: for a damaged archive, or one that lacks a member.
    """
    data = {name: content for name, content in iterate_tar(path, gzipped=True) if name in members}
    missing = [member for member in members if member not in data]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}: it is cut short or another archive")
    return data


def iterate_tar(
    path: pathlib.Path, *, gzipped: bool = False, prefix: str = ""
) -> Iterator[tuple[str, bytes]]:
    """Yields (name, content) of the regular files of a tar archive, in its order, as a stream.

    Args:
      path: the archive.
      gzipped: whether it is a `.tar.gz`; its checksum is then compared at the end.
      prefix: only files whose normalised name starts with it; others are not read.

    Raises:
      ValueError: for a damaged archive.
    """
    kind = ".tar.gz" if gzipped else ".tar"
    with contextlib.ExitStack() as stack:
        stack.enter_context(report_damage(f"{path} is not a {kind} archive, or is damaged"))
        stream: IO[bytes] = stack.enter_context(path.open("rb"))
        if gzipped:
            stream = cast(IO[bytes], stack.enter_context(gzip.GzipFile(fileobj=stream)))
        yield from iterate_tar_stream(stream, prefix, check_end=not gzipped)
        if gzipped:
            # gzip compares its checksum, which ends the file, only once that is read.
            while stream.read(1 << 20):
                pass


def iterate_tar_stream(
    stream: IO[bytes], prefix: str = "", *, check_end: bool = True
) -> Iterator[tuple[str, bytes]]:
    """Yields (name, content) of the regular files of a plain tar stream; see `iterate_tar`.

    Args:
      stream: of the archive.
      prefix: as in `iterate_tar`.
      check_end: whether the mark at the end must be there. tarfile takes a damaged header, or none,
        for the end. The stream must then be seekable.

    Raises:
      tarfile.TarError: for a damaged stream, or whatever the stream raises.
    """
    with tarfile.open(fileobj=stream, mode="r:") as archive:
        for info in archive:
            name = posixpath.normpath(info.name)
            # Links and devices have no data of their own.
            if name.startswith(prefix) and info.isreg():
                content = archive.extractfile(info)
                assert content is not None
                yield name, content.read()
        if check_end:
            stream.seek(archive.offset)
            if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"no header and no end at byte {archive.offset}")


@contextlib.contextmanager
def report_damage(message: str, *others: type[Exception]) -> Iterator[None]:
    """Turns exceptions that mean damage, and `others`, into ValueErrors that start with `message`.

    Around the body of a generator it sees what is raised there, not what its consumer raises.
    """
    kinds: tuple[type[Exception], ...] = (*DAMAGE, *others)
    try:
        yield
    except kinds as error:
        raise ValueError(f"{message}: {error}") from error
