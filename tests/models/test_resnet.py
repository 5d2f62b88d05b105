"""Residual networks: published sizes, structure, statistics, and degree 1 of the homogeneous
form."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gfa_jax import alignment, models, taps
from gfa_jax.models.resnet import Block, ResNet
from gfa_jax.training import state

LAST_NORM = 2 * 512
"""Parameters of the last BatchNorm of PreAct ResNet-18, which the published count leaves out."""

SIZES = {
    "preact_resnet18": 11_171_146 + LAST_NORM,
    "wide_resnet28_10": 36_479_194,
    "wide_resnet34_10": 46_160_474,
}

# A stage with and one without a change of channels at its start, as the networks have.
TINY = {"num_classes": 5, "stem": 4, "stages": ((4, 4), (8, 8))}


def build(key, **options):
    """A tiny network; where it has BatchNorm, with the statistics of a few batches."""
    module = ResNet(**{**TINY, **options})
    images = jax.random.uniform(key, (3, 8, 8, 3))
    variables = jax.jit(module.init)(key, images)
    if "batch_stats" in variables:
        forward = jax.jit(lambda v: module.apply(v, images, train=True, mutable="batch_stats")[1])
        for _ in range(5):
            variables = {**variables, **forward(variables)}
    return module, variables, images


def radial_degrees(module, variables, images, layers):
    """The degree of every logit of every example in each tap, ``[classes, B]``."""
    apply_fn = taps.tap_linen(module, variables, layers=layers)

    @jax.jit
    def degree(images, label):
        logits, features, grads = taps.feature_gradients(
            apply_fn, images, label, target=lambda logits, labels: logits[:, labels]
        )
        return {
            name: alignment.radial_degree(features[name], grads[name], logits[:, label])
            for name in features
        }

    found = [degree(images, label) for label in range(module.num_classes)]
    return {name: np.stack([degrees[name] for degrees in found]) for name in found[0]}


@pytest.mark.parametrize("name", SIZES)
def test_has_the_published_number_of_parameters(name, key):
    module = models.create(name, num_classes=10, homogeneous=False)
    shapes = jax.eval_shape(module.init, key, jnp.zeros((1, 32, 32, 3)))
    assert state.num_params(shapes["params"]) == SIZES[name]
    norms = sum(leaf.size for leaf in jax.tree.leaves(shapes["batch_stats"]))

    homogeneous = models.create(name, num_classes=10)
    shapes = jax.eval_shape(homogeneous.init, key, jnp.zeros((1, 32, 32, 3)))
    assert state.num_params(shapes["params"]) == SIZES[name] - norms - 10


@pytest.mark.parametrize(
    ("name", "num_layers"),
    [("preact_resnet18", 18), ("wide_resnet28_10", 28 - 2), ("wide_resnet34_10", 34 - 2)],
)
def test_the_name_counts_the_layers(name, num_layers, key):
    """A WideResNet's count takes in its three shortcuts, but not the head."""
    module = models.create(name, num_classes=10)
    params = jax.eval_shape(module.init, key, jnp.zeros((1, 32, 32, 3)))["params"]
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    assert sum("shortcut" in path for path in paths) == 3
    assert sum("shortcut" not in path for path in paths) == num_layers


def test_width_scales_all_channels():
    module = models.create("wide_resnet28_10", num_classes=10, width=0.05)
    assert module.stem == 1
    assert module.stages == ((8,) * 4, (16,) * 4, (32,) * 4)


@pytest.mark.parametrize("size", [8, 7])
def test_blocks_project_where_the_shape_changes(size, key):
    images = jnp.zeros((2, size, size, 4))
    for features, strides, projects in ((4, 1, False), (6, 1, True), (4, 2, True)):
        block = Block(features, strides=strides)
        output, variables = jax.eval_shape(
            lambda x, block=block: block.init_with_output(key, x, train=False), images
        )
        assert output.shape == (2, -(-size // strides), -(-size // strides), features)
        assert ("shortcut" in variables["params"]) == projects


def test_logits_of_the_homogeneous_form_scale_with_its_features(key):
    module, variables, images = build(key, homogeneous=True, input_std=(0.5,))
    assert set(variables) == {"params"}
    logits = jax.jit(lambda x: module.apply(variables, x))
    chex.assert_trees_all_close(logits(3 * images), 3 * logits(images), rtol=1e-4, atol=1e-6)


def test_every_tap_that_is_the_whole_state_has_degree_one(key):
    module, variables, images = build(key, homogeneous=True, input_mean=(0.5, 0.4, 0.3))
    # The shortcut of block 2 takes the activation too, so that nothing passes by it.
    whole = ("normalize", "stem", "block_[0-9]+", "block_2/activation_0", "activation", "head")
    degrees = radial_degrees(module, variables, images, whole)
    assert len(degrees) == 9
    for name, values in degrees.items():
        np.testing.assert_allclose(values, 1, atol=2e-3, err_msg=name)


def test_the_two_sides_of_a_block_share_degree_one(key):
    module, variables, images = build(key, homogeneous=True)
    degrees = radial_degrees(module, variables, images, ("block_2/(shortcut|conv_1)",))
    shortcut, branch = degrees["block_2/shortcut"], degrees["block_2/conv_1"]
    np.testing.assert_allclose(shortcut + branch, 1, atol=2e-3)
    assert np.abs(branch - 1).min() > 1e-2


def test_the_usual_form_has_degree_one_after_its_last_statistics_alone(key):
    module, variables, images = build(key)
    degrees = radial_degrees(module, variables, images, ("normalize", "block_[0-9]+", "activation"))
    # The head's bias still starts at zero.
    np.testing.assert_allclose(degrees.pop("activation"), 1, atol=2e-3)
    for name, values in degrees.items():
        assert np.median(np.abs(values - 1)) > 0.1, name


def test_statistics_change_in_training_mode_alone(key):
    module, variables, images = build(key)
    statistics = {"batch_stats": variables["batch_stats"]}
    model = taps.linen_model(module, statistics)
    run = jax.jit(
        lambda train: model(variables["params"], {}, images, train=train), static_argnums=0
    )
    (usual, _), kept = run(False)
    (by_batch, _), changed = run(True)
    chex.assert_trees_all_equal(kept, statistics)
    before, after = (jax.tree.leaves(tree) for tree in (statistics, changed))
    assert len(after) == 2 * (2 * 4 + 1)
    assert not any(np.array_equal(x, y) for x, y in zip(before, after, strict=True))
    assert not np.allclose(usual, by_batch)


@pytest.mark.parametrize("initializer", ["he", "orthogonal"])
def test_variance_stays_put_in_the_homogeneous_form(initializer, key):
    stages = ((32,) * 6, (32,) * 6)
    module = ResNet(5, stem=32, stages=stages, homogeneous=True, initializer=initializer)
    images = jax.random.normal(key, (4, 8, 8, 3))
    variables = jax.jit(module.init)(key, images)
    apply_fn = taps.tap_linen(module, variables, layers=("stem", "block_[0-9]+"))
    _, features = jax.jit(lambda x: apply_fn({}, x))(images)
    power = {name: float(jnp.mean(feature**2)) for name, feature in features.items()}
    assert len(power) == 13
    # Between the borders' loss, where kernels see padding, and a factor of e.
    assert all(0.3 < value / power["stem"] < 3.5 for value in power.values()), power


@pytest.mark.parametrize("homogeneous", [True, False])
def test_bfloat16_computes_in_half_and_answers_in_float32(homogeneous, key):
    module, variables, images = build(key, homogeneous=homogeneous)
    half = module.clone(dtype=jnp.bfloat16)
    shapes = jax.eval_shape(half.init, key, images)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(shapes))
    apply_fn = taps.tap_linen(half, variables, layers="block_3")
    logits, features = jax.jit(lambda x: apply_fn({}, x))(images)
    assert features["block_3"].dtype == jnp.bfloat16
    assert logits.dtype == jnp.float32
    expected = jax.jit(lambda x: module.apply(variables, x))(images)
    chex.assert_trees_all_close(logits, expected, atol=0.05 * float(jnp.abs(expected).max()))


def test_bad_options_name_the_argument(key):
    images = jnp.zeros((1, 8, 8, 3))
    with pytest.raises(ValueError, match=r"stages=\(\) must have at least one block"):
        ResNet(5, stem=4, stages=()).init(key, images)
    with pytest.raises(ValueError, match=r"stages=\(\(4,\), \(\)\) must have at least one block"):
        ResNet(5, stem=4, stages=((4,), ())).init(key, images)
    with pytest.raises(ValueError, match="activation_fn='gelu' is not homogeneous"):
        ResNet(5, stem=4, stages=((4,),), homogeneous=True, activation_fn="gelu").init(key, images)
    with pytest.raises(ValueError, match="initializer='xavier' is not one of"):
        ResNet(5, stem=4, stages=((4,),), initializer="xavier").init(key, images)
