"""Data: sources of images, batches that are a function of the step, augmentation on the device."""

from gfa_jax.data.augment import random_crop_flip
from gfa_jax.data.inputs import PLACEMENTS, InputFn, put, train_input
from gfa_jax.data.pipeline import eval_batches, to_float, train_batch
from gfa_jax.data.sources import Dataset, Description, LazyDataset, describe, load, open_lazily

__all__ = [
    "PLACEMENTS",
    "Dataset",
    "Description",
    "InputFn",
    "LazyDataset",
    "describe",
    "eval_batches",
    "load",
    "open_lazily",
    "put",
    "random_crop_flip",
    "to_float",
    "train_batch",
    "train_input",
]
