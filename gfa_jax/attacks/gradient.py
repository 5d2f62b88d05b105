"""FGSM and PGD in l_inf, l_2 and l_1."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gfa_jax import _validate, losses, norms
from gfa_jax.attacks import base
from gfa_jax.threat import ThreatModel
from gfa_jax.types import Array, AttackFn, AttackResult, LogitsFn, LossFn

KEEP = ("best", "last")


def _keys_needed(keys: Array | None, inputs: Array) -> Array:
    if keys is None:
        raise ValueError(
            "keys=None, but random_start=True draws one start for each example: pass keys of "
            "shape [B] (example_keys)."
        )
    if keys.shape != inputs.shape[:1]:
        raise ValueError(
            f"keys has shape {keys.shape}; expected one typed key for each of the "
            f"{inputs.shape[0]} examples."
        )
    return keys


def _last_point_result(
    threat: ThreatModel,
    logits_fn: LogitsFn,
    loss_fn: LossFn,
    inputs: Array,
    adv_inputs: Array,
    labels: Array,
    *,
    num_backwards: int,
    num_zero_gradients: Array,
) -> AttackResult:
    """Judges one given point.

    Under jit, a caller that uses only ``adv_inputs`` does not pay for the judgement.
    """
    adv_inputs = jax.lax.stop_gradient(adv_inputs)
    loss, wrong = base.evaluate_forward(logits_fn, loss_fn, adv_inputs, labels)
    count = jnp.ones(inputs.shape[0], jnp.int32)
    result = AttackResult(
        adv_inputs=adv_inputs,
        success=wrong,
        distance=threat.distance(inputs, adv_inputs).astype(jnp.float32),
        loss=loss,
        num_forwards=(num_backwards + 1) * count,
        num_backwards=num_backwards * count,
        num_zero_gradients=num_zero_gradients,
    )
    return jax.lax.stop_gradient(result)


def fgsm(
    threat: ThreatModel,
    *,
    loss: str | LossFn = "cross_entropy",
    random_start: bool = False,
    step_size: float | Array | None = None,
) -> AttackFn:
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

    Returns:
      An attack that returns its only point, successful or not.

    Raises:
      ValueError: for an unknown loss, a step size that is not positive, or one given without a
        random start.
    """
    loss_fn = losses.get(loss)
    if step_size is not None:
        _validate.positive(step_size=step_size)
        if not random_start:
            raise ValueError(
                f"step_size={step_size!r} needs random_start=True: plain FGSM always moves by "
                "epsilon."
            )
    step = 1.25 * threat.epsilon if step_size is None else step_size

    def attack(
        logits_fn: LogitsFn, keys: Array | None, inputs: Array, labels: Array
    ) -> AttackResult:
        base.check_inputs(threat, inputs, labels)
        start = threat.random_start(_keys_needed(keys, inputs), inputs) if random_start else inputs
        gradient = base.evaluate(logits_fn, loss_fn, start, labels).gradient
        if random_start:
            adv_inputs = threat.project(
                inputs, start + step * threat.steepest_step(start, gradient)
            )
        else:
            adv_inputs = threat.linear_maximizer(inputs, gradient)
        return _last_point_result(
            threat,
            logits_fn,
            loss_fn,
            inputs,
            adv_inputs,
            labels,
            num_backwards=1,
            num_zero_gradients=base.is_zero(gradient).astype(jnp.int32),
        )

    return attack


class _Walk(NamedTuple):
    """The carry of one PGD run: the current point and what was seen on the way to it."""

    adv_inputs: Array
    best: base.Best
    num_zero_gradients: Array


def pgd(
    threat: ThreatModel,
    *,
    num_steps: int = 40,
    step_size: float | Array | None = None,
    num_restarts: int = 1,
    random_start: bool = True,
    loss: str | LossFn = "cross_entropy",
    keep: str = "best",
    unroll: int | bool = 1,
) -> AttackFn:
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
      loss: the loss to maximise, by name (``losses.LOSSES``) or as a function.
      keep: ``best``: the misclassified point of largest loss over all iterates and restarts, the
        clean one included; the clean input where none was found, and where it is misclassified
        already. At least as strong as ``last`` with the same keys. ``last``: the last iterate of a
        single run, successful or not, as adversarial training and published PGD-k figures use it.
      unroll: how many steps of the loop are unrolled, as in ``lax.fori_loop``. Models with
        ``nn.Conv`` on CPU gain several-fold from ``unroll=True``, for a longer compilation (jax
        issue 12868); this library's own models do not need it.

    Returns:
      The attack. Counts for each example: with ``keep="best"`` 1 + num_restarts * (num_steps + 1)
      forwards and num_restarts * num_steps backwards; with ``last`` num_steps + 1 and num_steps.

    Raises:
      ValueError: for options out of range; the message names them.
    """
    _validate.positive_integer(num_steps=num_steps, num_restarts=num_restarts)
    _validate.one_of(KEEP, keep=keep)
    if step_size is not None:
        _validate.positive(step_size=step_size)
    if num_restarts > 1 and not random_start:
        raise ValueError(
            f"num_restarts={num_restarts} with random_start=False would repeat the same run: use "
            "num_restarts=1."
        )
    if num_restarts > 1 and keep == "last":
        raise ValueError(
            f"num_restarts={num_restarts} needs keep='best': the last point of a run is one point."
        )
    loss_fn = losses.get(loss)
    step = 2.5 * threat.epsilon / num_steps if step_size is None else step_size

    def run(
        logits_fn: LogitsFn,
        keys: Array | None,
        index: int | Array,
        inputs: Array,
        labels: Array,
        best: base.Best,
    ) -> _Walk:
        """One run: restart ``index`` draws the same start whatever is kept."""
        start = inputs
        if random_start:
            fold_in = jax.vmap(jax.random.fold_in, in_axes=(0, None))
            start = threat.random_start(fold_in(_keys_needed(keys, inputs), index), inputs)

        def body(_: int, walk: _Walk) -> _Walk:
            here = base.evaluate(logits_fn, loss_fn, walk.adv_inputs, labels)
            best = (
                walk.best.update(walk.adv_inputs, here.loss, here.misclassified)
                if keep == "best"
                else walk.best
            )
            moved = walk.adv_inputs + step * threat.steepest_step(walk.adv_inputs, here.gradient)
            zero = base.is_zero(here.gradient).astype(jnp.int32)
            return _Walk(threat.project(inputs, moved), best, walk.num_zero_gradients + zero)

        no_zero = jnp.zeros(inputs.shape[0], jnp.int32)
        return jax.lax.fori_loop(0, num_steps, body, _Walk(start, best, no_zero), unroll=unroll)

    def attack_last(
        logits_fn: LogitsFn, keys: Array | None, inputs: Array, labels: Array
    ) -> AttackResult:
        base.check_inputs(threat, inputs, labels)
        unused = jnp.zeros(inputs.shape[0])
        walk = run(logits_fn, keys, 0, inputs, labels, base.Best(inputs, unused, unused > 0))
        return _last_point_result(
            threat,
            logits_fn,
            loss_fn,
            inputs,
            walk.adv_inputs,
            labels,
            num_backwards=num_steps,
            num_zero_gradients=walk.num_zero_gradients,
        )

    def attack_best(
        logits_fn: LogitsFn, keys: Array | None, inputs: Array, labels: Array
    ) -> AttackResult:
        base.check_inputs(threat, inputs, labels)
        clean_loss, clean_wrong = base.evaluate_forward(logits_fn, loss_fn, inputs, labels)
        clean = base.Best(inputs, clean_loss, clean_wrong)

        def restart(index: Array, carry: tuple[base.Best, Array]) -> tuple[base.Best, Array]:
            best, num_zero = carry
            walk = run(logits_fn, keys, index, inputs, labels, best)
            last_loss, last_wrong = base.evaluate_forward(
                logits_fn, loss_fn, walk.adv_inputs, labels
            )
            return walk.best.update(
                walk.adv_inputs, last_loss, last_wrong
            ), num_zero + walk.num_zero_gradients

        no_zero = jnp.zeros(inputs.shape[0], jnp.int32)
        best, num_zero = jax.lax.fori_loop(0, num_restarts, restart, (clean, no_zero))
        # A misclassified input is broken by definition; moving it would only blur the distances.
        best = best._replace(
            adv_inputs=jnp.where(norms.expand(clean_wrong, inputs), inputs, best.adv_inputs)
        )
        return base.finish(
            threat,
            inputs,
            best,
            num_forwards=1 + num_restarts * (num_steps + 1),
            num_backwards=num_restarts * num_steps,
            num_zero_gradients=num_zero,
        )

    return attack_best if keep == "best" else attack_last
