"""Times programs in turns, so that whatever else the machine does falls on all of them."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax


class Summary(NamedTuple):
    """Of the times of one program.

    Attributes:
      median: seconds of a run.
      p90: the time that nine tenths of the samples keep below.
      ratio: to the reference: the median over rounds of the ratio of the rounds' medians.
      lowest: of these ratios.
      highest: of these ratios.
    """

    median: float
    p90: float
    ratio: float
    lowest: float
    highest: float


def interleaved(
    starts: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    samples: int,
    sample_seconds: float,
    progress: Callable[[int, str], None] = lambda number, name: None,
) -> dict[str, list[list[float]]]:
    """Returns seconds of a run by name: for each round its samples.

    A sample starts a program as often as fits ``sample_seconds``, waits for the last run, and
    divides by their number: runs follow each other as in training. Every second round goes the
    other way around.

    Args:
      starts: by name, what starts a run and returns arrays to wait for. Each is run twice before.
      rounds: >= 1.
      samples: of each program in a round, >= 1.
      sample_seconds: about how long a sample takes.
      progress: called before each program of a round.
    """

    def sample(start: Callable[[], Any], num_runs: int) -> float:
        started = time.perf_counter()
        for _ in range(num_runs):
            out = start()
        jax.block_until_ready(out)
        return (time.perf_counter() - started) / num_runs

    counts = {}
    for name, start in starts.items():
        progress(0, name)
        sample(start, 1)
        counts[name] = max(1, round(sample_seconds / sample(start, 1)))
    seconds: dict[str, list[list[float]]] = {name: [] for name in starts}
    for number in range(1, rounds + 1):
        for name in list(starts)[:: 1 if number % 2 else -1]:
            progress(number, name)
            seconds[name].append([sample(starts[name], counts[name]) for _ in range(samples)])
    return seconds


def summary(seconds: list[list[float]], reference: list[list[float]]) -> Summary:
    """Sums up the samples of a program beside those of the reference in the same rounds."""
    every = sorted(value for samples in seconds for value in samples)
    ratios = [
        statistics.median(own) / statistics.median(other)
        for own, other in zip(seconds, reference, strict=True)
    ]
    return Summary(
        statistics.median(every),
        every[min(len(every) - 1, int(0.9 * len(every)))],
        statistics.median(ratios),
        min(ratios),
        max(ratios),
    )
