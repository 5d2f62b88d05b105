"""Penalties on input gradients: closed forms on a linear model, differences on a smooth one."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from gfa_jax import ThreatModel, alignment, attacks, losses, objectives
from tests.objectives import toy

THREAT = ThreatModel(epsilon=0.1)
THREAT_L2 = ThreatModel(norm="l2", epsilon=0.1)

PENALTIES = {
    "grad_align": lambda weight, **kw: objectives.grad_align(weight, THREAT, **kw),
    "gradient_norm": objectives.gradient_norm,
    "gradient_norm_l1": lambda weight, **kw: objectives.gradient_norm(
        weight, "l1", squared=False, **kw
    ),
    "gradient_norm_l2": lambda weight, **kw: objectives.gradient_norm(weight, squared=False, **kw),
    "gradient_norm_linf": lambda weight, **kw: objectives.gradient_norm(weight, "linf", **kw),
    "jacobian_norm": objectives.jacobian_norm,
    "jacobian_norm_exact": lambda weight, **kw: objectives.jacobian_norm(weight, None, **kw),
    "linearized_margins": lambda weight, **kw: objectives.linearized_margins(weight, THREAT, **kw),
    "linearized_log_odds": lambda weight, **kw: objectives.linearized_margins(
        weight, THREAT_L2, epsilon=0.5, samples_class=False, **kw
    ),
    "curvature": lambda weight, **kw: objectives.curvature(weight, 0.3, **kw),
    "curvature_norm": lambda weight, **kw: objectives.curvature(weight, 0.3, squared=False, **kw),
    "local_linearity": lambda weight, **kw: objectives.local_linearity(
        weight, THREAT, gradient_ratio=0.5, num_steps=3, **kw
    ),
    "logit_squeezing": objectives.logit_squeezing,
}


@pytest.fixture
def case(key):
    with jax.enable_x64(True):
        params_key, batch_key = jax.random.split(key)
        yield toy.linear_params(params_key), toy.batch(batch_key)


def penalty(objective, params, batch, key, name):
    _, aux = jax.jit(lambda p: objective(toy.linear, p, batch, key))(params)
    return aux.metrics[f"{name}_penalty"]


@pytest.mark.parametrize("name", PENALTIES)
def test_weight_zero_is_cross_entropy(case, key, name):
    params, batch = case
    plain = toy.value_and_grad(objectives.cross_entropy(), toy.linear)(params, batch, key)
    zero = toy.value_and_grad(PENALTIES[name](0.0), toy.linear)(params, batch, key)
    chex.assert_trees_all_equal(zero, plain)

    def traced(weight):
        return toy.value_and_grad(PENALTIES[name](weight), toy.linear)(params, batch, key)

    (loss, aux), grads = jax.jit(traced)(jnp.zeros(()))
    chex.assert_trees_all_close((loss, grads), (plain[0][0], plain[1]), rtol=1e-12)
    chex.assert_trees_all_equal(aux.model_state, plain[0][1].model_state)


@pytest.mark.parametrize("name", PENALTIES)
def test_the_loss_is_cross_entropy_plus_the_weighted_penalty(case, key, name):
    params, batch = case
    plain = objectives.cross_entropy()(toy.linear, params, batch, key)[0]
    loss, aux = PENALTIES[name](2.0)(toy.linear, params, batch, key)
    (value,) = (v for metric, v in aux.metrics.items() if metric.endswith("_penalty"))
    assert value > 1e-4
    chex.assert_trees_all_close(loss, plain + 2.0 * value, rtol=1e-12)
    alone = PENALTIES[name](2.0, cross_entropy_weight=0)(toy.linear, params, batch, key)[0]
    chex.assert_trees_all_close(alone, 2.0 * value, rtol=1e-12)


@pytest.mark.parametrize("name", PENALTIES)
def test_gradients_agree_with_float64_differences(key, name):
    with jax.enable_x64(True):
        params, batch = toy.smooth_params(key), toy.batch(key, size=3)
        objective = PENALTIES[name](2.0)
        check_grads(
            jax.jit(lambda params: objective(toy.smooth, params, batch, key)[0]),
            (params,),
            order=1,
            modes=["rev"],
            eps=1e-6,
            rtol=1e-5,
            atol=1e-6,
        )


@pytest.mark.parametrize("norm", ["l2", "l1", "linf"])
@pytest.mark.parametrize("squared", [True, False])
def test_gradient_norm_by_hand(case, key, norm, squared):
    params, batch = case
    gradient = toy.linear_gradient(params, **batch)
    order = {"l2": 2, "l1": 1, "linf": np.inf}[norm]
    expected = np.mean(np.linalg.norm(gradient, order, axis=1) ** (2 if squared else 1))
    objective = objectives.gradient_norm(1.0, norm, squared=squared)
    value = penalty(objective, params, batch, key, "gradient_norm")
    chex.assert_trees_all_close(value, expected, rtol=1e-10)


@pytest.mark.parametrize("threat", [THREAT, THREAT_L2, ThreatModel(norm="l1", epsilon=0.1)])
@pytest.mark.parametrize("samples_class", [True, False])
def test_linearized_margins_of_two_classes_are_worst_where_the_attack_ends(
    key, threat, samples_class
):
    """In a linear model of two classes the linear margin is exact, and so is FGSM."""
    with jax.enable_x64(True):
        params = jax.tree.map(lambda v: v[..., :2], toy.linear_params(key))
        batch = toy.batch(key)
        batch["labels"] = batch["labels"] % 2
        # No box: it would stop the attack.
        threat = dataclasses.replace(threat, bounds=(-10.0, 10.0))
        objective = objectives.linearized_margins(1.0, threat, samples_class=samples_class)
        loss, aux = objective(toy.linear, params, batch, key)
        attacked = objectives.adversarial(attacks.fgsm(threat), objectives.cross_entropy())
        chex.assert_trees_all_close(loss, attacked(toy.linear, params, batch, key)[0], rtol=1e-10)
        order = {"linf": 1, "l2": 2, "l1": np.inf}[threat.norm]
        slope = np.linalg.norm(np.asarray(params["kernel"] @ jnp.array([1.0, -1.0])), order)
        decrease = aux.metrics["linearized_margins_decrease"]
        np.testing.assert_allclose(decrease, 0.1 * slope, rtol=1e-10)


def test_linearized_margins_are_a_mean_over_classes(case, key):
    """Over many draws, each class counts by its probability, with its own slope."""
    params, batch = case
    objective = objectives.linearized_margins(1.0, THREAT, epsilon=0.4)

    @jax.jit
    @jax.vmap
    def draw(key):
        return objective(toy.linear, params, batch, key)[0]

    values = draw(jax.random.split(key, 4000))
    kernel, labels = np.asarray(params["kernel"]), np.asarray(batch["labels"])
    probs = toy.softmax(toy.linear_logits(params, batch["inputs"]))
    expected = 0.0
    for prob, label in zip(probs, labels, strict=True):
        wrong = 1 - prob[label]
        for other in set(range(toy.NUM_CLASSES)) - {int(label)}:
            slope = np.abs(kernel[:, other] - kernel[:, label]).sum()
            worst = np.log(wrong / prob[label]) + 0.4 * slope
            expected += prob[other] / wrong * np.log1p(np.exp(worst)) / len(labels)
    error = np.std(values) / np.sqrt(4000)
    assert 0 < error < 0.01
    assert abs(np.mean(values) - expected) < 4 * error


def test_linearized_margins_count_alignment_by_the_margin(key):
    """Without biases: epsilon over the radius that alignment promises, times the margin."""
    with jax.enable_x64(True):
        params = {**toy.linear_params(key), "bias": jnp.zeros(toy.NUM_CLASSES)}
        params = jax.tree.map(lambda v: v[..., :2], params)
        inputs, labels = toy.batch(key)["inputs"], jnp.zeros(6, int)
        logits = inputs @ params["kernel"]
        grads = jnp.broadcast_to(params["kernel"] @ jnp.array([-1.0, 1.0]), inputs.shape)
        radius = jnp.max(inputs, axis=1) * alignment.alignment(inputs, grads, "linf")
        margin = -losses.margin(logits, labels)
        expected = jnp.mean(jax.nn.softplus(-margin * (1 - THREAT.epsilon / radius)))
        batch = {"inputs": inputs, "labels": labels}
        loss, _ = objectives.linearized_margins(1.0, THREAT)(toy.linear, params, batch, key)
        np.testing.assert_allclose(loss, expected, rtol=1e-10)


def test_grad_align_by_hand(case, key):
    params, batch = case
    keys = attacks.example_keys(key, jnp.arange(6))
    moved = THREAT.random_start(keys, batch["inputs"])
    left = toy.linear_gradient(params, **batch)
    right = toy.linear_gradient(params, moved, batch["labels"])
    cosine = np.sum(left * right, 1) / np.linalg.norm(left, axis=1) / np.linalg.norm(right, axis=1)
    value = penalty(objectives.grad_align(1.0, THREAT), params, batch, key, "grad_align")
    chex.assert_trees_all_close(value, np.mean(1 - cosine), rtol=1e-8)


@pytest.mark.parametrize("squared", [True, False])
def test_curvature_by_hand(case, key, squared):
    params, batch = case
    gradient = toy.linear_gradient(params, **batch)
    displaced = batch["inputs"] + 0.3 * np.sign(gradient) / np.sqrt(toy.NUM_FEATURES)
    difference = toy.linear_gradient(params, displaced, batch["labels"]) - gradient
    expected = np.mean(np.linalg.norm(difference, axis=1) ** (2 if squared else 1))
    value = penalty(
        objectives.curvature(1.0, 0.3, squared=squared), params, batch, key, "curvature"
    )
    chex.assert_trees_all_close(value, expected, rtol=1e-8)


def test_curvature_of_a_quadratic_loss_is_its_hessian(key):
    """Two classes with log-odds ``q`` such that CE is ``x^T A x``, for any A."""
    with jax.enable_x64(True):
        matrix = jnp.diag(jnp.array([1.0, 2.0, 3.0, 4.0]))

        def model(params, taps, inputs, *, train):
            wanted = jnp.sum((inputs @ params) * inputs, axis=1)
            logits = jnp.stack([jnp.zeros_like(wanted), jnp.log(jnp.expm1(wanted))], axis=1)
            return (logits, {}), {}

        batch = {**toy.batch(key), "labels": jnp.zeros(6, int)}
        _, aux = objectives.curvature(1.0, 0.1)(model, matrix, batch, key)
        # |2 A h z|^2 with z of entries 1/2.
        expected = 4 * 0.1**2 * (1 + 4 + 9 + 16) / 4
        chex.assert_trees_all_close(aux.metrics["curvature_penalty"], expected, rtol=1e-8)


def test_the_exact_jacobian_of_a_linear_model_is_its_kernel(case, key):
    params, batch = case
    expected = jnp.sum(params["kernel"] ** 2) / 2
    value = penalty(objectives.jacobian_norm(1.0, None), params, batch, key, "jacobian_norm")
    chex.assert_trees_all_close(value, expected, rtol=1e-12)


@pytest.mark.parametrize("num_projections", [1, 4])
def test_projections_estimate_the_jacobian_without_bias(case, key, num_projections):
    params, batch = case
    objective = objectives.jacobian_norm(1.0, num_projections)

    @jax.jit
    @jax.vmap
    def estimate(key):
        return objective(toy.linear, params, batch, key)[1].metrics["jacobian_norm_penalty"]

    values = estimate(jax.random.split(key, 2000))
    expected = jnp.sum(params["kernel"] ** 2) / 2
    error = jnp.std(values) / np.sqrt(2000)
    assert error > 0
    assert jnp.abs(jnp.mean(values) - expected) < 4 * error
    # Directions of the examples are independent: the error of a mean of 6 K of them.
    singular = np.linalg.svd(np.asarray(params["kernel"]), compute_uv=False) ** 2
    # Var |v J|^2 for v uniform on the sphere of dimension C, times C^2 / 4.
    c = toy.NUM_CLASSES
    variance = 2 * (c * np.sum(singular**2) - np.sum(singular) ** 2) / (c + 2) / 4
    np.testing.assert_allclose(jnp.var(values), variance / (6 * num_projections), rtol=0.2)


def test_grad_align_counts_opposite_gradients_as_such(key):
    """A loss of the squared length, whose gradients point along the inputs themselves."""
    with jax.enable_x64(True):
        threat = ThreatModel(epsilon=0.5, bounds=(-1.0, 1.0))

        def model(params, taps, inputs, *, train):
            squared = params * jnp.sum(inputs**2, axis=1)
            return (jnp.stack([jnp.zeros_like(squared), squared], axis=1), {}), {}

        inputs = 0.1 * jax.random.normal(key, (6, 3))
        batch = {"inputs": inputs, "labels": jnp.zeros(6, int)}
        keys = attacks.example_keys(key, jnp.arange(6))
        moved = threat.random_start(keys, inputs)
        cosines = jnp.sum(inputs * moved, axis=1) / (
            jnp.linalg.norm(inputs, axis=1) * jnp.linalg.norm(moved, axis=1)
        )
        assert jnp.min(cosines) < -0.5
        objective = objectives.grad_align(1.0, threat)
        aux = objective(model, jnp.asarray(2.0), batch, key)[1]
        np.testing.assert_allclose(
            aux.metrics["grad_align_penalty"], jnp.mean(1 - cosines), rtol=1e-9
        )


def test_local_linearity_of_a_linear_loss_is_zero_and_its_change_is_not(key):
    """Log-odds that make the cross-entropy linear in the input."""
    with jax.enable_x64(True):
        slope = jnp.arange(1.0, 5.0)

        def model(params, taps, inputs, *, train):
            wanted = inputs @ params
            logits = jnp.stack([jnp.zeros_like(wanted), jnp.log(jnp.expm1(wanted))], axis=1)
            return (logits, {}), {}

        batch = {**toy.batch(key), "labels": jnp.zeros(6, int)}
        objective = objectives.local_linearity(4.0, THREAT)
        (_, aux), grads = toy.value_and_grad(objective, model)(slope, batch, key)
        assert aux.metrics["linearity_violation"] < 1e-12
        assert aux.metrics["linear_change"] > 1e-3
        chex.assert_tree_all_finite(grads)


def test_local_linearity_finds_larger_violations_than_its_start(case, key):
    params, batch = case
    found = []
    for step_size in (1e-9, 0.05):
        objective = objectives.local_linearity(1.0, THREAT, gradient_ratio=0.0, step_size=step_size)
        found.append(objective(toy.linear, params, batch, key)[1].metrics["linearity_violation"])
    assert found[1] > 2 * found[0]


@pytest.mark.parametrize("name", PENALTIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_zero_gradients_give_finite_numbers(key, name, dtype):
    params = jax.tree.map(jnp.zeros_like, toy.linear_params(key, jnp.float32))
    params = jax.tree.map(lambda v: v.astype(dtype), params)
    batch = toy.batch(key, jnp.dtype(dtype))
    (loss, aux), grads = toy.value_and_grad(PENALTIES[name](1.0), toy.linear)(params, batch, key)
    assert loss.dtype == jnp.float32
    chex.assert_tree_all_finite((loss, aux.metrics, grads))
    plain = toy.value_and_grad(objectives.cross_entropy(), toy.linear)(params, batch, key)
    chex.assert_trees_all_close(grads, plain[1], rtol=1e-2)


@pytest.mark.parametrize("name", PENALTIES)
def test_saturated_examples_give_finite_numbers(key, name):
    params = jax.tree.map(lambda v: 1e4 * v, toy.linear_params(key, jnp.float32))
    batch = toy.batch(key, jnp.float32)
    logits = batch["inputs"] @ params["kernel"] + params["bias"][None]
    batch["labels"] = jnp.argmax(logits, axis=1)
    (loss, aux), grads = toy.value_and_grad(PENALTIES[name](1.0), toy.linear)(params, batch, key)
    chex.assert_tree_all_finite((loss, aux.metrics, grads))
    assert jnp.mean(losses.cross_entropy(logits, batch["labels"])) < 1e-6
    if name == "grad_align":
        assert aux.metrics["grad_align_zero_gradients"] > 0.5


@pytest.mark.parametrize("name", PENALTIES)
def test_bfloat16_is_close_to_float32(key, name):
    """Parameters and inputs that both dtypes hold; reductions are in float32."""
    params = jax.tree.map(lambda v: v.astype(jnp.bfloat16), toy.smooth_params(key, jnp.float32))
    batch = toy.batch(key, jnp.bfloat16)
    wide = lambda tree: jax.tree.map(lambda v: v.astype(jnp.float32), tree)  # noqa: E731
    results = []
    for p, b in ((params, batch["inputs"]), (wide(params), wide(batch["inputs"]))):
        objective = PENALTIES[name](1.0)
        (loss, _), grads = toy.value_and_grad(objective, toy.smooth)(
            p, {**batch, "inputs": b}, jax.random.key(1)
        )
        assert loss.dtype == jnp.float32
        chex.assert_tree_all_finite(grads)
        results.append(loss)
    # Noise drawn in bfloat16 is other noise.
    loose = name in ("grad_align", "local_linearity")
    np.testing.assert_allclose(results[0], results[1], rtol=0.3 if loose else 0.05)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: objectives.grad_align(-1.0, THREAT), "weight=-1.0 must be a finite number >= 0"),
        (lambda: objectives.gradient_norm(1.0, "l3"), "norm='l3' is not one of"),
        (lambda: objectives.jacobian_norm(1.0, 0), "num_projections=0 must be an integer >= 1"),
        (lambda: objectives.curvature(1.0, 0.0), "h=0.0 must be a finite number > 0"),
        (lambda: objectives.linearized_margins(1.0, THREAT, epsilon=0.0), "epsilon=0.0 must be"),
        (lambda: objectives.local_linearity(1.0, THREAT, gradient_ratio=-2.0), "gradient_ratio"),
        (lambda: objectives.local_linearity(1.0, THREAT, num_steps=0), "num_steps=0"),
        (lambda: objectives.logit_squeezing(1.0, cross_entropy_weight=-1), "cross_entropy_weight"),
    ],
)
def test_bad_options_are_refused_when_the_objective_is_made(make, message):
    with pytest.raises(ValueError, match=message):
        make()
