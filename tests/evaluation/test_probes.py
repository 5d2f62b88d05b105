"""What probes have in common."""

import jax
import numpy as np

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
