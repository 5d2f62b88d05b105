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
from gfa_jax.evaluation import comparison_tables, report

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
    outcomes: Sequence[comparison_tables.Outcomes]
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
        found = float(np.mean(comparison_tables.was_right(outcomes, name)))
        if not math.isclose(found, accuracy, abs_tol=1e-6):
            raise ValueError(
                f"{str(path)!r} does not belong to results.json beside it: the accuracy {name!r} "
                f"is {found} here and {accuracy} there; {again}"
            )
    return outcomes


def tables(comparison: Comparison) -> dict[str, Any]:
    """Returns all that a comparison says, JSON-ready."""
    runs, outcomes = comparison.runs, comparison.outcomes
    return {
        "runs": [run["name"] for run in runs],
        "verdicts": [report.verdict(run) for run in runs],
        **{field: runs[0][field] for field in ("threat", "data", "num_examples", "attacks")},
        "confidence": comparison_tables.CONFIDENCE,
        "accuracy": comparison_tables.accuracy_table(runs, outcomes),
        "differences": comparison_tables.difference_table(runs, outcomes),
        "minimum_norms": comparison_tables.minimum_norm_table(runs, outcomes),
        "diagnostics": comparison_tables.diagnostics_table(runs),
        "training": comparison_tables.training_table(runs),
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
    print_differences(comparison_tables.difference_table(comparison.runs, comparison.outcomes))
    print(f"report: {flags.out}")


if __name__ == "__main__":
    main()
