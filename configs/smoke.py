"""Forty steps of everything at once (GFA on PGD adversarial examples), to see that it runs.

Source: none.
Data: scikit-learn's scanned digits.
Cost: seconds after compilation.
Result: none is meant.
Command: python train.py --config configs/smoke.py --workdir runs/smoke
"""

from gfa_jax.config import (
    AttackConfig,
    DataConfig,
    GFAConfig,
    LoopConfig,
    ModelConfig,
    ThreatConfig,
    TrainConfig,
)


def get_config() -> TrainConfig:
    """Returns the recipe."""
    return TrainConfig(
        batch_size=16,
        train_steps=40,
        data=DataConfig(name="digits", num_validation=40, max_train_examples=200),
        model=ModelConfig(name="cnn4", width=0.25, input_mean=(0.305,), input_std=(0.376,)),
        threat=ThreatConfig(norm="linf", epsilon=0.15),
        gfa=GFAConfig(weight=1.0),
        attack=AttackConfig(name="pgd", num_steps=2),
        loop=LoopConfig(log_every=5, eval_every=20, eval_attack_steps=2, eval_batch_size=40),
    )
