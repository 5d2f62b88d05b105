"""DeepFool: straight to the nearest boundary of the linearised classifier, step by step."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gfa_jax import _validate, losses, norms
from gfa_jax.attacks import base, chunks
from gfa_jax.attacks.estimators import Model
from gfa_jax.attacks.runs import Attack, Found, GoalFn, Problem, goal_of, refuse_start
from gfa_jax.threat import ThreatModel
from gfa_jax.types import Array, LogitsFn

VARIANTS = ("original", "torchattacks")
LABELS = ("true", "predicted")

_PUSH = 1e-4
"""How far every step of the original goes beyond the linearised boundary, in input units."""

_FLAT = 1e-12
"""A gradient of a smaller norm says nothing of where the boundary is."""


class _Walk(NamedTuple):
    """What the loop knows of each example.

    Attributes:
      problem: what the examples are.
      candidates: int ``[B, K]``, the classes to move to.
      adv_inputs: the current points, ``[B, ...]``.
      total: the sum of all steps without the overshoot, ``[B, ...]``.
      loss: ``[B]``, the margin at ``adv_inputs``.
      success: bool ``[B]``, whether ``adv_inputs`` mislead the model.
      is_walking: bool ``[B]``, examples with a next step.
      num_steps: int32 ``[B]``, the steps made for the example.
      num_zero_gradients: int32 ``[B]``.
    """

    problem: Problem
    candidates: Array
    adv_inputs: Array
    total: Array
    loss: Array
    success: Array
    is_walking: Array
    num_steps: Array
    num_zero_gradients: Array


def _away_from_prediction(problem: Problem, index: int | Array) -> base.Goal:
    """Any class but the one predicted for the clean input."""
    predicted = jnp.argmax(problem.clean_logits, axis=1).astype(problem.labels.dtype)
    return goal_of("margin")(problem._replace(labels=predicted), index)


def deepfool(
    threat: ThreatModel,
    *,
    num_steps: int = 50,
    overshoot: float | Array = 0.02,
    variant: str = "original",
    label: str = "true",
    num_candidates: int | None = 10,
    clip: bool = True,
    num_bisections: int = 0,
    chunk_size: int | None = None,
    num_gradients: int | None = None,
) -> Attack:
    """DeepFool in l_2 and l_inf (Moosavi-Dezfooli et al. 2016, arXiv 1511.04599, alg. 2, sec. 3.3).

    Each step linearises the logits and moves across the nearest of the boundaries between the label
    and the other candidates. The loop ends when all examples are done, mostly after one to five
    steps. Epsilon plays no part: the attack succeeds at any distance. Every step is verified by a
    forward pass. An example whose gradients are all below 1e-12 (in the dual norm) cannot move and
    is given up; ``num_zero_gradients`` counts such gradients.

    A targeted attack moves across the boundary between the target and the class that is ahead at
    the current point, until the target is predicted.

    Args:
      threat: gives the norm, ``l2`` or ``linf``, and the box.
      num_steps: at most.
      overshoot: how much farther the point lies than the steps lead, as a fraction, >= 0.
      variant: ``original``: a step leads 1e-4 beyond the boundary, and the overshoot extends the
        sum of all steps from the clean input (``LTS4/DeepFool``). ``torchattacks``: no 1e-4, and
        each step is extended from the current point, as in its DeepFool (version 3), which has
        l_2, all classes (``num_candidates=None``) and the box only.
      label: ``true``: away from the label; inputs misclassified already stay. ``predicted``: away
        from the class predicted for the clean input, as in the paper, whatever the label:
        ``success`` then says that the prediction has changed.
      num_candidates: the classes looked at, those of the largest clean logits, the label included;
        at least 2. ``None``: all.
      clip: whether each point is clipped to the box. The paper's figures are without: then points
        may lie outside of it.
      num_bisections: bisections of the line between the clean and the found point at the end, each
        a forward pass; the point never gets farther.
      chunk_size: examples looked at together; those that are done leave (``chunks.loop``). By
        default the whole batch, until all are done.
      num_gradients: gradients taken at once (``base.pull_back``); memory grows with it.

    Returns:
      The attack. Counts for each example: 1 + 2 steps forwards, and as many more as bisections
      where it succeeds; num_candidates - 1 backwards a step (1 if targeted).

    Raises:
      ValueError: for ``l1``, for options out of range (the message names them) and, when called,
        for ``start`` and a model of one class.
    """
    _validate.one_of(("l2", "linf"), norm=threat.norm)
    _validate.one_of(VARIANTS, variant=variant)
    _validate.one_of(LABELS, label=label)
    _validate.positive_integer(num_steps=num_steps)
    _validate.non_negative(overshoot=overshoot)
    if num_candidates is not None:
        _at_least(2, num_candidates=num_candidates)
    _at_least(0, num_bisections=num_bisections)
    for name, value in (("chunk_size", chunk_size), ("num_gradients", num_gradients)):
        if value is not None:
            _validate.positive_integer(**{name: value})
    is_original = variant == "original"
    goal_fn: GoalFn = goal_of("margin") if label == "true" else _away_from_prediction

    def run(
        model: Model, keys: Array | None, problem: Problem, goal: base.Goal, index: int | Array
    ) -> Found:
        refuse_start(problem)
        wide = jnp.promote_types(problem.inputs.dtype, jnp.float32)
        inputs = problem.inputs.astype(wide)

        def judge(adv_inputs: Array, goal: base.Goal) -> tuple[Array, Array, Array]:
            """Returns the points as the model sees them, their margins and their success."""
            adv_inputs = adv_inputs.astype(problem.inputs.dtype)
            if clip:
                adv_inputs = jnp.clip(adv_inputs, *threat.bounds)
            logits = model(adv_inputs)
            return adv_inputs, goal.loss(logits).astype(jnp.float32), goal.reached(logits)

        def step(number: Array, walk: _Walk) -> _Walk:
            towards = goal_fn(walk.problem, index)
            length, gradient, num_flat = _nearest_boundary(
                model, threat, towards, walk.candidates.T, walk.adv_inputs, num_gradients
            )
            can_move = jnp.isfinite(length)
            length = jnp.where(can_move, length + (_PUSH if is_original else 0), 0)
            direction = threat.steepest_step(walk.adv_inputs, gradient.astype(wide))
            move = norms.expand(length, direction) * direction
            total = walk.total + move
            if is_original:
                reached_for = walk.problem.inputs.astype(wide) + (1 + overshoot) * total
            else:
                reached_for = walk.adv_inputs + (1 + overshoot) * move
            adv_inputs, loss, success = judge(reached_for, towards)
            here = walk.is_walking
            counted = here.astype(jnp.int32)
            return walk._replace(
                adv_inputs=jnp.where(norms.expand(here, adv_inputs), adv_inputs, walk.adv_inputs),
                total=total,
                loss=jnp.where(here, loss, walk.loss),
                success=walk.success | (here & success),
                is_walking=here & ~success & can_move,
                num_steps=walk.num_steps + counted,
                num_zero_gradients=walk.num_zero_gradients + counted * num_flat,
            )

        none = jnp.zeros(inputs.shape[0], jnp.int32)
        start = _Walk(
            problem=problem,
            candidates=_candidates(problem, goal, num_candidates).T,
            adv_inputs=problem.inputs,
            total=jnp.zeros_like(inputs),
            loss=jnp.zeros(none.shape, jnp.float32),
            success=none > 0,
            is_walking=problem.active,
            num_steps=none,
            num_zero_gradients=none,
        )
        walk = chunks.loop(
            step,
            start,
            lambda walk: walk.is_walking,
            num_steps=num_steps,
            chunk_size=chunk_size,
        )

        judge_all = functools.partial(judge, goal=goal)
        adv_inputs, loss = _bisect(judge_all, inputs, walk, num_bisections)
        return Found(
            adv_inputs,
            walk.success,
            loss,
            2 * walk.num_steps + num_bisections * walk.success,
            walk.candidates.shape[1] * walk.num_steps,
            walk.num_zero_gradients,
        )

    return Attack(threat, goal_fn, run, keep="closest", stop="never", draws=False)


def _at_least(lowest: int, **arguments: int) -> None:
    """Raises ValueError unless every keyword argument is an integer of at least ``lowest``."""
    for argument, value in arguments.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < lowest:
            raise ValueError(f"{argument}={value!r} must be an integer >= {lowest}.")


def _bisect(
    judge: Callable[[Array], tuple[Array, Array, Array]],
    inputs: Array,
    walk: _Walk,
    num_bisections: int,
) -> tuple[Array, Array]:
    """Returns the closest successful points on the way from the clean inputs, and their margins.

    Args:
      judge: ``points -> (points as the model sees them, margins [B], success [B])``.
      inputs: clean, ``[B, ...]``.
      walk: the end of the walk.
      num_bisections: passes; 0 changes nothing.
    """
    if num_bisections == 0:
        return walk.adv_inputs, walk.loss

    def halve(
        _: int, carry: tuple[Array, Array, Array, Array]
    ) -> tuple[Array, Array, Array, Array]:
        low, high, closest, closest_loss = carry
        middle = (low + high) / 2
        way = norms.expand(middle, inputs) * (walk.adv_inputs - inputs)
        adv_inputs, loss, success = judge(inputs + way)
        return (
            jnp.where(success, low, middle),
            jnp.where(success, middle, high),
            jnp.where(norms.expand(success, adv_inputs), adv_inputs, closest),
            jnp.where(success, loss, closest_loss),
        )

    # Fractions of the way: the model is misled at high, and not at low.
    low = jnp.zeros(inputs.shape[0], inputs.dtype)
    carry = (low, low + 1, walk.adv_inputs, walk.loss)
    return jax.lax.fori_loop(0, num_bisections, halve, carry)[2:]


def _candidates(problem: Problem, goal: base.Goal, num_candidates: int | None) -> Array:
    """Returns the classes ``[K, B]`` to move to, those of large clean logits first.

    Raises:
      ValueError: for a model of one class.
    """
    num_classes = problem.clean_logits.shape[1]
    if num_classes < 2:
        raise ValueError(f"the model has {num_classes} class: there is no other to move to.")
    if goal.targets is not None:
        return goal.targets[None]
    # The label leads: inputs that are misclassified already are left alone.
    return base.classes_by_rank(problem.clean_logits)[:, 1:num_candidates].T


def _nearest_boundary(
    logits_fn: LogitsFn,
    threat: ThreatModel,
    goal: base.Goal,
    candidates: Array,
    points: Array,
    num_gradients: int | None,
) -> tuple[Array, Array, Array]:
    """Finds the boundary to a candidate that is nearest in the linearised model.

    Args:
      logits_fn: the model.
      threat: gives the norm.
      goal: gives the class that the candidates are compared with: the label or, if targeted, the
        largest of the others.
      candidates: int ``[K, B]``.
      points: ``[B, ...]``, where the model is linearised.
      num_gradients: taken at once.

    Returns:
      ``(distance [B], gradient [B, ...], num_flat int32 [B])``: the distance is infinite where all
      gradients are too small, and ``num_flat`` counts those that are.
    """

    def ahead(logits: Array) -> Array:
        if goal.targets is None:
            return goal.labels
        is_target = jnp.arange(logits.shape[1])[None, :] == goal.targets[:, None]
        return jnp.argmax(jnp.where(is_target, -jnp.inf, logits), axis=1)

    def cotangents(logits: Array) -> Array:
        num_classes = logits.shape[1]
        towards = jax.nn.one_hot(candidates, num_classes)
        return towards - jax.nn.one_hot(ahead(logits), num_classes)[None]

    logits, gradients = base.pull_back(logits_fn, points, cotangents, num_gradients=num_gradients)
    gradients = gradients.astype(jnp.promote_types(points.dtype, jnp.float32))
    differences = jax.vmap(losses.class_difference, in_axes=(None, None, 0))(
        logits, ahead(logits), candidates
    )
    # Rescaled: the squares of large gradients would overflow.
    rescaled, scale = jax.vmap(norms.rescale)(gradients)
    length = jax.vmap(lambda rows: norms.vector_norm(rows, threat.dual_norm))(rescaled)
    slopes = scale * length
    is_flat = slopes < _FLAT
    distances = jnp.abs(differences) / jnp.where(is_flat, 1, slopes)
    distances = jnp.where(is_flat | ~jnp.isfinite(distances), jnp.inf, distances)
    # Not an index into the rows: XLA need not partition a gather.
    nearest = jnp.arange(len(candidates))[:, None] == jnp.argmin(distances, axis=0)[None]
    chosen = nearest.reshape(nearest.shape + (1,) * (points.ndim - 1))
    return (
        jnp.min(distances, axis=0).astype(gradients.dtype),
        jnp.sum(jnp.where(chosen, gradients, 0), axis=0),
        jnp.sum(is_flat, axis=0, dtype=jnp.int32),
    )
