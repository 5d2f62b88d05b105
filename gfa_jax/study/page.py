"""The page of a study: tables and pictures from the records, and what was written beside them."""

import itertools
import math
import pathlib
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gfa_jax import files
from gfa_jax.evaluation import diagnostics, intervals
from gfa_jax.study import figures, plan, records
from gfa_jax.study.records import Record

Gathered = Mapping[str, Sequence[Record]]
"""Records by trial, in the order of the study; trials without any are there, too."""

WORST = "worst_case"


def gather(study: plan.Study, folder: pathlib.Path) -> dict[str, list[Record]]:
    """Reads the records of a study.

    Raises:
      ValueError: for a damaged record, one of another recipe or protocol, or of other images.
    """
    gathered: dict[str, list[Record]] = {}
    for name, trial in study.trials.items():
        found = [
            records.read(records.path_of(folder, name, seed), trial.at(seed))
            for seed in trial.seeds
        ]
        gathered[name] = [record for record in found if record]
    for stage in plan.STAGES:
        _check_alike(stage, plan.settings(study.protocol, stage), gathered)
    return gathered


def _check_alike(stage: str, protocol: Mapping[str, Any], gathered: Gathered) -> None:
    """Checks that all were judged alike, and on the same images."""
    seen: dict[str, str] = {}
    for record in itertools.chain(*gathered.values()):
        if stage not in record:
            continue
        where = f"the record of {record['trial']!r}, seed {record['seed']},"
        if record[stage].get("protocol") != protocol:
            raise ValueError(
                f"{where} was judged by {record[stage].get('protocol')}, and the study says "
                f"{protocol}: take {stage!r} out of such records, and what is missing is judged "
                "again."
            )
        seen.setdefault(record[stage]["data"]["hash"], where)
    if len(seen) > 1:
        raise ValueError(f"{' and '.join(seen.values())} were judged on other images ({stage}).")


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
    tested = _with(gathered, "test")
    if tested:
        if study.claims:
            parts += ["## The claims", *_claims(study, gathered, tested)]
        parts += ["## Both protocols side by side", *_tested_table(study, gathered, tested)]
        parts += [
            f"![{text}]({pictures[name]})" for name, text in _CAPTIONS.items() if name in pictures
        ]
        if with_radii := _with(gathered, "radii"):
            parts += ["## Alignment and radius", *_radii_table(study, with_radii)]
    parts += ["## The search", *_search_table(study, gathered)]
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


def _pictures(study: plan.Study, gathered: Gathered) -> dict[str, bytes]:
    tested = {study.trials[name].label: found for name, found in _with(gathered, "test").items()}
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
        study.trials[name].label: found for name, found in _with(gathered, "radii").items()
    }
    if with_radii:
        pictures["radii"] = figures.radii(with_radii)
    if (surfaces := figures.surfaces(tested)) is not None:
        pictures["surfaces"] = surfaces
    return pictures


def _with(gathered: Gathered, stage: str) -> dict[str, list[Record]]:
    """Returns the trials that have an evaluation, with the records that have it."""
    found = {
        name: [record for record in some if stage in record] for name, some in gathered.items()
    }
    return {name: some for name, some in found.items() if some}


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


def _tested_table(study: plan.Study, gathered: Gathered, tested: Gathered) -> list[str]:
    specs = plan.attacks_of(study.protocol)
    standard = gathered.get(study.standard)
    header = ["training", "seeds", "FLOPs", "clean"]
    header += [_title(spec) for spec in specs["paper"]]
    header += [f"{_title(spec)}, {study.protocol.distance_norm}" for spec in specs["distances"]]
    header += [_title(spec) for spec in specs["honest"]]
    header += ["**worst case**", "diagnostics"]
    rows = []
    for name, some in tested.items():
        tests = [record["test"] for record in some]
        cells = [study.trials[name].label, _seeds(study, name, gathered, len(some))]
        cells.append(_cost(some, standard))
        cells.append(_accuracy([one["clean_accuracy"] for one in tests], tests))
        cells += [
            _accuracy([one["robust_accuracy"][spec] for one in tests], tests)
            for spec in specs["paper"]
        ]
        cells += [_distance(some, standard, spec) for spec in specs["distances"]]
        cells += [
            _accuracy([one["robust_accuracy"][spec] for one in tests], tests)
            for spec in (*specs["honest"], WORST)
        ]
        cells[-1] = f"**{cells[-1]}**"
        cells.append(_failing(tests))
        rows.append(cells)
    one = next(iter(tested.values()))[0]["test"]
    threat = one["threat"]
    note = (
        f"On the first {one['num_examples']} test images of {one['data']['name']}, "
        f"{threat['norm']}, epsilon {_radius(threat['epsilon'])}. Accuracies in %: of one seed "
        "with the 95 % interval over images, of several the mean +- standard deviation over seeds. "
        f"Paper's protocol: {_listed([*specs['paper'], *specs['distances']])}; of attacks that "
        "look for the smallest perturbation, the mean norm over images where they succeeded, as "
        "such papers report, its multiple of standard training's, and how often they succeeded "
        "where that is not always. Honest protocol: "
        f"{_listed(specs['honest'])}. The worst case is over the attacks within epsilon of both. "
        "FLOPs: of training, as a multiple of standard training's, of products and convolutions as "
        "this backend makes them. "
        "Diagnostics: those that fail in any seed, and of those that would make the accuracies "
        "upper bounds (in bold) also those that nothing was measured for."
    )
    return [_table(header, rows), note]


def _radii_table(study: plan.Study, with_radii: Gathered) -> list[str]:
    """Returns what the alignment promises of each image's radius beside what DeepFool finds."""
    header = ["training", "images", "radius promised, median", "found, median", "found / promised"]
    epsilon = next(iter(study.trials.values())).config.threat.epsilon
    header += [f"promised beyond {_radius(epsilon)}", f"found beyond {_radius(epsilon)}"]
    rows = []
    for name, some in with_radii.items():
        # Where DeepFool finds nothing, its radius is larger than any.
        pairs = [
            (promised, math.inf if found is None else found)
            for record in some
            for promised, found in zip(
                record["radii"]["linear"], record["radii"]["measured"], strict=True
            )
        ]
        ratios = [found / promised for promised, found in pairs if promised > 0]
        cells = [study.trials[name].label, str(len(pairs))]
        if len(pairs) < 2 or not ratios:
            rows.append([*cells, *["-"] * 5])
            continue
        cells += [f"{statistics.median(side):.4f}" for side in zip(*pairs, strict=True)]
        ends = (sorted(ratios)[round(share * (len(ratios) - 1))] for share in (0.1, 0.9))
        low, high = (f"{end:.2f}" for end in ends)
        cells.append(f"{statistics.median(ratios):.2f} ({low}-{high})")
        cells += [
            f"{100 * statistics.mean(radius > epsilon for radius in side):.0f} %"
            for side in zip(*pairs, strict=True)
        ]
        rows.append(cells)
    norm = next(iter(with_radii.values()))[0]["radii"]["norm"]
    note = (
        "Of the test images that are right. Promised: the linear radius |h| a in "
        f"{norm}, from the alignment a of the normalised image h with the margin's gradient, in "
        "units of the image; without biases it is what the nearest boundary's gradient says. "
        "Found: DeepFool's, infinite where it finds nothing; it oversteps by 2 %. In brackets the "
        "10 % and 90 % quantiles over images."
    )
    return [_table(header, rows), note]


def _search_table(study: plan.Study, gathered: Gathered) -> list[str]:
    specs = plan.attacks_of(study.protocol)["validation"]
    standard = gathered.get(study.standard)
    header = ["trial", "why", "seeds", "FLOPs", "clean"]
    header += [_title(spec) for spec in specs]
    header.append("what came of it")
    rows = []
    for name, trial in study.trials.items():
        some = gathered[name]
        if not some:
            continue
        judged = [record["validation"] for record in some if "validation" in record]
        cells = [f"`{name}`: {trial.label}", trial.hypothesis or "baseline"]
        cells.append(_seeds(study, name, gathered, len(judged)))
        cells.append(_cost(some, standard))
        if judged:
            cells.append(_accuracy([one["clean_accuracy"] for one in judged], judged))
            cells += [
                _accuracy([one["robust_accuracy"][spec] for one in judged], judged)
                for spec in specs
            ]
        else:
            cells += ["-"] * (1 + len(specs))
        failures = dict.fromkeys(record["failure"] for record in some if record.get("failure"))
        cells.append(" ".join([*(f"Training stopped: {text}" for text in failures), trial.outcome]))
        rows.append(cells)
    if not rows:
        return ["No trial has a record yet."]
    every = [one for one in itertools.chain(*gathered.values()) if "validation" in one]
    note = (
        "Judged on images that were held out of training"
        + (f", the first {every[0]['validation']['num_examples']} of them" if every else "")
        + "; test images chose nothing. Attacks follow one another on what is left, so that each "
        f"column is the worst case so far: {_listed(specs)}. In brackets intervals of 95 % over "
        "images; +- is the standard deviation over seeds. FLOPs are multiples of standard "
        "training's."
    )
    return [_table(header, rows), note]


def _claims(study: plan.Study, gathered: Gathered, tested: Gathered) -> list[str]:
    header = ["claim", "claimed", "holds from", "measured so", "95 % interval", "seeds", "holds"]
    header.append("worst case, ours and baseline")
    rows = []
    for claim in study.claims:
        title = (
            f"{claim.text} ({study.trials[claim.ours].label} against "
            f"{study.trials[claim.baseline].label}, `{claim.attack}`)"
        )
        is_distance = claim.measure == "distance"
        threshold = f"{claim.at_least:g} times" if is_distance else f"{claim.at_least:+g} points"
        rows.append([title, claim.claimed, threshold, *_verdict(study, claim, gathered, tested)])
    note = (
        "Intervals: of one seed, over images (Newcombe 1998, unpaired proportions: wide, for the "
        "same images); of several, Student's over seeds that both have. What its interval neither "
        "bears out nor refutes is within chance."
    )
    return [_table(header, rows), note]


def _verdict(
    study: plan.Study, claim: plan.Claim, gathered: Gathered, tested: Gathered
) -> tuple[str, str, str, str, str]:
    """Returns what was measured, its interval, seeds, the verdict, and both worst cases."""
    failed = {
        name: sum(bool(record.get("failure")) for record in gathered[name])
        for name in (claim.ours, claim.baseline)
    }
    if failed[claim.ours] == len(study.trials[claim.ours].seeds):
        return f"training failed: {study.trials[claim.ours].label}", "-", "0", "no", "-"
    stage = "distances" if claim.measure == "distance" else "test"
    pairs = [
        (ours, baseline)
        for ours in tested.get(claim.ours, [])
        for baseline in tested.get(claim.baseline, [])
        if ours["seed"] == baseline["seed"] and stage in ours and stage in baseline
    ]
    seeds = str(len(pairs)) + "".join(
        f", {count} of {study.trials[name].label} failed" for name, count in failed.items() if count
    )
    if not pairs:
        return "not measured yet", "-", seeds, "-", "-"
    worst = " and ".join(
        f"{100 * statistics.mean(_accuracy_under(one, WORST) for one in side):.1f}"
        for side in zip(*pairs, strict=True)
    )
    if claim.measure == "distance":
        values = [
            _mean_distance([ours], claim.attack) / _mean_distance([baseline], claim.attack)
            for ours, baseline in pairs
        ]
        rates = [
            "-" if rate is None else f"{100 * rate:.0f}"
            for rate in (_success_rate(side, claim.attack) for side in zip(*pairs, strict=True))
        ]
        found = f"{rates[0]} and {rates[1]} % found"
        if any(math.isnan(value) for value in values):
            return f"no ratio: {found}", "-", seeds, "-", worst
        interval = intervals.mean(values)
        text, form = f"{statistics.mean(values):.1f} times; {found}", "{:.1f} to {:.1f}"
    else:
        right = [tuple(100 * _accuracy_under(one, claim.attack) for one in pair) for pair in pairs]
        values = [ours - baseline for ours, baseline in right]
        interval = intervals.mean(values)
        if interval is None:
            size = pairs[0][0]["test"]["num_examples"]
            ours, baseline = ((round(share * size / 100), size) for share in right[0])
            low, high = intervals.unpaired_difference(ours, baseline)
            interval = 100 * low, 100 * high
        both = [statistics.mean(side) for side in zip(*right, strict=True)]
        text = f"{statistics.mean(values):+.1f} points ({both[0]:.1f} against {both[1]:.1f})"
        form = "{:+.1f} to {:+.1f}"
    # Differences of shares are rounded in their last bits.
    low, high = (round(end, 6) for end in interval or [statistics.mean(values)] * 2)
    reproduced = (
        "yes" if low >= claim.at_least else "no" if high < claim.at_least else "within chance"
    )
    return text, form.format(*interval) if interval else "-", seeds, reproduced, worst


def _accuracy_under(record: Record, attack: str) -> float:
    test = record["test"]
    accuracy: float = (
        test["clean_accuracy"] if attack == "clean" else test["robust_accuracy"][attack]
    )
    return accuracy


def _mean_distance(some: Sequence[Record], spec: str) -> float:
    """Returns the mean distance of successes, the mean over seeds; NaN where there is none."""
    values = [
        value
        for record in some
        if "distances" in record
        and (value := record["distances"]["minimum_norm"][spec]["mean_of_successes"]) is not None
    ]
    return statistics.mean(values) if values else float("nan")


def _success_rate(some: Sequence[Record], spec: str) -> float | None:
    rates = [
        rate
        for record in some
        if "distances" in record
        and (rate := record["distances"]["minimum_norm"][spec]["success_rate"]) is not None
    ]
    return statistics.mean(rates) if rates else None


def _distance(some: Sequence[Record], standard: Sequence[Record] | None, spec: str) -> str:
    value, rate = _mean_distance(some, spec), _success_rate(some, spec)
    if math.isnan(value) or rate is None:
        return "-"
    text, unit = f"{value:.3g}", _mean_distance(standard or [], spec)
    if not math.isnan(unit):
        text += f" ({value / unit:.1f}x)"
    return text if rate == 1 else f"{text}, {100 * rate:.0f} % found"


def _seeds(study: plan.Study, name: str, gathered: Gathered, num_judged: int) -> str:
    """Returns how many seeds a row is of, how many there are to be, and how many failed."""
    failed = sum(bool(record.get("failure")) for record in gathered[name])
    num_seeds = len(study.trials[name].seeds)
    text = str(num_judged) if num_judged == num_seeds else f"{num_judged} of {num_seeds}"
    return f"{text}, {failed} failed" if failed else text


def _cost(some: Sequence[Record], standard: Sequence[Record] | None) -> str:
    """Returns the operations of a training, as a multiple of the standard one's.

    Not its time: records come from different machines. Operations are compared on one kind of
    device, since convolutions take other forms on others.
    """

    def by_devices(found: Sequence[Record]) -> dict[str, float]:
        return {
            record["environment"]["devices"]: record["step_flops"] * record["config"]["train_steps"]
            for record in found
            if "training" in record
        }

    ours, unit = by_devices(some), by_devices(standard or [])
    ratios = [ours[devices] / unit[devices] for devices in ours if devices in unit]
    return f"{statistics.mean(ratios):.2f}" if ratios else "-"


def _accuracy(values: Sequence[float], evaluations: Sequence[Mapping[str, Any]]) -> str:
    """Returns an accuracy in % with its uncertainty."""
    mean = 100 * statistics.mean(values)
    if len(values) > 1:
        return f"{mean:.1f} +- {100 * statistics.stdev(values):.1f}"
    size = evaluations[0]["num_examples"]
    low, high = intervals.wilson(round(values[0] * size), size)
    return f"{mean:.1f} ({100 * low:.1f}-{100 * high:.1f})"


def _failing(tests: Sequence[Mapping[str, Any]]) -> str:
    """Returns the diagnostics that fail in any seed, and those that ought to be known and are not.

    Those that invalidate the attacks are in bold.
    """

    def named(status: str) -> list[str]:
        found = (
            entry["id"]
            for one in tests
            for entry in one["diagnostics"]
            if entry["status"] == status
        )
        return list(dict.fromkeys(found))

    failing = [
        f"**{name}**" if name in diagnostics.INVALIDATING else name for name in named("FAIL")
    ]
    unknown = [name for name in named("NA") if name in diagnostics.INVALIDATING]
    text = f"{', '.join(failing) or 'none'} fail" + ("" if len(failing) > 1 else "s")
    if not any(one["diagnostics"] for one in tests):
        return "not made"
    return text + (f"; not measured: {', '.join(unknown)}" if unknown else "")


def _title(spec: str) -> str:
    name, *options = spec.split(":")
    steps = next((part[10:] for part in options if part.startswith("num_steps=")), "")
    return f"{name}-{steps}" if steps else name


def _listed(specs: Sequence[str]) -> str:
    return ", ".join(f"`{spec}`" for spec in specs)


def _radius(epsilon: float) -> str:
    return f"{epsilon * 255:.4g}/255" if epsilon < 0.5 else f"{epsilon:g}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    lines += ["| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in rows]
    return "\n".join(lines)
