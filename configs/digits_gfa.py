"""Gradient-feature alignment on 8x8 digits, without adversarial examples.

Source: arXiv 2511.13749 in this library's reading (docs/method.md): alignment with the log-odds
gradient at the normalised input (in the dual of l_inf) and at all hidden layers, log form. Weight,
learning rate and target were chosen on the 300 validation images, by PGD-20 on the margin.
Data: scikit-learn's scanned digits (1,097 training, 300 validation, 400 test images).
Cost: twice the FLOPs of a standard step; about 30 s of training on 2 CPU cores.
Result: printed by `make demo`; see README.md.
Command: python train.py --config configs/digits_gfa.py --workdir runs/digits_gfa
"""

import dataclasses

from configs import digits_standard
from gfa_jax.config import GFAConfig, LoopConfig, TrainConfig


def get_config() -> TrainConfig:
    """Returns the recipe."""
    return dataclasses.replace(
        digits_standard.get_config(),
        gfa=GFAConfig(
            weight=3.5,
            warmup_fraction=0.5,
            target="log_odds",  # sampled_margin is the safer choice on colour images, weaker here
            form="log",
            input_weight=3.0,
            hidden_weight=1.0,
        ),
        loop=LoopConfig(eval_every=500, eval_attack_steps=10),
    )
