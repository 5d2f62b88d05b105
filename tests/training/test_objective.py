"""From a config to its objective: each against the composition written out by hand."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import pytest

from gfa_jax import ThreatModel, attacks, objectives
from gfa_jax.config import (
    AttackConfig,
    GFAConfig,
    LossConfig,
    NoiseConfig,
    RegularizerConfig,
    ThreatConfig,
    TrainConfig,
)
from gfa_jax.training.objective import objective_at
from tests.objectives import toy

EPSILON = 0.1
THREAT = ThreatModel(epsilon=EPSILON)
PGD = AttackConfig(name="pgd", num_steps=2)
KL = AttackConfig(name="pgd", num_steps=2, loss="kl", start_std=0.01)


def model(params, taps, inputs, *, train):
    """``toy.smooth``; in evaluation mode, which attacks see by default, of the reversed inputs."""
    return toy.smooth(params, taps, inputs if train else inputs[:, ::-1], train=train)


@pytest.fixture
def case(key):
    params_key, batch_key = jax.random.split(key)
    return toy.smooth_params(params_key, jnp.float32), toy.batch(batch_key, jnp.float32)


def recipe(**parts):
    return TrainConfig(threat=ThreatConfig(epsilon=EPSILON), train_steps=100, **parts)


def gfa(weight=0.5, **options):
    return GFAConfig(weight=weight, warmup_fraction=0.0, **options)


def penalty(name="gradient_norm", weight=0.3, **options):
    return RegularizerConfig(name=name, weight=weight, **options)


def pgd(**options):
    return attacks.pgd(THREAT, num_steps=2, keep="last", **options)


ADV = objectives.at_adversarial
CE = objectives.cross_entropy
HAND = {
    "standard": (recipe(), CE()),
    "label smoothing": (recipe(loss=LossConfig(label_smoothing=0.2)), CE(0.2)),
    "gfa": (recipe(gfa=gfa()), objectives.gfa(0.5)),
    "gfa, smoothed": (
        recipe(gfa=gfa(), loss=LossConfig(label_smoothing=0.2)),
        objectives.sum_of(CE(0.2), objectives.gfa(0.5, cross_entropy_weight=0)),
    ),
    "pgd": (recipe(attack=PGD), objectives.adversarial(pgd(), CE())),
    "pgd in training mode": (
        recipe(attack=dataclasses.replace(PGD, train_mode=True, random_start=False)),
        objectives.adversarial(pgd(random_start=False), CE(), attack_train_mode=True),
    ),
    "gfa on pgd": (
        recipe(attack=PGD, gfa=gfa()),
        objectives.adversarial(pgd(), objectives.gfa(0.5)),
    ),
    "gfa at the clean inputs of pgd": (
        recipe(attack=PGD, gfa=gfa(inputs="clean")),
        objectives.paired(
            pgd(), objectives.sum_of(ADV(CE()), objectives.gfa(0.5, cross_entropy_weight=0))
        ),
    ),
    "a regulariser": (recipe(regularizers=(penalty(),)), objectives.gradient_norm(0.3)),
    "a regulariser's options": (
        recipe(regularizers=(penalty(options={"norm": "l1", "squared": False}),)),
        objectives.gradient_norm(0.3, "l1", squared=False),
    ),
    "a regulariser of weight 0": (recipe(regularizers=(penalty("nowhere.py:f", 0.0),)), CE()),
    "a regulariser beside gfa": (
        recipe(gfa=gfa(), regularizers=(penalty(),)),
        objectives.sum_of(
            objectives.gfa(0.5), objectives.gradient_norm(0.3, cross_entropy_weight=0)
        ),
    ),
    "fgsm with grad_align": (
        recipe(
            attack=AttackConfig(name="fgsm", random_start=False),
            regularizers=(penalty("grad_align"),),
        ),
        objectives.paired(
            attacks.fgsm(THREAT),
            objectives.sum_of(
                ADV(CE()), objectives.grad_align(0.3, THREAT, cross_entropy_weight=0)
            ),
        ),
    ),
    "a regulariser at adversarial inputs": (
        recipe(attack=PGD, regularizers=(penalty(inputs="attacked"),)),
        objectives.adversarial(pgd(), objectives.gradient_norm(0.3)),
    ),
    "two regularisers, the second at adversarial inputs": (
        recipe(attack=PGD, regularizers=(penalty(), penalty("jacobian_norm", inputs="attacked"))),
        objectives.paired(
            pgd(),
            objectives.sum_of(
                ADV(objectives.jacobian_norm(0.3)),
                objectives.gradient_norm(0.3, cross_entropy_weight=0),
            ),
        ),
    ),
    "trades": (
        recipe(loss=LossConfig(name="trades", beta=3.0), attack=KL),
        objectives.trades(pgd(loss="kl"), 3.0, start_std=0.01),
    ),
    "mart": (
        recipe(loss=LossConfig(name="mart", beta=3.0), attack=PGD),
        objectives.mart(pgd(), 3.0, start_std=None),
    ),
    "logit pairing": (
        recipe(loss=LossConfig(name="logit_pairing", beta=0.5), attack=PGD),
        objectives.logit_pairing(pgd(), 0.5),
    ),
    "trades and gfa": (
        recipe(loss=LossConfig(name="trades", beta=3.0), attack=KL, gfa=gfa()),
        objectives.paired(
            pgd(loss="kl"),
            objectives.sum_of(
                objectives.trades(None, 3.0), ADV(objectives.gfa(0.5, cross_entropy_weight=0))
            ),
            start_std=0.01,
        ),
    ),
    "awp": (
        recipe(loss=LossConfig(weight_perturbation=0.05), attack=PGD),
        objectives.adversarial(pgd(), objectives.weight_perturbation(0.05, CE())),
    ),
    "trades and awp": (
        recipe(loss=LossConfig(name="trades", beta=3.0, weight_perturbation=0.05), attack=KL),
        objectives.paired(
            pgd(loss="kl"),
            objectives.weight_perturbation(0.05, objectives.trades(None, 3.0)),
            start_std=0.01,
        ),
    ),
    "n_fgsm": (
        recipe(
            noise=NoiseConfig(name="uniform", scale=2 * EPSILON),
            attack=AttackConfig(name="fgsm", random_start=False),
        ),
        objectives.n_fgsm(THREAT),
    ),
    "normal noise": (
        recipe(noise=NoiseConfig(name="normal", scale=0.2)),
        objectives.noisy(objectives.normal_noise(0.2), CE()),
    ),
}


def test_ceilings_are_those_of_aligned_layers(case, key):
    params, batch = case
    config = recipe(gfa=GFAConfig(weight=1.0, warmup_fraction=0.0))
    build = functools.partial(objective_at, config, {"input": 1.0}, {})
    step = jnp.zeros((), jnp.int32)
    plain, whole, low, elsewhere = (
        float(jax.jit(functools.partial(build(ceilings)(step), model))(params, batch, key)[0])
        for ceilings in ({}, {"input": 1.0}, {"input": 1e-3}, {"not aligned": 1e-3})
    )
    assert plain == whole == elsewhere < low


@pytest.mark.parametrize("name", HAND)
def test_a_config_is_its_composition(case, key, name):
    """Loss, gradient and metrics; every part with a weight that a test can see."""
    params, batch = case
    config, by_hand = HAND[name]
    weights = {".*": 1.0} if config.gfa.weight else {}
    built = objective_at(config, weights, {})(jnp.zeros((), jnp.int32))
    left, right = (
        jax.jit(toy.value_and_grad(objective, model))(params, batch, key)
        for objective in (built, by_hand)
    )
    chex.assert_trees_all_close(left, right, rtol=1e-5, atol=1e-6)
    if name not in ("standard", "a regulariser of weight 0"):
        plain = jax.jit(toy.value_and_grad(CE(), model))(params, batch, key)
        distances = jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b)), left[1], plain[1])
        assert max(jax.tree.leaves(distances)) > 1e-4


SCHEDULES = {
    "gfa": (
        recipe(gfa=GFAConfig(weight=0.5, warmup_fraction=0.5)),
        lambda share: objectives.gfa(0.5 * min(1, share / 0.5)),
    ),
    "regulariser": (
        recipe(regularizers=(penalty(warmup_fraction=0.2),)),
        lambda share: objectives.gradient_norm(0.3 * min(1, share / 0.2)),
    ),
    "radius": (
        recipe(attack=AttackConfig(name="fgsm", random_start=False, warmup_fraction=0.5)),
        lambda share: objectives.adversarial(
            attacks.fgsm(ThreatModel(epsilon=EPSILON * min(1, share / 0.5))), CE()
        ),
    ),
    "step size follows the radius": (
        recipe(attack=dataclasses.replace(PGD, step_size=0.04, warmup_fraction=0.5)),
        lambda share: objectives.adversarial(
            attacks.pgd(
                ThreatModel(epsilon=EPSILON * min(1, share / 0.5)),
                num_steps=2,
                step_size=max(1e-9, 0.04 * min(1, share / 0.5)),
                keep="last",
            ),
            CE(),
        ),
    ),
    "noise": (
        recipe(noise=NoiseConfig(name="normal", scale=0.2, warmup_fraction=0.4)),
        lambda share: objectives.noisy(objectives.normal_noise(0.2 * min(1, share / 0.4)), CE()),
    ),
    "awp": (
        recipe(loss=LossConfig(weight_perturbation=0.1, weight_perturbation_start=0.3)),
        lambda share: objectives.weight_perturbation(0.1 if share >= 0.3 else 0.0, CE()),
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_follow_the_step(case, key, name):
    params, batch = case
    config, by_hand = SCHEDULES[name]
    weights = {".*": 1.0} if config.gfa.weight else {}
    build = objective_at(config, weights, {})

    @jax.jit
    def at(step):  # traced, as in training
        return toy.value_and_grad(build(step), model)(params, batch, key)

    losses = []
    for step in (0, 10, 29, 30, 99):
        (loss, _), grads = at(jnp.asarray(step))
        (expected, _), expected_grads = toy.value_and_grad(by_hand(step / 100), model)(
            params, batch, key
        )
        chex.assert_trees_all_close((loss, grads), (expected, expected_grads), rtol=1e-4, atol=1e-6)
        losses.append(float(loss))
    assert abs(losses[-1] - losses[0]) > 1e-4


def test_options_that_a_part_refuses_are_refused_at_once():
    with pytest.raises(ValueError, match=r"config.regularizers\[1\]: .* needs the option 'h'"):
        objective_at(recipe(regularizers=(penalty(), penalty("curvature"))), {}, {})
    with pytest.raises(ValueError, match=r"config.regularizers\[0\]: norm='l3' is not one of"):
        objective_at(recipe(regularizers=(penalty(options={"norm": "l3"}),)), {}, {})
    with pytest.raises(ValueError, match="there is no file 'nowhere.py'"):
        objective_at(recipe(regularizers=(penalty("nowhere.py:f"),)), {}, {})
