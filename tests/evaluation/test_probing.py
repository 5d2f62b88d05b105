"""Probes on a sound model, and on models made to trip them."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gfa_jax.evaluation import attack_probes, diagnostics, probe_diagnostics, probing
from gfa_jax.threat import ThreatModel
from tests.attacks import toy

THREAT = ThreatModel("linf", 0.02)
LEVEL = probing.Level(
    num_steps=(1, 10, 20),
    num_restarts=(1, 3),
    restart_steps=10,
    path_steps=60,
    num_draws=60,
    num_drawn_examples=6,
    num_directions=8,
    num_labelled=5,
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
    found = probing.measure(
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
    assert tuple(found) == probing.MEASURED
    statuses = {identifier: entry["status"] for identifier, entry in judged.items()}
    # Without a reference model, the size of a gradient says nothing.
    assert statuses.pop("D11") == "NA"
    assert set(statuses.values()) == {"PASS"}, statuses
    assert not diagnostics.masking_suspected(list(judged.values()))
    assert {identifier for identifier, values in found.items() if values["n"] != 6} <= {"D6", "D7"}
    assert found["D6"]["n"] == len(found["D6"]["distances"]) == 5
    assert found["D6"]["num_survivors"] <= found["D7"]["n"]
    assert found["D7"]["n"] == 6 * found["D9"]["accuracy"][-1]


def test_measurements_are_json_and_do_not_depend_on_the_batch(sound):
    found, _ = sound
    text = json.dumps(found, allow_nan=False)
    # Batches of 4 and 2, the latter filled.
    again, _ = judge(toy.logits_fn, "D2", "D6", "D9", "D11", "D15", "D23", batch_size=4)
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
    assert found["D22"]["max_difference"] < attack_probes.ROUNDING
    with pytest.raises(ValueError, match="batch_size=3 must be a multiple of the 2 devices"):
        judge(toy.logits_fn, "D7", batch_size=3, sharding=sharding)


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
    found = probing.measure(
        model, keys, inputs, labels, ThreatModel("linf", 0.1), level=level, only=identifiers
    )
    judged = diagnostics.diagnose({}, probes=found)
    return found, {entry["id"]: entry["status"] for entry in judged if entry["id"] in found}


def test_points_that_attacks_miss_for_want_of_a_gradient_are_drawn():
    """A random start is wrong in a fifth of cases, a random corner in half of them."""

    def cliff(inputs):
        wrong = jax.lax.stop_gradient(inputs[:, 0]) > 0.56
        return jnp.stack([jnp.zeros(len(inputs)), jnp.where(wrong, 1.0, -1.0)], axis=1)

    found, statuses = judge_many(cliff, "D6", "D7", "D9", "D14")
    assert statuses == {"D6": "FAIL", "D7": "FAIL", "D9": "WARN", "D14": "FAIL"}
    assert found["D6"]["num_within"] == found["D6"]["num_survivors"] > 0
    assert found["D7"]["num_broken"] == found["D7"]["n"] == LEVEL.num_drawn_examples


@pytest.mark.parametrize(("scale", "status"), [(1e4, "WARN"), (1.0, "PASS")])
def test_a_saturated_cross_entropy_is_seen_beside_a_scaled_one(scale, status):
    """Every example can be broken; where exp(-500) is 0, only lucky starts are."""

    def steep(inputs):
        return jnp.stack([jnp.zeros(len(inputs)), scale * (inputs[:, 0] - 0.59)], axis=1)

    found, statuses = judge_many(steep, "D10")
    assert statuses == {"D10": status}
    assert found["D10"]["temperature"] == pytest.approx(0.09 * scale, rel=1e-3)
    assert found["D10"]["accuracy"][1] == 0


def test_small_hills_are_seen():
    """A slope with ripples a few steps wide: as steep downhill as up, but linear from afar."""

    def rippled(height, inputs):
        wrong = inputs[:, 0] + height * jnp.sin(600 * inputs[:, 0])
        return jnp.stack([jnp.zeros(len(inputs)), wrong - 1.5], axis=1)

    for height, status in ((0.01, "WARN"), (0.0, "PASS")):
        found, statuses = judge_many(jax.tree_util.Partial(rippled, height), "D13")
        assert statuses == {"D13": status}
        assert found["D13"]["median"] < probe_diagnostics.MAX_NONLINEARITY
        assert (found["D13"]["falling_share"] > 0.1) == (height > 0)


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


def test_a_model_that_answers_differently_each_time_is_seen():
    """A counter outside of the compiled program moves the logits at each call."""
    calls = itertools.count()

    def drifting(inputs):
        count = jax.pure_callback(
            lambda: np.float32(next(calls)), jax.ShapeDtypeStruct((), jnp.float32)
        )
        return toy.logits_fn(inputs) + 0.01 * count * jnp.arange(5)[None]

    found, judged = judge(drifting, "D22")
    assert next(calls) > 5
    assert found["D22"]["max_difference"] > probe_diagnostics.MAX_INCONSISTENCY
    assert judged["D22"]["status"] == "FAIL"


def test_noise_drawn_on_the_host_is_seen():
    generator = np.random.default_rng(0)

    def noisy(inputs):
        noise = jax.pure_callback(
            lambda: generator.normal(size=(len(inputs), 5)).astype(np.float32),
            jax.ShapeDtypeStruct((len(inputs), 5), jnp.float32),
        )
        return toy.logits_fn(inputs) + 0.01 * noise

    _, judged = judge(noisy, "D22")
    assert judged["D22"]["status"] == "FAIL"


def test_logits_that_are_no_numbers_are_judged_and_do_not_crash():
    found, judged = judge(lambda inputs: toy.logits_fn(inputs) * jnp.nan)
    json.dumps([found, list(judged.values())], allow_nan=False)
    assert found["D6"]["distances"] == [0.0] * 5
    assert found["D10"]["temperature"] == 1
    for identifier in ("D13", "D22"):
        assert judged[identifier]["status"] in ("WARN", "FAIL"), identifier


def test_one_example_that_is_no_number_spoils_only_itself(sound):
    def partly(inputs):
        near = jnp.max(jnp.abs(inputs - toy.INPUTS[3:4]), axis=1) < 0.01
        return jnp.where(near[:, None], jnp.nan, toy.logits_fn(inputs))

    found, _ = judge(partly, "D6", "D10")
    expected = [*sound[0]["D6"]["distances"][:3], 0, *sound[0]["D6"]["distances"][4:]]
    np.testing.assert_allclose(found["D6"]["distances"], expected, rtol=1e-5)
    assert 0 < found["D10"]["temperature"] < 10


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
        probing.measure(toy.logits_fn, toy.KEYS, toy.INPUTS, toy.LABELS, **arguments)
