"""Objectives: the GFA loss by hand, its second order against float64, its limits, and
composition."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from gfa_jax import ThreatModel, alignment, attacks, losses, objectives, taps
from gfa_jax.models import create

LAYERS = ["normalize", "block_[0-9]+"]


class Smooth(nn.Module):
    """A small network with a smooth activation, so that differences of any size are exact
    enough."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.softplus(nn.Dense(5, name="first")(x.reshape(x.shape[0], -1)))
        x = nn.softplus(nn.Dense(5, name="second")(x))
        return nn.Dense(3, name="head")(x)


@pytest.fixture
def case(key):
    """A ReLU model function, its parameters and a batch."""
    module = create("cnn4", num_classes=4, width=0.25, input_mean=(0.3,), input_std=(0.4,))
    inputs = jax.random.uniform(key, (8, 8, 8, 1))
    batch = {"inputs": inputs, "labels": jnp.arange(8) % 4}
    params = jax.jit(module.init)(key, inputs)["params"]
    return taps.linen_model(module, layers=LAYERS), params, batch


def value_and_grad(objective, model):
    return jax.jit(jax.value_and_grad(functools.partial(objective, model), has_aux=True))


def flat(tree):
    return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])


def test_loss_is_cross_entropy_plus_the_weighted_mean_penalty(case, key):
    model, params, batch = case
    weights, norms = {"normalize": 3.0, "block_.*": 0.5}, {"normalize": "linf"}
    ceiling = 0.004
    objective = objectives.gfa(
        0.7,
        layer_weights=weights,
        layer_norms=norms,
        layer_ceilings={"normalize": ceiling},
        target="log_odds",
        form="linear",
    )
    loss, aux = jax.jit(functools.partial(objective, model))(params, batch, key)

    @jax.jit
    def gradients(params):
        apply_fn = lambda tap_values, x: model(params, tap_values, x, train=True)[0]  # noqa: E731
        return taps.feature_gradients(apply_fn, batch["inputs"], batch["labels"])

    logits, features, grads = gradients(params)
    total, weight_sum = 0.0, 0.0
    for name in features:
        norm, weight = ("linf", 3.0) if name == "normalize" else ("l2", 0.5)
        cosine = alignment.alignment(features[name], grads[name], norm)
        chex.assert_trees_all_close(aux.metrics[f"alignment/{name}"], jnp.mean(cosine), rtol=1e-5)
        if name == "normalize":
            assert 0 < jnp.sum(cosine > ceiling) < len(cosine)
            cosine = jnp.minimum(cosine, ceiling)
        total, weight_sum = total + weight * jnp.mean(1 - cosine), weight_sum + weight
    ce = jnp.mean(losses.cross_entropy(logits, batch["labels"]))
    chex.assert_trees_all_close(loss, ce + 0.7 * total / weight_sum, rtol=1e-5)
    chex.assert_trees_all_close(aux.metrics["cross_entropy"], ce, rtol=1e-5)
    chex.assert_trees_all_close(aux.metrics["alignment_penalty"], total / weight_sum, rtol=1e-5)


@pytest.mark.parametrize("target", ["sampled_margin", "cross_entropy", "log_odds"])
@pytest.mark.parametrize("form", alignment.FORMS)
def test_second_order_agrees_with_float64_differences(key, target, form):
    module = Smooth()
    with jax.enable_x64(True):
        inputs = jax.random.normal(key, (3, 4), jnp.float64)
        batch = {"inputs": inputs, "labels": jnp.arange(3)}
        params = jax.tree.map(lambda v: v.astype(jnp.float64), module.init(key, inputs)["params"])
        model = taps.linen_model(module, layers=["input", "first", "second"])
        objective = functools.partial(objectives.gfa(2.0, target=target, form=form), model)
        check_grads(
            jax.jit(lambda params: objective(params, batch, key)[0]),
            (params,),
            order=1,
            modes=["rev"],
            eps=1e-6,
            rtol=1e-5,
            atol=1e-6,
        )


def test_weight_zero_is_the_plain_step_exactly(case, key):
    model, params, batch = case
    plain = value_and_grad(objectives.cross_entropy(), model)(params, batch, key)
    zero = value_and_grad(objectives.gfa(0.0), model)(params, batch, key)
    chex.assert_trees_all_equal(zero, plain)

    def traced(weight):
        return value_and_grad(objectives.gfa(weight), model)(params, batch, key)

    (loss, _), grads = jax.jit(traced)(jnp.zeros(()))
    chex.assert_trees_all_close((loss, grads), (plain[0][0], plain[1]), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("target", ["sampled_margin", "log_odds"])
def test_finite_difference_gradient_points_where_the_exact_one_does(key, target):
    """On the network of the digits recipes: narrower ones average over fewer kinks."""
    module = create("cnn4", num_classes=10, input_mean=(0.305,), input_std=(0.376,))
    inputs = jax.random.uniform(key, (64, 8, 8, 1))
    batch = {"inputs": inputs, "labels": jnp.arange(64) % 10}
    params = jax.jit(module.init)(key, inputs)["params"]
    model = taps.linen_model(module, layers=LAYERS)
    plain = flat(value_and_grad(objectives.cross_entropy(), model)(params, batch, key)[1])
    results = {}
    for second_order in objectives.SECOND_ORDER:
        objective = objectives.gfa(
            1.0, target=target, second_order=second_order, layer_norms={"normalize": "linf"}
        )
        (loss, aux), grads = value_and_grad(objective, model)(params, batch, key)
        results[second_order] = loss, aux.metrics, flat(grads) - plain
    exact, approximate = (results[name] for name in objectives.SECOND_ORDER)
    chex.assert_trees_all_close(exact[:2], approximate[:2], rtol=1e-4, atol=1e-6)
    cosine = exact[2] @ approximate[2] / jnp.linalg.norm(exact[2]) / jnp.linalg.norm(approximate[2])
    assert cosine >= 0.9
    assert 0.8 < jnp.linalg.norm(approximate[2]) / jnp.linalg.norm(exact[2]) < 1.25


def test_finite_difference_converges_to_the_exact_gradient_of_a_smooth_network(key):
    module = Smooth()
    with jax.enable_x64(True):
        inputs = jax.random.normal(key, (6, 4), jnp.float64)
        batch = {"inputs": inputs, "labels": jnp.arange(6) % 3}
        params = jax.tree.map(lambda v: v.astype(jnp.float64), module.init(key, inputs)["params"])
        model = taps.linen_model(module, layers=["first", "second"])

        def gradient(**options):
            objective = functools.partial(objectives.gfa(1.0, **options), model)
            return flat(jax.jit(jax.grad(objective, has_aux=True))(params, batch, key)[0])

        exact = gradient()
        errors = [
            jnp.linalg.norm(gradient(second_order="finite_difference", displacement=d) - exact)
            for d in (1e-2, 1e-4)
        ]
        assert errors[0] < 0.05 * jnp.linalg.norm(exact)
        assert errors[1] < 0.02 * errors[0]


@pytest.mark.parametrize("second_order", objectives.SECOND_ORDER)
@pytest.mark.parametrize("broken", ["zero_images", "dead_units", "zero_head"])
def test_zero_features_and_gradients_give_no_nan(case, key, second_order, broken):
    model, params, batch = case
    if broken == "zero_images":
        batch = {**batch, "inputs": jnp.full_like(batch["inputs"], 0.3)}
    elif broken == "dead_units":
        params = {**params, "block_1": jax.tree.map(lambda v: -jnp.abs(v), params["block_1"])}
    else:
        params = {**params, "head": jax.tree.map(jnp.zeros_like, params["head"])}
    objective = objectives.gfa(1.0, second_order=second_order, layer_norms={"normalize": "linf"})
    (loss, aux), grads = value_and_grad(objective, model)(params, batch, key)
    assert np.isfinite(loss)
    chex.assert_tree_all_finite((grads, aux.metrics))
    assert aux.metrics["zero_gradients"] > 0


def test_sampled_margin_draws_with_the_key(case, key):
    model, params, batch = case
    objective = functools.partial(objectives.gfa(1.0), model)
    first, again = (objective(params, batch, key)[0] for _ in range(2))
    other = objective(params, batch, jax.random.key(7))[0]
    assert first == again
    assert first != other


def test_a_layer_of_weight_zero_is_left_out(case, key):
    model, params, batch = case
    objective = objectives.gfa(1.0, layer_weights={"normalize": 0.0}, target="log_odds")
    _, aux = objective(model, params, batch, key)
    names = {name for name in aux.metrics if name.startswith("alignment/")}
    assert names == {f"alignment/block_{i}" for i in range(4)}


def test_adversarial_evaluates_the_objective_at_the_attacked_inputs(case, key):
    model, params, batch = case
    attack = attacks.fgsm(ThreatModel(epsilon=0.1))
    loss, aux = objectives.adversarial(attack, objectives.cross_entropy())(
        model, params, batch, key
    )
    logits_fn = lambda x: model(params, {}, x, train=False)[0][0]  # noqa: E731
    adv_inputs = attack(logits_fn, None, batch["inputs"], batch["labels"]).adv_inputs
    expected = jnp.mean(losses.cross_entropy(logits_fn(adv_inputs), batch["labels"]))
    chex.assert_trees_all_close(loss, expected, rtol=1e-5)
    clean = objectives.cross_entropy()(model, params, batch, key)[0]
    assert loss > clean
    assert aux.metrics["loss"] == loss


def test_no_gradient_flows_through_the_attack(case, key):
    model, params, batch = case
    attack = attacks.pgd(ThreatModel(epsilon=0.1), num_steps=2, keep="last")
    objective = objectives.adversarial(attack, objectives.cross_entropy())
    attack_key, _ = jax.random.split(key)
    keys = attacks.example_keys(attack_key, jnp.arange(8))
    logits_fn = lambda x: model(params, {}, x, train=False)[0][0]  # noqa: E731
    adv_inputs = attack(logits_fn, keys, batch["inputs"], batch["labels"]).adv_inputs
    fixed = {**batch, "inputs": adv_inputs}
    expected = value_and_grad(objectives.cross_entropy(), model)(params, fixed, key)[1]
    chex.assert_trees_all_close(
        value_and_grad(objective, model)(params, batch, key)[1], expected, rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("attack_train_mode", [False, True])
def test_the_attack_sees_batchnorm_in_the_mode_asked_for(key, attack_train_mode):
    modes = []

    def model(params, tap_values, inputs, *, train):
        modes.append(train)
        return (inputs @ params, {}), {}

    def attack(logits_fn, keys, inputs, labels):
        logits_fn(inputs)
        return attacks.fgsm(ThreatModel())(lambda x: x @ jnp.eye(3), None, inputs, labels)

    objective = objectives.adversarial(
        attack, objectives.cross_entropy(), attack_train_mode=attack_train_mode
    )
    objective(model, jnp.eye(3), {"inputs": jnp.ones((2, 3)), "labels": jnp.arange(2)}, key)
    assert modes == [attack_train_mode, True]


def test_sum_of_adds_losses_and_names_metrics(case, key):
    model, params, batch = case
    single = objectives.cross_entropy()
    total, aux = objectives.sum_of(single, single)(model, params, batch, key)
    chex.assert_trees_all_close(total, 2 * single(model, params, batch, key)[0], rtol=1e-6)
    assert aux.metrics["loss"] == total
    assert "term_2/cross_entropy" in aux.metrics
    with pytest.raises(ValueError, match="at least one"):
        objectives.sum_of()


def test_batch_statistics_come_back(key):
    module = create("cnn7", num_classes=3, homogeneous=False, width=0.05)
    inputs = jax.random.uniform(key, (4, 24, 24, 3))
    variables = dict(jax.jit(module.init)(key, inputs))
    params = variables.pop("params")
    model = taps.linen_model(module, variables, layers=["normalize", "dense_0"])
    batch = {"inputs": inputs, "labels": jnp.array([0, 1, 2, 0])}
    _, aux = jax.jit(functools.partial(objectives.gfa(1.0), model))(params, batch, key)
    _, updates = module.apply(
        {"params": params, **variables}, inputs, train=True, mutable=["batch_stats"]
    )
    chex.assert_trees_all_close(aux.model_state, updates, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": -1.0}, "weight=-1.0 must be a finite number >= 0"),
        ({"target": "logodds"}, "target='logodds'.*Did you mean 'log_odds'"),
        ({"form": "cubic"}, "form='cubic' is not one of"),
        ({"second_order": "exactly"}, "second_order='exactly'.*Did you mean 'exact'"),
        ({"displacement": 1.5}, r"displacement=1.5 must lie in \(0, 1\)"),
        ({"layer_norms": {"a": "l3"}}, r"layer_norms\['a'\]='l3' is not one of"),
        ({"layer_ceilings": {"a": 0.0}}, r"layer_ceilings\['a'\]=0.0 must lie in \(0, 1\]"),
        ({"form": "tangential", "layer_ceilings": {"a": 0.5}}, "'tangential' has no ceiling"),
        ({"layer_weights": {"a": -2.0}}, r"layer_weights\['a'\]=-2.0"),
        ({"form": "tangential", "layer_norms": {"a": "linf"}}, "defined for the norm 'l2' alone"),
    ],
)
def test_bad_options_are_refused_when_the_objective_is_made(options, message):
    with pytest.raises(ValueError, match=message):
        objectives.gfa(**options)


def test_patterns_and_taps_that_do_not_exist_are_named(case, key):
    model, params, batch = case
    with pytest.raises(
        ValueError, match="layer_norms pattern 'normalise' matches no tap. Did you mean 'normalize'"
    ):
        objectives.gfa(layer_norms={"normalise": "linf"})(model, params, batch, key)
    with pytest.raises(ValueError, match="the model has no taps to align"):
        untapped = taps.linen_model(create("cnn4", num_classes=4, width=0.25))
        objectives.gfa()(untapped, params, batch, key)
    with pytest.raises(ValueError, match="every layer weight is 0"):
        objectives.gfa(layer_weights={".*": 0.0})(model, params, batch, key)
