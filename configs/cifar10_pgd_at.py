"""PGD-10 adversarial training of the small CNN on CIFAR-10.

Source: Madry et al. 2018, arXiv 1706.06083, with steps of 2/255 as in Rice et al. 2020,
arXiv 2002.11569; epsilon rises over the first quarter, which bias-free networks need.
Data: CIFAR-10 through tensorflow-datasets (45,000 training, 5,000 validation, 10,000 test images);
`python -m gfa_jax.data.prepare cifar10 --data_dir DIR --archive PATH` prepares it.
Cost: 30 epochs at 5.9 times the FLOPs of a standard step.
Result: not measured at this length yet.
Command: python train.py --config configs/cifar10_pgd_at.py --workdir runs/cifar10_pgd_at
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
        attack=AttackConfig(name="pgd", num_steps=10, step_size=2 / 255, warmup_fraction=0.25),
        loop=dataclasses.replace(base.loop, eval_attack_steps=10),
    )
