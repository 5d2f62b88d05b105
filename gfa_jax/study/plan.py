"""What a study is: recipes with the question that each answers, and how they are judged."""

import dataclasses
import operator
import pathlib
from collections.abc import Mapping
from typing import Any

from gfa_jax import ThreatModel, _modules, _validate, attacks, cli, norms
from gfa_jax import config as config_lib
from gfa_jax.config import TrainConfig
from gfa_jax.evaluation import masking
from gfa_jax.evaluation.evaluate import parse_attack


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """A recipe, and why it is tried."""

    config: TrainConfig
    """Its seed is replaced by those of ``seeds``."""
    label: str
    """In tables."""
    group: str = ""
    """Trials of one group share pictures, whose captions name it; empty for the study's first."""
    hypothesis: str = ""
    """What the search tries it for; empty for a baseline."""
    outcome: str = ""
    """What came of it, written once it is known."""
    seeds: tuple[int, ...] = (0,)
    """Trainings, each judged on the validation split."""
    is_tested: bool = False
    """Whether it is judged on test images too: decided before they are looked at."""

    def at(self, seed: int) -> TrainConfig:
        """Returns the recipe with a seed."""
        return dataclasses.replace(self.config, seed=seed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Protocol:
    """How trained models are judged: attacks as for ``eval.py``, separated by commas."""

    num_validation_examples: int = 500
    """Images that choose among recipes."""
    validation_attacks: str = "apgd-ce:num_steps=30,apgd-dlr:num_steps=30,square:num_queries=300"
    """Made one after another on what is left."""
    num_test_examples: int = 500
    """Images that results are of."""
    paper_attacks: str = ""
    """Those of a paper's protocol within epsilon, each on all images."""
    paper_distances: str = ""
    """Its attacks that look for the smallest perturbation in ``distance_norm``."""
    distance_norm: str = "l2"
    """``linf``, ``l2`` or ``l1``."""
    honest_attacks: str = "autoattack"
    """Those of the honest protocol; the worst case is over these and ``paper_attacks``."""
    diagnostics: str = "quick"
    """Of the evaluation on test images: ``off``, ``quick`` or ``full``."""
    batch_size: int = 250
    """Examples attacked at once."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
    """A published claim that two trials put to the test: how far one is ahead of the other."""

    text: str
    """As it was made."""
    ours: str
    """The trial that stands for the method."""
    baseline: str
    """The trial that it is compared with."""
    attack: str
    """One of the protocol's attacks, ``clean`` or ``worst_case``."""
    measure: str = "accuracy"
    """``accuracy`` (a difference in points), or ``distance`` (a ratio of mean distances of what the
    attack finds, as such papers report)."""
    claimed: str
    """The figure claimed, with its unit."""
    at_least: float
    """From where it holds: points, or a ratio."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """Recipes, how they are judged, and what is to be said around the tables."""

    title: str
    about: str
    """Markdown: the question, the data and the budget."""
    trials: Mapping[str, Trial]
    """By a name that serves as a folder's."""
    standard: str
    """The trial whose cost and distances are 1."""
    protocol: Protocol = Protocol()
    claims: tuple[Claim, ...] = ()
    conclusions: str = ""
    """Markdown: what follows from the tables, once it does."""


def attacks_of(protocol: Protocol) -> dict[str, list[str]]:
    """Returns the specs of attacks by the name of their protocol."""
    return {
        "validation": cli.split_names(protocol.validation_attacks),
        "paper": cli.split_names(protocol.paper_attacks),
        "distances": cli.split_names(protocol.paper_distances),
        "honest": cli.split_names(protocol.honest_attacks),
    }


STAGES = ("validation", "test", "distances", "radii")
"""What a trained model may be judged by, in order."""


def stages(trial: Trial, protocol: Protocol) -> list[str]:
    """Returns the evaluations that a trial needs, in order."""
    if not trial.is_tested:
        return ["validation"]
    return ["validation", "test", *(["distances"] if protocol.paper_distances else []), "radii"]


def settings(protocol: Protocol, stage: str) -> dict[str, Any]:
    """Returns what an evaluation of this kind depends on; a record keeps it."""
    names = {
        "validation": ("num_validation_examples", "validation_attacks"),
        "test": (
            *("num_test_examples", "paper_attacks", "honest_attacks", "diagnostics"),
            "batch_size",  # Features are looked at in the first batch.
        ),
        "distances": ("num_test_examples", "paper_distances", "distance_norm"),
        "radii": ("num_test_examples",),
    }
    return {name: getattr(protocol, name) for name in names[stage]}


def validate(study: Study) -> None:
    """Checks a study before anything is trained.

    Raises:
      ValueError: naming the field, the value and what would be valid.
    """
    if not study.trials:
        raise ValueError("study.trials is empty: a study needs recipes.")
    _validate_types(study)
    labels = [trial.label for trial in study.trials.values() if trial.is_tested]
    if len(set(labels)) < len(labels):
        raise ValueError(f"the labels of tested trials must differ, and are {labels}.")
    folders: dict[str, list[str]] = {}
    for name in study.trials:
        folders.setdefault(name.lower(), []).append(name)
    for name, trial in study.trials.items():
        where = f"study.trials[{name!r}]"
        if not name.replace("-", "").replace("_", "").isalnum():
            raise ValueError(f"{where}: a name has letters, digits, - and _ only.")
        if trial.group and (trial.group != trial.group.lower() or not _is_words(trial.group)):
            raise ValueError(
                f"{where}.group={trial.group!r}: a group, which names files, has words of small "
                "letters and digits only."
            )
        if len(folders[name.lower()]) > 1:
            raise ValueError(f"{folders[name.lower()]} would share a folder on some systems.")
        if not trial.seeds or len(set(trial.seeds)) != len(trial.seeds):
            raise ValueError(
                f"{where}.seeds={trial.seeds} must be different numbers, at least one."
            )
        for seed in trial.seeds:
            if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
                raise ValueError(f"{where}.seeds={trial.seeds}: {seed!r} is no integer >= 0.")
        if not trial.config.data.num_validation:
            raise ValueError(
                f"{where}.config.data.num_validation=0: without a validation split, recipes would "
                "be chosen by test images."
            )
        try:
            config_lib.validate(trial.config)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    _validate_protocol(study)
    specs = attacks_of(study.protocol)
    _validate.one_of(study.trials, **{"study.standard": study.standard})
    for claim in study.claims:
        for field in ("ours", "baseline"):
            _validate.one_of(study.trials, **{f"claim.{field}": getattr(claim, field)})
            if not study.trials[getattr(claim, field)].is_tested:
                raise ValueError(
                    f"claim.{field}={getattr(claim, field)!r} is a trial that is not tested."
                )
        _validate.one_of(("accuracy", "distance"), **{"claim.measure": claim.measure})
        known = ("clean", "worst_case", *specs["paper"], *specs["honest"])
        if claim.measure == "distance":
            known = tuple(specs["distances"])
        _validate.one_of(known, **{"claim.attack": claim.attack})


def _validate_types(study: Study) -> None:
    """Checks what would not be noticed before the page is written."""
    for name, trial in study.trials.items():
        where = f"study.trials[{name!r}]"
        _validate.instance(Trial, **{where: trial})
        _validate.instance(TrainConfig, **{f"{where}.config": trial.config})
        _validate.instance(tuple, **{f"{where}.seeds": trial.seeds})
        _validate.instance(bool, **{f"{where}.is_tested": trial.is_tested})
        for field in ("label", "group", "hypothesis", "outcome"):
            _validate.instance(str, **{f"{where}.{field}": getattr(trial, field)})
    for field in ("title", "about", "conclusions"):
        _validate.instance(str, **{f"study.{field}": getattr(study, field)})
    for claim in study.claims:
        _validate.instance(Claim, **{"claim": claim})
        for field in ("text", "claimed"):
            _validate.instance(str, **{f"claim.{field}": getattr(claim, field)})
        _validate.instance((int, float), **{"claim.at_least": claim.at_least})


def _is_words(text: str) -> bool:
    return text == " ".join(text.split()) and text.replace(" ", "").isalnum()


def _validate_protocol(study: Study) -> None:
    """Checks everything about the judging that could fail after hours of training."""
    protocol = study.protocol
    counts = ("num_validation_examples", "num_test_examples", "batch_size")
    _validate.positive_integer(
        **{f"study.protocol.{name}": getattr(protocol, name) for name in counts}
    )
    _validate.one_of(masking.LEVELS, **{"study.protocol.diagnostics": protocol.diagnostics})
    _validate.one_of(norms.DUALS, **{"study.protocol.distance_norm": protocol.distance_norm})
    first, *others = study.trials.items()
    for name, trial in others:
        for field in ("threat", "data.name", "data.num_validation"):
            ours, theirs = (operator.attrgetter(field)(one.config) for one in (trial, first[1]))
            if ours != theirs:
                raise ValueError(
                    f"study.trials[{name!r}].config.{field} is {ours}, that of {first[0]!r} "
                    f"{theirs}: one table cannot hold both."
                )
    threat = ThreatModel(first[1].config.threat.norm, first[1].config.threat.epsilon)
    fields = {"validation": "validation_attacks", "paper": "paper_attacks"}
    fields |= {"distances": "paper_distances", "honest": "honest_attacks"}
    for kind, specs in attacks_of(protocol).items():
        where = f"study.protocol.{fields[kind]}"
        if not specs and kind in ("validation", "honest"):
            raise ValueError(f"{where} is empty.")
        if len(set(specs)) < len(specs):
            raise ValueError(f"{where} names an attack twice: {specs}.")
        for spec in specs:
            name, options = parse_attack(spec)
            of_distances = kind == "distances"
            attack = attacks.create(
                name,
                ThreatModel(protocol.distance_norm, 1.0) if of_distances else threat,
                **options,
            )
            parts = attack.parts().values()
            if kind in ("validation", "distances") and any(
                part.estimator.needs_features for part in parts
            ):
                raise ValueError(f"{where}: {spec!r} needs features, which are not seen there.")
            # Parts of an ensemble are judged within epsilon, whatever they look for.
            finds_closest = getattr(attack, "keep", "") == "closest"
            if of_distances and not finds_closest:
                raise ValueError(f"{where}: {spec!r} does not look for the smallest perturbation.")
            if kind == "validation" and finds_closest:
                raise ValueError(f"{where}: {spec!r} succeeds at any distance.")


def load_study(path: str) -> Study:
    """Returns ``get_study()`` of a Python file, checked.

    Raises:
      FileNotFoundError: for a missing file.
      ValueError: for a file without ``get_study()``, or a study that does not fit.
    """
    file = pathlib.Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"study={path!r} does not exist.")
    module = _modules.run_module(file, f"gfa_jax_study_{file.stem}")
    if not hasattr(module, "get_study"):
        raise ValueError(f"study={path!r} has no get_study().")
    study = module.get_study()
    if not isinstance(study, Study):
        raise ValueError(
            f"get_study() of {path!r} returns {type(study).__name__}, not gfa_jax.study.Study."
        )
    validate(study)
    return study
