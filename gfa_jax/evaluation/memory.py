"""How much memory an evaluation needs, before it starts."""

import functools
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gfa_jax import losses
from gfa_jax.evaluation.subject import ApplyLogits, Subject
from gfa_jax.training import layout
from gfa_jax.types import Array


class Estimate(NamedTuple):
    """Bytes on one device.

    Attributes:
      needed: for the weights and the gradient of a batch, which every attack takes; attacks hold a
        few copies of the images besides, and those that take the gradients of several logits at
        once as many times the memory.
      available: what the device has left, or ``None`` where it does not tell.
    """

    needed: int
    available: int | None

    @property
    def text(self) -> str:
        """Returns the estimate in words."""
        needed = f"a batch's gradient and the weights take {_mebibytes(self.needed)} on each device"
        return (
            needed if self.available is None else f"{needed}, {_mebibytes(self.available)} are free"
        )

    def check(self, batch_size: int) -> None:
        """Raises ValueError where memory does not suffice."""
        if self.available is not None and self.needed > self.available:
            raise ValueError(f"batch_size={batch_size} is too large: {self.text}.")


def estimate(subject: Subject, batch_size: int) -> Estimate:
    """Compiles the gradient of a batch, without running it.

    Args:
      subject: the classifier.
      batch_size: over all devices.
    """
    sharding = layout.split(subject.mesh)
    shape = (batch_size, *subject.test_set.image_shape)
    inputs = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
    labels = jax.ShapeDtypeStruct((batch_size,), jnp.int32, sharding=sharding)
    leaves, treedef = jax.tree.flatten(jax.tree.map(_shape, subject.variables))
    needed = _needed(subject.apply_logits, treedef, tuple(leaves), inputs, labels)
    return Estimate(needed, _available(subject.mesh.devices.flat[0]))


def _shape(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


@functools.lru_cache(maxsize=16)
def _needed(
    apply_logits: ApplyLogits,
    treedef: Any,
    leaves: tuple[jax.ShapeDtypeStruct, ...],
    inputs: jax.ShapeDtypeStruct,
    labels: jax.ShapeDtypeStruct,
) -> int:
    """Returns the bytes of the gradient's program and of what it is given."""

    @jax.jit
    def gradient(variables: Any, inputs: Array, labels: Array) -> Array:
        def loss(inputs: Array) -> Array:
            return losses.margin(apply_logits(variables, inputs), labels).sum()

        return jax.grad(loss)(inputs)

    variables = jax.tree.unflatten(treedef, leaves)
    program = gradient.lower(variables, inputs, labels).compile().memory_analysis()
    if program is None:
        return 0
    return (
        program.argument_size_in_bytes + program.output_size_in_bytes + program.temp_size_in_bytes
    )


def _available(device: Any) -> int | None:
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"] - stats.get("bytes_in_use", 0))
    names = getattr(os, "sysconf_names", {})
    if device.platform == "cpu" and {"SC_AVPHYS_PAGES", "SC_PAGE_SIZE"} <= set(names):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"
