"""Recipes in Python files, as ``--config FILE.py`` and ``--config FILE.py:NAME`` name them."""

import difflib
import inspect
import pathlib
from collections.abc import Callable, Mapping

from gfa_jax import _modules, _validate
from gfa_jax.config.schema import TrainConfig


def choose(recipes: Mapping[str, Callable[[], TrainConfig]], name: str) -> TrainConfig:
    """Returns the named one of several recipes: ``get_config(name)`` of a file that holds many.

    Raises:
      ValueError: for an unknown name, with a suggestion.
    """
    _validate.one_of(recipes, recipe=name)
    return recipes[name]()


def load_file(path: str) -> TrainConfig:
    """Returns ``get_config()`` of a Python file, or ``get_config(NAME)`` for ``FILE.py:NAME``.

    Raises:
      FileNotFoundError: for a missing file, with close matches.
      ValueError: for a file without ``get_config()``, one that takes a name and gets none (or the
        reverse), a name that it does not know, or one that returns something else.
    """
    path, separator, name = path.partition(".py:")
    path += ".py" if separator else ""
    file = pathlib.Path(path)
    if not file.is_file():
        candidates = (
            [str(other) for other in file.parent.glob("*.py")] if file.parent.is_dir() else []
        )
        close = difflib.get_close_matches(str(file), candidates, n=3)
        known = (
            f" Close: {', '.join(close)}."
            if close
            else f" There: {', '.join(sorted(candidates)) or 'nothing'}."
        )
        raise FileNotFoundError(f"config file {path!r} does not exist.{known}")
    module = _modules.run_module(file, f"gfa_jax_config_{file.stem}")
    if not hasattr(module, "get_config"):
        raise ValueError(f"config file {path!r} has no get_config().")
    parameters = inspect.signature(module.get_config).parameters.values()
    takes_name = any(parameter.default is parameter.empty for parameter in parameters)
    if takes_name != bool(name):
        names = ", ".join(getattr(module, "RECIPES", ()))
        raise ValueError(
            f"config file {path!r} holds several recipes: name one, as in {path}:NAME"
            f"{f' ({names})' if names else ''}."
            if takes_name
            else f"config file {path!r} holds one recipe, and takes no name such as {name!r}."
        )
    config = module.get_config(name) if name else module.get_config()
    if not isinstance(config, TrainConfig):
        raise ValueError(
            f"get_config() of {path!r} returns {type(config).__name__}, "
            "not gfa_jax.config.TrainConfig."
        )
    return config
