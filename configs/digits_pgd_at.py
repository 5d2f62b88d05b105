"""PGD-7 adversarial training on 8x8 digits: the strong baseline.

Source: Madry et al. 2018, arXiv 1706.06083; epsilon rises over the first half.
Data: scikit-learn's scanned digits (1,097 training, 300 validation, 400 test images).
Cost: 5.7 times the FLOPs of a standard step; about a minute of training on 2 CPU cores.
Result: printed by `make digits`; see README.md.
Command: python train.py --config configs/digits_pgd_at.py --workdir runs/digits_pgd_at
"""

import dataclasses

from configs import digits_standard
from gfa_jax.config import AttackConfig, LoopConfig, TrainConfig


def get_config() -> TrainConfig:
    """Returns the recipe."""
    return dataclasses.replace(
        digits_standard.get_config(),
        attack=AttackConfig(name="pgd", num_steps=7, warmup_fraction=0.5),
        loop=LoopConfig(eval_every=500, eval_attack_steps=10),
    )
