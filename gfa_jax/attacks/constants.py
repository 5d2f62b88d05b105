"""The search for the constant that weighs success against the size of the perturbation.

Attacks that minimise ``constant * hinge + size`` (C&W, EAD) run the same optimiser several times:
too small a constant never misleads the model, too large a one moves too far. Every example has a
constant of its own (Carlini & Wagner 2017, arXiv 1608.04644, section V; code
``carlini/nn_robust_attacks``), and nothing here looks across the batch.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gfa_jax import norms
from gfa_jax.attacks import base, chunks
from gfa_jax.attacks.runs import Problem
from gfa_jax.types import Array, PyTree

ABORT = ("example", "none")
"""Whether an optimiser leaves an example alone that no longer improves."""

_HIGHEST = 1e10
"""The upper end of a bracket of which nothing is known yet."""


class Bracket(NamedTuple):
    """The constant of each example, and what is known of the smallest that succeeds.

    Attributes:
      constant: ``[B]``, of the coming search.
      low: ``[B]``, the largest that failed; 0 at first.
      high: ``[B]``, the smallest that succeeded; 1e10 at first.
    """

    constant: Array
    low: Array
    high: Array

    def narrow(self, found: Array) -> "Bracket":
        """Returns the bracket after a search that succeeded where ``found``, bool ``[B]``.

        The constant grows tenfold until the first success, and halves the bracket from then on.
        """
        high = jnp.where(found, jnp.minimum(self.high, self.constant), self.high)
        low = jnp.where(found, self.low, jnp.maximum(self.low, self.constant))
        # Never beyond the upper end: with many searches the constant would overflow.
        grown = jnp.where(found, self.constant, jnp.minimum(10 * self.constant, high))
        return Bracket(jnp.where(high < 1e9, (low + high) / 2, grown), low, high)


def bracket(initial_constant: float | Array, like: Array) -> Bracket:
    """Returns the bracket of the first search, of the shape ``[B]`` and dtype of ``like``."""
    return Bracket(
        jnp.full_like(like, initial_constant), jnp.zeros_like(like), jnp.full_like(like, _HIGHEST)
    )


def confident(goal: base.Goal, confidence: float | Array) -> base.Goal:
    """Returns the goal, reached only where the loss, a margin, is above ``confidence`` too.

    As in the official codes: the label's logit is raised by the confidence, or the target's
    lowered, before the classes are compared.
    """
    classes = goal.labels if goal.targets is None else goal.targets
    offset = confidence if goal.targets is None else -confidence

    def reached(logits: Array) -> Array:
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        is_class = jnp.arange(logits.shape[1])[None, :] == classes[:, None]
        return goal.reached(jnp.where(is_class, logits + offset, logits))

    return goal._replace(reached=reached)


def hinge(loss: Array, confidence: float | Array) -> Array:
    """Returns ``max(confidence - loss, 0)``, what is missing to the goal of a margin ``loss``."""
    return jnp.where(loss <= confidence, confidence - loss, 0)


def pull(constant: Array, loss: Array, gradient: Array, confidence: float | Array) -> Array:
    """Returns the gradient ``[B, ...]`` of ``constant * hinge(loss)``.

    At a tie, where the hinge has a kink, it is that of the open side: a zero would hold an example
    of two equal logits where it is.

    Args:
      constant: ``[B]``.
      loss: ``[B]``.
      gradient: of the loss, ``[B, ...]``.
      confidence: what the loss has to reach.
    """
    weight = jnp.where(loss <= confidence, constant, 0)
    return -norms.expand(weight, gradient) * gradient


class Iterate(NamedTuple):
    """A point of each example that the optimiser has evaluated.

    Attributes:
      adv_inputs: ``[B, ...]``.
      measure: ``[B]``, the size of the perturbation that the attack minimises.
      objective: ``[B]``, what the optimiser minimises, to see whether it still improves.
      loss: ``[B]``, the margin.
      reached: bool ``[B]``, with the asked confidence.
      zero_gradient: bool ``[B]``, whether the gradient taken in this step was exactly zero.
    """

    adv_inputs: Array
    measure: Array
    objective: Array
    loss: Array
    reached: Array
    zero_gradient: Array


StepFn = Callable[[Array, PyTree, Array, Problem], tuple[PyTree, Iterate]]
"""``(number, walk, constant [B], problem) -> (walk, Iterate)``: one step of the optimiser, and its
point, for some of the examples."""


class Closest(NamedTuple):
    """The smallest successful perturbation over all steps and searches.

    Attributes:
      adv_inputs: ``[B, ...]``; the clean inputs where nothing succeeded.
      measure: ``[B]``; infinite where nothing succeeded.
      loss: ``[B]``, at ``adv_inputs``.
      num_steps: int32 ``[B]``, the steps taken for the example.
      num_zero_gradients: int32 ``[B]``.
    """

    adv_inputs: Array
    measure: Array
    loss: Array
    num_steps: Array
    num_zero_gradients: Array

    @property
    def success(self) -> Array:
        """Whether any point succeeded, bool ``[B]``."""
        return self.measure < jnp.inf

    def update(self, here: Iterate, succeeded: Array) -> "Closest":
        """Returns the closer of this and a new point where that has ``succeeded``, bool ``[B]``."""
        closer = succeeded & (here.measure < self.measure)
        return self._replace(
            adv_inputs=jnp.where(
                norms.expand(closer, here.adv_inputs), here.adv_inputs, self.adv_inputs
            ),
            measure=jnp.where(closer, here.measure, self.measure),
            loss=jnp.where(closer, here.loss, self.loss),
        )


class _Descent(NamedTuple):
    """The carry of one search.

    Attributes:
      problem: what the examples are.
      constant: ``[B]``.
      walk: the optimiser's own state.
      running: bool ``[B]``, examples that still improve.
      previous: ``[B]``, the objective at the last check.
      found: bool ``[B]``, whether this search has succeeded.
      closest: over all searches.
    """

    problem: Problem
    constant: Array
    walk: PyTree
    running: Array
    previous: Array
    found: Array
    closest: Closest


def search(
    step: StepFn,
    start: PyTree,
    problem: Problem,
    *,
    num_steps: int,
    num_searches: int,
    initial_constant: float | Array,
    abort_factor: float | None = None,
    reset: bool = True,
    chunk_size: int | None = None,
) -> Closest:
    """Runs an optimiser for one constant after another and keeps the closest success.

    From ten searches on, the last one repeats the smallest constant that succeeded.

    Args:
      step: one step of the optimiser.
      start: its state at the first step; a pytree of ``[B, ...]`` arrays and scalars.
      problem: the examples; with an ``abort_factor``, a search ends once the active ones stop.
      num_steps: of each search.
      num_searches: constants tried.
      initial_constant: the first of them.
      abort_factor: an example stops, until the next search, when its objective is not below
        ``abort_factor`` times that of the last check. There are ten checks in a search, at every
        step if it has fewer than ten; the point of the check that stops it is not kept. The first
        check compares with nothing (the official codes compare with 1e6, which large logits
        exceed). ``None``: all examples take all steps.
      reset: whether every search begins at ``start``, and not where the one before ended.
      chunk_size: with an ``abort_factor``, examples looked at together (``chunks.loop``).
    """
    inputs = problem.inputs
    wide = jnp.promote_types(inputs.dtype, jnp.float32)
    like = jnp.zeros(inputs.shape[0], wide)
    none = jnp.zeros(inputs.shape[0], jnp.int32)
    infinite = jnp.full_like(like, jnp.inf)
    period = max(num_steps // 10, 1)

    def descend(number: Array, descent: _Descent) -> _Descent:
        running = descent.running
        walk, here = step(number, descent.walk, descent.constant, descent.problem)
        counted = running.astype(jnp.int32)
        closest = descent.closest
        closest = closest._replace(
            num_steps=closest.num_steps + counted,
            num_zero_gradients=closest.num_zero_gradients + counted * here.zero_gradient,
        )
        previous = descent.previous
        if abort_factor is not None:
            walk = jax.tree.map(lambda new, old: _where(running, new, old), walk, descent.walk)
            is_checked = number % period == 0
            running &= ~(is_checked & (here.objective > abort_factor * previous))
            previous = jnp.where(is_checked, here.objective, previous).astype(wide)
        succeeded = here.reached & running
        return descent._replace(
            walk=walk,
            running=running,
            previous=previous,
            found=descent.found | succeeded,
            closest=closest.update(here, succeeded),
        )

    def attempt(
        number: Array, carry: tuple[Bracket, PyTree, Closest]
    ) -> tuple[Bracket, PyTree, Closest]:
        known, walk, closest = carry
        if num_searches >= 10:
            constant = jnp.where(number == num_searches - 1, known.high, known.constant)
            known = known._replace(constant=constant)
        descent = _Descent(
            problem=problem,
            constant=known.constant,
            walk=start if reset else walk,
            running=none == 0,
            previous=infinite,
            found=none > 0,
            closest=closest,
        )
        if abort_factor is None:
            descent = jax.lax.fori_loop(0, num_steps, descend, descent)
        else:
            descent = chunks.loop(
                descend,
                descent,
                lambda descent: descent.running & descent.problem.active,
                num_steps=num_steps,
                chunk_size=chunk_size,
                steps_between=-(-period // 2),
            )
        return known.narrow(descent.found), descent.walk, descent.closest

    nothing = Closest(inputs, infinite, none.astype(jnp.float32), none, none)
    carry = (bracket(initial_constant, like), start, nothing)
    return jax.lax.fori_loop(0, num_searches, attempt, carry)[2]


def _where(condition: Array, new: Array, old: Array) -> Array:
    """Chooses by example; a scalar, which all examples share, is the new one."""
    return jnp.where(norms.expand(condition, new), new, old) if new.ndim else new
