"""Does gradient-feature alignment work? A study on CIFAR-10 that 2 CPU cores can make.

Source: claims, the abstract of arXiv 2511.13749; baselines, the papers named below.
Data: CIFAR-10 through tensorflow-datasets: 16,000 training images (2,000 or 45,000 in some trials),
5,000 held out, and the test images; `python -m gfa_jax.data.prepare cifar10 --data_dir DIR
--archive PATH` prepares it.
Cost: 8 epochs of a small network, minutes each, and three whole recipes of 30 epochs, an hour or
two each; the study takes many hours, and may be stopped.
Result: docs/study.md, written by the command.
Command: make study DATA_DIR=DIR; a trial alone: python train.py
    --config configs/study/cifar10.py:gfa_input --workdir runs/gfa_input --config.data.data_dir=DIR
"""

import dataclasses
import functools
from typing import Any

from configs import cifar10_fgsm_at, cifar10_gfa, cifar10_gfa_at, cifar10_standard
from gfa_jax.config import (
    AttackConfig,
    GFAConfig,
    LoopConfig,
    LossConfig,
    NoiseConfig,
    RegularizerConfig,
    TrainConfig,
    choose,
)
from gfa_jax.study import Claim, Protocol, Study, Trial

EPSILON = 8 / 255
_SEEDS = (0, 1, 2)
_WARMUP: dict[str, Any] = {"warmup_fraction": 0.25}


def _recipe(
    *,
    network: dict[str, Any] | None = None,
    steps: int = 1000,
    images: int = 16_000,
    **parts: Any,
) -> TrainConfig:
    base = cifar10_standard.get_config()
    return dataclasses.replace(
        base,
        train_steps=steps,  # 1,000 are 8 epochs of 16,000 images.
        # The same steps, faster on CPU; batches of 128 all the same.
        accumulation_steps=4,
        data=dataclasses.replace(base.data, max_train_examples=images),
        model=dataclasses.replace(base.model, **{"width": 0.5, **(network or {})}),
        loop=LoopConfig(
            log_every=20, checkpoint_every=250, eval_attack_steps=0, eval_examples=1000
        ),
        **parts,
    )


def _whole(config: TrainConfig) -> TrainConfig:
    """Returns a recipe of configs/ as it is, with nothing but training in its loop."""
    return dataclasses.replace(
        config,
        accumulation_steps=4,
        loop=LoopConfig(
            log_every=50, checkpoint_every=250, eval_attack_steps=0, eval_examples=1000
        ),
    )


def _gfa(**fields: Any) -> GFAConfig:
    """Alignment at the input alone, unless fields say otherwise."""
    return GFAConfig(**{"weight": 20.0, "hidden_weight": 0.0, **fields})


_BIASED: dict[str, Any] = {"homogeneous": False}
_SMOOTH: dict[str, Any] = {"homogeneous": False, "activation_fn": "silu"}
_SMOOTH_HOMOGENEOUS: dict[str, Any] = {"activation_fn": "scaled_silu"}
# As many FLOPs as the small CNN.
_RESNET: dict[str, Any] = {"name": "preact_resnet18", "width": 0.125}
_NORMALIZED: dict[str, Any] = {**_RESNET, "homogeneous": False}
_FGSM = AttackConfig(name="fgsm", **_WARMUP)
_PGD_2 = AttackConfig(name="pgd", num_steps=2, **_WARMUP)
_FEW = 2000
_GRADIENT_NORM = RegularizerConfig(
    name="gradient_norm",
    weight=EPSILON,
    warmup_fraction=0.5,
    options={"norm": "l1", "squared": False},
)


def _linearized_margins(**options: Any) -> RegularizerConfig:
    return RegularizerConfig(
        name="linearized_margins", weight=1.0, warmup_fraction=0.5, options=options
    )


_LITERAL: dict[str, Any] = {
    "target": "cross_entropy",
    "form": "linear",
    "input_norm": "l2",
    "hidden_weight": 1.0,
}

TRIALS: dict[str, Trial] = {
    "standard": Trial(label="standard", config=_recipe(), seeds=_SEEDS, is_tested=True),
    "standard_biased": Trial(label="standard, with biases", config=_recipe(network=_BIASED)),
    "fgsm_at": Trial(label="FGSM-AT", config=_recipe(attack=_FGSM), seeds=_SEEDS, is_tested=True),
    "pgd2_at": Trial(
        label="PGD-2 AT",
        config=_recipe(attack=_PGD_2),
        seeds=_SEEDS,
        is_tested=True,
    ),
    "pgd10_at": Trial(
        label="PGD-10 AT",
        config=_recipe(attack=AttackConfig(name="pgd", num_steps=10, step_size=2 / 255, **_WARMUP)),
        seeds=_SEEDS,
        is_tested=True,
    ),
    "trades": Trial(
        label="TRADES-10",
        config=_recipe(
            loss=LossConfig(name="trades", beta=6.0),
            attack=AttackConfig(
                name="pgd", loss="kl", num_steps=10, step_size=2 / 255, start_std=0.001, **_WARMUP
            ),
        ),
        is_tested=True,
    ),
    "gradient_norm": Trial(
        label="gradient norm",
        config=_recipe(regularizers=(_GRADIENT_NORM,)),
        seeds=_SEEDS,
        is_tested=True,
    ),
    "gfa_literal": Trial(
        label="GFA, literal reading, lambda 1",
        config=_recipe(gfa=GFAConfig(weight=1.0, **_LITERAL)),
        hypothesis="The paper's words: cosines with the cross-entropy's gradient, at all layers.",
        outcome="No more robust than standard training.",
        seeds=_SEEDS,
        is_tested=True,
    ),
    "gfa_literal_2": Trial(
        label="GFA, literal reading, lambda 2",
        config=_recipe(gfa=GFAConfig(weight=2.0, **_LITERAL)),
        hypothesis="Between no effect and collapse there is a weight that defends.",
        outcome="It is not this one, which is no more robust than standard training within chance.",
    ),
    "gfa_literal_5": Trial(
        label="GFA, literal reading, lambda 5",
        config=_recipe(gfa=GFAConfig(weight=5.0, **_LITERAL)),
        hypothesis="More of it helps more.",
        outcome="The network collapses.",
    ),
    "gfa_literal_biased": Trial(
        label="GFA, literal reading, lambda 1, with biases",
        config=_recipe(network=_BIASED, gfa=GFAConfig(weight=1.0, **_LITERAL)),
        hypothesis="The paper's networks may have biases, with which the radius identity fails.",
        outcome="No more robust than standard training either.",
    ),
    "gfa_all_layers": Trial(
        label="GFA, sampled margin, all layers, lambda 4",
        config=_recipe(gfa=GFAConfig(weight=4.0, input_weight=3.0)),
        hypothesis="A sampled other class cannot be served by one dump class.",
        outcome="No collapse; less robust than at the input alone: hidden layers take the weight.",
    ),
    "gfa_input": Trial(
        label="GFA at the input, lambda 20",
        config=_recipe(gfa=_gfa()),
        hypothesis="The threat acts at the input; hidden layers only take capacity.",
        outcome="Defends, and all attacks agree; less robust than FGSM-AT, which costs less and is "
        "more accurate, and than the gradient's norm, which costs the same.",
        seeds=_SEEDS,
        is_tested=True,
    ),
    "gfa_input_biased": Trial(
        label="GFA at the input, lambda 20, with biases",
        group="other networks",
        config=_recipe(network=_BIASED, gfa=_gfa()),
        hypothesis="Biases make a linear part that alignment does not see.",
        outcome="Less robust, and DeepFool finds three fifths of the radius promised.",
        is_tested=True,
    ),
    "gfa_input_5": Trial(
        label="GFA at the input, lambda 5",
        config=_recipe(gfa=_gfa(weight=5.0)),
        hypothesis="Less costs less accuracy.",
        outcome="The same as lambda 20, within chance.",
    ),
    "gfa_input_1": Trial(
        label="GFA at the input, lambda 1",
        config=_recipe(gfa=_gfa(weight=1.0)),
        hypothesis="At lambda 5 the cross-entropy is a small part of the loss already; where it "
        "counts, the trade may be better.",
        outcome="Between standard training and lambda 5 in both accuracies: the same trade as a "
        "ceiling's.",
    ),
    "gfa_ceiling_1": Trial(
        label="GFA at the input up to 1 epsilon, lambda 20",
        config=_recipe(gfa=_gfa(input_ceiling=0.0625)),
        hypothesis="Images whose linear radius exceeds epsilon (an alignment of about .06) need no "
        "more; as in adversarial training, capacity should go to the others.",
        outcome="Clean accuracy rises within chance, robustness goes.",
    ),
    "gfa_ceiling_2": Trial(
        label="GFA at the input up to 2 epsilon, lambda 20",
        config=_recipe(gfa=_gfa(input_ceiling=0.125)),
        hypothesis="The linear radius overestimates the true one, so aim at twice epsilon.",
        outcome="Robustness lies between the two, clean accuracy within chance of both.",
    ),
    "gfa_ceiling_2_60": Trial(
        label="GFA at the input up to 2 epsilon, lambda 60",
        config=_recipe(gfa=_gfa(input_ceiling=0.125, weight=60.0)),
        hypothesis="With a ceiling a larger weight cannot collapse the network.",
        outcome="It does not, and gains nothing over lambda 20.",
    ),
    "gfa_noise": Trial(
        label="GFA up to 2 epsilon, uniform noise of epsilon",
        config=_recipe(
            gfa=_gfa(input_ceiling=0.125), noise=NoiseConfig(name="uniform", scale=EPSILON)
        ),
        hypothesis="Alignment at random points of the ball makes the linear radius hold further.",
        outcome="Noise adds nothing to the same ceiling without it.",
    ),
    "gfa_hidden": Trial(
        label="GFA up to 2 epsilon, hidden layers at a tenth",
        config=_recipe(gfa=_gfa(input_ceiling=0.125, hidden_weight=0.1)),
        hypothesis="Hidden layers help the input's alignment along.",
        outcome="They do not: no better than the same without them in either accuracy.",
    ),
    "gfa_fgsm": Trial(
        label="FGSM-AT + GFA up to 2 epsilon, lambda 2",
        config=_recipe(attack=_FGSM, gfa=_gfa(input_ceiling=0.125, weight=2.0)),
        hypothesis="Alignment at adversarial points adds to what they teach.",
        outcome="It takes from both of FGSM-AT's accuracies.",
    ),
    "gfa_fgsm_10": Trial(
        label="FGSM-AT + GFA up to 2 epsilon, lambda 10",
        config=_recipe(attack=_FGSM, gfa=_gfa(input_ceiling=0.125, weight=10.0)),
        hypothesis="More of it helps more.",
        outcome="No; and attacks on the cross-entropy alone would not have told.",
    ),
    "gfa_fgsm_clean": Trial(
        label="FGSM-AT + GFA of clean images up to 2 epsilon, lambda 2",
        config=_recipe(attack=_FGSM, gfa=_gfa(input_ceiling=0.125, weight=2.0, inputs="clean")),
        hypothesis="Clean and adversarial images together say more than the latter alone.",
        outcome="Less robust than FGSM-AT, and as accurate within chance, at more than twice its "
        "cost.",
    ),
    "gfa_fgsm_weak": Trial(
        label="FGSM-AT + GFA, lambda 0.3",
        config=_recipe(attack=_FGSM, gfa=_gfa(weight=0.3)),
        hypothesis="A little of it regularises without taking capacity.",
        outcome="Within chance of FGSM-AT, which costs less, and of PGD-2 AT.",
        seeds=_SEEDS,
        is_tested=True,
    ),
    "fgsm_at_long": Trial(
        label="FGSM-AT for 1,640 steps, as many FLOPs as FGSM-AT + GFA",
        config=_recipe(attack=_FGSM, steps=1640),  # 2.62 to 1.60 a step
    ),
    "gfa_log_odds": Trial(
        label="GFA at the input, log-odds, lambda 1",
        config=_recipe(gfa=_gfa(weight=1.0, target="log_odds")),
        hypothesis="The log-odds have the cross-entropy's direction and do not saturate.",
        outcome="Far less accurate than a sampled margin of this weight, and as robust within "
        "chance.",
    ),
    "gfa_margin": Trial(
        label="GFA at the input, margin, lambda 1",
        config=_recipe(gfa=_gfa(weight=1.0, target="margin")),
        hypothesis="The nearest class decides the radius.",
        outcome="The network dies.",
    ),
    "gfa_unsigned": Trial(
        label="GFA at the input without sign, lambda 20",
        config=_recipe(gfa=_gfa(form="absolute")),
        hypothesis="The sign of the cosine does not matter to tangential variation.",
        outcome="The network guesses.",
    ),
    "gfa_linear": Trial(
        label="GFA at the input, linear form, lambda 20",
        config=_recipe(gfa=_gfa(form="linear")),
        hypothesis="The logarithm is needed to lift small cosines.",
        outcome="It is not: as robust within chance, and far less accurate, so a smaller weight is "
        "worth a try.",
    ),
    "gfa_linear_5": Trial(
        label="GFA at the input, linear form, lambda 5",
        config=_recipe(gfa=_gfa(form="linear", weight=5.0)),
        hypothesis="Less of the linear form keeps accuracy and most of the robustness.",
        outcome="Within chance of the log form in both accuracies.",
    ),
    "gfa_l2": Trial(
        label="GFA at the input in l_2, lambda 20",
        config=_recipe(gfa=_gfa(input_norm="l2")),
        hypothesis="The dual of the threat's norm is needed.",
        outcome="Less robust within chance: the norm matters less than was thought.",
    ),
    "gfa_at_once": Trial(
        label="GFA at the input, lambda 20 from the start",
        config=_recipe(gfa=_gfa(warmup_fraction=0.0)),
        hypothesis="Without a rising weight the network dies or collapses.",
        outcome="It does neither, and ends within chance of the same with a rising weight.",
    ),
    "gfa_orthogonal": Trial(
        label="GFA at the input, lambda 20, orthogonal start",
        config=_recipe(network={"initializer": "orthogonal"}, gfa=_gfa()),
        hypothesis="Near-isometric layers carry alignment from the head to the input.",
        outcome="No better than He's start.",
    ),
    "linearized_log_odds": Trial(
        label="linearised log-odds",
        config=_recipe(regularizers=(_linearized_margins(samples_class=False),)),
        hypothesis="Alignment buys less than the gradient's norm because its logarithm counts all "
        "images and classes alike. Here it counts by what it changes in the adversarial loss.",
        outcome="Borne out: more robust than GFA in the log form, and within chance of the "
        "gradient's norm in both accuracies.",
    ),
    "linearized_margins": Trial(
        label="linearised margins",
        config=_recipe(regularizers=(_linearized_margins(),)),
        hypothesis="The same for one class a step, drawn by its probability: gradients of "
        "different classes cannot cancel.",
        outcome="As robust as FGSM-AT and the gradient's norm within chance, and less accurate "
        "than both.",
    ),
    "linearized_margins_6": Trial(
        label="linearised margins, 6/255",
        config=_recipe(regularizers=(_linearized_margins(epsilon=6 / 255),)),
        hypothesis="Every class has its own worst perturbation there, which is too much to ask.",
        outcome="Within chance of the gradient's norm in both accuracies.",
    ),
    "smooth_fgsm_at": Trial(
        label="SiLU: FGSM-AT",
        group="smooth networks",
        config=_recipe(network=_SMOOTH, attack=_FGSM),
        seeds=_SEEDS,
        is_tested=True,
    ),
    "smooth_fgsm_at_long": Trial(
        label="SiLU: FGSM-AT for 1,263 steps, as many FLOPs as linearised margins",
        group="smooth networks",
        config=_recipe(network=_SMOOTH, attack=_FGSM, steps=1263),  # 2.02 to 1.60 a step
        seeds=_SEEDS,
        is_tested=True,
    ),
    "smooth_pgd2_at": Trial(
        label="SiLU: PGD-2 AT",
        group="smooth networks",
        config=_recipe(network=_SMOOTH, attack=_PGD_2),
        seeds=_SEEDS,
        is_tested=True,
    ),
    "smooth_gradient_norm": Trial(
        label="SiLU: gradient norm",
        group="smooth networks",
        config=_recipe(network=_SMOOTH, regularizers=(_GRADIENT_NORM,)),
        seeds=_SEEDS,
        is_tested=True,
    ),
    "smooth_gfa": Trial(
        label="SiLU: GFA at the input, lambda 20",
        config=_recipe(network=_SMOOTH, gfa=_gfa()),
        hypothesis="Penalties on gradients work better where a second derivative sees all of the "
        "network; ReLU's sees none of its kinks.",
        outcome="Holds for the gradient's norm, which gains clean accuracy and stays as robust. "
        "Alignment loses both: without homogeneity it is no margin.",
    ),
    "smooth_linearized_margins": Trial(
        label="SiLU: linearised margins, 6/255",
        group="smooth networks",
        config=_recipe(network=_SMOOTH, regularizers=(_linearized_margins(epsilon=6 / 255),)),
        hypothesis="Kinks hold this back as they do the gradient's norm.",
        outcome="They do: without them it is as accurate as FGSM-AT, PGD-2 AT and the gradient's "
        "norm within two points. On test images more robust than FGSM-AT, narrowly, at 1.3 times "
        "its cost; at equal cost within chance of it, and less accurate.",
        seeds=_SEEDS,
        is_tested=True,
    ),
    "smooth_homogeneous_fgsm_at": Trial(
        label="scaled SiLU: FGSM-AT", config=_recipe(network=_SMOOTH_HOMOGENEOUS, attack=_FGSM)
    ),
    "smooth_homogeneous_gradient_norm": Trial(
        label="scaled SiLU: gradient norm",
        config=_recipe(network=_SMOOTH_HOMOGENEOUS, regularizers=(_GRADIENT_NORM,)),
    ),
    "smooth_homogeneous_gfa": Trial(
        label="scaled SiLU: GFA at the input, lambda 20",
        config=_recipe(network=_SMOOTH_HOMOGENEOUS, gfa=_gfa()),
        hypothesis="Alignment needs homogeneity, and its derivative needs smoothness.",
        outcome="The same as with ReLU, while the gradient's norm gains clean accuracy in this "
        "network, too: kinks are not what holds alignment back.",
    ),
    "resnet_standard": Trial(label="ResNet: standard", config=_recipe(network=_NORMALIZED)),
    "resnet_fgsm_at": Trial(
        label="ResNet: FGSM-AT", config=_recipe(network=_NORMALIZED, attack=_FGSM)
    ),
    "resnet_gfa": Trial(
        label="ResNet: GFA at the input, lambda 20",
        group="other networks",
        config=_recipe(network=_NORMALIZED, gfa=_gfa()),
        hypothesis="With BatchNorm and biases alignment promises no radius, and may yet defend.",
        outcome="It collapses to one class before it defends.",
        is_tested=True,
    ),
    "resnet_gfa_1": Trial(
        label="ResNet: GFA at the input, lambda 1",
        group="other networks",
        config=_recipe(network=_NORMALIZED, gfa=_gfa(weight=1.0)),
        hypothesis="A twentieth of the weight does not collapse.",
        outcome="It does not, and defends little; the radius that DeepFool finds is not the one "
        "that alignment promises.",
        is_tested=True,
    ),
    "homogeneous_resnet_fgsm_at": Trial(
        label="homogeneous ResNet: FGSM-AT",
        config=_recipe(network=_RESNET, attack=_FGSM),
    ),
    "homogeneous_resnet_gfa": Trial(
        label="homogeneous ResNet: GFA at the input, lambda 20",
        group="other networks",
        config=_recipe(network=_RESNET, gfa=_gfa()),
        hypothesis="Without them the promise holds in a deeper network, too.",
        outcome="It holds, and GFA defends as in the small CNN; FGSM-AT is more robust here, too.",
        is_tested=True,
    ),
    "whole_fgsm_at": Trial(
        label="whole: FGSM-AT",
        group="whole recipes",
        config=_whole(cifar10_fgsm_at.get_config()),
        is_tested=True,
    ),
    "whole_gfa": Trial(
        label="whole: GFA at the input, lambda 20",
        group="whole recipes",
        config=_whole(cifar10_gfa.get_config()),
        hypothesis="A wider network, trained for 30 epochs of 45,000 images, has the capacity that "
        "alignment needs.",
        outcome="Both accuracies rise; FGSM-AT's clean accuracy rises far more. On test images "
        "both are as robust within chance.",
        is_tested=True,
    ),
    "whole_gfa_at": Trial(
        label="whole: FGSM-AT + GFA, lambda 0.3",
        group="whole recipes",
        config=_whole(cifar10_gfa_at.get_config()),
        hypothesis="The same, on top of FGSM training.",
        outcome="As robust as FGSM-AT on test images within chance, and less accurate, at 1.7 "
        "times its cost.",
        is_tested=True,
    ),
    "few_fgsm_at": Trial(label="2,000 images: FGSM-AT", config=_recipe(images=_FEW, attack=_FGSM)),
    "few_pgd2_at": Trial(
        label="2,000 images: PGD-2 AT", config=_recipe(images=_FEW, attack=_PGD_2)
    ),
    "few_gradient_norm": Trial(
        label="2,000 images: gradient norm",
        config=_recipe(images=_FEW, regularizers=(_GRADIENT_NORM,)),
    ),
    "few_gfa": Trial(
        label="2,000 images: GFA at the input, lambda 20",
        config=_recipe(images=_FEW, gfa=_gfa()),
        hypothesis="Adversarial training overfits few images, and alignment regularises.",
        outcome="Less robust than the others of few images, of two of them within chance.",
    ),
    "few_gfa_fgsm": Trial(
        label="2,000 images: FGSM-AT + GFA, lambda 1",
        config=_recipe(images=_FEW, attack=_FGSM, gfa=_gfa(weight=1.0)),
        hypothesis="Adversarial training overfits few images, and alignment adds to it.",
        outcome="Between FGSM-AT and PGD-2 AT, which costs less, and within chance of both.",
    ),
}
"""Recipes by name. Those that are tested were chosen by validation images alone."""


RECIPES = {name: functools.partial(trial.at, 0) for name, trial in TRIALS.items()}


def get_config(name: str) -> TrainConfig:
    """Returns the recipe of a trial."""
    return choose(RECIPES, name)


def _claims(ours: str) -> tuple[Claim, ...]:
    """The abstract's four claims, and clean accuracy kept, of one reading of the method."""
    distance: dict[str, Any] = {
        "measure": "distance",
        "claimed": "20 to 30 times",
        "at_least": 20.0,
    }
    return (
        Claim(
            text="more accurate under APGD than adversarial training",
            ours=ours,
            baseline="pgd10_at",
            attack="apgd-ce:num_steps=10",
            claimed="up to +15.2 points",
            at_least=15.2,
        ),
        Claim(
            text="more accurate under FGSM than adversarial training",
            ours=ours,
            baseline="pgd10_at",
            attack="fgsm",
            claimed="up to +24.7 points",
            at_least=24.7,
        ),
        Claim(
            text="DeepFool needs larger perturbations",
            ours=ours,
            baseline="standard",
            attack="deepfool:variant=torchattacks",
            **distance,
        ),
        Claim(
            text="EADEN needs larger perturbations",
            ours=ours,
            baseline="standard",
            attack="ead-en:variant=torchattacks",
            **distance,
        ),
        Claim(
            text="clean accuracy is kept",
            ours=ours,
            baseline="standard",
            attack="clean",
            claimed="not in the abstract",
            at_least=-1.0,
        ),
    )


def _at_equal_cost(ours: str, baseline: str) -> Claim:
    """Returns what a recipe worth having would do; FLOPs are in the next table."""
    return Claim(
        text="more robust than a baseline of about its cost, or less",
        ours=ours,
        baseline=baseline,
        attack="worst_case",
        claimed="what users would want",
        at_least=0.0,
    )


ABOUT = """
GFA (arXiv 2511.13749) is said to train CNNs that resist attacks without adversarial examples. This
page holds the claims of its abstract against the attacks named there and against the worst case
over attacks that masked gradients do not fool. The abstract gives no formula, network, epsilon or
attack options: those are this page's, the attacks' the defaults of torchattacks, and "up to" is
held to the figure. Unless a row says otherwise, networks are `cnn6` at half width (16 to 64
channels) without biases, as alignment needs it, trained for 1,000 steps (8 epochs of 16,000 images)
with batches of 128, AdamW and one cycle; weights of penalties rise over the first half of training,
epsilon over the first quarter. Trials on 2,000 images take as many steps. Those called whole are
the recipes of `configs/cifar10_*.py`: the whole network (32 to 128 channels) for 30 epochs of
45,000 images. ResNets are PreAct ResNet-18 at an eighth of its width (8 to 64 channels),
homogeneous or with BatchNorm and biases; networks of SiLU have biases. All this is far from the
budgets that adversarial training is known for: compare rows with each other, not with published
tables. The images are a JPEG copy of CIFAR-10. `make study DATA_DIR=DIR` trains and judges what has
no record in `docs/study/records` yet. Other processors round differently, after which the same
recipe and seed ends at other accuracies: differences within chance are no differences. Diagnostics
are explained in docs/evaluation.md; D10 warns where an attack on the margin finds more than one on
the cross-entropy.

Baselines: FGSM-AT with a random start (Wong et al. 2020, arXiv 2001.03994), PGD-AT (Madry et al.
2018, arXiv 1706.06083), TRADES (Zhang et al. 2019, arXiv 1901.08573), and the gradient's norm as
the first-order adversarial loss (Lyu et al. 2015, arXiv 1511.06385), whose step costs what GFA's
does. Linearised margins are that loss to first order in margins (docs/method.md). The literal
reading aligns with the cross-entropy's gradient at all layers; the other rows of GFA, unless they
say otherwise, with that of a sampled margin, in the log form, at the input alone, in the dual of
l_inf.
"""


CONCLUSIONS = """
Of three seeds, none of the abstract's four claims holds. Under APGD and FGSM both readings are
behind adversarial training, not ahead of it. Clean accuracy, of which the abstract says nothing, is
kept by the literal reading within chance, and not by the other.

* **The literal reading changes nothing.** Cosines with the cross-entropy's gradient at all layers
  leave accuracy, robustness and the length of perturbations those of standard training, with biases
  or without, and so they do at twice the weight (one seed, validation); at five times the weight
  the network collapses to one class.
* **Alignment at the input defends.** With the gradient of a sampled margin, in the log form and the
  dual of l_inf, every attack finds less, with gradients and without, and no diagnostic fails. As in
  adversarial training, attacks on the margin find more than those on the cross-entropy (D10), and
  the worst case holds both: there is no sign that anything is masked. It costs clean accuracy, and
  perturbations become two to three times longer than standard training's, not twenty, as
  adversarial training's do. Of the other choices, each at one weight, the log-odds are far less
  accurate, the nearest class kills the network, and without sign it guesses.
* **It is no bargain.** PGD-10, PGD-2 and FGSM training are more robust and more accurate, the last
  at less cost. The gradient's norm, which costs the same, is more robust, too, and as accurate
  within chance.
* **Hidden layers add nothing**, in either form tried.
* **On top of FGSM training** a little of it is within chance of none; with more of it, up to two
  epsilons, both accuracies fall.
* **The whole recipes** (one seed, the small network's lambdas): GFA (23.0) and GFA on FGSM training
  (28.0) are as robust within chance as FGSM training (25.4), which costs less than either and is
  more accurate: 72.0 against 46.4 and 68.6.
* **Kinks are not what holds it back.** Second derivatives do not see the kinks of ReLU. In smooth
  networks the norm of the gradient is indeed more accurate (43.7 against 34.9, three seeds) and no
  less robust; alignment gains nothing where the network stays homogeneous, and where it does not it
  loses both accuracies (one seed, validation).
* **Biases and normalisation break it**, as the theory says (one seed). With biases DeepFool finds
  .61 of the radius promised (median), and the worst case falls. A PreAct ResNet-18 with BatchNorm
  collapses to one class; at a twentieth of the weight it trains, defends little, and promises
  nothing for a third of the images it has right; of the others' radii DeepFool finds anything from
  a twelfth to four times. Without either, the same ResNet keeps the promise and defends as the
  small CNN does, within chance.
* **What alignment leaves out is the margin.** The norm of the gradient is the margin's radial part
  over `|h| a`, so the adversarial loss does ask for alignment, of each image and class by what it
  changes. Asked so (linearised margins: the same gradients, the same cost), without an adversarial
  example, the network is in ReLU as robust as FGSM-AT within chance, and far less accurate (one
  seed, validation). In SiLU, of three seeds, its worst case (23.3) is ahead of all four baselines,
  but beyond chance of one alone: of FGSM-AT, by 1.5 points (0.1 to 2.9), at 1.3 times its cost, one
  of ten comparisons of this kind. At its own cost, FGSM-AT for more steps (22.0; 1.3 points, -0.6
  to 3.1) and the gradient's norm (20.5; 2.7, -0.1 to 5.5) are as robust within chance, with clean
  accuracies of 45.6 and 43.7 against 42.2; so is PGD-2 AT (21.7; 1.6, -0.2 to 3.4; clean 41.9),
  which costs a tenth more. 1,000 validation images see nothing of the lead over more steps and over
  PGD-2 (23.2 against 23.6 and 23.3). So no lead over its equals is beyond chance.

The theory is right as far as it goes: in a network without biases, alignment in the dual of l_inf
promises a radius, which DeepFool, starting from the same linearisation, finds (table and pictures
of radii) with any training. But the promise is that of a linear function. Of images promised more
than epsilon, attacks within epsilon break 57 % in standard training, 12 % with GFA at the input and
3 to 9 % in adversarial training; of the whole recipes 7 % with GFA and 19 % with FGSM training. So
GFA at the input does enlarge radii, as a penalty on the gradient that does not depend on its scale,
and most of them hold. But in the small network FGSM and PGD training, which do not ask for
alignment, end with more of it, at the input and in hidden layers (picture of alignment). That GFA
spends itself on images that are safe already is not the whole answer: asking for no more than one
or two epsilons (the ceilings) took robustness, and gave clean accuracy back within chance.
"""


def get_study() -> Study:
    """Returns the study."""
    return Study(
        title="Does gradient-feature alignment work?",
        about=ABOUT,
        trials=TRIALS,
        standard="standard",
        conclusions=CONCLUSIONS,
        protocol=Protocol(
            num_validation_examples=1000,
            num_test_examples=500,
            paper_attacks="fgsm,apgd-ce:num_steps=10",
            paper_distances="deepfool:variant=torchattacks,ead-en:variant=torchattacks",
            honest_attacks="autoattack,apgd-tangential,apgd-feature-tangential:num_steps=30,deepfool",
        ),
        claims=(
            *_claims("gfa_literal"),
            *_claims("gfa_input"),
            *(
                _at_equal_cost(ours, baseline)
                for ours, baseline in (
                    ("gfa_input", "gradient_norm"),
                    ("gfa_input", "fgsm_at"),
                    ("gfa_fgsm_weak", "fgsm_at"),
                    ("gfa_fgsm_weak", "pgd2_at"),
                    ("smooth_linearized_margins", "smooth_gradient_norm"),
                    ("smooth_linearized_margins", "smooth_fgsm_at"),
                    ("smooth_linearized_margins", "smooth_fgsm_at_long"),
                    ("smooth_linearized_margins", "smooth_pgd2_at"),
                    ("whole_gfa", "whole_fgsm_at"),
                    ("whole_gfa_at", "whole_fgsm_at"),
                )
            ),
        ),
    )
