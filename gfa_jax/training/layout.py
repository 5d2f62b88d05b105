"""Where arrays lie: the mesh of all devices, and the shardings of batches and state.

The mesh has two axes. Batches are split over both. State is replicated over ``data`` and, where
``fsdp`` has more than one device, its large arrays are split over that axis (fully sharded data
parallelism): XLA gathers parameters where they are used and scatters their gradients.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gfa_jax.types import PyTree

DATA_AXIS = "data"
FSDP_AXIS = "fsdp"

MIN_SPLIT_SIZE = 2**12
"""Arrays of fewer scalars stay whole on every device: gathering them would cost more than the
memory they take."""


def data_mesh(devices: Sequence[Any] | None = None, *, fsdp: int = 1) -> Mesh:
    """Returns the mesh over all (or the given) devices.

    Args:
      devices: of all processes; ``jax.devices()`` by default.
      fsdp: devices over which state is split, a divisor of their number. Neighbours in the mesh, so
        that they lie within a host where they fit.

    Raises:
      ValueError: where ``fsdp`` does not divide the devices.
    """
    num_devices = len(devices or jax.devices())
    if fsdp < 1 or num_devices % fsdp:
        raise ValueError(f"fsdp={fsdp} must divide the number of devices, {num_devices}.")
    return jax.make_mesh(
        (num_devices // fsdp, fsdp),
        (DATA_AXIS, FSDP_AXIS),
        devices=devices,
        axis_types=(jax.sharding.AxisType.Auto,) * 2,
    )


def local_mesh() -> Mesh:
    """Returns the mesh over this process's own devices, for work that needs no other's."""
    return data_mesh(jax.local_devices())


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of keys, metrics and whole state."""
    return NamedSharding(mesh, PartitionSpec())


def split(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of batches: axis 0 over all devices."""
    return NamedSharding(mesh, PartitionSpec((DATA_AXIS, FSDP_AXIS)))


def everywhere(function: Callable[[], PyTree], mesh: Mesh) -> PyTree:
    """Computes arrays, such as keys, on every device: they cannot be sent to those of others."""
    return jax.jit(function, out_shardings=replicated(mesh))()


def of_state(mesh: Mesh, shapes: PyTree) -> PyTree:
    """Returns the sharding of each array of a state, by its shape alone.

    An array of at least ``MIN_SPLIT_SIZE`` scalars is split along its longest axis that the fsdp
    axis divides (the last of equals, which are channels); all others are whole. So an optimiser's
    moments lie as their parameters do.

    Args:
      mesh: from ``data_mesh``.
      shapes: a tree of arrays or shapes.
    """
    return jax.tree.map(lambda leaf: NamedSharding(mesh, _spec(mesh, leaf.shape)), shapes)


def gathered(state: PyTree, mesh: Mesh) -> PyTree:
    """Returns state as whole arrays on every device, inside a jitted function.

    Said before parameters are used: left to itself, XLA would rather split the layers' outputs as
    their kernels are, and send activations.
    """
    if mesh.shape[FSDP_AXIS] == 1:
        return state
    return jax.lax.with_sharding_constraint(state, replicated(mesh))


def scattered(state: PyTree, mesh: Mesh) -> PyTree:
    """Returns state, or gradients, as ``of_state`` lays it out, inside a jitted function."""
    if mesh.shape[FSDP_AXIS] == 1:
        return state
    return jax.lax.with_sharding_constraint(state, of_state(mesh, state))


def _spec(mesh: Mesh, shape: tuple[int, ...]) -> PartitionSpec:
    parts = mesh.shape[FSDP_AXIS]
    if parts == 1 or math.prod(shape) < MIN_SPLIT_SIZE:
        return PartitionSpec()
    axes = [axis for axis, size in enumerate(shape) if size % parts == 0]
    if not axes:
        return PartitionSpec()
    longest = max(axes, key=lambda axis: (shape[axis], axis))
    return PartitionSpec(*(FSDP_AXIS if axis == longest else None for axis in range(longest + 1)))
