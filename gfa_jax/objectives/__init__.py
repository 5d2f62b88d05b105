"""Training objectives: pure functions ``(model, params, batch, key) -> (loss, aux)`` that compose.

    objective = gfa(weight=3.0, layer_norms={"normalize": "linf"})
    attack = attacks.pgd(threat, num_steps=7, keep="last")
    objective = adversarial(attack, objective)  # GFA on adversarial examples
    loss_fn = functools.partial(objective, model)
    (loss, aux), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, batch, key)

Weights and radii may be traced scalars, so an objective can be built inside a compiled step from
schedules of the step number.
"""

from gfa_jax.objectives.baselines import (
    STATISTICS,
    logit_pairing,
    logit_squeezing,
    mart,
    n_fgsm,
    trades,
)
from gfa_jax.objectives.classification import Penalty, cross_entropy, regularized
from gfa_jax.objectives.composition import (
    NoiseFn,
    adversarial,
    at_adversarial,
    noisy,
    normal_noise,
    paired,
    sum_of,
    uniform_noise,
    weight_perturbation,
)
from gfa_jax.objectives.feature_alignment import SAMPLED_MARGIN, SECOND_ORDER, TARGETS, gfa
from gfa_jax.objectives.input_gradients import (
    curvature,
    grad_align,
    gradient_norm,
    jacobian_norm,
    linearized_margins,
    local_linearity,
)
from gfa_jax.objectives.registry import REGULARIZERS, regularizer

__all__ = [
    "REGULARIZERS",
    "SAMPLED_MARGIN",
    "SECOND_ORDER",
    "STATISTICS",
    "TARGETS",
    "NoiseFn",
    "Penalty",
    "adversarial",
    "at_adversarial",
    "cross_entropy",
    "curvature",
    "gfa",
    "grad_align",
    "gradient_norm",
    "jacobian_norm",
    "linearized_margins",
    "local_linearity",
    "logit_pairing",
    "logit_squeezing",
    "mart",
    "n_fgsm",
    "noisy",
    "normal_noise",
    "paired",
    "regularized",
    "regularizer",
    "sum_of",
    "trades",
    "uniform_noise",
    "weight_perturbation",
]
