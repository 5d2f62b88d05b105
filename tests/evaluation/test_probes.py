"""What probes have in common."""

import jax
import numpy as np
import pytest

from gfa_jax import norms
from gfa_jax.evaluation import probes
from gfa_jax.threat import ThreatModel
from tests.attacks import toy


def test_random_points_lie_on_the_surface_of_the_ball():
    middle = np.full((6, 48), 0.5, np.float32)
    for norm, epsilon in (("linf", 0.1), ("l2", 0.3), ("l1", 0.5)):
        threat = ThreatModel(norm, epsilon)
        points = jax.jit(probes.surface_points)(threat, toy.KEYS, middle)
        np.testing.assert_allclose(threat.distance(middle, points), epsilon, rtol=1e-4)
        assert len(np.unique(points, axis=0)) == 6


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_directions_have_unit_norm_and_their_own_keys(norm):
    inputs = np.zeros((6, 30), np.float32)
    threat = ThreatModel(norm, 0.1)
    directions = np.asarray(jax.jit(probes.random_directions)(threat, toy.KEYS, inputs))
    np.testing.assert_allclose(norms.vector_norm(directions, norm), 1, rtol=1e-5)
    assert len(np.unique(directions, axis=0)) == 6
    single = probes.random_directions(threat, toy.KEYS[3:4], inputs[:1])
    np.testing.assert_allclose(directions[3:4], single, rtol=1e-6)


def test_sparse_directions_range_from_one_coordinate_to_all():
    keys = jax.vmap(jax.random.key)(np.arange(200))
    threat = ThreatModel("l1", 0.1)
    directions = probes.random_directions(threat, keys, np.zeros((200, 100), np.float32))
    kept = np.count_nonzero(directions, axis=1)
    assert kept.min() == 1
    assert kept.max() > 80
    assert 20 < np.sum(kept > 10) < 180
