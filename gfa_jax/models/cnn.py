"""Plain convolutional classifiers, with a homogeneous form for gradient-feature alignment."""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn

from gfa_jax import _validate, norms
from gfa_jax.models import activations, convolution, layers
from gfa_jax.types import Array


class Block(nn.Module):
    """Convolution or dense layer, optional BatchNorm, activation; its output is one feature.

    Attributes:
      features: output channels.
      kernel_size: spatial kernel; empty for a dense layer.
      use_bias: whether the layer has a bias. Without bias and BatchNorm the block is positively
        homogeneous where the activation is.
      batch_norm: whether BatchNorm follows the layer.
      padding: of the convolution, ``SAME`` or ``VALID``.
      activation_fn: a key of ``activations.ACTIVATIONS``.
      initializer: a key of ``layers.INITIALIZERS``.
      dtype: of the computation; parameters stay float32.
      axis_name: of ``layers.batch_norm``.
    """

    features: int
    kernel_size: tuple[int, ...] = (3, 3)
    use_bias: bool = False
    batch_norm: bool = False
    padding: str = "SAME"
    activation_fn: str = "relu"
    initializer: str = "he"
    dtype: Any = None
    axis_name: str | None = None

    @nn.compact
    def __call__(self, inputs: Array, train: bool) -> Array:
        """Maps ``[B, H, W, C]`` to ``[B, H', W', features]``; a dense block maps the last axis."""
        kernel_init = layers.INITIALIZERS[self.initializer]
        if self.kernel_size:
            hidden = nn.Conv(
                self.features,
                self.kernel_size,
                padding=self.padding,
                use_bias=self.use_bias,
                kernel_init=kernel_init,
                dtype=self.dtype,
                conv_general_dilated=convolution.conv_general_dilated,
                name="conv",
            )(inputs)
        else:
            hidden = nn.Dense(
                self.features,
                use_bias=self.use_bias,
                kernel_init=kernel_init,
                dtype=self.dtype,
                name="dense",
            )(inputs)
        if self.batch_norm:
            hidden = layers.batch_norm(
                train=train, dtype=self.dtype, axis_name=self.axis_name, name="norm"
            )(hidden)
        return activations.ACTIVATIONS[self.activation_fn](hidden)


class CNN(nn.Module):
    """Stages of convolution blocks with pooling between them, dense blocks, and a linear head.

    Submodules, which are the names of its taps: ``normalize``, ``block_0`` ..., ``dense_0`` ...,
    ``head``.

    Attributes:
      num_classes: logits.
      stages: output channels of the convolutions of each stage; 2x2 pooling follows every stage,
        but the last one where ``global_pool`` is set.
      dense: widths of the dense blocks before the head.
      input_mean: of ``layers.Normalize``.
      input_std: of ``layers.Normalize``.
      use_bias: whether layers have biases, the head included.
      batch_norm: whether BatchNorm follows each layer.
      pooling: ``max`` or ``average``.
      global_pool: whether global average pooling follows the last stage.
      padding: ``SAME`` or ``VALID``.
      activation_fn: a key of ``activations.ACTIVATIONS``.
      initializer: ``he`` or ``orthogonal``; the head starts smaller.
      dtype: of the blocks' computation, such as ``jnp.bfloat16``; ``None`` for that of the inputs.
        Parameters, statistics, normalised inputs and logits are float32.
      remat: whether blocks are computed again in backward passes.
      axis_name: of ``layers.batch_norm``.
    """

    num_classes: int
    stages: Sequence[Sequence[int]]
    dense: Sequence[int] = ()
    input_mean: Sequence[float] = (0.0,)
    input_std: Sequence[float] = (1.0,)
    use_bias: bool = False
    batch_norm: bool = False
    pooling: str = "average"
    global_pool: bool = True
    padding: str = "SAME"
    activation_fn: str = "relu"
    initializer: str = "he"
    dtype: Any = None
    remat: bool = False
    axis_name: str | None = None

    @nn.compact
    def __call__(self, inputs: Array, *, train: bool = False) -> Array:
        """Returns logits.

        Args:
          inputs: float images ``[B, H, W, C]`` in [0, 1].
          train: whether BatchNorm uses and updates batch statistics.

        Returns:
          float32 ``[B, num_classes]``.
        """
        _validate.one_of(("average", "max"), pooling=self.pooling)
        _validate.one_of(layers.INITIALIZERS, initializer=self.initializer)
        activations.validate(self.activation_fn, homogeneous=False)
        max_pool = functools.partial(nn.max_pool, window_shape=(2, 2), strides=(2, 2))
        pool = layers.average_pool if self.pooling == "average" else max_pool
        options = {
            "use_bias": self.use_bias,
            "batch_norm": self.batch_norm,
            "activation_fn": self.activation_fn,
            "initializer": self.initializer,
            "dtype": self.dtype,
            "axis_name": self.axis_name,
        }
        block = layers.rematerialized(Block, self.remat)
        hidden = layers.Normalize(self.input_mean, self.input_std, name="normalize")(inputs)
        index = 0
        for stage, widths in enumerate(self.stages):
            for features in widths:
                hidden = block(features, padding=self.padding, name=f"block_{index}", **options)(
                    hidden, train
                )
                index += 1
            if self.global_pool and stage == len(self.stages) - 1:
                hidden = hidden.mean(axis=(1, 2))
            else:
                hidden = pool(hidden)
        hidden = hidden.reshape(hidden.shape[0], -1)
        for index, features in enumerate(self.dense):
            hidden = block(features, kernel_size=(), name=f"dense_{index}", **options)(
                hidden, train
            )
        head = nn.Dense(
            self.num_classes,
            use_bias=self.use_bias,
            kernel_init=layers.HEAD_INITIALIZER,
            name="head",
        )
        return head(norms.wide(hidden))
