"""Tests of gfa_jax.data.statistics against NumPy, closed forms and real pixels."""

import os
import pathlib
import tracemalloc

import numpy as np
import pytest

from gfa_jax.data import Dataset, load, prepare, statistics
from gfa_jax.data.statistics import TRANSFORMS, channel_statistics, usual_transform


def make_dataset(images):
    num = len(images)
    return Dataset(
        images=images,
        labels=np.zeros(num, np.int32),
        ids=np.arange(num),
        num_classes=1,
        label_names=("a",),
    )


@pytest.mark.parametrize("chunk", [1, 100, 1 << 22])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_statistics_are_those_of_numpy(dtype, channels, chunk, monkeypatch):
    monkeypatch.setattr(statistics, "_CHUNK_SIZE", chunk)
    images = np.random.default_rng(0).integers(0, 256, (23, 5, 4, channels), np.uint8)
    images[..., 0] //= 3
    if dtype == np.float32:
        images = (images / 255).astype(np.float32)
    scaled = images.astype(np.float64) / (255 if dtype == np.uint8 else 1)
    mean, std = channel_statistics(make_dataset(images))
    np.testing.assert_allclose(mean, scaled.mean((0, 1, 2)), rtol=1e-13)
    np.testing.assert_allclose(std, scaled.std((0, 1, 2)), rtol=1e-13)
    assert all(type(value) is float for value in (*mean, *std))


def test_closed_forms():
    images = np.zeros((4, 2, 2, 1), np.uint8)
    images[:2] = 255
    assert channel_statistics(make_dataset(images)) == ((0.5,), (0.5,))
    assert channel_statistics(make_dataset(np.full((3, 2, 2, 1), 51, np.uint8))) == ((0.2,), (0.0,))
    # A small deviation from a large mean, which a difference of float32 sums would lose.
    images = np.full((1000, 2, 2, 1), 0.9, np.float32)
    images[::2] += np.float32(1e-4)
    low, high = float(images.min()), float(images.max())
    (_,), (std,) = channel_statistics(make_dataset(images))
    assert std == pytest.approx((high - low) / 2, rel=1e-9)


def test_no_copy_of_everything(monkeypatch):
    monkeypatch.setattr(statistics, "_CHUNK_SIZE", 1 << 16)
    dataset = make_dataset(np.ones((1 << 12, 32, 32, 1), np.uint8))
    tracemalloc.start()
    channel_statistics(dataset)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < dataset.images.nbytes / 2


def test_table_covers_what_can_be_prepared():
    for name in prepare.RECIPES:
        if name not in ("imagenet_resized/8x8", "imagenet_resized/16x16"):
            assert usual_transform(name) is TRANSFORMS.get(name, TRANSFORMS.get(name.split("/")[0]))
    for name, transform in TRANSFORMS.items():
        channels = 1 if name.endswith("mnist") else 3
        assert len(transform.mean) == len(transform.std) == channels
        assert all(0 < value < 1 for value in (*transform.mean, *transform.std))


@pytest.mark.parametrize(
    ("name", "key", "padding"),
    [
        ("tfds:cifar10", "cifar10", 4),
        ("cifar10:3.0.2", "cifar10", 4),
        ("tfds:imagenet_resized/64x64:0.1.0", "imagenet_resized/64x64", 8),
        ("tfds:imagenet2012_64", "imagenet2012", 8),
        ("tfds:imagenette_128/160px-v2", "imagenette", 16),
        ("imagenette_160/160px-v2:1.0.0", "imagenette", 20),
    ],
)
def test_names_as_load_takes_them(name, key, padding):
    transform = usual_transform(name)
    expected = TRANSFORMS[key]
    assert (transform.mean, transform.std) == (expected.mean, expected.std)
    assert (transform.crop_padding, transform.flip) == (padding, expected.flip)


@pytest.mark.parametrize("name", ["cifar11", "digits", "", "cifar10_64", "tfds:imagenet_resized"])
def test_unknown_names(name):
    with pytest.raises(ValueError, match=f"no usual transform is known for name='{name}'"):
        usual_transform(name)
    with pytest.raises(ValueError, match="Did you mean 'tiny_imagenet'"):
        usual_transform("tfds:tinyimagenet")


def test_characters_are_not_mirrored():
    assert [name for name, each in TRANSFORMS.items() if not each.flip] == [
        "mnist",
        "kmnist",
        "svhn_cropped",
    ]


def test_real_cifar10():
    root = pathlib.Path(__file__).parents[2]
    folder = pathlib.Path(os.environ.get("GFA_JAX_TFDS_DIR", root / "../shared/data/tfds"))
    if not (folder / "cifar10").is_dir():
        pytest.skip("no prepared CIFAR-10: set GFA_JAX_TFDS_DIR to its folder")
    dataset = load("tfds:cifar10", "train", data_dir=str(folder), max_examples=20_000)
    mean, std = channel_statistics(dataset)
    np.testing.assert_allclose(mean, TRANSFORMS["cifar10"].mean, atol=3e-3)
    np.testing.assert_allclose(std, TRANSFORMS["cifar10"].std, atol=3e-3)


def test_names_are_understood_as_load_does():
    """A config may follow a slash or a colon, and a version is none."""
    wanted = statistics.TRANSFORMS["imagenet_resized/32x32"]
    for name in (
        "imagenet_resized/32x32",
        "imagenet_resized:32x32",
        "imagenet_resized:32x32:0.1.0",
    ):
        assert statistics.usual_transform(f"tfds:{name}") == wanted
    assert statistics.usual_transform("mnist:3.0.1") == statistics.TRANSFORMS["mnist"]
