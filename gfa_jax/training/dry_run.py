"""What a training would cost: the step compiled ahead of time, without data and without a run."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gfa_jax import config as config_lib
from gfa_jax import data
from gfa_jax.config import TrainConfig
from gfa_jax.training import collectives, flops, layout, recipe, state
from gfa_jax.training.devices import DEVICES

UTILISATION = 0.4
"""The share of a device's peak that an expected step time supposes; convolutions of small images
reach less, large matrix products more."""


def plan(config: TrainConfig) -> dict[str, Any]:
    """Compiles the training step and returns what it needs.

    Data is described by its metadata alone, and nothing is written. The step is compiled for this
    process's devices, its batch split over them: memory and collectives are those of this program,
    which compilers of other devices make differently.

    Returns:
      ``parameters`` and ``parameter_bytes``; ``flops`` of a step over the global batch, matrix
      products and convolutions, loops as often as they run; ``forward_flops`` of the model on that
      batch; ``memory_bytes`` of a device at the step's peak; ``collectives``: ``{kind: {num_times,
      num_bytes}}`` of one device and step, and ``transfers``, the same by groups of devices (the
      fields of ``collectives.Transfer``); ``devices``, their number; ``expected_seconds`` of a step
      on as many of each of ``DEVICES``.

    Raises:
      ValueError: for a bad config, or data that does not fit.
    """
    traced = _trace(config)
    num_devices, template, built = jax.device_count(), traced.template, traced.recipe
    with jax.default_matmul_precision(config.precision):
        operations = flops.count(traced.step, *traced.arguments)
        compiled = traced.step.lower(*traced.arguments).compile()
    memory, program = compiled.memory_analysis(), compiled.as_text()
    if memory is None or program is None:
        raise ValueError(f"{jax.default_backend()} devices do not tell what a program needs.")
    transfers = collectives.transfers(program, num_devices)
    variables = {"params": template.params, **template.model_state}
    forward = functools.partial(built.module.apply, train=False)
    leaves = jax.tree.leaves(template.params)
    expected = {}
    for name, device in DEVICES.items():
        peak = device.peak_of(config.precision, config.model.dtype)
        products = operations / num_devices / (UTILISATION * peak)
        expected[name] = products + sum(device.seconds(transfers))
    return {
        "parameters": state.num_params(template.params),
        "parameter_bytes": sum(leaf.size * np.dtype(leaf.dtype).itemsize for leaf in leaves),
        "flops": operations,
        "forward_flops": flops.count(
            forward, variables, jax.ShapeDtypeStruct(traced.images, jnp.float32)
        ),
        "devices": num_devices,
        "memory_bytes": peak_bytes(memory),
        "collectives": {kind: one._asdict() for kind, one in collectives.count(program).items()},
        "transfers": [one._asdict() for one in transfers],
        "expected_seconds": expected,
    }


class _Traced(NamedTuple):
    """A training step and the shapes of its arguments."""

    recipe: recipe.Recipe
    step: Any
    template: state.TrainState
    images: tuple[int, ...]
    arguments: tuple[Any, ...]


def _trace(config: TrainConfig) -> _Traced:
    """Returns the step of a recipe; data is described by its metadata alone."""
    config_lib.validate(config, num_devices=jax.device_count(), num_processes=jax.process_count())
    described = data.describe(config.data.name, data_dir=config.data.data_dir)
    built = recipe.build(
        config, num_classes=described.num_classes, image_shape=described.image_shape
    )
    mesh = layout.data_mesh(fsdp=config.fsdp)
    split = layout.split(mesh)
    train_step, template = built.train_step(mesh), built.template(mesh)
    images = (config.batch_size, *described.image_shape)
    batch = {
        "inputs": jax.ShapeDtypeStruct(images, described.dtype, sharding=split),
        "labels": jax.ShapeDtypeStruct(images[:1], jnp.int32, sharding=split),
    }
    key = layout.everywhere(lambda: jax.random.key(0), mesh)
    return _Traced(built, train_step, template, images, (template, batch, key))


def step_flops(config: TrainConfig) -> int:
    """Returns ``flops`` of ``plan`` without compiling anything.

    Raises:
      ValueError: as ``plan``.
    """
    traced = _trace(config)
    return flops.count(traced.step, *traced.arguments)


def peak_bytes(memory: Any) -> int:
    """Returns the bytes that a program takes at its peak, from ``compiled.memory_analysis()``."""
    total: int = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )
    return total


def text(config: TrainConfig, found: Mapping[str, Any]) -> str:
    """Returns a plan as lines to print."""
    lines = [
        f"{config.model.name}: {found['parameters']:,} parameters, "
        f"{found['parameter_bytes'] / 1e6:.1f} MB",
        f"a step on {config.batch_size} images: {found['flops'] / 1e9:,.1f} GFLOPs, "
        f"{config.train_steps:,} steps: {found['flops'] * config.train_steps / 1e15:,.2f} PFLOPs",
        f"memory at the peak of a step: {found['memory_bytes'] / 1e6:,.1f} MB on each of "
        f"{found['devices']} devices ({jax.devices()[0].device_kind})",
    ]
    for kind, one in found["collectives"].items():
        lines.append(
            f"{kind}: {one['num_times']} in a step, {one['num_bytes'] / 1e6:,.2f} MB on each device"
        )
    if not found["collectives"]:
        lines.append("no collectives in a step")
    lines.append(
        f"expected at {UTILISATION:.0%} of the peak in precision {config.precision!r}, dtype "
        f"{config.model.dtype!r}, then collectives (docs/scaling.md):"
    )
    for name, seconds in found["expected_seconds"].items():
        fits = found["memory_bytes"] <= DEVICES[name].memory
        lines.append(
            f"  {found['devices']} x {name}: {1e3 * seconds:.3g} ms a step, "
            f"{config.batch_size / seconds:,.0f} images/s, "
            f"{seconds * config.train_steps / 60:,.1f} min in all"
            + ("" if fits else "; DOES NOT FIT its memory")
        )
    return "\n".join(lines)
