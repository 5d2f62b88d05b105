"""Gradient-feature alignment on FGSM adversarial examples of CIFAR-10.

Source: composition of cifar10_gfa and cifar10_fgsm_at, with the weight that docs/study.md chose.
Data: CIFAR-10 through tensorflow-datasets (45,000 training, 5,000 validation, 10,000 test images);
`python -m gfa_jax.data.prepare cifar10 --data_dir DIR --archive PATH` prepares it.
Cost: 30 epochs at 2.5 times the FLOPs of a standard step; an hour and a half on a CPU core.
Result: 68.6 % of 500 test images right, 28.0 % in the worst case over docs/study.md's attacks (JPEG
    copy, seed 0, the study's batches in four parts); `whole_gfa_at` there.
Command: python train.py --config configs/cifar10_gfa_at.py --workdir runs/cifar10_gfa_at
    --config.data.data_dir=DIR
"""

import dataclasses

from configs import cifar10_fgsm_at, cifar10_gfa
from gfa_jax.config import TrainConfig


def get_config() -> TrainConfig:
    """Returns the recipe."""
    gfa = dataclasses.replace(cifar10_gfa.get_config().gfa, weight=0.3)
    return dataclasses.replace(cifar10_fgsm_at.get_config(), gfa=gfa)
