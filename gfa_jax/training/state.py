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
    """

    step: Array
    params: Params
    model_state: ModelState
    opt_state: PyTree


def create(
    module: nn.Module, tx: optax.GradientTransformation, key: Array, image_shape: tuple[int, ...]
) -> TrainState:
    """Initialises a model and its optimiser; traceable.

    Args:
      module: ``(inputs, train) -> logits``.
      tx: the optimiser.
      key: typed PRNG key.
      image_shape: ``(H, W, C)``.
    """
    variables = dict(module.init(key, jnp.zeros((1, *image_shape)), train=False))
    params = variables.pop("params")
    return TrainState(jnp.zeros((), jnp.int32), params, variables, tx.init(params))


def num_params(params: Params) -> int:
    """Returns the number of scalars in a tree of arrays or shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
