"""The schema of training recipes: primitives only, checked before anything is compiled or written.

A file in ``configs/`` returns a ``TrainConfig`` from ``get_config()``; the command line overrides
single fields (``--config.optimizer.learning_rate=0.1``). Only training, evaluation and
the command lines see these classes; everything below takes plain keyword arguments.
"""

from gfa_jax.config.checks import validate
from gfa_jax.config.recipe_files import choose, load_file
from gfa_jax.config.saved import FREE_FIELDS, differences, from_dict, read_saved, to_dict
from gfa_jax.config.schema import (
    PAIRED_LOSSES,
    AttackConfig,
    DataConfig,
    GFAConfig,
    LoopConfig,
    LossConfig,
    ModelConfig,
    NoiseConfig,
    OptimizerConfig,
    Options,
    RegularizerConfig,
    ThreatConfig,
    TrainConfig,
)

__all__ = [
    "FREE_FIELDS",
    "PAIRED_LOSSES",
    "AttackConfig",
    "DataConfig",
    "GFAConfig",
    "LoopConfig",
    "LossConfig",
    "ModelConfig",
    "NoiseConfig",
    "OptimizerConfig",
    "Options",
    "RegularizerConfig",
    "ThreatConfig",
    "TrainConfig",
    "choose",
    "differences",
    "from_dict",
    "load_file",
    "read_saved",
    "to_dict",
    "validate",
]
