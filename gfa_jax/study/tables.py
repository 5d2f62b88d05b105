"""Tables of a study from its records, and what their cells say."""

import collections
import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gfa_jax.evaluation import diagnostics, intervals
from gfa_jax.study import plan, records
from gfa_jax.study.records import Gathered, Record

WORST = "worst_case"


def tested_table(study: plan.Study, gathered: Gathered, tested: Gathered) -> list[str]:
    """Returns both protocols side by side, as a Markdown table and a note.

    Args:
      study: what was to be done.
      gathered: all records.
      tested: those that were judged on test images, at least one.
    """
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
        cells.append(_diagnostics(tests))
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
        "Diagnostics of masked gradients: those that fail in any seed, those that warn, and of "
        "those that would make the accuracies upper bounds (in bold) also those that nothing was "
        f"measured for{_unknown_everywhere(tested)}."
    )
    return [markdown(header, rows), note]


def radii_table(study: plan.Study, with_radii: Gathered) -> list[str]:
    """Returns the radii that alignment promises beside DeepFool's, as a Markdown table and a note.

    Args:
      study: what was to be done.
      with_radii: the records that have radii, at least one.
    """
    header = ["training", "images", "radius promised, median", "found, median", "found / promised"]
    epsilon = next(iter(study.trials.values())).config.threat.epsilon
    header += [f"{found} beyond {_radius(epsilon)}" for found in ("promised", "found")]
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
        resists = list(itertools.chain.from_iterable(map(_resists, some)))
        ratios = [found / promised for promised, found in pairs if promised > 0]
        cells = [study.trials[name].label, str(len(pairs))]
        if len(pairs) < 2 or not ratios:
            rows.append([*cells, *["-"] * 5])
            continue
        cells += [f"{statistics.median(side):.4f}" for side in zip(*pairs, strict=True)]
        ends = (sorted(ratios)[round(share * (len(ratios) - 1))] for share in (0.1, 0.9))
        low, high = (f"{end:.2f}" for end in ends)
        of_fewer = f" of {len(ratios)}" if len(ratios) < len(pairs) else ""
        cells.append(f"{statistics.median(ratios):.2f} ({low}-{high}){of_fewer}")
        for side in zip(*pairs, strict=True):
            beyond = [
                right for radius, right in zip(side, resists, strict=True) if radius > epsilon
            ]
            broken = f", {100 * (1 - statistics.mean(beyond)):.0f} % broken" if beyond else ""
            cells.append(f"{100 * len(beyond) / len(pairs):.0f} %{broken}")
        rows.append(cells)
    norm = next(iter(with_radii.values()))[0]["radii"]["norm"]
    note = (
        "Of the test images that are right. Promised: the linear radius |h| a in "
        f"{norm}, from the alignment a of the normalised image h with the gradient of the margin "
        "to the runner-up class, in units of the image; without biases it is that margin over its "
        "gradient's size, where DeepFool's first step starts. Found: DeepFool's, infinite where it "
        "finds nothing; it oversteps by 2 %, and is an upper bound of the true radius. In brackets "
        "the 10 % and 90 % quantiles over images; ratios leave out images that are promised 0 or "
        "less, and then say of how many they are. Broken: by any attack within epsilon, of those "
        "whose radius lies beyond it."
    )
    return [markdown(header, rows), note]


def _resists(record: Record) -> list[bool]:
    """Returns which of the images that are right without attack stay right under all of them."""
    return [bool(right) for right in records.right(record, WORST)[records.right(record, "clean")]]


def search_table(study: plan.Study, gathered: Gathered) -> list[str]:
    """Returns what was tried, why, and what came of it, as a Markdown table and a note.

    Args:
      study: what was to be done.
      gathered: all records.
    """
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
    return [markdown(header, rows), note]


def mean_distance(some: Sequence[Record], spec: str) -> float:
    """Returns the mean distance of successes, the mean over seeds; NaN where there is none."""
    values = [
        value
        for record in some
        if "distances" in record
        and (value := record["distances"]["minimum_norm"][spec]["mean_of_successes"]) is not None
    ]
    return statistics.mean(values) if values else float("nan")


def success_rate(some: Sequence[Record], spec: str) -> float | None:
    """Returns how often a minimum-norm attack succeeded, the mean over seeds, in [0, 1].

    ``None`` where no seed says.
    """
    rates = [
        rate
        for record in some
        if "distances" in record
        and (rate := record["distances"]["minimum_norm"][spec]["success_rate"]) is not None
    ]
    return statistics.mean(rates) if rates else None


def _distance(some: Sequence[Record], standard: Sequence[Record] | None, spec: str) -> str:
    value, rate = mean_distance(some, spec), success_rate(some, spec)
    if math.isnan(value) or rate is None:
        return "-"
    text, unit = f"{value:.3g}", mean_distance(standard or [], spec)
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


def _diagnostics(tests: Sequence[Mapping[str, Any]]) -> str:
    """Returns the diagnostics that fail or warn, and those that ought to be known and are not.

    Those that invalidate the attacks are in bold; with several seeds each says in how many.
    """
    if not any(one["diagnostics"] for one in tests):
        return "not made"

    def named(status: str) -> list[str]:
        seeds = _having(tests, status)
        return [
            (f"**{name}**" if name in diagnostics.INVALIDATING else name)
            + (f" ({count} of {len(tests)} seeds)" if len(tests) > 1 else "")
            for name, count in seeds.items()
        ]

    failing, warning = named("FAIL"), named("WARN")
    unknown = [name for name in _having(tests, "NA") if name in diagnostics.INVALIDATING]
    parts = [f"fail: {', '.join(failing)}" if failing else "none fails"]
    if warning:
        parts.append(f"warn: {', '.join(warning)}")
    if unknown:
        parts.append(f"not measured: {', '.join(unknown)}")
    return "; ".join(parts)


def _having(tests: Iterable[Mapping[str, Any]], status: str) -> collections.Counter[str]:
    """Returns in how many evaluations each diagnostic has a status, in the diagnostics' order."""
    return collections.Counter(
        entry["id"] for one in tests for entry in one["diagnostics"] if entry["status"] == status
    )


def _unknown_everywhere(tested: Gathered) -> str:
    """Returns which diagnostics no evaluation measured, as an aside."""
    tests = [record["test"] for some in tested.values() for record in some]
    made = [one for one in tests if one["diagnostics"]]
    unknown = [name for name, count in _having(made, "NA").items() if count == len(made)]
    return f" (measured for none: {', '.join(unknown)})" if unknown else ""


def _title(spec: str) -> str:
    name, *options = spec.split(":")
    steps = next((part[10:] for part in options if part.startswith("num_steps=")), "")
    return f"{name}-{steps}" if steps else name


def _listed(specs: Sequence[str]) -> str:
    return ", ".join(f"`{spec}`" for spec in specs)


def _radius(epsilon: float) -> str:
    return f"{epsilon * 255:.4g}/255" if epsilon < 0.5 else f"{epsilon:g}"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a table in Markdown; bars within cells become slashes."""
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    lines += ["| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in rows]
    return "\n".join(lines)
