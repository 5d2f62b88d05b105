"""3x3 convolutions with fewer products, for CPU: Winograd's minimal filtering F(2x2, 3x3).

Lavin and Gray 2015, arXiv 1509.09308, section 4.1: ``Y = A^T [(G K G^T) * (B^T D B)] A`` for every
tile ``D`` of 4x4 inputs, which overlap by two and give 2x2 outputs each. The elementwise product,
summed over channels, is sixteen matrix products of all tiles: 16 multiplications instead of 36.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from gfa_jax.types import Array

# Interpolation at 0, 1, -1 and infinity: halves and signs alone, so that rounding stays within a
# few times that of the plain sum.
_B_TRANSPOSED = ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1))
_G = ((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1))
_A_TRANSPOSED = ((1, 1, 1, 0), (0, 1, -1, -1))


def transform_kernel(kernel: Array) -> list[Array]:
    """Returns ``G K G^T``: from ``[3, 3, C, D]`` sixteen ``[C, D]``."""
    return _both_sides(_G, [kernel[row, column] for row in range(3) for column in range(3)])


def convolve(padded: Array, transformed: Sequence[Array], precision: Any) -> Array:
    """Convolves without padding of its own.

    Args:
      padded: ``[B, H + 2, W + 2, C]``, even ``H`` and ``W``, of 32 bits or more.
      transformed: of ``transform_kernel``, of the same dtype.
      precision: of the products.

    Returns:
      ``[B, H, W, D]``, of the same dtype.

    Raises:
      TypeError: for odd ``H`` or ``W``, which tiles of 2x2 outputs do not cover.
    """
    size, height, width, channels = padded.shape
    rows, columns = height // 2 - 1, width // 2 - 1
    phases = padded.reshape(size, rows + 1, 2, columns + 1, 2, channels)
    tiles = [
        phases[:, row // 2 :, row % 2, column // 2 :, column % 2][:, :rows, :columns]
        for row in range(4)
        for column in range(4)
    ]
    # One array a place and product: XLA:CPU writes and multiplies these faster than one of all.
    products = [
        jnp.matmul(tile.reshape(-1, channels), weights, precision=precision)
        for tile, weights in zip(_both_sides(_B_TRANSPOSED, tiles), transformed, strict=True)
    ]
    outputs = [
        part.reshape(size, rows, columns, -1) for part in _both_sides(_A_TRANSPOSED, products)
    ]
    lines = [jnp.stack(outputs[start : start + 2], axis=3) for start in (0, 2)]
    return jnp.stack(lines, axis=2).reshape(size, 2 * rows, 2 * columns, -1)


def _both_sides(matrix: Sequence[Sequence[float]], tile: Sequence[Array]) -> list[Array]:
    """Returns the entries of ``M T M^T``, row by row, for a tile ``T`` given in the same order."""
    return [
        _combine([left * right for left in row for right in column], tile)
        for row in matrix
        for column in matrix
    ]


def _combine(coefficients: Sequence[float], arrays: Sequence[Array]) -> Array:
    terms = [
        array if abs(coefficient) == 1 else abs(coefficient) * array
        for coefficient, array in zip(coefficients, arrays, strict=True)
        if coefficient
    ]
    signs = [coefficient > 0 for coefficient in coefficients if coefficient]
    first = terms[0] if signs[0] else -terms[0]
    rest = zip(signs[1:], terms[1:], strict=True)
    return functools.reduce(
        lambda sum_, term: sum_ + term[1] if term[0] else sum_ - term[1], rest, first
    )
