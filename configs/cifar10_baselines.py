"""The field's adversarial training and regularisation on CIFAR-10, as published, each by name.

Source: each recipe names its paper, and the authors' code where numbers are taken from it. All
train a network with BatchNorm by SGD with momentum, on batches of 128 with crop and flip, as those
do. Where they depart from the source: 1,000 training images are held out to choose the checkpoint
(Rice et al. 2020, section 3.4), weight decay leaves biases and BatchNorm alone, and of the losses
on pairs the clean pass gives BatchNorm's running statistics, where the authors let both passes;
further departures are named in the recipe.
Data: CIFAR-10 through tensorflow-datasets (49,000 training, 1,000 validation, 10,000 test images);
`python -m gfa_jax.data.prepare cifar10 --data_dir DIR --archive PATH` prepares it.
Cost: 15 to 200 epochs at 1 to 11 times the FLOPs of a standard step (`train.py --dry_run` counts
them): for a GPU or more.
Result: not measured here yet; the papers' figures are in their tables.
Command: python train.py --config configs/cifar10_baselines.py:trades --workdir runs/cifar10_trades
    --config.data.data_dir=DIR
"""

import dataclasses
from typing import Any

from configs import cifar10_standard
from gfa_jax.config import (
    AttackConfig,
    LoopConfig,
    LossConfig,
    ModelConfig,
    NoiseConfig,
    OptimizerConfig,
    Options,
    RegularizerConfig,
    ThreatConfig,
    TrainConfig,
    choose,
)

_BATCH_SIZE = 128
_NUM_VALIDATION = 1000
_EPOCH = (50_000 - _NUM_VALIDATION) / _BATCH_SIZE
_NORMALIZED = cifar10_standard.get_config().model


def standard() -> TrainConfig:
    """Standard training with the optimiser of Rice et al. 2020: what the others are compared with.

    Its checkpoint is chosen by clean accuracy.
    """
    config = _recipe(epochs=200)
    return dataclasses.replace(config, loop=dataclasses.replace(config.loop, eval_attack_steps=0))


def label_smoothing() -> TrainConfig:
    """Szegedy et al. 2016, arXiv 1512.00567: standard training with smoothing .1."""
    return dataclasses.replace(standard(), loss=LossConfig(label_smoothing=0.1))


def pgd_at() -> TrainConfig:
    """Rice et al. 2020, arXiv 2002.11569, code locuslab/robust_overfitting.

    PGD-10 with steps of 2/255, the attack in training mode, 200 epochs.
    """
    return _recipe(
        epochs=200,
        attack=AttackConfig(name="pgd", num_steps=10, step_size=2 / 255, train_mode=True),
    )


def fgsm_rs() -> TrainConfig:
    """Wong et al. 2020, arXiv 2001.03994, code locuslab/fast_adversarial.

    FGSM from a random start with steps of 10/255, the attack in training mode, a learning rate that
    rises to .2 over half of 15 epochs and falls to 0.
    """
    return _fast(
        epochs=15,
        learning_rate=0.2,
        attack=AttackConfig(name="fgsm", step_size=10 / 255, train_mode=True),
    )


def n_fgsm() -> TrainConfig:
    """De Jorge et al. 2022, arXiv 2202.01181, code pdejorge/N-FGSM.

    Noise of twice epsilon, FGSM steps of epsilon, the attack in training mode, a learning rate that
    rises to .2 over half of 30 epochs and falls to 0.
    """
    return _fast(
        epochs=30,
        learning_rate=0.2,
        noise=NoiseConfig(name="uniform", scale=16 / 255),
        attack=AttackConfig(name="fgsm", random_start=False, train_mode=True),
    )


def grad_align() -> TrainConfig:
    """Andriushchenko & Flammarion 2020, arXiv 2007.02617.

    Code tml-epfl/understanding-fast-adv-training: FGSM from the clean image, the attack in training
    mode, weight .2, a learning rate that rises to .3 over 12 of 30 epochs and falls to 0.
    """
    return _fast(
        epochs=30,
        learning_rate=0.3,
        warmup_fraction=0.4,
        attack=AttackConfig(name="fgsm", random_start=False, train_mode=True),
        regularizers=(RegularizerConfig(name="grad_align", weight=0.2),),
    )


def trades() -> TrainConfig:
    """Zhang et al. 2019, arXiv 1901.08573, code yaodongyu/TRADES.

    WideResNet-34-10 on images that are not normalised, epsilon .031, beta 6, 76 epochs, of which
    the last two (from the 75th) at a tenth of the learning rate.
    """
    return _trades(epochs=76, drops=(74 / 76,), weight_decay=2e-4)


def mart() -> TrainConfig:
    """Wang et al., ICLR 2020, code YisenWang/MART (train_resnet.py).

    Beta 5, learning rate .01 with drops from the 75th, 90th and 100th of 120 epochs, weight decay
    .0035. Their ResNet-18 is a PreAct ResNet-18 here.
    """
    return _recipe(
        epochs=120,
        model=_plain("preact_resnet18"),
        threat=ThreatConfig(norm="linf", epsilon=0.031),
        loss=LossConfig(name="mart", beta=5.0),
        attack=_pairs("cross_entropy", step_size=0.007),
        learning_rate=0.01,
        weight_decay=3.5e-3,
        drops=(74 / 120, 89 / 120, 99 / 120),
    )


def at_awp() -> TrainConfig:
    """Wu, Xia & Wang 2020, arXiv 2004.05884: AWP with gamma .01 around the recipe of pgd_at.

    Their attack is in evaluation mode.
    """
    config = pgd_at()
    return dataclasses.replace(
        config,
        loss=LossConfig(weight_perturbation=0.01),
        attack=dataclasses.replace(config.attack, train_mode=False),
    )


def trades_awp() -> TrainConfig:
    """Wu, Xia & Wang 2020, arXiv 2004.05884, code csdongxian/AWP (train_trades_cifar.py).

    WideResNet-34-10, TRADES with epsilon 8/255 and steps of 2/255, gamma .005 from the 10th of 200
    epochs, drops from the 100th and 150th.
    """
    config = _trades(epochs=200, drops=(99 / 200, 149 / 200), weight_decay=5e-4)
    loss = dataclasses.replace(
        config.loss, weight_perturbation=0.005, weight_perturbation_start=9 / 200
    )
    return dataclasses.replace(
        config,
        threat=ThreatConfig(norm="linf", epsilon=8 / 255),
        loss=loss,
        attack=_pairs("kl", step_size=2 / 255),
    )


def logit_pairing() -> TrainConfig:
    """Kannan et al. 2018, arXiv 1803.06373: adversarial logit pairing with weight .5.

    The paper has MNIST, SVHN and ImageNet; on CIFAR-10 the rest is that of pgd_at.
    """
    return dataclasses.replace(pgd_at(), loss=LossConfig(name="logit_pairing", beta=0.5))


def logit_squeezing() -> TrainConfig:
    """Kannan et al. 2018, arXiv 1803.06373: weight .5 on images with noise of deviation .5.

    The paper has MNIST and SVHN; on CIFAR-10 the rest is that of pgd_at.
    """
    return _recipe(
        epochs=200,
        noise=NoiseConfig(name="normal", scale=0.5),
        regularizers=(RegularizerConfig(name="logit_squeezing", weight=0.5),),
    )


def gradient_norm() -> TrainConfig:
    """Lyu et al. 2015, arXiv 1511.06385: the first-order estimate of the l_inf adversarial loss.

    The weight is epsilon, which it reaches after a tenth of training. The paper has no CIFAR-10:
    the rest is that of pgd_at.
    """
    options: Options = {"norm": "l1", "squared": False}
    entry = RegularizerConfig(
        name="gradient_norm", weight=8 / 255, warmup_fraction=0.1, options=options
    )
    return _recipe(epochs=200, regularizers=(entry,))


def jacobian_norm() -> TrainConfig:
    """Hoffman et al. 2019, arXiv 1908.02729: weight .01 with one projection.

    Network and optimiser are those of pgd_at.
    """
    return _recipe(epochs=200, regularizers=(RegularizerConfig(name="jacobian_norm", weight=0.01),))


def curvature() -> TrainConfig:
    """CURE, Moosavi-Dezfooli et al. 2019, arXiv 1811.09716, code F-Salehi/CURE_robustness.

    The norm with weight 4 and h = 1.5. They fine-tune a trained ResNet-18 for 20 epochs by Adam and
    raise h over the first; here a PreAct ResNet-18 is trained from the start for 60 epochs, the
    weight rising over the first half.
    """
    options: Options = {"h": 1.5, "squared": False}
    entry = RegularizerConfig(name="curvature", weight=4.0, warmup_fraction=0.5, options=options)
    return _recipe(epochs=60, regularizers=(entry,))


def local_linearity() -> TrainConfig:
    """LLR, Qin et al. 2019, arXiv 1907.02610: lambda 4 and mu 3, with 10 steps of ascent.

    Their WideResNet-28-8 is a WideResNet-28-10, their Adam steps are signed ones, the weight rises
    over the first tenth of training, and epochs and learning rate are those of pgd_at.
    """
    entry = RegularizerConfig(
        name="local_linearity",
        weight=4.0,
        warmup_fraction=0.1,
        options={"gradient_ratio": 0.75, "num_steps": 10},
    )
    model = dataclasses.replace(_NORMALIZED, name="wide_resnet28_10", homogeneous=False)
    return _recipe(epochs=200, model=model, regularizers=(entry,))


def _plain(name: str) -> ModelConfig:
    """A network on images that are not normalised."""
    return ModelConfig(name=name, homogeneous=False)


def _pairs(loss: str, *, step_size: float) -> AttackConfig:
    """PGD-10 from the clean image with a little noise, in evaluation mode."""
    return AttackConfig(
        name="pgd", loss=loss, num_steps=10, step_size=step_size, start_std=0.001, train_mode=False
    )


def _trades(*, epochs: float, drops: tuple[float, ...], weight_decay: float) -> TrainConfig:
    return _recipe(
        epochs=epochs,
        model=_plain("wide_resnet34_10"),
        threat=ThreatConfig(norm="linf", epsilon=0.031),
        loss=LossConfig(name="trades", beta=6.0),
        attack=_pairs("kl", step_size=0.007),
        drops=drops,
        weight_decay=weight_decay,
    )


def _fast(
    *, epochs: float, learning_rate: float, warmup_fraction: float = 0.5, **parts: Any
) -> TrainConfig:
    return _recipe(
        epochs=epochs,
        learning_rate=learning_rate,
        schedule="linear",
        warmup_fraction=warmup_fraction,
        **parts,
    )


def _recipe(
    *,
    epochs: float,
    learning_rate: float = 0.1,
    schedule: str = "step",
    warmup_fraction: float = 0.0,
    drops: tuple[float, ...] = (0.5, 0.75),
    weight_decay: float = 5e-4,
    **parts: Any,
) -> TrainConfig:
    base = cifar10_standard.get_config()
    steps = round(epochs * _EPOCH)
    config = dataclasses.replace(
        base,
        batch_size=_BATCH_SIZE,
        train_steps=steps,
        data=dataclasses.replace(base.data, num_validation=_NUM_VALIDATION),
        model=dataclasses.replace(_NORMALIZED, name="preact_resnet18", homogeneous=False),
        optimizer=OptimizerConfig(
            name="sgd",
            learning_rate=learning_rate,
            schedule=schedule,
            warmup_fraction=warmup_fraction,
            drops=drops,
            momentum=0.9,
            nesterov=False,
            weight_decay=weight_decay,
            clip_norm=0.0,
        ),
        loop=LoopConfig(
            log_every=50,
            eval_every=round(_EPOCH),
            checkpoint_every=0,
            eval_attack_steps=10,
            eval_examples=_NUM_VALIDATION,
        ),
    )
    return dataclasses.replace(config, **parts)


RECIPES = {
    recipe.__name__: recipe
    for recipe in (
        standard,
        label_smoothing,
        pgd_at,
        fgsm_rs,
        n_fgsm,
        grad_align,
        trades,
        mart,
        at_awp,
        trades_awp,
        logit_pairing,
        logit_squeezing,
        gradient_norm,
        jacobian_norm,
        curvature,
        local_linearity,
    )
}


def get_config(name: str) -> TrainConfig:
    """Returns the named recipe."""
    return choose(RECIPES, name)
