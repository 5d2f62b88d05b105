"""Noise, and weight perturbation: its size, its limits, and where it stands beside an attack."""

import pathlib
import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gfa_jax import ThreatModel, attacks, objectives, taps
from tests.objectives import toy

THREAT = ThreatModel(epsilon=0.1)


@pytest.fixture
def case(key):
    with jax.enable_x64(True):
        params_key, batch_key = jax.random.split(key)
        yield toy.linear_params(params_key), toy.batch(batch_key)


def test_noise_has_its_size_its_box_and_a_key_for_each_example(key):
    inputs = jnp.full((4, 5000), 0.5)
    keys = attacks.example_keys(key, jnp.arange(4))
    uniform = objectives.uniform_noise(0.2)(keys, inputs) - inputs
    assert 0.19 < jnp.max(jnp.abs(uniform)) <= 0.2 + 1e-6
    np.testing.assert_allclose(jnp.std(uniform), 0.2 / np.sqrt(3), rtol=0.03)
    normal = objectives.normal_noise(0.5)(keys, inputs) - inputs
    np.testing.assert_allclose(jnp.std(normal), 0.5, rtol=0.03)
    assert jnp.max(objectives.normal_noise(0.5, bounds=(0, 1))(keys, inputs)) == 1
    assert jnp.max(objectives.uniform_noise(0.7, bounds=None)(keys, inputs)) > 1
    permuted = objectives.uniform_noise(0.2)(keys[::-1], inputs)[::-1] - inputs
    chex.assert_trees_all_equal(permuted, uniform)


def test_noisy_of_no_noise_is_the_objective_and_of_noise_is_not(case, key):
    params, batch = case
    ce = objectives.cross_entropy()
    plain = ce(toy.linear, params, batch, key)
    none = objectives.noisy(objectives.uniform_noise(0.0), ce)(toy.linear, params, batch, key)
    chex.assert_trees_all_equal(none, plain)
    noisy = objectives.noisy(objectives.uniform_noise(0.2), ce)(toy.linear, params, batch, key)
    assert abs(noisy[0] - plain[0]) > 1e-4
    assert abs(noisy[1].model_state["mean"] - plain[1].model_state["mean"]) > 1e-4


def test_perturbation_of_zero_is_the_inner_objective_exactly(case, key):
    params, batch = case
    ce = objectives.cross_entropy()
    assert objectives.weight_perturbation(0.0, ce) is ce
    plain = toy.value_and_grad(ce, toy.linear)(params, batch, key)

    def traced(gamma):
        objective = objectives.weight_perturbation(gamma, ce)
        return toy.value_and_grad(objective, toy.linear)(params, batch, key)

    chex.assert_trees_all_equal(jax.jit(traced)(jnp.zeros(())), plain)


def test_perturbation_moves_kernels_along_their_gradient_by_their_share(case, key):
    params, batch = case
    seen = []

    def model(params, tap_values, inputs, *, train):
        seen.append(params)
        return toy.linear(params, tap_values, inputs, train=train)

    ce = objectives.cross_entropy()
    loss, aux = objectives.weight_perturbation(0.05, ce)(model, params, batch, key)
    gradient = jax.grad(lambda p: ce(toy.linear, p, batch, key)[0])(params)["kernel"]
    move = seen[-1]["kernel"] - params["kernel"]
    size = jnp.linalg.norm(params["kernel"])
    chex.assert_trees_all_close(
        move, 0.05 * size * gradient / jnp.linalg.norm(gradient), rtol=1e-10
    )
    chex.assert_trees_all_equal(seen[-1]["bias"], params["bias"])
    expected = ce(toy.linear, seen[-1], batch, key)
    chex.assert_trees_all_close((loss, aux), expected, rtol=1e-12)
    assert loss > ce(toy.linear, params, batch, key)[0]


def test_no_gradient_flows_through_the_perturbation(case, key):
    params, batch = case
    ce = objectives.cross_entropy()
    objective = objectives.weight_perturbation(0.05, ce)
    grads = toy.value_and_grad(objective, toy.linear)(params, batch, key)[1]
    gradient = jax.grad(lambda p: ce(toy.linear, p, batch, key)[0])(params)["kernel"]
    step = 0.05 * jnp.linalg.norm(params["kernel"]) / jnp.linalg.norm(gradient)
    moved = {**params, "kernel": params["kernel"] + step * gradient}
    expected = toy.value_and_grad(ce, toy.linear)(moved, batch, key)[1]
    chex.assert_trees_all_close(grads, expected, rtol=1e-10)


@pytest.mark.parametrize("scale", [0.0, 1e-30])
def test_perturbation_of_zero_and_tiny_gradients_is_finite(key, scale):
    params = toy.linear_params(key, jnp.float32)
    batch = toy.batch(key, jnp.float32)
    ce = objectives.cross_entropy()

    def scaled(model, params, batch, key):
        loss, aux = ce(model, params, batch, key)
        return scale * loss, aux

    seen = []

    def model(params, tap_values, inputs, *, train):
        seen.append(params)
        return toy.linear(params, tap_values, inputs, train=train)

    objectives.weight_perturbation(0.01, scaled)(model, params, batch, key)
    moved = jnp.linalg.norm(seen[-1]["kernel"] - params["kernel"])
    expected = 0.01 * jnp.linalg.norm(params["kernel"]) if scale else 0.0
    np.testing.assert_allclose(moved, expected, rtol=1e-3)


def test_inside_the_attack_the_attack_sees_the_weights_as_they_are(case, key):
    params, batch = case
    attack_kernels = []

    def attack(logits_fn, keys, inputs, labels, **options):
        attack_kernels.append(logits_fn(jnp.eye(4)) - logits_fn(jnp.zeros((4, 4))))
        return attacks.fgsm(THREAT)(logits_fn, keys, inputs, labels)

    inner = objectives.weight_perturbation(0.05, objectives.cross_entropy())
    objectives.adversarial(attack, inner)(toy.linear, params, batch, key)
    inner = objectives.weight_perturbation(0.05, objectives.trades(None, 6.0))
    _, aux = objectives.paired(attack, inner)(toy.linear, params, batch, key)
    assert len(attack_kernels) == 2
    for kernel in attack_kernels:
        chex.assert_trees_all_close(kernel, params["kernel"], rtol=1e-10, atol=1e-12)
    assert aux.metrics["divergence_penalty"] > 0


def test_perturbation_of_gfa_differentiates_twice(case, key):
    params, batch = toy.smooth_params(key), case[1]
    objective = objectives.weight_perturbation(0.05, objectives.gfa(1.0))
    (loss, aux), grads = toy.value_and_grad(objective, toy.smooth)(params, batch, key)
    chex.assert_tree_all_finite((loss, aux.metrics, grads))
    assert loss > objectives.gfa(1.0)(toy.smooth, params, batch, key)[0]


class Normalised(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(nn.Dense(5)(x))
        return nn.Dense(3)(nn.softplus(x))


OBJECTIVES = {
    "trades": objectives.trades(
        attacks.pgd(THREAT, loss="kl", num_steps=2, keep="last"), 6.0, attack_train_mode=True
    ),
    "mart": objectives.mart(attacks.fgsm(THREAT), 5.0),
    "logit_pairing": objectives.logit_pairing(attacks.fgsm(THREAT), 0.5),
    "logit_squeezing": objectives.logit_squeezing(0.5),
    "grad_align": objectives.grad_align(0.5, THREAT),
    "gradient_norm": objectives.gradient_norm(0.5),
    "jacobian_norm": objectives.jacobian_norm(0.5),
    "curvature": objectives.curvature(0.5, 0.3),
    "local_linearity": objectives.local_linearity(1.0, THREAT, num_steps=2),
    "gfa": objectives.gfa(0.5, target="log_odds"),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_batch_statistics_are_those_of_one_clean_pass(key, name):
    module, batch = Normalised(), toy.batch(key, jnp.float32)
    variables = dict(module.init(key, batch["inputs"]))
    params = variables.pop("params")
    model = taps.linen_model(module, variables, layers=["input"])
    (_, aux), grads = toy.value_and_grad(OBJECTIVES[name], model)(params, batch, key)
    _, updates = module.apply(
        {"params": params, **variables}, batch["inputs"], train=True, mutable=["batch_stats"]
    )
    chex.assert_trees_all_close(aux.model_state, updates, rtol=1e-5, atol=1e-6)
    chex.assert_tree_all_finite(grads)


def test_bad_options_are_refused_when_the_objective_is_made():
    ce = objectives.cross_entropy()
    with pytest.raises(ValueError, match="gamma=-0.1 must be a finite number >= 0"):
        objectives.weight_perturbation(-0.1, ce)
    with pytest.raises(ValueError, match="radius=-1.0"):
        objectives.uniform_noise(-1.0)
    with pytest.raises(ValueError, match="std=-1.0"):
        objectives.normal_noise(-1.0)
    with pytest.raises(ValueError, match="start_std=-1.0"):
        objectives.paired(attacks.fgsm(THREAT), ce, start_std=-1.0)


def test_every_objective_of_the_documentation_can_be_made():
    text = (pathlib.Path(__file__).parents[2] / "docs" / "objectives.md").read_text()
    rows = re.findall(r"^\| [^|]+ \| (`.+`) \| [^|]*\|$", text, flags=re.MULTILINE)
    expressions = [code for row in rows for code in re.findall(r"`([^`]+\))`", row)]
    assert len(expressions) >= 18
    names = {name: getattr(objectives, name) for name in objectives.__all__}
    names |= {"attacks": attacks, "threat": THREAT, "epsilon": 0.1, "weight": 0.5, "h": 0.3}
    names |= {"attack": attacks.fgsm(THREAT), "kl_attack": attacks.fgsm(THREAT)}
    for code in expressions:
        assert callable(eval(code.replace(", ...", ""), {**names, "label_smoothing": 0.1})), code
