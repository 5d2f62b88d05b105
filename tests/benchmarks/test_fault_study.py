"""Broken runs: whatever happens to a training, it goes on as if nothing had."""

import pytest

from benchmarks import fault_study
from benchmarks.fault_study import Flags, Trial


@pytest.mark.slow
def test_broken_runs_go_on_as_if_nothing_had_happened(tmp_path):
    trials = fault_study.run(Flags(out=str(tmp_path / "faults"), kills=3))
    assert [trial for trial in trials if not trial.identical] == []
    by_fault = {}
    for trial in trials:
        by_fault.setdefault(trial.fault, []).append(trial)
    assert len(by_fault["kill -9"]) == 3
    assert len(by_fault["checkpoint file cut in half"]) > 10
    # At most the steps since the last finished checkpoint: training goes on while one is written.
    everything_gone = by_fault.pop("all checkpoints deleted")
    assert everything_gone[0].lost >= 220
    assert all(
        trial.lost <= 2 * fault_study.CHECKPOINT_EVERY
        for trial in trials
        if trial not in everything_gone
    )
    codes = {fault: {trial.exit_code for trial in found} for fault, found in by_fault.items()}
    assert codes["NaN in a batch"] == {1}
    assert codes["checkpoints folder read-only"] == codes["workdir read-only from the start"] == {2}
    assert "not finite" in by_fault["NaN in a batch"][0].found
    assert "could not be written" in by_fault["checkpoints folder read-only"][0].found
    assert codes.get("full disk", {2}) == {2}


def test_the_table_has_a_line_for_each_fault():
    trials = [
        Trial("kill -9", "between", -9, 10, 2.0, True),
        Trial("kill -9", "between", -9, 40, 4.0, False),
        Trial("NaN in a batch", "step 334: loss not finite", 1, 34, 3.0, True),
    ]
    lines = fault_study.table(trials).splitlines()
    assert lines[2:] == [
        "| NaN in a batch | 1 | 1 | 34 (34) | 3.0 (3.0) | 1 of 1 |",
        "| kill -9, between | 2 | -9 | 25 (40) | 3.0 (4.0) | 1 of 2 |",
    ]
