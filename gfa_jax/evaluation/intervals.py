"""How far measured accuracies and medians can be trusted: intervals and paired tests.

Most ask what other test images of the same kind would have given, and know nothing of the
randomness of training; ``student`` asks what other trainings would have given, and knows nothing of
the images; ``paired_trainings_difference`` asks both. None knows of attacks that are too weak.
"""

import math
import statistics
from collections.abc import Sequence

import numpy as np
import scipy.stats  # type: ignore[import-untyped]

from gfa_jax import _validate


def wilson(num_successes: int, num_trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Returns Wilson's score interval ``(low, high)`` of a proportion, without correction.

    Source: Wilson 1927, J. Am. Stat. Assoc. 22.

    Args:
      num_successes: from 0 to ``num_trials``.
      num_trials: at least 1.
      confidence: in (0, 1).

    Raises:
      ValueError: for arguments out of range.
    """
    _check_confidence(confidence)
    num_successes, num_trials = int(num_successes), int(num_trials)
    _validate.positive_integer(num_trials=num_trials)
    if not 0 <= num_successes <= num_trials:
        raise ValueError(
            f"num_successes={num_successes} must lie between 0 and num_trials={num_trials}."
        )
    found = scipy.stats.binomtest(num_successes, num_trials).proportion_ci(
        confidence, method="wilson"
    )
    return float(found.low), float(found.high)


def student(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float] | None:
    """Returns Student's interval of the mean of what several trainings gave.

    Source: Student 1908, Biometrika 6.

    Args:
      values: one for each training, in any unit.
      confidence: in (0, 1).

    Returns:
      ``(low, high)`` in the same unit; ``None`` for fewer than two values, which do not tell.

    Raises:
      ValueError: for a confidence out of range.
    """
    _check_confidence(confidence)
    if len(values) < 2:
        return None
    quantile = scipy.stats.t.ppf((1 + confidence) / 2, len(values) - 1)
    half = float(quantile) * statistics.stdev(values) / math.sqrt(len(values))
    center = statistics.mean(values)
    return center - half, center + half


def paired_test(left: np.ndarray, right: np.ndarray) -> float:
    """Returns McNemar's exact two-sided p: are two classifiers equally often right?

    Only examples on which they differ count; each is a fair coin if the answer is yes.

    Source: McNemar 1947, Psychometrika 12; the exact form is the binomial test of the discordant
    pairs.

    Args:
      left: bool ``[N]``, whether the first is right on each example.
      right: bool ``[N]``, the same for the second on the same examples.

    Returns:
      In (0, 1]; 1 where they never differ.

    Raises:
      ValueError: for arrays that are not bool ``[N]`` of one length, or empty.
    """
    _, only_left, only_right, _ = _paired_counts(left, right)
    if only_left + only_right == 0:
        return 1.0
    return float(scipy.stats.binomtest(only_left, only_left + only_right, 0.5).pvalue)


def paired_difference(
    left: np.ndarray, right: np.ndarray, confidence: float = 0.95
) -> tuple[float, float, float]:
    """Returns the difference of two accuracies on the same examples, and its interval.

    Wilson's intervals of both accuracies are squared and added, less what their correlation phi
    takes away. A positive phi is corrected for continuity.

    Source: Newcombe 1998, Statistics in Medicine 17, 2635-2650, method 10.

    Args:
      left: bool ``[N]``, whether the first is right on each example.
      right: bool ``[N]``, the same for the second.
      confidence: in (0, 1).

    Returns:
      ``(difference, low, high)`` in [-1, 1], the difference being ``mean(left) - mean(right)``.

    Raises:
      ValueError: for arrays that are not bool ``[N]`` of one length, or empty, or a confidence out
        of range.
    """
    both, only_left, only_right, neither = _paired_counts(left, right)
    size = both + only_left + only_right + neither
    left_right, right_right = both + only_left, both + only_right
    left_mean, right_mean = left_right / size, right_right / size
    left_low, left_high = wilson(left_right, size, confidence)
    right_low, right_high = wilson(right_right, size, confidence)
    margins = left_right * (size - left_right) * right_right * (size - right_right)
    numerator: float = both * neither - only_left * only_right
    if numerator > 0:
        numerator = max(numerator - size / 2, 0.0)
    phi = numerator / math.sqrt(margins) if margins else 0.0

    def half(first: float, second: float) -> float:
        # Rounding can make a sum of almost nothing negative.
        return math.sqrt(max(first**2 - 2 * phi * first * second + second**2, 0.0))

    difference = (only_left - only_right) / size
    low = difference - half(left_mean - left_low, right_high - right_mean)
    high = difference + half(left_high - left_mean, right_mean - right_low)
    return difference, max(low, -1.0), min(high, 1.0)


def paired_trainings_difference(
    left: np.ndarray, right: np.ndarray, confidence: float = 0.95
) -> tuple[float, float, float]:
    """Returns the mean difference of two recipes' accuracies on shared examples, and its interval.

    Each is trained as often. Of one training it is ``paired_difference``. Of several, Student's
    interval over the trainings' differences and that over the examples' mean differences are
    squared and added: trainings and examples are crossed, so both vary the mean. What varies with
    the pair of them is in both, which makes the interval a little wide. Over examples it reaches at
    least as far as Wilson's of none: recipes that never differ on N examples may on others.

    Args:
      left: bool ``[K, N]``, whether the first recipe's trainings are right on each example.
      right: bool ``[K, N]``, the same for the second's; the k-th trainings are a pair.
      confidence: in (0, 1).

    Returns:
      ``(difference, low, high)`` in [-1, 1], the difference being ``mean(left) - mean(right)``.

    Raises:
      ValueError: for arrays that are not bool ``[K, N]`` of one shape, or with fewer than two
        examples, or a confidence out of range.
    """
    left, right = np.asarray(left), np.asarray(right)
    for name, array in (("left", left), ("right", right)):
        if array.dtype != bool or array.ndim != 2 or array.shape[0] < 1 or array.shape[1] < 2:
            raise ValueError(f"{name} must be bool [K, N], and is {array.dtype} {array.shape}.")
    if left.shape != right.shape:
        raise ValueError(f"left {left.shape} and right {right.shape} must have one shape.")
    if len(left) == 1:
        return paired_difference(left[0], right[0], confidence)
    differences = left.astype(float) - right.astype(float)
    center = float(differences.mean())

    def half_width(axis: int) -> float:
        interval = student(differences.mean(axis=axis).tolist(), confidence)
        assert interval is not None  # At least two of either.
        return (interval[1] - interval[0]) / 2

    _, of_none = wilson(0, left.shape[1], confidence)
    half = math.hypot(max(half_width(0), of_none), half_width(1))
    return center, max(center - half, -1.0), min(center + half, 1.0)


def median_interval(values: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """Returns an interval ``(low, high)`` of the median, from two order statistics.

    It assumes nothing of the distribution, so that failures may be ``inf``: the interval covers the
    median at least as often as ``confidence`` says. An end is ``inf`` where failures reach it. Too
    few values say nothing: the interval is ``(-inf, inf)``.

    Source: Conover 1999, Practical Nonparametric Statistics, section 3.2 (as
    ``scipy.stats.quantile_test``).

    Args:
      values: float ``[N]``, N >= 1, without NaN.
      confidence: in (0, 1).

    Raises:
      ValueError: for values that are not ``[N]``, empty or NaN, or a confidence out of range.
    """
    _check_confidence(confidence)
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not values.size:
        raise ValueError(f"values has shape {values.shape}; expected [N] with N >= 1.")
    if np.isnan(values).any():
        raise ValueError("values holds NaN; give failures as inf.")
    # The order statistics of ranks: arithmetic on infinite values would give NaN.
    ranks = np.arange(1.0, values.size + 1)
    found = scipy.stats.quantile_test(ranks, p=0.5).confidence_interval(confidence)
    if math.isnan(found.low) or math.isnan(found.high):
        return -math.inf, math.inf
    ordered = np.sort(values)
    return float(ordered[int(found.low) - 1]), float(ordered[int(found.high) - 1])


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence!r} must be a number in (0, 1).")


def _paired_counts(left: np.ndarray, right: np.ndarray) -> tuple[int, int, int, int]:
    """Returns on how many examples both, only the left, only the right and neither are right."""
    left, right = np.asarray(left), np.asarray(right)
    for name, value in (("left", left), ("right", right)):
        if value.dtype != np.bool_ or value.ndim != 1 or not value.size:
            raise ValueError(
                f"{name} has dtype {value.dtype} and shape {value.shape}; expected bool [N] with "
                "N >= 1."
            )
    if left.shape != right.shape:
        raise ValueError(
            f"left has shape {left.shape} and right {right.shape}; expected the same examples."
        )
    return (
        int(np.sum(left & right)),
        int(np.sum(left & ~right)),
        int(np.sum(~left & right)),
        int(np.sum(~left & ~right)),
    )
