"""Checks of arguments; the messages name the argument, its value and what would be valid.

``non_negative`` and ``positive`` let traced values pass: they check Python numbers only.
"""

import difflib
import math
import numbers
from collections.abc import Iterable, Mapping
from typing import Any


def suggestion(name: str, valid: Iterable[str]) -> str:
    """Returns ``" Did you mean 'x'?"`` for the closest valid name, or an empty string."""
    close = difflib.get_close_matches(name, list(valid), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def one_of(valid: Iterable[str], **arguments: Any) -> None:
    """Raises ValueError unless every keyword argument is one of ``valid``."""
    names = sorted(valid)
    for argument, value in arguments.items():
        if value not in names:
            raise ValueError(
                f"{argument}={value!r} is not one of {names}.{suggestion(str(value), names)}"
            )


def instance(kinds: type | tuple[type, ...], **arguments: Any) -> None:
    """Raises ValueError unless every keyword argument is an instance of ``kinds``."""
    for argument, value in arguments.items():
        if not isinstance(value, kinds):
            names = [kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,))]
            raise ValueError(f"{argument}={value!r} must be of type {' or '.join(names)}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def non_negative(**arguments: Any) -> None:
    """Raises ValueError for a Python number that is negative, infinite or NaN."""
    for argument, value in arguments.items():
        if isinstance(value, str) or (
            _is_number(value) and not (value >= 0 and math.isfinite(value))
        ):
            raise ValueError(f"{argument}={value!r} must be a finite number >= 0.")


def positive(**arguments: Any) -> None:
    """Raises ValueError for a Python number that is not above zero and finite."""
    for argument, value in arguments.items():
        if isinstance(value, str) or (
            _is_number(value) and not (value > 0 and math.isfinite(value))
        ):
            raise ValueError(f"{argument}={value!r} must be a finite number > 0.")


def fraction(**arguments: Any) -> None:
    """Raises ValueError for a Python number outside [0, 1]."""
    for argument, value in arguments.items():
        if isinstance(value, str) or (_is_number(value) and not 0 <= value <= 1):
            raise ValueError(f"{argument}={value!r} must be a number in [0, 1].")


def positive_integer(**arguments: Any) -> None:
    """Raises ValueError unless every keyword argument is a Python integer >= 1."""
    for argument, value in arguments.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{argument}={value!r} must be an integer >= 1.")


def known_options(owner: str, options: Mapping[str, Any], valid: Iterable[str]) -> None:
    """Raises ValueError for an option that ``owner`` does not take."""
    names = sorted(valid)
    for option in options:
        if option not in names:
            raise ValueError(
                f"{owner} takes no option {option!r}; it takes {names}.{suggestion(option, names)}"
            )
