"""Attacks made against gradient-feature alignment itself.

Alignment turns gradients towards features, the radial direction; an attacker who knows it steps in
the tangential directions, or attacks the features. Some of these need features: where
``needs_features`` says so, the model is an ``ApplyFn``, ``(taps, inputs) -> (logits, features)``,
instead of a ``LogitsFn``. Sources: docs/method.md; the recommendations are those of Tramer et al.
2020, arXiv 2002.08347.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from gfa_jax import _validate, alignment, norms, taps
from gfa_jax.attacks import base
from gfa_jax.attacks.auto_pgd import apgd
from gfa_jax.attacks.estimators import EXACT, Estimator, Model, noise_averaged
from gfa_jax.attacks.gradient import pgd
from gfa_jax.attacks.runs import Attack, Found, Problem, starting_point
from gfa_jax.threat import ThreatModel
from gfa_jax.types import Array, AttackFn, AttackResult, Features, LogitsFn, Taps


def _logits(apply_fn: Model, inputs: Array, keys: Array | None) -> Array:
    return apply_fn({}, inputs)[0]


def _scale_radial(points: Array, gradient: Array, mix: float) -> Array:
    radial, tangential = alignment.radial_tangential(gradient, points)
    return tangential + mix * radial


def tangential_estimator(mix: float = 0.0) -> Estimator:
    """The input gradient with its part along the input scaled by ``mix``.

    Args:
      mix: share of the radial part that stays, in [0, 1]: 0 steps tangentially only, 1 is the plain
        gradient.

    Raises:
      ValueError: for a mix outside [0, 1].
    """
    _validate.fraction(mix=mix)

    def evaluate(
        logits_fn: Model, goal: base.Goal, inputs: Array, keys: Array | None
    ) -> base.Evaluation:
        here = base.evaluate(logits_fn, goal, inputs)
        return here._replace(gradient=_scale_radial(inputs, here.gradient, mix))

    return EXACT._replace(evaluate=evaluate)


def feature_tangential_estimator(layers: Sequence[str] = (), mix: float = 0.0) -> Estimator:
    """The loss gradient with its radial parts at hidden layers scaled by ``mix``, at the input.

    The loss gradient at a layer is split into the part along the layer's feature and the rest; the
    scaled gradient is pulled back to the input from there. Over several layers these are added up,
    each with unit l_2 norm, since layers differ in scale.

    Args:
      layers: tap names; all taps of the model by default.
      mix: as in ``tangential_estimator``.

    Returns:
      The estimator. Its gradients are one, and one for each of the layers named (one for all
      taps together where none is).

    Raises:
      ValueError: for a mix outside [0, 1]; at the call, for a tap that the model does not have.
    """
    _validate.fraction(mix=mix)

    def evaluate(
        apply_fn: Model, goal: base.Goal, inputs: Array, keys: Array | None
    ) -> base.Evaluation:
        zeros = taps.zero_taps(apply_fn, inputs)
        chosen = _chosen_layers(layers, zeros)

        def forward(probes: Taps, points: Array) -> tuple[Array, Features]:
            logits, features = apply_fn(probes, points)
            return logits, {name: features[name] for name in chosen}

        (logits, features), pullback = jax.vjp(forward, zeros, inputs)
        loss, loss_pullback = jax.vjp(goal.loss, logits)
        (logit_slopes,) = loss_pullback(jnp.ones_like(loss))
        nothing = jax.tree.map(jnp.zeros_like, features)
        slopes, _ = pullback((logit_slopes, nothing))
        total = jnp.zeros_like(inputs)
        for name in chosen:
            steered = _scale_radial(features[name], slopes[name], mix)
            # Taps are additive, so a feature's cotangent pulls back like the feature itself.
            seed = {**nothing, name: steered}
            _, gradient = pullback((jnp.zeros_like(logits), seed))
            unit, _ = norms.rescale(gradient)
            size = norms.expand(jnp.maximum(norms.vector_norm(unit, "l2"), 1), unit)
            total = total + unit / size
        return base.Evaluation(loss.astype(jnp.float32), goal.reached(logits), base.finite(total))

    return Estimator(_logits, evaluate, num_backwards=1 + max(1, len(layers)), needs_features=True)


def _chosen_layers(layers: Sequence[str], known: Mapping[str, Array]) -> list[str]:
    for layer in layers:
        _validate.one_of(known, layers=layer)
    if not known:
        raise ValueError("the model has no taps: this attack works on its features.")
    return list(layers or known)


def _layer_names(layers: str | Sequence[str]) -> tuple[str, ...]:
    """Splits names joined by ``+``, as command lines give them."""
    names = layers.split("+") if isinstance(layers, str) else layers
    return tuple(name for name in names if name)


def apgd_tangential(
    threat: ThreatModel,
    *,
    mix: float = 0.0,
    loss: str = "dlr",
    num_steps: int = 100,
    num_restarts: int = 1,
) -> Attack:
    """Auto-PGD that steps orthogonally to the input (``apgd-tangential``).

    Args:
      threat: ball and box.
      mix: share of the radial part of the gradient that stays, in [0, 1].
      loss: as in ``apgd``, and so are the other arguments.
      num_steps: as in ``apgd``.
      num_restarts: as in ``apgd``.

    Raises:
      ValueError: for options out of range.
    """
    return apgd(
        threat,
        loss=loss,
        num_steps=num_steps,
        num_restarts=num_restarts,
        estimator=tangential_estimator(mix),
    )


def apgd_feature_tangential(
    threat: ThreatModel,
    *,
    layers: str | Sequence[str] = (),
    mix: float = 0.0,
    loss: str = "dlr",
    num_steps: int = 100,
    num_restarts: int = 1,
) -> Attack:
    """Auto-PGD on loss gradients without their radial part at hidden layers.

    Its name is ``apgd-feature-tangential``; the model is an ``ApplyFn``.

    Args:
      threat: ball and box.
      layers: tap names, as a sequence or joined by ``+``; all by default.
      mix: share of the radial parts that stays, in [0, 1].
      loss: as in ``apgd``, and so are the other arguments.
      num_steps: as in ``apgd``.
      num_restarts: as in ``apgd``.

    Raises:
      ValueError: for options out of range.
    """
    return apgd(
        threat,
        loss=loss,
        num_steps=num_steps,
        num_restarts=num_restarts,
        estimator=feature_tangential_estimator(_layer_names(layers), mix),
    )


def apgd_noise_averaged(
    threat: ThreatModel,
    *,
    num_samples: int = 20,
    scale: float = 0.02,
    loss: str = "dlr",
    num_steps: int = 100,
    num_restarts: int = 1,
) -> Attack:
    """Auto-PGD on gradients averaged over noise on the input (``apgd-noise-averaged``).

    Args:
      threat: ball and box.
      num_samples: noisy gradients for each step.
      scale: standard deviation of the noise, in input units.
      loss: as in ``apgd``, and so are the other arguments.
      num_steps: as in ``apgd``.
      num_restarts: as in ``apgd``.

    Raises:
      ValueError: for options out of range.
    """
    return apgd(
        threat,
        loss=loss,
        num_steps=num_steps,
        num_restarts=num_restarts,
        estimator=noise_averaged(num_samples, scale=scale),
    )


def pgd_features(
    threat: ThreatModel,
    *,
    layers: str | Sequence[str] = (),
    guides: Array | None = None,
    num_feature_steps: int = 20,
    num_steps: int = 40,
    num_restarts: int = 1,
    loss: str = "margin",
) -> Attack:
    """PGD from a start where the features are far from the clean ones (``pgd-features``).

    The first steps maximise the sum over layers of ``|h_l(x') - h_l(x)|_2^2 / |h_l(x)|_2^2``, the
    others a loss of the logits. The model is an ``ApplyFn``.

    Args:
      threat: ball and box.
      layers: tap names, as a sequence or joined by ``+``; all by default.
      guides: ``[B, ...]``, other images whose features the first steps approach instead, such as
        images of the target classes.
      num_feature_steps: steps on the features.
      num_steps: steps on the loss after that.
      num_restarts: as in ``pgd``.
      loss: as in ``pgd``.

    Raises:
      ValueError: for options out of range; at the call, for a tap that the model does not have.
    """
    _validate.positive_integer(num_feature_steps=num_feature_steps)
    names = _layer_names(layers)
    steered = pgd(
        threat,
        num_steps=num_steps,
        num_restarts=num_restarts,
        loss=loss,
        estimator=Estimator(_logits, _evaluate_logits, needs_features=True),
    )

    def run(
        model: Model, keys: Array | None, problem: Problem, goal: base.Goal, index: int | Array
    ) -> Found:
        inputs = problem.inputs
        reference = model({}, inputs if guides is None else jnp.asarray(guides))[1]
        chosen = _chosen_layers(names, reference)

        def distance(points: Array) -> Array:
            features = model({}, points)[1]
            parts = [_relative_squared_distance(features[name], reference[name]) for name in chosen]
            return jnp.sum(jnp.stack(parts))

        towards = 1 if guides is None else -1
        step = 2.5 * threat.epsilon / num_feature_steps

        def body(_: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            points, num_zero = carry
            gradient = towards * base.finite(jax.grad(distance)(points))
            moved = points + step * threat.steepest_step(points, gradient)
            return threat.project(inputs, moved), num_zero + base.is_zero(gradient)

        start = starting_point(threat, keys, problem, random_start=True)
        none = jnp.zeros(inputs.shape[0], jnp.int32)
        start, num_zero = jax.lax.fori_loop(0, num_feature_steps, body, (start, none))
        found = steered.run(model, keys, problem._replace(start=start), goal, index)
        return found._replace(
            num_forwards=found.num_forwards + num_feature_steps + 1,
            num_backwards=found.num_backwards + num_feature_steps,
            num_zero_gradients=found.num_zero_gradients + num_zero,
        )

    return dataclasses.replace(steered, run=run)


def _evaluate_logits(
    apply_fn: Model, goal: base.Goal, inputs: Array, keys: Array | None
) -> base.Evaluation:
    return base.evaluate(lambda points: apply_fn({}, points)[0], goal, inputs)


def _relative_squared_distance(features: Array, reference: Array) -> Array:
    """Returns ``|h - r|_2^2 / |r|_2^2`` per example; 0 / 0 is 0."""
    difference = features - reference
    size = norms.dot(reference, reference)
    return norms.dot(difference, difference) / jnp.where(size > 0, size, 1)


def from_transfer(source_fn: LogitsFn, source_attack: AttackFn, attack: AttackFn) -> AttackFn:
    """Starts an attack at adversarial examples of another model.

    Args:
      source_fn: the other model, such as an undefended one.
      source_attack: what attacks it; with ``keep="last"`` it gives a start for every example.
      attack: the attack on the model itself.

    Returns:
      An attack whose counts are those on the model itself.
    """

    def attack_from_transfer(
        logits_fn: LogitsFn,
        keys: Array | None,
        inputs: Array,
        labels: Array,
        *,
        targets: Array | None = None,
        start: Array | None = None,
        active: Array | None = None,
    ) -> AttackResult:
        source = source_attack(
            source_fn, keys, inputs, labels, targets=targets, start=start, active=active
        )
        return attack(
            logits_fn,
            keys,
            inputs,
            labels,
            targets=targets,
            start=source.adv_inputs,
            active=active,
        )

    return attack_from_transfer
