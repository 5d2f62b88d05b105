"""Studies that do not fit are refused before anything is trained."""

import dataclasses

import pytest

from gfa_jax.config import GFAConfig, ThreatConfig
from gfa_jax.study import load_study, plan
from tests.study.tiny import changed, claim, protocol, tiny, tiny_study


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda study: dataclasses.replace(study, trials={}), "study.trials is empty"),
        (lambda study: dataclasses.replace(study, standard="plain"), "study.standard='plain'"),
        (
            lambda study: dataclasses.replace(
                study, trials={**study.trials, "a/b": study.trials["searched"]}
            ),
            r"study.trials\['a/b'\]: a name has letters",
        ),
        (lambda study: changed(study, "gfa", group="a/b"), r"\['gfa'\].group='a/b': a group"),
        (lambda study: changed(study, "gfa", group="Nets"), r"\['gfa'\].group='Nets': a group"),
        (lambda study: changed(study, "gfa", seeds=3), r"\['gfa'\].seeds=3 must be of type tuple"),
        (lambda study: changed(study, "gfa", seeds=(0.5,)), r"seeds=\(0.5,\): 0.5 is no integer"),
        (lambda study: changed(study, "gfa", seeds=(-1,)), r"seeds=\(-1,\): -1 is no integer >= 0"),
        (lambda study: changed(study, "gfa", outcome=None), "outcome=None must be of type str"),
        (lambda study: changed(study, "gfa", config={}), "config={} must be of type TrainConfig"),
        (
            lambda study: dataclasses.replace(
                study, trials={**study.trials, "GFA": study.trials["searched"]}
            ),
            r"\['gfa', 'GFA'\] would share a folder",
        ),
        (lambda study: protocol(study, paper_attacks="fgsm,fgsm"), "names an attack twice"),
        (lambda study: claim(study, at_least="20"), "claim.at_least='20' must be of type int or"),
        (lambda study: changed(study, "gfa", seeds=()), r"\['gfa'\].seeds=\(\)"),
        (
            lambda study: changed(study, "gfa", seeds=(1, 1)),
            r"seeds=\(1, 1\) must be different",
        ),
        (
            lambda study: changed(
                study,
                "gfa",
                config=dataclasses.replace(
                    tiny(), data=dataclasses.replace(tiny().data, num_validation=0)
                ),
            ),
            "num_validation=0: without a validation split",
        ),
        (
            lambda study: changed(study, "gfa", config=tiny(gfa=GFAConfig(form="logg"))),
            r"study.trials\['gfa'\]: config.gfa.form='logg'",
        ),
        (
            lambda study: protocol(study, honest_attacks=""),
            "protocol.honest_attacks is empty",
        ),
        (lambda study: protocol(study, diagnostics="quik"), "protocol.diagnostics='quik'"),
        (lambda study: protocol(study, batch_size=0), "study.protocol.batch_size=0"),
        (lambda study: protocol(study, paper_attacks="pgd:num_steps=0"), "num_steps=0"),
        (
            lambda study: protocol(study, validation_attacks="apgd-feature-tangential"),
            "validation_attacks: 'apgd-feature-tangential' needs features",
        ),
        (
            lambda study: protocol(study, validation_attacks="deepfool"),
            "validation_attacks: 'deepfool' succeeds at any distance",
        ),
        (
            lambda study: protocol(study, paper_distances="pgd"),
            "paper_distances: 'pgd' does not look for the smallest",
        ),
        (
            lambda study: changed(study, "gfa", label="plain"),
            "labels of tested trials must differ",
        ),
        (
            lambda study: changed(
                study,
                "gfa",
                config=dataclasses.replace(tiny(), threat=ThreatConfig(epsilon=0.2)),
            ),
            r"study.trials\['gfa'\].config.threat .*one table cannot hold both",
        ),
        (
            lambda study: changed(
                study,
                "gfa",
                config=dataclasses.replace(
                    tiny(), data=dataclasses.replace(tiny().data, num_validation=100)
                ),
            ),
            r"config.data.num_validation is 100, that of 'standard' 40",
        ),
        (lambda study: protocol(study, paper_attacks="pgdd"), "'pgdd'"),
        (
            lambda study: protocol(study, distance_norm="l3"),
            "study.protocol.distance_norm='l3'",
        ),
        (lambda study: claim(study, ours="nobody"), "claim.ours='nobody'"),
        (
            lambda study: claim(study, ours="searched"),
            "'searched' is a trial that is not tested",
        ),
        (lambda study: claim(study, attack="pgd"), "claim.attack='pgd'"),
        (lambda study: claim(study, measure="distance"), "claim.attack='fgsm'"),
        (lambda study: claim(study, measure="length"), "claim.measure='length'"),
    ],
)
def test_studies_that_do_not_fit_are_refused(change, message):
    plan.validate(tiny_study())
    with pytest.raises(ValueError, match=message):
        plan.validate(change(tiny_study()))


def test_studies_are_files(tmp_path):
    study = load_study("configs/study/cifar10.py")
    assert study.standard in study.trials
    with pytest.raises(FileNotFoundError, match=r"study='nowhere.py' does not exist"):
        load_study("nowhere.py")
    file = tmp_path / "other.py"
    file.write_text("x = 1")
    with pytest.raises(ValueError, match=r"has no get_study\(\)"):
        load_study(str(file))
    file.write_text("def get_study():\n    return 1")
    with pytest.raises(ValueError, match="returns int, not gfa_jax.study.Study"):
        load_study(str(file))
