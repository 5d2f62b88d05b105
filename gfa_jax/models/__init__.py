"""Linen classifiers and their registry."""

from gfa_jax.models.registry import MODELS, ModelSpec, create

__all__ = ["MODELS", "ModelSpec", "create"]
