"""Pre-activation residual networks for small images, with a homogeneous form.

PreAct ResNet-18 (He et al., arXiv 1603.05027) and WideResNets (Zagoruyko and Komodakis, arXiv
1605.07146) are one network of different widths and depths: a 3x3 convolution, stages of residual
blocks that halve the image from the second stage on, BatchNorm, ReLU, and the mean over the image.
"""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn

from gfa_jax import _validate, norms
from gfa_jax.models import activations, convolution, layers
from gfa_jax.types import Array


def _convolution(
    features: int, size: int, *, strides: int, initializer: str, dtype: Any, name: str
) -> nn.Conv:
    return nn.Conv(
        features,
        (size, size),
        strides=strides,
        # As much on either side, as in PyTorch; SAME pads only one side where strides are 2.
        padding=size // 2,
        use_bias=False,
        kernel_init=layers.INITIALIZERS[initializer],
        dtype=dtype,
        conv_general_dilated=convolution.conv_general_dilated,
        name=name,
    )


class Activation(nn.Module):
    """BatchNorm, where the network has it, and the activation function.

    Attributes:
      batch_norm: whether BatchNorm comes first.
      activation_fn: a key of ``activations.ACTIVATIONS``.
      dtype: of the computation.
      axis_name: of ``layers.batch_norm``.
    """

    batch_norm: bool
    activation_fn: str = "relu"
    dtype: Any = None
    axis_name: str | None = None

    @nn.compact
    def __call__(self, inputs: Array, train: bool) -> Array:
        """Maps ``[B, H, W, C]`` to the same shape."""
        hidden = inputs
        if self.batch_norm:
            hidden = layers.batch_norm(
                train=train, dtype=self.dtype, axis_name=self.axis_name, name="norm"
            )(hidden)
        return activations.ACTIVATIONS[self.activation_fn](hidden)


class Block(nn.Module):
    """A residual block: the shortcut plus two convolutions, each of them after an activation.

    Submodules: ``activation_0``, ``shortcut`` where the shape changes, ``conv_0``,
    ``activation_1``, ``conv_1``.

    Attributes:
      features: output channels.
      strides: of the first convolution and the shortcut.
      batch_norm: whether activations have BatchNorm.
      branch_scale: factor on the convolutions' output before it is added.
      activation_fn: a key of ``activations.ACTIVATIONS``.
      initializer: a key of ``layers.INITIALIZERS``.
      dtype: of the computation; parameters stay float32.
      axis_name: of ``layers.batch_norm``.
    """

    features: int
    strides: int = 1
    batch_norm: bool = True
    branch_scale: float = 1.0
    activation_fn: str = "relu"
    initializer: str = "he"
    dtype: Any = None
    axis_name: str | None = None

    @nn.compact
    def __call__(self, inputs: Array, train: bool) -> Array:
        """Maps ``[B, H, W, C]`` to ``[B, H', W', features]`` with ``H' = ceil(H / strides)``."""
        options: dict[str, Any] = {"initializer": self.initializer, "dtype": self.dtype}
        activation = functools.partial(
            Activation, self.batch_norm, self.activation_fn, self.dtype, self.axis_name
        )
        hidden = activation(name="activation_0")(inputs, train)
        shortcut = inputs
        if self.strides != 1 or inputs.shape[-1] != self.features:
            # Of what the branch sees, as in both papers' code, and not of the raw input.
            shortcut = _convolution(
                self.features, 1, strides=self.strides, name="shortcut", **options
            )(hidden)
        hidden = _convolution(self.features, 3, strides=self.strides, name="conv_0", **options)(
            hidden
        )
        hidden = activation(name="activation_1")(hidden, train)
        hidden = _convolution(self.features, 3, strides=1, name="conv_1", **options)(hidden)
        return shortcut + self.branch_scale * hidden


class ResNet(nn.Module):
    """A pre-activation residual network.

    Submodules, which are the names of its taps: ``normalize``, ``stem``, ``block_0`` ...,
    ``activation``, ``head``. The output of a block is the whole state of the network there, so in
    the homogeneous form the logits have degree 1 in it. What lies beside a shortcut inside a block
    is only a part: logits have degree below 1 in it as a rule.

    The homogeneous form has neither BatchNorm nor biases. Without BatchNorm each block would double
    the variance of its input, so branches are scaled by ``num_blocks ** -0.5``: with He
    initialisation the expected variance grows by ``1 + 1 / num_blocks`` a block, by less than e in
    all.
    This is the uniform scaling of Stable ResNet (Hayou et al., arXiv 2010.12859) and, for branches
    of two convolutions, the factor of Fixup (Zhang et al., arXiv 1901.09321), without Fixup's
    biases, which would break homogeneity, and without its zeros, which would leave branches without
    gradient.

    Attributes:
      num_classes: logits.
      stem: output channels of the first convolution.
      stages: output channels of the blocks of each stage; the first block of every stage but the
        first halves height and width.
      input_mean: of ``layers.Normalize``.
      input_std: of ``layers.Normalize``.
      homogeneous: whether it is the homogeneous form.
      activation_fn: a key of ``activations.ACTIVATIONS``, in the homogeneous form one of degree 1.
      initializer: ``he`` or ``orthogonal``; the head starts smaller.
      dtype: of the computation up to the mean over the image, such as ``jnp.bfloat16``; ``None``
        for that of the inputs. Parameters, statistics, normalised inputs and logits are float32.
      remat: whether blocks are computed again in backward passes.
      axis_name: of ``layers.batch_norm``.
    """

    num_classes: int
    stem: int
    stages: Sequence[Sequence[int]]
    input_mean: Sequence[float] = (0.0,)
    input_std: Sequence[float] = (1.0,)
    homogeneous: bool = False
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

        Raises:
          ValueError: for an unknown initialiser, an activation function that does not fit, or
            stages without blocks.
        """
        _validate.one_of(layers.INITIALIZERS, initializer=self.initializer)
        activations.validate(self.activation_fn, homogeneous=self.homogeneous)
        if not self.stages or not all(self.stages):
            raise ValueError(f"stages={self.stages} must have at least one block in every stage.")
        options: dict[str, Any] = {"initializer": self.initializer, "dtype": self.dtype}
        batch_norm = not self.homogeneous
        block = layers.rematerialized(Block, self.remat)
        num_blocks = sum(len(stage) for stage in self.stages)
        branch_scale = num_blocks**-0.5 if self.homogeneous else 1.0

        hidden = layers.Normalize(self.input_mean, self.input_std, name="normalize")(inputs)
        hidden = _convolution(self.stem, 3, strides=1, name="stem", **options)(hidden)
        index = 0
        for stage, widths in enumerate(self.stages):
            for position, features in enumerate(widths):
                hidden = block(
                    features,
                    strides=2 if stage > 0 and position == 0 else 1,
                    batch_norm=batch_norm,
                    branch_scale=branch_scale,
                    activation_fn=self.activation_fn,
                    axis_name=self.axis_name,
                    name=f"block_{index}",
                    **options,
                )(hidden, train)
                index += 1
        hidden = Activation(
            batch_norm, self.activation_fn, self.dtype, self.axis_name, name="activation"
        )(hidden, train)
        hidden = hidden.mean(axis=(1, 2))
        head = nn.Dense(
            self.num_classes,
            use_bias=not self.homogeneous,
            kernel_init=layers.HEAD_INITIALIZER,
            name="head",
        )
        return head(norms.wide(hidden))
