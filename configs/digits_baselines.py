"""The field's objectives on 8x8 digits, each by name, and GFA beside some of them.

Source: each recipe names its paper. Network, steps and optimiser are those of digits_standard, with
the hyper-parameters of the paper where it has them for any data; the others, named in the recipe,
were chosen on the 300 validation images, by PGD-20 on the margin.
Data: scikit-learn's scanned digits (1,097 training, 300 validation, 400 test images).
Cost: 1 to 9 times the FLOPs of a standard step; 10 s to a minute of training on 2 CPU cores.
Result: printed by `make objectives`; see docs/objectives.md.
Command: python train.py --config configs/digits_baselines.py:trades --workdir runs/digits_trades
"""

import dataclasses
from typing import Any

from configs import digits_gfa, digits_pgd_at, digits_standard
from gfa_jax.config import (
    AttackConfig,
    LoopConfig,
    LossConfig,
    NoiseConfig,
    RegularizerConfig,
    TrainConfig,
    choose,
)


def label_smoothing() -> TrainConfig:
    """Szegedy et al. 2016, arXiv 1512.00567."""
    return _recipe(loss=LossConfig(label_smoothing=0.1))


def n_fgsm() -> TrainConfig:
    """De Jorge et al. 2022, arXiv 2202.01181: noise of twice epsilon, then FGSM."""
    base = digits_standard.get_config()
    return _recipe(
        noise=NoiseConfig(name="uniform", scale=2 * base.threat.epsilon, warmup_fraction=0.5),
        attack=AttackConfig(name="fgsm", random_start=False, warmup_fraction=0.5),
    )


def grad_align() -> TrainConfig:
    """Andriushchenko & Flammarion 2020, arXiv 2007.02617: FGSM without a random start."""
    return _recipe(
        attack=AttackConfig(name="fgsm", random_start=False, warmup_fraction=0.5),
        regularizers=(RegularizerConfig(name="grad_align", weight=0.2),),
    )


def trades() -> TrainConfig:
    """Zhang et al. 2019, arXiv 1901.08573, with 7 steps."""
    return _recipe(loss=LossConfig(name="trades", beta=6.0), attack=_pairs("kl"))


def mart() -> TrainConfig:
    """Wang et al., ICLR 2020, with 7 steps."""
    return _recipe(loss=LossConfig(name="mart", beta=5.0), attack=_pairs("cross_entropy"))


def logit_pairing() -> TrainConfig:
    """Kannan et al. 2018, arXiv 1803.06373: adversarial logit pairing."""
    return _recipe(
        loss=LossConfig(name="logit_pairing", beta=0.5), attack=digits_pgd_at.get_config().attack
    )


def logit_squeezing() -> TrainConfig:
    """Kannan et al. 2018, arXiv 1803.06373: clean logit squeezing on noisy images.

    Weight and noise were chosen on the validation images.
    """
    return _recipe(
        noise=NoiseConfig(name="normal", scale=0.3),
        regularizers=(RegularizerConfig(name="logit_squeezing", weight=0.05, warmup_fraction=0.5),),
    )


def at_awp() -> TrainConfig:
    """Wu, Xia & Wang 2020, arXiv 2004.05884: AWP around PGD-7 adversarial training."""
    return _recipe(
        loss=LossConfig(weight_perturbation=0.01), attack=digits_pgd_at.get_config().attack
    )


def trades_awp() -> TrainConfig:
    """Wu, Xia & Wang 2020, arXiv 2004.05884: AWP around TRADES, after a twentieth of training."""
    loss = LossConfig(
        name="trades", beta=6.0, weight_perturbation=0.005, weight_perturbation_start=0.05
    )
    return _recipe(loss=loss, attack=_pairs("kl"))


def gradient_norm() -> TrainConfig:
    """Lyu et al. 2015, arXiv 1511.06385: the first-order estimate of the l_inf adversarial loss."""
    epsilon = digits_standard.get_config().threat.epsilon
    return _regularized("gradient_norm", epsilon, norm="l1", squared=False)


def squared_gradient_norm() -> TrainConfig:
    """Ross & Doshi-Velez 2018, arXiv 1711.09404: double backpropagation.

    The weight was chosen on the validation images.
    """
    return _regularized("gradient_norm", 1.0)


def linearized_margins() -> TrainConfig:
    """The adversarial loss to first order in margins, with the threat's epsilon."""
    return _regularized("linearized_margins", 1.0)


def jacobian_norm() -> TrainConfig:
    """Hoffman et al. 2019, arXiv 1908.02729, with one projection.

    The weight was chosen on the validation images.
    """
    return _regularized("jacobian_norm", 0.3)


def curvature() -> TrainConfig:
    """CURE, Moosavi-Dezfooli et al. 2019, arXiv 1811.09716, in the form of the authors' code.

    Weight and h were chosen on the validation images.
    """
    return _regularized("curvature", 1.0, h=1.0, squared=False)


def local_linearity() -> TrainConfig:
    """LLR, Qin et al. 2019, arXiv 1907.02610, with 2 steps."""
    return _regularized("local_linearity", 4.0, num_steps=2)


def trades_gfa() -> TrainConfig:
    """GFA at the clean images of TRADES, with a tenth of the weight of digits_gfa."""
    gfa = digits_gfa.get_config().gfa
    return dataclasses.replace(
        trades(), gfa=dataclasses.replace(gfa, weight=0.1 * gfa.weight, inputs="clean")
    )


def jacobian_norm_gfa() -> TrainConfig:
    """GFA and Jacobian regularisation, both without adversarial examples.

    Both weights were chosen on the validation images.
    """
    gfa = dataclasses.replace(digits_gfa.get_config().gfa, weight=1.0)
    return dataclasses.replace(_regularized("jacobian_norm", 0.1), gfa=gfa)


def _pairs(loss: str) -> AttackConfig:
    return AttackConfig(
        name="pgd", loss=loss, num_steps=7, random_start=False, start_std=0.001, warmup_fraction=0.5
    )


def _regularized(name: str, weight: float, **options: Any) -> TrainConfig:
    entry = RegularizerConfig(name=name, weight=weight, warmup_fraction=0.5, options=options)
    return _recipe(regularizers=(entry,))


def _recipe(**parts: Any) -> TrainConfig:
    loop = LoopConfig(eval_every=500, eval_attack_steps=10)
    return dataclasses.replace(digits_standard.get_config(), loop=loop, **parts)


RECIPES = {
    recipe.__name__: recipe
    for recipe in (
        label_smoothing,
        n_fgsm,
        grad_align,
        trades,
        mart,
        logit_pairing,
        logit_squeezing,
        at_awp,
        trades_awp,
        gradient_norm,
        squared_gradient_norm,
        linearized_margins,
        jacobian_norm,
        curvature,
        local_linearity,
        trades_gfa,
        jacobian_norm_gfa,
    )
}


def get_config(name: str) -> TrainConfig:
    """Returns the named recipe."""
    return choose(RECIPES, name)
