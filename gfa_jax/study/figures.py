"""The pictures of a study's page, as PNG files: readable in any Markdown viewer."""

import io
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gfa_jax.study.records import Record

Series = Mapping[str, Sequence[Record]]
"""Tested records by the label of their trial."""

_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
_STYLES = ("-", "--", "-.", ":")
_MARKERS = ("o", "s", "^", "D")
"""They change where colours begin anew."""


def accuracy_curves(series: Series) -> bytes:
    """Returns accuracy against the radius of each curve's attack, means over seeds."""
    attacks = [curve["attack"] for curve in _first(series)["test"]["curves"]]
    figure, panels = _figure(len(attacks))
    epsilon = _first(series)["test"]["threat"]["epsilon"]
    for axes, attack in zip(panels, attacks, strict=True):
        for label, color, style, records in _styled(series):
            curves = [
                next(one for one in record["test"]["curves"] if one["attack"] == attack)["points"]
                for record in records
            ]
            radii = [point["epsilon"] for point in curves[0] if point["epsilon"] <= 3 * epsilon]
            means = [_mean([curve[i]["accuracy"] for curve in curves]) for i in range(len(radii))]
            unit = 255 if epsilon < 0.5 else 1
            axes.plot([radius * unit for radius in radii], means, style, color=color, label=label)
        axes.axvline(epsilon * (255 if epsilon < 0.5 else 1), color="#999999", linewidth=0.8)
        axes.set(title=attack, xlabel="radius" + (" x 255" if epsilon < 0.5 else ""))
        axes.set_ylim(bottom=0)
    panels[0].set_ylabel("accuracy")
    _legend(figure, panels)
    return _png(figure)


def distances(series: Series, specs: Sequence[str]) -> bytes:
    """Returns how many right images each minimum-norm attack breaks within a distance."""
    figure, panels = _figure(len(specs))
    for axes, spec in zip(panels, specs, strict=True):
        for label, color, style, records in _styled(series):
            found = records[0]["test"]["minimum_norm"][spec]
            if found["cdf"]:
                axes.plot(*zip(*found["cdf"], strict=True), style, color=color, label=label)
        axes.set(title=spec, xlabel=f"distance ({found['norm']})", xscale="log")
        axes.set_ylim(0, 1)
    panels[0].set_ylabel("share of right images broken")
    _legend(figure, panels)
    return _png(figure)


def alignment_and_robustness(series: Series) -> bytes:
    """Returns alignment at the input against worst-case accuracy, a dot for each trained model."""
    figure, (left, right) = _figure(2)
    for label, color, style, records in _styled(series):
        marker = _MARKERS[_STYLES.index(style)]
        for number, record in enumerate(records):
            worst = record["test"]["robust_accuracy"]["worst_case"]
            layers = list(record["test"]["layers"].values())
            if "radii" in record:
                # In one norm for all, whatever each was trained with.
                aligned = _mean(record["radii"]["alignment"])
                left.plot(aligned, worst, marker, color=color)
            right.plot(
                _mean([layer["alignment_mean"] for layer in layers[1:]]),
                worst,
                marker,
                color=color,
                label=label if number == 0 else None,
            )
    for axes in (left, right):
        axes.locator_params(axis="x", nbins=5)  # Small numbers are long.
    left.set(xlabel="alignment at the input (margin)", ylabel="worst-case accuracy")
    right.set(xlabel="alignment of hidden layers (log-odds)")
    _legend(figure, [right])
    return _png(figure)


def tangential_shares(series: Series, spec: str) -> bytes:
    """Returns the tangential share of an attack's perturbations at every layer."""
    figure, (axes,) = _figure(1)
    for label, color, style, records in _styled(series):
        layers = records[0]["test"]["layers"]
        shares = [
            _mean(
                [
                    share
                    for record in records
                    if (share := record["test"]["layers"][layer]["tangential_shares"].get(spec))
                    is not None
                ]
            )
            for layer in layers
        ]
        axes.plot(list(layers), shares, style, color=color, label=label, marker=".")
    axes.set(ylabel="tangential share of the perturbation", title=spec)
    axes.tick_params(axis="x", rotation=30)
    _legend(figure, [axes])
    return _png(figure)


def radii(series: Series) -> bytes:
    """Returns the radius that alignment promises against the one that DeepFool finds.

    On the line, what the radius identity says of a linear network is what an attack finds; below
    it, the network bends and the attack needs less. With biases the identity does not hold.
    """
    pairs = {
        label: [
            (linear, measured)
            for record in records
            for linear, measured in zip(
                record["radii"]["linear"], record["radii"]["measured"], strict=True
            )
            if measured is not None
        ]
        for label, records in series.items()
    }
    largest = max((max(pair) for some in pairs.values() for pair in some), default=0.0)
    figure, panels = _grid(len(pairs))
    for axes, (label, some) in zip(panels, pairs.items(), strict=True):
        axes.plot([0, largest], [0, largest], color="#999999", linewidth=0.8)
        if some:
            axes.plot(*zip(*some, strict=True), "o", color=_COLORS[0], ms=2, alpha=0.5)
        _entitle(axes, label)
    figure.supxlabel("radius that alignment promises", fontsize=8)
    figure.supylabel("radius that DeepFool finds", fontsize=8)
    return _png(figure)


def surfaces(series: Series) -> bytes | None:
    """Returns the log-odds over the plane of an attack's direction and a random one.

    ``None`` where no training has a whole one: its attack broke nothing, or logits are not finite.
    """
    shown = {
        label: surface
        for label, records in series.items()
        if (surface := records[0]["test"].get("loss_surface")) is not None
        and not any(value is None for row in surface["median_log_odds"] for value in row)
    }
    if not shown:
        return None
    figure, panels = _grid(len(shown))
    limit = max(
        abs(value)
        for surface in shown.values()
        for row in surface["median_log_odds"]
        for value in row
    )
    levels = [limit * i / 8 for i in range(-8, 9)]  # White where neither side is more likely.
    drawn: Any = None
    for axes, (label, surface) in zip(panels, shown.items(), strict=True):
        lengths = surface["lengths"]
        drawn = axes.contourf(lengths, lengths, surface["median_log_odds"], levels, cmap="RdBu_r")
        axes.contour(lengths, lengths, surface["median_log_odds"], [0], colors="black")
        _entitle(axes, label)
    figure.colorbar(drawn, ax=panels, label="median log-odds")
    figure.supxlabel("random direction, epsilons", fontsize=8)
    figure.supylabel("direction of the attack, epsilons", fontsize=8)
    return _png(figure)


def _styled(series: Series) -> list[tuple[str, str, str, Sequence[Record]]]:
    return [
        (label, _COLORS[i % len(_COLORS)], _STYLES[i // len(_COLORS) % len(_STYLES)], records)
        for i, (label, records) in enumerate(series.items())
    ]


def _first(series: Series) -> Record:
    return next(iter(series.values()))[0]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def _entitle(axes: Axes, label: str) -> None:
    """Writes a training's label over its panel, in lines no wider than it."""
    axes.set_title(textwrap.fill(label, 32), fontsize=8)
    axes.tick_params(labelsize=7)
    axes.locator_params(axis="x", nbins=6)


def _figure(num_panels: int) -> tuple[Figure, list[Axes]]:
    # The legend lies to the right.
    figure = Figure(figsize=(4.2 * num_panels + 2.2, 3.4), layout="constrained")
    made: Any = figure.subplots(1, num_panels, squeeze=False)
    for axes in made[0]:
        axes.grid(color="#dddddd", linewidth=0.6)
    return figure, list(made[0])


def _grid(num_panels: int) -> tuple[Figure, list[Axes]]:
    """Returns small panels, four in a row."""
    columns = min(4, num_panels)
    rows = -(-num_panels // columns)
    figure = Figure(figsize=(2.7 * columns + 0.6, 2.5 * rows), layout="constrained")
    made: Any = figure.subplots(rows, columns, squeeze=False)
    for axes in made.ravel()[num_panels:]:
        axes.remove()
    return figure, list(made.ravel()[:num_panels])


def _legend(figure: Figure, panels: Sequence[Axes]) -> None:
    """Names what the last panel shows, beside it: trainings are too many to lie on it."""
    handles, labels = panels[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=7, frameon=False)


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    # Without the version of matplotlib in it, so that equal pictures are equal files.
    figure.savefig(file, format="png", dpi=130, metadata={"Software": None})
    return file.getvalue()
