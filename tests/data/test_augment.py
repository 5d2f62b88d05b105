"""Tests of gfa_jax.data.augment against a NumPy enumeration of all possible crops."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gfa_jax.data import random_crop_flip

augment = jax.jit(random_crop_flip, static_argnames=("padding", "flip"))


def candidates(image, padding, flip):
    """All images that the augmentation may return, in the order (flip, row, column)."""
    height, width, _ = image.shape
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    crops = [
        padded[row : row + height, column : column + width]
        for row in range(2 * padding + 1)
        for column in range(2 * padding + 1)
    ]
    return np.stack(crops + [crop[:, ::-1] for crop in crops] if flip else crops)


def chosen(images, outputs, padding, flip):
    """Index of the candidate that each output equals exactly; fails where there is not just one."""
    indices = []
    for image, output in zip(images, np.asarray(outputs), strict=True):
        matches = np.all(candidates(image, padding, flip) == output, axis=(1, 2, 3))
        assert matches.sum() == 1
        indices.append(int(np.argmax(matches)))
    return np.array(indices)


def distinct_images(num, height=4, width=5, channels=2):
    """Images whose pixels are all different and not zero, so no two candidates are alike."""
    size = height * width * channels
    values = np.random.default_rng(0).permuted(
        np.tile(np.arange(1, size + 1, dtype=np.float32), (num, 1)), axis=1
    )
    return (values / (size + 1)).reshape(num, height, width, channels)


@pytest.mark.parametrize(
    ("padding", "flip", "num_candidates"),
    [(1, True, 18), (2, False, 25), (0, True, 2), (4, True, 162)],
)
def test_every_output_is_a_candidate_and_every_candidate_occurs(padding, flip, num_candidates):
    images = distinct_images(1500 if num_candidates > 100 else 4000, 9, 9, 1)
    outputs = augment(jax.random.key(1), images, padding=padding, flip=flip)
    counts = np.bincount(chosen(images, outputs, padding, flip), minlength=num_candidates)
    assert len(counts) == num_candidates
    assert counts.min() > 0
    # The statistic has mean d = num_candidates - 1 and variance 2 d; six sigma above it is absurd.
    expected = len(images) / num_candidates
    statistic = ((counts - expected) ** 2 / expected).sum()
    degrees = num_candidates - 1
    assert statistic < degrees + 6 * np.sqrt(2 * degrees)


def test_examples_are_independent():
    # All pairs (crop of example i, crop of example i + 1) occur: neither determines the other.
    images = np.repeat(distinct_images(1), 4000, axis=0)
    outputs = augment(jax.random.key(2), images, padding=1, flip=True)
    indices = chosen(images, outputs, 1, True)
    pairs = np.zeros((18, 18), int)
    np.add.at(pairs, (indices[:-1], indices[1:]), 1)
    assert pairs.min() > 0


def test_same_key_same_result_and_another_key_another():
    images = distinct_images(16)
    first, again, other = (
        augment(jax.random.key(seed), images, padding=2, flip=True) for seed in (3, 3, 4)
    )
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)


def test_jit_and_sharding_do_not_change_the_result():
    images = distinct_images(8)
    expected = random_crop_flip(jax.random.key(5), images, padding=2, flip=True)
    jitted = augment(jax.random.key(5), images, padding=2, flip=True)
    np.testing.assert_array_equal(jitted, expected)

    num_devices = max(n for n in (1, 2, 4) if n <= jax.device_count())
    mesh = Mesh(np.array(jax.devices()[:num_devices]), ("data",))
    sharded = jax.device_put(images, NamedSharding(mesh, PartitionSpec("data")))
    output = augment(jax.random.key(5), sharded, padding=2, flip=True)
    assert len(output.sharding.device_set) == num_devices
    np.testing.assert_array_equal(output, expected)


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32])
def test_dtype_and_shape_are_kept(dtype):
    images = (distinct_images(3) * 255).astype(dtype)
    output = augment(jax.random.key(0), images, padding=1, flip=True)
    assert output.dtype == dtype
    assert output.shape == images.shape


def test_nothing_to_do_returns_the_images_and_draws_nothing():
    images = jax.numpy.asarray(distinct_images(3))
    identity = functools.partial(random_crop_flip, padding=0, flip=False)
    assert identity(jax.random.key(0), images) is images
    assert not jax.make_jaxpr(identity)(jax.random.key(0), images).eqns


def test_padding_is_black():
    images = np.ones((64, 3, 3, 1), np.float32)
    outputs = augment(jax.random.key(0), images, padding=3, flip=False)
    # At an offset of 0 or 6 the whole crop lies in the padding.
    assert set(np.unique(outputs)) == {0.0, 1.0}
    assert np.any(np.all(np.asarray(outputs) == 0.0, axis=(1, 2, 3)))


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match=r"images must have shape \[B, H, W, C\], got \(3, 3, 1\)"):
        random_crop_flip(jax.random.key(0), np.ones((3, 3, 1)), padding=1, flip=True)
    with pytest.raises(ValueError, match="padding=-1"):
        random_crop_flip(jax.random.key(0), np.ones((2, 3, 3, 1)), padding=-1, flip=True)
