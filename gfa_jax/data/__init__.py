"""Data: sources of images, batches that are a function of the step, augmentation on the device."""

from gfa_jax.data.augment import random_crop_flip
from gfa_jax.data.pipeline import eval_batches, to_float, train_batch
from gfa_jax.data.sources import Dataset, Description, describe, load

__all__ = [
    "Dataset",
    "Description",
    "describe",
    "eval_batches",
    "load",
    "random_crop_flip",
    "to_float",
    "train_batch",
]
