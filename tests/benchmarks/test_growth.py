"""Tests of the sweeps: lines through medians, the page, the picture, and refusals."""

import pytest

from benchmarks import growth
from gfa_jax.benchmark import timing


def sweep(ratios):
    return {
        number: timing.Summary(1.0, 1.0, ratio, ratio - 0.1, ratio + 0.2)
        for number, ratio in ratios.items()
    }


def test_the_line_is_that_through_the_medians():
    slope, intercept, share = growth.fit(sweep({1: 1.5, 2: 2.0, 4: 3.0}))
    assert (slope, intercept, share) == pytest.approx((0.5, 1.0, 1.0))
    assert growth.fit(sweep({1: 1.0, 2: 3.0, 3: 1.5}))[2] < 0.2


def test_page_and_picture_show_every_sweep():
    sweeps = {"images": sweep({1: 1.5, 2: 2.0, 4: 3.0}), "layers": sweep({0: 2.0, 1: 2.1, 2: 2.2})}
    page = growth.render(sweeps, growth.Flags())
    assert "* images: 1: 1.50 (1.40-1.70)" in page
    assert "Line: 1.00 + 0.500 n, R² 1.000." in page
    assert growth.picture(sweeps).startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"batch_sizes": "16,32"}, "batch_sizes='16,32' must be three or more"),
        ({"steps": "1,2,x"}, "steps='1,2,x' must be three or more"),
        ({"rounds": 0}, "rounds=0"),
    ],
)
def test_bad_flags_are_refused_before_anything_is_compiled(flags, message):
    with pytest.raises(ValueError, match=message):
        growth.run(growth.Flags(**flags))
