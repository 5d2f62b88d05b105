"""Vision transformers for small images.

They are those of Dosovitskiy et al. (arXiv 2010.11929) in the plain form of Beyer et al. (arXiv
2205.01580), which pools by the mean. They have no homogeneous form: LayerNorm divides by the scale
of what it sees, and softmax is not homogeneous.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from gfa_jax import _validate, norms
from gfa_jax.models import layers
from gfa_jax.types import Array

POOLINGS = ("mean", "token")
POSITIONS = ("learned", "sincos2d")

_KERNEL_INITIALIZER = nn.initializers.xavier_uniform()


def sincos_positions(height: int, width: int, features: int) -> np.ndarray:
    """Fixed embeddings of the places in a grid, as in MoCo v3 (Chen et al., arXiv 2104.02057).

    Args:
      height: rows of patches.
      width: columns of patches.
      features: a multiple of 4, at least 8: sine and cosine of either coordinate at
        ``features / 4`` frequencies from 1 to 1/10,000.

    Returns:
      float32 ``[height * width, features]``, row by row.

    Raises:
      ValueError: for other numbers of features.
    """
    if features % 4 or features < 8:
        raise ValueError(f"features={features} must be a multiple of 4, at least 8, for sincos2d.")
    frequencies = 10_000.0 ** -np.linspace(0, 1, features // 4)
    rows, columns = (place.reshape(-1, 1) * frequencies for place in np.mgrid[:height, :width])
    waves = (np.sin(columns), np.cos(columns), np.sin(rows), np.cos(rows))
    return np.concatenate(waves, axis=1).astype(np.float32)


class Block(nn.Module):
    """Attention and a two-layer perceptron, each of them after LayerNorm and beside a shortcut.

    Attributes:
      num_heads: of the attention; divides the features.
      hidden: width of the perceptron.
      dtype: of the computation; parameters stay float32.
    """

    num_heads: int
    hidden: int
    dtype: Any = None

    @nn.compact
    def __call__(self, inputs: Array, train: bool) -> Array:
        """Maps tokens ``[B, N, D]`` to the same shape; ``train`` makes no difference."""
        del train
        options: dict[str, Any] = {"kernel_init": _KERNEL_INITIALIZER, "dtype": self.dtype}
        attended = nn.LayerNorm(dtype=self.dtype, name="norm_0")(inputs)
        attended = nn.MultiHeadDotProductAttention(
            self.num_heads,
            deterministic=True,
            # Of wider types it would narrow them.
            force_fp32_for_softmax=attended.dtype.itemsize < 4,
            name="attention",
            **options,
        )(attended)
        tokens = inputs + attended
        mixed = nn.LayerNorm(dtype=self.dtype, name="norm_1")(tokens)
        mixed = nn.gelu(nn.Dense(self.hidden, name="dense_0", **options)(mixed))
        mixed = nn.Dense(inputs.shape[-1], name="dense_1", **options)(mixed)
        return tokens + mixed


class ViT(nn.Module):
    """Patches as tokens, blocks of attention, LayerNorm, pooling, and a linear head.

    Submodules, which are the names of its taps: ``normalize``, ``embedding``, ``block_0`` ...,
    ``norm``, ``head``. The logits are affine in the output of ``norm`` and, by its division, have
    degree 0 in that of the last block.

    Attributes:
      num_classes: logits.
      features: width of the tokens.
      depth: blocks.
      num_heads: of the attention; divides ``features``.
      hidden: width of the perceptrons.
      patch_size: height and width of a patch; divides those of the images.
      positions: ``learned`` embeddings, which tie the model to one image size, or ``sincos2d``.
      pooling: the ``mean`` of the tokens, or a class ``token`` of its own.
      input_mean: of ``layers.Normalize``.
      input_std: of ``layers.Normalize``.
      dtype: of the computation up to the pooling, such as ``jnp.bfloat16``; ``None`` for that of
        the inputs. Parameters, statistics, softmax, normalised inputs and logits are float32.
      remat: whether blocks are computed again in backward passes.
    """

    num_classes: int
    features: int
    depth: int
    num_heads: int
    hidden: int
    patch_size: int = 4
    positions: str = "learned"
    pooling: str = "mean"
    input_mean: Sequence[float] = (0.0,)
    input_std: Sequence[float] = (1.0,)
    dtype: Any = None
    remat: bool = False

    @nn.compact
    def __call__(self, inputs: Array, *, train: bool = False) -> Array:
        """Returns logits.

        Args:
          inputs: float images ``[B, H, W, C]`` in [0, 1].
          train: makes no difference; here as for the other models.

        Returns:
          float32 ``[B, num_classes]``.

        Raises:
          ValueError: for an unknown option, heads that do not divide the features, or images that
            are not whole patches.
        """
        _validate.one_of(POSITIONS, positions=self.positions)
        _validate.one_of(POOLINGS, pooling=self.pooling)
        _validate.positive_integer(depth=self.depth, num_heads=self.num_heads)
        size, height, width, channels = inputs.shape
        patch = self.patch_size
        if height % patch or width % patch:
            raise ValueError(
                f"images of {height}x{width} are not whole patches of {patch}x{patch}."
            )
        if self.features % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} must divide features={self.features}.")
        rows, columns = height // patch, width // patch

        images = layers.Normalize(self.input_mean, self.input_std, name="normalize")(inputs)
        # A convolution with the patches as strides, written as the matrix product that it is.
        tokens = images.reshape(size, rows, patch, columns, patch, channels)
        tokens = tokens.swapaxes(2, 3).reshape(size, rows * columns, patch * patch * channels)
        tokens = nn.Dense(
            self.features, kernel_init=_KERNEL_INITIALIZER, dtype=self.dtype, name="embedding"
        )(tokens)
        tokens = tokens + self._positions(rows, columns).astype(tokens.dtype)
        if self.pooling == "token":
            token = self.param("token", nn.initializers.zeros, (1, 1, self.features))
            token = jnp.broadcast_to(token.astype(tokens.dtype), (size, 1, self.features))
            tokens = jnp.concatenate([token, tokens], axis=1)
        block = layers.rematerialized(Block, self.remat)
        for index in range(self.depth):
            tokens = block(self.num_heads, self.hidden, self.dtype, name=f"block_{index}")(
                tokens, train
            )
        tokens = nn.LayerNorm(dtype=self.dtype, name="norm")(tokens)
        pooled = tokens[:, 0] if self.pooling == "token" else tokens.mean(axis=1)
        head = nn.Dense(self.num_classes, kernel_init=layers.HEAD_INITIALIZER, name="head")
        return head(norms.wide(pooled))

    def _positions(self, rows: int, columns: int) -> Array:
        """Returns the embeddings of the patches' places, ``[1, N, D]``."""
        if self.positions == "sincos2d":
            return jnp.asarray(sincos_positions(rows, columns, self.features))[None]
        initializer = nn.initializers.normal(self.features**-0.5)
        embeddings: Array = self.param("positions", initializer, (1, rows * columns, self.features))
        return embeddings
