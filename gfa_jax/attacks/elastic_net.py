"""EAD, the elastic-net attack: small perturbations in l_1, or in l_1 and l_2 together."""

from typing import NamedTuple

import jax.numpy as jnp

from gfa_jax import _validate, losses, norms
from gfa_jax.attacks import base, constants
from gfa_jax.attacks.estimators import Model
from gfa_jax.attacks.runs import Attack, Found, Problem, goal_of, refuse_start
from gfa_jax.threat import ThreatModel
from gfa_jax.types import Array

RULES = ("en", "l1")
VARIANTS = ("canonical", "art", "torchattacks")


class _Walk(NamedTuple):
    """FISTA's two sequences, ``[B, ...]``: the points, and where the gradient is taken."""

    point: Array
    lookahead: Array


def _lame_margin(goal: base.Goal) -> base.Goal:
    """The margin of torchattacks, which reads the class's logit as ``max(z, 0)``.

    Where it is negative, it has neither a value nor a gradient.
    """
    classes = goal.labels if goal.targets is None else goal.targets
    sign = 1 if goal.targets is None else -1

    def loss(logits: Array) -> Array:
        margin = losses.margin(logits, classes)
        own = jnp.take_along_axis(logits, classes[:, None], axis=1)[:, 0].astype(margin.dtype)
        return sign * (margin + jnp.minimum(own, 0))

    return goal._replace(loss=loss)


def ead(
    threat: ThreatModel,
    *,
    rule: str = "en",
    num_steps: int = 100,
    learning_rate: float | Array = 1e-2,
    num_searches: int = 9,
    initial_constant: float | Array = 1e-3,
    beta: float | Array = 1e-3,
    confidence: float | Array = 0.0,
    abort: str = "none",
    chunk_size: int | None = None,
    variant: str = "canonical",
) -> Attack:
    """The elastic-net attack (Chen et al. 2018, arXiv 1709.04114).

    FISTA on ``constant * hinge(margin) + |d|_2^2 + beta |d|_1`` over the box, for one constant
    after another (``constants.search``), as in the official code ``ysharma1126/EAD_Attack``. The
    iterates of both rules are the same; the rule says which of the successful ones is the smallest.
    Epsilon and the threat's norm play no part: the attack succeeds at any distance, and
    ``distance`` is the threat's norm of what it found. All sizes are in input units.

    Where this and the official code part: an example that fails comes back clean, not black; the
    other classes are masked with minus infinity, not -1e4; examples stop one by one, not by the
    sum over the batch.

    Args:
      threat: gives the box, and the norm of ``distance``.
      rule: ``en`` keeps the successful point of smallest ``|d|_2^2 + beta |d|_1``, ``l1`` that of
        smallest ``|d|_1``.
      num_steps: of each search.
      learning_rate: of the first step; it falls as ``sqrt(1 - step / num_steps)``.
      num_searches: constants tried.
      initial_constant: the first constant.
      beta: weight of the l_1 norm, and how far each coordinate is drawn to the clean input in every
        step, >= 0.
      confidence: the margin to reach, in units of the logits, >= 0.
      abort: ``example``: an example that no longer improves rests until the next search
        (``constants.search``). ``none``: never, which is at least as strong.
      chunk_size: with ``abort="example"``, examples looked at together; resting ones leave
        (``chunks.loop``). By default the whole batch, until all rest.
      variant: ``canonical``, the authors' code. ``art``, the gradient of the Adversarial Robustness
        Toolbox: where the margin is reached the point is drawn to the clean input by beta alone,
        without the gradient of ``|d|_2^2``, which finds smaller l_1 norms. ``torchattacks``, to
        compare with figures of its EADEN and EADL1 (version 3): each search starts where the one
        before ended, a negative logit of the true class is not seen, and the threshold of ``abort``
        is .999999 instead of .9999.

    Returns:
      The attack. Counts for each example: 1 + 2 num_searches num_steps forwards (at the point of
      the gradient and at the point reached) and num_searches num_steps backwards; fewer with
      ``abort="example"``.

    Raises:
      ValueError: for options out of range; the message names them. When called: for ``start``.
    """
    _validate.one_of(RULES, rule=rule)
    _validate.one_of(VARIANTS, variant=variant)
    _validate.one_of(constants.ABORT, abort=abort)
    _validate.positive_integer(num_steps=num_steps, num_searches=num_searches)
    if chunk_size is not None:
        _validate.positive_integer(chunk_size=chunk_size)
    _validate.positive(learning_rate=learning_rate, initial_constant=initial_constant)
    _validate.non_negative(beta=beta, confidence=confidence)
    is_torchattacks = variant == "torchattacks"
    abort_factor = 0.999999 if is_torchattacks else 0.9999
    lower, upper = threat.bounds
    goal_fn = goal_of("margin")

    def shrink(inputs: Array, moved: Array) -> Array:
        """Draws each coordinate to the clean one by beta, at most up to it, and into the box."""
        change = moved - inputs
        grown = jnp.minimum(moved - beta, upper)
        lowered = jnp.maximum(moved + beta, lower)
        return jnp.where(change > beta, grown, jnp.where(change < -beta, lowered, inputs))

    def run(
        model: Model, keys: Array | None, problem: Problem, goal: base.Goal, index: int | Array
    ) -> Found:
        refuse_start(problem)
        dtype = problem.inputs.dtype
        wide = jnp.promote_types(dtype, jnp.float32)
        start = problem.inputs.astype(wide)

        def step(
            number: Array, walk: _Walk, constant: Array, some: Problem
        ) -> tuple[_Walk, constants.Iterate]:
            inputs = some.inputs.astype(wide)
            goal = constants.confident(goal_fn(some, index), confidence)
            aim = _lame_margin(goal) if is_torchattacks else goal
            here = base.evaluate(model, aim, walk.lookahead.astype(dtype))
            gradient = constants.pull(constant, here.loss, here.gradient, confidence)
            gradient += 2 * (walk.lookahead - inputs)
            if variant == "art":
                is_pulled = norms.expand(here.loss <= confidence, gradient)
                gradient = jnp.where(is_pulled, gradient, 0)
            rate = (learning_rate * jnp.sqrt(1 - number / num_steps)).astype(wide)
            point = shrink(inputs, walk.lookahead - rate * gradient)
            momentum = ((number + 1) / (number + 4)).astype(wide)
            lookahead = point + momentum * (point - walk.point)

            adv_inputs = jnp.clip(point.astype(dtype), lower, upper)
            logits = model(adv_inputs)
            perturbation = adv_inputs.astype(wide) - inputs
            length = norms.vector_norm(perturbation, "l1")
            elastic_net = norms.dot(perturbation, perturbation) + beta * length
            missing = constants.hinge(aim.loss(logits), confidence)
            if is_torchattacks:
                missing -= confidence
            iterate = constants.Iterate(
                adv_inputs,
                (elastic_net if rule == "en" else length).astype(wide),
                constant * missing + elastic_net,
                goal.loss(logits).astype(jnp.float32),
                goal.reached(logits),
                base.is_zero(here.gradient),
            )
            return _Walk(point, lookahead), iterate

        closest = constants.search(
            step,
            _Walk(start, start),
            problem,
            num_steps=num_steps,
            num_searches=num_searches,
            initial_constant=initial_constant,
            abort_factor=None if abort == "none" else abort_factor,
            reset=not is_torchattacks,
            chunk_size=chunk_size,
        )
        return Found(
            closest.adv_inputs,
            closest.success,
            closest.loss,
            2 * closest.num_steps,
            closest.num_steps,
            closest.num_zero_gradients,
        )

    return Attack(threat, goal_fn, run, keep="closest", stop="never", draws=False)
