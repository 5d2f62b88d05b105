"""Vision transformers: published sizes, options, and where their logits can be aligned."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gfa_jax import alignment, models, taps
from gfa_jax.models.vit import ViT, sincos_positions
from gfa_jax.training import state

TINY = {"num_classes": 5, "features": 8, "depth": 2, "num_heads": 2, "hidden": 16, "patch_size": 2}


def build(key, **options):
    module = ViT(**{**TINY, **options})
    images = jax.random.uniform(key, (3, 6, 4, 3))
    return module, jax.jit(module.init)(key, images), images


@pytest.mark.parametrize(
    ("features", "num_heads", "size"), [(192, 3, 5_717_416), (384, 6, 22_050_664)]
)
def test_has_the_published_number_of_parameters(features, num_heads, size, key):
    """ViT-Ti/16 and ViT-S/16 for ImageNet, with a class token, which had a position of its own."""
    module = ViT(
        1000,
        features=features,
        depth=12,
        num_heads=num_heads,
        hidden=4 * features,
        patch_size=16,
        pooling="token",
    )
    shapes = jax.eval_shape(module.init, key, jnp.zeros((1, 224, 224, 3)))
    assert state.num_params(shapes["params"]) == size - features


@pytest.mark.parametrize(("name", "size"), [("vit_tiny", 5_362_378), ("vit_small", 21_341_578)])
def test_size_for_small_images(name, size, key):
    module = models.create(name, num_classes=10, homogeneous=False)
    shapes = jax.eval_shape(module.init, key, jnp.zeros((1, 32, 32, 3)))
    assert state.num_params(shapes["params"]) == size


def test_width_keeps_the_heads():
    module = models.create("vit_small", num_classes=10, homogeneous=False, width=0.1)
    assert (module.features, module.num_heads, module.hidden) == (36, 6, 144)


@pytest.mark.parametrize("pooling", ["mean", "token"])
@pytest.mark.parametrize("positions", ["learned", "sincos2d"])
def test_taps_and_shapes(pooling, positions, key):
    module, variables, images = build(key, pooling=pooling, positions=positions)
    apply_fn = taps.tap_linen(
        module, variables, layers=("normalize", "embedding", "block_[0-9]+", "norm")
    )
    logits, features = jax.eval_shape(lambda x: apply_fn({}, x), images)
    assert (logits.shape, logits.dtype) == ((3, 5), jnp.float32)
    num_tokens = 6 + (pooling == "token")
    assert {name: feature.shape for name, feature in features.items()} == {
        "normalize": images.shape,
        "embedding": (3, 6, 8),
        "block_0": (3, num_tokens, 8),
        "block_1": (3, num_tokens, 8),
        "norm": (3, num_tokens, 8),
    }
    assert ("positions" in variables["params"]) == (positions == "learned")
    assert ("token" in variables["params"]) == (pooling == "token")


def test_embedding_is_a_convolution_of_patches(key):
    module, variables, images = build(key)
    apply_fn = taps.tap_linen(module, variables, layers="embedding")
    _, features = jax.jit(lambda x: apply_fn({}, x))(images)
    kernel = variables["params"]["embedding"]["kernel"].reshape(2, 2, 3, 8)
    expected = jax.lax.conv_general_dilated(
        images, kernel, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    chex.assert_trees_all_close(features["embedding"], expected.reshape(3, 6, 8), atol=1e-5)


def test_degree_is_one_after_the_last_layer_norm_and_zero_before(key):
    module, variables, images = build(key)
    apply_fn = taps.tap_linen(module, variables, layers=("norm", "block_1"))

    @jax.jit
    def degrees(images):
        labels = jnp.array([0, 1, 2])
        logits, features, grads = taps.feature_gradients(
            apply_fn, images, labels, target=lambda logits, labels: logits[jnp.arange(3), labels]
        )
        chosen = logits[jnp.arange(3), labels]
        return {
            name: alignment.radial_degree(features[name], grads[name], chosen) for name in features
        }

    found = degrees(images)
    np.testing.assert_allclose(found["norm"], 1, atol=1e-3)  # the head's bias starts at zero
    np.testing.assert_allclose(found["block_1"], 0, atol=1e-3)


def test_sincos_positions_are_distinct_and_of_equal_length():
    positions = sincos_positions(4, 6, 16)
    assert positions.shape == (24, 16)
    np.testing.assert_allclose(np.sum(positions**2, axis=1), 8, rtol=1e-5)
    assert len(np.unique(positions.round(4), axis=0)) == 24
    # One step to the right changes the first half alone, the column's.
    assert np.array_equal(positions[0, 8:], positions[1, 8:])
    np.testing.assert_allclose(positions[1, :4], np.sin(10_000.0 ** -np.linspace(0, 1, 4)))


def test_bfloat16_computes_in_half_and_answers_in_float32(key):
    module, variables, images = build(key)
    half = module.clone(dtype=jnp.bfloat16)
    apply_fn = taps.tap_linen(half, variables, layers="block_1")
    logits, features = jax.jit(lambda x: apply_fn({}, x))(images)
    assert features["block_1"].dtype == jnp.bfloat16
    assert logits.dtype == jnp.float32
    expected = jax.jit(lambda x: module.apply(variables, x))(images)
    chex.assert_trees_all_close(logits, expected, atol=0.05 * float(jnp.abs(expected).max()))


def test_bad_options_name_the_argument(key):
    images = jnp.zeros((1, 6, 4, 3))
    for options, message in (
        ({"positions": "sincos"}, "positions='sincos' is not one of .*Did you mean 'sincos2d'"),
        ({"pooling": "max"}, "pooling='max' is not one of"),
        ({"depth": 0}, "depth=0 must be an integer >= 1"),
        ({"num_heads": 3}, "num_heads=3 must divide features=8"),
        ({"patch_size": 4}, "images of 6x4 are not whole patches of 4x4"),
        ({"features": 6, "positions": "sincos2d"}, "features=6 must be a multiple of 4"),
    ):
        with pytest.raises(ValueError, match=message):
            ViT(**{**TINY, **options}).init(key, images)
    with pytest.raises(ValueError, match="model='vit_tiny' has no homogeneous form"):
        models.create("vit_tiny", num_classes=10)
    with pytest.raises(ValueError, match="activation_fn='silu' is for networks of ReLUs"):
        models.create("vit_tiny", num_classes=10, homogeneous=False, activation_fn="silu")
    with pytest.raises(ValueError, match="initializer='orthogonal' is for networks of ReLUs"):
        models.create("vit_tiny", num_classes=10, homogeneous=False, initializer="orthogonal")
