"""Tests of the pictures at the edges of what an evaluation can find."""

import base64

import numpy as np
import pytest

from gfa_jax.evaluation import plots

POINTS = [{"epsilon": 0.0, "accuracy": 0.9}, {"epsilon": 1.0, "accuracy": 0.0}]


def results(name="run", cdf=((0.1, 0.5), (0.3, 1.0)), heights=((-1.0, 2.0), (-3.0, None))):
    found = {
        "name": name,
        "threat": {"norm": "linf", "epsilon": 0.1},
        "curves": [{"attack": f"attack{i}:x=1", "points": POINTS} for i in range(5)],
        "minimum_norm": {"deepfool": {"cdf": [list(point) for point in cdf]}},
    }
    if heights is not None:
        found["loss_surface"] = {
            "lengths": [0.0, 1.0],
            "unit": "epsilon",
            "axes": ["along pgd:num_steps=3", "random direction"],
            "median_log_odds": [list(row) for row in heights],
        }
    return found


def svg(picture):
    head, _, body = picture.partition("base64,")
    assert head == "data:image/svg+xml;"
    return base64.b64decode(body).decode()


@pytest.mark.parametrize("name", ["a$b", r"x$\frac$y", "_hidden", "<b>", ""])
@pytest.mark.parametrize("count", [1, 4])
def test_any_name_is_drawn(name, count):
    runs = [results(name)] * count
    for picture in (
        plots.accuracy_against_epsilon(runs),
        plots.minimum_norms(runs),
        plots.loss_surface(runs[0]),
    ):
        assert len(svg(picture)) > 1000


def test_every_curve_is_drawn():
    few, many = results(), results()
    few["curves"] = few["curves"][:1]
    one, five = (svg(plots.accuracy_against_epsilon([run])) for run in (few, many))
    assert five.count("line2d") == one.count("line2d") + 8  # four curves, four legend entries


def test_nothing_found_is_no_picture():
    assert plots.minimum_norms([results(cdf=())]) is None
    assert plots.loss_surface(results(heights=None)) is None
    assert plots.loss_surface(results(heights=((0.0, 0.0), (0.0, 0.0)))) is not None
    assert np.isnan(plots._number(None))
