"""Gradient-feature alignment (GFA) as an objective; ``alignment`` holds the formulas."""

import functools
import re
from collections.abc import Callable, Mapping
from typing import TypeVar

import jax
import jax.numpy as jnp

from gfa_jax import _validate, losses, norms, taps
from gfa_jax import alignment as alignment_lib
from gfa_jax.attacks import base as attacks_base
from gfa_jax.objectives.classification import Penalty, regularized
from gfa_jax.types import (
    Array,
    Batch,
    Features,
    LossFn,
    Metrics,
    ModelFn,
    ModelState,
    Objective,
    Params,
)

SECOND_ORDER = ("exact", "finite_difference")
SAMPLED_MARGIN = "sampled_margin"
TARGETS = (*losses.LOSSES, SAMPLED_MARGIN)
"""Names of alignment targets: the losses, and ``sampled_margin``, which draws another class for
each example at every step."""


def gfa(
    weight: float | Array = 1.0,
    *,
    layer_weights: Mapping[str, float] | None = None,
    layer_norms: Mapping[str, str] | None = None,
    layer_ceilings: Mapping[str, float] | None = None,
    target: str | LossFn = SAMPLED_MARGIN,
    form: str = "log",
    second_order: str = "exact",
    displacement: float = 0.02,
    cross_entropy_weight: float | Array = 1.0,
) -> Objective:
    """Cross-entropy plus gradient-feature alignment at every tapped layer of the model.

    ``loss = mean CE + weight * sum_l w_l mean_i penalty(h_l, g_l) / sum_l w_l`` with the gradients
    ``g_l`` of the summed target with respect to the tapped features ``h_l`` (arXiv 2511.13749; see
    ``alignment``). Which layers are tapped is the model's matter: see
    ``taps.linen_model(..., layers=...)``.

    Args:
      weight: lambda >= 0; may be traced. A Python 0 gives exactly ``cross_entropy()``.
      layer_weights: ``{pattern: w_l}``, regular expressions that match a whole tap name; the first
        that matches counts, others weigh 1. A weight of 0 leaves a tap out.
      layer_norms: ``{pattern: norm}`` in the same way; others are ``l2``. At the input, use the
        norm of the threat model.
      layer_ceilings: ``{pattern: ceiling}`` in the same way: the alignment beyond which nothing
        more is asked of an example (``alignment.penalty``); others have none (1).
      target: the differentiated target: ``sampled_margin`` (``z_k - z_y`` with ``k`` uniform over
        the other classes, drawn at every step), a name from ``losses.LOSSES``, or a per-example
        function. ``cross_entropy`` is the abstract's literal reading; its gradient vanishes on
        confident examples, which masks instead of defends (docs/method.md).
      form: the penalty, one of ``alignment.FORMS``.
      second_order: how the penalty is differentiated with respect to the parameters. ``exact``:
        reverse over reverse, about twice the cost of a plain step in FLOPs. ``finite_difference``:
        ordinary gradients only, with one more pass whose taps are displaced along the penalty's
        gradient; for layers without a second derivative.
      displacement: of the finite difference, as a share of the feature's norm, in (0, 1).
      cross_entropy_weight: 0 leaves the penalty alone, to add to another objective (``sum_of``).

    Returns:
      The objective. Metrics: ``loss``, ``cross_entropy``, ``accuracy``, ``alignment_penalty``,
      ``alignment_weight``, ``alignment/<tap>`` (means of the alignment with the training target)
      and ``zero_gradients`` (the share of example-layer pairs whose gradient or feature is exactly
      zero).

    Raises:
      ValueError: at once for unknown names or values out of range; at the first trace for a model
        without taps or a pattern that matches none.
    """
    _validate.non_negative(
        weight=weight, **{f"layer_weights[{k!r}]": v for k, v in (layer_weights or {}).items()}
    )
    for pattern, norm in (layer_norms or {}).items():
        _validate.one_of(norms.DUALS, **{f"layer_norms[{pattern!r}]": norm})
        if form == "tangential" and norm != "l2":
            raise ValueError(
                f"layer_norms[{pattern!r}]={norm!r}: the form 'tangential' is defined for the norm "
                "'l2' alone."
            )
    for pattern, ceiling in (layer_ceilings or {}).items():
        if not 0 < ceiling <= 1:
            raise ValueError(f"layer_ceilings[{pattern!r}]={ceiling!r} must lie in (0, 1].")
        if form == "tangential" and ceiling < 1:
            raise ValueError(
                f"layer_ceilings[{pattern!r}]={ceiling!r}: the form 'tangential' has no ceiling."
            )
    if isinstance(target, str):
        _validate.one_of(TARGETS, target=target)
    _validate.one_of(alignment_lib.FORMS, form=form)
    _validate.one_of(SECOND_ORDER, second_order=second_order)
    if not 0 < displacement < 1:
        raise ValueError(f"displacement={displacement!r} must lie in (0, 1).")

    def penalty(features: Features, grads: Features) -> tuple[Array, Metrics]:
        """Returns the weighted mean penalty of the batch and its metrics."""
        weights = _by_pattern(features, layer_weights, 1.0, "layer_weights")
        layer_norm = _by_pattern(features, layer_norms, "l2", "layer_norms")
        ceilings = _by_pattern(features, layer_ceilings, 1.0, "layer_ceilings")
        names = [name for name in features if weights[name] > 0]
        if not names:
            raise ValueError(
                "every layer weight is 0: gfa needs a layer to align, or weight=0 for none."
            )
        total = jnp.zeros(())
        metrics: Metrics = {}
        zeros = []
        for name in names:
            per_example = alignment_lib.penalty(
                features[name],
                grads[name],
                form=form,
                norm=layer_norm[name],
                ceiling=ceilings[name],
            )
            total += weights[name] * jnp.mean(per_example)
            cosine = alignment_lib.alignment(features[name], grads[name], layer_norm[name])
            metrics[f"alignment/{name}"] = jax.lax.stop_gradient(jnp.mean(cosine))
            zeros.append(attacks_base.is_zero(features[name]) | attacks_base.is_zero(grads[name]))
        metrics["zero_gradients"] = jnp.mean(jnp.stack(zeros))
        return total / sum(weights[name] for name in names), metrics

    def penalty_fn(model: ModelFn, params: Params, batch: Batch, key: Array) -> Penalty:
        inputs, labels = batch["inputs"], batch["labels"]
        target_fn = _target_function(target, key, labels)
        differentiate = (
            _exact_penalty if second_order == "exact" else _finite_difference_penalty(displacement)
        )
        return Penalty(*differentiate(penalty, model, params, inputs, labels, target_fn))

    return regularized(penalty_fn, weight, cross_entropy_weight, name="alignment")


Value = TypeVar("Value")
PenaltyFn = Callable[[Features, Features], tuple[Array, Metrics]]


def _target_function(target: str | LossFn, key: Array, labels: Array) -> LossFn:
    if target != SAMPLED_MARGIN:
        return losses.get(target)

    def sampled_margin(logits: Array, labels: Array) -> Array:
        others = losses.sample_other_classes(key, labels, logits.shape[1])
        return losses.class_difference(logits, labels, others)

    return sampled_margin


def _by_pattern(
    names: Mapping[str, object], table: Mapping[str, Value] | None, default: Value, argument: str
) -> dict[str, Value]:
    """Returns the value of the first pattern that matches each name."""
    if not names:
        raise ValueError(
            "the model has no taps to align: give its layers, such as "
            "linen_model(module, layers='block_.*')."
        )
    table = table or {}
    for pattern in table:
        if not any(re.fullmatch(pattern, name) for name in names):
            raise ValueError(
                f"{argument} pattern {pattern!r} matches no tap."
                f"{_validate.suggestion(pattern, names)} The taps are: {', '.join(names)}."
            )
    return {
        name: next(
            (value for pattern, value in table.items() if re.fullmatch(pattern, name)), default
        )
        for name in names
    }


def _exact_penalty(
    penalty: PenaltyFn,
    model: ModelFn,
    params: Params,
    inputs: Array,
    labels: Array,
    target_fn: LossFn,
) -> tuple[Array, Metrics, Array, ModelState]:
    """The penalty as a function that JAX differentiates twice."""
    apply_fn = functools.partial(model, params, train=True)
    logits, features, grads, model_state = taps.feature_gradients(
        apply_fn, inputs, labels, target=target_fn, has_aux=True
    )
    value, metrics = penalty(features, grads)
    return value, metrics, logits, model_state


def _finite_difference_penalty(
    displacement: float,
) -> Callable[..., tuple[Array, Metrics, Array, ModelState]]:
    """The penalty's value, with a surrogate for its gradient from first derivatives of the model.

    With ``u_l = dR/dh_l`` and ``v_l = dR/dg_l``, the gradient of the penalty R is that of
    ``sum <u_l, h_l> + sum <v_l, g_l>``, where the second sum is the derivative of the summed target
    along taps ``v_l``: a difference of the target at taps ``s v_l`` and 0. Each example has its own
    ``s``, the largest that moves no feature by more than ``displacement`` of its norm; this
    supposes that examples do not interact, which BatchNorm in training mode violates slightly. The
    difference is one-sided: in ReLU networks the error comes from kinks, which a central difference
    crosses on both sides, for one more pass.
    """

    def differentiate(
        penalty: PenaltyFn,
        model: ModelFn,
        params: Params,
        inputs: Array,
        labels: Array,
        target_fn: LossFn,
    ) -> tuple[Array, Metrics, Array, ModelState]:
        apply_fn = functools.partial(model, params, train=True)
        frozen_fn = functools.partial(model, jax.lax.stop_gradient(params), train=True)
        # XLA merges this forward pass with the one inside feature_gradients: they differ only in
        # what is differentiated.
        (logits, features), model_state = apply_fn({}, inputs)
        _, frozen_features, grads, _ = taps.feature_gradients(
            frozen_fn, inputs, labels, target=target_fn, has_aux=True
        )
        (value, metrics), (feature_slopes, grad_slopes) = jax.value_and_grad(
            penalty, argnums=(0, 1), has_aux=True
        )(frozen_features, grads)
        scale = displacement * functools.reduce(
            jnp.minimum,
            [_norm_ratio(frozen_features[name], grad_slopes[name]) for name in features],
        )
        moves = {
            name: norms.expand(scale, slope).astype(slope.dtype) * slope
            for name, slope in grad_slopes.items()
        }
        (displaced_logits, _), _ = apply_fn(jax.lax.stop_gradient(moves), inputs)
        difference = target_fn(displaced_logits, labels) - target_fn(logits, labels)
        surrogate = jnp.sum(difference / scale)
        for name, slope in feature_slopes.items():
            surrogate += jnp.sum(norms.dot(norms.wide(slope), norms.wide(features[name])))
        return (
            jax.lax.stop_gradient(value) + surrogate - jax.lax.stop_gradient(surrogate),
            metrics,
            logits,
            model_state,
        )

    return differentiate


def _norm_ratio(features: Array, slopes: Array) -> Array:
    """Returns ``|h| / |v|`` ``[B]``.

    It is 1e30, no limit, where either is zero: a dead layer must not freeze the others.
    """
    (features, feature_scale), (slopes, slope_scale) = (
        norms.rescale(norms.wide(features)),
        norms.rescale(norms.wide(slopes)),
    )
    size, slope = norms.vector_norm(features, "l2"), norms.vector_norm(slopes, "l2")
    usable = (size > 0) & (slope > 0)
    ratio = size / jnp.where(usable, slope, 1) * (feature_scale / slope_scale)
    return jax.lax.stop_gradient(jnp.where(usable, ratio, 1e30))
