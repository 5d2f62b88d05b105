"""Gradient-feature alignment on PGD-7 adversarial examples of 8x8 digits.

Source: composition of digits_gfa and digits_pgd_at, with a tenth of the alignment weight.
Data: scikit-learn's scanned digits (1,097 training, 300 validation, 400 test images).
Cost: 6.7 times the FLOPs of a standard step; about a minute of training on 2 CPU cores.
Result: printed by `make digits`; see README.md.
Command: python train.py --config configs/digits_gfa_at.py --workdir runs/digits_gfa_at
"""

import dataclasses

from configs import digits_gfa, digits_pgd_at
from gfa_jax.config import TrainConfig


def get_config() -> TrainConfig:
    """Returns the recipe."""
    gfa = digits_gfa.get_config().gfa
    return dataclasses.replace(
        digits_pgd_at.get_config(), gfa=dataclasses.replace(gfa, weight=0.1 * gfa.weight)
    )
