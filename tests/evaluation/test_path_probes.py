"""Probes of the way of PGD against closed forms."""

import jax.numpy as jnp
import numpy as np
import pytest

from gfa_jax import losses
from gfa_jax.evaluation import path_probes
from gfa_jax.threat import ThreatModel
from tests.attacks import toy

WEIGHTS = np.array([[2.0, -1.0], [0.5, 1.0], [0.0, 0.25], [-1.0, 1.0]], np.float32)
CLASSES = np.array([0, 1], np.int32)


def linear(inputs):
    return inputs @ WEIGHTS


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
    np.testing.assert_allclose(path_probes.late_rise(jnp.asarray(path)[:, None]), [expected])


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (np.arange(11.0), 0.0),
        (np.zeros(11), 0.0),
        (np.tile([0.0, 1.0], 6)[:11], 0.5),
        (np.r_[0:9, 7.0, 9.0], 0.1),
        # A ridge that the steps go to and fro on, and a float32 that cannot tell its values.
        (np.r_[0:8, 7 - 1e-3, 7, 7 - 1e-3], 0.0),
        (1e6 + np.r_[np.zeros(5), 0.125, np.zeros(5)], 0.0),
        (np.r_[np.arange(10.0), np.nan], np.nan),
    ],
)
def test_falling_share(path, expected):
    found = path_probes.falling_share(jnp.asarray(path, jnp.float32)[:, None])
    np.testing.assert_allclose(found, [expected], rtol=1e-6)


def test_a_short_path_is_refused():
    with pytest.raises(ValueError, match=r"path has 10 points"):
        path_probes.late_rise(jnp.zeros((10, 2)))


def test_the_path_of_a_linear_loss_rises_to_the_corner():
    threat = ThreatModel("linf", 0.1)
    inputs = np.full((2, 4), 0.5, np.float32)
    path, reached, sizes = path_probes.loss_path(
        linear, toy.KEYS[:2], inputs, CLASSES, threat, num_steps=20, loss="margin"
    )
    assert path.shape == reached.shape == (21, 2)
    slope = np.abs(WEIGHTS[:, 0] - WEIGHTS[:, 1]).sum()
    np.testing.assert_allclose(sizes, np.full((20, 2), slope), rtol=1e-5)
    assert not path_probes.falling_share(path).any()
    assert np.all(np.diff(path, axis=0) > -1e-6)
    worst = 0.1 * slope
    clean = losses.margin(linear(inputs), CLASSES)
    np.testing.assert_allclose(path[-1], clean + worst, rtol=1e-5)
    np.testing.assert_array_equal(reached, np.asarray(path) > 0)
