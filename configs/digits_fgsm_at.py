"""FGSM adversarial training with a random start on 8x8 digits: the baseline of about GFA's cost.

Source: Wong et al. 2020, arXiv 2001.03994; epsilon rises over the first half, since bias-free
networks do not leave chance otherwise.
Data: scikit-learn's scanned digits (1,097 training, 300 validation, 400 test images).
Cost: 1.7 times the FLOPs of a standard step; about 20 s of training on 2 CPU cores.
Result: printed by `make digits`; see README.md.
Command: python train.py --config configs/digits_fgsm_at.py --workdir runs/digits_fgsm_at
"""

import dataclasses

from configs import digits_standard
from gfa_jax.config import AttackConfig, LoopConfig, TrainConfig


def get_config() -> TrainConfig:
    """Returns the recipe."""
    return dataclasses.replace(
        digits_standard.get_config(),
        attack=AttackConfig(name="fgsm", random_start=True, warmup_fraction=0.5),
        loop=LoopConfig(eval_every=500, eval_attack_steps=10),
    )
