"""Probes that attack, against closed forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from gfa_jax.evaluation import attack_probes
from gfa_jax.threat import ThreatModel
from tests.attacks import toy

WEIGHTS = np.array([[2.0, -1.0], [0.5, 1.0], [0.0, 0.25], [-1.0, 1.0]], np.float32)


def linear(inputs):
    return inputs @ WEIGHTS


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
        found = jax.jit(attack_probes.resists_steps, static_argnums=0)(*arguments, num_steps)
        np.testing.assert_array_equal(found, expected)
    make = jax.jit(
        attack_probes.restarts, static_argnums=0, static_argnames=("num_restarts", "num_steps")
    )
    success, wrong = make(*arguments, num_restarts=2, num_steps=5)
    np.testing.assert_array_equal(success, np.stack([~expected, ~expected]))
    assert not wrong.any()
    first = attack_probes.random_draws(*arguments, num_draws=400)
    # One corner of 16 is the worst, and every second draw is a corner.
    np.testing.assert_array_equal(first < 0, expected)
    # What is wrong without an attack is so at the first draw.
    clean_wrong = inputs @ weights < 0
    assert np.all(first[clean_wrong] <= 5)


def test_a_temperature_lets_a_saturated_cross_entropy_move():
    """Logits of 1000 and more: exp(-1000) is 0 in float32, and so is every step."""

    def steep(inputs):
        return 1e4 * linear(inputs)

    inputs = np.full((4, 4), 0.5, np.float32)
    inputs[:, 0] += np.linspace(0, 0.45, 4)
    labels, keys = np.zeros(4, np.int32), toy.KEYS[:4]
    threat = ThreatModel("linf", 0.2)
    weights = WEIGHTS[:, 0] - WEIGHTS[:, 1]
    exact = inputs @ weights > threat.epsilon * np.abs(weights).sum()
    clean = inputs @ weights > 0
    make = jax.jit(functools.partial(attack_probes.resists_cross_entropy, steep, num_steps=10))
    scaled = make(keys, inputs, labels, threat, np.float32(1e4))
    np.testing.assert_array_equal(scaled, exact)
    # No step is made from a random start.
    plain = make(keys, inputs, labels, threat, np.float32(1))
    start = threat.random_start(keys, inputs)
    np.testing.assert_array_equal(plain, clean & (start @ weights > 0))
    assert plain.sum() > exact.sum()


def test_results_that_a_new_pass_does_not_confirm_are_seen():
    logits = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 1.0]])
    claimed = jnp.array([True, True, True, False])
    # A tie is decided by rounding.
    expected = [True, False, False, True]
    labels = jnp.zeros(4, jnp.int32)
    np.testing.assert_array_equal(attack_probes.contradicts(logits, labels, claimed), expected)
