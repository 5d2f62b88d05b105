"""Cross-entropy, and cross-entropy plus a penalty: what most objectives are made of."""

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from gfa_jax import _validate, losses
from gfa_jax.types import Array, Aux, Batch, Metrics, ModelFn, ModelState, Objective, Params


def classification_metrics(logits: Array, labels: Array, loss: Array) -> Metrics:
    """Returns ``loss``, ``cross_entropy`` and ``accuracy`` of ``logits [B, C]``."""
    return {
        "loss": loss,
        "cross_entropy": jnp.mean(losses.cross_entropy(logits, labels)),
        "accuracy": jnp.mean(jnp.argmax(logits, axis=1) == labels),
    }


def cross_entropy(label_smoothing: float | Array = 0.0) -> Objective:
    """Mean cross-entropy: standard training.

    Metrics: ``loss``, ``cross_entropy`` (without smoothing) and ``accuracy``. The BatchNorm
    statistics are those of the one pass, in training mode.

    Args:
      label_smoothing: s in [0, 1]; may be traced. The target is ``1 - s`` at the label plus
        ``s / C`` at each of the C classes (Szegedy et al. 2016, arXiv 1512.00567, section 7).

    Raises:
      ValueError: for smoothing outside [0, 1].
    """
    _validate.fraction(label_smoothing=label_smoothing)
    smooths = not is_known(label_smoothing, 0)

    def objective(model: ModelFn, params: Params, batch: Batch, key: Array) -> tuple[Array, Aux]:
        del key
        (logits, _), model_state = model(params, {}, batch["inputs"], train=True)
        loss = jnp.mean(losses.cross_entropy(logits, batch["labels"]))
        if smooths:
            log_probs = jax.nn.log_softmax(wide(logits))
            loss = (1 - label_smoothing) * loss - label_smoothing * jnp.mean(log_probs)
        return loss, Aux(classification_metrics(logits, batch["labels"], loss), model_state)

    return objective


class Penalty(NamedTuple):
    """What a penalty found, beside the logits of the pass that it needed anyway.

    Attributes:
      value: scalar, the mean over the batch.
      metrics: scalars of its own.
      logits: ``[B, C]``, at the batch's inputs in training mode.
      model_state: after that pass.
    """

    value: Array
    metrics: Metrics
    logits: Array
    model_state: ModelState


class PenaltyFn(Protocol):
    """A penalty on the model; it is differentiated with respect to ``params``."""

    def __call__(self, model: ModelFn, params: Params, batch: Batch, key: Array) -> Penalty:
        """Returns the penalty of the batch."""
        ...


def regularized(
    penalty_fn: PenaltyFn, weight: float | Array, cross_entropy_weight: float | Array, *, name: str
) -> Objective:
    """Returns ``cross_entropy_weight * mean CE + weight * penalty``.

    Args:
      penalty_fn: the penalty; its forward pass serves the cross-entropy, too.
      weight: >= 0; may be traced. A Python 0 beside a whole cross-entropy gives exactly
        ``cross_entropy()``.
      cross_entropy_weight: >= 0; may be traced.
      name: the metrics are ``<name>_penalty`` and ``<name>_weight`` beside those of
        ``cross_entropy()``.

    Raises:
      ValueError: for a negative weight.
    """
    _validate.non_negative(weight=weight, cross_entropy_weight=cross_entropy_weight)
    if is_known(weight, 0) and is_known(cross_entropy_weight, 1):
        return cross_entropy()

    def objective(model: ModelFn, params: Params, batch: Batch, key: Array) -> tuple[Array, Aux]:
        value, metrics, logits, model_state = penalty_fn(model, params, batch, key)
        ce = jnp.mean(losses.cross_entropy(logits, batch["labels"]))
        loss = cross_entropy_weight * ce + weight * value
        metrics = {
            **classification_metrics(logits, batch["labels"], loss),
            **metrics,
            f"{name}_penalty": value,
            f"{name}_weight": jnp.asarray(weight, jnp.float32),
        }
        return loss, Aux(metrics, model_state)

    return objective


def wide(values: Array) -> Array:
    """Returns the values in float32 or wider, in which all reductions are taken."""
    return values.astype(jnp.promote_types(values.dtype, jnp.float32))


def is_known(value: float | Array, number: float) -> bool:
    """Returns whether a weight is a Python number, not traced, and this one."""
    return isinstance(value, int | float) and value == number
