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


def test_several_trainings_vary_with_seeds_and_images():
    """Both parts by hand: 4.303 standard errors over 3 trainings, and 1.96 over many images."""
    rng = np.random.default_rng(0)
    hard = rng.uniform(size=4000)
    left = rng.uniform(size=(3, 4000)) < hard * np.array([[0.8], [0.9], [1.0]])
    right = rng.uniform(size=(3, 4000)) < 0.5 * hard
    difference, low, high = intervals.paired_trainings_difference(left, right)
    one = left.astype(float) - right
    over_seeds = 4.3027 * one.mean(1).std(ddof=1) / 3**0.5
    over_images = 1.9606 * one.mean(0).std(ddof=1) / 4000**0.5
    assert difference == pytest.approx(one.mean())
    half = (over_seeds**2 + over_images**2) ** 0.5
    assert (high - difference, difference - low) == pytest.approx((half, half), rel=1e-4)
    # Trainings that agree leave the images' part.
    same = intervals.paired_trainings_difference(left[[0, 0]], right[[0, 0]])
    paired_low, paired_high = intervals.paired_difference(left[0], right[0])[1:]
    assert same[1:] == pytest.approx((paired_low, paired_high), abs=2e-3)
    alone = intervals.paired_trainings_difference(left[:1], right[:1])
    assert alone == intervals.paired_difference(left[0], right[0])


def test_trainings_intervals_cover_the_truth():
    """Of recipes that differ by nothing, 95 % of intervals or more hold 0, few far more."""
    rng = np.random.default_rng(1)
    covered = []
    for _ in range(300):
        skills = rng.normal(0, 0.5, (2, 3, 1)) + rng.normal(0, 1, (1, 1, 200))
        sides = rng.normal(size=(2, 3, 200)) < skills
        _, low, high = intervals.paired_trainings_difference(*sides)
        covered.append(low <= 0 <= high)
    assert np.mean(covered) > 0.93


def test_trainings_must_be_of_one_shape():
    right = np.zeros((2, 5), bool)
    with pytest.raises(ValueError, match=r"left must be bool \[K, N\], and is bool \(5,\)"):
        intervals.paired_trainings_difference(right[0], right)
    with pytest.raises(ValueError, match=r"left \(2, 5\) and right \(2, 4\) must have one shape"):
        intervals.paired_trainings_difference(right, right[:, 1:])


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
