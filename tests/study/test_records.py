"""Damaged records are named."""

import pytest

from gfa_jax.study import records
from tests.study.tiny import tiny


def test_damaged_records_are_named(tmp_path):
    path = tmp_path / "a-seed0.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match="a-seed0.json' is damaged: it holds no config"):
        records.read(path, tiny())
    path.write_text("{")
    with pytest.raises(ValueError, match="a-seed0.json' is damaged"):
        records.read(path, tiny())
