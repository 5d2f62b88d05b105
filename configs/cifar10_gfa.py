"""Gradient-feature alignment of the small CNN on CIFAR-10, without adversarial examples.

Source: arXiv 2511.13749 in this library's reading (docs/method.md): alignment of the normalised
input with the gradient of a sampled margin, in the dual of l_inf, log form. On colour images the
log-odds are less accurate, the cross-entropy changes nothing until it collapses the network, and
with the nearest class the network dies, each at the weights that docs/study.md tried.
Data: CIFAR-10 through tensorflow-datasets (45,000 training, 5,000 validation, 10,000 test images);
`python -m gfa_jax.data.prepare cifar10 --data_dir DIR --archive PATH` prepares it.
Cost: 30 epochs at twice the FLOPs of a standard step; an hour and a quarter on a CPU core.
Result: 46.4 % of 500 test images right, 23.0 % in the worst case over docs/study.md's attacks (JPEG
    copy, seed 0, the study's batches in four parts); `whole_gfa` there.
Command: python train.py --config configs/cifar10_gfa.py --workdir runs/cifar10_gfa
    --config.data.data_dir=DIR
"""

import dataclasses

from configs import cifar10_standard
from gfa_jax.config import GFAConfig, TrainConfig


def get_config() -> TrainConfig:
    """Returns the recipe."""
    base = cifar10_standard.get_config()
    return dataclasses.replace(
        base,
        gfa=GFAConfig(
            weight=20.0,
            warmup_fraction=0.5,
            target="sampled_margin",
            form="log",
            input_weight=1.0,
            hidden_weight=0.0,
        ),
        loop=dataclasses.replace(base.loop, eval_attack_steps=10),
    )
