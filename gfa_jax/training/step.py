"""The compiled training and validation steps: the only place that jits a step.

Batches are sharded over the one axis of the mesh, state is replicated; XLA inserts the collectives.
The same code runs on one CPU and on a pod, and a step's result does not depend on the device count
beyond float rounding.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gfa_jax import alignment, losses, taps
from gfa_jax.attacks import example_keys
from gfa_jax.attacks.base import is_misclassified
from gfa_jax.training.state import TrainState
from gfa_jax.types import Array, AttackFn, Batch, Metrics, ModelState, Objective, Params

DATA_AXIS = "data"

TrainStep = jax.stages.Wrapped
"""Jitted ``(state, batch, key) -> (state, metrics)``."""
AugmentFn = Callable[[Array, Array], Array]
"""``(key, images as stored [B, H, W, C]) -> float32 inputs in [0, 1]``."""


def data_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """Returns a mesh of one axis, ``data``, over all (or the given) devices."""
    return jax.make_mesh(
        (len(devices or jax.devices()),),
        (DATA_AXIS,),
        devices=devices,
        axis_types=(jax.sharding.AxisType.Auto,),
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of state and keys."""
    return NamedSharding(mesh, PartitionSpec())


def split(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of batches: axis 0 over the data axis."""
    return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def make_train_step(
    module: nn.Module,
    objective_at: Callable[[Array], Objective],
    tx: optax.GradientTransformation,
    *,
    layers: Sequence[str],
    augment: AugmentFn,
    mesh: Mesh,
) -> TrainStep:
    """Returns the jitted step ``(state, batch, key) -> (state, metrics)``; the state is donated.

    Args:
      module: linen classifier, ``(inputs, train) -> logits``.
      objective_at: the objective at a (traced) step number, so that weights and radii follow
        schedules.
      tx: the optimiser.
      layers: tap patterns of the objective; empty for an objective without taps.
      augment: turns stored images into inputs, on device.
      mesh: from ``data_mesh``.
    """

    def train_step(state: TrainState, batch: Batch, key: Array) -> tuple[TrainState, Metrics]:
        augment_key, objective_key = jax.random.split(jax.random.fold_in(key, state.step))
        model = taps.linen_model(module, state.model_state, layers=layers)
        loss_fn = functools.partial(objective_at(state.step), model)
        inputs = augment(augment_key, batch["inputs"])
        (_, aux), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            state.params, {"inputs": inputs, "labels": batch["labels"]}, objective_key
        )
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {
            **aux.metrics,
            "grad_norm": optax.tree.norm(grads),
            "update_norm": optax.tree.norm(updates),
            "param_norm": optax.tree.norm(params),
        }
        return TrainState(state.step + 1, params, aux.model_state, opt_state), metrics

    return jax.jit(
        train_step,
        in_shardings=(replicated(mesh), split(mesh), replicated(mesh)),
        out_shardings=replicated(mesh),
        donate_argnums=0,
    )


def make_eval_step(
    module: nn.Module,
    *,
    layers: Sequence[str],
    layer_norms: dict[str, str],
    attack: AttackFn | None,
    to_float: Callable[[Array], Array],
    mesh: Mesh,
) -> jax.stages.Wrapped:
    """Returns the jitted ``(params, model_state, batch, key) -> masked sums over the batch``.

    The sums are ``num_examples``, ``clean_accuracy``, ``cross_entropy``, ``alignment/<tap>`` (of
    the log-odds target), and ``robust_accuracy`` where an attack is given. The batch holds
    ``inputs``, ``labels``, ``ids`` and ``mask``.

    Args:
      module: linen classifier, ``(inputs, train) -> logits``.
      layers: tap patterns whose alignment is measured.
      layer_norms: the norm of each tap that is not l2.
      attack: judges robustness; ``None`` for clean measures only.
      to_float: turns stored images into inputs, on device.
      mesh: from ``data_mesh``.
    """

    def eval_step(params: Params, model_state: ModelState, batch: Batch, key: Array) -> Metrics:
        model = functools.partial(
            taps.linen_model(module, model_state, layers=layers), params, train=False
        )
        inputs, labels, mask = to_float(batch["inputs"]), batch["labels"], batch["mask"]
        apply_fn = lambda tap_values, inputs: model(tap_values, inputs)[0]  # noqa: E731
        logits, features, grads = taps.feature_gradients(
            apply_fn, inputs, labels, target="log_odds"
        )
        per_example = {
            "num_examples": jnp.ones(labels.shape),
            "clean_accuracy": ~is_misclassified(logits, labels),
            "cross_entropy": losses.cross_entropy(logits, labels),
        }
        for name in features:
            norm = layer_norms.get(name, "l2")
            per_example[f"alignment/{name}"] = alignment.alignment(
                features[name], grads[name], norm
            )
        if attack is not None:
            result = attack(
                lambda x: apply_fn({}, x)[0], example_keys(key, batch["ids"]), inputs, labels
            )
            per_example["robust_accuracy"] = ~result.success
        return {
            name: jnp.sum(jnp.where(mask, value, 0).astype(jnp.float32))
            for name, value in per_example.items()
        }

    return jax.jit(
        eval_step,
        in_shardings=(replicated(mesh), replicated(mesh), split(mesh), replicated(mesh)),
        out_shardings=replicated(mesh),
    )
