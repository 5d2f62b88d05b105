"""The examples of docs/adapters.md that train, run as they stand there, from the same weights."""

import functools
import pathlib
import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gfa_jax import objectives, taps

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "adapters.md"
PART = re.search(r"^## Training with GFA\n(.*)\Z", PAGE.read_text(), re.M | re.S)[1]
BLOCKS = dict(re.findall(r"^### ([^\n]+)\n[^#]*?```python\n(.*?)^```", PART, re.M | re.S))
MODULES = {"Flax linen": "flax", "Flax nnx": "flax", "Equinox": "equinox", "Haiku": "haiku"}
LAYERS = ("hidden", "head")


class Reference(nn.Module):
    @nn.compact
    def __call__(self, inputs, train=False):
        hidden = nn.Dense(32, name="hidden")(inputs.reshape(len(inputs), -1))
        return nn.Dense(10, name="head")(nn.relu(hidden))


def to_linen(framework, params):
    """Returns parameters, or gradients, of an example as linen names and shapes them."""
    if framework == "Flax linen":
        return params
    if framework == "Flax nnx":
        return {name: {kind: params[name][kind][...] for kind in params[name]} for name in LAYERS}
    if framework == "Equinox":
        layers = dict(zip(LAYERS, params.layers, strict=True))
        return {name: {"kernel": one.weight.T, "bias": one.bias} for name, one in layers.items()}
    modules = dict(zip(LAYERS, ("mlp/~/linear_0", "mlp/~/linear_1"), strict=True))
    return {
        name: {"kernel": params[module]["w"], "bias": params[module]["b"]}
        for name, module in modules.items()
    }


@pytest.fixture
def batch():
    """Images of noise around a pattern of each class."""
    rng = np.random.default_rng(0)
    labels = np.arange(30) % 10
    images = rng.uniform(size=(10, 8, 8, 1))[labels] * 0.7 + rng.uniform(size=(30, 8, 8, 1)) * 0.3
    return {"inputs": jnp.asarray(images, jnp.float32), "labels": jnp.asarray(labels)}


def test_every_framework_has_an_example():
    assert set(BLOCKS) == {"Loop", *MODULES}


@pytest.mark.parametrize("framework", MODULES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_example_is_the_linen_model_and_trains(framework, batch, key):
    pytest.importorskip(MODULES[framework], reason=f"{framework} is an extra of the tests")
    names = {"batch": batch}
    for title in ("Loop", framework):
        exec(compile(BLOCKS[title], str(PAGE), "exec"), names)
    reference = taps.linen_model(Reference(), layers=["input", "hidden"])
    linen_params = to_linen(framework, names["params"])

    @functools.partial(jax.jit, static_argnums=0)
    def loss_and_grads(model, params):
        loss_fn = functools.partial(objectives.gfa(1.0), model)
        return jax.value_and_grad(loss_fn, has_aux=True)(params, batch, key)

    (loss, aux), grads = loss_and_grads(names["model"], names["params"])
    (expected_loss, expected_aux), expected_grads = loss_and_grads(reference, linen_params)
    chex.assert_trees_all_close(
        (loss, aux.metrics), (expected_loss, expected_aux.metrics), rtol=1e-4
    )
    assert {"alignment/input", "alignment/hidden"} <= set(aux.metrics)
    chex.assert_trees_all_close(to_linen(framework, grads), expected_grads, rtol=1e-3, atol=1e-5)
    logits = [
        model(params, {}, batch["inputs"], train=False)[0][0]
        for model, params in ((names["model"], names["params"]), (reference, linen_params))
    ]
    chex.assert_trees_all_close(*logits, rtol=1e-4, atol=1e-5)

    trained, history = names["fit"](reference, linen_params, batch)
    chex.assert_trees_all_close(
        to_linen(framework, names["trained"]), trained, rtol=1e-2, atol=1e-3
    )
    first, last = names["history"][0], names["history"][-1]
    assert last["loss"] < first["loss"] - 0.5
    assert last["cross_entropy"] < first["cross_entropy"]
    for name in ("alignment/input", "alignment/hidden"):
        assert last[name] > first[name] + 0.05
        np.testing.assert_allclose(last[name], history[-1][name], atol=1e-3)
