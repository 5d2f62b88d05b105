"""Standard training on 8x8 digits: the baseline of the demo.

Source: cross-entropy, AdamW with one cycle; the same network, steps and optimiser as digits_gfa.
Data: scikit-learn's scanned digits (1,097 training, 300 validation, 400 test images).
Cost: about 10 s of training on 2 CPU cores.
Result: printed by `make demo`; see README.md.
Command: python train.py --config configs/digits_standard.py --workdir runs/digits_standard
"""

from gfa_jax.config import (
    DataConfig,
    LoopConfig,
    ModelConfig,
    OptimizerConfig,
    ThreatConfig,
    TrainConfig,
)


def get_config() -> TrainConfig:
    """Returns the recipe."""
    return TrainConfig(
        batch_size=64,
        train_steps=1500,  # 87 epochs
        data=DataConfig(name="digits", num_validation=300),
        # Mean and standard deviation of the training pixels.
        model=ModelConfig(name="cnn4", input_mean=(0.305,), input_std=(0.376,)),
        threat=ThreatConfig(norm="linf", epsilon=0.15),
        optimizer=OptimizerConfig(name="adamw", learning_rate=4e-3, schedule="onecycle"),
        # Validation without attacks: clean accuracy names the best checkpoint.
        loop=LoopConfig(eval_every=500, eval_attack_steps=0),
    )
