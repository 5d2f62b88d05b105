"""Schedules at their landmarks, the decay mask, and clipping."""

import chex
import jax.numpy as jnp
import pytest

from gfa_jax.training import optimizers


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("constant", {0: 1.0, 50: 1.0, 99: 1.0}),
        ("linear", {0: 1.0, 25: 0.75, 100: 0.0}),
        ("cosine", {0: 1.0, 50: 0.5, 100: 0.0}),
        ("step", {0: 1.0, 49: 1.0, 51: 0.1, 74: 0.1, 76: 0.01}),
    ],
)
def test_schedules_without_warmup(name, expected):
    schedule = optimizers.schedule(name, learning_rate=1.0, num_steps=100, warmup_fraction=0.0)
    for step, value in expected.items():
        assert float(schedule(step)) == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("name", ["constant", "cosine", "step"])
def test_warmup_is_linear_from_zero(name):
    schedule = optimizers.schedule(name, learning_rate=2.0, num_steps=100, warmup_fraction=0.1)
    assert [float(schedule(step)) for step in (0, 5, 10)] == pytest.approx([0.0, 1.0, 2.0])


def test_the_steps_of_the_step_schedule_stay_put_under_warmup():
    schedule = optimizers.schedule("step", learning_rate=1.0, num_steps=100, warmup_fraction=0.2)
    assert float(schedule(49)) == pytest.approx(1.0)
    assert float(schedule(51)) == pytest.approx(0.1)
    assert float(schedule(76)) == pytest.approx(0.01)


def test_onecycle_rises_and_falls():
    schedule = optimizers.schedule(
        "onecycle", learning_rate=1.0, num_steps=100, warmup_fraction=0.25
    )
    assert float(schedule(0)) == pytest.approx(1 / 25)
    assert float(schedule(25)) == pytest.approx(1.0)
    assert float(schedule(100)) == pytest.approx(1e-4, rel=1e-3)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="schedule='cosin' is not one of"):
        optimizers.schedule("cosin", learning_rate=1.0, num_steps=10, warmup_fraction=0)
    with pytest.raises(ValueError, match="optimizer='adam'.*Did you mean 'adamw'"):
        optimizers.create("adam", lambda step: 0.1, momentum=0, weight_decay=0, clip_norm=0)


def test_weight_decay_leaves_biases_alone():
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    zeros = {"kernel": jnp.zeros((2, 2)), "bias": jnp.zeros(2)}
    for name in ("sgd", "adamw"):
        tx = optimizers.create(
            name, lambda step: 0.1, momentum=0.0, weight_decay=0.5, clip_norm=0.0
        )
        updates, _ = tx.update(zeros, tx.init(params), params)
        assert (updates["kernel"] < 0).all()
        chex.assert_trees_all_equal(updates["bias"], zeros["bias"])


def test_gradients_are_clipped_by_their_global_norm():
    params = {"a": jnp.zeros((1, 1)), "b": jnp.zeros((1, 1))}
    grads = {"a": jnp.full((1, 1), 30.0), "b": jnp.full((1, 1), 40.0)}
    tx = optimizers.create("sgd", lambda step: 1.0, momentum=0.0, weight_decay=0.0, clip_norm=5.0)
    updates, _ = tx.update(grads, tx.init(params), params)
    chex.assert_trees_all_close(
        updates, {"a": jnp.full((1, 1), -3.0), "b": jnp.full((1, 1), -4.0)}, rtol=1e-5
    )


def test_the_drops_of_the_step_schedule_are_those_given():
    """Those within the warm-up show, all of them, from its end on."""
    schedule = optimizers.schedule(
        "step", learning_rate=1.0, num_steps=100, warmup_fraction=0.2, drops=(0.1, 0.15, 0.6)
    )
    assert float(schedule(10)) == pytest.approx(0.5)
    assert [float(schedule(step)) for step in (22, 59)] == pytest.approx([0.01, 0.01])
    assert float(schedule(61)) == pytest.approx(0.001)


@pytest.mark.parametrize(("nesterov", "expected"), [(False, [1.0, 1.9]), (True, [1.9, 2.71])])
def test_momentum_with_and_without_nesterov(nesterov, expected):
    """Constant gradients of 1: the sums of the geometric series, a step earlier with Nesterov."""
    tx = optimizers.create(
        "sgd",
        lambda step: 1.0,
        momentum=0.9,
        nesterov=nesterov,
        weight_decay=0.0,
        clip_norm=0.0,
    )
    params = {"kernel": jnp.zeros((1, 1))}
    state = tx.init(params)
    for value in expected:
        updates, state = tx.update({"kernel": jnp.ones((1, 1))}, state, params)
        chex.assert_trees_all_close(updates["kernel"], jnp.full((1, 1), -value), rtol=1e-6)
