"""The report's pictures, as data URIs.

Every figure is drawn twice, for light and for dark pages, on no background of its own, and is
narrow enough for its text to be read on a phone. Names of runs and attacks stay out of it: the page
writes the legend, where text of any length and script has room.
"""

import base64
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

Results = Mapping[str, Any]


class Theme(NamedTuple):
    """Colours of a page.

    Attributes:
      ink: of text.
      soft: of frames and marks.
      grid: of grids.
      series: of lines and bars. They stay apart in print and for colour-blind readers (Okabe &
        Ito); the two that are faint on white come last.
    """

    ink: str
    soft: str
    grid: str
    series: tuple[str, ...]


_SERIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
LIGHT = Theme("#1c1c1e", "#6b6f75", "#dddddd", _SERIES)
DARK = Theme("#ececec", "#a5a9ae", "#3a3d42", (*_SERIES[:4], "#F2F2F2", *_SERIES[5:]))

_MARKERS = {"o": "●", "s": "■", "D": "◆", "^": "▲", "v": "▼", "P": "✚", "X": "✖"}
_DASHES: tuple[tuple[float, ...], ...] = ((), (3.7, 1.6), (1, 1.65), (6.4, 1.6, 1, 1.6))
_DIRECTIONS = {
    "radial": "radial (along the feature)",
    "random_tangential": "tangential, random",
    "worst_tangential": "tangential, worst case",
}

# In inches; at 96 pixels each, one fills a phone and three panels stand side by side on a desk.
_WIDTH, _PANEL = 4.4, 3.0
_FONT_SIZE = 9
_LONGEST_LABEL = 18
_THUMBNAIL = 96


class Key(NamedTuple):
    """An entry of a legend.

    Attributes:
      label: its text.
      series: number of its colour; ``None`` for the colour of text.
      marker: its sign; empty for a line.
      dashes: lengths of a line's dashes and gaps, in line widths; empty for a solid one.
    """

    label: str
    series: int | None
    marker: str = ""
    dashes: tuple[float, ...] = ()


class Picture(NamedTuple):
    """A figure.

    Attributes:
      light: SVG as a data URI, for a light page.
      dark: the same for a dark page.
      width: in CSS pixels.
      height: in CSS pixels.
      keys: its legend.
    """

    light: str
    dark: str
    width: int
    height: int
    keys: tuple[Key, ...]


class Shown(NamedTuple):
    """One example's images, PNG as data URIs, and what the model says of them."""

    clean: str
    perturbation: str
    adversarial: str
    width: int
    height: int
    label: int
    clean_prediction: int
    prediction: int


def _uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _draw(
    width: float,
    height: float,
    draw: Callable[[Figure, Theme], None],
    keys: Iterable[Key] = (),
) -> Picture:
    def encode(theme: Theme) -> str:
        settings: dict[Any, Any] = {
            "font.size": _FONT_SIZE,
            **{f"{kind}.labelsize": _FONT_SIZE for kind in ("axes", "xtick", "ytick")},
            **dict.fromkeys(("text.color", "axes.labelcolor"), theme.ink),
            **dict.fromkeys(("xtick.labelcolor", "ytick.labelcolor"), theme.ink),
            **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), theme.soft),
            # The same results give the same bytes.
            "svg.hashsalt": "gfa_jax",
        }
        with matplotlib.rc_context(settings):
            figure = Figure(figsize=(width, height), layout="constrained")
            draw(figure, theme)
            buffer = io.BytesIO()
            figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        return _uri("svg+xml", buffer.getvalue())

    return Picture(encode(LIGHT), encode(DARK), round(96 * width), round(96 * height), tuple(keys))


def _text(name: object) -> str:
    """Returns a name as Matplotlib shows it: not as a formula, and the end alone of a long one."""
    text = str(name)
    if len(text) > _LONGEST_LABEL:
        text = "…" + text[1 - _LONGEST_LABEL :]
    return text.replace("$", r"\$")


def _number(value: float | None) -> float:
    """Returns the value, or NaN, which leaves a gap, for a missing one."""
    return np.nan if value is None else value


def _style(axes: Axes, theme: Theme) -> None:
    axes.grid(color=theme.grid, linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _finish(axes: Axes, epsilon: float, theme: Theme) -> None:
    """Marks epsilon in a picture of percentages against distances."""
    axes.axvline(epsilon, color=theme.soft, linewidth=0.8, linestyle=(0, (3, 3)))
    axes.annotate(
        f"epsilon {epsilon:.3g}",
        (epsilon, 1),
        xycoords=("data", "axes fraction"),
        ha="center",
        va="bottom",
        color=theme.soft,
    )
    axes.set_xlim(0)
    axes.set_ylim(0, 102)
    _style(axes, theme)


def _series(number: int) -> int:
    return number % len(_SERIES)


def _run_keys(runs: Sequence[Results], signs: Sequence[str] = "■") -> list[Key]:
    """Returns the runs' keys; one run alone needs none."""
    if len(runs) == 1:
        return []
    return [
        Key(str(run["name"]), _series(number), signs[number % len(signs)])
        for number, run in enumerate(runs)
    ]


def _attack_keys(runs: Sequence[Results], attacks: Iterable[str]) -> dict[str, Key]:
    """Returns each attack's key: a kind of line, the same in all runs."""
    series = 0 if len(runs) == 1 else None
    return {
        attack: Key(attack, series, dashes=_DASHES[number % len(_DASHES)])
        for number, attack in enumerate(dict.fromkeys(attacks))
    }


def _line(dashes: Sequence[float]) -> Any:
    return (0, tuple(dashes)) if dashes else "-"


def accuracy_against_epsilon(runs: Sequence[Results]) -> Picture:
    """Draws accuracy under each curve's attack against its radius, from 0 to the whole box."""
    threat = runs[0]["threat"]
    attacks = _attack_keys(runs, (curve["attack"] for run in runs for curve in run["curves"]))
    markers = list(_MARKERS)

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        for number, run in enumerate(runs):
            for curve in run["curves"]:
                axes.plot(
                    [point["epsilon"] for point in curve["points"]],
                    [100 * point["accuracy"] for point in curve["points"]],
                    color=theme.series[_series(number)],
                    marker=markers[number % len(markers)],
                    linestyle=_line(attacks[curve["attack"]].dashes),
                    markersize=4,
                )
        axes.set_xscale("symlog", linthresh=max(threat["epsilon"], 1e-6))
        axes.set_xlabel(f"{threat['norm']} radius")
        axes.set_ylabel("accuracy in %")
        _finish(axes, threat["epsilon"], theme)

    keys = [*_run_keys(runs, list(_MARKERS.values())), *attacks.values()]
    return _draw(_WIDTH, 3.0, draw, keys)


def minimum_norms(runs: Sequence[Results]) -> Picture | None:
    """Draws the share of images that each minimum-norm attack breaks within a distance.

    Returns:
      The picture, or ``None`` without such an attack.
    """
    if not any(found["cdf"] for run in runs for found in run["minimum_norm"].values()):
        return None
    threat = runs[0]["threat"]
    attacks = _attack_keys(runs, (attack for run in runs for attack in run["minimum_norm"]))

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        for number, run in enumerate(runs):
            for attack, found in run["minimum_norm"].items():
                # From no image at distance 0 on; a failure is never reached.
                points = [[0.0, 0.0], *found["cdf"]]
                axes.step(
                    [distance for distance, _ in points],
                    [100 * share for _, share in points],
                    where="post",
                    color=theme.series[_series(number)],
                    linestyle=_line(attacks[attack].dashes),
                )
        axes.set_xlabel(f"{threat['norm']} distance")
        axes.set_ylabel("images broken in %")
        _finish(axes, threat["epsilon"], theme)

    return _draw(_WIDTH, 3.0, draw, [*_run_keys(runs), *attacks.values()])


def layer_names(runs: Sequence[Results]) -> list[str]:
    """Returns the layers of all runs, in the order in which they first appear."""
    return list(dict.fromkeys(name for run in runs for name in run["layers"]))


def layer_alignment(runs: Sequence[Results]) -> Picture:
    """Draws mean alignment and median radial degree of each layer, side by side for all runs."""
    names = layer_names(runs)
    height = 0.8 / len(runs)

    def draw(figure: Figure, theme: Theme) -> None:
        left, right = figure.subplots(1, 2, sharey=True)
        positions = np.arange(len(names))
        for axes, field in ((left, "alignment_mean"), (right, "radial_degree_median")):
            for number, run in enumerate(runs):
                values = [_number(run["layers"].get(name, {}).get(field)) for name in names]
                offset = (number - (len(runs) - 1) / 2) * height
                axes.barh(positions + offset, values, height, color=theme.series[_series(number)])
            axes.axvline(0, color=theme.soft, linewidth=0.8)
            axes.xaxis.set_major_locator(MaxNLocator(4))
            _style(axes, theme)
        left.set_yticks(positions, [_text(name) for name in names])
        left.invert_yaxis()
        left.set_xlabel("mean alignment")
        right.set_xlabel("median radial degree")

    rows = len(names) * (0.16 + 0.1 * len(runs))
    return _draw(_WIDTH, 0.8 + max(rows, 0.5), draw, _run_keys(runs))


def direction_keys() -> list[Key]:
    """Returns the legend of all panels of ``loss_along_directions``."""
    return [
        Key(label, number, dashes=_DASHES[number])
        for number, label in enumerate(_DIRECTIONS.values())
    ]


def loss_along_directions(runs: Sequence[Results]) -> list[Picture]:
    """Draws the median log-odds of being wrong where the normalised input is moved.

    It is moved radially and tangentially; there is a panel for each run, all with the same axes.
    """
    everything = [
        _number(value)
        for run in runs
        for name in _DIRECTIONS
        for value in run["directions"]["median_log_odds"][name]
    ]
    finite = np.array([value for value in everything if np.isfinite(value)] or [0.0])
    margin = 0.05 * float(np.ptp(finite)) or 1.0

    def panel(run: Results) -> Picture:
        directions = run["directions"]

        def draw(figure: Figure, theme: Theme) -> None:
            axes = figure.subplots()
            for color, dashes, name in zip(theme.series, _DASHES, _DIRECTIONS, strict=False):
                axes.plot(
                    directions["lengths"],
                    [_number(value) for value in directions["median_log_odds"][name]],
                    color=color,
                    linestyle=_line(dashes),
                )
            axes.axhline(0, color=theme.soft, linewidth=0.8, linestyle=(0, (3, 3)))
            axes.set_ylim(finite.min() - margin, finite.max() + margin)
            axes.set_xlabel("length / |feature|")
            axes.set_ylabel("median log-odds of being wrong")
            _style(axes, theme)

        return _draw(_PANEL, 2.7, draw)

    return [panel(run) for run in runs]


def loss_surface(results: Results) -> Picture | None:
    """Draws the median log-odds of being wrong over the plane of an attack and of chance.

    Returns:
      The picture, or ``None`` where the attack broke none of the examples.
    """
    if "loss_surface" not in results:
        return None
    surface = results["loss_surface"]
    lengths = surface["lengths"]
    heights = np.array([[_number(value) for value in row] for row in surface["median_log_odds"]])
    finite = heights[np.isfinite(heights)]
    limit = float(np.abs(finite).max(initial=0)) or 1.0

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        # Rows of the picture are along axis 0 of what is drawn: the random direction.
        filled = axes.contourf(
            lengths, lengths, heights.T, levels=np.linspace(-limit, limit, 25), cmap="RdBu_r"
        )
        # Without edges of their own the page would shine through between the levels.
        filled.set_edgecolor("face")
        # Black on all pages: the filling below is the same.
        if finite.min(initial=0) < 0 < finite.max(initial=0):
            axes.contour(lengths, lengths, heights.T, levels=[0], colors="black", linewidths=1.2)
        axes.plot(0, 0, marker="o", color="black", markersize=4)
        axes.set_xlabel(f"{_text(surface['axes'][0].split(':')[0])}, in {surface['unit']}")
        axes.set_ylabel(f"{surface['axes'][1]}, in {surface['unit']}")
        bar = figure.colorbar(filled, ax=axes, ticks=MaxNLocator(7), label="median log-odds")
        if bar.solids is not None:
            bar.solids.set_edgecolor("face")

    return _draw(_PANEL, 2.6, draw)


def _png(image: np.ndarray) -> str:
    pixels = np.round(255 * np.clip(image, 0, 1)).astype(np.uint8)
    picture = Image.fromarray(pixels if pixels.shape[-1] == 3 else pixels[..., 0])
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return _uri("png", buffer.getvalue())


def magnification(examples: Mapping[str, np.ndarray]) -> float:
    """Returns by how much perturbations are magnified: the largest one fills the range."""
    largest = float(np.abs(examples["adversarial"] - examples["clean"]).max())
    return 0.5 / largest if largest > 0 else 1.0


def shown_images(examples: Mapping[str, np.ndarray]) -> list[Shown]:
    """Draws clean images, magnified perturbations and adversarial images."""
    clean, adversarial = examples["clean"], examples["adversarial"]
    perturbation = 0.5 + magnification(examples) * (adversarial - clean)
    height, width = clean.shape[1:3]
    return [
        Shown(
            clean=_png(clean[i]),
            perturbation=_png(perturbation[i]),
            adversarial=_png(adversarial[i]),
            width=width,
            height=height,
            label=int(examples["labels"][i]),
            clean_prediction=int(examples["clean_predictions"][i]),
            prediction=int(examples["predictions"][i]),
        )
        for i in range(len(clean))
    ]
