"""Gradient-Feature Alignment (GFA) for robust classifiers in JAX.

    logits, features, grads = gfa_jax.feature_gradients(apply_fn, inputs, labels, target="log_odds")
    gfa_jax.alignment.alignment(features["block_0"], grads["block_0"])

Importing this package loads neither data sets nor plots nor checkpoints: those are imported where
they are used.
"""

from gfa_jax import alignment, attacks, losses, norms, objectives, taps, transforms, types
from gfa_jax.taps import feature_gradients
from gfa_jax.threat import ThreatModel

__version__ = "0.1.0"

__all__ = [
    "ThreatModel",
    "alignment",
    "attacks",
    "feature_gradients",
    "losses",
    "norms",
    "objectives",
    "taps",
    "transforms",
    "types",
]
