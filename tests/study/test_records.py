"""Damaged records are named."""

import pytest

from gfa_jax import config as config_lib
from gfa_jax import files
from gfa_jax.study import plan, records
from tests.study.tiny import tiny, tiny_study


def test_damaged_records_are_named(tmp_path):
    path = tmp_path / "a-seed0.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match="a-seed0.json' is damaged: it holds no config"):
        records.read(path, tiny())
    path.write_text("{")
    with pytest.raises(ValueError, match="a-seed0.json' is damaged"):
        records.read(path, tiny())


def test_tests_without_outcomes_by_image_are_refused(tmp_path):
    study = tiny_study()
    config = config_lib.to_dict(study.trials["gfa"].at(0))
    test = {"protocol": plan.settings(study.protocol, "test"), "data": {"hash": "a"}}
    record = {"trial": "gfa", "seed": 0, "config": config, "test": test}
    files.write_json(records.path_of(tmp_path, "gfa", 0), record)
    with pytest.raises(ValueError, match="'gfa', seed 0, does not say which images were right"):
        records.gather(study, tmp_path)
