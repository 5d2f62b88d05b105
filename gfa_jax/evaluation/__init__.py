"""Evaluation: attacks over a test set, geometry of the features, records, and reports."""

from gfa_jax.evaluation.evaluate import evaluate_model

__all__ = ["evaluate_model"]
