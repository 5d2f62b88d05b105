"""The search that sees labels alone, against closed forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gfa_jax import norms
from gfa_jax.evaluation import hard_label
from gfa_jax.threat import ThreatModel
from tests.attacks import toy

WEIGHTS = np.array([2.0, -1.0, 0.5, -0.25], np.float32)
GREY = np.full((5, 4), 0.5, np.float32)
LEADS = np.array([0.1, 0.2, 0.3, 0.4, -0.1], np.float32)
LABELS = np.zeros(5, np.int32)
KEYS = jax.vmap(jax.random.key)(np.arange(5))


def linear(leads, inputs):
    """Class 0 leads by so much where all pixels are grey, and class 1 gains along the weights."""
    gain = (inputs - 0.5) @ WEIGHTS
    return jnp.stack([leads, gain], axis=1)


def search(model, threat, inputs=GREY, labels=LABELS, keys=KEYS, num_directions=300, **options):
    function = functools.partial(
        hard_label.closest_by_labels, model, num_directions=num_directions, **options
    )
    return np.asarray(jax.jit(function)(keys, inputs, labels, threat))


@pytest.mark.parametrize(
    ("norm", "excess"),
    # In l_inf one of 16 directions is the best and in l_1 about one of 12; in l_2 one comes close.
    [("linf", 1.001), ("l1", 1.001), ("l2", 1.15)],
)
def test_the_nearest_point_of_a_linear_model_is_approached_from_above(norm, excess):
    found = search(functools.partial(linear, LEADS), ThreatModel(norm, 0.1))
    dual = norms.vector_norm(WEIGHTS[None], norms.dual(norm))[0]
    exact = np.maximum(LEADS, 0) / dual
    assert found[-1] == 0
    assert np.all(found >= exact * (1 - 1e-5))
    assert np.all(found <= exact * excess)


def test_distances_are_those_of_the_clipped_points():
    """Only the upper face of the box misleads: from 0.75, every move is 0.25 once clipped."""

    def face(inputs):
        return jnp.stack([jnp.zeros(len(inputs)), jnp.max(inputs, axis=1) - 0.9995], axis=1)

    inputs = np.full((5, 4), 0.75, np.float32)
    for norm, most in (("linf", 0.2501), ("l2", 0.6), ("l1", 1.01)):
        found = search(face, ThreatModel(norm, 0.1), inputs)
        assert np.all((found >= 0.2494) & (found <= most)), norm


def test_an_example_does_not_depend_on_its_batch():
    threat = ThreatModel("l2", 0.1)
    options = {"num_directions": 12}
    whole = search(toy.logits_fn, threat, toy.INPUTS, toy.LABELS, toy.KEYS, **options)
    order = np.array([4, 2, 0])
    part = search(
        toy.logits_fn, threat, toy.INPUTS[order], toy.LABELS[order], toy.KEYS[order], **options
    )
    np.testing.assert_allclose(whole[order], part, rtol=1e-5)
    # More directions find no less, and never less than the best attack.
    more = search(toy.logits_fn, threat, toy.INPUTS, toy.LABELS, toy.KEYS, num_directions=24)
    assert np.all(more <= whole)
    assert np.all(more > toy.REACHABLE["l2"])


def test_what_cannot_be_broken_is_infinitely_far_and_what_is_not_a_number_is_wrong():
    def constant(inputs):
        return jnp.stack([jnp.ones(len(inputs)), jnp.zeros(len(inputs))], axis=1)

    threat = ThreatModel("linf", 0.1)
    assert np.all(np.isinf(search(constant, threat, num_directions=3)))
    assert np.all(search(lambda inputs: constant(inputs) * jnp.nan, threat, num_directions=3) == 0)
