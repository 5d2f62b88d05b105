"""FGSM adversarial training with a random start on CIFAR-10: the baseline of about GFA's cost.

Source: Wong et al. 2020, arXiv 2001.03994; epsilon rises over the first quarter, which bias-free
networks need.
Data: CIFAR-10 through tensorflow-datasets (45,000 training, 5,000 validation, 10,000 test images);
`python -m gfa_jax.data.prepare cifar10 --data_dir DIR --archive PATH` prepares it.
Cost: 30 epochs at 1.5 times the FLOPs of a standard step; an hour on a CPU core.
Result: 72.0 % of 500 test images right, 25.4 % in the worst case over docs/study.md's attacks (JPEG
    copy, seed 0, the study's batches in four parts); `whole_fgsm_at` there.
Command: python train.py --config configs/cifar10_fgsm_at.py --workdir runs/cifar10_fgsm_at
    --config.data.data_dir=DIR
"""

import dataclasses

from configs import cifar10_standard
from gfa_jax.config import AttackConfig, TrainConfig


def get_config() -> TrainConfig:
    """Returns the recipe."""
    base = cifar10_standard.get_config()
    return dataclasses.replace(
        base,
        attack=AttackConfig(name="fgsm", random_start=True, warmup_fraction=0.25),
        loop=dataclasses.replace(base.loop, eval_attack_steps=10),
    )
