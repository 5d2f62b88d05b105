"""Gradient-feature alignment on any prepared image set, with its usual normalisation and crops.

Source: the recipe of cifar10_gfa, not tuned for the others; statistics and augmentation are those
of gfa_jax.data.statistics. config.gfa.weight=0 gives the standard training beside it.
Data: MNIST, Fashion-MNIST, KMNIST, CIFAR-100, SVHN, Tiny-ImageNet, downsampled ImageNet;
`python -m gfa_jax.data.prepare NAME --data_dir DIR --archive PATH` prepares it, see docs/data.md.
Cost: 30 epochs (10 of ImageNet) at twice the FLOPs of a standard step.
Result: none yet.
Command: python train.py --config configs/tfds_gfa.py:svhn_cropped --workdir runs/svhn_gfa
    --config.data.data_dir=DIR
"""

import dataclasses
import functools

from configs import cifar10_gfa
from gfa_jax.config import DataConfig, ThreatConfig, TrainConfig, choose
from gfa_jax.data.statistics import usual_transform

_NUM_EXAMPLES = {
    "mnist": 60_000,
    "fashion_mnist": 60_000,
    "kmnist": 60_000,
    "cifar100": 50_000,
    "svhn_cropped": 73_257,
    "tiny_imagenet": 100_000,
    "imagenet_resized/32x32": 1_281_167,
    "imagenet_resized/64x64": 1_281_167,
}
"""Of the training split, by tfds name."""

_EPSILONS = {"mnist": 0.3, "fashion_mnist": 0.1, "kmnist": 0.3}
"""Radii in l_inf that the field uses for sets of grey images; 8/255 for the others."""

_NUM_VALIDATION = 5000


def _recipe(name: str) -> TrainConfig:
    base = cifar10_gfa.get_config()
    transform = usual_transform(name)
    num_epochs = 10 if name.startswith("imagenet") else 30
    num_steps = num_epochs * (_NUM_EXAMPLES[name] - _NUM_VALIDATION) // base.batch_size
    return dataclasses.replace(
        base,
        train_steps=num_steps,
        data=DataConfig(
            name=f"tfds:{name}",
            num_validation=_NUM_VALIDATION,
            crop_padding=transform.crop_padding,
            flip=transform.flip,
        ),
        model=dataclasses.replace(base.model, input_mean=transform.mean, input_std=transform.std),
        threat=ThreatConfig(norm="linf", epsilon=_EPSILONS.get(name, 8 / 255)),
        loop=dataclasses.replace(base.loop, eval_every=num_steps // 10),
    )


RECIPES = {name: functools.partial(_recipe, name) for name in _NUM_EXAMPLES}


def get_config(name: str) -> TrainConfig:
    """Returns the recipe for a data set, by its tfds name."""
    return choose(RECIPES, name)
