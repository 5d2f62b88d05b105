"""Activation functions by name, and which of them keep a network homogeneous."""

import math
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp

from gfa_jax import _validate, norms
from gfa_jax.types import Array


def scaled_silu(inputs: Array) -> Array:
    """Returns ``s silu(x / s)``, with the root mean square ``s`` of each example's values.

    SiLU itself has no degree: it is linear far from 0 and bends at a fixed distance. Bending at a
    distance that grows with the example makes it positively homogeneous of degree 1, as ReLU is,
    and smooth everywhere but at an example of zeros. The root mean square is part of the function:
    Euler's theorem, by which alignment is a radius, holds with its derivative alone.

    Source: SiLU, Hendrycks & Gimpel 2016, arXiv 1606.08415; the scale is this project's.

    Args:
      inputs: ``[B, ...]``.

    Returns:
      ``[B, ...]`` in their dtype; zeros for zeros.
    """
    values = norms.wide(inputs)
    scale = norms.vector_norm(values, "l2") / math.prod(inputs.shape[1:]) ** 0.5
    scale = norms.expand(jnp.where(scale > 0, scale, 1), values)
    return (scale * nn.silu(values / scale)).astype(inputs.dtype)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": nn.relu,
    "leaky_relu": nn.leaky_relu,
    "gelu": nn.gelu,
    "silu": nn.silu,
    "scaled_silu": scaled_silu,
}
"""What follows a convolution or dense layer. ReLUs are linear piece by piece, with no second
derivative to speak of; the others are smooth."""
HOMOGENEOUS = ("relu", "leaky_relu", "scaled_silu")
"""Those of degree 1."""


def validate(activation_fn: str, *, homogeneous: bool) -> None:
    """Checks the name of an activation function.

    Args:
      activation_fn: a key of ``ACTIVATIONS``.
      homogeneous: whether the network is to be homogeneous.

    Raises:
      ValueError: for an unknown name, or one whose function is not of degree 1 and should be.
    """
    _validate.one_of(ACTIVATIONS, activation_fn=activation_fn)
    if homogeneous and activation_fn not in HOMOGENEOUS:
        raise ValueError(
            f"activation_fn={activation_fn!r} is not homogeneous: pass homogeneous=False, or one "
            f"of {HOMOGENEOUS}."
        )
