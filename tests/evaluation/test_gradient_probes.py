"""Probes of the gradient against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np

from gfa_jax.evaluation import gradient_probes
from gfa_jax.threat import ThreatModel
from tests.attacks import toy


def test_signs_of_gradients_agree_where_they_should():
    """Of five coordinates one is always up, one turns at 0.5, one is noise and two are dead."""

    def model(inputs):
        noise = jnp.sin(1e4 * inputs[:, 2]) / 1e4
        wrong = inputs[:, 0] + (inputs[:, 1] - 0.5) ** 2 + noise
        return jnp.stack([jnp.zeros_like(wrong), wrong], axis=1)

    inputs = np.full((400, 5), 0.5, np.float32)
    inputs[:, 1] = 0.75
    keys = jax.vmap(jax.random.key)(np.arange(400))
    threat, labels = ThreatModel("linf", 0.5), np.zeros(400, np.int32)
    make = jax.jit(lambda: gradient_probes.gradient_agreement(model, keys, inputs, labels, threat))
    cosines, agreeing = make()
    assert np.all(np.abs(cosines) <= 1 + 1e-6)
    np.testing.assert_array_equal(np.unique(np.round(agreeing * 3)), [1, 2, 3])
    # The second keeps its sign within a radius of 0.25, and in three quarters of a box of 0.5,
    # whose upper half is folded onto its edge; the third in half of all cases.
    np.testing.assert_allclose(agreeing.mean(axis=1), [2.5 / 3, 2.5 / 3, 2.25 / 3], atol=0.03)
    flat = lambda inputs: jnp.zeros((len(inputs), 2)) + 0 * inputs[:, :2]  # noqa: E731
    _, none = gradient_probes.gradient_agreement(flat, keys[:1], inputs[:1], labels[:1], threat)
    assert not none.any()


def test_a_gradient_that_underflows_is_told_from_a_small_loss():
    leads = np.array([0.0, 15.0, 40.0], np.float32)

    def model(inputs):
        return jnp.stack([jnp.asarray(leads), inputs[:, 0]], axis=1)

    inputs, labels = np.zeros((3, 2), np.float32), np.zeros(3, np.int32)
    sizes, underflows = gradient_probes.gradient_sizes(
        model, toy.KEYS[:3], inputs, labels, ThreatModel("linf", 0.1)
    )
    np.testing.assert_allclose(sizes[0], 1, rtol=1e-6)
    np.testing.assert_allclose(sizes[2], 1 / (1 + np.exp(leads)), rtol=1e-3)
    np.testing.assert_array_equal(underflows, [False, False, True])
