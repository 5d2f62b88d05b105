"""Layers that the models share."""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from gfa_jax.types import Array

INITIALIZERS = {
    "he": nn.initializers.he_normal(),
    "orthogonal": nn.initializers.orthogonal(2**0.5),
}
"""Kernel initialisers that keep the signal's scale through ReLU; framework defaults shrink it at
every layer."""
HEAD_INITIALIZER = nn.initializers.variance_scaling(0.1, "fan_in", "truncated_normal")
"""Of the last layer: logits start small."""


class Normalize(nn.Module):
    """Maps images in [0, 1] to normalised units inside the model: attacks see raw images.

    Its output ``(inputs - mean) / std`` is the first feature: what follows is homogeneous in it,
    not in the raw image.

    Attributes:
      mean: per channel, or one value for all.
      std: per channel, or one value for all; > 0.
    """

    mean: Sequence[float]
    std: Sequence[float]

    @nn.compact
    def __call__(self, inputs: Array) -> Array:
        """Maps ``[B, H, W, C]`` to the same shape and dtype."""
        mean, std = (
            jnp.asarray(value, inputs.dtype).reshape(1, 1, 1, -1) for value in (self.mean, self.std)
        )
        return (inputs - mean) / std


def batch_norm(*, train: bool, dtype: Any, axis_name: str | None, name: str) -> nn.BatchNorm:
    """Returns BatchNorm as the models use it; its statistics are float32.

    Args:
      train: use the batch's statistics and update the running ones.
      dtype: of the output; ``None`` for that of the inputs.
      axis_name: mapped axis (of ``jax.pmap``) whose devices share the batch; ``None`` for none.
      name: of the submodule.
    """
    return nn.BatchNorm(
        use_running_average=not train,
        momentum=0.9,
        epsilon=1e-5,
        dtype=dtype,
        axis_name=axis_name,
        name=name,
    )


def rematerialized(block: type[nn.Module], remat: bool) -> type[nn.Module]:
    """Returns the block, computed again in backward passes where asked for.

    What lies inside a block is then not kept: of the double backward of feature alignment, which
    keeps the insides of a forward and of a backward pass, the block's output is left.

    Args:
      block: its ``__call__`` is ``(inputs, train)``.
      remat: whether to.
    """
    return nn.remat(block, static_argnums=(2,)) if remat else block


def average_pool(images: Array) -> Array:
    """Averages windows of 2x2 pixels, ``[B, H, W, C]`` to ``[B, H // 2, W // 2, C]``.

    An odd last row or column is dropped. It is ``nn.avg_pool(images, (2, 2), (2, 2))`` as a sum of
    four slices, which XLA:CPU computes and differentiates in about half the time.
    """
    size, height, width, channels = images.shape
    rows, columns = height // 2, width // 2
    even = images[:, : 2 * rows, : 2 * columns]
    windows = even.reshape(size, rows, 2, columns, 2, channels)
    corners = (windows[:, :, row, :, column] for row in range(2) for column in range(2))
    return functools.reduce(jnp.add, corners) / 4
