"""What is kept of each trained model: one small JSON file, from which pages are written.

A record outlives the run's folder with its weights, so that a study goes on in another place.
"""

import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gfa_jax import config as config_lib
from gfa_jax import files
from gfa_jax.config import TrainConfig
from gfa_jax.study import plan

Record = dict[str, Any]

Gathered = Mapping[str, Sequence[Record]]
"""Records by trial, in the order of the study; trials without any are there, too."""

_CURVE_POINTS = 21
"""Of a distribution of distances."""


def path_of(folder: pathlib.Path, name: str, seed: int) -> pathlib.Path:
    """Returns where the record of a trial's seed lies."""
    return folder / f"{name}-seed{seed}.json"


def read(path: pathlib.Path, config: TrainConfig) -> Record:
    """Reads a record; an empty one where there is none.

    Raises:
      ValueError: for a damaged record, or one of another recipe, with the fields that differ.
    """
    if not path.exists():
        return {}
    record = files.read_json(path)
    if not isinstance(record.get("config"), dict):
        raise ValueError(f"{str(path)!r} is damaged: it holds no config.")
    # Fields that came after it have their defaults.
    before = config_lib.to_dict(config_lib.from_dict(record["config"]))
    if changed := config_lib.differences(before, config_lib.to_dict(config)):
        raise ValueError(
            f"{str(path)!r} is the record of another recipe:\n  "
            + "\n  ".join(changed)
            + "\nGive the trial another name, or take the record away."
        )
    return record


def replace(path: pathlib.Path, config: TrainConfig, record: Record) -> Record:
    """Writes a record, and loses none that is there.

    Stages that another process has recorded of the same weights meanwhile are kept. What was judged
    of other weights is put aside, in a file beside it that is not read again
    (``NAME-seed0.json.old-1``).

    Args:
      path: of the record.
      config: its recipe.
      record: new.

    Returns:
      What was written.

    Raises:
      ValueError: for a record of another recipe in its place.
    """
    there = read(path, config)
    if there.get("weights_hash") == record.get("weights_hash"):
        record = there | record
    elif any(stage in there for stage in plan.STAGES):
        files.put_aside(path)
    files.write_json(path, record)
    return record


def gather(study: plan.Study, folder: pathlib.Path) -> dict[str, list[Record]]:
    """Reads the records of a study.

    Raises:
      ValueError: for a damaged record, one of another recipe or protocol, or of other images.
    """
    gathered: dict[str, list[Record]] = {}
    for name, trial in study.trials.items():
        found = [read(path_of(folder, name, seed), trial.at(seed)) for seed in trial.seeds]
        gathered[name] = [record for record in found if record]
    for stage in plan.STAGES:
        _check_alike(stage, plan.settings(study.protocol, stage), gathered)
    return gathered


def _check_alike(stage: str, protocol: Mapping[str, Any], gathered: Gathered) -> None:
    """Checks that all were judged alike, and on the same images."""
    seen: dict[str, str] = {}
    for record in itertools.chain(*gathered.values()):
        if stage not in record:
            continue
        where = f"the record of {record['trial']!r}, seed {record['seed']},"
        if stage == "test" and "right" not in record[stage]:
            raise ValueError(
                f"{where} does not say which images were right: take 'test' out of such records, "
                "and it is judged again."
            )
        if record[stage].get("protocol") != protocol:
            raise ValueError(
                f"{where} was judged by {record[stage].get('protocol')}, and the study says "
                f"{protocol}: take {stage!r} out of such records, and what is missing is judged "
                "again."
            )
        seen.setdefault(record[stage]["data"]["hash"], where)
    if len(seen) > 1:
        raise ValueError(f"{' and '.join(seen.values())} were judged on other images ({stage}).")


def having(gathered: Gathered, stage: str) -> dict[str, list[Record]]:
    """Returns the trials that have an evaluation, with the records that have it."""
    found = {
        name: [record for record in some if stage in record] for name, some in gathered.items()
    }
    return {name: some for name, some in found.items() if some}


def portable(config: TrainConfig) -> dict[str, Any]:
    """Returns the recipe without where the data lies."""
    values = config_lib.to_dict(config)
    values["data"] = {**values["data"], "data_dir": None}
    return values


def summary(results: Mapping[str, Any], outcomes: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns what a page needs of an evaluation.

    Args:
      results: ``results.json``.
      outcomes: ``outcomes.npz``.
    """
    kept = {
        name: results[name]
        for name in (
            *("clean_accuracy", "robust_accuracy", "num_examples", "data", "threat", "mode"),
            *("curves", "loss_surface", "versions", "seconds"),
        )
        if name in results
    }
    kept["right"] = {
        "clean": _packed(outcomes["clean_correct"]),
        "worst_case": _packed(outcomes["worst_case"]),
        **{
            name.removeprefix("robust/"): _packed(values)
            for name, values in outcomes.items()
            if name.startswith("robust/")
        },
    }
    kept["minimum_norm"] = {
        spec: {**found, "cdf": _thinned(found["cdf"])}
        for spec, found in results["minimum_norm"].items()
    }
    kept["layers"] = {
        layer: {
            name: values[name]
            for name in ("alignment_mean", "radial_degree_median", "tangential_shares")
        }
        for layer, values in results["layers"].items()
    }
    kept["diagnostics"] = [
        {name: entry[name] for name in ("id", "status", "value")}
        for entry in results["diagnostics"]
    ]
    return kept


def right(record: Record, attack: str) -> np.ndarray:
    """Returns which test images a model is right on, under an attack, bool ``[N]``.

    Args:
      record: of a model that was judged on test images.
      attack: one of the protocol's attacks, ``clean`` or ``worst_case``.
    """
    bits = np.frombuffer(bytes.fromhex(record["test"]["right"][attack]), np.uint8)
    return np.unpackbits(bits, count=record["test"]["num_examples"]).astype(bool)


def _packed(values: np.ndarray) -> str:
    """Returns bool ``[N]`` as hexadecimal digits, four values each."""
    return np.packbits(values).tobytes().hex()


def _thinned(points: list[Any]) -> list[Any]:
    if len(points) <= _CURVE_POINTS:
        return points
    last = len(points) - 1
    return [points[round(i * last / (_CURVE_POINTS - 1))] for i in range(_CURVE_POINTS)]
