"""A study of a tiny network on digits, and changes to it."""

import dataclasses

from configs import smoke
from gfa_jax.config import AttackConfig, GFAConfig, OptimizerConfig
from gfa_jax.study import Claim, Protocol, Study, Trial

COMMAND = "python -m gfa_jax.study --study tiny.py"
PROTOCOL = Protocol(
    num_validation_examples=24,
    validation_attacks="fgsm,pgd:num_steps=2",
    num_test_examples=24,
    paper_attacks="fgsm",
    paper_distances="deepfool:num_steps=20",
    honest_attacks="pgd-margin:num_steps=3,deepfool:num_steps=20",
    diagnostics="off",
    batch_size=12,
)


def tiny(**parts):
    base = smoke.get_config()
    return dataclasses.replace(
        base,
        train_steps=200,
        attack=AttackConfig(),
        model=dataclasses.replace(base.model, width=0.5),
        optimizer=OptimizerConfig(learning_rate=5e-3),
        loop=dataclasses.replace(base.loop, eval_every=0, eval_attack_steps=0),
        **parts,
    )


def tiny_study(**parts):
    trials = {
        "standard": Trial(
            label="plain", config=tiny(gfa=GFAConfig()), seeds=(0, 3), is_tested=True
        ),
        "gfa": Trial(
            label="aligned",
            config=tiny(gfa=GFAConfig(weight=1.0)),
            hypothesis="alignment defends",
            outcome="too short to tell",
            is_tested=True,
        ),
        "searched": Trial(
            label="aligned less", config=tiny(gfa=GFAConfig(weight=0.1)), hypothesis="less is more"
        ),
    }
    claims = (
        Claim(
            text="defends against FGSM",
            ours="gfa",
            baseline="standard",
            attack="fgsm",
            claimed="+99 points",
            at_least=99.0,
        ),
        Claim(
            text="farther away",
            ours="gfa",
            baseline="standard",
            attack="deepfool:num_steps=20",
            measure="distance",
            claimed="99 times",
            at_least=99.0,
        ),
    )
    study = Study(
        title="Tiny", about="Of digits.", trials=trials, standard="standard", protocol=PROTOCOL
    )
    return dataclasses.replace(study, claims=claims, **parts)


def changed(study, name, **fields):
    trial = dataclasses.replace(study.trials[name], **fields)
    return dataclasses.replace(study, trials={**study.trials, name: trial})


def claim(study, **fields):
    return dataclasses.replace(study, claims=(dataclasses.replace(study.claims[0], **fields),))


def protocol(study, **fields):
    return dataclasses.replace(study, protocol=dataclasses.replace(study.protocol, **fields))
