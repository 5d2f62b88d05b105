"""Evaluations side by side, with their uncertainty.

    python -m gfa_jax.evaluation.compare RUN/eval RUN/eval --out report.html

Prints accuracies and their differences to the first run. Writes one report for all, and next to it
the tables as Markdown and JSON.

Intervals and tests (``intervals``) speak of other test images of the same kind. They do not know
how another seed of training would have come out, nor whether a stronger attack exists.
"""

import dataclasses
import io
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import numpy as np
import rich.console
import rich.markup
import rich.table
import tyro

from gfa_jax import cli, files
from gfa_jax.evaluation import intervals, report

Outcomes = Mapping[str, np.ndarray]
"""What ``outcomes.npz`` holds: ``ids``, ``labels``, ``clean_correct``, ``worst_case``, and for each
attack ``robust/...``, ``distance/...`` and ``success/...``, each ``[N]``."""

CONFIDENCE = 0.95
"""Of all intervals."""

_NOTES = (
    "In brackets: intervals of 95 %, over test images alone. They leave out how another seed of "
    "training would have come out. p: exact McNemar test, not corrected for the number of tests."
)


@dataclasses.dataclass(frozen=True)
class CompareFlags:
    """Flags of the comparison."""

    evaluations: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Output folders of eval.py. Differences are to the first."""
    out: str = "report.html"
    """The page to write; .md and .json of the same name come with it."""


class Comparison(NamedTuple):
    """Evaluations that compare, in the order given.

    Attributes:
      runs: their results.
      outcomes: what happened to each example.
      examples: images to show.
    """

    runs: list[dict[str, Any]]
    outcomes: Sequence[Outcomes]
    examples: list[report.Examples]


def compare(evaluations: Sequence[str], out: str) -> list[dict[str, Any]]:
    """Writes page, Markdown and JSON of several evaluations and returns their results.

    Args:
      evaluations: output folders of eval.py; differences are to the first.
      out: the page, ending in ``.html``; ``.md`` and ``.json`` lie next to it.

    Raises:
      ValueError: for no evaluation, an ``out`` of another ending, a damaged file, or evaluations of
        other threats, data, numbers of images, attacks, modes, labels or ids: their rows would not
        compare. Nothing is written then.
      FileNotFoundError: for a folder without results or outcomes.
    """
    comparison = load(evaluations)
    write(comparison, pathlib.Path(out))
    return comparison.runs


def load(evaluations: Sequence[str]) -> Comparison:
    """Reads evaluations that compare; runs of one name are named by their folders.

    Raises:
      ValueError: as ``compare``.
      FileNotFoundError: as ``compare``.
    """
    if not evaluations:
        raise ValueError("evaluations is empty: give the output folders of eval.py.")
    directories = [pathlib.Path(directory) for directory in evaluations]
    loaded = [report.load_evaluation(directory) for directory in directories]
    runs = [{**results, "attacks": sorted(results["counts"])} for results, _ in loaded]
    for field in ("threat", "num_examples", "data", "attacks", "mode"):
        values = {
            directory: run.get(field) for directory, run in zip(evaluations, runs, strict=True)
        }
        if any(run.get(field) != runs[0].get(field) for run in runs):
            raise ValueError(
                f"evaluations differ in {field}, so their accuracies do not compare: {values}."
            )
    outcomes = [
        load_outcomes(directory, run) for directory, run in zip(directories, runs, strict=True)
    ]
    for field in ("ids", "labels"):
        for directory, other in zip(evaluations, outcomes, strict=True):
            rows = np.flatnonzero(other[field] != outcomes[0][field])
            if rows.size:
                row = int(rows[0])
                there = {evaluations[0]: int(outcomes[0][field][row])}
                there[directory] = int(other[field][row])
                raise ValueError(
                    f"evaluations differ in {field} of {rows.size} examples, so their accuracies "
                    f"do not compare; the first is row {row}: {there}."
                )
    names = [run["name"] for run in runs]
    for directory, run in zip(evaluations, runs, strict=True):
        if names.count(run["name"]) > 1:
            run["name"] = directory
    return Comparison(runs, outcomes, [shown for _, shown in loaded])


def load_outcomes(directory: pathlib.Path, results: report.Results) -> dict[str, np.ndarray]:
    """Reads what happened to each example; nothing is unpickled.

    Args:
      directory: output folder of eval.py.
      results: of the same folder.

    Raises:
      FileNotFoundError: for a folder without ``outcomes.npz``, as an older version left it.
      ValueError: for a damaged file, or one that does not belong to the results.
    """
    path = directory / "outcomes.npz"
    again = "run eval.py again with the same --out folder."
    if not path.is_file():
        raise FileNotFoundError(f"{str(directory)!r} holds no outcomes.npz: {again}")
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as stored:
            outcomes = {name: stored[name] for name in stored.files}
    except Exception as error:
        raise ValueError(f"{str(path)!r} is damaged ({error}); {again}") from error
    kinds = {"ids": "iu", "labels": "iu", "clean_correct": "b", "worst_case": "b"}
    kinds |= {f"robust/{spec}": "b" for spec in results["counts"]}
    for spec in results["minimum_norm"]:
        kinds |= {f"distance/{spec}": "f", f"success/{spec}": "b"}
    shape = (results["num_examples"],)
    for name, kind in kinds.items():
        if name not in outcomes:
            raise ValueError(f"{str(path)!r} is damaged: it holds no {name!r}; {again}")
        value = outcomes[name]
        if value.shape != shape or value.dtype.kind not in kind:
            raise ValueError(
                f"{str(path)!r} is damaged: {name!r} has dtype {value.dtype} and shape "
                f"{value.shape}, which does not fit {shape[0]} examples; {again}"
            )
    stated = {"clean": results["clean_accuracy"], **results["robust_accuracy"]}
    for name, accuracy in stated.items():
        found = float(np.mean(_right(outcomes, name)))
        if not math.isclose(found, accuracy, abs_tol=1e-6):
            raise ValueError(
                f"{str(path)!r} does not belong to results.json beside it: the accuracy {name!r} "
                f"is {found} here and {accuracy} there; {again}"
            )
    return outcomes


def _right(outcomes: Outcomes, name: str) -> np.ndarray:
    """Returns which examples are right: ``clean``, under an attack, or in the ``worst_case``."""
    keys = {"clean": "clean_correct", "worst_case": "worst_case"}
    return outcomes[keys.get(name, f"robust/{name}")]


def _accuracies(runs: Sequence[report.Results]) -> list[str]:
    return ["clean", *report.attack_names(runs)]


def _finite(value: float) -> float | None:
    """JSON holds finite numbers only."""
    return value if math.isfinite(value) else None


def accuracy_table(
    runs: Sequence[report.Results], outcomes: Sequence[Outcomes]
) -> list[dict[str, Any]]:
    """Returns for each run and accuracy ``accuracy`` in [0, 1] with Wilson's ``low`` and ``high``.

    The accuracies (``attack``) are ``clean``, each attack, and ``worst_case``.
    """
    rows = []
    for run, found in zip(runs, outcomes, strict=True):
        for name in _accuracies(runs):
            right = _right(found, name)
            num_correct = int(right.sum())
            low, high = intervals.wilson(num_correct, len(right), CONFIDENCE)
            rows.append(
                {
                    "run": run["name"],
                    "attack": name,
                    "num_correct": num_correct,
                    "num_examples": len(right),
                    "accuracy": num_correct / len(right),
                    "low": low,
                    "high": high,
                }
            )
    return rows


def difference_table(
    runs: Sequence[report.Results], outcomes: Sequence[Outcomes]
) -> list[dict[str, Any]]:
    """Returns how every other run differs from the first in each accuracy, on the same examples.

    ``difference`` is this run's accuracy less the first's, in [-1, 1], with ``low``, ``high`` and
    the ``p`` of equal accuracies; ``only_here`` and ``only_first`` count the examples that are
    right in one of the two alone.
    """
    rows = []
    for run, found in zip(runs[1:], outcomes[1:], strict=True):
        for name in _accuracies(runs):
            here, first = _right(found, name), _right(outcomes[0], name)
            difference, low, high = intervals.paired_difference(here, first, CONFIDENCE)
            rows.append(
                {
                    "run": run["name"],
                    "first": runs[0]["name"],
                    "attack": name,
                    "difference": difference,
                    "low": low,
                    "high": high,
                    "p": intervals.paired_test(here, first),
                    "only_here": int(np.sum(here & ~first)),
                    "only_first": int(np.sum(first & ~here)),
                }
            )
    return rows


def minimum_norm_table(
    runs: Sequence[report.Results], outcomes: Sequence[Outcomes]
) -> list[dict[str, Any]]:
    """Returns the median smallest perturbation of each run and minimum-norm attack.

    It is over the ``num_inputs`` that are right without an attack and were attacked; failures are
    infinite, which JSON says as ``None``. ``ratio`` is to the first run's median: ``None`` where
    one of them is infinite or zero, or the attack left inputs of one of them out (sequential mode).
    """
    rows = []
    for spec in runs[0]["minimum_norm"]:
        first: float | None = None
        for number, (run, found) in enumerate(zip(runs, outcomes, strict=True)):
            right = found["clean_correct"]
            chosen = right & found.get(f"attacked/{spec}", np.ones_like(right))
            success = found[f"success/{spec}"][chosen]
            values = np.where(success, found[f"distance/{spec}"][chosen], np.inf)
            size = int(values.size)
            median = _finite(float(np.median(values))) if size else None
            low, high = (
                intervals.median_interval(values, CONFIDENCE) if size else (-math.inf, math.inf)
            )
            comparable = median if np.array_equal(chosen, right) else None
            if number == 0:
                first = comparable
            rows.append(
                {
                    "run": run["name"],
                    "attack": spec,
                    "num_inputs": size,
                    "success_rate": float(success.mean()) if size else None,
                    "median": median,
                    # Norms are never negative.
                    "low": _finite(max(low, 0.0)),
                    "high": _finite(high),
                    "ratio": comparable / first if comparable is not None and first else None,
                }
            )
    return rows


def diagnostics_table(runs: Sequence[report.Results]) -> list[dict[str, Any]]:
    """Returns for each diagnostic its ``id``, ``name`` and the ``status`` in each run, in order.

    The status of a run that does not have it is ``None``.
    """
    by_run = [{entry["id"]: entry for entry in run["diagnostics"]} for run in runs]
    entries = {identifier: entry for run in reversed(by_run) for identifier, entry in run.items()}
    order = dict.fromkeys(identifier for run in by_run for identifier in run)
    return [
        {
            "id": identifier,
            "name": entries[identifier].get("name", ""),
            "status": [run.get(identifier, {}).get("status") for run in by_run],
        }
        for identifier in order
    ]


def training_table(runs: Sequence[report.Results]) -> list[dict[str, Any]]:
    """Returns ``steps``, ``examples`` and ``seconds`` of each training; ``None`` if unknown."""
    fields = ("steps", "examples", "seconds")
    return [
        {
            "run": run["name"],
            **{field: (run.get("training") or {}).get(field) for field in fields},
        }
        for run in runs
    ]


def tables(comparison: Comparison) -> dict[str, Any]:
    """Returns all that a comparison says, JSON-ready."""
    runs, outcomes = comparison.runs, comparison.outcomes
    return {
        "runs": [run["name"] for run in runs],
        "verdicts": [report.verdict(run) for run in runs],
        **{field: runs[0][field] for field in ("threat", "data", "num_examples", "attacks")},
        "confidence": CONFIDENCE,
        "accuracy": accuracy_table(runs, outcomes),
        "differences": difference_table(runs, outcomes),
        "minimum_norms": minimum_norm_table(runs, outcomes),
        "diagnostics": diagnostics_table(runs),
        "training": training_table(runs),
    }


def write(comparison: Comparison, path: pathlib.Path) -> None:
    """Writes the page, and Markdown and JSON next to it.

    Raises:
      ValueError: for a path that does not end in ``.html``.
    """
    if path.suffix != ".html":
        raise ValueError(
            f"out={str(path)!r} must end in .html; .md and .json of the same name come with it."
        )
    found = tables(comparison)
    text = markdown(found)
    report.write_report(list(zip(comparison.runs, comparison.examples, strict=True)), path)
    files.write_bytes(path.with_suffix(".md"), text.encode())
    files.write_json(path.with_suffix(".json"), found)


_DIFFERENCE_COLUMNS = ("run", "attack", "points", "95 %", "p", "right here alone", "first alone")


def _title(name: str) -> str:
    return name.replace("worst_case", "worst case")


def _points(value: float) -> str:
    return f"{100 * value:+.1f}"


def _interval(low: str, high: str) -> str:
    return f"[{low}, {high}]"


def _p(value: float) -> str:
    return "<0.0001" if value < 1e-4 else f"{value:.2g}"


def _number(value: float | None, pattern: str, missing: str = "-") -> str:
    return missing if value is None else pattern.format(value)


def _difference_rows(found: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    return [
        [
            str(row["run"]),
            _title(row["attack"]),
            _points(row["difference"]),
            _interval(_points(row["low"]), _points(row["high"])),
            _p(row["p"]),
            str(row["only_here"]),
            str(row["only_first"]),
        ]
        for row in found
    ]


def _escape(text: str) -> str:
    """Returns text that Markdown shows as it is, also in a table."""
    text = re.sub(r"\s+", " ", text)
    return re.sub(r"[\\`*<>|]|(?<=\])\(|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", text)


def _markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> str:
    """Returns a table whose first ``texts`` columns are text, and the others aligned right."""
    rule = ["---" if number < texts else "---:" for number in range(len(columns))]
    cells = [[_escape(cell) for cell in row] for row in (columns, *rows)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (cells[0], rule, *cells[1:]))


def markdown(found: Mapping[str, Any]) -> str:
    """Returns Markdown of what ``tables`` returns: verdicts, then the tables."""
    names, threat = found["runs"], found["threat"]
    accuracies = list(dict.fromkeys(row["attack"] for row in found["accuracy"]))
    cells = [
        f"{100 * row['accuracy']:.1f} "
        + _interval(f"{100 * row['low']:.1f}", f"{100 * row['high']:.1f}")
        for row in found["accuracy"]
    ]
    width = len(accuracies)
    parts = [
        "# Comparison of " + ", ".join(_escape(str(name)) for name in names),
        *(f"* {_escape(text)}" for text in found["verdicts"]),
        f"Accuracy in % of {found['num_examples']} images of {_escape(found['data']['name'])}, at "
        f"{threat['norm']} {threat['epsilon']:.4g}. {_NOTES}",
        "## Accuracy",
        _markdown_table(
            ["run", *map(_title, accuracies)],
            [
                [str(name), *cells[width * number : width * (number + 1)]]
                for number, name in enumerate(names)
            ],
        ),
    ]
    if found["differences"]:
        parts += [
            f"## Difference to {_escape(str(names[0]))}",
            _markdown_table(_DIFFERENCE_COLUMNS, _difference_rows(found["differences"]), texts=2),
        ]
    if found["minimum_norms"]:
        parts += [
            "## Smallest perturbations",
            "Over the inputs that are right without an attack; failures count as infinite.",
            _markdown_table(
                ["run", "attack", "inputs", "success in %", "median", "95 %", "ratio to the first"],
                [
                    [
                        str(row["run"]),
                        row["attack"],
                        str(row["num_inputs"]),
                        _number(
                            None if row["success_rate"] is None else 100 * row["success_rate"],
                            "{:.1f}",
                        ),
                        _number(row["median"], "{:.4g}", "inf" if row["num_inputs"] else "-"),
                        _interval(
                            _number(row["low"], "{:.4g}", "inf"),
                            _number(row["high"], "{:.4g}", "inf"),
                        ),
                        _number(row["ratio"], "{:.2f}"),
                    ]
                    for row in found["minimum_norms"]
                ],
                texts=2,
            ),
        ]
    parts += [
        "## Diagnostics",
        _markdown_table(
            ["id", "name", *map(str, names)],
            [
                [row["id"], row["name"], *(status or "-" for status in row["status"])]
                for row in found["diagnostics"]
            ],
            texts=2 + len(names),
        ),
        "## Training",
        _markdown_table(
            ["run", "steps", "examples", "seconds"],
            [
                [
                    str(row["run"]),
                    *(_number(row[field], "{:.0f}") for field in ("steps", "examples", "seconds")),
                ]
                for row in found["training"]
            ],
        ),
    ]
    # The verdicts are one list; everything else stands apart.
    return re.sub(r"\n\n(?=\* )", "\n", "\n\n".join(parts)).replace("\n* ", "\n\n* ", 1) + "\n"


def print_differences(differences: Sequence[Mapping[str, Any]]) -> None:
    """Prints the rows of ``difference_table`` on standard output; nothing for a single run."""
    if not differences:
        return
    first = rich.markup.escape(str(differences[0]["first"]))
    table = rich.table.Table(title=f"difference to {first}, in points")
    for number, column in enumerate(_DIFFERENCE_COLUMNS):
        table.add_column(
            column, justify="left" if number < 2 else "right", no_wrap=column == "95 %"
        )
    for row in _difference_rows(differences):
        # Brackets are an interval here, not a style.
        table.add_row(*(rich.markup.escape(cell) for cell in row))
    rich.console.Console(highlight=False).print(table)


def main() -> None:
    """Parses flags, compares and prints the tables."""
    flags = cli.parse(
        CompareFlags, description="Compares evaluations: tables here, and one HTML report."
    )
    comparison = cli.run_or_fail(lambda: load(flags.evaluations))
    cli.run_or_fail(lambda: write(comparison, pathlib.Path(flags.out)))
    report.print_table(comparison.runs)
    print_differences(difference_table(comparison.runs, comparison.outcomes))
    print(f"report: {flags.out}")


if __name__ == "__main__":
    main()
