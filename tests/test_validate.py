"""Checks name the argument and its value; traced and missing values pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gfa_jax import _validate


@pytest.mark.parametrize("value", [-1, -0.5, float("nan"), float("inf"), np.float32(-1), "8/255"])
def test_non_negative_refuses(value):
    with pytest.raises(ValueError, match="epsilon=.* must be a finite number >= 0"):
        _validate.non_negative(epsilon=value)


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), np.float64(0), "1"])
def test_positive_refuses(value):
    with pytest.raises(ValueError, match="step_size=.* must be a finite number > 0"):
        _validate.positive(step_size=value)


@pytest.mark.parametrize("value", [0, -1, 1.0, True, "3", None])
def test_positive_integer_refuses(value):
    with pytest.raises(ValueError, match="num_steps=.* must be an integer >= 1"):
        _validate.positive_integer(num_steps=value)


def test_traced_and_missing_values_pass():
    def check(value):
        _validate.non_negative(epsilon=value)
        _validate.positive(step_size=value, other=None)
        return value

    assert jax.jit(check)(jnp.float32(-1)) == -1


def test_suggestions():
    assert _validate.suggestion("num_step", ["num_steps", "loss"]) == " Did you mean 'num_steps'?"
    assert _validate.suggestion("zzz", ["num_steps"]) == ""


def test_instances():
    _validate.instance((int, float), at_least=2.0)
    with pytest.raises(ValueError, match="at_least='2' must be of type int or float"):
        _validate.instance((int, float), at_least="2")
    with pytest.raises(ValueError, match="label=None must be of type str"):
        _validate.instance(str, label=None)
