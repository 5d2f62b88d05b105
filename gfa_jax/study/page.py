"""The page of a study: tables and pictures from the records, and what was written beside them."""

import itertools
import pathlib
from collections.abc import Mapping

from gfa_jax import files
from gfa_jax.study import claims, figures, plan, records, tables
from gfa_jax.study.records import Gathered


def write(study: plan.Study, gathered: Gathered, target: pathlib.Path, command: str) -> None:
    """Writes the page and its pictures.

    Args:
      study: what was to be done.
      gathered: what was done.
      target: the page; pictures lie in the folder of its stem.
      command: that writes it.
    """
    pictures = _pictures(study, gathered)
    folder = target.with_suffix("")
    for name, content in pictures.items():
        files.write_bytes(folder / f"{name}.png", content)
    page = render(
        study, gathered, command, {name: f"{folder.name}/{name}.png" for name in pictures}
    )
    files.write_bytes(target, page.encode())


def render(study: plan.Study, gathered: Gathered, command: str, pictures: Mapping[str, str]) -> str:
    """Returns the page as Markdown.

    Args:
      study: what was to be done.
      gathered: what was done.
      command: that writes it.
      pictures: addresses by name.
    """
    parts = [f"# {study.title}", study.about.strip(), f"    {command}"]
    parts.append(
        f"That command wrote this page from the records there are. {_environment(gathered)}".strip()
    )
    if study.conclusions:
        parts += ["## What came out", study.conclusions.strip()]
    tested = records.having(gathered, "test")
    if tested:
        if study.claims:
            parts += ["## The claims", *claims.claims_table(study, gathered, tested)]
        parts += ["## Both protocols side by side", *tables.tested_table(study, gathered, tested)]
        parts += [
            f"![{text}{f', {group}' if group else ''}]({pictures[name]})"
            for group in _groups(study, tested)
            for kind, text in _CAPTIONS.items()
            if (name := _name(kind, group)) in pictures
        ]
        if with_radii := records.having(gathered, "radii"):
            parts += ["## Alignment and radius", *tables.radii_table(study, with_radii)]
    parts += ["## The search", *tables.search_table(study, gathered)]
    if missing := _missing(study, gathered):
        parts += ["## Still to do", "; ".join(missing) + "."]
    return "\n\n".join(parts) + "\n"


_CAPTIONS = {
    "curves": "Accuracy against the radius of an attack with gradients and one without",
    "distances": "Share of right images that a minimum-norm attack breaks within a distance, "
    "of each training's first seed",
    "alignment": "Alignment against worst-case accuracy, a dot a trained model: at the input, the "
    "mean over right images of the alignment with the margin's gradient in the threat's dual norm; "
    "in hidden layers, the mean over layers and the first batch of images of the cosine with the "
    "gradient of the log-odds",
    "shares": "Tangential share of perturbations at every layer, over the first batch of images",
    "radii": "The radius that alignment promises against that which DeepFool finds, a dot an image",
    "surfaces": "Median log-odds of being wrong, of each training's first seed, along the most "
    "successful attack (vertical) and a random direction, over images of the first batch that it "
    "breaks; on the black line the true class has half of the probability",
}


def _groups(study: plan.Study, gathered: Gathered) -> list[str]:
    return list(dict.fromkeys(study.trials[name].group for name in gathered))


def _name(kind: str, group: str) -> str:
    """Returns the stem of a picture's file."""
    return "-".join([kind, *group.split()]).lower()


def _pictures(study: plan.Study, gathered: Gathered) -> dict[str, bytes]:
    """Returns the pictures of all groups by the stem of their file."""
    pictures = {}
    for group in _groups(study, gathered):
        members = {
            name: some for name, some in gathered.items() if study.trials[name].group == group
        }
        for kind, content in _pictures_of(study, members).items():
            pictures[_name(kind, group)] = content
    return pictures


def _pictures_of(study: plan.Study, gathered: Gathered) -> dict[str, bytes]:
    tested = {
        study.trials[name].label: found for name, found in records.having(gathered, "test").items()
    }
    if not tested:
        return {}
    one = next(iter(tested.values()))[0]["test"]
    pictures = {
        "curves": figures.accuracy_curves(tested),
        "alignment": figures.alignment_and_robustness(tested),
    }
    if one["minimum_norm"]:
        pictures["distances"] = figures.distances(tested, list(one["minimum_norm"]))
    spec = plan.attacks_of(study.protocol)["honest"][0]
    if all(spec in layer["tangential_shares"] for layer in one["layers"].values()):
        pictures["shares"] = figures.tangential_shares(tested, spec)
    with_radii = {
        study.trials[name].label: found for name, found in records.having(gathered, "radii").items()
    }
    if with_radii:
        pictures["radii"] = figures.radii(with_radii)
    if (surfaces := figures.surfaces(tested)) is not None:
        pictures["surfaces"] = surfaces
    return pictures


def _missing(study: plan.Study, gathered: Gathered) -> list[str]:
    """Returns what is not trained, or not judged by every stage."""
    missing = []
    for name, trial in study.trials.items():
        records_of = {record["seed"]: record for record in gathered[name]}
        for seed in trial.seeds:
            record = records_of.get(seed, {})
            stages = [stage for stage in plan.stages(trial, study.protocol) if stage not in record]
            if not stages or record.get("failure"):
                continue
            what = f" ({', '.join(stages)})" if "validation" in record else ""
            missing.append(f"`{name}`, seed {seed}{what}")
    return missing


def _environment(gathered: Gathered) -> str:
    """Returns which versions and devices trained and judged."""
    seen = dict.fromkeys(
        f"jax {found['environment']['jax']}, Python {found['environment']['python']}, "
        f"{found['environment']['devices']}"
        for record in itertools.chain(*gathered.values())
        for found in (record, *(record.get(stage, {}) for stage in plan.STAGES))
        if "environment" in found
    )
    return f"Trained and judged with {'; '.join(seen)}." if seen else ""
