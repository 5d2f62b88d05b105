"""What is usual for a data set: channel statistics for normalisation, and augmentation."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

import numpy as np

from gfa_jax import _validate
from gfa_jax.data.sources import Dataset

# Pixels that are summed at a time; NumPy makes a copy of eight bytes of each.
_CHUNK_SIZE = 1 << 22

_NAME = re.compile(
    r"(?:tfds:)?(?P<builder>\w+?)(?:_(?P<size>\d+))?"
    r"(?:[/:](?P<config>(?!\d+\.\d+\.\d+$)[^/:]+))?(?::\d+\.\d+\.\d+)?"
)


@dataclasses.dataclass(frozen=True)
class Transform:
    """The usual normalisation and augmentation of a data set.

    Attributes:
      mean: mean of each channel over the pixels of the training split, in `[0, 1]`.
      std: standard deviation of each channel, positive.
      crop_padding: pixels of zero padding on each side before a random crop to the original size,
        see `augment.random_crop_flip`; 0 for none.
      flip: whether half of the images are mirrored left-right.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_padding: int
    flip: bool


# Of torchvision's models.
_IMAGENET = Transform(
    mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), crop_padding=0, flip=True
)

TRANSFORMS: Mapping[str, Transform] = {
    "mnist": Transform(mean=(0.1307,), std=(0.3081,), crop_padding=0, flip=False),
    "fashion_mnist": Transform(mean=(0.2860,), std=(0.3530,), crop_padding=4, flip=True),
    "kmnist": Transform(mean=(0.1918,), std=(0.3483,), crop_padding=0, flip=False),
    "cifar10": Transform(
        mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616), crop_padding=4, flip=True
    ),
    "cifar100": Transform(
        mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762), crop_padding=4, flip=True
    ),
    "svhn_cropped": Transform(
        mean=(0.4377, 0.4438, 0.4728), std=(0.1980, 0.2010, 0.1970), crop_padding=4, flip=False
    ),
    "tiny_imagenet": Transform(
        mean=(0.4802, 0.4481, 0.3975), std=(0.2770, 0.2691, 0.2821), crop_padding=8, flip=True
    ),
    "imagenet_resized/32x32": Transform(
        mean=(0.4811, 0.4575, 0.4078), std=(0.2604, 0.2532, 0.2682), crop_padding=4, flip=True
    ),
    "imagenet_resized/64x64": Transform(
        mean=(0.4811, 0.4575, 0.4078), std=(0.2633, 0.2560, 0.2708), crop_padding=8, flip=True
    ),
    "imagenet2012": _IMAGENET,
    "imagenette": _IMAGENET,
}
"""The usual transform by tfds name, and config where it matters; see `usual_transform`.

`mean` and `std` are those of all pixels of the training split, as implementations of the field have
them to four places. Exceptions: those of `imagenet2012` and `imagenette` are the constants of
torchvision's models, whose `std` is smaller than that of all pixels (.28 at full size), and the
`std` of `imagenet_resized/64x64` was found in one implementation only. `cifar10` was compared with
pixels (a JPEG copy, to .002); for the others, `channel_statistics` tells.

Augmentation: pad and crop by an eighth of the side, and flip, as He et al. (2016, section 4.2) for
CIFAR; also for Fashion-MNIST, as Zhong et al. (2020). Characters are not mirrored: a flipped digit
is another sign. SVHN is shifted only; MNIST is trained on as it is, as by Madry et al. (2018), and
KMNIST like it. Of ImageNet at full size the usual crop also changes the scale, which
`augment.random_crop_flip` does not.
"""


def usual_transform(name: str) -> Transform:
    """Returns the usual transform of a data set.

    Args:
      name: as `sources.load` takes it, such as `tfds:cifar10` or `tfds:imagenette_128/160px-v2`;
        `tfds:` may be left out. For a set that was resized to `SIZE`, called NAME_SIZE, the crop's
        padding is an eighth of it.

    Returns:
      The entry of `TRANSFORMS`.

    Raises:
      ValueError: for a set that is not in it.
    """
    match = _NAME.fullmatch(name)
    if match is not None:
        builder, size, config = match.group("builder", "size", "config")
        if size is None:
            for key in (f"{builder}/{config}", builder):
                if key in TRANSFORMS:
                    return TRANSFORMS[key]
        elif TRANSFORMS.get(builder) is _IMAGENET:
            return dataclasses.replace(TRANSFORMS[builder], crop_padding=int(size) // 8)
    raise ValueError(
        f"no usual transform is known for name={name!r}; there is one for "
        f"{', '.join(sorted(TRANSFORMS))}. channel_statistics computes mean and std."
        f"{_validate.suggestion(name.removeprefix('tfds:'), TRANSFORMS)}"
    )


def channel_statistics(dataset: Dataset) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Computes mean and standard deviation of each channel over all pixels of a data set.

    `uint8` pixels are counted by value, so their result is exact but for the last rounding;
    `float32` pixels are summed in `float64`. Neither copies the whole.

    Args:
      dataset: normally the training split, without augmentation.

    Returns:
      Mean and standard deviation (that of the pixels, dividing by their number), one for each
      channel, in units where white is 1.
    """
    channels = dataset.images.shape[-1]
    num_pixels = dataset.images.size // channels
    if dataset.images.dtype == np.uint8:
        counts = np.zeros((channels, 256), np.int64)
        for pixels in _chunks(dataset.images):
            for channel in range(channels):
                counts[channel] += np.bincount(pixels[:, channel], minlength=256)
        means, stds = [], []
        for row in counts.tolist():
            # In Python's integers, which do not overflow.
            total = sum(value * count for value, count in enumerate(row))
            squares = sum(value**2 * count for value, count in enumerate(row))
            means.append(total / (255 * num_pixels))
            stds.append(math.sqrt(num_pixels * squares - total**2) / (255 * num_pixels))
        return tuple(means), tuple(stds)

    mean = np.zeros(channels)
    for pixels in _chunks(dataset.images):
        mean += pixels.sum(0, dtype=np.float64) / num_pixels
    variance = np.zeros(channels)
    for pixels in _chunks(dataset.images):
        variance += ((pixels - mean) ** 2).sum(0) / num_pixels
    return tuple(mean.tolist()), tuple(np.sqrt(variance).tolist())


def _chunks(images: np.ndarray) -> Iterator[np.ndarray]:
    """Yields pixels `[N, C]` of some images at a time."""
    step = max(1, _CHUNK_SIZE // math.prod(images.shape[1:]))
    for start in range(0, len(images), step):
        yield images[start : start + step].reshape(-1, images.shape[-1])
