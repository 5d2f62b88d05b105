"""Metrics files survive crashes and resuming."""

import json
import sys

import pytest

from gfa_jax.training import metrics


def test_resuming_drops_the_steps_that_will_be_repeated(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = metrics.MetricsWriter(path, resume_step=0)
    for step in range(1, 6):
        writer.write(step, {"train/loss": 1.0 / step})
    writer.close()
    again = metrics.MetricsWriter(path, resume_step=3)
    again.write(4, {"train/loss": 9.0})
    again.close()
    rows = metrics.read(path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[-1]["train/loss"] == 9.0


def test_a_line_that_a_crash_cut_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": 2.5}\n{"step": 2, "a"')
    assert metrics.read(path) == [{"step": 1, "a": 2.5}]
    metrics.MetricsWriter(path, resume_step=1).close()
    assert json.loads(path.read_text()) == {"step": 1, "a": 2.5}


def test_damage_in_the_middle_is_an_error_and_nothing_is_lost(tmp_path):
    path = tmp_path / "metrics.jsonl"
    content = '{"step": 1}\n3\n{"step": 3}\n'
    path.write_text(content)
    with pytest.raises(ValueError, match=r"metrics.jsonl' is damaged in line 2: '3'"):
        metrics.MetricsWriter(path, resume_step=3)
    assert path.read_text() == content


def test_tensorboard_events(tmp_path):
    pytest.importorskip("tensorboardX", reason="the tensorboard extra is not installed")
    folder = tmp_path / "tensorboard"
    writer = metrics.MetricsWriter(tmp_path / "metrics.jsonl", resume_step=0, tensorboard=folder)
    writer.write(1, {"train/loss": 0.5})
    writer.close()
    (events,) = folder.iterdir()
    assert b"train/loss" in events.read_bytes()


def test_tensorboard_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ImportError, match=r"gfa_jax\[tensorboard\]"):
        metrics.MetricsWriter(tmp_path / "m.jsonl", resume_step=0, tensorboard=tmp_path / "t")


def test_a_missing_file_is_empty(tmp_path):
    assert metrics.read(tmp_path / "none.jsonl") == []
