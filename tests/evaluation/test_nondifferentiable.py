"""Operations without a derivative are found where they lie on the way, and only there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gfa_jax.evaluation import nondifferentiable

WEIGHTS = np.array([[2.0, -1.0], [0.5, 1.0]], np.float32)


@jax.custom_vjp
def _straight_through(inputs):
    return jnp.round(inputs * 20) / 20


_straight_through.defvjp(
    lambda inputs: (_straight_through(inputs), None), lambda _, cotangent: (-cotangent,)
)


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (jax.nn.softmax, []),
        (jax.nn.log_softmax, []),
        (lambda x: x - jax.nn.logsumexp(x, axis=1, keepdims=True), []),
        (lambda x: jax.nn.relu(x) + jnp.maximum(x, 0.5) + jnp.where(x > 0, x, 0.1 * x), []),
        (lambda x: x + jnp.round(WEIGHTS[:, :1] * 3), []),
        (lambda x: x + 0 * jnp.ones(2)[jnp.argmax(WEIGHTS, axis=1)][:, None], []),
        (lambda x: jnp.floor(x) + jnp.sign(x), ["floor", "sign"]),
        (lambda x: jax.lax.stop_gradient(x), ["stop_gradient"]),
        (lambda x: jax.jit(lambda y: jax.checkpoint(jnp.ceil)(y))(x), ["ceil"]),
        (lambda x: jax.lax.scan(lambda c, _: (jnp.round(c), None), x, length=2)[0], ["round"]),
        (lambda x: x.astype(jnp.int32).astype(jnp.float32), ["convert_element_type to int32"]),
        (lambda x: jax.nn.one_hot(jnp.argmax(x, axis=1), 4), ["argmax"]),
        (_straight_through, ["round"]),
        (lambda x: (jnp.round(x), x)[1], []),
    ],
)
def test_operations_without_a_derivative_are_named(function, names):
    assert nondifferentiable.operations(function, np.zeros((2, 4), np.float32)) == names
