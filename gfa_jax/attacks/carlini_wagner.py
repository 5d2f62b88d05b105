"""The attack of Carlini and Wagner: small perturbations in l_2."""

from typing import NamedTuple

import jax.numpy as jnp
import optax

from gfa_jax import _validate, norms
from gfa_jax.attacks import base, constants
from gfa_jax.attacks.estimators import Model
from gfa_jax.attacks.runs import Attack, Found, Problem, goal_of, refuse_start
from gfa_jax.threat import ThreatModel
from gfa_jax.types import Array

_INSIDE = 0.999999
"""How far the clean input is drawn to the centre of the box, whose faces tanh never reaches."""


class _Walk(NamedTuple):
    """The point and what the model says there.

    Attributes:
      origin: ``[B, ...]``, the first point: perturbations are measured from it, as in the official
        code, not from the clean input.
      variable: ``[B, ...]``, unbounded; its tanh is the point.
      loss: ``[B]``.
      gradient: of the summed loss in input units, ``[B, ...]``.
      optimizer_state: elementwise, apart from the number of steps.
    """

    origin: Array
    variable: Array
    loss: Array
    gradient: Array
    optimizer_state: optax.OptState


def cw(
    threat: ThreatModel,
    *,
    num_steps: int = 1000,
    learning_rate: float | Array = 1e-2,
    num_searches: int = 9,
    initial_constant: float | Array = 1e-3,
    confidence: float | Array = 0.0,
    abort: str = "none",
    chunk_size: int | None = None,
) -> Attack:
    """The attack of Carlini and Wagner in l_2 (2017, arXiv 1608.04644, section VI).

    Adam on ``constant * hinge(margin) + |d|_2^2`` over a variable whose tanh lies in the box, for
    one constant after another (``constants.search``), as in the official code
    ``carlini/nn_robust_attacks``; the smallest successful perturbation is kept. Epsilon plays no
    part: the attack succeeds at any distance. All sizes are in input units.

    Where this and the official code part: an example that fails comes back clean, not black; the
    other classes are masked with minus infinity, not -1e4; examples stop one by one, not by the sum
    over the batch; 1e-8 of Adam is added after the correction for bias; and every point is judged,
    the last included. The official code takes 10,000 steps; 1,000 come close to it.

    Args:
      threat: gives the box, and the norm of ``distance``; what is minimised is l_2 all the same.
      num_steps: of each search.
      learning_rate: Adam's.
      num_searches: constants tried.
      initial_constant: the first constant.
      confidence: the margin to reach, in units of the logits, >= 0.
      abort: ``example``: an example that no longer improves rests until the next search
        (``constants.search``). ``none``: never, which is at least as strong.
      chunk_size: with ``abort="example"``, examples looked at together; resting ones leave
        (``chunks.loop``). By default the whole batch, until all rest.

    Returns:
      The attack. Counts for each example: 2 + num_searches num_steps forwards and
      1 + num_searches num_steps backwards; fewer with ``abort="example"``.

    Raises:
      ValueError: for options out of range; the message names them.
        When called: for ``start``.
    """
    _validate.one_of(constants.ABORT, abort=abort)
    _validate.positive_integer(num_steps=num_steps, num_searches=num_searches)
    if chunk_size is not None:
        _validate.positive_integer(chunk_size=chunk_size)
    _validate.positive(learning_rate=learning_rate, initial_constant=initial_constant)
    _validate.non_negative(confidence=confidence)
    lower, upper = threat.bounds
    center, half_width = (lower + upper) / 2, (upper - lower) / 2
    optimizer = optax.adam(learning_rate)
    goal_fn = goal_of("margin")

    def decode(variable: Array) -> Array:
        """The point in the box; clipped, since far from 0 the box's faces are rounded."""
        return jnp.clip(center + half_width * jnp.tanh(variable), lower, upper)

    def run(
        model: Model, keys: Array | None, problem: Problem, goal: base.Goal, index: int | Array
    ) -> Found:
        refuse_start(problem)
        dtype = problem.inputs.dtype
        wide = jnp.promote_types(dtype, jnp.float32)
        relative = (problem.inputs.astype(wide) - center) / half_width
        variable = jnp.arctanh(jnp.clip(relative, -1, 1) * _INSIDE)
        origin = decode(variable)

        def evaluate(variable: Array, some: Problem) -> tuple[Array, base.Evaluation]:
            goal = constants.confident(goal_fn(some, index), confidence)
            adv_inputs = decode(variable).astype(dtype)
            here = base.evaluate(model, goal, adv_inputs)
            return adv_inputs, here._replace(gradient=here.gradient.astype(wide))

        def step(
            number: Array, walk: _Walk, constant: Array, some: Problem
        ) -> tuple[_Walk, constants.Iterate]:
            gradient = constants.pull(constant, walk.loss, walk.gradient, confidence)
            gradient += 2 * (decode(walk.variable) - walk.origin)
            # Not 1 - tanh^2, which rounds to zero beyond 9 and would hold the variable there.
            slope = half_width / jnp.cosh(walk.variable) ** 2
            update, optimizer_state = optimizer.update(
                base.finite(slope * gradient), walk.optimizer_state
            )
            variable = walk.variable + update
            adv_inputs, here = evaluate(variable, some)
            perturbation = adv_inputs.astype(wide) - walk.origin
            measure = norms.dot(perturbation, perturbation)
            iterate = constants.Iterate(
                adv_inputs,
                measure,
                constant * constants.hinge(here.loss, confidence) + measure,
                here.loss,
                here.reached,
                base.is_zero(here.gradient),
            )
            walk = _Walk(walk.origin, variable, here.loss, here.gradient, optimizer_state)
            return walk, iterate

        # The first point is the same for all constants: differentiated once. Where it misleads the
        # model already, the first step stays and is judged.
        _, here = evaluate(variable, problem)
        closest = constants.search(
            step,
            _Walk(origin, variable, here.loss, here.gradient, optimizer.init(variable)),
            problem,
            num_steps=num_steps,
            num_searches=num_searches,
            initial_constant=initial_constant,
            abort_factor=None if abort == "none" else 0.9999,
            chunk_size=chunk_size,
        )
        return Found(
            closest.adv_inputs,
            closest.success,
            closest.loss,
            1 + closest.num_steps,
            1 + closest.num_steps,
            base.is_zero(here.gradient) + closest.num_zero_gradients,
        )

    return Attack(threat, goal_fn, run, keep="closest", stop="never", draws=False)
