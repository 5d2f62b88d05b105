"""Recipes as the JSON of a run's ``config.json``, and where two of them differ."""

import dataclasses
import json
import pathlib
import typing
from collections.abc import Mapping
from typing import Any, TypeGuard

from gfa_jax import _validate, files
from gfa_jax.config.schema import TrainConfig


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """Returns the nested fields as JSON-ready values (tuples as lists)."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(values: Mapping[str, Any]) -> TrainConfig:
    """Returns the config whose ``to_dict`` gave ``values``.

    Raises:
      ValueError: for unknown fields (with a suggestion): the file is of another version.
    """
    return _from_dict(TrainConfig, values, "config")


def read_saved(path: pathlib.Path) -> TrainConfig:
    """Returns the config in a run's ``config.json``.

    Raises:
      ValueError: for a damaged file or one of another version, naming it.
    """
    values = files.read_json(path).get("config")
    if not isinstance(values, dict):
        raise ValueError(f"{str(path)!r} is damaged: it holds no config.")
    return from_dict(values)


def _from_dict(cls: Any, values: Mapping[str, Any], path: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(cls)}
    arguments = {}
    for name, value in values.items():
        if name not in fields:
            raise ValueError(
                f"unknown field {path}.{name}.{_validate.suggestion(name, fields)} "
                f"Fields are {sorted(fields)}."
            )
        kind = fields[name].type
        element = typing.get_args(kind)[0] if typing.get_origin(kind) is tuple else None
        if dataclasses.is_dataclass(kind):
            value = _section(kind, value, f"{path}.{name}")
        elif dataclasses.is_dataclass(element) and isinstance(value, list):
            value = [
                _section(element, item, f"{path}.{name}[{index}]")
                for index, item in enumerate(value)
            ]
        arguments[name] = tuple(value) if isinstance(value, list) else value
    return cls(**arguments)


def _section(cls: Any, values: Any, path: str) -> Any:
    if not isinstance(values, Mapping):
        raise ValueError(f"{path}={values!r} must hold fields.")
    return _from_dict(cls, values, path)


FREE_FIELDS = frozenset(
    {
        "config.data.data_dir",
        "config.data.placement",
        "config.fsdp",
        "config.loop.checkpoint_every",
        "config.loop.log_every",
        "config.model.remat",
    }
)
"""Fields that may change when a run is resumed: no result depends on them beyond rounding."""


def differences(old: Mapping[str, Any], new: Mapping[str, Any], path: str = "config") -> list[str]:
    """Returns a line for each field that differs between two dicts, the free ones aside."""
    lines = []
    for name in sorted({*old, *new}):
        before, after = old.get(name), new.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += differences(before, after, f"{path}.{name}")
        elif _are_sections(before) and _are_sections(after) and len(before) == len(after):
            for index, pair in enumerate(zip(before, after, strict=True)):
                lines += differences(*pair, f"{path}.{name}[{index}]")
        elif before != after and f"{path}.{name}" not in FREE_FIELDS:
            lines.append(f"{path}.{name}: {before!r} there, {after!r} now")
    return lines


def _are_sections(value: Any) -> TypeGuard[list[Mapping[str, Any]]]:
    return isinstance(value, list) and all(isinstance(item, Mapping) for item in value)
