"""Regularisers by name and by import path: what is passed on, and what is refused."""

import os
import sys

import chex
import jax
import jax.numpy as jnp
import pytest

from gfa_jax import ThreatModel, objectives
from tests.objectives import toy

THREAT = ThreatModel(epsilon=0.1)
OPTIONS = {"curvature": {"h": 0.3}}

OWN = """
import jax.numpy as jnp
from gfa_jax import objectives


def logit_power(weight, *, power=2.0, cross_entropy_weight=1.0):
    def penalty_fn(model, params, batch, key):
        (logits, _), model_state = model(params, {}, batch["inputs"], train=True)
        value = jnp.mean(jnp.sum(jnp.abs(logits) ** power, axis=1))
        return objectives.Penalty(value, {}, logits, model_state)

    return objectives.regularized(penalty_fn, weight, cross_entropy_weight, name="logit_power")


def without_cross_entropy(weight):
    return None


def no_objective(weight, *, cross_entropy_weight):
    return 3


def ball(weight, threat, *, needed, cross_entropy_weight, **others):
    assert others in ({}, {"extra": 1})
    return lambda model, params, batch, key: (threat.epsilon * weight * needed, None)


def anything(weight, **options):
    return None


constant = 1
"""


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "own_regularizers.py"
    path.write_text(OWN)
    return str(path)


@pytest.fixture
def case(key):
    params_key, batch_key = jax.random.split(key)
    return toy.linear_params(params_key, jnp.float32), toy.batch(batch_key, jnp.float32)


@pytest.mark.parametrize("name", objectives.REGULARIZERS)
def test_every_name_is_its_function(case, key, name):
    """The same loss, alone and beside a cross-entropy; the penalty alone is the difference."""
    params, batch = case
    options = OPTIONS.get(name, {})
    build = lambda **kw: objectives.regularizer(name, 0.7, threat=THREAT, **options, **kw)  # noqa: E731
    whole, alone = (
        build(cross_entropy_weight=share)(toy.linear, params, batch, key)[0] for share in (1, 0)
    )
    plain, _ = objectives.cross_entropy()(toy.linear, params, batch, key)
    assert alone > 0
    chex.assert_trees_all_close(whole, alone + plain, rtol=1e-5)
    function = getattr(objectives, name)
    takes_threat = name in ("grad_align", "linearized_margins", "local_linearity")
    threat = {"threat": THREAT} if takes_threat else {}
    direct, _ = function(0.7, **threat, **options)(toy.linear, params, batch, key)
    chex.assert_trees_all_equal(whole, direct)


def test_options_and_weight_reach_a_file_of_ones_own(case, key, own):
    params, batch = case
    logits = batch["inputs"] @ params["kernel"] + params["bias"][None]
    for power in (2.0, 3.0):
        objective = objectives.regularizer(
            f"{own}:logit_power", 0.5, threat=THREAT, cross_entropy_weight=0, power=power
        )
        loss, aux = objective(toy.linear, params, batch, key)
        expected = jnp.mean(jnp.sum(jnp.abs(logits) ** power, axis=1))
        chex.assert_trees_all_close(loss, 0.5 * expected, rtol=1e-5)
        chex.assert_trees_all_close(aux.metrics["logit_power_penalty"], expected, rtol=1e-5)
    objective = objectives.regularizer(f"{own}:ball", 3.0, threat=THREAT, needed=2.0, extra=1)
    assert objective(None, None, None, None)[0] == pytest.approx(0.6)


def test_a_file_that_changed_is_run_again(tmp_path, monkeypatch):
    """And dataclasses under postponed annotations work in it."""
    # Compiled files, where Python keeps them, tell neither of the two from the other.
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    path = tmp_path / "changing.py"
    text = """
from __future__ import annotations
import dataclasses


@dataclasses.dataclass
class Scale:
    value: float = {}


def f(weight, *, cross_entropy_weight):
    return lambda model, params, batch, key: (Scale().value * weight, None)
"""
    for index, value in enumerate((2.0, 5.0)):
        path.write_text(text.format(value))
        os.utime(path, ns=(index, index))
        objective = objectives.regularizer(f"{path}:f", 3.0, threat=THREAT)
        assert objective(None, None, None, None)[0] == 3.0 * value
    # Unchanged, it is not: building an objective again gives the same function.
    again = objectives.regularizer(f"{path}:f", 3.0, threat=THREAT)
    assert again.__code__ is objective.__code__


def test_a_module_on_the_path_is_imported(own, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(tmp_path)
    assert callable(objectives.regularizer("own_regularizers:logit_power", 1.0, threat=THREAT))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("grad_algn", {}, "regularizer='grad_algn'.*Did you mean 'grad_align'"),
        ("curvature", {}, "'curvature' needs the option 'h'"),
        ("curvature", {"hh": 1.0}, "takes no option 'hh'.*Did you mean 'h'"),
        ("gradient_norm", {"squared": "False"}, "squared='False' must be True or False"),
        ("linearized_margins", {"samples_class": 0}, "samples_class=0 must be True or False"),
        ("no_such_module.at_all:f", {}, "Python finds no module 'no_such_module.at_all'"),
        ("nowhere.py:f", {}, "there is no file 'nowhere.py'"),
        ("OWN:logit_powr", {}, "has no function 'logit_powr'. Did you mean 'logit_power'"),
        ("OWN:constant", {}, "has no function 'constant'"),
        ("OWN:without_cross_entropy", {}, "must take cross_entropy_weight beside its weight"),
        ("OWN:no_objective", {}, "returned int, not an objective"),
        ("OWN:ball", {}, "needs the option 'needed'"),
        ("OWN:anything", {}, "must take cross_entropy_weight beside its weight"),
        (":f", {}, "regularizer=':f' must be package.module:function or file.py:function"),
        (".relative:f", {}, "must be package.module:function"),
    ],
)
def test_what_cannot_be_used_is_named(own, name, options, message):
    with pytest.raises(ValueError, match=message):
        objectives.regularizer(name.replace("OWN", own), 1.0, threat=THREAT, **options)


def test_an_error_inside_the_module_is_not_taken_for_its_absence(tmp_path, monkeypatch):
    (tmp_path / "broken_regularizers.py").write_text("import no_such_package_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_package_at_all"):
        objectives.regularizer("broken_regularizers:f", 1.0, threat=THREAT)
