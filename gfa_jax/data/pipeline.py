"""Batches as a pure function of (seed, step, process).

There is no iterator state: batch `step` can be recomputed from its number alone, so resuming a run
needs nothing but the step, and every process of a multi-host run derives its own slice.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from gfa_jax import _validate
from gfa_jax.data.sources import seeded_permutation


class Examples(Protocol):
    """What batches are made of: a `Dataset`, or a `LazyDataset`."""

    def __len__(self) -> int:
        """Returns the number of examples."""
        ...

    def read(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns images, labels and ids at positions."""
        ...


def batch_positions(num_examples: int, batch_size: int, *, seed: int, step: int) -> np.ndarray:
    """Returns which examples form the global training batch `step`.

    The training stream is a sequence of epochs, each a fresh permutation of all examples; batch
    `step` is entries `step * batch_size` to `(step + 1) * batch_size` of it. Every example occurs
    exactly once per epoch, and no example is dropped at an epoch's end: a batch may straddle two
    epochs, or more where it is larger than the data set.

    Args:
      num_examples: size of the data set, at least 1.
      batch_size: global batch size, at least 1.
      seed: non-negative; names the stream.
      step: non-negative; any step costs one permutation, not a replay of the stream.

    Returns:
      `int64 [batch_size]` positions in `[0, num_examples)`; the caller owns the array.

    Raises:
      ValueError: if an argument is out of range.
    """
    _validate.positive_integer(num_examples=num_examples, batch_size=batch_size)
    _validate.non_negative(seed=seed, step=step)
    start, stop = step * batch_size, (step + 1) * batch_size
    parts = []
    for epoch in range(start // num_examples, (stop - 1) // num_examples + 1):
        order = _epoch_order(num_examples, seed, epoch)
        offset = epoch * num_examples
        parts.append(order[max(start - offset, 0) : stop - offset])
    return np.concatenate(parts)


def train_batch(
    dataset: Examples,
    batch_size: int,
    *,
    seed: int,
    step: int,
    process_index: int = 0,
    process_count: int = 1,
) -> dict[str, np.ndarray]:
    """Returns this process's part of the global training batch `step`.

    The parts are contiguous slices of the global batch, in the order of `process_index`; one
    process's batches are the concatenation of those of many.

    Args:
      dataset: the training examples, the same on every process.
      batch_size: global batch size, divisible by `process_count`; may exceed `len(dataset)`.
      seed: names the stream, see `batch_positions`.
      step: training step, counted from 0.
      process_index: which part, in `[0, process_count)`.
      process_count: number of parts.

    Returns:
      `inputs` `[B, H, W, C]` in the dtype of the data set (see `to_float`), `labels` `int32 [B]`
      and `ids` `int64 [B]`, where `B = batch_size / process_count`.

    Raises:
      ValueError: if an argument is out of range or the batch does not divide evenly.
    """
    share = _share(batch_size, process_index, process_count)
    positions = batch_positions(len(dataset), batch_size, seed=seed, step=step)
    return _gather(dataset, positions[share])


def eval_batches(
    dataset: Examples, batch_size: int, *, process_index: int = 0, process_count: int = 1
) -> Iterator[dict[str, np.ndarray]]:
    """Iterates over a data set once, in order, in batches of one fixed shape.

    Each process gets its contiguous slice of every batch, as in `train_batch`.

    The last batch is filled up with copies of the first example, id included, so that a compiled
    function sees one shape only and ids stay valid; multiply by `mask` before any sum.

    Args:
      dataset: the examples.
      batch_size: examples per batch, divisible by `process_count`.
      process_index: which part, in `[0, process_count)`.
      process_count: number of parts.

    Yields:
      `inputs` `[B, H, W, C]` in the dtype of the data set, `labels` `int32 [B]`, `ids` `int64 [B]`
      and `mask` `bool [B]`, false where an entry is padding; `B = batch_size / process_count`.

    Raises:
      ValueError: if an argument is out of range or the batch does not divide evenly.
    """
    share = _share(batch_size, process_index, process_count)
    # Checked here and not in the generator, which would raise only when it is first advanced.
    num_batches = num_eval_batches(len(dataset), batch_size)
    return (_eval_batch(dataset, batch_size, index, share) for index in range(num_batches))


def num_eval_batches(num_examples: int, batch_size: int) -> int:
    """Returns how many batches `eval_batches` yields for `num_examples` examples.

    Raises:
      ValueError: if `batch_size` is smaller than 1 or `num_examples` is negative.
    """
    _validate.positive_integer(batch_size=batch_size)
    _validate.non_negative(num_examples=num_examples)
    return -(-num_examples // batch_size)


def to_float(images: np.ndarray | jax.Array) -> jax.Array:
    """Converts stored images to what models and attacks work on; meant to run inside `jax.jit`.

    Batches cross to the device as stored, a quarter of the bytes for `uint8`.

    Args:
      images: any shape; `uint8` in 0..255, or `float32`.

    Returns:
      `float32` of the same shape: `images / 255` for `uint8`, `images` itself for `float32`.

    Raises:
      ValueError: for any other dtype.
    """
    if images.dtype == jnp.uint8:
        return jnp.asarray(images).astype(jnp.float32) / 255.0
    if images.dtype == jnp.float32:
        return jnp.asarray(images)
    raise ValueError(f"images must be uint8 or float32, got {images.dtype}")


@functools.lru_cache(maxsize=4)
def _epoch_order(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    order = seeded_permutation(num_examples, seed, epoch)
    # Shared by all later callers of the cache.
    order.setflags(write=False)
    return order


def _gather(dataset: Examples, positions: np.ndarray) -> dict[str, np.ndarray]:
    images, labels, ids = dataset.read(positions)
    return {"inputs": images, "labels": labels, "ids": ids}


def _share(batch_size: int, process_index: int, process_count: int) -> slice:
    """Returns which entries of a global batch a process has."""
    _validate.positive_integer(batch_size=batch_size, process_count=process_count)
    if not 0 <= process_index < process_count:
        raise ValueError(
            f"process_index must lie in [0, process_count) = [0, {process_count}), "
            f"got {process_index}"
        )
    if batch_size % process_count:
        raise ValueError(
            f"batch_size must be divisible by process_count = {process_count}, got {batch_size}"
        )
    size = batch_size // process_count
    return slice(process_index * size, (process_index + 1) * size)


def _eval_batch(
    dataset: Examples, batch_size: int, index: int, share: slice
) -> dict[str, np.ndarray]:
    positions = np.arange(index * batch_size, (index + 1) * batch_size)[share]
    mask = positions < len(dataset)
    return {**_gather(dataset, np.where(mask, positions, 0)), "mask": mask}
