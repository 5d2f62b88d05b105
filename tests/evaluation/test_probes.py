"""Probes against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gfa_jax import losses
from gfa_jax.evaluation import probes
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
            probes.gradient_cosines(*arguments, loss="margin"),
            probes.derivative_errors(*arguments, loss="margin"),
            probes.linearity_errors(*arguments, num_draws=20, loss="margin"),
            probes.gradient_sizes(*arguments),
        )

    cosines, errors, curvature, (clean, start, _) = values()
    assert cosines.shape == (3, 2)
    np.testing.assert_allclose(cosines, 1, rtol=1e-5)
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
            probes.linearity_errors(*arguments, num_draws=4, loss="margin", offset=1.0),
            probes.derivative_errors(*arguments, loss="margin"),
            probes.instability(*arguments, num_draws=50, radius=0.01, loss="margin"),
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
    change = probes.instability(
        steep, toy.KEYS[:2], POINTS, CLASSES, ThreatModel("linf", 0.02), num_draws=20, radius=0.2
    )
    assert np.all((change > 0.9) & (change <= 1))


def test_random_points_lie_on_the_surface_of_the_ball():
    middle = np.full((6, 48), 0.5, np.float32)
    for norm, epsilon in (("linf", 0.1), ("l2", 0.3), ("l1", 0.5)):
        threat = ThreatModel(norm, epsilon)
        points = jax.jit(probes.surface_points)(threat, toy.KEYS, middle)
        np.testing.assert_allclose(threat.distance(middle, points), epsilon, rtol=1e-4)
        assert len(np.unique(points, axis=0)) == 6


def test_steps_and_restarts_agree_with_the_exact_worst_case():
    """In l_inf a linear model is broken within epsilon > margin / |w|_1, where the box allows."""
    inputs = np.full((8, 4), 0.5, np.float32)
    inputs[:, 0] += np.linspace(0, 0.4, 8)
    labels = np.zeros(8, np.int32)
    keys = jax.vmap(jax.random.key)(np.arange(8))
    threat = ThreatModel("linf", 0.05)
    weights = WEIGHTS[:, 0] - WEIGHTS[:, 1]
    expected = inputs @ weights > threat.epsilon * np.abs(weights).sum()
    assert 0 < expected.sum() < 8
    arguments = (linear, keys, inputs, labels, threat)
    for num_steps in (1, 7):
        found = jax.jit(probes.resists_steps, static_argnums=0)(*arguments, num_steps)
        np.testing.assert_array_equal(found, expected)
    make = jax.jit(probes.restarts, static_argnums=0, static_argnames=("num_restarts", "num_steps"))
    success, wrong = make(*arguments, num_restarts=2, num_steps=5)
    np.testing.assert_array_equal(success, np.stack([~expected, ~expected]))
    assert not wrong.any()
    first = probes.random_draws(*arguments, num_draws=400)
    # One corner of 16 is the worst, and every second draw is a corner.
    np.testing.assert_array_equal(first < 0, expected)
    # What is wrong without an attack is so at the first draw.
    clean_wrong = inputs @ weights < 0
    assert np.all(first[clean_wrong] <= 5)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (np.r_[0.0, 1.0, np.ones(18)], 0.0),
        (np.arange(21.0), 0.5),
        (np.r_[np.arange(11.0), np.arange(10.0)], 0.0),
        (np.r_[np.zeros(20), 1.0], 1.0),
        (np.zeros(20), 0.0),
    ],
)
def test_late_rise(path, expected):
    np.testing.assert_allclose(probes.late_rise(jnp.asarray(path)[:, None]), [expected])


def test_a_short_path_is_refused():
    with pytest.raises(ValueError, match=r"path has 10 points"):
        probes.late_rise(jnp.zeros((10, 2)))


def test_the_path_of_a_linear_loss_rises_to_the_corner():
    threat = ThreatModel("linf", 0.1)
    inputs = np.full((2, 4), 0.5, np.float32)
    path, reached = probes.loss_path(
        linear, toy.KEYS[:2], inputs, CLASSES, threat, num_steps=20, loss="margin"
    )
    assert path.shape == reached.shape == (21, 2)
    assert np.all(np.diff(path, axis=0) > -1e-6)
    worst = 0.1 * np.abs(WEIGHTS[:, 0] - WEIGHTS[:, 1]).sum()
    clean = losses.margin(linear(inputs), CLASSES)
    np.testing.assert_allclose(path[-1], clean + worst, rtol=1e-5)
    np.testing.assert_array_equal(reached, np.asarray(path) > 0)


# Models that mask their gradient or hide it, one for each probe.


def test_results_that_a_new_pass_does_not_confirm_are_seen():
    logits = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 1.0]])
    claimed = jnp.array([True, True, True, False])
    # A tie is decided by rounding.
    expected = [True, False, False, True]
    labels = jnp.zeros(4, jnp.int32)
    np.testing.assert_array_equal(probes.contradicts(logits, labels, claimed), expected)
