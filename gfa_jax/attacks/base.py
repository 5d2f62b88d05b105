"""What all attacks share: per-example keys, gradients, and the bookkeeping of the best point.

An attack sees a model only as ``logits_fn``. Gradients are those of the sum of per-example losses,
so that each example's gradient is its own, whatever the batch holds and however it is spread over
devices.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gfa_jax import norms
from gfa_jax.threat import ThreatModel
from gfa_jax.types import Array, AttackResult, LogitsFn, LossFn


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


def check_inputs(threat: ThreatModel, inputs: Array, labels: Array) -> None:
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


class Evaluation(NamedTuple):
    """The model at one point of each example.

    Attributes:
      loss: float32 ``[B]``.
      misclassified: bool ``[B]``.
      gradient: of the summed loss, ``[B, ...]``.
    """

    loss: Array
    misclassified: Array
    gradient: Array


def evaluate(logits_fn: LogitsFn, loss_fn: LossFn, inputs: Array, labels: Array) -> Evaluation:
    """Returns loss, correctness and input gradient from one forward and one backward pass.

    Gradient coordinates that are not finite are set to 0: a step along them would leave the box for
    NaN, which no model classifies correctly.
    """

    def summed_loss(inputs: Array) -> tuple[Array, tuple[Array, Array]]:
        logits = logits_fn(inputs)
        losses = loss_fn(logits, labels)
        return jnp.sum(losses), (losses, is_misclassified(logits, labels))

    (_, (losses, wrong)), gradient = jax.value_and_grad(summed_loss, has_aux=True)(inputs)
    finite = jnp.where(jnp.isfinite(gradient), gradient, 0)
    return Evaluation(losses.astype(jnp.float32), wrong, finite)


def evaluate_forward(
    logits_fn: LogitsFn, loss_fn: LossFn, inputs: Array, labels: Array
) -> tuple[Array, Array]:
    """Returns loss ``[B]`` and misclassification ``[B]`` from one forward pass."""
    logits = logits_fn(inputs)
    return loss_fn(logits, labels).astype(jnp.float32), is_misclassified(logits, labels)


def is_misclassified(logits: Array, labels: Array) -> Array:
    """Returns ``argmax logits != labels``, bool ``[B]``; ties go to the first class.

    Logits that hold a NaN are never right.

    Raises:
      ValueError: for known labels beyond the number of classes.
    """
    if not isinstance(labels, jax.core.Tracer) and labels.size:
        highest = np.asarray(labels).max()
        if highest >= logits.shape[1]:
            raise ValueError(
                f"labels hold {highest}, but the logits have {logits.shape[1]} classes."
            )
    return (jnp.argmax(logits, axis=1) != labels) | jnp.any(jnp.isnan(logits), axis=1)


def is_zero(gradient: Array) -> Array:
    """Returns whether each example's gradient is exactly zero, bool ``[B]``."""
    return ~jnp.any(norms.flatten(gradient) != 0, axis=1)


class Best(NamedTuple):
    """The best point so far: misclassified points first, then the larger loss.

    Attributes:
      adv_inputs: ``[B, ...]``.
      loss: ``[B]``, the loss at ``adv_inputs``.
      success: ``[B]``, whether ``adv_inputs`` is misclassified.
    """

    adv_inputs: Array
    loss: Array
    success: Array

    def update(self, adv_inputs: Array, loss: Array, misclassified: Array) -> "Best":
        """Returns the better of this and a new point, example by example.

        A point of NaN loss never replaces another unless it misleads the model.
        """
        first_success = misclassified & ~self.success
        better = first_success | ((misclassified == self.success) & (loss > self.loss))
        return Best(
            jnp.where(norms.expand(better, adv_inputs), adv_inputs, self.adv_inputs),
            jnp.where(better, loss, self.loss),
            self.success | misclassified,
        )


def finish(
    threat: ThreatModel,
    inputs: Array,
    best: Best,
    *,
    num_forwards: int,
    num_backwards: int,
    num_zero_gradients: Array,
) -> AttackResult:
    """Returns the result of an attack that keeps the best point.

    Where it failed, that is the clean input, at distance 0.
    """
    adv_inputs = jnp.where(norms.expand(best.success, inputs), best.adv_inputs, inputs)
    count = jnp.ones(inputs.shape[0], jnp.int32)
    result = AttackResult(
        adv_inputs=adv_inputs,
        success=best.success,
        distance=threat.distance(inputs, adv_inputs).astype(jnp.float32),
        loss=best.loss,
        num_forwards=num_forwards * count,
        num_backwards=num_backwards * count,
        num_zero_gradients=num_zero_gradients,
    )
    return jax.lax.stop_gradient(result)
