"""Probes of gradients and of the loss against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gfa_jax.evaluation import gradient_probes, surface_probes
from gfa_jax.threat import ThreatModel
from tests.attacks import toy

WEIGHTS = np.array([[2.0, -1.0], [0.5, 1.0], [0.0, 0.25], [-1.0, 1.0]], np.float32)
POINTS = np.array([[0.5, 0.25, 0.75, 0.0], [0.0, 1.0, 0.5, 1.0]], np.float32)
CLASSES = np.array([0, 1], np.int32)


def linear(inputs):
    return inputs @ WEIGHTS


@pytest.mark.parametrize(("norm", "epsilon"), [("linf", 0.1), ("l2", 0.2), ("l1", 0.4)])
def test_a_linear_loss_has_exact_derivatives(norm, epsilon):
    """The margin of a linear model of two classes is linear: all closed forms are known."""
    threat = ThreatModel(norm, epsilon)

    @jax.jit
    def values():
        arguments = (linear, toy.KEYS[:2], POINTS, CLASSES, threat)
        return (
            gradient_probes.gradient_agreement(*arguments, loss="margin"),
            gradient_probes.derivative_errors(*arguments, loss="margin"),
            surface_probes.linearity_errors(*arguments, num_draws=20, loss="margin"),
            gradient_probes.gradient_sizes(*arguments),
        )

    (cosines, agreeing), errors, curvature, ((clean, start, _), underflows) = values()
    assert cosines.shape == agreeing.shape == (3, 2)
    np.testing.assert_allclose(cosines, 1, rtol=1e-5)
    np.testing.assert_array_equal(agreeing, 1)
    assert not underflows.any()
    assert errors.shape == (2, 2, 2)
    np.testing.assert_allclose(errors, 0, atol=5e-3)
    np.testing.assert_allclose(curvature, 0, atol=1e-6)
    np.testing.assert_allclose(clean, np.abs(WEIGHTS[:, 0] - WEIGHTS[:, 1]).sum(), rtol=1e-5)
    np.testing.assert_allclose(start, clean, rtol=1e-5)


def test_linearity_and_stability_of_a_quadratic_loss():
    """L(x) = 4 |x|^2 departs from its tangent by 4 |u|^2; at corners |u|^2 = D epsilon^2."""

    def quadratic(inputs):
        wrong = 4 * jnp.sum(inputs**2, axis=1)
        return jnp.stack([jnp.zeros_like(wrong), wrong], axis=1)

    inputs, labels = np.full((2, 4), 0.5, np.float32), np.zeros(2, np.int32)
    threat = ThreatModel("linf", 0.1)

    @jax.jit
    def values():
        arguments = (quadratic, toy.KEYS[:2], inputs, labels, threat)
        return (
            surface_probes.linearity_errors(*arguments, num_draws=4, loss="margin", offset=1.0),
            gradient_probes.derivative_errors(*arguments, loss="margin"),
            surface_probes.instability(*arguments, num_draws=50, radius=0.01, loss="margin"),
        )

    curvature, errors, change = values()
    np.testing.assert_allclose(curvature, 4 * 4 * 0.1**2 / (4 + 1), rtol=1e-4)
    # Central differences of a quadratic are exact.
    np.testing.assert_allclose(errors, 0, atol=5e-3)
    # L = 4 and its gradient is 4 in each of 4 coordinates that move by at most 0.005.
    assert np.all(change > 0)
    assert np.all(change < 4 * 4 * 0.005 / 4 * 1.01)


def test_stability_is_capped():
    steep = lambda inputs: 1e4 * linear(inputs - POINTS) + 1e-3 * linear(POINTS)  # noqa: E731
    change = surface_probes.instability(
        steep, toy.KEYS[:2], POINTS, CLASSES, ThreatModel("linf", 0.02), num_draws=20, radius=0.2
    )
    assert np.all((change > 0.9) & (change <= 1))
