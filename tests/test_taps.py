"""Taps against splitting the model by hand, on every kind of block, and their error messages."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from gfa_jax import losses, taps

BATCH, SIZE, CLASSES = 4, 8, 3


class Plain(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Dense(6, name="first")(x.reshape(x.shape[0], -1)))
        return nn.Dense(CLASSES, name="head")(x)


class Residual(nn.Module):
    """Convolutions, BatchNorm, a residual branch, and rematerialisation."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(4, (3, 3), name="stem")(x)
        x = nn.remat(ResidualBlock, static_argnums=(2,))(name="block")(x, train)
        return nn.Dense(CLASSES, name="head")(nn.relu(x).mean(axis=(1, 2)))


class ResidualBlock(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        y = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        y = nn.Conv(4, (3, 3), name="conv")(nn.relu(y))
        return x + y


class ViTStyle(nn.Module):
    """Patches, attention with a pre-norm, an MLP, and a setup-style list of blocks."""

    def setup(self):
        self.embed = nn.Conv(8, (4, 4), strides=(4, 4))
        self.blocks = [ViTBlock() for _ in range(2)]
        self.head = nn.Dense(CLASSES)

    def __call__(self, x, train=False):
        x = self.embed(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(axis=1))


class ViTBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(2, name="attention")(nn.LayerNorm(name="norm")(x))
        return x + nn.Dense(8, name="out")(nn.gelu(nn.Dense(16, name="in")(x)))


MODELS = {
    "plain": (Plain, ["first", "head@input"]),
    "residual_remat_batchnorm": (Residual, ["stem", "block", "block/conv", "block/norm@input"]),
    "vit": (ViTStyle, ["embed", "blocks_[01]", "blocks_1/attention"]),
}


@pytest.fixture(params=MODELS)
def case(request, key):
    """A module, its variables, patterns, inputs and labels."""
    cls, layers = MODELS[request.param]
    module = cls()
    inputs = jax.random.uniform(key, (BATCH, SIZE, SIZE, 2))
    labels = jnp.arange(BATCH) % CLASSES
    return module, jax.jit(module.init)(key, inputs[:1]), layers, inputs, labels


def test_taps_do_not_change_the_logits(case):
    module, variables, layers, inputs, _ = case
    apply_fn = taps.tap_linen(module, variables, layers=layers)
    plain = module.apply(variables, inputs)
    logits, features = apply_fn({}, inputs)
    chex.assert_trees_all_equal(logits, plain)
    zeros = taps.zero_taps(apply_fn, inputs)
    assert set(zeros) == set(features)
    chex.assert_trees_all_equal(apply_fn(zeros, inputs)[0], plain)


def test_gradients_agree_with_differences_of_displaced_features(case):
    module, variables, layers, inputs, labels = case
    with jax.enable_x64(True):
        variables = jax.tree.map(lambda v: jnp.asarray(v, jnp.float64), variables)
        inputs = jnp.asarray(inputs, jnp.float64)
        apply_fn = taps.tap_linen(module, variables, layers=layers)
        zeros = taps.zero_taps(apply_fn, inputs)

        @jax.jit
        def target(tap_values):
            return losses.log_odds(apply_fn(tap_values, inputs)[0], labels)

        _, _, grads = jax.jit(lambda x: taps.feature_gradients(apply_fn, x, labels))(inputs)
        for name, zero in zeros.items():
            move = jax.random.normal(jax.random.key(1), zero.shape, zero.dtype) * 1e-5
            up, down = target({**zeros, name: move}), target({**zeros, name: -move})
            difference = (up - down) / 2
            inner = jnp.sum((grads[name] * move).reshape(BATCH, -1), axis=1)
            chex.assert_trees_all_close(inner, difference, rtol=1e-5, atol=1e-12)


def test_second_order_parameter_gradients_agree_with_float64_differences(case):
    module, variables, layers, inputs, labels = case
    with jax.enable_x64(True):
        variables = jax.tree.map(lambda v: jnp.asarray(v, jnp.float64), variables)
        inputs = jnp.asarray(inputs, jnp.float64)
        rest = {name: value for name, value in variables.items() if name != "params"}

        @jax.jit
        def penalty(params):
            apply_fn = taps.tap_linen(module, {"params": params, **rest}, layers=layers)
            _, features, grads = taps.feature_gradients(apply_fn, inputs, labels)
            return sum(jnp.sum(jnp.sin(features[n]) * grads[n] + grads[n] ** 2) for n in features)

        check_grads(penalty, (variables["params"],), order=1, modes=["rev"], eps=1e-6, rtol=1e-4)


def test_matches_splitting_the_model_by_hand(key):
    module = Plain()
    inputs, labels = jax.random.normal(key, (BATCH, SIZE)), jnp.array([0, 1, 2, 0])
    variables = module.init(key, inputs)
    params = variables["params"]

    def head(hidden):
        logits = nn.Dense(CLASSES).apply({"params": params["head"]}, nn.relu(hidden))
        return jnp.sum(losses.cross_entropy(logits, labels))

    hidden = nn.Dense(6).apply({"params": params["first"]}, inputs)
    apply_fn = taps.tap_linen(module, variables, layers="first")
    _, features, grads = taps.feature_gradients(apply_fn, inputs, labels, target="cross_entropy")
    chex.assert_trees_all_close(features["first"], hidden, rtol=1e-6)
    chex.assert_trees_all_close(grads["first"], jax.grad(head)(hidden), rtol=1e-5, atol=1e-7)


def test_input_taps(key):
    module = Plain()
    inputs, labels = jax.random.normal(key, (BATCH, SIZE)), jnp.array([0, 1, 2, 0])
    variables = module.init(key, inputs)
    apply_fn = taps.tap_linen(module, variables, layers=["input", "first"])
    _, features, grads = taps.feature_gradients(apply_fn, inputs, labels, target="margin")
    assert set(features) == {"input", "first"}
    chex.assert_trees_all_equal(features["input"], inputs)
    expected = jax.grad(lambda x: jnp.sum(losses.margin(module.apply(variables, x), labels)))(
        inputs
    )
    chex.assert_trees_all_close(grads["input"], expected, rtol=1e-6)


def test_each_example_has_its_own_gradient(case):
    module, variables, layers, inputs, labels = case
    apply_fn = taps.tap_linen(module, variables, layers=layers)
    gradients = jax.jit(lambda x, y: taps.feature_gradients(apply_fn, x, y)[2])
    grads, alone = gradients(inputs, labels), gradients(inputs[1:2], labels[1:2])
    for name in grads:
        chex.assert_trees_all_close(alone[name], grads[name][1:2], rtol=1e-4, atol=1e-6)


def test_a_tap_of_batch_one_is_refused_instead_of_summing_over_the_batch(key):
    module = Plain()
    inputs = jax.random.normal(key, (BATCH, SIZE))
    apply_fn = taps.tap_linen(module, module.init(key, inputs), layers="first")
    one = taps.zero_taps(apply_fn, inputs[:1])
    with pytest.raises(
        ValueError, match=r"tap of 'first' has shape \(1, 6\), the feature \(4, 6\)"
    ):
        apply_fn(one, inputs)


def test_linen_model_updates_batch_statistics_in_training_mode_only(key):
    module = Residual()
    inputs = jax.random.uniform(key, (BATCH, SIZE, SIZE, 2))
    variables = dict(module.init(key, inputs))
    params = variables.pop("params")
    model = taps.linen_model(module, variables, layers="block")
    (logits, features), state = model(params, {}, inputs, train=True)
    assert set(features) == {"block"}
    expected, updates = module.apply(
        {"params": params, **variables}, inputs, train=True, mutable=["batch_stats"]
    )
    chex.assert_trees_all_close(logits, expected, rtol=1e-6)
    chex.assert_trees_all_close(state, updates, rtol=1e-6)
    _, unchanged = model(params, {}, inputs, train=False)
    chex.assert_trees_all_equal(unchanged, variables)
    assert not np.allclose(
        state["batch_stats"]["block"]["norm"]["mean"],
        variables["batch_stats"]["block"]["norm"]["mean"],
    )


def test_zero_taps_cost_no_memory_in_a_compiled_step(key):
    module = Plain()
    inputs, labels = jax.random.normal(key, (BATCH, SIZE)), jnp.array([0, 1, 2, 0])
    variables = module.init(key, inputs)

    def tapped(inputs):
        apply_fn = taps.tap_linen(module, variables, layers=["first"])
        return taps.feature_gradients(apply_fn, inputs, labels)[2]["first"]

    def plain(inputs):
        params = variables["params"]
        hidden = nn.Dense(6).apply({"params": params["first"]}, inputs)
        head = lambda h: nn.Dense(CLASSES).apply({"params": params["head"]}, nn.relu(h))  # noqa: E731
        return jax.grad(lambda h: jnp.sum(losses.log_odds(head(h), labels)))(hidden)

    flops = [jax.jit(f).lower(inputs).compile().cost_analysis()["flops"] for f in (tapped, plain)]
    assert flops[0] <= 1.02 * flops[1]


def test_a_pattern_that_matches_nothing_lists_the_layers(key):
    module = Residual()
    inputs = jnp.zeros((1, SIZE, SIZE, 2))
    apply_fn = taps.tap_linen(module, module.init(key, inputs), layers=["block/cnv"])
    with pytest.raises(
        ValueError,
        match=r"'block/cnv' matches no layer of Residual. Did you mean 'block/conv'\?.*norm.*stem",
    ):
        apply_fn({}, inputs)


def test_a_layer_that_is_called_twice_is_refused(key):
    class Shared(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Dense(3, name="shared")
            return layer(layer(x))

    inputs = jnp.ones((2, 3))
    apply_fn = taps.tap_linen(Shared(), Shared().init(key, inputs), layers="shared")
    with pytest.raises(ValueError, match="'shared' is called 2 times"):
        apply_fn({}, inputs)


def test_a_layer_that_returns_no_array_is_refused(key):
    class Pair(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x, x

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Pair(name="pair")(x)[0]

    inputs = jnp.ones((2, 3))
    apply_fn = taps.tap_linen(Outer(), Outer().init(key, inputs), layers="pair")
    with pytest.raises(ValueError, match="'pair' gives tuple, not one array"):
        apply_fn({}, inputs)


def test_a_feature_without_batch_axis_is_refused(key):
    apply_fn = lambda tap_values, inputs: (inputs, {"mean": inputs.mean(axis=0)})  # noqa: E731
    with pytest.raises(
        ValueError, match="'mean' has shape \\(3,\\).*leading axis must be the batch of 2"
    ):
        taps.zero_taps(apply_fn, jnp.ones((2, 3)))


def test_an_invalid_pattern_is_named():
    with pytest.raises(ValueError, match=r"layers='block\(' is not a valid regular expression"):
        taps.tap_linen(Plain(), {}, layers="block(")


class ScannedLayer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.relu(nn.Dense(4, name="dense")(x)), None


class Scanned(nn.Module):
    """A layer, then three in a scan that lifts `collections` beside the parameters."""

    collections: tuple[str, ...] = ()

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, name="before")(x)
        axes = dict.fromkeys(("params", *self.collections), 0)
        scan = nn.scan(ScannedLayer, variable_axes=axes, split_rngs={"params": True}, length=3)
        return scan(name="layers")(x, None)[0]


def scanned(key, *collections):
    model, inputs = Scanned(collections), jax.random.normal(key, (2, 4))
    return model, {"params": model.init(key, inputs)["params"]}, inputs


def test_a_layer_in_a_lifted_transform_that_hides_the_taps_is_refused(key):
    model, variables, inputs = scanned(key)
    apply_fn = taps.tap_linen(model, variables, layers=["before", "layers/dense"])
    with pytest.raises(
        ValueError, match="'layers/dense' cannot be tapped: it lies inside a lifted"
    ):
        apply_fn({}, inputs)


def test_the_input_of_a_layer_called_by_keyword(key):
    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, name="head")(inputs=x)

    inputs = jax.random.normal(key, (2, 4))
    apply_fn = taps.tap_linen(Outer(), Outer().init(key, inputs), layers="head@input")
    chex.assert_trees_all_equal(apply_fn({}, inputs)[1]["head@input"], inputs)


def test_a_scanned_layer_is_tapped_where_the_module_lifts_the_collections(key):
    model, variables, inputs = scanned(key, "gfa_features", "gfa_taps")
    apply_fn = taps.tap_linen(model, variables, layers="layers/dense")
    logits, features = apply_fn({}, inputs)
    chex.assert_trees_all_equal(logits, model.apply(variables, inputs))
    assert features["layers/dense"].shape == (3, 2, 4)
