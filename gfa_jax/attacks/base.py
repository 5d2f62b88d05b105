"""What all attacks share: per-example keys, checks, goals and gradients.

An attack sees a model only as ``logits_fn``. Gradients are those of the sum of per-example losses,
so that each example's gradient is its own, whatever the batch holds and however it is spread over
devices.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gfa_jax import norms
from gfa_jax.threat import ThreatModel
from gfa_jax.types import Array, LogitsFn, LossFn, TargetedLossFn


def example_keys(key: Array, indices: Array) -> Array:
    """Returns one key for each example, a function of the example's index alone.

    With keys made from stable indices (the position in the data set), an attack's result for an
    example does not change when the batch is permuted, split, padded or spread over devices.

    Args:
      key: a typed PRNG key.
      indices: integers ``[B]``, non-negative.

    Returns:
      Typed PRNG keys ``[B]``.
    """
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, indices)


def check_inputs(
    threat: ThreatModel, inputs: Array | np.ndarray, labels: Array | np.ndarray
) -> None:
    """Refuses what an attack cannot work on, before it is traced.

    Values are checked where they are known, outside of ``jax.jit``; shapes and dtypes always.

    Raises:
      ValueError: for inputs that are not floating point, outside the bounds or not finite, and for
        labels that are not integers of shape ``[B]``, or negative.
    """
    if not jnp.issubdtype(inputs.dtype, jnp.floating):
        raise ValueError(
            f"inputs have dtype {inputs.dtype}; attacks need floating point (data.to_float)."
        )
    if labels.shape != inputs.shape[:1] or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"labels have shape {labels.shape} and dtype {labels.dtype}; expected integers of "
            f"shape {inputs.shape[:1]}."
        )
    # In NumPy: inside jit, even operations of jax.numpy on known values are traced.
    if not isinstance(inputs, jax.core.Tracer) and inputs.size:
        values = np.asarray(inputs)
        low, high = values.min(), values.max()
        lower, upper = np.asarray(threat.bounds, values.dtype)
        if not (lower <= low and high <= upper):
            raise ValueError(f"inputs lie in [{low}, {high}], outside bounds={threat.bounds}.")
    if not isinstance(labels, jax.core.Tracer) and labels.size:
        lowest = np.asarray(labels).min()
        if lowest < 0:
            raise ValueError(f"labels hold {lowest}; classes are counted from 0.")


def check_classes(labels: Array | np.ndarray, num_classes: int, name: str = "labels") -> None:
    """Raises ValueError for known labels beyond the number of classes."""
    if not isinstance(labels, jax.core.Tracer) and labels.size:
        highest = np.asarray(labels).max()
        if highest >= num_classes:
            raise ValueError(f"{name} hold {highest}, but the logits have {num_classes} classes.")


class Goal(NamedTuple):
    """What an attack on a batch wants.

    Attributes:
      loss: ``logits [B, C] -> [B]``, to maximise.
      reached: ``logits [B, C] -> bool [B]``, whether the model is misled.
      labels: int ``[B]``.
      targets: int ``[B]``, the classes that the loss aims at; ``None`` for any wrong class.
    """

    loss: Callable[[Array], Array]
    reached: Callable[[Array], Array]
    labels: Array
    targets: Array | None


def untargeted(loss_fn: LossFn, labels: Array) -> Goal:
    """Any wrong class, by maximising ``loss_fn(logits, labels)``."""
    return Goal(
        loss=lambda logits: loss_fn(logits, labels),
        reached=lambda logits: is_misclassified(logits, labels),
        labels=labels,
        targets=None,
    )


def multi_targeted(loss_fn: TargetedLossFn, labels: Array, targets: Array) -> Goal:
    """Any wrong class, by moving towards ``targets [B]``."""
    return Goal(
        loss=lambda logits: loss_fn(logits, labels, targets),
        reached=lambda logits: is_misclassified(logits, labels),
        labels=labels,
        targets=targets,
    )


def targeted(loss_fn: TargetedLossFn, labels: Array, targets: Array) -> Goal:
    """The classes ``targets [B]`` and no others."""
    return Goal(
        loss=lambda logits: loss_fn(logits, labels, targets),
        reached=lambda logits: ~is_misclassified(logits, targets),
        labels=labels,
        targets=targets,
    )


class Evaluation(NamedTuple):
    """The model at one point of each example.

    Attributes:
      loss: float32 ``[B]``.
      reached: bool ``[B]``, whether the goal is reached.
      gradient: of the summed loss, ``[B, ...]``.
    """

    loss: Array
    reached: Array
    gradient: Array


def evaluate(logits_fn: LogitsFn, goal: Goal, inputs: Array) -> Evaluation:
    """Returns loss, success and input gradient from one forward and one backward pass.

    Gradient coordinates that are not finite are set to 0: a step along them would leave the box for
    NaN, which no model classifies correctly.
    """

    def summed_loss(inputs: Array) -> tuple[Array, tuple[Array, Array]]:
        logits = logits_fn(inputs)
        losses = goal.loss(logits)
        return jnp.sum(losses), (losses, goal.reached(logits))

    (_, (losses, reached)), gradient = jax.value_and_grad(summed_loss, has_aux=True)(inputs)
    return Evaluation(losses.astype(jnp.float32), reached, finite(gradient))


_CPU_BATCH = 256


def pull_back(
    logits_fn: LogitsFn,
    inputs: Array,
    cotangents: Callable[[Array], Array],
    *,
    num_gradients: int | None = None,
) -> tuple[Array, Array]:
    """Returns logits and several input gradients from one forward pass.

    Args:
      logits_fn: the model.
      inputs: ``[B, ...]``.
      cotangents: ``logits [B, C] -> [K, B, C]``: row ``k`` of the result is the gradient of
        ``sum(cotangents[k] * logits)``, cotangents held constant.
      num_gradients: gradients taken at once; memory grows with it. By default all ``K``, on CPU as
        many as make a batch of 256: more only leave its caches.

    Returns:
      ``(logits [B, C], gradients [K, B, ...])``; what is not finite is 0.
    """
    logits, pullback = jax.vjp(logits_fn, inputs)
    rows = jax.lax.stop_gradient(cotangents(logits)).astype(logits.dtype)
    if num_gradients is None:
        num_gradients = len(rows)
        if jax.default_backend() == "cpu":
            num_gradients = min(num_gradients, max(1, _CPU_BATCH // len(inputs)))
    gradients = jax.lax.map(lambda row: pullback(row)[0], rows, batch_size=num_gradients)
    return logits, finite(gradients)


def finite(values: Array) -> Array:
    """Returns the values with 0 for what is not finite."""
    return jnp.where(jnp.isfinite(values), values, 0)


def is_misclassified(logits: Array, labels: Array) -> Array:
    """Returns ``argmax logits != labels``, bool ``[B]``; ties go to the first class.

    Logits that hold a NaN are never right.

    Raises:
      ValueError: for known labels beyond the number of classes.
    """
    check_classes(labels, logits.shape[1])
    return (jnp.argmax(logits, axis=1) != labels) | jnp.any(jnp.isnan(logits), axis=1)


def is_zero(gradient: Array) -> Array:
    """Returns whether each example's gradient is exactly zero, bool ``[B]``."""
    return ~jnp.any(norms.flatten(gradient) != 0, axis=1)


def classes_by_rank(logits: Array) -> Array:
    """Returns the classes ``[B, C]`` from the largest logit down; ties go to the lower class."""
    return jnp.argsort(-logits, axis=1, stable=True)


def is_better(old_success: Array, old_score: Array, success: Array, score: Array) -> Array:
    """Returns whether a point replaces another: success comes first, then the larger score."""
    return (success & ~old_success) | ((success == old_success) & (score > old_score))


class Best(NamedTuple):
    """The best point so far: points that reach the goal first, then the larger loss.

    Attributes:
      adv_inputs: ``[B, ...]``.
      loss: ``[B]``, the loss at ``adv_inputs``.
      success: ``[B]``, whether ``adv_inputs`` reaches the goal.
    """

    adv_inputs: Array
    loss: Array
    success: Array

    def update(self, adv_inputs: Array, loss: Array, reached: Array) -> "Best":
        """Returns the better of this and a new point, example by example.

        A point of NaN loss never replaces another unless it reaches the goal.
        """
        better = is_better(self.success, self.loss, reached, loss)
        return Best(
            jnp.where(norms.expand(better, adv_inputs), adv_inputs, self.adv_inputs),
            jnp.where(better, loss, self.loss),
            self.success | reached,
        )
