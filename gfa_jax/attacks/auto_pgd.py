"""Auto-PGD: steps that halve when progress stalls, in l_inf, l_2 and l_1.

Croce & Hein 2020, arXiv 2003.01208, section 3 and Algorithm 1; for l_1, Croce & Hein 2021, arXiv
2103.01208, section 3. Where the papers leave a choice, this follows the authors' code (AutoAttack),
whose peculiarities are named in comments.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gfa_jax import _validate, bisection, norms
from gfa_jax.attacks import base
from gfa_jax.attacks.estimators import EXACT, Estimator, Model, fold_in
from gfa_jax.attacks.runs import Attack, Found, GoalFn, Problem, draw_noise, goal_of, goal_of_ranks
from gfa_jax.threat import ThreatModel
from gfa_jax.types import Array, LossFn

EvaluateAt = Callable[[Array, Array], base.Evaluation]
"""``(points [B, ...], number of the evaluation) -> Evaluation``."""

_MOMENTUM = 0.75
_TINY = 1e-12
_PHASES = (3.0, 2.0, 1.0)
"""Radii of the l_1 phases in units of epsilon; the first two take 30 % of the steps each."""


def apgd(
    threat: ThreatModel,
    *,
    loss: str | LossFn = "cross_entropy",
    num_steps: int = 100,
    num_restarts: int = 1,
    random_start: bool = True,
    rho: float = 0.75,
    large_epsilon_phases: bool = True,
    estimator: Estimator = EXACT,
) -> Attack:
    """Auto-PGD: no step size to choose (Croce & Hein 2020, arXiv 2003.01208).

    Steps start at the diameter of the ball and are halved, going back to the best point, when too
    few steps of a window improved the loss. Given targets, it is a targeted attack.

    Args:
      threat: ball and box. In l_1 the step is sparse and adapts to the sparsity of the best point
        (Croce & Hein 2021, arXiv 2103.01208).
      loss: the loss to maximise, by name (``losses.LOSSES``) or as a function.
      num_steps: gradient steps of a run.
      num_restarts: runs; an example that is broken is left alone by later ones. With
        ``random_start=False`` they would all be the same, so more than one is an error.
      random_start: start at a random point of the sphere (l_inf: the surface of the cube, l_1: a
        projected Gaussian) instead of the clean input.
      rho: the share of a window's steps that must improve the loss, in (0, 1].
      large_epsilon_phases: for l_1, whether a run starts in the balls of 3 and 2 epsilon.
      estimator: where the gradient comes from; ``estimators.expectation`` is AutoAttack's
        ``eot_iter``.

    Returns:
      The attack. It returns the last iterate that misleads the model, as AutoAttack does, and the
      largest loss over all iterates. A run takes ``num_steps + 1`` gradients (one more for each
      further l_1 phase), each with its forward pass; one forward pass judges the clean input.

    Raises:
      ValueError: for options out of range; the message names them.
    """
    return _make(
        threat,
        goal_of(loss),
        num_steps=num_steps,
        num_restarts=num_restarts,
        num_targets=None,
        random_start=random_start,
        rho=rho,
        large_epsilon_phases=large_epsilon_phases,
        estimator=estimator,
    )


def apgd_targeted(
    threat: ThreatModel,
    *,
    loss: str = "dlr",
    num_steps: int = 100,
    num_targets: int = 9,
    num_restarts: int = 1,
    random_start: bool = True,
    rho: float = 0.75,
    large_epsilon_phases: bool = True,
    estimator: Estimator = EXACT,
) -> Attack:
    """Auto-PGD towards one class after another; any wrong class counts (``apgd-t``).

    Classes are tried from the second-largest clean logit down. For one given class, call ``apgd``
    with ``targets``.

    Args:
      threat: ball and box.
      loss: by name (``losses.TARGETED_LOSSES``); ``dlr`` is AutoAttack's.
      num_targets: classes to try; all others where there are fewer.
      num_restarts: runs for each class.
      num_steps: as in ``apgd``, and so are the other arguments.
      random_start: as in ``apgd``.
      rho: as in ``apgd``.
      large_epsilon_phases: as in ``apgd``.
      estimator: as in ``apgd``.

    Raises:
      ValueError: for options out of range; the message names them.
    """
    _validate.positive_integer(num_targets=num_targets)
    return _make(
        threat,
        goal_of_ranks(loss, num_restarts),
        num_steps=num_steps,
        num_restarts=num_restarts,
        num_targets=num_targets,
        random_start=random_start,
        rho=rho,
        large_epsilon_phases=large_epsilon_phases,
        estimator=estimator,
    )


def _make(
    threat: ThreatModel,
    goal_fn: GoalFn,
    *,
    num_steps: int,
    num_restarts: int,
    num_targets: int | None,
    random_start: bool,
    rho: float,
    large_epsilon_phases: bool,
    estimator: Estimator,
) -> Attack:
    _validate.positive_integer(num_steps=num_steps, num_restarts=num_restarts)
    _validate.positive(rho=rho)
    if rho > 1:
        raise ValueError(f"rho={rho!r} must be in (0, 1]: a share of the steps of a window.")
    if num_restarts > 1 and not random_start:
        raise ValueError(
            f"num_restarts={num_restarts} with random_start=False would repeat the same run: use "
            "num_restarts=1."
        )

    def run(
        model: Model, keys: Array | None, problem: Problem, goal: base.Goal, index: int | Array
    ) -> Found:
        def evaluate(points: Array, number: Array) -> base.Evaluation:
            step_keys = fold_in(keys, number) if estimator.needs_keys and keys is not None else None
            return estimator.evaluate(model, goal, points, step_keys)

        if threat.norm == "l1":
            phases = _l1_phases(num_steps) if large_epsilon_phases else ((1.0, num_steps),)
            wide = dataclasses.replace(threat, epsilon=phases[0][0] * threat.epsilon)
            start = _start(wide, keys, problem, random_start)
            sparse = large_epsilon_phases or problem.start is not None
            track = _run_l1(threat, phases, evaluate, problem.inputs, start, sparse)
            num_evaluations = sum(steps + 1 for _, steps in phases)
        else:
            start = _start(threat, keys, problem, random_start)
            track = _run(threat, num_steps, rho, evaluate, problem.inputs, start)
            num_evaluations = num_steps + 1
        one = jnp.ones(problem.inputs.shape[0], jnp.int32)
        return Found(
            track.adv_inputs,
            track.success,
            track.best_loss,
            one * (num_evaluations * estimator.num_forwards),
            one * (num_evaluations * estimator.num_backwards),
            track.num_zero_gradients,
        )

    return Attack(
        threat,
        goal_fn,
        run,
        num_restarts=num_restarts,
        num_targets=num_targets,
        estimator=estimator,
        draws=random_start,
    )


def _start(threat: ThreatModel, keys: Array | None, problem: Problem, random_start: bool) -> Array:
    """Returns the given start, a random point of the ball's surface, or the clean inputs."""
    inputs = problem.inputs
    if problem.start is not None:
        return problem.start
    if not random_start:
        return inputs
    assert keys is not None
    noise = draw_noise(keys, inputs, threat.norm)
    if threat.norm != "l1":
        size = norms.vector_norm(noise, threat.norm) + _TINY
        noise = threat.epsilon * noise / norms.expand(size, noise)
    return threat.project(inputs, inputs + noise)


class _Track(NamedTuple):
    """What both forms of the loop keep; all per example.

    Attributes:
      points: the current point.
      gradient: the loss gradient at ``points``.
      best_points: the point of largest loss.
      best_gradient: the gradient there.
      best_loss: the loss there.
      adv_inputs: the last point that reached the goal (the start, before there is one).
      success: whether any point reached it.
      num_zero_gradients: gradients that were exactly zero.
    """

    points: Array
    gradient: Array
    best_points: Array
    best_gradient: Array
    best_loss: Array
    adv_inputs: Array
    success: Array
    num_zero_gradients: Array

    @classmethod
    def at(cls, start: Array) -> "_Track":
        """Nothing is known yet; the first evaluation fills in the rest."""
        batch = start.shape[0]
        return cls(
            points=start,
            gradient=jnp.zeros_like(start),
            best_points=start,
            best_gradient=jnp.zeros_like(start),
            best_loss=jnp.full(batch, -jnp.inf, jnp.float32),
            adv_inputs=start,
            success=jnp.zeros(batch, bool),
            num_zero_gradients=jnp.zeros(batch, jnp.int32),
        )

    def visit(self, points: Array, here: base.Evaluation) -> "_Track":
        """Moves to new points."""
        better = here.loss > self.best_loss
        wide_better, wide_reached = (norms.expand(mask, points) for mask in (better, here.reached))
        return _Track(
            points=points,
            gradient=here.gradient,
            best_points=jnp.where(wide_better, points, self.best_points),
            best_gradient=jnp.where(wide_better, here.gradient, self.best_gradient),
            best_loss=jnp.where(better, here.loss, self.best_loss),
            adv_inputs=jnp.where(wide_reached, points, self.adv_inputs),
            success=self.success | here.reached,
            num_zero_gradients=self.num_zero_gradients
            + base.is_zero(here.gradient).astype(jnp.int32),
        )

    def go_back(self, where: Array) -> "_Track":
        """Returns to the best point where ``where [B]``."""
        wide = norms.expand(where, self.points)
        return self._replace(
            points=jnp.where(wide, self.best_points, self.points),
            gradient=jnp.where(wide, self.best_gradient, self.gradient),
        )


def _windows(num_steps: int) -> np.ndarray:
    """Returns int ``[num_steps + 1]``: the length of the window that ends at a step, or 0.

    The first window is 22 % of the steps; each further one is shorter by 3 %, down to 6 %. The
    paper's own formula for the checkpoints rounds differently.
    """
    window, shortest = max(int(0.22 * num_steps), 1), max(int(0.06 * num_steps), 1)
    shrink = max(int(0.03 * num_steps), 1)
    lengths = np.zeros(num_steps + 1, np.int32)
    step = window
    while step <= num_steps:
        lengths[step] = window
        window = max(window - shrink, shortest)
        step += window
    return lengths


class _Schedule(NamedTuple):
    """The step-size rule in l_inf and l_2; all per example."""

    previous_points: Array
    step_size: Array
    previous_loss: Array
    num_increases: Array
    checked_loss: Array
    was_reduced: Array


def _run(
    threat: ThreatModel,
    num_steps: int,
    rho: float,
    evaluate: EvaluateAt,
    inputs: Array,
    start: Array,
) -> _Track:
    """One run in l_inf or l_2. Step 0 only evaluates the start: one copy of the model compiles."""
    windows = jnp.asarray(_windows(num_steps))

    def move(track: _Track, schedule: _Schedule, number: Array) -> Array:
        # Unit steps, as AutoAttack divides by the norm plus 1e-12.
        gradient = track.gradient
        direction = (
            jnp.sign(gradient)
            if threat.norm == "linf"
            else gradient / norms.expand(norms.vector_norm(gradient, "l2") + _TINY, gradient)
        )
        step_size = norms.expand(schedule.step_size, gradient)
        target = threat.project(inputs, track.points + step_size * direction)
        share = jnp.where(number > 1, _MOMENTUM, 1.0)
        momentum = track.points - schedule.previous_points
        moved = track.points + share * (target - track.points) + (1 - share) * momentum
        return jnp.where(number == 0, track.points, threat.project(inputs, moved))

    def body(number: Array, carry: tuple[_Track, _Schedule]) -> tuple[_Track, _Schedule]:
        track, schedule = carry
        points = move(track, schedule, number)
        here = evaluate(points, number)
        previous_points = track.points
        track = track.visit(points, here)
        is_start = number == 0
        # The loss before the first step counts as 0, as in AutoAttack, and after going back the
        # loss before it stays the reference.
        increases = schedule.num_increases + (~is_start & (here.loss > schedule.previous_loss))
        checked_loss = jnp.where(is_start, track.best_loss, schedule.checked_loss)
        window = windows[number]
        stalled = increases <= rho * window
        no_better = ~schedule.was_reduced & (checked_loss >= track.best_loss)
        is_check = window > 0
        reduce = is_check & (stalled | no_better)
        return track.go_back(reduce), _Schedule(
            previous_points=previous_points,
            step_size=jnp.where(reduce, schedule.step_size / 2, schedule.step_size),
            previous_loss=jnp.where(is_start, 0, here.loss),
            num_increases=jnp.where(is_check, 0, increases),
            checked_loss=jnp.where(is_check, track.best_loss, checked_loss),
            was_reduced=jnp.where(is_check, reduce, schedule.was_reduced),
        )

    batch = inputs.shape[0]
    zero = jnp.zeros(batch, jnp.float32)
    schedule = _Schedule(
        previous_points=start,
        step_size=jnp.full(batch, 2 * threat.epsilon, inputs.dtype),
        previous_loss=zero,
        num_increases=jnp.zeros(batch, jnp.int32),
        checked_loss=zero,
        was_reduced=jnp.ones(batch, bool),
    )
    return jax.lax.fori_loop(0, num_steps + 1, body, (_Track.at(start), schedule))[0]


def _l1_phases(num_steps: int) -> tuple[tuple[float, int], ...]:
    """Returns ``(radius in epsilons, steps)`` of each phase; a phase without steps is left out."""
    early = -(-3 * num_steps // 10)
    second = min(early, num_steps - early)
    steps = (early, second, num_steps - early - second)
    # With very few steps the last ball, where success counts, still gets one.
    if steps[-1] == 0:
        return ((1.0, num_steps),)
    return tuple(phase for phase in zip(_PHASES, steps, strict=True) if phase[1])


class _Sparsity(NamedTuple):
    """The step rule in l_1; all per example."""

    kept_share: Array
    step_size: Array
    num_moved: Array


def _run_l1(
    threat: ThreatModel,
    phases: tuple[tuple[float, int], ...],
    evaluate: EvaluateAt,
    inputs: Array,
    start: Array,
    sparse_start: bool,
) -> _Track:
    """One run in l_1: phases of shrinking radius, each from the best point of the one before.

    Success counts in the last phase alone, which has the threat's own radius.
    """
    size = inputs[0].size
    factors = jnp.asarray([factor for factor, _ in phases], inputs.dtype)
    steps = jnp.asarray([steps for _, steps in phases])
    firsts = jnp.asarray(np.cumsum([0] + [steps + 1 for _, steps in phases[:-1]]))
    # The length of a window is that of 4 % of the phase's steps.
    windows = jnp.asarray([max(int(0.04 * steps), 1) for _, steps in phases])

    def num_moved(points: Array) -> Array:
        return jnp.sum(norms.flatten(points != inputs), axis=1).astype(inputs.dtype)

    def phase(number: Array, carry: _Track) -> _Track:
        ball = dataclasses.replace(threat, epsilon=factors[number] * threat.epsilon)
        first_points = ball.project(inputs, carry.best_points)
        moved = num_moved(first_points) if sparse_start else jnp.full(len(inputs), size)
        kept = moved / size / 1.5 if sparse_start else jnp.full(len(inputs), 0.2)
        radius = jnp.full(len(inputs), ball.epsilon, inputs.dtype)
        sparsity = _Sparsity(kept.astype(inputs.dtype), radius, moved.astype(inputs.dtype))

        def body(step: Array, carry: tuple[_Track, _Sparsity]) -> tuple[_Track, _Sparsity]:
            track, sparsity = carry
            direction = _sparse_direction(track.gradient, sparsity.kept_share)
            step_size = norms.expand(sparsity.step_size, direction)
            stepped = ball.project(inputs, track.points + step_size * direction)
            points = jnp.where(step == 0, track.points, stepped)
            track = track.visit(points, evaluate(points, firsts[number] + step))
            moved = num_moved(track.best_points)
            # NaN, where nothing has moved yet, is no reduction.
            reduce = moved / sparsity.num_moved < 0.95
            shrunk = jnp.clip(sparsity.step_size / 1.5, radius / 10, radius)
            is_check = (step > 0) & (step % windows[number] == 0)
            checked = _Sparsity(moved / size / 1.5, jnp.where(reduce, radius, shrunk), moved)
            sparsity = jax.tree.map(
                lambda new, old: jnp.where(is_check, new, old), checked, sparsity
            )
            return track.go_back(is_check & reduce), sparsity

        fresh = _Track.at(first_points)._replace(num_zero_gradients=carry.num_zero_gradients)
        return jax.lax.fori_loop(0, steps[number] + 1, body, (fresh, sparsity))[0]

    return jax.lax.fori_loop(0, len(phases), phase, _Track.at(start))


def _sparse_direction(gradient: Array, kept_share: Array) -> Array:
    """Returns the signs of the largest coordinates, divided by their number.

    The threshold is the order statistic that AutoAttack takes; ties with it are kept.
    """
    magnitude = norms.flatten(jnp.abs(gradient))
    size = magnitude.shape[1]
    ranks = jnp.clip((1 - kept_share) * size, 0, size - 1).astype(jnp.int32)
    threshold = bisection.order_statistic(magnitude, ranks)[:, None]
    signs = jnp.where(magnitude >= threshold, jnp.sign(norms.flatten(gradient)), 0)
    count = jnp.sum(jnp.abs(signs), axis=1, keepdims=True)
    return (signs / (count + 1e-10)).reshape(gradient.shape)
