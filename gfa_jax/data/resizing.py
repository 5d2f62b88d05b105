"""Images of many sizes made one size, while a data set is prepared."""

from __future__ import annotations

import collections
import concurrent.futures
import io
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from gfa_jax.data.archives import base

_T = TypeVar("_T")
_R = TypeVar("_R")

_MAX_WORKERS = 16


def resize(image: Any, size: int) -> Any:
    """Resizes an image so that its shorter side has `size` pixels, and cuts out the centre.

    Bilinear, with a filter as wide as the reduction (no aliasing); what torchvision's
    `Resize(size)` and `CenterCrop(size)` make of a PIL image, to the pixel.

    Args:
      image: a PIL image.
      size: pixels on a side of the result.

    Returns:
      A PIL image of `size` x `size` pixels in the same mode.
    """
    from PIL import Image

    width, height = image.size
    shorter = min(width, height)
    width, height = int(size * width / shorter), int(size * height / shorter)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def resized_records(
    records: Iterable[tuple[base.Key, base.Record]], size: int, what: str
) -> Iterator[tuple[base.Key, base.Record]]:
    """Yields records with `image`, JPEG or PNG bytes of any size, as PNG bytes of one size.

    Images are decoded and encoded by threads, and come in their order.

    Args:
      records: pairs of a key and a record.
      size: see `resize`.
      what: where the records come from, for messages.

    Raises:
      ValueError: for an image that is damaged, naming its key.
    """

    def convert(pair: tuple[base.Key, base.Record]) -> tuple[base.Key, base.Record]:
        key, record = pair
        image = resize(base.decode_rgb(record["image"], f"{key} in {what}"), size)
        stream = io.BytesIO()
        image.save(stream, format="png")
        return key, {**record, "image": stream.getvalue()}

    return _map_in_order(convert, records)


def _map_in_order(function: Callable[[_T], _R], values: Iterable[_T]) -> Iterator[_R]:
    """Maps by threads; unlike `Executor.map`, it takes no more values than it needs ahead."""
    workers = min(_MAX_WORKERS, os.cpu_count() or 1)
    pending: collections.deque[concurrent.futures.Future[_R]] = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        for value in values:
            pending.append(pool.submit(function, value))
            if len(pending) > 4 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
