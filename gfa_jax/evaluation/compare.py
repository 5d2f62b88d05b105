"""Evaluations side by side.

    python -m gfa_jax.evaluation.compare RUN/eval RUN/eval --out report.html

Prints the accuracy table and writes one report for all.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Annotated, Any

import tyro

from gfa_jax import cli
from gfa_jax.evaluation import report


@dataclasses.dataclass(frozen=True)
class CompareFlags:
    """Flags of the comparison."""

    evaluations: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Output folders of eval.py."""
    out: str = "report.html"
    """The page to write."""


def compare(evaluations: Sequence[str], out: str) -> list[dict[str, Any]]:
    """Writes the report of several evaluations and returns their results.

    Raises:
      ValueError: for no evaluation, or evaluations of other threats, data, numbers of images or
        attacks: their rows would not compare.
      FileNotFoundError: for a folder without results.
    """
    if not evaluations:
        raise ValueError("evaluations is empty: give the output folders of eval.py.")
    loaded = [report.load_evaluation(pathlib.Path(directory)) for directory in evaluations]
    runs = [{**results, "attacks": sorted(results["counts"])} for results, _ in loaded]
    for field in ("threat", "num_examples", "data", "attacks"):
        values = {directory: run[field] for directory, run in zip(evaluations, runs, strict=True)}
        if any(value != runs[0][field] for value in values.values()):
            raise ValueError(
                f"evaluations differ in {field}, so their accuracies do not compare: {values}."
            )
    names = [run["name"] for run in runs]
    for directory, run in zip(evaluations, runs, strict=True):
        if names.count(run["name"]) > 1:
            run["name"] = directory
    examples = [shown for _, shown in loaded]
    report.write_report(list(zip(runs, examples, strict=True)), pathlib.Path(out))
    return runs


def main() -> None:
    """Parses flags, compares and prints the table."""
    flags = cli.parse(
        CompareFlags, description="Compares evaluations: a table here, and one HTML report."
    )
    results = cli.run_or_fail(lambda: compare(flags.evaluations, flags.out))
    report.print_table(results)
    print(f"report: {flags.out}")


if __name__ == "__main__":
    main()
