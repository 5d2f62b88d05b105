"""Tests of the heads against an exact solver."""

import jax
import numpy as np
import pytest
import sklearn.linear_model

from gfa_jax.evaluation import logistic


@pytest.mark.parametrize("num_features", [40, 100])
def test_heads_are_those_of_scikit_learn(num_features):
    """The margin between the classes, for weights of length 1, against an exact solver."""
    generator = np.random.default_rng(0)
    mixing = generator.normal(size=(num_features, num_features)) / num_features**0.5
    inner = generator.normal(size=(59, num_features)) @ mixing
    outer = 1.5 * generator.normal(size=(1, num_features)) @ mixing
    points = np.concatenate([inner, outer]).astype(np.float32)
    labels = np.arange(60) == 59
    centred = points - points.mean(axis=0)
    centred /= np.sqrt(np.mean(centred**2))
    exact = sklearn.linear_model.LogisticRegression(
        C=1 / (60 * logistic.RIDGE), class_weight="balanced", max_iter=5000, tol=1e-10
    ).fit(centred.astype(np.float64), labels)
    expected = exact.coef_[0]
    weights = np.asarray(jax.jit(logistic.regression, static_argnums=1)(points, 59))

    def gap(direction):
        scores = points @ (direction / np.linalg.norm(direction))
        return scores[labels].min() - scores[~labels].max()

    assert gap(expected) > 0
    assert gap(weights) >= 0.99 * gap(expected)
    cosine = weights @ expected / np.linalg.norm(weights) / np.linalg.norm(expected)
    assert cosine > 0.99
