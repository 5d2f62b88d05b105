"""Operations against closed forms, and against XLA's own count where nothing loops."""

import jax
import jax.numpy as jnp
import pytest

from gfa_jax.training import flops

A, B = jnp.ones((3, 4)), jnp.ones((4, 5))
PRODUCT = 2 * 3 * 4 * 5
IMAGES, KERNEL = jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 7))


def convolve(images, kernel, **options):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        images, kernel, (1, 1), "VALID", dimension_numbers=numbers, **options
    )


def xla(function, *args):
    return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]


def test_products_and_convolutions():
    assert flops.count(jnp.dot, A, B) == PRODUCT == xla(jnp.dot, A, B)
    expected = 2 * (2 * 6 * 6 * 7) * (3 * 3 * 3)
    assert flops.count(convolve, IMAGES, KERNEL) == expected == xla(convolve, IMAGES, KERNEL)
    grouped = flops.count(
        lambda x, k: convolve(x, k, feature_group_count=3), IMAGES, jnp.ones((3, 3, 1, 6))
    )
    assert grouped == 2 * (2 * 6 * 6 * 6) * 9


def test_gradients_cost_two_more_convolutions():
    def loss(images, kernel):
        return jnp.sum(jnp.sin(convolve(images, kernel)))

    plain = flops.count(convolve, IMAGES, KERNEL)
    # With respect to the kernel, the sums are those of the convolution itself.
    assert flops.count(jax.grad(loss, argnums=1), IMAGES, KERNEL) == 2 * plain


@pytest.mark.parametrize(("stride", "groups"), [(1, 1), (2, 1), (1, 3), (2, 3)])
def test_each_gradient_of_a_convolution_costs_a_convolution(stride, groups):
    """Strided and grouped ones, too, whose gradients are convolutions of other kinds."""

    def loss(images, kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jnp.sum(
            jnp.sin(
                jax.lax.conv_general_dilated(
                    images,
                    kernel,
                    (stride, stride),
                    "SAME",
                    dimension_numbers=numbers,
                    feature_group_count=groups,
                )
            )
        )

    kernel = jnp.ones((3, 3, 3 // groups, 6))
    plain = 2 * 2 * (8 // stride) ** 2 * 6 * 9 * (3 // groups)
    assert flops.count(loss, IMAGES, kernel) == plain
    assert flops.count(jax.grad(loss), IMAGES, kernel) == 2 * plain
    assert flops.count(jax.grad(loss, argnums=1), IMAGES, kernel) == 2 * plain


@pytest.mark.parametrize("num_steps", [1, 5])
def test_loops_count_as_often_as_they_run(num_steps):
    square = jnp.ones((4, 4))

    def power(x):
        return jax.lax.fori_loop(0, num_steps, lambda _, value: value @ x, x)

    assert flops.count(power, square) == num_steps * 2 * 64
    assert flops.count(jax.jit(jax.vmap(power)), square[None]) == num_steps * 2 * 64


def test_equal_expressions_count_once_and_unused_ones_not():
    assert flops.count(lambda a, b: (a @ b) + jax.jit(jnp.dot)(a, b), A, B) == PRODUCT
    assert flops.count(lambda a, b: (a @ b) * (2 * a @ b), A, B) == 2 * PRODUCT

    def unused(a, b):
        _ = a @ b
        return a

    assert flops.count(unused, A, B) == 0


def test_branches_count_as_the_dearest():
    def branch(flag, a, b):
        return jax.lax.cond(flag, lambda: a @ b, lambda: jnp.zeros((3, 5)))

    assert flops.count(branch, True, A, B) == PRODUCT


def test_unknown_numbers_of_iterations_are_refused():
    def search(x):
        return jax.lax.while_loop(lambda value: value[0, 0] < 9, lambda value: value @ x, x)

    with pytest.raises(ValueError, match="no fixed number of iterations"):
        flops.count(search, jnp.ones((4, 4)))


def test_what_every_mapped_device_does_counts():
    def mapped(rows, matrix):
        return jax.pmap(jnp.dot, in_axes=(0, None))(rows.reshape(4, 2, 4), matrix)

    assert flops.count(mapped, jnp.ones((8, 4)), B) == flops.count(jnp.dot, jnp.ones((8, 4)), B)
