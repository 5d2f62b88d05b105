"""The state that training carries from step to step."""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from gfa_jax.types import Array, ModelState, Params, PyTree


@flax.struct.dataclass
class TrainState:
    """Everything that a step reads and writes.

    Keys are not part of it: they are functions of the seed and the step.

    Attributes:
      step: int32 scalar, optimiser steps taken.
      params: trainable parameters.
      model_state: other variables of the model, such as ``{"batch_stats": ...}``; ``{}`` for none.
      opt_state: state of the optax chain.
      ema: the average of ``(params, model_state)`` over steps; ``None`` for none.
    """

    step: Array
    params: Params
    model_state: ModelState
    opt_state: PyTree
    ema: tuple[Params, ModelState] | None = None

    @property
    def evaluated(self) -> tuple[Params, ModelState]:
        """The parameters and model state to evaluate: their average where there is one."""
        return (self.params, self.model_state) if self.ema is None else self.ema


def create(
    module: nn.Module,
    tx: optax.GradientTransformation,
    key: Array,
    image_shape: tuple[int, ...],
    *,
    with_ema: bool = False,
) -> TrainState:
    """Initialises a model and its optimiser; traceable.

    Args:
      module: ``(inputs, train) -> logits``.
      tx: the optimiser.
      key: typed PRNG key.
      image_shape: ``(H, W, C)``.
      with_ema: whether to keep an average of the weights.
    """
    variables = dict(module.init(key, jnp.zeros((1, *image_shape)), train=False))
    params = variables.pop("params")
    # Copies: one buffer cannot be donated twice.
    ema = jax.tree.map(jnp.copy, (params, variables)) if with_ema else None
    return TrainState(jnp.zeros((), jnp.int32), params, variables, tx.init(params), ema)


def average(ema: PyTree, new: PyTree, decay: float, step: Array) -> PyTree:
    """Returns the exponential moving average after a step.

    ``ema + (1 - d)(new - ema)`` with ``d = min(decay, (1 + step) / (10 + step))``: early steps
    count little in the end, so that the average does not drag the initialisation along (as
    ``tf.train.ExponentialMovingAverage`` with ``num_updates`` does). Statistics of BatchNorm are
    averaged as the weights are; what is not floating point is the newest.

    Args:
      ema: a tree.
      new: of the same structure and dtypes.
      decay: in (0, 1).
      step: int32 scalar, counted from 0.
    """
    share = 1 - jnp.minimum(decay, (1.0 + step) / (10.0 + step))

    def move(old: Array, value: Array) -> Array:
        if not jnp.issubdtype(value.dtype, jnp.floating):
            return value
        return (old + share * (value - old)).astype(value.dtype)

    return jax.tree.map(move, ema, new)


def num_params(params: Params) -> int:
    """Returns the number of scalars in a tree of arrays or shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
