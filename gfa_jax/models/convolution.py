"""The convolution of all models: that of ``lax``, with derivatives that are fast on CPU."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from gfa_jax import norms
from gfa_jax.models import winograd
from gfa_jax.types import Array

_NHWC = ("NHWC", "HWIO", "NHWC")
FLAX_NHWC = lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
"""What ``nn.Conv`` passes for channels-last images."""


def conv_general_dilated(
    lhs: Array,
    rhs: Array,
    window_strides: Sequence[int],
    padding: Any,
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    precision: Any = None,
    **kwargs: Any,
) -> Array:
    """``lax.conv_general_dilated`` with derivatives that are fast on CPU, for ``nn.Conv``.

    It is given as ``nn.Conv(conv_general_dilated=...)``. XLA:CPU runs the transposed convolutions
    of a backward pass naively inside a while loop (jax issue 12868), and naively everywhere weight
    gradients, which it sees as convolutions with image-sized kernels, and second derivatives of
    strided convolutions. On CPU this writes the input gradient of a stride-1 convolution as an
    ordinary convolution with the flipped kernel, the weight gradient as matrix products over groups
    of examples that fit the cache, convolutions of images or their gradients, up to three channels,
    in forms of their own, those of 32 channels or more by Winograd's minimal filtering, which needs
    16 products for 36, and derivatives of strided convolutions as those of stride-1 convolutions
    of every ``stride``-th row and column. Values and derivatives of every order are those of
    ``lax`` up to rounding; forward-mode differentiation is not available there. Other backends, and
    convolutions with dilation or groups, go straight to ``lax``.
    """
    plain = (
        all(dilation == 1 for dilation in (*(lhs_dilation or ()), *(rhs_dilation or ())))
        and feature_group_count == 1
        and not kwargs
        and lhs.ndim == 4
        and dimension_numbers == FLAX_NHWC
    )
    if plain and jax.default_backend() == "cpu":
        pads = _explicit_padding(padding, lhs.shape[1:3], rhs.shape[:2], window_strides)
        if all(stride == 1 for stride in window_strides):
            return _convolve(pads, precision, lhs, rhs)
        if _alone():
            return _convolve_strided(tuple(window_strides), pads, precision, lhs, rhs)
    return lax.conv_general_dilated(
        lhs,
        rhs,
        window_strides,
        padding,
        lhs_dilation,
        rhs_dilation,
        dimension_numbers,
        feature_group_count,
        precision=precision,
        **kwargs,
    )


Pads = tuple[tuple[int, int], tuple[int, int]]

# From so many output positions, or positions times input channels, products beat XLA:CPU's own
# weight gradient.
_MIN_POSITIONS, _MIN_SIZE = 128, 4096
# About what stays in a core's own caches.
_CACHE_BYTES = 4 << 20
# From so many channels on, tiles cost less than the products that they save.
_MIN_WINOGRAD_CHANNELS = 32
# What tiles of inputs and products may take: about a cache that cores share.
_WINOGRAD_BYTES = 16 << 20
# Kernel offsets times channels up to which sums of products beat XLA:CPU's convolution: 3x3 of RGB.
_MAX_TERMS = 27


def _alone() -> bool:
    """Whether there is one device, the case of a real CPU.

    Loops over parts of the batch do not go with a batch that is split over devices; and programs
    for several virtual CPU devices are compiled to count what other backends would need, whose
    convolutions have none of these forms.
    """
    return jax.device_count() == 1


def _explicit_padding(
    padding: Any, spatial: Sequence[int], kernel: Sequence[int], strides: Sequence[int] = (1, 1)
) -> Pads:
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(spatial, kernel, strides, padding)
    (top, bottom), (left, right) = padding
    return (int(top), int(bottom)), (int(left), int(right))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _convolve(pads: Pads, precision: Any, inputs: Array, kernel: Array) -> Array:
    height, width, before, after = kernel.shape
    if height * width * before <= _MAX_TERMS:
        return _convolve_few_inputs(pads, precision, inputs, kernel)
    if height * width * after <= _MAX_TERMS:
        return _convolve_few_outputs(pads, precision, inputs, kernel)
    if (size := _winograd_group_size(pads, inputs, kernel)) is not None:
        return _convolve_winograd(size, pads, precision, inputs, kernel)
    return lax.conv_general_dilated(
        inputs, kernel, (1, 1), pads, dimension_numbers=_NHWC, precision=precision
    )


def _pad(pads: Pads, images: Array) -> Array:
    zero = jnp.zeros((), images.dtype)
    return lax.pad(images, zero, [(0, 0, 0), *((*pad, 0) for pad in pads), (0, 0, 0)])


def _windows(padded: Array, kernel: Array) -> Iterator[tuple[int, int, Array]]:
    """Yields each kernel offset, and what it sees of the padded images."""
    height, width = kernel.shape[:2]
    rows, columns = padded.shape[1] - height + 1, padded.shape[2] - width + 1
    for row in range(height):
        for column in range(width):
            yield row, column, padded[:, row : row + rows, column : column + columns]


def _convolve_few_inputs(pads: Pads, precision: Any, inputs: Array, kernel: Array) -> Array:
    """Convolves images of very few channels.

    Small batches: the products of each channel at each offset are added up, which XLA fuses into
    one loop, with whatever reads the sums: it makes them again for each reader. Large ones:
    convolutions of 4 channels run faster than of 3.
    """
    dtype = jnp.result_type(inputs, kernel)
    wide = jnp.promote_types(dtype, jnp.float32)
    channels, after = kernel.shape[2:]
    if _alone() and inputs[..., 0].size * after * wide.itemsize > _CACHE_BYTES:
        if channels == 3:
            zero = jnp.zeros((), dtype)
            inputs = lax.pad(inputs, zero, [(0, 0, 0)] * 3 + [(0, 1, 0)])
            kernel = lax.pad(kernel, zero, [(0, 0, 0)] * 2 + [(0, 1, 0), (0, 0, 0)])
        return lax.conv_general_dilated(
            inputs, kernel, (1, 1), pads, dimension_numbers=_NHWC, precision=precision
        )
    # Whatever computes the inputs would be fused too, and run again for every product.
    padded = lax.optimization_barrier(_pad(pads, inputs).astype(wide))
    kernel = kernel.astype(wide)
    terms = (
        seen[..., channel, None] * kernel[None, row, None, column, None, channel]
        for row, column, seen in _windows(padded, kernel)
        for channel in range(channels)
    )
    return functools.reduce(jnp.add, terms).astype(dtype)


def _convolve_few_outputs(pads: Pads, precision: Any, inputs: Array, kernel: Array) -> Array:
    """Multiplies by the kernel of all offsets at once, then adds up the shifted products."""
    height, width, before, after = kernel.shape
    dtype = jnp.result_type(inputs, kernel)
    by_offset = kernel.transpose(2, 0, 1, 3).reshape(before, height * width * after)
    wide = jnp.promote_types(dtype, jnp.float32)
    products = jnp.tensordot(inputs, by_offset, 1, precision=precision, preferred_element_type=wide)
    terms = (
        seen[..., (row * width + column) * after :][..., :after]
        for row, column, seen in _windows(_pad(pads, products), kernel)
    )
    return functools.reduce(jnp.add, terms).astype(dtype)


def _winograd_group_size(pads: Pads, inputs: Array, kernel: Array) -> int | None:
    """Returns how many examples to convolve by tiles at a time; ``None`` for not by tiles."""
    (batch, *spatial, before), (height, width, _, after) = inputs.shape, kernel.shape
    dtype = jnp.result_type(inputs, kernel)
    rows, columns = (size + sum(pad) - 2 for size, pad in zip(spatial, pads, strict=True))
    narrow = min(before, after)
    if (
        not _alone()
        or (height, width) != (3, 3)
        or dtype.itemsize < 4
        or rows % 2
        or columns % 2
        or narrow < _MIN_WINOGRAD_CHANNELS
        or rows * columns * narrow < _MIN_SIZE
    ):
        return None
    # Tiles of inputs and of products are four times as large as these.
    tiled_bytes = 4 * rows * columns * (before + after) * dtype.itemsize
    if batch * tiled_bytes <= 2 * _WINOGRAD_BYTES:
        return batch
    size = _group_size(batch, tiled_bytes, _WINOGRAD_BYTES)
    # A batch that does not divide well would be a long loop over few examples.
    return size if 2 * size >= _WINOGRAD_BYTES // tiled_bytes else None


def _group_size(batch: int, example_bytes: int, most_bytes: int) -> int:
    """Returns how many examples fit, of the divisors of the batch; at least one."""
    return max(
        (n for n in range(1, batch + 1) if batch % n == 0 and n * example_bytes <= most_bytes),
        default=1,
    )


def _convolve_winograd(
    size: int, pads: Pads, precision: Any, inputs: Array, kernel: Array
) -> Array:
    """Convolves with fewer products, so many examples at a time that their tiles fit the cache."""
    dtype = jnp.result_type(inputs, kernel)
    transformed = winograd.transform_kernel(kernel.astype(dtype))

    def convolve(images: Array) -> Array:
        return winograd.convolve(_pad(pads, images.astype(dtype)), transformed, precision)

    if size == len(inputs):
        return convolve(inputs)
    outputs = lax.map(convolve, inputs.reshape(-1, size, *inputs.shape[1:]))
    return outputs.reshape(-1, *outputs.shape[2:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _correlate(pads: Pads, precision: Any, inputs: Array, cotangent: Array) -> Array:
    """The weight gradient ``k`` of a convolution.

    ``k[i, j, c, d]`` is the sum over examples and positions ``p`` of
    ``padded_inputs[p + (i, j), c] cotangent[p, d]``.
    """
    positions, channels = cotangent.shape[1] * cotangent.shape[2], inputs.shape[3]
    if positions < _MIN_POSITIONS and not (_alone() and positions * channels >= _MIN_SIZE):
        transposed = lax.conv_general_dilated(
            inputs.transpose(3, 1, 2, 0),
            cotangent.transpose(1, 2, 0, 3),
            (1, 1),
            pads,
            dimension_numbers=_NHWC,
            precision=precision,
        )
        return transposed.transpose(1, 2, 0, 3)
    if not _alone():
        return _correlate_by_offset(pads, precision, inputs, cotangent)
    return _correlate_in_groups(pads, precision, inputs, cotangent)


def _correlate_by_offset(pads: Pads, precision: Any, inputs: Array, cotangent: Array) -> Array:
    """Makes one product for each kernel offset."""
    height, width, channels = cotangent.shape[1:]
    padded = _pad(pads, inputs)
    right = cotangent.reshape(-1, channels)

    def product(row: int, column: int) -> Array:
        left = padded[:, row : row + height, column : column + width].reshape(-1, inputs.shape[3])
        return jnp.matmul(left.T, right, precision=precision)

    rows, columns = padded.shape[1] - height + 1, padded.shape[2] - width + 1
    return jnp.stack(
        [jnp.stack([product(row, column) for column in range(columns)]) for row in range(rows)]
    )


def _correlate_in_groups(pads: Pads, precision: Any, inputs: Array, cotangent: Array) -> Array:
    """Makes one product for each row of the kernel and group of examples that fits the cache.

    The products contract over all positions of the batch, which do not fit: XLA:CPU would stream
    them from memory once for each product.
    """
    dtype = jnp.result_type(inputs, cotangent)
    wide = jnp.promote_types(dtype, jnp.float32)
    (batch, height, width, after), before = cotangent.shape, inputs.shape[3]
    (top, bottom), (left, right) = pads
    padded_height = inputs.shape[1] + top + bottom
    columns = inputs.shape[2] + left + right - width + 1
    rows = padded_height - height + 1
    example_bytes = padded_height * width * columns * before * dtype.itemsize
    size = _group_size(batch, example_bytes, _CACHE_BYTES)

    def add(total: Array, group: tuple[Array, Array]) -> tuple[Array, None]:
        images, gradients = group
        padded = _pad(pads, images)
        shifted = jnp.concatenate(
            [padded[:, :, column : column + width] for column in range(columns)], axis=-1
        )
        products = [
            lax.dot_general(
                gradients.reshape(-1, after),
                shifted[:, row : row + height].reshape(-1, columns * before),
                (((0,), (0,)), ((), ())),
                precision=precision,
                preferred_element_type=wide,
            )
            for row in range(rows)
        ]
        return total + jnp.stack(products), None

    groups = jax.tree.map(
        lambda value: value.reshape(-1, size, *value.shape[1:]), (inputs, cotangent)
    )
    total, _ = lax.scan(add, jnp.zeros((rows, after, columns * before), wide), groups)
    kernel = total.reshape(rows, after, columns, before).transpose(0, 2, 3, 1)
    return kernel.astype(dtype)


def _transpose(pads: Pads, precision: Any, cotangent: Array, kernel: Array) -> Array:
    """The input gradient: a convolution with the flipped kernel and the complementary padding."""
    (top, bottom), (left, right) = pads
    height, width = kernel.shape[0] - 1, kernel.shape[1] - 1
    flipped = kernel[::-1, ::-1].swapaxes(2, 3)
    complement = (height - top, height - bottom), (width - left, width - right)
    return _convolve(complement, precision, cotangent, flipped)


# Convolution and correlation are bilinear and each other's derivatives, so these two rules give
# every order of reverse mode.


def _convolve_fwd(
    pads: Pads, precision: Any, inputs: Array, kernel: Array
) -> tuple[Array, tuple[Array, Array]]:
    return _convolve(pads, precision, inputs, kernel), (inputs, kernel)


def _convolve_bwd(
    pads: Pads, precision: Any, residuals: tuple[Array, Array], cotangent: Array
) -> tuple[Array, Array]:
    inputs, kernel = residuals
    return _transpose(pads, precision, cotangent, kernel), _correlate(
        pads, precision, inputs, cotangent
    )


def _correlate_fwd(
    pads: Pads, precision: Any, inputs: Array, cotangent: Array
) -> tuple[Array, tuple[Array, Array]]:
    return _correlate(pads, precision, inputs, cotangent), (inputs, cotangent)


def _correlate_bwd(
    pads: Pads, precision: Any, residuals: tuple[Array, Array], kernel: Array
) -> tuple[Array, Array]:
    inputs, cotangent = residuals
    return (
        _transpose(pads, precision, cotangent, kernel),
        _convolve(pads, precision, inputs, kernel),
    )


_convolve.defvjp(_convolve_fwd, _convolve_bwd)
_correlate.defvjp(_correlate_fwd, _correlate_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _convolve_strided(
    strides: tuple[int, int], pads: Pads, precision: Any, inputs: Array, kernel: Array
) -> Array:
    return lax.conv_general_dilated(
        inputs, kernel, strides, pads, dimension_numbers=_NHWC, precision=precision
    )


def _convolve_by_phases(
    strides: tuple[int, int], pads: Pads, precision: Any, inputs: Array, kernel: Array
) -> Array:
    """Adds up stride-1 convolutions, one for each residue of rows and columns modulo the stride.

    Output ``o`` sees input ``o * stride + i`` through kernel offset ``i = t * stride + phase``: of
    each phase, a stride-1 convolution of every ``stride``-th input with every ``stride``-th offset.
    """
    dtype = jnp.result_type(inputs, kernel)
    # Of half precision, sums are rounded once.
    inputs, kernel = (norms.wide(array.astype(dtype)) for array in (inputs, kernel))
    outputs, cropped = [], []
    for axis in (0, 1):
        (before, after), stride, offsets = pads[axis], strides[axis], kernel.shape[axis]
        size = inputs.shape[1 + axis]
        outputs.append((size + before + after - offsets) // stride + 1)
        seen = (outputs[axis] - 1) * stride + offsets
        cropped.append((before, seen - size - before))
    padded = _pad((cropped[0], cropped[1]), inputs)
    terms = [
        _convolve(
            ((0, 0), (0, 0)),
            precision,
            padded[:, row :: strides[0], column :: strides[1]][
                :, : outputs[0] + rows - 1, : outputs[1] + columns - 1
            ],
            part,
        )
        for row in range(min(strides[0], kernel.shape[0]))
        for column in range(min(strides[1], kernel.shape[1]))
        for part in [kernel[row :: strides[0], column :: strides[1]]]
        for rows, columns in [part.shape[:2]]
    ]
    return functools.reduce(jnp.add, terms).astype(dtype)


def _convolve_strided_fwd(
    strides: tuple[int, int], pads: Pads, precision: Any, inputs: Array, kernel: Array
) -> tuple[Array, tuple[Array, Array]]:
    return _convolve_strided(strides, pads, precision, inputs, kernel), (inputs, kernel)


def _convolve_strided_bwd(
    strides: tuple[int, int],
    pads: Pads,
    precision: Any,
    residuals: tuple[Array, Array],
    cotangent: Array,
) -> tuple[Array, Array]:
    phases = functools.partial(_convolve_by_phases, strides, pads, precision)
    _, pull_back = jax.vjp(phases, *residuals)
    inputs, kernel = pull_back(cotangent)
    return inputs, kernel


_convolve_strided.defvjp(_convolve_strided_fwd, _convolve_strided_bwd)
