"""Regularisers by name, or by the import path of one's own."""

import functools
import importlib
import inspect
import pathlib
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from gfa_jax import _modules, _validate
from gfa_jax.objectives.baselines import logit_squeezing
from gfa_jax.objectives.input_gradients import (
    curvature,
    grad_align,
    gradient_norm,
    jacobian_norm,
    linearized_margins,
    local_linearity,
)
from gfa_jax.threat import ThreatModel
from gfa_jax.types import Array, Objective

RegularizerFactory = Callable[..., Objective]
"""``(weight, *, cross_entropy_weight, **options) -> Objective``; an argument named ``threat`` is
given the threat model."""

REGULARIZERS: Mapping[str, RegularizerFactory] = {
    "curvature": curvature,
    "grad_align": grad_align,
    "gradient_norm": gradient_norm,
    "jacobian_norm": jacobian_norm,
    "linearized_margins": linearized_margins,
    "local_linearity": local_linearity,
    "logit_squeezing": logit_squeezing,
}


def regularizer(
    name: str,
    weight: float | Array,
    *,
    threat: ThreatModel,
    cross_entropy_weight: float | Array = 1.0,
    **options: Any,
) -> Objective:
    """Returns a regulariser: cross-entropy plus its penalty.

    Args:
      name: a key of ``REGULARIZERS``, or one of your own as ``package.module:function`` or
        ``file.py:function``; the function is a ``RegularizerFactory``. A module is imported as
        Python imports it; a file is run.
      weight: of the penalty, >= 0; may be traced.
      threat: given to factories with a parameter of that name.
      cross_entropy_weight: 0 leaves the penalty alone, to add to another objective.
      **options: further arguments of the factory.

    Raises:
      ValueError: for an unknown name, a module, file or function that is not there, an option that
        the factory does not take or needs, a switch that is not bool, or a factory that does not
        return a function.
    """
    factory = _find(name)
    parameters = inspect.signature(factory).parameters
    arguments: dict[str, Any] = {"cross_entropy_weight": cross_entropy_weight, **options}
    if "threat" in parameters:
        arguments["threat"] = threat
    # The first argument is the weight, under whatever name.
    takes = [*parameters][1:]
    if "cross_entropy_weight" not in takes:
        raise ValueError(
            f"regularizer {name!r} must take cross_entropy_weight beside its weight: 0 leaves the "
            f"penalty alone. It takes {[*parameters]}."
        )
    takes_any = any(kind.kind is inspect.Parameter.VAR_KEYWORD for kind in parameters.values())
    if not takes_any:
        free = [option for option in takes if option not in ("cross_entropy_weight", "threat")]
        _validate.known_options(f"regularizer {name!r}", options, free)
    missing = [
        option
        for option in takes
        if option not in arguments
        and parameters[option].default is inspect.Parameter.empty
        and parameters[option].kind
        not in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    ]
    if missing:
        raise ValueError(f"regularizer {name!r} needs the option {missing[0]!r}.")
    for option, value in options.items():
        # Any other value would be taken for true, the string "False" too.
        is_switch = option in parameters and isinstance(parameters[option].default, bool)
        if is_switch and not isinstance(value, bool):
            raise ValueError(f"{option}={value!r} must be True or False.")
    objective = factory(weight, **arguments)
    if not callable(objective):
        raise ValueError(
            f"regularizer {name!r} returned {type(objective).__name__}, not an objective: a "
            "function (model, params, batch, key) -> (loss, aux)."
        )
    return objective


def _find(name: str) -> RegularizerFactory:
    place, separator, attribute = name.rpartition(":")
    if not separator:
        _validate.one_of(REGULARIZERS, regularizer=name)
        return REGULARIZERS[name]
    if not place or (place.startswith(".") and not place.endswith(".py")):
        raise ValueError(
            f"regularizer={name!r} must be package.module:function or file.py:function."
        )
    module = _module(name, place)
    factory = getattr(module, attribute, None)
    if not callable(factory):
        functions = [key for key, value in vars(module).items() if callable(value)]
        raise ValueError(
            f"regularizer={name!r}: {place} has no function {attribute!r}."
            f"{_validate.suggestion(attribute, functions)}"
        )
    return factory


def _module(name: str, place: str) -> ModuleType:
    if not place.endswith(".py"):
        try:
            return importlib.import_module(place)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{place}.".startswith(f"{error.name}."):
                raise  # Found, and missing something of its own.
            raise ValueError(
                f"regularizer={name!r}: Python finds no module {place!r}. Its folder must be on "
                "PYTHONPATH; or name the file, as in path/to/file.py:function."
            ) from error
    path = pathlib.Path(place).absolute()
    if not path.is_file():
        raise ValueError(f"regularizer={name!r}: there is no file {place!r}.")
    return _run_file(path, path.stat().st_mtime_ns)


@functools.cache  # An objective is built at every trace; the file runs again only when it changed.
def _run_file(path: pathlib.Path, changed: int) -> ModuleType:
    return _modules.run_module(path, f"gfa_jax_regularizer_{path.stem}_{changed}")
