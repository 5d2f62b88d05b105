"""The convolution equals that of lax in value and in every derivative."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax import lax

from gfa_jax.models import convolution

CASES = {
    # Below and above the number of positions from which weight gradients are products.
    "same_small": ((2, 5, 6, 4), (3, 3, 4, 5), "SAME"),
    "same_large": ((2, 13, 12, 5), (3, 3, 5, 4), "SAME"),
    "valid_large": ((2, 14, 15, 8), (3, 2, 8, 7), "VALID"),
    "even_kernel": ((2, 12, 12, 3), (4, 4, 3, 2), "SAME"),
    "wide_pads": ((1, 4, 4, 7), (2, 2, 7, 8), ((3, 2), (0, 3))),
    "one_by_one": ((2, 12, 12, 28), (1, 1, 28, 29), "VALID"),
    # Sums of products: from and to few channels.
    "few_inputs": ((2, 13, 12, 3), (3, 3, 3, 5), "SAME"),
    "few_inputs_wide_pads": ((1, 4, 4, 2), (2, 3, 2, 8), ((3, 2), (0, 3))),
    "few_outputs": ((2, 6, 7, 5), (3, 3, 5, 3), "SAME"),
    "few_outputs_valid": ((2, 14, 15, 14), (3, 2, 14, 2), "VALID"),
    "few_outputs_cropped": ((2, 6, 6, 14), (2, 2, 14, 2), ((-1, 0), (2, -2))),
    # Tiles of 4x4, of one device.
    "tiles": ((4, 12, 12, 32), (3, 3, 32, 33), "SAME"),
    "tiles_valid": ((2, 12, 14, 33), (3, 3, 33, 32), "VALID"),
    "tiles_wide_pads": ((2, 9, 11, 32), (3, 3, 32, 32), ((3, 2), (0, 3))),
}
STRIDED = {
    "halving": ((2, 8, 6, 5), (3, 3, 5, 4), "SAME", (2, 2)),
    "halving_odd": ((2, 27, 26, 4), (3, 3, 4, 5), ((1, 1), (1, 1)), (2, 2)),
    "shortcut": ((2, 8, 7, 5), (1, 1, 5, 4), "VALID", (2, 2)),
    "unequal": ((2, 11, 9, 4), (4, 2, 4, 5), ((0, 3), (2, 1)), (3, 1)),
    "patches": ((2, 8, 8, 3), (4, 4, 3, 5), "VALID", (4, 4)),
    "cropped": ((2, 9, 9, 4), (2, 3, 4, 5), ((-1, 0), (1, -2)), (2, 2)),
}
ALL = {name: (*case, (1, 1)) for name, case in CASES.items()} | STRIDED


def reference(inputs, kernel, padding, strides=(1, 1)):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(inputs, kernel, strides, padding, dimension_numbers=numbers)


def canonical(inputs, kernel, padding, strides=(1, 1)):
    return convolution.conv_general_dilated(
        inputs, kernel, strides, padding, dimension_numbers=convolution.FLAX_NHWC
    )


@pytest.fixture(params=["several_devices", "one_device", "small_cache"])
def machine(request, monkeypatch):
    """One device takes weight gradients over groups of examples; a small cache makes them many."""
    if request.param != "several_devices":
        monkeypatch.setattr(jax, "device_count", lambda: 1)
    if request.param == "small_cache":
        monkeypatch.setattr(convolution, "_CACHE_BYTES", 1000)
        monkeypatch.setattr(convolution, "_WINOGRAD_BYTES", 200_000)


@functools.partial(jax.jit, static_argnums=(0, 1))
def values_and_derivatives(conv, name, inputs, kernel):
    """The convolution, its first derivatives, and the derivatives of a function of these."""
    _, _, *where = ALL[name]

    def first(inputs, kernel):
        loss = lambda x, k: jnp.sum(jnp.sin(conv(x, k, *where)))  # noqa: E731
        return jax.grad(loss, (0, 1))(inputs, kernel)

    def energy(inputs, kernel):
        of_inputs, of_kernel = first(inputs, kernel)
        return jnp.sum(jnp.cos(of_inputs)) + jnp.sum(of_kernel**2)

    second = jax.grad(energy, (0, 1))(inputs, kernel)
    return conv(inputs, kernel, *where), first(inputs, kernel), second


@functools.cache
def arrays_and_reference(name):
    """The same for every machine."""
    shape, kernel_shape, *_ = ALL[name]
    left, right = jax.random.split(jax.random.key(0))
    arrays = (
        jax.random.normal(left, shape, jnp.float64),
        jax.random.normal(right, kernel_shape, jnp.float64),
    )
    return arrays, values_and_derivatives(reference, name, *arrays)


@pytest.mark.parametrize("name", ALL)
def test_values_and_derivatives_are_those_of_lax(name, machine):
    with jax.enable_x64(True):
        arrays, (value, first, second) = arrays_and_reference(name)
        # A function of its own for each machine, which compiled programs do not know.
        found = values_and_derivatives(lambda *given: canonical(*given), name, *arrays)
        chex.assert_trees_all_close(found[:2], (value, first), rtol=1e-10, atol=1e-10)
        chex.assert_trees_all_close(found[2], second, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "name", ["same_small", "same_large", "few_inputs", "few_outputs", "halving_odd"]
)
def test_bfloat16_is_rounded_once(name, key, machine):
    """In value, in first derivatives, and in the derivatives of each of these."""
    shape, kernel_shape, *where = ALL[name]
    keys = jax.random.split(key, 3)
    # Positive on average: sums of many terms would show rounding on the way.
    inputs = 1 + jax.random.normal(keys[0], shape, jnp.bfloat16)
    kernel = jax.random.normal(keys[1], kernel_shape, jnp.bfloat16)
    shape = reference(inputs, kernel, *where).shape
    cotangent = 1 + jax.random.normal(keys[2], shape, jnp.bfloat16)

    @functools.partial(jax.jit, static_argnums=0)
    def derivatives(conv, inputs, kernel, cotangent):
        def first(which, inputs, kernel, cotangent):
            return jax.vjp(lambda x, k: conv(x, k, *where), inputs, kernel)[1](cotangent)[which]

        arrays = (inputs, kernel, cotangent)
        pulled = [jax.vjp(functools.partial(first, which), *arrays) for which in (0, 1)]
        second = [pull(array) for (_, pull), array in zip(pulled, (inputs, kernel), strict=True)]
        return conv(inputs, kernel, *where), [value for value, _ in pulled], second

    found = derivatives(canonical, inputs, kernel, cotangent)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype("bfloat16")}
    wide = (array.astype(jnp.float32) for array in (inputs, kernel, cotangent))
    found = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), found)
    chex.assert_trees_all_close(found, derivatives(reference, *wide), rtol=2**-8, atol=1e-3)


def test_is_used_for_plain_convolutions_and_only_for_them(key, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    inputs = jax.random.normal(key, (2, 6, 6, 4))
    for options, plain in (
        ({}, True),
        ({"strides": (2, 2)}, True),
        ({"kernel_dilation": (2, 2)}, False),
        ({"feature_group_count": 2}, False),
    ):
        conv = nn.Conv(4, (3, 3), conv_general_dilated=convolution.conv_general_dilated, **options)
        usual = nn.Conv(4, (3, 3), **options)
        variables = usual.init(key, inputs)
        chex.assert_trees_all_close(
            conv.apply(variables, inputs), usual.apply(variables, inputs), rtol=1e-5, atol=1e-6
        )
        jaxpr = str(jax.make_jaxpr(lambda x, c=conv, v=variables: c.apply(v, x))(inputs))
        assert ("custom_vjp_call" in jaxpr) == plain


@pytest.mark.parametrize(
    ("shape", "kernel_shape", "dtype", "size"),
    [
        ((16, 32, 32, 32), (3, 3, 32, 32), "float32", 16),
        # 1 MiB an example, 16 at most.
        ((128, 32, 32, 32), (3, 3, 32, 32), "float32", 16),
        ((96, 32, 32, 32), (3, 3, 32, 32), "float32", 16),
        # Larger than the cache alone.
        ((2, 256, 256, 64), (3, 3, 64, 64), "float32", 1),
        # Of a prime number of examples, groups would be of one.
        ((127, 32, 32, 32), (3, 3, 32, 32), "float32", None),
        ((16, 32, 32, 16), (3, 3, 16, 32), "float32", None),
        ((16, 8, 8, 32), (3, 3, 32, 32), "float32", None),
        ((16, 33, 32, 32), (3, 3, 32, 32), "float32", None),
        ((16, 32, 32, 32), (1, 1, 32, 32), "float32", None),
        ((16, 32, 32, 32), (3, 3, 32, 32), "bfloat16", None),
    ],
)
def test_tiles_are_used_where_they_pay(shape, kernel_shape, dtype, size, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    inputs, kernel = (jax.ShapeDtypeStruct(of, dtype) for of in (shape, kernel_shape))
    assert convolution._winograd_group_size(((1, 1), (1, 1)), inputs, kernel) == size
    num_products = str(
        jax.make_jaxpr(convolution._convolve, static_argnums=(0, 1))(
            ((1, 1), (1, 1)), None, inputs, kernel
        )
    ).count("dot_general")
    assert num_products == (0 if size is None else 16)
