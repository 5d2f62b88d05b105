"""Every model: its shape, its taps, and what homogeneous means."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gfa_jax import taps
from gfa_jax.models import MODELS, activations, create
from gfa_jax.training import state

FORMS = [
    (name, homogeneous)
    for name, spec in MODELS.items()
    for homogeneous in (True, False)
    if spec.has_homogeneous_form or not homogeneous
]
CNNS = ("cnn4", "cnn6", "cnn7")
NUM_TAPS = {
    "cnn4": 5,
    "cnn6": 7,
    "cnn7": 7,
    "preact_resnet18": 1 + 8,
    "wide_resnet28_10": 1 + 12,
    "wide_resnet34_10": 1 + 15,
    "vit_tiny": 2,
    "vit_small": 2,
}


def image_shape(name):
    return (8, 8, 1) if name == "cnn4" else (32, 32, 3)


def build(name, key, **options):
    module = create(name, num_classes=5, **options)
    images = jax.random.uniform(key, (2, *image_shape(name)))
    return module, jax.jit(module.init)(key, images), images


def initial_shapes(name, key, size=None, **options):
    """The variables' shapes, which cost no computation, and the module."""
    module = create(name, num_classes=5, **options)
    height, width, channels = image_shape(name)
    images = jnp.zeros((2, size or height, size or width, channels))
    return module, jax.eval_shape(module.init, key, images), images


@pytest.mark.parametrize(("name", "homogeneous"), FORMS)
def test_logits_and_default_taps(name, homogeneous, key):
    module, variables, images = initial_shapes(name, key, homogeneous=homogeneous)
    spec = MODELS[name]

    def forward(variables, images):
        patterns = [spec.input_layer, spec.hidden_layers]
        return taps.tap_linen(module, variables, layers=patterns)({}, images)

    logits, features = jax.eval_shape(forward, variables, images)
    assert logits.shape == (2, 5)
    assert logits.dtype == jnp.float32
    assert features[spec.input_layer].shape == images.shape
    assert len(features) == NUM_TAPS[name]


@pytest.mark.parametrize("name", CNNS)
def test_hidden_taps_of_cnns_are_activations(name, key):
    module, variables, images = build(name, key, width=0.25)
    apply_fn = taps.tap_linen(module, variables, layers=MODELS[name].hidden_layers)
    _, features = jax.jit(lambda x: apply_fn({}, x))(images)
    assert all((feature >= 0).all() for feature in features.values())


@pytest.mark.parametrize("name", MODELS)
def test_smallest_image(name, key):
    _, variables, _ = initial_shapes(name, key, size=MODELS[name].min_size, homogeneous=False)
    assert all(leaf.size > 0 for leaf in jax.tree.leaves(variables))


@pytest.mark.parametrize("name", CNNS)
def test_homogeneous_models_scale_with_their_normalised_input(name, key):
    module, variables, images = build(name, key, input_mean=(0.0,), input_std=(0.5,), width=0.25)
    logits = jax.jit(lambda x: module.apply(variables, x))
    chex.assert_trees_all_close(logits(3 * images), 3 * logits(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["cnn4", "preact_resnet18"])
def test_activation_functions(name, key):
    """What tells them apart: degree 1, and a second derivative of the logits."""
    is_linear_by_pieces, scales = {}, {}
    for activation_fn in activations.ACTIVATIONS:
        homogeneous = activation_fn in activations.HOMOGENEOUS
        options = {"width": 0.0625 if name != "cnn4" else 1.0, "homogeneous": homogeneous}
        module, variables, images = build(name, key, activation_fn=activation_fn, **options)

        def logit(images, module=module, variables=variables):
            return module.apply(variables, images)[:, 0].sum()

        def second(images, logit=logit):
            return jax.grad(lambda x: jax.grad(logit)(x).sum())(images)

        is_linear_by_pieces[activation_fn] = not np.abs(jax.jit(second)(images)).max() > 0
        logit = jax.jit(logit)
        scales[activation_fn] = float(logit(3 * images) / logit(images))
    assert is_linear_by_pieces == {
        name: name in ("relu", "leaky_relu") for name in activations.ACTIVATIONS
    }
    assert all(abs(scales[name] - 3) < 1e-3 for name in activations.HOMOGENEOUS)
    assert all(abs(scales[name] - 3) > 1e-2 for name in ("gelu", "silu"))


@pytest.mark.parametrize("name", [name for name, homogeneous in FORMS if homogeneous])
def test_homogeneous_models_have_no_biases_and_no_statistics(name, key):
    _, variables, _ = initial_shapes(name, key)
    assert set(variables) == {"params"}
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(variables)]
    assert not any("bias" in path or "scale" in path for path in paths)


@pytest.mark.parametrize("name", MODELS)
def test_the_usual_form_has_biases(name, key):
    _, variables, _ = initial_shapes(name, key, homogeneous=False)
    assert "bias" in variables["params"]["head"]
    assert ("batch_stats" in variables) == (name not in ("cnn4", "cnn6", "vit_tiny", "vit_small"))


def test_cnn7_has_the_published_size(key):
    """Four convolutions and three dense layers with BatchNorm: about 1.15 M parameters."""
    _, variables, _ = build("cnn7", key, homogeneous=False)
    kernels = 9 * (3 * 64 + 64 * 64 + 64 * 128 + 128 * 128) + 3200 * 256 + 256 * 256 + 256 * 5
    biases = 64 + 64 + 128 + 128 + 256 + 256
    assert state.num_params(variables["params"]) == kernels + 3 * biases + 5


@pytest.mark.parametrize("initializer", ["he", "orthogonal"])
def test_initialisation_keeps_the_scale_of_the_signal(initializer, key):
    module, variables, _ = build("cnn6", key, initializer=initializer)
    images = jax.random.normal(key, (8, 32, 32, 3))
    apply_fn = taps.tap_linen(module, variables, layers="block_[0-9]+")
    _, features = jax.jit(lambda x: apply_fn({}, x))(images)
    for feature in features.values():
        assert 0.05 < np.sqrt(np.mean(np.square(feature))) < 20


def test_bad_options_name_the_argument():
    with pytest.raises(ValueError, match="model='cnn5' is not one of .*Did you mean"):
        create("cnn5", num_classes=10)
    with pytest.raises(ValueError, match="initializer='xavier' is not one of"):
        create("cnn4", num_classes=10, initializer="xavier")
    with pytest.raises(ValueError, match="activation_fn='swish' is not one of"):
        create("cnn4", num_classes=10, activation_fn="swish")
    with pytest.raises(ValueError, match="activation_fn='silu' is not homogeneous: pass homog"):
        create("cnn4", num_classes=10, activation_fn="silu")
    with pytest.raises(ValueError, match="width=0 must be"):
        create("cnn4", num_classes=10, width=0)
    with pytest.raises(ValueError, match=r"input_std\[0\]=0.0"):
        create("cnn4", num_classes=10, input_std=(0.0,))
    with pytest.raises(ValueError, match="num_classes=1 must be at least 2"):
        create("cnn4", num_classes=1)
