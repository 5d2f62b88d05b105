"""Tests of the pictures at the edges of what an evaluation can find."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from gfa_jax.evaluation import plots

POINTS = [{"epsilon": 0.0, "accuracy": 0.9}, {"epsilon": 1.0, "accuracy": 0.0}]


def results(
    name="run",
    cdf=((0.1, 0.5), (0.3, 1.0)),
    heights=((-1.0, 2.0), (-3.0, None)),
    layers=("normalize", "block"),
    odds=(-1.0, None, 2.0),
):
    found = {
        "name": name,
        "threat": {"norm": "linf", "epsilon": 0.1},
        "curves": [{"attack": f"attack{i}:x=1", "points": POINTS} for i in range(5)],
        "minimum_norm": {"deepfool": {"cdf": [list(point) for point in cdf]}},
        "layers": {
            layer: {"alignment_mean": 0.5, "radial_degree_median": None} for layer in layers
        },
        "directions": {
            "lengths": [-1.0, 0.0, 1.0],
            "median_log_odds": {name: list(odds) for name in plots._DIRECTIONS},
        },
    }
    if heights is not None:
        found["loss_surface"] = {
            "lengths": [0.0, 1.0],
            "unit": "epsilon",
            "axes": ["along pgd:num_steps=3", "random direction"],
            "median_log_odds": [list(row) for row in heights],
        }
    return found


def pictures(runs):
    return [
        plots.accuracy_against_epsilon(runs),
        plots.minimum_norms(runs),
        plots.layer_alignment(runs),
        plots.loss_surface(runs[0]),
        *plots.loss_along_directions(runs),
    ]


def svg(uri):
    head, _, body = uri.partition("base64,")
    assert head == "data:image/svg+xml;"
    return base64.b64decode(body).decode()


def luminance(color):
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("count", [1, 8])
def test_every_figure_fits_a_phone_and_has_no_background(count):
    for picture in pictures([results()] * count):
        # Of a phone's 380 pixels, the page's margins leave 348 to a picture.
        assert plots._FONT_SIZE / 0.75 * min(1, 348 / picture.width) >= 9
        for uri in (picture.light, picture.dark):
            drawn = svg(uri)
            width, height = (
                float(size) for size in re.findall(r'(?:width|height)="(.*?)pt"', drawn)
            )
            assert (width, height) == pytest.approx(
                (picture.width * 0.75, picture.height * 0.75), 0.01
            )
            ground = drawn.partition('id="patch_1"')[2].partition("</g>")[0]
            assert "fill: none" in ground or "opacity: 0" in ground


def test_dark_figures_are_light_on_dark():
    for light, dark in ((picture.light, picture.dark) for picture in pictures([results()] * 5)[:3]):
        assert plots.LIGHT.ink in svg(light)
        assert plots.LIGHT.ink not in svg(dark)
        assert plots.DARK.ink in svg(dark)


def test_colours_are_seen_on_their_pages():
    for theme, page in ((plots.LIGHT, "#fafaf8"), (plots.DARK, "#17181a")):
        assert contrast(theme.ink, page) >= 7
        assert contrast(theme.soft, page) >= 4.5
        assert len(set(theme.series)) == 7
    assert all(contrast(color, "#17181a") >= 3 for color in plots.DARK.series)
    # The faint ones come where few reports have runs.
    assert all(contrast(color, "#fafaf8") >= 2.5 for color in plots.LIGHT.series[:5])
    assert all(contrast(color, "#fafaf8") >= 2 for color in plots.LIGHT.series)


@pytest.mark.parametrize("name", ["a$b", r"x$\frac$y", "_hidden", "<b>", "", "long/" * 30])
def test_any_name_of_a_layer_is_drawn(name):
    assert len(svg(plots.layer_alignment([results(layers=(name, "block"))]).light)) > 1000


def test_every_curve_is_drawn_and_named():
    few, many = results(), results()
    few["curves"] = few["curves"][:1]
    one, five = (plots.accuracy_against_epsilon([run]) for run in (few, many))
    assert svg(five.dark).count("line2d") == svg(one.dark).count("line2d") + 4
    assert [key.label for key in five.keys] == [f"attack{i}:x=1" for i in range(5)]


def test_an_attack_has_one_line_in_all_runs():
    other = results("other")
    other["curves"] = other["curves"][::-1][:2]
    keys = plots.accuracy_against_epsilon([results("$one"), other]).keys
    assert [(key.label, key.series, key.marker) for key in keys[:2]] == [
        ("$one", 0, "●"),
        ("other", 1, "■"),
    ]
    assert [key.label for key in keys[2:]] == [f"attack{i}:x=1" for i in range(5)]
    assert len({key.dashes for key in keys[2:6]}) == 4


def test_layers_are_those_of_all_runs_in_order():
    runs = [results(layers=("b", "a")), results(layers=("b", "c"))]
    assert plots.layer_names(runs) == ["b", "a", "c"]
    one, two = (plots.layer_alignment(chosen) for chosen in (runs[:1], runs))
    assert two.height > one.height
    assert [key.label for key in two.keys] == ["run", "run"]
    assert one.keys == ()


def test_nothing_found_is_no_picture():
    assert plots.minimum_norms([results(cdf=())]) is None
    assert plots.loss_surface(results(heights=None)) is None
    assert plots.loss_surface(results(heights=((0.0, 0.0), (0.0, 0.0)))) is not None
    assert plots.loss_surface(results(heights=((None, None), (None, None)))) is not None
    assert len(plots.loss_along_directions([results(odds=(None, None, None))])) == 1
    assert np.isnan(plots._number(None))


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_images_keep_their_pixels(channels, mode):
    clean = np.full((2, 4, 5, channels), 0.2, np.float32)
    adversarial = clean.copy()
    adversarial[1, 0, 0] = 0.3
    examples = {"clean": clean, "adversarial": adversarial}
    examples |= dict.fromkeys(("labels", "clean_predictions", "predictions"), np.array([1, 2]))
    assert plots.magnification(examples) == pytest.approx(5)
    shown = plots.shown_images(examples)[1]
    assert (shown.width, shown.height, shown.label) == (5, 4, 2)
    pixels = {}
    for kind in ("clean", "perturbation", "adversarial"):
        image = Image.open(io.BytesIO(base64.b64decode(getattr(shown, kind).partition(",")[2])))
        assert (image.mode, image.size) == (mode, (5, 4))
        pixels[kind] = np.asarray(image).reshape(4, 5, channels)[0, :2, 0].tolist()
    assert pixels == {"clean": [51, 51], "perturbation": [255, 128], "adversarial": [76, 51]}


def test_no_perturbation_is_not_magnified():
    clean = np.zeros((1, 2, 2, 1), np.float32)
    assert plots.magnification({"clean": clean, "adversarial": clean}) == 1
