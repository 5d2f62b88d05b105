"""Programs take turns, and summaries are what they say."""

import pytest

from gfa_jax.benchmark import timing


def test_programs_take_turns_in_both_directions():
    calls = []
    starts = {name: lambda name=name: calls.append(name) for name in "abc"}
    told = []
    seconds = timing.interleaved(
        starts,
        rounds=2,
        samples=1,
        sample_seconds=1e-12,
        progress=lambda number, name: told.append((number, name)),
    )
    # Two runs of each before, then one round forwards and one backwards.
    assert "".join(calls) == "aabbcc" + "abc" + "cba"
    assert [name for number, name in told if number == 2] == list("cba")
    assert {name: [len(samples) for samples in rounds] for name, rounds in seconds.items()} == {
        name: [1, 1] for name in "abc"
    }


def test_a_sample_has_as_many_runs_as_fit():
    calls = []
    seconds = timing.interleaved(
        {"a": lambda: calls.append(1)}, rounds=1, samples=2, sample_seconds=1e-3
    )["a"]
    assert len(calls) > 20
    assert all(value < 1e-3 for value in seconds[0])


def test_summary_compares_round_by_round():
    # A busy second round slows both: the ratio does not see it.
    own, reference = [[2.0, 2.2, 2.1], [20.0, 21.0, 22.0]], [[1.0, 1.1, 1.2], [10.0, 10.5, 11.0]]
    found = timing.summary(own, reference)
    assert found.ratio == pytest.approx((2.1 / 1.1 + 2.0) / 2)
    assert (found.lowest, found.highest) == pytest.approx((2.1 / 1.1, 2.0))
    assert found.median == pytest.approx((2.2 + 20.0) / 2)
    assert found.p90 == 22.0
    assert timing.summary(own, own).ratio == 1.0
