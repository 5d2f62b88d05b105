"""Where training batches come from: the devices' memory, this machine's, or files.

Whatever the placement, batch `step` is the same function of the seed and the step, and every
process makes its share of it alone.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from gfa_jax import _validate, distributed
from gfa_jax.data import pipeline
from gfa_jax.data.sources import Dataset, LazyDataset

PLACEMENTS = ("auto", "device", "host", "stream")
"""Names of `train_input`'s placements."""

DEVICE_SHARE = 0.25
"""The largest share of a device's memory that `auto` fills with examples."""

_BATCHES_AHEAD = 4

InputFn = Callable[[int], dict[str, jax.Array]]
"""`step -> {"inputs" [B, H, W, C] as stored, "labels" int32 [B]}`, global arrays."""


def choose_placement(num_bytes: int, devices: Sequence[Any]) -> str:
    """Returns `device` where so many bytes fit on each of the devices beside a model, else `host`.

    Args:
      num_bytes: of all examples as stored.
      devices: of this process. Those that do not tell their memory, such as CPUs, take none.
    """
    limits = [(device.memory_stats() or {}).get("bytes_limit", 0) for device in devices]
    return "device" if num_bytes <= DEVICE_SHARE * min(limits) else "host"


def train_input(
    dataset: Dataset | LazyDataset,
    batch_size: int,
    *,
    seed: int,
    sharding: jax.sharding.NamedSharding,
    placement: str = "auto",
) -> InputFn:
    """Returns the function that makes training batches.

    * `device`: all examples lie on every device, and batches are gathered there: the host sends
      some positions a step.
    * `host`: batches are gathered in this process's memory and sent.
    * `stream`: batches are read ahead by threads, for a `LazyDataset`; only this process's share is
      decoded. A step that is not the next one starts anew, so that training resumes anywhere.
    * `auto`: `stream` for a `LazyDataset`, else `choose_placement`; `device` only where every
      process would choose it. All of them have to call this.

    What it holds (arrays, threads, open files) goes with the function and the data set.

    Args:
      dataset: the training examples, the same on every process.
      batch_size: global, divisible by the devices of the sharding.
      seed: names the stream of batches, see `pipeline.batch_positions`.
      sharding: of the batch, along axis 0.
      placement: one of `PLACEMENTS`.

    Raises:
      ValueError: for an unknown placement, or one that does not fit the data set.
      ImportError: for `stream` without grain.
    """
    _validate.one_of(PLACEMENTS, placement=placement)
    if placement == "auto":
        placement = "stream"
        if isinstance(dataset, Dataset):
            chosen = choose_placement(dataset.images.nbytes, jax.local_devices())
            # Devices' limits may differ between hosts, and the program must not.
            placement = "host" if distributed.any_process(chosen != "device") else "device"
    if isinstance(dataset, LazyDataset) != (placement == "stream"):
        raise ValueError(
            f"placement={placement!r} does not fit a {type(dataset).__name__}: 'stream' reads a "
            "LazyDataset, the others a Dataset."
        )
    if isinstance(dataset, LazyDataset):
        return _Stream(dataset, batch_size, seed, sharding)
    if placement == "device":
        return _on_device(dataset, batch_size, seed, sharding)
    return lambda step: put(_share(dataset, batch_size, seed, step), sharding)


def _share(
    dataset: Dataset | LazyDataset, batch_size: int, seed: int, step: int
) -> dict[str, np.ndarray]:
    """Returns this process's part of a batch."""
    batch = pipeline.train_batch(
        dataset,
        batch_size,
        seed=seed,
        step=step,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    return {"inputs": batch["inputs"], "labels": batch["labels"]}


def put(
    share: Mapping[str, np.ndarray], sharding: jax.sharding.NamedSharding
) -> dict[str, jax.Array]:
    """Makes global arrays of every process's share of a batch.

    Args:
      share: this process's part, `[B / processes, ...]` each.
      sharding: along axis 0.
    """
    return {
        name: jax.make_array_from_process_local_data(sharding, value)
        for name, value in share.items()
    }


def _on_device(
    dataset: Dataset, batch_size: int, seed: int, sharding: jax.sharding.NamedSharding
) -> InputFn:
    everywhere = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    examples = {
        name: jax.make_array_from_process_local_data(everywhere, value, value.shape)
        for name, value in (("inputs", dataset.images), ("labels", dataset.labels))
    }

    @jax.jit
    def gather(examples: dict[str, jax.Array], positions: jax.Array) -> dict[str, jax.Array]:
        # Every device has all examples: each takes its own from its own.
        return {
            name: jax.lax.with_sharding_constraint(value[positions], sharding)
            for name, value in examples.items()
        }

    def batch_at(step: int) -> dict[str, jax.Array]:
        positions = pipeline.batch_positions(len(dataset), batch_size, seed=seed, step=step)
        own = np.array_split(positions.astype(np.int32), jax.process_count())[jax.process_index()]
        return gather(examples, put({"positions": own}, sharding)["positions"])

    return batch_at


class _Stream:
    """Batches of a lazy data set, some steps ahead."""

    def __init__(
        self,
        dataset: LazyDataset,
        batch_size: int,
        seed: int,
        sharding: jax.sharding.NamedSharding,
    ) -> None:
        try:
            grain = importlib.import_module("grain")
        except ModuleNotFoundError as error:
            raise ImportError(
                "placement 'stream' needs grain: pip install 'gfa_jax[grain]'"
            ) from error
        self._sharding = sharding
        self._next: int | None = None
        self._batches: Iterator[dict[str, np.ndarray]] = iter(())
        # One element is this process's share of a batch, which its source may decode by threads of
        # its own.
        options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=_BATCHES_AHEAD)

        def batches_from(step: int) -> Iterator[dict[str, np.ndarray]]:
            steps = grain.MapDataset.range(step, sys.maxsize)
            shares = steps.map(lambda step: _share(dataset, batch_size, seed, int(step)))
            return iter(shares.to_iter_dataset(options))

        self._from = batches_from

    def __call__(self, step: int) -> dict[str, jax.Array]:
        if step != self._next:
            self._batches = self._from(step)
        self._next = step + 1
        return put(next(self._batches), self._sharding)
