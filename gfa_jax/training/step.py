"""The compiled training and validation steps: the only place that jits a step.

Batches are split over the mesh, state lies as ``layout`` says; XLA inserts the collectives. The
same code runs on one CPU and on a pod, and a step's result does not depend on the device count
beyond float rounding.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from gfa_jax import alignment, losses, taps
from gfa_jax.attacks import example_keys
from gfa_jax.attacks.base import is_misclassified
from gfa_jax.training import layout
from gfa_jax.training.state import TrainState, average
from gfa_jax.types import (
    Array,
    AttackFn,
    Batch,
    Metrics,
    ModelState,
    Objective,
    Params,
    PyTree,
)

TrainStep = jax.stages.Wrapped
"""Jitted ``(state, batch, key) -> (state, metrics)``."""
AugmentFn = Callable[[Array, Array], Array]
"""``(key, images as stored [B, H, W, C]) -> float32 inputs in [0, 1]``."""
_GradientFn = Callable[[ModelState, Batch, Array], tuple[Params, Metrics, ModelState]]


def make_train_step(
    module: nn.Module,
    objective_at: Callable[[Array], Objective],
    tx: optax.GradientTransformation,
    *,
    layers: Sequence[str],
    augment: AugmentFn,
    mesh: Mesh,
    shardings: TrainState | None = None,
    parallelism: str = "jit",
    accumulation_steps: int = 1,
    ema_decay: float = 0.0,
) -> TrainStep:
    """Returns the jitted step ``(state, batch, key) -> (state, metrics)``; the state is donated.

    Args:
      module: linen classifier, ``(inputs, train) -> logits``.
      objective_at: the objective at a (traced) step number, so that weights and radii follow
        schedules.
      tx: the optimiser.
      layers: tap patterns of the objective; empty for an objective without taps.
      augment: turns stored images into inputs, on device.
      mesh: from ``layout.data_mesh``.
      shardings: of the state's arrays, from ``layout.of_state``; replicated by default.
      parallelism: ``jit`` (one program on global arrays) or ``pmap`` (one on each device's share of
        the batch; gradients and metrics are averaged over devices). With ``pmap`` each device draws
        from a key of its own, so that steps with random draws equal those of ``jit`` in
        distribution only; BatchNorm needs ``axis_name=layout.DATA_AXIS`` to see the whole batch.
      accumulation_steps: parts of the batch that are passed through the model one after another,
        whose gradients are averaged: memory is that of a part. Every part has examples of every
        device. BatchNorm sees the parts.
      ema_decay: of the average of weights (``state.average``); 0 for none.
    """

    def share_of_gradients(
        objective: Objective, params: Params, model_state: ModelState, batch: Batch, key: Array
    ) -> tuple[Params, Metrics, ModelState]:
        model = taps.linen_model(module, model_state, layers=layers)
        (_, aux), grads = jax.value_and_grad(functools.partial(objective, model), has_aux=True)(
            params, batch, key
        )
        return grads, aux.metrics, aux.model_state

    def train_step(
        state: TrainState, batch: Batch, key: Array, mean: Callable[[PyTree], PyTree] = lambda x: x
    ) -> tuple[TrainState, Metrics]:
        augment_key, objective_key = jax.random.split(jax.random.fold_in(key, state.step))
        inputs = augment(augment_key, batch["inputs"])
        gradient_fn: _GradientFn = functools.partial(
            share_of_gradients, objective_at(state.step), layout.gathered(state.params, mesh)
        )
        if accumulation_steps > 1:
            gradient_fn = _accumulated(gradient_fn, accumulation_steps)
        grads, metrics, model_state = mean(
            gradient_fn(
                state.model_state, {"inputs": inputs, "labels": batch["labels"]}, objective_key
            )
        )
        grads = layout.scattered(grads, mesh)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {
            **metrics,
            "grad_norm": optax.tree.norm(grads),
            "update_norm": optax.tree.norm(updates),
            "param_norm": optax.tree.norm(params),
        }
        ema = state.ema
        if ema_decay:
            ema = average(ema, (params, model_state), ema_decay, state.step)
        return TrainState(state.step + 1, params, model_state, opt_state, ema), metrics

    everywhere = layout.replicated(mesh)
    state_sharding = everywhere if shardings is None else shardings
    return jax.jit(
        _mapped(train_step, mesh) if parallelism == "pmap" else train_step,
        in_shardings=(state_sharding, layout.split(mesh), everywhere),
        out_shardings=(state_sharding, everywhere),
        donate_argnums=0,
    )


def _accumulated(gradient_fn: _GradientFn, num_parts: int) -> _GradientFn:
    """Averages gradients and metrics over parts of the batch; the model's state passes through."""

    def accumulate(
        model_state: ModelState, batch: Batch, key: Array
    ) -> tuple[Params, Metrics, ModelState]:
        # Part i is every num_parts-th example from i on: each device keeps examples of its own.
        parts = jax.tree.map(
            lambda value: value.reshape(-1, num_parts, *value.shape[1:]).swapaxes(0, 1), dict(batch)
        )
        keys = jax.random.split(key, num_parts)

        def add(
            carry: tuple[PyTree, ModelState], part: tuple[Batch, Array]
        ) -> tuple[tuple[PyTree, ModelState], None]:
            total, model_state = carry
            grads, metrics, model_state = gradient_fn(model_state, *part)
            return (jax.tree.map(jnp.add, total, (grads, metrics)), model_state), None

        shapes = jax.eval_shape(
            gradient_fn, model_state, *jax.tree.map(lambda x: x[0], (parts, keys))
        )
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes[:2])
        (total, model_state), _ = jax.lax.scan(add, (zeros, model_state), (parts, keys))
        grads, metrics = jax.tree.map(lambda value: value / num_parts, total)
        return grads, metrics, model_state

    return accumulate


def _mapped(train_step: Callable[..., tuple[TrainState, Metrics]], mesh: Mesh) -> Any:
    """Returns the step as a ``pmap`` over the devices of a mesh, on global arrays."""

    def on_device(state: TrainState, batch: Batch, key: Array) -> tuple[TrainState, Metrics]:
        own_key = jax.random.fold_in(key, jax.lax.axis_index(layout.DATA_AXIS))
        mean = functools.partial(jax.lax.pmean, axis_name=layout.DATA_AXIS)
        return train_step(state, batch, own_key, mean)

    mapped = jax.pmap(
        on_device,
        axis_name=layout.DATA_AXIS,
        in_axes=(None, 0, None),
        out_axes=None,
        devices=list(mesh.devices.flat),
    )

    def on_global_arrays(state: TrainState, batch: Batch, key: Array) -> tuple[TrainState, Metrics]:
        dealt = jax.tree.map(
            lambda value: value.reshape(mesh.size, -1, *value.shape[1:]), dict(batch)
        )
        return mapped(state, dealt, key)

    return on_global_arrays


def make_eval_step(
    module: nn.Module,
    *,
    layers: Sequence[str],
    layer_norms: dict[str, str],
    attack: AttackFn | None,
    to_float: Callable[[Array], Array],
    mesh: Mesh,
    shardings: tuple[PyTree, PyTree] | None = None,
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
      mesh: from ``layout.data_mesh``.
      shardings: of ``(params, model_state)``; replicated by default.
    """

    def eval_step(params: Params, model_state: ModelState, batch: Batch, key: Array) -> Metrics:
        model = functools.partial(
            taps.linen_model(module, model_state, layers=layers),
            layout.gathered(params, mesh),
            train=False,
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

    everywhere = layout.replicated(mesh)
    return jax.jit(
        eval_step,
        in_shardings=(*(shardings or (everywhere,) * 2), layout.split(mesh), everywhere),
        out_shardings=everywhere,
    )
