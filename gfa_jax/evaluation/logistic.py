"""Logistic regressions that tell a few planted points from many others (``binarization``)."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gfa_jax.types import Array


def margins(centred: Array, weights: Array, bias: Array) -> Array:
    """Returns the margins ``[N]`` of centred features ``[N, F]``.

    There is a head for each (``[N, F]`` and ``[N]``) or one for all (``[1, F]`` and ``[]``).
    """
    # No matrix product, whose factors some devices round to fewer digits.
    return jnp.sum(centred * weights, axis=1) + bias


RIDGE = 1e-6
"""Too small to matter, but where the classes do not separate."""

_MAX_NEWTON_STEPS = 30
_CONVERGED = 0.99
_STEP_SIZES = tuple(0.5**power for power in range(8))
_DAMPING = 3e-6


def fit_head(inner: Array, outer: Array, closeness: float) -> tuple[Array, Array, Array, Array]:
    """Separates inner points ``[N, F]`` from outer ones ``[K, F]``.

    Returns:
      ``(weights [F], bias, margins [K], separable)``. Margins are those of the outer points, and
      all margins have range 1.
    """
    points = jnp.concatenate([inner, outer])
    weights = regression(points, len(inner))
    scores = margins(points, weights[None], jnp.zeros(()))
    largest_inner = jnp.max(scores[: len(inner)])
    smallest_outer = jnp.min(scores[len(inner) :])
    gap = smallest_outer - largest_inner
    # What is left between threshold and planted point must not be rounding alone.
    rounding = 8 * jnp.finfo(scores.dtype).eps * jnp.max(jnp.abs(scores))
    separable = (1 - closeness) * gap > rounding
    size = jnp.max(scores) - jnp.min(scores)
    scale = 1 / jnp.where(size > 0, size, 1)
    weights, threshold = scale * weights, scale * (largest_inner + closeness * gap)
    return weights, -threshold, margins(outer, weights[None], -threshold), separable


class _Fit(NamedTuple):
    """A logistic regression after so many steps; scores are those of the points."""

    number: Array
    weights: Array
    scores: Array
    loss: Array
    loss_before: Array


def regression(points: Array, num_inner: int) -> Array:
    """Returns the weights ``[F]`` that tell the first points ``[N, F]`` from the others.

    The minimum of the logistic loss, both classes weighing the same, with intercept and a ridge. By
    Newton's method with a line search: about as many steps as the margin is to have logits, where
    first-order methods crawl. It ends where a step takes less than 1 % off the loss.

    A step solves a system of ``min(F, N)`` unknowns: with more features than points, the weights
    are a combination of the points (as the ridge wants them), and coordinates in an orthonormal
    basis of those (QR) give the same problem.

    Features share one scale, so that the ridge means the same for all networks. A scale for each
    would blow up features that barely move, down to rounding noise, and make another problem than
    the authors'.
    """
    high = jax.lax.Precision.HIGHEST
    num_points, num_features = points.shape
    centred = points - jnp.mean(points, axis=0, keepdims=True)
    mean_square = jnp.mean(centred**2)
    centred = centred / jnp.sqrt(jnp.where(mean_square > 0, mean_square, 1))
    basis = None
    if num_features > num_points:
        basis, triangle = jnp.linalg.qr(centred.T)
        centred = triangle.T
    design = jnp.concatenate([centred, jnp.ones((num_points, 1), points.dtype)], axis=1)
    is_inner = jnp.arange(num_points) < num_inner
    signs = jnp.where(is_inner, -1.0, 1.0)
    share = jnp.where(is_inner, 0.5 / num_inner, 0.5 / (num_points - num_inner))
    size = design.shape[1]
    # The intercept is free.
    ridge = jnp.where(jnp.arange(size) < size - 1, RIDGE, 0.0)
    step_sizes = jnp.array((0.0, *_STEP_SIZES), points.dtype)

    def goes_on(fit: _Fit) -> Array:
        return (fit.number < _MAX_NEWTON_STEPS) & (fit.loss < _CONVERGED * fit.loss_before)

    def step(fit: _Fit) -> _Fit:
        weights, scores = fit.weights, fit.scores
        wrong = jax.nn.sigmoid(-signs * scores)
        pull = share * signs * wrong
        downhill = jnp.matmul(pull, design, precision=high) - ridge * weights
        curvature = share * wrong * (1 - wrong)
        hessian = jnp.matmul(design.T * curvature[None], design, precision=high)
        # In float32, Cholesky needs more than the ridge.
        damping = _DAMPING * jnp.trace(hessian) + jnp.finfo(hessian.dtype).tiny
        hessian += jnp.diag(ridge + damping)
        factor = jax.scipy.linalg.cho_factor(hessian)
        newton = jax.scipy.linalg.cho_solve(factor, downhill)
        move = jnp.where(jnp.all(jnp.isfinite(newton)), newton, downhill)
        moved = jnp.matmul(design, move, precision=high)
        tried = weights[None] + step_sizes[:, None] * move[None]
        tried_scores = scores[None] + step_sizes[:, None] * moved[None]
        loss = jnp.sum(share[None] * jax.nn.softplus(-signs[None] * tried_scores), axis=1)
        loss += jnp.sum(ridge[None] * tried**2, axis=1) / 2
        best = jnp.argmin(loss)
        return _Fit(fit.number + 1, tried[best], tried_scores[best], loss[best], fit.loss)

    start = _Fit(
        number=jnp.zeros((), jnp.int32),
        weights=jnp.zeros(size, points.dtype),
        scores=jnp.zeros(num_points, points.dtype),
        loss=jnp.full((), math.log(2), points.dtype),
        loss_before=jnp.full((), jnp.inf, points.dtype),
    )
    weights = jax.lax.while_loop(goes_on, step, start).weights[:-1]
    return weights if basis is None else jnp.matmul(basis, weights, precision=high)
