"""Command lines: flags as dataclass fields, in the convention that JAX users know.

``--config FILE`` names a recipe, ``--config.a.b=value`` overrides one of its fields, and the other
flags are the fields of a dataclass. Fractions (``8/255``) are numbers. An unknown flag ends the
program with a suggestion, before anything runs.
"""

import argparse
import dataclasses
import fractions
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

import tyro

from gfa_jax import config as config_lib
from gfa_jax import distributed, failures

Flags = TypeVar("Flags")
Value = TypeVar("Value")


def parse_number(text: str) -> float:
    """Returns the number in ``0.1`` or ``8/255``; ValueError for anything else."""
    try:
        return float(fractions.Fraction(text)) if "/" in text else float(text)
    except ZeroDivisionError as error:
        raise ValueError(f"{text} divides by zero") from error


def split_names(text: str) -> list[str]:
    """Returns the parts of a comma-separated list, without blanks and empty ones."""
    return [part.strip() for part in text.split(",") if part.strip()]


def parse_value(text: str, default: object, what: str) -> Any:
    """Parses the text of an option as the kind of its default.

    ``None`` stands for a number, and a tuple for names joined by ``+``.

    Args:
      text: such as ``8/255``.
      default: of the option.
      what: the option, for messages.

    Raises:
      ValueError: naming the option, the value and what would be valid.
    """
    if isinstance(default, str | tuple):
        return text
    try:
        if isinstance(default, bool):
            return {"true": True, "false": False}[text.lower()]
        if isinstance(default, int) or (default is None and text.isdecimal()):
            return int(text)
        return parse_number(text)
    except (KeyError, ValueError) as error:
        kind = {bool: "true or false", int: "an integer"}.get(type(default), "a number")
        raise ValueError(f"{what}={text} must be {kind}.") from error


_REGISTRY = tyro.constructors.ConstructorRegistry()


@_REGISTRY.primitive_rule
def _number_rule(
    info: tyro.constructors.PrimitiveTypeInfo,
) -> tyro.constructors.PrimitiveConstructorSpec[float] | None:
    """Lets floats be given as fractions."""
    if info.type is not float:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="NUMBER",
        instance_from_str=lambda texts: parse_number(texts[0]),
        is_instance=lambda value: isinstance(value, int | float) and not isinstance(value, bool),
        str_from_instance=lambda value: [repr(float(value))],
    )


def parse(
    flags: type[Flags],
    argv: Sequence[str] | None = None,
    *,
    description: str,
    default: Flags | None = None,
) -> Flags:
    """Parses the command line into a dataclass.

    Args:
      flags: a dataclass; its field docstrings are the help.
      argv: without the program's name; the process's own by default.
      description: shown by ``--help``.
      default: values of the flags that are not given.

    Raises:
      SystemExit: with code 2 for an unknown flag or a bad value, after a message with suggestions.
    """
    with _REGISTRY:
        return tyro.cli(
            flags,
            args=sys.argv[1:] if argv is None else list(argv),
            description=description,
            default=tyro.MISSING_NONPROP if default is None else default,
            config=(tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands),
        )


@dataclasses.dataclass(frozen=True)
class TrainFlags(distributed.Cluster):
    """Flags of ``train.py`` beside ``--config FILE``."""

    workdir: str
    """Folder of the run; the same command with the same folder resumes."""
    config: config_lib.TrainConfig
    """Fields of the recipe."""
    stop_after: int | None = None
    """Stop, saved, once so many steps are done; schedules still span the whole training."""
    compile_cache: str | None = None
    """Folder in which compiled programs are kept between runs."""
    dry_run: bool = False
    """Compile the step, print what it needs, and write nothing; data need not be there."""
    tensorboard: bool = False
    """Write TensorBoard events to WORKDIR/tensorboard too (needs the tensorboard extra)."""


def split_config(argv: Sequence[str] | None = None) -> tuple[config_lib.TrainConfig, list[str]]:
    """Returns the recipe that ``--config FILE`` names, and the other arguments.

    Args:
      argv: without the program's name; the process's own by default.

    Raises:
      SystemExit: without ``--config``, unless help is asked for, or for a file that cannot be used.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE")
    known, rest = parser.parse_known_args(sys.argv[1:] if argv is None else list(argv))
    if known.config is not None:
        return run_or_fail(lambda: config_lib.load_file(known.config)), rest
    if not any(flag in rest for flag in ("-h", "--help")):
        fail("--config FILE is required, such as --config configs/digits_gfa.py.")
    return config_lib.TrainConfig(), rest


def parse_train(argv: Sequence[str] | None = None) -> TrainFlags:
    """Parses ``--config FILE --workdir DIR [--config.a.b=value ...]``.

    Raises:
      SystemExit: as ``parse``, and for a config file that cannot be used.
    """
    config, rest = split_config(argv)
    rest = [f"{flag}=True" if flag in ("--dry_run", "--dry-run") else flag for flag in rest]
    description = (
        "Trains a classifier. --config FILE names the recipe (see configs/); its fields can be "
        "overridden here."
    )
    default = TrainFlags(workdir=tyro.MISSING, config=config)
    return parse(TrainFlags, rest, description=description, default=default)


def fail(message: str) -> NoReturn:
    """Ends the program with code 2 and a message on standard error."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def fail_at_once(message: str) -> NoReturn:
    """Does what ``fail`` does, waiting for no thread and running nothing left for the exit."""
    print(f"error: {message}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(2)


def run_or_fail(function: Callable[[], Value]) -> Value:
    """Calls a function; errors that a user can mend end the program with their message alone.

    With several processes, any error ends all of them.
    """
    try:
        with failures.felt_by_all():
            return function()
    except failures.MENDABLE as error:
        if not failures.is_mendable(error):
            raise
        fail(str(error))
