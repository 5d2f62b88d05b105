"""Objectives in optax chains: against the fused objective, and inside optax's wrappers.

The compositions are the blocks of docs/transforms.md, run as they stand there and compared with
steps by hand on the gradient of the fused objective.
"""

import functools
import pathlib
import re
from typing import NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gfa_jax import ThreatModel, objectives, taps, transforms
from tests.objectives import toy

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "transforms.md"
SECTIONS = dict(re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.M | re.S))
BLOCKS = {
    title: re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    for title, text in SECTIONS.items()
}
NUM_STEPS = 4
# Its values are exact in float32, in which optax computes them.
SCHEDULE = optax.linear_schedule(0.25, 2.25, transition_steps=8)
WEIGHTS = {"number": 0.7, "schedule": SCHEDULE}


class Case(NamedTuple):
    params: dict
    batches: list
    keys: list


@pytest.fixture(autouse=True)
def _exact():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def case(key):
    params_key, batch_key, step_key = jax.random.split(key, 3)
    return Case(
        toy.smooth_params(params_key),
        [toy.batch(batch_key) for batch_key in jax.random.split(batch_key, NUM_STEPS)],
        list(jax.random.split(step_key, NUM_STEPS)),
    )


def gradient(objective, params, batch, key, model=toy.smooth):
    return jax.grad(functools.partial(objective, model), has_aux=True)(params, batch, key)[0]


@functools.partial(jax.jit, static_argnames="target")
def fused_gradient(weight, params, batch, key, target=objectives.SAMPLED_MARGIN):
    return gradient(objectives.gfa(weight, target=target), params, batch, key)


def chained_steps(tx, case, model=toy.smooth, objective=None):
    """Returns the parameters after each step on the plain objective, and the last state."""
    objective = objective or objectives.cross_entropy()

    @jax.jit
    def step(params, opt_state, batch, key):
        grads = gradient(objective, params, batch, key, model)
        updates, opt_state = tx.update(grads, opt_state, params, model=model, batch=batch, key=key)
        return optax.apply_updates(params, updates), opt_state

    return run(step, case.params, tx.init(case.params), case)


def run(step, params, opt_state, case):
    history = []
    for batch, key in zip(case.batches, case.keys, strict=True):
        params, opt_state = step(params, opt_state, batch, key)
        history.append(params)
    return history, opt_state


def fused_steps(tx, case, weight, target=objectives.SAMPLED_MARGIN, add=None):
    """The same with a transformation of optax alone, on the gradient of the fused objective."""
    params, opt_state, history = case.params, tx.init(case.params), []
    for count, (batch, key) in enumerate(zip(case.batches, case.keys, strict=True)):
        grads = fused_gradient(value(weight, count), params, batch, key, target)
        if add is not None:
            grads = jax.tree.map(jnp.add, grads, add(params, batch, key))
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        history.append(params)
    return history, opt_state


def value(weight, count):
    return weight(jnp.asarray(count, jnp.int32)) if callable(weight) else jnp.asarray(weight)


def distance(tree, other):
    return optax.tree.norm(jax.tree.map(jnp.subtract, tree, other))


def update_rule():
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.add_decayed_weights(5e-4),
        optax.sgd(0.1, momentum=0.9),
    )


def documented(title, case, weight, *, number=0):
    """Returns the names after the page's first block, which defines steps, and one of a section."""
    names = {
        "model": toy.smooth,
        "params": case.params,
        "batch": case.batches[0],
        "batches": case.batches,
        "key": case.keys[0],
        "weight": weight,
    }
    for code in (BLOCKS["A chain"][0], BLOCKS[title][number]):
        exec(compile(code, str(PAGE), "exec"), names)
    return names


# Against the fused objective


@pytest.mark.parametrize("target", ["log_odds", objectives.SAMPLED_MARGIN])
@pytest.mark.parametrize("weight", WEIGHTS)
def test_the_chain_takes_the_steps_of_the_fused_objective(case, target, weight):
    tx = optax.chain(
        transforms.add_gfa_gradient(WEIGHTS[weight], target=target, layer_norms={"input": "linf"}),
        update_rule(),
    )
    chained, state = chained_steps(tx, case)

    @jax.jit
    def fused(weight, params, batch, key):
        objective = objectives.gfa(weight, target=target, layer_norms={"input": "linf"})
        return gradient(objective, params, batch, key)

    inner, params = update_rule(), case.params
    inner_state = inner.init(params)
    for count, (batch, key) in enumerate(zip(case.batches, case.keys, strict=True)):
        grads = fused(value(WEIGHTS[weight], count), params, batch, key)
        updates, inner_state = inner.update(grads, inner_state, params)
        params = optax.apply_updates(params, updates)
        chex.assert_trees_all_close(chained[count], params, rtol=1e-12, atol=1e-13)
    assert state[0].count == NUM_STEPS
    assert state[0].count.dtype == jnp.int32
    plain, _ = chained_steps(update_rule(), case)
    assert distance(plain[-1], chained[-1]) > 1e-2


REGULARIZERS = {
    "gradient_norm": objectives.gradient_norm,
    "grad_align": functools.partial(objectives.grad_align, threat=ThreatModel(epsilon=0.1)),
    "logit_squeezing": objectives.logit_squeezing,
    "jacobian_norm": objectives.jacobian_norm,
}


@pytest.mark.parametrize("name", REGULARIZERS)
def test_any_regulariser_can_be_chained(case, name):
    regularizer = REGULARIZERS[name]
    tx = transforms.add_objective_gradient(regularizer(1.0, cross_entropy_weight=0), SCHEDULE)
    state = transforms.AddObjectiveGradientState(jnp.asarray(2, jnp.int32))
    batch, key = case.batches[0], case.keys[0]
    grads = gradient(objectives.cross_entropy(), case.params, batch, key)
    updates, state = jax.jit(functools.partial(tx.update, model=toy.smooth))(
        grads, state, case.params, batch=batch, key=key
    )
    expected = jax.jit(functools.partial(gradient, regularizer(0.75)))(case.params, batch, key)
    chex.assert_trees_all_close(updates, expected, rtol=1e-12, atol=1e-14)
    assert distance(updates, grads) > 1e-4
    assert state.count == 3


class Normalised(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(5, param_dtype=jnp.float64, name="first")(x)
        x = nn.BatchNorm(
            use_running_average=not train, momentum=0.5, param_dtype=jnp.float64, name="norm"
        )(x)
        return nn.Dense(3, param_dtype=jnp.float64, name="head")(nn.softplus(x))


def test_batch_norm_keeps_the_statistics_of_the_pass_that_gave_the_gradients(case, key):
    module, batch = Normalised(), case.batches[0]
    variables = dict(module.init(key, batch["inputs"]))
    params = variables.pop("params")
    model = taps.linen_model(module, variables, layers=["input", "head@input"])
    options = {"target": "log_odds", "layer_weights": {"input": 2.0}}
    tx = transforms.add_gfa_gradient(0.7, **options)

    @jax.jit
    def both(params):
        chained, plain_aux = jax.grad(
            functools.partial(objectives.cross_entropy(), model), has_aux=True
        )(params, batch, key)
        arguments = {"model": model, "batch": batch, "key": key}
        updates, state = tx.update(chained, tx.init(params), params, **arguments)
        fused, aux = jax.grad(
            functools.partial(objectives.gfa(0.7, **options), model), has_aux=True
        )(params, batch, key)
        return (updates, plain_aux.model_state), (fused, aux.model_state), state

    chained, fused, state = both(params)
    chex.assert_trees_all_close(chained, fused, rtol=1e-11, atol=1e-13)
    assert distance(chained[1], variables) > 1e-3
    assert jax.tree.leaves(state) == [1]


def test_updates_keep_their_dtypes_and_a_python_zero_skips_the_pass(case):
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), case.params)
    batch = {**case.batches[0], "inputs": case.batches[0]["inputs"].astype(jnp.bfloat16)}
    arguments = {"model": toy.smooth, "batch": batch, "key": case.keys[0]}
    zeros = optax.tree.zeros_like(narrow)
    tx = transforms.add_gfa_gradient(lambda count: jnp.asarray(1.0, jnp.float32))
    update = jax.jit(functools.partial(tx.update, **arguments))
    updates, _ = update(zeros, tx.init(narrow), narrow)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, narrow)
    assert distance(updates, zeros) > 0

    def refuse(model, params, batch, key):
        raise AssertionError("the objective was evaluated")

    tx = transforms.add_objective_gradient(refuse, 0)
    updates, state = tx.update(narrow, tx.init(narrow), narrow, **arguments)
    chex.assert_trees_all_equal(updates, narrow)
    assert state.count == 1


# The compositions of the page


def test_the_page_has_a_block_for_each_composition():
    assert {title for title, blocks in BLOCKS.items() if blocks} == {
        "A chain",
        "Any regulariser",
        "SAM",
        "Gradient accumulation",
        "Some parameters only",
        "Skipping what is not finite",
        "A weight to read and change",
        "Schedule-free",
        "An average of the parameters",
        "Several devices by hand",
        "Chained or fused",
    }


def test_page_chain(case):
    names = documented("A chain", case, SCHEDULE, number=1)
    chained, _ = chained_steps(names["tx"], case)
    fused, _ = fused_steps(update_rule(), case, SCHEDULE, "log_odds")
    chex.assert_trees_all_close(chained, fused, rtol=1e-12, atol=1e-13)
    _, aux = objectives.cross_entropy()(toy.smooth, case.params, names["batches"][0], case.keys[0])
    chex.assert_trees_all_close(names["aux"], aux, rtol=1e-12)


def test_page_any_regulariser(case):
    names = documented("Any regulariser", case, SCHEDULE)
    chained, _ = chained_steps(names["tx"], case)

    def add(params, batch, key):
        objective = objectives.gradient_norm(0.1, cross_entropy_weight=0)
        return gradient(objective, params, batch, key)

    fused, _ = fused_steps(optax.adam(1e-3), case, SCHEDULE, add=add)
    chex.assert_trees_all_close(chained, fused, rtol=1e-10)
    without, _ = fused_steps(optax.adam(1e-3), case, SCHEDULE)
    assert distance(without[-1], fused[-1]) > 1e-5


def sam_steps(case, weight, *, ascent_weight=None):
    """SAM by its definition: up by 0.05 along the gradient, down by 0.1 times the one there."""
    params, history = case.params, []
    for count, (batch, key) in enumerate(zip(case.batches, case.keys, strict=True)):
        up = ascent_weight or weight
        ascent = fused_gradient(value(up, 2 * count), params, batch, key)
        radius = 0.05 / optax.tree.norm(ascent)
        perturbed = jax.tree.map(lambda leaf, g, r=radius: leaf + r * g, params, ascent)
        descent = fused_gradient(value(weight, 2 * count + 1), perturbed, batch, key)
        params = jax.tree.map(lambda leaf, g: leaf - 0.1 * g, params, descent)
        history.append(params)
    return history


def test_page_sam_takes_both_gradients_at_the_perturbed_point(case):
    tx = documented("SAM", case, SCHEDULE)["tx"]
    twice = Case(
        case.params,
        [batch for batch in case.batches for _ in range(2)],
        [key for key in case.keys for _ in range(2)],
    )
    chained, state = chained_steps(tx, twice)
    by_hand = sam_steps(case, SCHEDULE)
    chex.assert_trees_all_close(chained[1::2], by_hand, rtol=1e-10, atol=1e-12)
    plain, _ = fused_steps(optax.sgd(0.1), case, SCHEDULE)
    assert distance(plain[-1], by_hand[-1]) > 1e-3
    assert state[0].count == 2 * NUM_STEPS


def test_page_opaque_sam(case):
    names = documented("SAM", case, 0.7, number=1)

    def step(params, opt_state, batch, key):
        return names["opaque_step"](params, opt_state, batch, key, 0.7)

    history, _ = run(step, case.params, names["opaque_sam"].init(case.params), case)
    by_hand = sam_steps(case, 0.7)
    chex.assert_trees_all_close(history, by_hand, rtol=1e-10, atol=1e-12)


def test_sam_refuses_the_arguments_of_others_and_opaque_sam_descends_by_its_own_gradient(case):
    parts = (optax.sgd(0.1), optax.chain(optax.contrib.normalize(), optax.sgd(0.05)))
    tx = optax.chain(transforms.add_gfa_gradient(0.7), optax.contrib.sam(*parts))
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        chained_steps(tx, case)

    sam = optax.contrib.sam(*parts, opaque_mode=True)
    add = transforms.add_gfa_gradient(0.7)
    batch, key = case.batches[0], case.keys[0]

    def plain(params, number):
        return gradient(objectives.cross_entropy(), params, batch, key)

    grads, _ = add.update(
        plain(case.params, 0),
        add.init(case.params),
        case.params,
        model=toy.smooth,
        batch=batch,
        key=key,
    )
    updates, _ = sam.update(grads, sam.init(case.params), case.params, grad_fn=plain)
    one = Case(case.params, [batch], [key])
    (only_the_ascent,) = sam_steps(one, 0.0, ascent_weight=0.7)
    chex.assert_trees_all_close(
        optax.apply_updates(case.params, updates), only_the_ascent, rtol=1e-10
    )


def test_page_accumulation_adds_the_alignment_of_every_part(case):
    tx = documented("Gradient accumulation", case, SCHEDULE)["tx"]
    chained, _ = chained_steps(tx, case)
    params = case.params
    for first in (0, 2):
        chex.assert_trees_all_equal(chained[first], params)
        parts = [
            fused_gradient(value(SCHEDULE, i), params, case.batches[i], case.keys[i])
            for i in (first, first + 1)
        ]
        params = jax.tree.map(lambda leaf, a, b: leaf - 0.1 * (a + b) / 2, params, *parts)
        # MultiSteps accumulates in float32 unless told otherwise.
        chex.assert_trees_all_close(chained[first + 1], params, rtol=1e-6, atol=1e-6)
        params = chained[first + 1]


def test_inside_multi_steps_only_the_last_part_of_a_batch_counts(case):
    inner = optax.chain(transforms.add_gfa_gradient(SCHEDULE), optax.sgd(0.1))
    tx = optax.MultiSteps(inner, every_k_schedule=2, accumulator_dtype=jnp.float64)
    chained, state = chained_steps(tx, case)
    ce = objectives.cross_entropy()
    params = case.params
    for step, first in enumerate((0, 2)):
        plain = [gradient(ce, params, case.batches[i], case.keys[i]) for i in (first, first + 1)]
        last = fused_gradient(
            value(SCHEDULE, step), params, case.batches[first + 1], case.keys[first + 1]
        )
        params = jax.tree.map(
            lambda leaf, a, b, c: leaf - 0.1 * ((a + b) / 2 + c - b), params, *plain, last
        )
        chex.assert_trees_all_close(chained[first + 1], params, rtol=1e-12, atol=1e-13)
    assert state.inner_opt_state[0].count == 2


def test_page_mask_leaves_the_other_updates_as_they_are(case):
    tx = documented("Some parameters only", case, SCHEDULE)["tx"]
    chained, _ = chained_steps(tx, case)
    params = case.params
    for count, (batch, key) in enumerate(zip(case.batches, case.keys, strict=True)):
        plain = gradient(objectives.cross_entropy(), params, batch, key)
        fused = fused_gradient(value(SCHEDULE, count), params, batch, key)
        assert distance(plain["bias"], fused["bias"]) > 1e-5
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, {**fused, "bias": plain["bias"]})
        chex.assert_trees_all_close(chained[count], params, rtol=1e-12, atol=1e-13)


def test_a_mask_may_be_a_tree_or_a_prefix_of_one(case):
    params = {"layers": case.params, "scale": jnp.ones(())}
    batch, key = case.batches[0], case.keys[0]

    def model(params, tap_values, inputs, *, train):
        (logits, features), state = toy.smooth(params["layers"], tap_values, inputs, train=train)
        return (params["scale"] * logits**2, features), state

    arguments = {"model": model, "batch": batch, "key": key}
    zeros = optax.tree.zeros_like(params)

    def updates(mask):
        tx = transforms.add_gfa_gradient(0.7, target="margin", mask=mask)
        update = jax.jit(functools.partial(tx.update, **arguments))
        return update(zeros, tx.init(params), params)[0]

    everything = updates(None)
    assert min(optax.tree.norm(leaf) for leaf in jax.tree.leaves(everything["layers"])) > 1e-5
    layers_only = {"layers": everything["layers"], "scale": zeros["scale"]}
    chex.assert_trees_all_close(updates({"layers": True, "scale": False}), layers_only, rtol=1e-12)
    one = {"layers": {"first": True, "second": False, "bias": False}, "scale": False}
    expected = {**zeros, "layers": {**zeros["layers"], "first": everything["layers"]["first"]}}
    chex.assert_trees_all_close(updates(one), expected, rtol=1e-12)


def not_a_number_at_1(count):
    return jnp.where(count == 1, jnp.nan, 0.7)


def test_page_a_gradient_that_is_not_finite_is_skipped(case):
    tx = documented("Skipping what is not finite", case, not_a_number_at_1)["tx"]
    chained, state = chained_steps(tx, case)
    chex.assert_trees_all_equal(chained[1], chained[0])
    assert state[1].total_notfinite == 1
    assert state[0].count == NUM_STEPS
    kept = [0, 2, 3]
    rest = Case(case.params, [case.batches[i] for i in kept], [case.keys[i] for i in kept])
    fused, _ = fused_steps(optax.sgd(0.1, momentum=0.9), rest, 0.7)
    chex.assert_trees_all_close([chained[i] for i in kept], fused, rtol=1e-12, atol=1e-13)


def test_inside_apply_if_finite_it_is_not_seen(case):
    inner = optax.chain(transforms.add_gfa_gradient(not_a_number_at_1), optax.sgd(0.1))
    chained, state = chained_steps(optax.apply_if_finite(inner, 5), case)
    assert np.isnan(chained[1]["first"]).all()
    # The gradient that comes in is finite until the parameters are not.
    assert state.total_notfinite == 2


def test_page_an_injected_weight_is_read_and_changed(case):
    names = documented("A weight to read and change", case, 0.7)
    tx, state = names["tx"], names["opt_state"]
    assert tx.init(case.params)[0].hyperparams["weight"] == 3.0
    params = case.params

    @jax.jit
    def step(params, state, batch, key):
        grads = gradient(objectives.cross_entropy(), params, batch, key)
        arguments = {"model": toy.smooth, "batch": batch, "key": key}
        updates, state = tx.update(grads, state, params, **arguments)
        return optax.apply_updates(params, updates), state

    for count, (batch, key) in enumerate(zip(case.batches, case.keys, strict=True)):
        weight = jnp.asarray(1.0 + count)
        state[0].hyperparams["weight"] = weight
        grads = fused_gradient(weight, params, batch, key, "log_odds")
        expected = jax.tree.map(lambda leaf, g: leaf - 0.1 * g, params, grads)
        params, state = step(params, state, batch, key)
        chex.assert_trees_all_close(params, expected, rtol=1e-12, atol=1e-13)


def test_an_injected_schedule_can_be_read_and_a_mask_kept(case):
    def mask(params):
        return {**dict.fromkeys(params, True), "bias": False}

    factory = optax.inject_hyperparams(transforms.add_gfa_gradient, static_args="mask")
    tx = optax.chain(
        factory(SCHEDULE, mask=mask, displacement=0.01, layer_norms={"input": "linf"}),
        optax.sgd(0.1),
    )
    chained, state = chained_steps(tx, case)
    by_itself = transforms.add_gfa_gradient(SCHEDULE, mask=mask, layer_norms={"input": "linf"})
    expected, _ = chained_steps(optax.chain(by_itself, optax.sgd(0.1)), case)
    chex.assert_trees_all_close(chained, expected, rtol=1e-12, atol=1e-13)
    assert state[0].hyperparams["weight"] == pytest.approx(float(SCHEDULE(NUM_STEPS - 1)))


def test_page_schedule_free_takes_the_gradient_at_y(case):
    names = documented("Schedule-free", case, SCHEDULE)
    seen = Case(case.params, case.batches, [case.keys[0]] * NUM_STEPS)
    x = y = z = case.params
    for count, batch in enumerate(case.batches):
        grads = fused_gradient(value(SCHEDULE, count), y, batch, case.keys[0])
        z = jax.tree.map(lambda leaf, g: leaf - 0.1 * g, z, grads)
        share = 1 / (count + 1)
        x = jax.tree.map(lambda a, b, c=share: (1 - c) * a + c * b, x, z)
        y = jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, x, z)
    chex.assert_trees_all_close(names["params"], y, rtol=1e-10, atol=1e-12)
    chex.assert_trees_all_close(names["eval_params"], x, rtol=1e-10, atol=1e-12)
    assert distance(x, y) > 1e-3
    before = optax.chain(
        transforms.add_gfa_gradient(SCHEDULE),
        optax.contrib.schedule_free(optax.sgd(0.1), learning_rate=0.1),
    )
    chex.assert_trees_all_close(chained_steps(before, seen)[0][-1], y, rtol=1e-10, atol=1e-12)


def test_page_average_of_the_parameters(case):
    names = documented("An average of the parameters", case, SCHEDULE)
    seen = Case(case.params, case.batches, [case.keys[0]] * NUM_STEPS)
    fused, _ = fused_steps(optax.sgd(0.1), seen, SCHEDULE)
    average = case.params
    for params in fused:
        average = jax.tree.map(lambda a, b: 0.99 * a + 0.01 * b, average, params)
    chex.assert_trees_all_close(names["params"], fused[-1], rtol=1e-12, atol=1e-13)
    chex.assert_trees_all_close(names["average"], average, rtol=1e-12, atol=1e-13)


def test_page_the_mean_over_devices_follows(case):
    tx = documented("Several devices by hand", case, 0.7)["tx"]
    parts = jax.tree.map(lambda *leaves: jnp.stack(leaves), *case.batches[:2])
    key = case.keys[0]

    def update(batch):
        grads = gradient(objectives.cross_entropy(), case.params, batch, key)
        arguments = {"model": toy.smooth, "batch": batch, "key": key}
        return tx.update(grads, tx.init(case.params), case.params, **arguments)[0]

    updates = jax.jit(jax.vmap(update, axis_name="devices"))(parts)
    grads = [fused_gradient(0.7, case.params, batch, key) for batch in case.batches[:2]]
    mean = jax.tree.map(lambda a, b: -0.1 * (a + b) / 2, *grads)
    for part in range(2):
        chex.assert_trees_all_close(
            jax.tree.map(lambda leaf, i=part: leaf[i], updates), mean, rtol=1e-11, atol=1e-13
        )


def test_page_flops_are_those_it_prints(case, capsys):
    documented("Chained or fused", case, 0.7)
    printed = capsys.readouterr().out.strip()
    assert f"It prints `{printed}`." in SECTIONS["Chained or fused"]


# Errors


@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf"), "1.0"])
def test_a_bad_weight_is_refused_at_once(weight):
    with pytest.raises(ValueError, match=re.escape(f"weight={weight!r} must be a finite number")):
        transforms.add_gfa_gradient(weight)
    with pytest.raises(ValueError, match="weight="):
        transforms.add_objective_gradient(objectives.cross_entropy(), weight)


def test_bad_options_are_refused_at_once():
    with pytest.raises(ValueError, match="cross_entropy_weight=1.0: add_gfa_gradient adds the"):
        transforms.add_gfa_gradient(1.0, cross_entropy_weight=1.0)
    with pytest.raises(ValueError, match="Did you mean 'log_odds'"):
        transforms.add_gfa_gradient(1.0, target="logodds")
    with pytest.raises(TypeError, match="targets"):
        transforms.add_gfa_gradient(1.0, targets="log_odds")


@pytest.mark.parametrize("missing", ["params", "model", "batch", "key"])
def test_a_missing_argument_is_named_before_anything_is_traced(case, missing):
    def refuse(model, params, batch, key):
        raise AssertionError("the objective was evaluated")

    tx = transforms.add_objective_gradient(refuse)
    arguments = {
        "params": case.params,
        "model": toy.smooth,
        "batch": case.batches[0],
        "key": case.keys[0],
    }
    del arguments[missing]
    name = "`params`" if missing == "params" else f"no '{missing}':"
    with pytest.raises(ValueError, match=name):
        tx.update(case.params, tx.init(case.params), **arguments)


def test_wrappers_that_hide_parameters_or_arguments_are_named(case):
    mask = {"first": True, "second": False, "bias": True}
    with pytest.raises(ValueError, match="mask="):
        optax.masked(transforms.add_gfa_gradient(0.7), mask).init(case.params)
    parts = {True: transforms.add_gfa_gradient(0.7), False: optax.identity()}
    with pytest.raises(ValueError, match=r"optax\.partition"):
        optax.partition(parts, mask).init(case.params)
    inner = optax.MultiSteps(transforms.add_gfa_gradient(0.7), 2).gradient_transformation()
    with pytest.raises(ValueError, match="no 'model' and no 'batch' and no 'key'.*hand on"):
        chained_steps(optax.chain(inner), case)


def test_before_a_partition_it_works(case):
    kinds = {"first": "fast", "second": "slow", "bias": "slow"}
    tx = optax.partition({"fast": optax.sgd(0.1), "slow": optax.sgd(0.01)}, kinds)
    chained, _ = chained_steps(optax.chain(transforms.add_gfa_gradient(SCHEDULE), tx), case)
    fused, _ = fused_steps(tx, case, SCHEDULE)
    chex.assert_trees_all_close(chained, fused, rtol=1e-12, atol=1e-13)
