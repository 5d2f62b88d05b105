"""Standard training of the small CNN on CIFAR-10.

Source: cross-entropy, AdamW with one cycle, crop and flip.
Data: CIFAR-10 through tensorflow-datasets (45,000 training, 5,000 validation, 10,000 test images);
`python -m gfa_jax.data.prepare cifar10 --data_dir DIR --archive PATH` prepares it.
Cost: 30 epochs; about half an hour on 2 CPU cores, by the time of a step in docs/performance.md.
Result: not measured at this length yet.
Command: python train.py --config configs/cifar10_standard.py --workdir runs/cifar10_standard
    --config.data.data_dir=DIR
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
        batch_size=128,
        train_steps=10_550,  # 30 epochs
        data=DataConfig(name="tfds:cifar10", num_validation=5000, crop_padding=4, flip=True),
        model=ModelConfig(
            name="cnn6",
            # The usual statistics of the training pixels.
            input_mean=(0.4914, 0.4822, 0.4465),
            input_std=(0.2470, 0.2435, 0.2616),
        ),
        threat=ThreatConfig(norm="linf", epsilon=8 / 255),
        optimizer=OptimizerConfig(name="adamw", learning_rate=2e-3, schedule="onecycle"),
        loop=LoopConfig(log_every=50, eval_every=1000, checkpoint_every=500, eval_attack_steps=0),
    )
