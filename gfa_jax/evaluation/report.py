"""Results as a table on the terminal and as one self-contained HTML page."""

import io
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import numpy as np
import rich.console
import rich.table

from gfa_jax import files
from gfa_jax.evaluation import diagnostics, plots

Results = Mapping[str, Any]
Examples = Mapping[str, np.ndarray]


def verdict(results: Results) -> str:
    """Returns one sentence: how robust, against what, and whether to believe it."""
    threat = results["threat"]
    worst = results["robust_accuracy"]["worst_case"]
    names = ", ".join(name for name in results["robust_accuracy"] if name != "worst_case")
    sentence = (
        f"{results['name']}: {results['clean_accuracy']:.1%} of {results['num_examples']} test "
        f"images are right, and {worst:.1%} stay right under the worst of {names} at "
        f"{threat['norm']} {threat['epsilon']:.4g}."
    )
    if diagnostics.masking_suspected(results["diagnostics"]):
        return sentence + " Upper bound, gradient masking suspected: see the diagnostics."
    return sentence


def attack_names(runs: Sequence[Results]) -> list[str]:
    """Returns the attacks of all runs in order, ``worst_case`` last."""
    names = list(
        dict.fromkeys(
            name for run in runs for name in run["robust_accuracy"] if name != "worst_case"
        )
    )
    return [*names, "worst_case"]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def accuracy_rows(runs: Sequence[Results]) -> list[list[str]]:
    """Returns a row for each run: name, then clean, attacked and worst-case accuracy in percent."""
    names = attack_names(runs)
    return [
        [
            str(run["name"]),
            _percent(run["clean_accuracy"]),
            *(_percent(run["robust_accuracy"].get(name)) for name in names),
        ]
        for run in runs
    ]


def accuracy_columns(runs: Sequence[Results]) -> list[str]:
    """Returns the headings of ``accuracy_rows``."""
    return [
        "run",
        "clean",
        *("worst case" if name == "worst_case" else name for name in attack_names(runs)),
    ]


_SHOWN = (
    *("clean_accuracy", "robust_accuracy", "intervals", "first_broken_by", "members"),
    *("minimum_norm", "curves", "layers", "directions", "geometry", "diagnostics"),
    *("verification", "counts", "threat", "data", "num_examples", "versions", "mode"),
    *("name", "weights_hash", "precision", "seconds"),
)
_SHOWN_OF_EACH = {
    "layers": (
        *("alignment_mean", "radial_degree_median"),
        *("tangential_share_mean", "tangential_shares"),
    ),
    "counts": ("num_forwards", "num_backwards", "num_zero_gradients"),
    "verification": ("num_successes", "not_misled", "outside", "other_distance"),
    "diagnostics": ("id", "name", "status", "value", "threshold", "n", "meaning"),
}
_STATUSES = ("FAIL", "WARN", "PASS", "NA")


def _with_intervals(run: Results, row: list[str], names: Sequence[str]) -> list[str]:
    """Returns a row of ``accuracy_rows`` with Wilson's 95 % intervals."""
    cells = [row[0]]
    for name, text in zip(names, row[1:], strict=True):
        interval = run["intervals"].get(name)
        low, high = interval or (None, None)
        cells.append(f"{text} ({_percent(low)}-{_percent(high)})" if interval else text)
    return cells


def _missing_fields(run: Results) -> list[str]:
    """Returns what the page shows and the results lack."""
    missing = [field for field in _SHOWN if field not in run]
    for group, fields in _SHOWN_OF_EACH.items():
        entries = run.get(group, ())
        for entry in entries.values() if isinstance(entries, Mapping) else entries:
            missing += [f"{group}.{field}" for field in fields if field not in entry]
    return list(dict.fromkeys(missing))


def print_table(runs: Sequence[Results]) -> None:
    """Prints accuracies (in percent) and verdicts on standard output."""
    console = rich.console.Console(highlight=False)
    threat = runs[0]["threat"]
    table = rich.table.Table(
        title=(
            f"accuracy in % at {threat['norm']} {threat['epsilon']:.4g}, "
            f"{runs[0]['num_examples']} {runs[0]['data']['split']} images"
        )
    )
    for number, column in enumerate(accuracy_columns(runs)):
        table.add_column(column, justify="left" if number == 0 else "right")
    for row in accuracy_rows(runs):
        table.add_row(*row)
    console.print(table)
    for run in runs:
        console.print(verdict(run), markup=False, soft_wrap=True)


def save_examples(path: pathlib.Path, examples: Examples) -> None:
    """Writes the shown examples as an ``.npz`` of plain arrays, atomically."""
    buffer = io.BytesIO()
    np.savez(buffer, **examples)  # type: ignore[arg-type]
    files.write_bytes(path, buffer.getvalue())


def load_evaluation(directory: pathlib.Path) -> tuple[Results, Examples]:
    """Reads what ``evaluate`` wrote.

    Raises:
      FileNotFoundError: for a folder without results, saying how to make them.
    """
    for name in ("results.json", "examples.npz"):
        if not (directory / name).is_file():
            raise FileNotFoundError(
                f"{str(directory)!r} holds no {name}: run eval.py first, and give its --out folder."
            )
    with np.load(directory / "examples.npz", allow_pickle=False) as stored:
        examples = {name: stored[name] for name in stored.files}
    return files.read_json(directory / "results.json"), examples


def write_report(evaluations: Sequence[tuple[Results, Examples]], path: pathlib.Path) -> None:
    """Writes one HTML page for one or more evaluations, without links to anything outside it.

    Args:
      evaluations: results and shown examples of each run.
      path: of the page.

    Raises:
      ValueError: for results of an older version, which lack what is shown.
    """
    runs = [results for results, _ in evaluations]
    for run in runs:
        missing = _missing_fields(run)
        if missing:
            raise ValueError(
                f"the results of {run.get('name', 'a run')!r} were written by an older version and "
                f"lack {', '.join(missing)}: evaluate again in another --out folder."
            )
    rows = accuracy_rows(runs)
    names = ["clean", *attack_names(runs)]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("gfa_jax.evaluation"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    page = environment.get_template("report.html.jinja").render(
        title="Robustness report: " + ", ".join(str(run["name"]) for run in runs),
        runs=runs,
        verdicts=[verdict(run) for run in runs],
        suspected=[diagnostics.masking_suspected(run["diagnostics"]) for run in runs],
        columns=accuracy_columns(runs),
        rows=[_with_intervals(run, row, names) for run, row in zip(runs, rows, strict=True)],
        percent=_percent,
        statuses=_STATUSES,
        layers=plots.layer_names(runs),
        themes={"light": plots.LIGHT, "dark": plots.DARK},
        pictures={
            "curve": plots.accuracy_against_epsilon(runs),
            "minimum_norms": plots.minimum_norms(runs),
            "layers": plots.layer_alignment(runs),
            "directions": plots.loss_along_directions(runs),
            "surfaces": [plots.loss_surface(run) for run in runs],
        },
        direction_keys=plots.direction_keys(),
        magnifications=[plots.magnification(examples) for _, examples in evaluations],
        shown=[plots.shown_images(examples) for _, examples in evaluations],
    )
    files.write_bytes(path, page.encode())
