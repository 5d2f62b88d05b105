"""FGSM and PGD in l_inf, l_2 and l_1."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from gfa_jax import _validate
from gfa_jax.attacks import base
from gfa_jax.attacks.estimators import EXACT, Estimator, Model, fold_in
from gfa_jax.attacks.runs import KL, Attack, Found, Problem, goal_of, starting_point
from gfa_jax.threat import ThreatModel
from gfa_jax.types import Array, LossFn

KEEP = ("best", "last")


def _judge(
    estimator: Estimator, model: Model, keys: Array | None, goal: base.Goal, adv_inputs: Array
) -> tuple[Array, Array]:
    """Returns loss ``[B]`` and success ``[B]`` at one point of each example.

    Under jit, a caller that uses only ``adv_inputs`` does not pay for the judgement.
    """
    logits = estimator.logits(model, jax.lax.stop_gradient(adv_inputs), keys)
    return goal.loss(logits).astype(jnp.float32), goal.reached(logits)


def fgsm(
    threat: ThreatModel,
    *,
    loss: str | LossFn = "cross_entropy",
    random_start: bool = False,
    step_size: float | Array | None = None,
    estimator: Estimator = EXACT,
) -> Attack:
    """The fast gradient sign method, and its random-start form.

    Without a random start (Goodfellow et al. 2015, arXiv 1412.6572): the allowed point that
    maximises the linearised loss (``ThreatModel.linear_maximizer``), which in l_inf is
    ``clip(x + epsilon sign(g))``. With one
    (RS-FGSM, Wong et al. 2020, arXiv 2001.03994): from a random allowed point, one step of
    ``step_size`` along the steepest direction, projected. Counts: 2 forwards (the second judges the
    point), 1 backward. An example of zero gradient stays where it is and is counted in
    ``num_zero_gradients``.

    Args:
      threat: ball and box.
      loss: the loss to maximise, by name (``losses.LOSSES``) or as a function.
      random_start: whether to start at a random allowed point.
      step_size: of the random-start form, in input units; default ``1.25 * epsilon``.
      estimator: where the gradient comes from.

    Returns:
      An attack that returns its only point, successful or not.

    Raises:
      ValueError: for an unknown loss, a step size that is not positive, or one given without a
        random start.
    """
    if step_size is not None:
        _validate.positive(step_size=step_size)
        if not random_start:
            raise ValueError(
                f"step_size={step_size!r} needs random_start=True: plain FGSM always moves by "
                "epsilon."
            )
    step = 1.25 * threat.epsilon if step_size is None else step_size

    def run(
        model: Model, keys: Array | None, problem: Problem, goal: base.Goal, index: int | Array
    ) -> Found:
        inputs = problem.inputs
        start = starting_point(threat, keys, problem, random_start)
        gradient = estimator.evaluate(model, goal, start, keys).gradient
        if random_start:
            adv_inputs = threat.project(
                inputs, start + step * threat.steepest_step(start, gradient)
            )
        else:
            adv_inputs = threat.linear_maximizer(inputs, gradient)
        final_loss, reached = _judge(estimator, model, keys, goal, adv_inputs)
        one = jnp.ones(inputs.shape[0], jnp.int32)
        return Found(
            adv_inputs,
            reached,
            final_loss,
            one * (estimator.num_forwards + estimator.num_judging),
            one * estimator.num_backwards,
            base.is_zero(gradient).astype(jnp.int32),
        )

    return Attack(threat, goal_of(loss), run, keep="last", estimator=estimator, draws=random_start)


class _Walk(NamedTuple):
    """The carry of one PGD run: the current point and what was seen on the way to it."""

    adv_inputs: Array
    best: base.Best
    num_zero_gradients: Array
    optimizer_state: optax.OptState


def pgd(
    threat: ThreatModel,
    *,
    num_steps: int = 40,
    step_size: float | Array | None = None,
    num_restarts: int = 1,
    random_start: bool = True,
    loss: str | LossFn = "cross_entropy",
    keep: str = "best",
    optimizer: optax.GradientTransformation | None = None,
    estimator: Estimator = EXACT,
    unroll: int | bool = 1,
) -> Attack:
    """Projected gradient descent with steepest steps (Madry et al. 2018, arXiv 1706.06083).

    Each step moves by ``step_size`` along ``ThreatModel.steepest_step`` and projects. Steps and
    restarts are ``lax.fori_loop`` iterations.

    Args:
      threat: ball and box.
      num_steps: gradient steps of a run.
      step_size: in input units; default ``2.5 * epsilon / num_steps``.
      num_restarts: independent runs; the best point over all of them is kept. With
        ``random_start=False`` they would all be the same, so more than one is an error.
      random_start: start at a random allowed point instead of the clean input.
      loss: the loss to maximise, by name (``losses.LOSSES``, or ``kl`` for the divergence from the
        clean predictions, as in TRADES) or as a function.
      keep: ``best``: the point of largest loss among those that mislead the model, over all
        iterates and restarts, the clean one included; the clean input where there is none, and
        where it misleads the model already. At least as strong as ``last`` with the same keys.
        ``last``: the last iterate of a single run, successful or not, as adversarial training and
        published PGD-k figures use it.
      optimizer: an optax transformation that replaces the steepest step, such as
        ``optax.adam(epsilon / 4)``. It sees the gradient of the negated loss, example by example
        (each has a state of its own), and its updates are added before the projection.
      estimator: where the gradient comes from.
      unroll: how many steps of the loop are unrolled, as in ``lax.fori_loop``. Models with
        ``nn.Conv`` on CPU gain several-fold from ``unroll=True``, for a longer compilation (jax
        issue 12868); this library's own models do not need it.

    Returns:
      The attack. Counts for each example: with ``keep="best"`` 1 + num_restarts * (num_steps + 1)
      forwards and num_restarts * num_steps backwards; with ``last`` num_steps + 1 and num_steps
      (with ``kl``, one forward more).

    Raises:
      ValueError: for options out of range; the message names them.
    """
    _validate.positive_integer(num_steps=num_steps, num_restarts=num_restarts)
    _validate.one_of(KEEP, keep=keep)
    if step_size is not None:
        _validate.positive(step_size=step_size)
        if optimizer is not None:
            raise ValueError(
                f"step_size={step_size!r} and an optimizer were given: the optimizer has a step "
                "size of its own."
            )
    if num_restarts > 1 and not random_start:
        raise ValueError(
            f"num_restarts={num_restarts} with random_start=False would repeat the same run: use "
            "num_restarts=1."
        )
    if num_restarts > 1 and keep == "last":
        raise ValueError(
            f"num_restarts={num_restarts} needs keep='best': the last point of a run is one point."
        )
    if loss == KL and not random_start:
        raise ValueError(
            f"loss={KL!r} with random_start=False would not move: its gradient at the clean input "
            "is zero."
        )
    step = 2.5 * threat.epsilon / num_steps if step_size is None else step_size

    def move(walk: _Walk, gradient: Array) -> tuple[Array, optax.OptState]:
        if optimizer is None:
            return step * threat.steepest_step(walk.adv_inputs, gradient), ()
        return jax.vmap(optimizer.update)(-gradient, walk.optimizer_state, walk.adv_inputs)

    def run(
        model: Model, keys: Array | None, problem: Problem, goal: base.Goal, index: int | Array
    ) -> Found:
        """One run: restart ``index`` draws the same start whatever is kept."""
        inputs = problem.inputs
        start = starting_point(threat, keys, problem, random_start)

        def body(number: Array, walk: _Walk) -> _Walk:
            step_keys = fold_in(keys, number) if estimator.needs_keys and keys is not None else None
            here = estimator.evaluate(model, goal, walk.adv_inputs, step_keys)
            best = (
                walk.best.update(walk.adv_inputs, here.loss, here.reached)
                if keep == "best"
                else walk.best
            )
            update, optimizer_state = move(walk, here.gradient)
            zero = base.is_zero(here.gradient).astype(jnp.int32)
            return _Walk(
                threat.project(inputs, walk.adv_inputs + update),
                best,
                walk.num_zero_gradients + zero,
                optimizer_state,
            )

        none = jnp.zeros(inputs.shape[0], jnp.int32)
        nothing = base.Best(inputs, jnp.full(none.shape, -jnp.inf), none > 0)
        optimizer_state = () if optimizer is None else jax.vmap(optimizer.init)(start)
        walk = jax.lax.fori_loop(
            0, num_steps, body, _Walk(start, nothing, none, optimizer_state), unroll=unroll
        )
        last_loss, reached = _judge(estimator, model, keys, goal, walk.adv_inputs)
        best = (
            walk.best.update(walk.adv_inputs, last_loss, reached)
            if keep == "best"
            else base.Best(walk.adv_inputs, last_loss, reached)
        )
        return Found(
            best.adv_inputs,
            best.success,
            best.loss,
            none + num_steps * estimator.num_forwards + estimator.num_judging,
            none + num_steps * estimator.num_backwards,
            walk.num_zero_gradients,
        )

    return Attack(
        threat,
        goal_of(loss),
        run,
        num_restarts=num_restarts,
        keep=keep,
        stop="never",
        estimator=estimator,
        draws=random_start,
    )
