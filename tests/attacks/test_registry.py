"""Tests of the attack registry: names, options and what each entry runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gfa_jax
from gfa_jax import ThreatModel, attacks, losses

INPUTS = jnp.array([[0.5, 0.5, 0.4], [0.2, 0.6, 0.5]]).reshape(2, 1, 3, 1)
LABELS = jnp.array([0, 2])
THREAT = ThreatModel("l2", 0.2)
# Enough to run everything once.
FEW = {"num_steps": 3, "num_queries": 5, "num_samples": 2, "num_searches": 2}


def apply_fn(taps, inputs):
    weights = jnp.array([[4.0, -1.0, 0.5], [2.0, 3.0, -2.0], [-1.0, 0.5, 3.0]])
    hidden = jnp.tanh(inputs.reshape(len(inputs), -1)) + taps.get("hidden", 0)
    return hidden @ weights.astype(hidden.dtype), {"hidden": hidden}


def logits_fn(inputs):
    return apply_fn({}, inputs)[0]


def model_for(attack):
    needs_features = any(part.estimator.needs_features for part in attack.parts().values())
    return apply_fn if needs_features else logits_fn


def create_quick(name, threat):
    options = {
        option: number for option, number in FEW.items() if option in attacks.options_of(name)
    }
    return attacks.create(name, threat, **options)


def run(attack):
    keys = attacks.example_keys(jax.random.key(0), jnp.arange(2))
    return jax.jit(attack, static_argnums=0)(model_for(attack), keys, INPUTS, LABELS)


@pytest.mark.parametrize("name", sorted(attacks.REGISTRY))
def test_every_attack_runs_and_stays_allowed(name):
    attack = create_quick(name, THREAT)
    result = run(attack)
    assert isinstance(result, gfa_jax.types.AttackResult)
    assert result.adv_inputs.shape == INPUTS.shape
    assert result.adv_inputs.dtype == INPUTS.dtype
    for field in result[1:7]:
        assert field.shape == (2,)
    assert result.success.dtype == bool
    assert result.distance.dtype == result.loss.dtype == jnp.float32
    for counts in result[4:7]:
        assert counts.dtype == jnp.int32
    assert jnp.all(jnp.isfinite(result.adv_inputs))
    assert jnp.all((result.adv_inputs >= 0) & (result.adv_inputs <= 1))
    if attack.keep != "closest":
        assert np.all(np.asarray(result.distance) <= 0.2 * (1 + 1e-6))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("name", sorted(attacks.REGISTRY))
def test_inputs_keep_their_dtype_under_a_traced_radius(name, dtype):
    for norm in ("linf", "l2") if name == "deepfool" else ("linf", "l2", "l1"):

        def attack(epsilon, keys, inputs, labels, norm=norm):
            attack = create_quick(name, ThreatModel(norm, epsilon))
            return attack(model_for(attack), keys, inputs, labels)

        keys = jax.eval_shape(lambda: attacks.example_keys(jax.random.key(0), jnp.arange(2)))
        inputs = jax.ShapeDtypeStruct(INPUTS.shape, dtype)
        result = jax.eval_shape(attack, jnp.float32(0.1), keys, inputs, LABELS)
        assert result.adv_inputs.dtype == dtype
        assert result.distance.dtype == result.loss.dtype == jnp.float32


@pytest.mark.parametrize(
    ("name", "loss"), [("pgd", "cross_entropy"), ("pgd-margin", "margin"), ("pgd-dlr", "dlr")]
)
def test_named_variants_maximise_their_loss(name, loss):
    result = run(attacks.create(name, THREAT, num_steps=1, random_start=False, keep="last"))
    expected = losses.get(loss)(logits_fn(result.adv_inputs), LABELS)
    np.testing.assert_allclose(result.loss, expected, rtol=1e-5)


def test_options_reach_the_factory():
    result = run(attacks.create("pgd", THREAT, num_steps=3, random_start=False))
    np.testing.assert_array_equal(result.num_backwards, [3, 0])


def test_options_of_lists_the_keyword_options_with_their_defaults():
    assert set(attacks.options_of("fgsm")) == {
        "loss",
        "random_start",
        "step_size",
        "estimator",
    }
    options = attacks.options_of("pgd-margin")
    assert {"num_steps", "step_size", "num_restarts", "random_start", "keep"} <= set(options)
    assert options["loss"].default == "margin"
    assert options["num_steps"].default == 40


@pytest.mark.parametrize("function", [attacks.options_of, lambda n: attacks.create(n, THREAT)])
def test_unknown_attack_is_named_with_a_suggestion(function):
    with pytest.raises(ValueError, match=r"attack='pgd-margn' .* Did you mean 'pgd-margin'"):
        function("pgd-margn")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("pgd", {"num_step": 3}, "attack 'pgd' takes no option 'num_step'; .* mean 'num_steps'"),
        ("fgsm", {"num_steps": 3}, "attack 'fgsm' takes no option 'num_steps'; it takes .*'loss'"),
        ("pgd", {"num_steps": 0}, "num_steps=0 must be an integer >= 1"),
        ("pgd-dlr", {"threats": THREAT}, "attack 'pgd-dlr' takes no option 'threats'"),
    ],
)
def test_bad_options_are_named_with_what_is_known(name, options, message):
    with pytest.raises(ValueError, match=message):
        attacks.create(name, THREAT, **options)
