"""TRADES, MART, logit pairing and N-FGSM against their equations in NumPy, and their limits."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from gfa_jax import ThreatModel, attacks, losses, objectives
from tests.objectives import toy

THREAT = ThreatModel(epsilon=0.1)
KL_ATTACK = attacks.pgd(THREAT, loss="kl", num_steps=3, step_size=0.05, keep="last")
ATTACK = attacks.pgd(THREAT, num_steps=3, step_size=0.05, keep="last")

PAIRS = {
    "trades": functools.partial(objectives.trades, beta=6.0),
    "mart": functools.partial(objectives.mart, beta=5.0),
    "logit_pairing": functools.partial(objectives.logit_pairing, weight=0.5),
}


@pytest.fixture
def case(key):
    with jax.enable_x64(True):
        params_key, batch_key = jax.random.split(key)
        yield toy.linear_params(params_key), toy.batch(batch_key)


def with_pairs(batch, key):
    noise = jax.random.uniform(key, batch["inputs"].shape, batch["inputs"].dtype, -0.3, 0.3)
    return {**batch, "adv_inputs": batch["inputs"] + noise}


def numpy_parts(params, batch):
    labels = np.asarray(batch["labels"])
    clean, adv = (
        toy.softmax(toy.linear_logits(params, batch[name])) for name in ("inputs", "adv_inputs")
    )
    kl = np.sum(clean * (np.log(clean) - np.log(adv)), axis=1)
    return labels, clean, adv, kl


def test_trades_is_its_equation(case, key):
    params, batch = case
    batch = with_pairs(batch, key)
    labels, clean, adv, kl = numpy_parts(params, batch)
    loss, aux = objectives.trades(None, 6.0)(toy.linear, params, batch, key)
    chex.assert_trees_all_close(
        loss, np.mean(-toy.log_probs_at(clean, labels) + 6.0 * kl), rtol=1e-12
    )
    chex.assert_trees_all_close(aux.metrics["divergence_penalty"], np.mean(kl), rtol=1e-12)
    chex.assert_trees_all_close(
        aux.metrics["adversarial_accuracy"], np.mean(adv.argmax(1) == labels), rtol=1e-6
    )


def test_mart_is_its_equation(case, key):
    params, batch = case
    batch = with_pairs(batch, key)
    labels, clean, adv, kl = numpy_parts(params, batch)
    rows = np.arange(len(labels))
    others = adv.copy()
    others[rows, labels] = 0
    boosted = -toy.log_probs_at(adv, labels) - np.log(1 - others.max(axis=1))
    expected = np.mean(boosted + 5.0 * kl * (1 - clean[rows, labels]))
    loss, aux = objectives.mart(None, 5.0)(toy.linear, params, batch, key)
    chex.assert_trees_all_close(loss, expected, rtol=1e-12)
    chex.assert_trees_all_close(aux.metrics["boosted_cross_entropy"], np.mean(boosted), rtol=1e-12)


def test_logit_pairing_is_its_equation(case, key):
    params, batch = case
    batch = with_pairs(batch, key)
    labels, clean, adv, _ = numpy_parts(params, batch)
    difference = toy.linear_logits(params, batch["inputs"] - batch["adv_inputs"]) - np.asarray(
        params["bias"]
    )
    expected = np.mean(
        -0.75 * toy.log_probs_at(clean, labels)
        - 0.25 * toy.log_probs_at(adv, labels)
        + 0.5 * np.sum(difference**2, axis=1)
    )
    objective = objectives.logit_pairing(None, 0.5, adversarial_share=0.25)
    loss, _ = objective(toy.linear, params, batch, key)
    chex.assert_trees_all_close(loss, expected, rtol=1e-12)


@pytest.mark.parametrize("name", PAIRS)
def test_gradients_agree_with_float64_differences(key, name):
    """At given pairs: through the clean and the adversarial side, and MART's factor."""
    with jax.enable_x64(True):
        params, batch = toy.smooth_params(key), with_pairs(toy.batch(key), key)
        objective = PAIRS[name](None)
        check_grads(
            jax.jit(lambda params: objective(toy.smooth, params, batch, key)[0]),
            (params,),
            order=1,
            modes=["rev"],
            eps=1e-6,
            rtol=1e-5,
            atol=1e-6,
        )


def test_beta_zero_is_standard_training(case, key):
    params, batch = case
    plain = toy.value_and_grad(objectives.cross_entropy(), toy.linear)(params, batch, key)
    zero = toy.value_and_grad(objectives.trades(KL_ATTACK, 0.0), toy.linear)(params, batch, key)
    chex.assert_trees_all_equal(zero, plain)

    def traced(beta):
        objective = objectives.trades(KL_ATTACK, beta)
        return toy.value_and_grad(objective, toy.linear)(params, batch, key)

    (loss, _), grads = jax.jit(traced)(jnp.zeros(()))
    chex.assert_trees_all_close((loss, grads), (plain[0][0], plain[1]), rtol=1e-12)


def test_pairing_of_weight_zero_and_one_share_is_adversarial_training(case, key):
    params, batch = case
    fgsm = attacks.fgsm(THREAT)
    pairing = objectives.logit_pairing(fgsm, 0.0, adversarial_share=1.0)
    training = objectives.adversarial(fgsm, objectives.cross_entropy())
    results = [
        toy.value_and_grad(objective, toy.linear)(params, batch, key)
        for objective in (pairing, training)
    ]
    chex.assert_trees_all_close(
        *((loss, grads) for (loss, _), grads in results), rtol=1e-12, atol=1e-14
    )


def test_the_attack_of_trades_starts_at_normal_noise_and_no_gradient_flows_through(case, key):
    params, batch = case
    starts = []

    def attack(logits_fn, keys, inputs, labels, *, start=None):
        starts.append(None if start is None else start - inputs)
        return KL_ATTACK(logits_fn, keys, inputs, labels, start=start)

    loss, grads = jax.value_and_grad(
        lambda p: objectives.trades(attack, 6.0)(toy.linear, p, batch, key)[0]
    )(params)
    noise = np.asarray(starts[0])
    assert 0.0005 < noise.std() < 0.002
    assert abs(noise.mean()) < 0.001
    attack_key, objective_key = jax.random.split(key)
    attack_key, _ = jax.random.split(attack_key)
    adv_inputs = KL_ATTACK(
        lambda x: toy.linear(params, {}, x, train=False)[0][0],
        attacks.example_keys(attack_key, jnp.arange(6)),
        **batch,
        start=batch["inputs"] + starts[0],
    ).adv_inputs
    assert jnp.max(jnp.abs(adv_inputs - batch["inputs"])) > 0.09
    fixed = {**batch, "adv_inputs": adv_inputs}
    expected = jax.value_and_grad(
        lambda p: objectives.trades(None, 6.0)(toy.linear, p, fixed, objective_key)[0]
    )(params)
    chex.assert_trees_all_close((loss, grads), expected, rtol=1e-10)
    objectives.trades(attack, 6.0, start_std=None)(toy.linear, params, batch, key)
    assert starts[-1] is None


def test_boosted_cross_entropy_is_finite_where_the_rival_is_certain(key):
    params = {"kernel": jnp.zeros((4, 3)), "bias": jnp.array([0.0, 200.0, -100.0])}
    batch = toy.batch(key, jnp.float32)
    batch = {**batch, "adv_inputs": batch["inputs"], "labels": jnp.zeros(6, int)}
    (loss, _), grads = toy.value_and_grad(objectives.mart(None, 5.0), toy.linear)(
        params, batch, key
    )
    # Both terms are 200 to float32.
    np.testing.assert_allclose(loss, 400.0, rtol=1e-6)
    chex.assert_tree_all_finite(grads)


@pytest.mark.parametrize("name", PAIRS)
def test_zero_networks_give_finite_gradients(key, name):
    params = jax.tree.map(jnp.zeros_like, toy.linear_params(key, jnp.float32))
    objective = PAIRS[name](KL_ATTACK if name == "trades" else ATTACK)
    (loss, aux), grads = toy.value_and_grad(objective, toy.linear)(
        params, toy.batch(key, jnp.float32), key
    )
    chex.assert_tree_all_finite((loss, aux.metrics, grads))


def test_gfa_adds_to_trades(case, key):
    params, batch = toy.smooth_params(key), case[1]
    trades = objectives.trades(KL_ATTACK, 6.0)
    gfa = objectives.gfa(0.7, target="log_odds", cross_entropy_weight=0)
    (loss, aux), grads = toy.value_and_grad(objectives.sum_of(trades, gfa), toy.smooth)(
        params, batch, key
    )
    keys = jax.random.split(key)
    parts = [
        toy.value_and_grad(objective, toy.smooth)(params, batch, term_key)
        for objective, term_key in zip((trades, gfa), keys, strict=True)
    ]
    chex.assert_trees_all_close(loss, parts[0][0][0] + parts[1][0][0], rtol=1e-12)
    expected = jax.tree.map(jnp.add, parts[0][1], parts[1][1])
    chex.assert_trees_all_close(grads, expected, rtol=1e-10)
    value = parts[1][0][1].metrics["alignment_penalty"]
    chex.assert_trees_all_close(parts[1][0][0], 0.7 * value, rtol=1e-12)
    chex.assert_trees_all_close(aux.metrics["alignment_penalty"], value, rtol=1e-12)
    assert value > 1e-3


def test_n_fgsm_is_a_step_of_epsilon_from_noise_without_clipping_to_the_ball(case, key):
    params, batch = case
    seen = []

    def model(params, taps, inputs, *, train):
        if train:
            seen.append(inputs)
        return toy.linear(params, taps, inputs, train=train)

    objectives.n_fgsm(THREAT)(model, params, batch, key)
    noise_key, _ = jax.random.split(key)
    noise = objectives.uniform_noise(0.2)(
        attacks.example_keys(noise_key, jnp.arange(6)), batch["inputs"]
    )
    gradient = toy.linear_gradient(params, noise, batch["labels"])
    expected = np.clip(np.asarray(noise) + 0.1 * np.sign(gradient), 0, 1)
    chex.assert_trees_all_close(seen[0], expected, rtol=1e-12)
    moved = jnp.abs(seen[0] - batch["inputs"])
    assert 0.15 < jnp.max(moved) <= 0.3 + 1e-9
    objectives.n_fgsm(THREAT, noise_scale=1.0, step_size=0.01)(model, params, batch, key)
    assert jnp.max(jnp.abs(seen[1] - batch["inputs"])) <= 0.11 + 1e-9


def test_n_fgsm_without_noise_is_fgsm_training_and_pgd_of_one_full_step(case, key):
    params, batch = case
    ce = objectives.cross_entropy()
    one_step = attacks.pgd(THREAT, num_steps=1, step_size=0.1, random_start=False, keep="last")
    results = [
        toy.value_and_grad(objective, toy.linear)(params, batch, key)[1]
        for objective in (
            objectives.n_fgsm(THREAT, noise_scale=0.0),
            objectives.adversarial(attacks.fgsm(THREAT), ce),
            objectives.adversarial(one_step, ce),
        )
    ]
    chex.assert_trees_all_close(*results, rtol=1e-12)


@pytest.mark.parametrize("name", PAIRS)
def test_statistics_come_from_the_pass_asked_for(case, key, name):
    params, batch = case
    batch = with_pairs(batch, key)
    for statistics, inputs in (("clean", "inputs"), ("adversarial", "adv_inputs")):
        _, aux = PAIRS[name](None, statistics=statistics)(toy.linear, params, batch, key)
        chex.assert_trees_all_close(aux.model_state["mean"], jnp.mean(batch[inputs]), rtol=1e-12)


@pytest.mark.parametrize("attack_train_mode", [False, True])
@pytest.mark.parametrize("name", [*PAIRS, "n_fgsm"])
def test_the_attack_sees_the_mode_asked_for(case, key, name, attack_train_mode):
    params, batch = case
    modes = []

    def model(params, taps, inputs, *, train):
        modes.append(train)
        return toy.linear(params, taps, inputs, train=train)

    options = {"attack_train_mode": attack_train_mode}
    fgsm = attacks.fgsm(THREAT)
    objective = (
        objectives.n_fgsm(THREAT, **options) if name == "n_fgsm" else PAIRS[name](fgsm, **options)
    )
    objective(model, params, batch, key)
    num_passes = 1 if name == "n_fgsm" else 2
    assert len(modes) > num_passes
    assert set(modes[:-num_passes]) == {attack_train_mode}
    assert modes[-num_passes:] == [True] * num_passes


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: objectives.trades(ATTACK, -1.0), "beta=-1.0 must be a finite number >= 0"),
        (lambda: objectives.mart(ATTACK, 1.0, statistics="both"), "statistics='both' is not one"),
        (lambda: objectives.trades(ATTACK, 1.0, start_std=0.0), "start_std=0.0"),
        (lambda: objectives.logit_pairing(ATTACK, 1.0, adversarial_share=2.0), "adversarial_share"),
        (lambda: objectives.n_fgsm(ThreatModel("l2", 0.5)), "norm='l2'.*'linf' alone"),
        (lambda: objectives.n_fgsm(THREAT, noise_scale=-1), "noise_scale=-1"),
        (lambda: objectives.n_fgsm(THREAT, step_size=0), "step_size=0 must be"),
    ],
)
def test_bad_options_are_refused_when_the_objective_is_made(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_batch_without_pairs_is_refused(case, key):
    with pytest.raises(ValueError, match="'adv_inputs'.*paired"):
        objectives.trades(None, 6.0)(toy.linear, *case, key)


def test_label_smoothing_is_cross_entropy_with_soft_targets(case, key):
    params, batch = case
    log_probs = np.log(toy.softmax(toy.linear_logits(params, batch["inputs"])))
    targets = 0.7 * np.eye(3)[np.asarray(batch["labels"])] + 0.1
    loss, aux = objectives.cross_entropy(0.3)(toy.linear, params, batch, key)
    chex.assert_trees_all_close(loss, -np.mean(np.sum(targets * log_probs, 1)), rtol=1e-12)
    plain = losses.cross_entropy(
        toy.linear(params, {}, batch["inputs"], train=True)[0][0], batch["labels"]
    )
    chex.assert_trees_all_close(aux.metrics["cross_entropy"], jnp.mean(plain), rtol=1e-12)
    with pytest.raises(ValueError, match=r"label_smoothing=1.5 must be a number in \[0, 1\]"):
        objectives.cross_entropy(1.5)
