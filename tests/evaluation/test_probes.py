"""Probes against closed forms, on a sound model, and on models made to trip them."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gfa_jax import losses
from gfa_jax.evaluation import diagnostics, probes
from gfa_jax.threat import ThreatModel
from tests.attacks import toy

THREAT = ThreatModel("linf", 0.02)
LEVEL = probes.Level(
    num_steps=(1, 10, 20),
    num_restarts=(1, 3),
    restart_steps=10,
    path_steps=60,
    num_draws=60,
    num_drawn_examples=6,
    num_noise=10,
    num_compared=6,
)
WEIGHTS = np.array([[2.0, -1.0], [0.5, 1.0], [0.0, 0.25], [-1.0, 1.0]], np.float32)
POINTS = np.array([[0.5, 0.25, 0.75, 0.0], [0.0, 1.0, 0.5, 1.0]], np.float32)
CLASSES = np.array([0, 1], np.int32)


def linear(inputs):
    return inputs @ WEIGHTS


def judge(model, *identifiers, threat=THREAT, level=LEVEL, **options):
    """What a model measures, and how that is judged, by id."""
    found = probes.measure(
        model,
        toy.KEYS,
        toy.INPUTS,
        toy.LABELS,
        threat,
        level=level,
        only=identifiers or None,
        **options,
    )
    judged = diagnostics.diagnose({}, probes=found)
    return found, {entry["id"]: entry for entry in judged if entry["id"] in found}


@pytest.fixture(scope="module")
def sound():
    return judge(toy.logits_fn)


def test_a_sound_model_passes_every_probe(sound):
    found, judged = sound
    assert tuple(found) == probes.MEASURED
    statuses = {identifier: entry["status"] for identifier, entry in judged.items()}
    # Without a reference model, the size of a gradient says nothing.
    assert statuses.pop("D11") == "NA"
    assert set(statuses.values()) == {"PASS"}, statuses
    assert not diagnostics.masking_suspected(list(judged.values()))
    assert all(values["n"] == 6 for identifier, values in found.items() if identifier != "D7")
    assert found["D7"]["n"] == 6 * found["D9"]["accuracy"][-1]


def test_measurements_are_json_and_do_not_depend_on_the_batch(sound):
    found, _ = sound
    text = json.dumps(found, allow_nan=False)
    # Batches of 4 and 2, the latter filled.
    again, _ = judge(toy.logits_fn, "D2", "D9", "D11", "D15", "D23", batch_size=4)
    for identifier, values in again.items():
        for name, value in json.loads(text)[identifier].items():
            if name == "median_gradient":
                value, values[name] = list(value.values()), list(values[name].values())
            np.testing.assert_allclose(values[name], value, rtol=1e-4, err_msg=identifier)


def test_examples_may_be_spread_over_devices(sound):
    mesh = jax.make_mesh((2,), ("batch",), devices=jax.devices()[:2])
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))
    found, _ = judge(toy.logits_fn, "D7", "D9", "D22", batch_size=4, sharding=sharding)
    for identifier in ("D7", "D9"):
        assert found[identifier] == sound[0][identifier]
    assert found["D22"]["max_difference"] < probes.ROUNDING
    with pytest.raises(ValueError, match="batch_size=3 must be a multiple of the 2 devices"):
        judge(toy.logits_fn, "D7", batch_size=3, sharding=sharding)


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
        steep, toy.KEYS[:2], POINTS, CLASSES, THREAT, num_draws=20, radius=0.2
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


def stopped(inputs):
    """No gradient at all."""
    return toy.logits_fn(jax.lax.stop_gradient(inputs))


def rounded(inputs):
    """A staircase: constant between steps."""
    return toy.logits_fn(jnp.round(inputs * 50) / 50)


@jax.custom_vjp
def _straight_through(inputs):
    return jnp.round(inputs * 20) / 20


_straight_through.defvjp(
    lambda inputs: (_straight_through(inputs), None), lambda _, cotangent: (-cotangent,)
)


def misled(inputs):
    """A staircase whose pretended derivative has the wrong sign."""
    return toy.logits_fn(_straight_through(inputs))


def rough(inputs):
    """The sound model with high-frequency waves over it."""
    waves = jnp.sin(4000 * inputs.reshape(len(inputs), -1) @ toy.FIRST[:, :5])
    return toy.logits_fn(inputs) + 3 * waves


def large(inputs):
    """Logits so large that the cross-entropy is rounded to 0."""
    return 1e3 * toy.logits_fn(inputs)


def normalised_twice(inputs):
    """Probabilities instead of logits."""
    return jax.nn.softmax(toy.logits_fn(inputs))


def of_the_batch(inputs):
    """Statistics of the batch, as a BatchNorm in training mode."""
    return toy.logits_fn(inputs) - jnp.mean(toy.logits_fn(inputs), axis=0, keepdims=True)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (stopped, {"D12": "FAIL", "D14": "FAIL"}),
        (rounded, {"D14": "FAIL"}),
        (misled, {"D12": "FAIL", "D14": "FAIL"}),
        (rough, {"D12": "FAIL", "D13": "WARN", "D14": "PASS", "D15": "WARN"}),
        (large, {"D12": "PASS", "D14": "PASS", "D22": "PASS", "D23": "WARN"}),
        (normalised_twice, {"D14": "PASS", "D22": "FAIL"}),
        (of_the_batch, {"D22": "FAIL"}),
    ],
)
def test_each_probe_sees_the_model_that_is_made_for_it(model, expected):
    _, judged = judge(model, *expected)
    assert {identifier: entry["status"] for identifier, entry in judged.items()} == expected


def judge_many(model, *identifiers, level=LEVEL):
    """As ``judge``, on 64 grey examples of class 0 that are right without an attack."""
    keys = jax.vmap(jax.random.key)(np.arange(64))
    inputs, labels = np.full((64, 3), 0.5, np.float32), np.zeros(64, np.int32)
    found = probes.measure(
        model, keys, inputs, labels, ThreatModel("linf", 0.1), level=level, only=identifiers
    )
    judged = diagnostics.diagnose({}, probes=found)
    return found, {entry["id"]: entry["status"] for entry in judged if entry["id"] in found}


def test_points_that_attacks_miss_for_want_of_a_gradient_are_drawn():
    """A random start is wrong in a fifth of cases, a random corner in half of them."""

    def cliff(inputs):
        wrong = jax.lax.stop_gradient(inputs[:, 0]) > 0.56
        return jnp.stack([jnp.zeros(len(inputs)), jnp.where(wrong, 1.0, -1.0)], axis=1)

    found, statuses = judge_many(cliff, "D7", "D9", "D14")
    assert statuses == {"D7": "FAIL", "D9": "WARN", "D14": "FAIL"}
    assert found["D7"]["num_broken"] == found["D7"]["n"] == LEVEL.num_drawn_examples


def test_attacks_that_need_more_steps_are_seen():
    """Wrong only in a slab of 4 % of epsilon: steps that are wider jump over it."""

    def slab(inputs):
        wrong = 0.002 - jnp.abs(inputs[:, 0] - 0.55)
        return jnp.stack([jnp.zeros(len(inputs)), wrong], axis=1)

    level = dataclasses.replace(LEVEL, num_steps=(1, 10, 60), path_steps=10)
    found, statuses = judge_many(slab, "D2", level=level)
    assert statuses == {"D2": "FAIL"}
    assert found["D2"]["accuracy"] == sorted(found["D2"]["accuracy"], reverse=True)
    level = dataclasses.replace(LEVEL, path_steps=11)
    _, statuses = judge_many(lambda inputs: inputs @ WEIGHTS[:3], "D17", level=level)
    assert statuses == {"D17": "FAIL"}


def test_results_that_a_new_pass_does_not_confirm_are_seen():
    logits = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 1.0]])
    claimed = jnp.array([True, True, True, False])
    # A tie is decided by rounding.
    expected = [True, False, False, True]
    labels = jnp.zeros(4, jnp.int32)
    np.testing.assert_array_equal(probes.contradicts(logits, labels, claimed), expected)


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (jax.nn.softmax, []),
        (jax.nn.log_softmax, []),
        (lambda x: x - jax.nn.logsumexp(x, axis=1, keepdims=True), []),
        (lambda x: jax.nn.relu(x) + jnp.maximum(x, 0.5) + jnp.where(x > 0, x, 0.1 * x), []),
        (lambda x: x + jnp.round(WEIGHTS[:2, :1] * 3), []),
        (lambda x: x + 0 * jnp.ones(2)[jnp.argmax(WEIGHTS[:2], axis=1)][:, None], []),
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
    assert probes.nondifferentiable(function, np.zeros((2, 4), np.float32)) == names


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": "fast"}, "level='fast'"),
        ({"only": ["D3"]}, "only='D3'"),
        ({"survived": np.ones(3, bool)}, "survived has shape"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"threat": ThreatModel("linf", 0.0)}, "epsilon=0.0"),
    ],
)
def test_bad_arguments_are_named(options, message):
    arguments = {"threat": THREAT, **options}
    with pytest.raises(ValueError, match=message):
        probes.measure(toy.logits_fn, toy.KEYS, toy.INPUTS, toy.LABELS, **arguments)
