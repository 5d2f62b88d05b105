"""FAB, the fast adaptive boundary attack, in l_inf, l_2 and l_1.

Croce & Hein 2020, arXiv 1907.02044, Algorithm 1, as the authors' AutoAttack code has it.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gfa_jax import _validate, bisection, losses, norms
from gfa_jax.attacks import base
from gfa_jax.attacks.estimators import Model
from gfa_jax.attacks.runs import Attack, Found, GoalFn, Problem, draw_noise, goal_of, goal_of_ranks
from gfa_jax.threat import ThreatModel
from gfa_jax.types import Array

_TINY = 1e-12
_LEAST_DISTANCE = 1e-8
_LEAST_SLOPE = 1e-8


def fab(
    threat: ThreatModel,
    *,
    num_steps: int = 100,
    num_restarts: int = 1,
    alpha_max: float = 0.1,
    eta: float = 1.05,
    beta: float = 0.9,
    stop: str = "epsilon",
    num_gradients: int | None = None,
) -> Attack:
    """The smallest perturbation, by projections onto linearised decision boundaries.

    It succeeds at any distance: whether that is within epsilon is for the caller to compare.
    Given targets, it is a targeted attack.

    Args:
      threat: norm and box; epsilon is half the diameter of the random starts, and what ``stop``
        compares with.
      num_steps: projections of a run; each takes the gradients of all other classes' logits.
      num_restarts: runs; the first starts at the clean input, others at random points at a distance
        of half epsilon.
      alpha_max: the largest weight of the clean input's own projection, in [0, 1].
      eta: extrapolation beyond the boundary, >= 1.
      beta: how far to step back from an adversarial point towards the clean input, in [0, 1].
      stop: ``epsilon``: an example that was broken within epsilon is left alone by later runs, as
        in AutoAttack; ``never``: the closest point over all runs.
      num_gradients: gradients of logits taken at once (``base.pull_back``); memory grows with it.

    Returns:
      The attack. Each run takes two forward passes a step, one with the gradients.

    Raises:
      ValueError: for options out of range; the message names them.
    """
    return _make(
        threat,
        goal_of("margin"),
        None,
        num_steps,
        num_restarts,
        alpha_max,
        eta,
        beta,
        stop,
        num_gradients,
    )


def fab_targeted(
    threat: ThreatModel,
    *,
    num_steps: int = 100,
    num_targets: int = 9,
    num_restarts: int = 1,
    alpha_max: float = 0.1,
    eta: float = 1.05,
    beta: float = 0.9,
    stop: str = "epsilon",
) -> Attack:
    """FAB towards the boundary with one class after another; any wrong class counts (``fab-t``).

    Classes are tried from the second-largest clean logit down, with one gradient a step. For one
    given class, call ``fab`` with ``targets``.

    Args:
      threat: as in ``fab``.
      num_steps: as in ``fab``.
      num_targets: classes to try; all others where there are fewer.
      num_restarts: runs for each class.
      alpha_max: as in ``fab``.
      eta: as in ``fab``.
      beta: as in ``fab``.
      stop: as in ``fab``.

    Raises:
      ValueError: for options out of range; the message names them.
    """
    _validate.positive_integer(num_targets=num_targets)

    def goal(problem: Problem, index: int | Array) -> base.Goal:
        towards = goal_of_ranks("margin", num_restarts)(problem, index)
        # The class steers the projections; what is reported is the margin.
        return towards._replace(loss=lambda logits: losses.margin(logits, problem.labels))

    return _make(
        threat, goal, num_targets, num_steps, num_restarts, alpha_max, eta, beta, stop, None
    )


class _Walk(NamedTuple):
    """The carry of one run."""

    points: Array
    adv_inputs: Array
    distance: Array
    success: Array
    loss: Array
    num_zero_gradients: Array


def _make(
    threat: ThreatModel,
    goal_fn: GoalFn,
    num_targets: int | None,
    num_steps: int,
    num_restarts: int,
    alpha_max: float,
    eta: float,
    beta: float,
    stop: str,
    num_gradients: int | None,
) -> Attack:
    _validate.positive_integer(num_steps=num_steps, num_restarts=num_restarts)
    _validate.fraction(alpha_max=alpha_max, beta=beta)
    _validate.positive(eta=eta)
    _validate.one_of(("epsilon", "never"), stop=stop)
    if num_gradients is not None:
        _validate.positive_integer(num_gradients=num_gradients)

    def run(
        model: Model, keys: Array | None, problem: Problem, goal: base.Goal, index: int | Array
    ) -> Found:
        inputs, labels = problem.inputs, problem.labels
        num_rows = problem.clean_logits.shape[1] - 1 if goal.targets is None else 1

        def class_pairs(logits: Array) -> tuple[Array, Array]:
            """Returns the classes ``[K, B]`` to move towards, and ``[B]`` to move away from."""
            if goal.targets is None:
                others = jnp.arange(1, logits.shape[1], dtype=labels.dtype)[:, None]
                return (labels[None] + others) % logits.shape[1], labels
            if problem.targets is None:
                return goal.targets[None], labels
            is_target = jnp.arange(logits.shape[1])[None] == goal.targets[:, None]
            strongest = jnp.argmax(jnp.where(is_target, -jnp.inf, logits), axis=1)
            return goal.targets[None], strongest

        def cotangents(logits: Array) -> Array:
            towards, away = class_pairs(logits)
            one_hot = functools.partial(
                jax.nn.one_hot, num_classes=logits.shape[1], dtype=logits.dtype
            )
            return one_hot(towards) - one_hot(away)[None]

        def body(_: Array, walk: _Walk) -> _Walk:
            logits, slopes = base.pull_back(
                model, walk.points, cotangents, num_gradients=num_gradients
            )
            differences = jnp.sum(cotangents(logits) * logits[None], axis=2)
            slope, difference = _closest_boundary(threat, differences, slopes)
            # The hyperplane <slope, v> = <slope, points> - difference, seen from both points.
            clean_difference = difference + norms.dot(slope, inputs - walk.points)
            move = _to_hyperplane(threat, walk.points, slope, difference)
            clean_move = _to_hyperplane(threat, inputs, slope, clean_difference)
            size, clean_size = (
                jnp.maximum(norms.vector_norm(vectors, threat.norm), _LEAST_DISTANCE)
                for vectors in (move, clean_move)
            )
            alpha = norms.expand(jnp.minimum(size / (size + clean_size), alpha_max), inputs)
            points = jnp.clip(
                (1 - alpha) * (walk.points + eta * move) + alpha * (inputs + eta * clean_move),
                *threat.bounds,
            )
            new_logits = model(points)
            reached = goal.reached(new_logits)
            distance = threat.distance(inputs, points)
            closer = reached & (distance < walk.distance)
            back = inputs + beta * (points - inputs)
            return _Walk(
                points=jnp.where(norms.expand(reached, points), back, points),
                adv_inputs=jnp.where(norms.expand(closer, points), points, walk.adv_inputs),
                distance=jnp.where(closer, distance, walk.distance),
                success=walk.success | reached,
                loss=jnp.where(closer, goal.loss(new_logits).astype(jnp.float32), walk.loss),
                num_zero_gradients=walk.num_zero_gradients + base.is_zero(slope).astype(jnp.int32),
            )

        none = jnp.zeros(inputs.shape[0], jnp.int32)
        walk = _Walk(
            points=_start(threat, keys, problem, index, num_restarts),
            adv_inputs=inputs,
            distance=jnp.full(inputs.shape[0], jnp.inf, inputs.dtype),
            success=none > 0,
            loss=jnp.full(inputs.shape[0], -jnp.inf, jnp.float32),
            num_zero_gradients=none,
        )
        walk = jax.lax.fori_loop(0, num_steps, body, walk)
        return Found(
            walk.adv_inputs,
            walk.success,
            walk.loss,
            none + 2 * num_steps,
            none + num_rows * num_steps,
            walk.num_zero_gradients,
        )

    return Attack(
        threat,
        goal_fn,
        run,
        num_restarts=num_restarts,
        num_targets=num_targets,
        keep="closest",
        stop=stop,
        draws=num_restarts > 1,
    )


def _start(
    threat: ThreatModel,
    keys: Array | None,
    problem: Problem,
    index: int | Array,
    num_restarts: int,
) -> Array:
    """The clean input in the first run of each class, random points in the others."""
    inputs = problem.inputs
    if problem.start is not None:
        return problem.start
    if num_restarts == 1:
        return inputs
    assert keys is not None
    noise = draw_noise(keys, inputs, threat.norm)
    size = norms.expand(norms.vector_norm(noise, threat.norm), noise)
    start = jnp.clip(inputs + threat.epsilon / 2 * noise / size, *threat.bounds)
    return jnp.where(index % num_restarts == 0, inputs, start)


def _closest_boundary(
    threat: ThreatModel, differences: Array, slopes: Array
) -> tuple[Array, Array]:
    """Returns slope ``[B, ...]`` and logit difference ``[B]`` of the closest of ``K`` boundaries.

    Args:
      threat: its norm measures distances, the dual norm the slopes.
      differences: logits of the classes minus that of the label, ``[K, B]``.
      slopes: their gradients, ``[K, B, ...]``.
    """
    sizes = jax.vmap(norms.vector_norm, in_axes=(0, None))(slopes, threat.dual_norm)
    closest = jnp.argmin(jnp.abs(differences) / (_TINY + sizes), axis=0)
    is_closest = jnp.arange(len(differences))[:, None] == closest[None]
    wide = is_closest.reshape(is_closest.shape + (1,) * (slopes.ndim - 2))
    return jnp.sum(jnp.where(wide, slopes, 0), axis=0), jnp.sum(
        jnp.where(is_closest, differences, 0), axis=0
    )


def _to_hyperplane(threat: ThreatModel, points: Array, slopes: Array, differences: Array) -> Array:
    """Returns the shortest moves in the box that lower ``<slopes, points>`` by ``differences``.

    Where the box does not allow it, the moves go as far as they can (``fab_projections.py`` of
    AutoAttack).

    Args:
      threat: norm and box.
      points: ``[B, ...]`` in the box.
      slopes: ``[B, ...]``.
      differences: ``[B]``.
    """
    lower, upper = threat.bounds
    flat, flat_points = norms.flatten(slopes), norms.flatten(points)
    flat = flat * jnp.where(differences < 0, -1, 1)[:, None]
    needed = jnp.abs(differences)
    weight = jnp.abs(flat)
    # The moves lower <slopes, points>: against the sign of each coordinate.
    room = jnp.where(flat > 0, flat_points - lower, upper - flat_points)
    room = jnp.where(flat == 0, 0, room)
    if threat.norm == "linf":
        sizes = jnp.minimum(_water_level(weight, room, needed)[:, None], room)
    elif threat.norm == "l2":
        moving = weight >= _LEAST_SLOPE
        heights = jnp.where(moving, room / jnp.where(moving, weight, 1), 0)
        level = _water_level(weight * weight, heights, needed)[:, None]
        sizes = weight * jnp.minimum(level, heights)
    else:
        sizes = _greedy(weight, room, needed)
    infeasible = jnp.sum(weight * room, axis=1) <= needed
    sizes = jnp.where(infeasible[:, None] & (needed > 0)[:, None], room, sizes)
    return (-jnp.sign(flat) * sizes).reshape(points.shape)


def _water_level(areas: Array, heights: Array, volume: Array) -> Array:
    """Returns the level ``[B]`` at which ``sum(areas * min(level, heights))`` is the volume.

    ``areas`` and ``heights`` are ``[B, D]``, non-negative. Where all heights hold less, the level
    is anywhere.
    """

    def rise(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        """A step of Newton: concave functions are never overshot from below, so that levels rise.

        The next level depends only on which coordinates are full: it ends after D steps at most,
        mostly after three.
        """
        level, _ = carry
        is_full = heights <= level[:, None]
        held = jnp.sum(jnp.where(is_full, areas * heights, 0), axis=1)
        area = jnp.sum(jnp.where(is_full, 0, areas), axis=1)
        higher = (volume - held) / jnp.where(area > 0, area, jnp.inf)
        return jnp.maximum(level, higher), higher > level

    start = jnp.zeros_like(volume)
    return jax.lax.while_loop(lambda carry: jnp.any(carry[1]), rise, (start, start == 0))[0]


def _greedy(weight: Array, room: Array, needed: Array) -> Array:
    """Returns move sizes ``[B, D]`` with ``sum(weight * sizes) = needed``, of least sum.

    Coordinates of large weight use all their room; the last one as much as is needed.
    """
    gains = weight * room

    def suffices(threshold: Array) -> Array:
        return jnp.sum(jnp.where(weight >= threshold[:, None], gains, 0), axis=1) >= needed

    threshold = bisection.largest_float(suffices, needed)[:, None]
    full = weight > threshold
    remainder = needed[:, None] - jnp.sum(jnp.where(full, gains, 0), axis=1, keepdims=True)
    tied_gains = jnp.where(weight == threshold, gains, 0)
    spent_before = jnp.cumsum(tied_gains, axis=1) - tied_gains
    partial = jnp.clip(remainder - spent_before, 0, tied_gains) / jnp.maximum(weight, _TINY)
    return jnp.where(full, room, partial)
