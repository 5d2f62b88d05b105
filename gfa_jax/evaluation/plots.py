"""The report's pictures, as data URIs."""

import base64
import io
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Colours that stay apart in print and for colour-blind readers (Okabe & Ito).
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vPX"
_DIRECTION_LABELS = {
    "radial": "radial (along the feature)",
    "random_tangential": "tangential, random",
    "worst_tangential": "tangential, worst case",
}

Results = Mapping[str, Any]


def _encode(figure: Figure) -> str:
    buffer = io.BytesIO()
    # The same results give the same bytes.
    with matplotlib.rc_context({"svg.hashsalt": "gfa_jax"}):
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def _text(name: object) -> str:
    """Returns a name as Matplotlib shows it: no formula, and in legends despite an underscore."""
    text = str(name).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def _number(value: float | None) -> float:
    """Returns the value, or NaN, which leaves a gap, for a missing one."""
    return np.nan if value is None else value


def _style(axes: Axes) -> None:
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _mark_epsilon(axes: Axes, epsilon: float) -> None:
    axes.axvline(epsilon, color="#888888", linewidth=0.8, linestyle="--")
    axes.annotate(
        f" epsilon {epsilon:.3g}",
        (epsilon, 1),
        xycoords=("data", "axes fraction"),
        va="top",
        color="#666666",
        fontsize=8,
    )


_LINES = ("-", "--", ":", "-.")


def _attack_name(spec: str) -> str:
    return spec.split(":")[0]


def accuracy_against_epsilon(runs: Sequence[Results]) -> str:
    """Draws accuracy under each curve's attack against its radius, from 0 to the whole box."""
    figure = Figure(figsize=(7, 3.6))
    axes = figure.subplots()
    for number, run in enumerate(runs):
        for curve, line in zip(run["curves"], itertools.cycle(_LINES), strict=False):
            axes.plot(
                [point["epsilon"] for point in curve["points"]],
                [100 * point["accuracy"] for point in curve["points"]],
                color=COLORS[number % len(COLORS)],
                marker=_MARKERS[number % len(_MARKERS)],
                linestyle=line,
                markersize=4,
                label=_text(f"{run['name']}, {_attack_name(curve['attack'])}"),
            )
    threat = runs[0]["threat"]
    _mark_epsilon(axes, threat["epsilon"])
    axes.set_xlabel(f"{threat['norm']} radius")
    axes.set_ylabel("accuracy in %")
    axes.set_xscale("symlog", linthresh=max(threat["epsilon"], 1e-6))
    axes.set_xlim(0)
    axes.set_ylim(0, 102)
    axes.legend(frameon=False)
    _style(axes)
    return _encode(figure)


def minimum_norms(runs: Sequence[Results]) -> str | None:
    """Draws the share of images that each minimum-norm attack breaks within a distance.

    Returns:
      The picture, or ``None`` without such an attack.
    """
    if not any(found["cdf"] for run in runs for found in run["minimum_norm"].values()):
        return None
    figure = Figure(figsize=(7, 3.6))
    axes = figure.subplots()
    for number, run in enumerate(runs):
        for (spec, found), line in zip(
            run["minimum_norm"].items(), itertools.cycle(_LINES), strict=False
        ):
            # From no image at distance 0 on; a failure is never reached.
            points = [[0.0, 0.0], *found["cdf"]]
            axes.step(
                [distance for distance, _ in points],
                [100 * share for _, share in points],
                where="post",
                color=COLORS[number % len(COLORS)],
                linestyle=line,
                label=_text(f"{run['name']}, {_attack_name(spec)}"),
            )
    threat = runs[0]["threat"]
    _mark_epsilon(axes, threat["epsilon"])
    axes.set_xlabel(f"{threat['norm']} distance")
    axes.set_ylabel("images broken in %")
    axes.set_xlim(0)
    axes.set_ylim(0, 102)
    axes.legend(frameon=False, fontsize=8)
    _style(axes)
    return _encode(figure)


def layer_alignment(runs: Sequence[Results]) -> str:
    """Draws mean alignment and median radial degree of each layer, side by side for all runs."""
    names = list(dict.fromkeys(name for run in runs for name in run["layers"]))
    figure = Figure(figsize=(7, 1.2 + 0.36 * len(names) * max(1, len(runs) / 2)))
    left, right = figure.subplots(1, 2, sharey=True)
    positions = np.arange(len(names))
    height = 0.8 / len(runs)
    for axes, field in ((left, "alignment_mean"), (right, "radial_degree_median")):
        for number, run in enumerate(runs):
            values = [_number(run["layers"].get(name, {}).get(field)) for name in names]
            offset = (number - (len(runs) - 1) / 2) * height
            axes.barh(
                positions + offset,
                values,
                height,
                color=COLORS[number % len(COLORS)],
                label=_text(run["name"]),
            )
        axes.axvline(0, color="#444444", linewidth=0.8)
        _style(axes)
    left.set_yticks(positions, names)
    left.invert_yaxis()
    left.set_xlabel("mean alignment (1 is the goal)")
    right.set_xlabel("median radial degree (1: homogeneous)")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, loc="upper center", ncols=len(runs))
    return _encode(figure)


def loss_along_directions(runs: Sequence[Results]) -> str:
    """Draws the median log-odds of being wrong where the normalised input is moved.

    It is moved radially and tangentially; there is a panel for each run.
    """
    figure = Figure(figsize=(3.6 * len(runs) + 0.6, 3.2))
    panels = figure.subplots(1, len(runs), sharey=True, squeeze=False)[0]
    for axes, run in zip(panels, runs, strict=True):
        directions = run["directions"]
        for color, (name, label) in zip(COLORS, _DIRECTION_LABELS.items(), strict=False):
            axes.plot(
                directions["lengths"],
                [_number(value) for value in directions["median_log_odds"][name]],
                color=color,
                label=label,
            )
        axes.axhline(0, color="#888888", linewidth=0.8, linestyle="--")
        axes.set_title(_text(run["name"]), fontsize=10)
        axes.set_xlabel("length / |feature|")
        _style(axes)
    panels[0].set_ylabel("median log-odds of being wrong")
    panels[0].legend(frameon=False, fontsize=8)
    return _encode(figure)


def loss_surface(results: Results) -> str | None:
    """Draws the median log-odds of being wrong over the plane of an attack and of chance.

    Returns:
      The picture, or ``None`` where the attack broke none of the examples.
    """
    if "loss_surface" not in results:
        return None
    surface = results["loss_surface"]
    heights = np.array([[_number(value) for value in row] for row in surface["median_log_odds"]])
    highest = float(np.nanmax(np.abs(heights)))
    limit = highest if np.isfinite(highest) and highest > 0 else 1.0
    figure = Figure(figsize=(4.6, 3.8))
    axes = figure.subplots()
    # Rows of the picture are along axis 0 of what is drawn: the random direction.
    filled = axes.contourf(
        surface["lengths"],
        surface["lengths"],
        heights.T,
        levels=np.linspace(-limit, limit, 25),
        cmap="RdBu_r",
    )
    if heights.min() < 0 < heights.max():
        axes.contour(
            surface["lengths"],
            surface["lengths"],
            heights.T,
            levels=[0],
            colors="black",
            linewidths=1.2,
        )
    axes.plot(0, 0, marker="o", color="black", markersize=4)
    axes.set_xlabel(f"{surface['axes'][0].split(':')[0]}, in {surface['unit']}")
    axes.set_ylabel(f"{surface['axes'][1]}, in {surface['unit']}")
    axes.set_title(_text(results["name"]), fontsize=10)
    figure.colorbar(filled, ax=axes, ticks=MaxNLocator(7), label="median log-odds of being wrong")
    return _encode(figure)


def image_grid(results: Results, examples: Mapping[str, np.ndarray]) -> str:
    """Draws clean images, magnified perturbations and adversarial images with predicted classes."""
    clean, adversarial = examples["clean"], examples["adversarial"]
    perturbation = adversarial - clean
    largest = float(np.abs(perturbation).max())
    scale = 0.5 / largest if largest > 0 else 1.0
    rows = (
        ("clean", clean, examples["clean_predictions"]),
        (f"perturbation x {scale:.1f}", np.clip(0.5 + scale * perturbation, 0, 1), None),
        ("adversarial", adversarial, examples["predictions"]),
    )
    count = len(clean)
    figure = Figure(figsize=(1.05 * count + 0.9, 3.9))
    grid = figure.subplots(3, count, squeeze=False)
    for row, (title, images, predictions) in enumerate(rows):
        for column in range(count):
            axes = grid[row, column]
            image = images[column]
            axes.imshow(
                image if image.shape[-1] == 3 else image[..., 0],
                cmap="gray",
                vmin=0,
                vmax=1,
                interpolation="nearest",
            )
            axes.set_xticks([])
            axes.set_yticks([])
            if predictions is not None:
                right = predictions[column] == examples["labels"][column]
                axes.set_xlabel(
                    f"says {predictions[column]}",
                    fontsize=8,
                    color="#222222" if right else "#C00000",
                    labelpad=2,
                )
        grid[row, 0].set_ylabel(title, fontsize=8)
    figure.suptitle(_text(results["name"]), fontsize=10)
    return _encode(figure)
