"""Intervals and paired tests: published examples, closed forms, coverage."""

import math

import numpy as np
import pytest
import scipy.stats

from gfa_jax.evaluation import intervals


def paired(both, only_left, only_right, neither):
    counts = (both, only_left, only_right, neither)
    return (
        np.repeat(np.array([True, True, False, False]), counts),
        np.repeat(np.array([True, False, True, False]), counts),
    )


@pytest.mark.parametrize(
    ("successes", "trials", "expected"),
    # Newcombe 1998, Statistics in Medicine 17, 857-872, method 3.
    [
        (81, 263, (0.2553, 0.3662)),
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0.0, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
    ],
)
def test_wilson_gives_the_published_intervals(successes, trials, expected):
    assert intervals.wilson(successes, trials) == pytest.approx(expected, abs=6e-5)


def test_the_paired_test_is_the_sign_test_of_the_discordant_pairs():
    # 12 and 2 of 14: twice the tail of a fair coin.
    tail = sum(math.comb(14, k) for k in range(3)) / 2**14
    assert intervals.paired_test(*paired(36, 12, 2, 5)) == pytest.approx(2 * tail)
    assert intervals.paired_test(*paired(36, 2, 12, 5)) == pytest.approx(2 * tail)
    assert intervals.paired_test(*paired(3, 0, 0, 4)) == 1.0


@pytest.mark.parametrize(
    ("counts", "expected"),
    # Newcombe 1998, 2635-2650; Fagerland et al. 2014, BMC Med. Res. Methodol.
    [((36, 12, 2, 0), (0.2, 0.0569, 0.3404)), ((1, 1, 7, 12), (-0.2857, -0.5069, -0.0256))],
)
def test_paired_differences_are_the_published_ones(counts, expected):
    assert intervals.paired_difference(*paired(*counts)) == pytest.approx(expected, abs=6e-5)


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    # Newcombe 1998, Statistics in Medicine 17, 873-890, method 10.
    [
        ((56, 70), (48, 80), (0.0524, 0.3339)),
        ((9, 10), (3, 10), (0.1705, 0.8090)),
        ((10, 10), (0, 10), (0.6075, 1.0)),
    ],
)
def test_unpaired_differences_are_the_published_ones(left, right, expected):
    difference, low, high = intervals.unpaired_difference(left, right)
    assert difference == pytest.approx(left[0] / left[1] - right[0] / right[1])
    assert (low, high) == pytest.approx(expected, abs=6e-5)
    mirrored = (-difference, -high, -low)
    assert intervals.unpaired_difference(right, left) == pytest.approx(mirrored)


def test_means_of_several_trainings_have_students_interval():
    values = [0.3, 0.5, 0.7]
    found = intervals.student(values)
    test = scipy.stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert found == pytest.approx((test.low, test.high))
    # 4.303 standard errors, by any table.
    assert found == pytest.approx(
        (0.5 - 4.303 * 0.2 / 3**0.5, 0.5 + 4.303 * 0.2 / 3**0.5), abs=1e-4
    )
    assert intervals.student([0.3]) is None
    with pytest.raises(ValueError, match="confidence=1"):
        intervals.student(values, 1.0)


def test_paired_differences_change_sign_with_the_order_and_stay_in_range():
    left, right = paired(20, 9, 4, 7)
    difference, low, high = intervals.paired_difference(left, right)
    assert intervals.paired_difference(right, left) == pytest.approx((-difference, -high, -low))
    difference, low, high = intervals.paired_difference(*paired(0, 5, 0, 0))
    assert difference == 1
    assert -1 <= low < high <= 1


def test_intervals_of_accuracies_cover():
    generator = np.random.default_rng(0)
    cells = generator.multinomial(100, [0.6, 0.15, 0.05, 0.2], size=400)
    covered = []
    for both, only_left, only_right, neither in cells:
        arrays = paired(both, only_left, only_right, neither)
        _, low, high = intervals.paired_difference(*arrays)
        covered.append(low <= 0.1 <= high)
    # Three standard errors around 95 % are 3.3 points.
    assert 0.917 <= np.mean(covered) <= 0.99


def test_median_intervals_are_order_statistics():
    values = np.random.default_rng(1).permutation(np.arange(1.0, 11))
    # P(2 <= Binomial(10, 1/2) <= 8) is 0.979, and the next narrower pair has 0.891.
    assert intervals.median_interval(values) == (2.0, 9.0)
    assert intervals.median_interval(values, 0.89) == (3.0, 8.0)
    found = scipy.stats.quantile_test(values, p=0.5).confidence_interval(0.8)
    assert intervals.median_interval(values, 0.8) == (found.low, found.high)


def test_median_intervals_know_failures_and_too_few_values():
    values = np.where(np.arange(1, 11) <= 8, np.arange(1.0, 11), np.inf)
    assert intervals.median_interval(values) == (2.0, math.inf)
    assert intervals.median_interval(np.full(10, np.inf)) == (math.inf, math.inf)
    assert intervals.median_interval(np.arange(5.0)) == (-math.inf, math.inf)


def test_median_intervals_cover():
    samples = np.random.default_rng(2).exponential(size=(300, 40))
    ends = np.array([intervals.median_interval(values) for values in samples])
    covered = (ends[:, 0] <= math.log(2)) & (math.log(2) <= ends[:, 1])
    assert covered.mean() >= 0.92


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: intervals.wilson(3, 2), "num_successes=3 must lie between 0 and num_trials=2"),
        (lambda: intervals.wilson(0, 0), "num_trials=0 must be an integer >= 1"),
        (lambda: intervals.wilson(1, 2, 1.0), "confidence=1.0"),
        (lambda: intervals.paired_test(np.ones(3), np.ones(3, bool)), "left has dtype float64"),
        (lambda: intervals.paired_test(np.ones(3, bool), np.ones(2, bool)), "the same examples"),
        (lambda: intervals.median_interval(np.array([1, np.nan])), "values holds NaN"),
        (lambda: intervals.median_interval(np.zeros(0)), "expected \\[N\\] with N >= 1"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
