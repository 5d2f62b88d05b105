"""Atomic writes: a failure leaves the old content and no litter."""

import os

import pytest

from gfa_jax import files


def test_a_failed_write_leaves_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "value.json"
    files.write_json(path, {"a": 1})

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        files.write_json(path, {"a": 2})
    assert path.read_text() == '{\n  "a": 1\n}\n'
    assert [entry.name for entry in path.parent.iterdir()] == ["value.json"]


def test_values_that_are_not_json_are_refused(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(tmp_path / "x.json", float("nan"))
    assert not (tmp_path / "x.json").exists()


def test_files_are_readable_like_any_other(tmp_path):
    files.write_bytes(tmp_path / "a", b"x")
    (tmp_path / "b").write_bytes(b"x")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_what_is_put_aside_replaces_nothing(tmp_path):
    path = tmp_path / "a.json"
    for content in ("one", "two"):
        path.write_text(content)
        files.put_aside(path)
    assert sorted((entry.name, entry.read_text()) for entry in tmp_path.iterdir()) == [
        ("a.json.old-1", "one"),
        ("a.json.old-2", "two"),
    ]
    with pytest.raises(FileNotFoundError):
        files.put_aside(path)
