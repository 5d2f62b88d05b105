"""Adversarial attacks as pure compiled functions, and their registry.

threat = gfa_jax.ThreatModel(norm="linf", epsilon=8 / 255)
attack = gfa_jax.attacks.create("pgd-margin", threat, num_steps=40)
result = jax.jit(attack, static_argnums=0)(logits_fn, keys, inputs, labels)
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from gfa_jax import _validate
from gfa_jax.attacks.base import example_keys
from gfa_jax.attacks.gradient import fgsm, pgd
from gfa_jax.threat import ThreatModel
from gfa_jax.types import AttackFn

REGISTRY: dict[str, Callable[..., AttackFn]] = {
    "fgsm": fgsm,
    "pgd": pgd,
    "pgd-margin": functools.partial(pgd, loss="margin"),
    "pgd-dlr": functools.partial(pgd, loss="dlr"),
}
"""Attack factories ``(threat, **options) -> attack`` by name."""


def options_of(name: str) -> dict[str, inspect.Parameter]:
    """Returns the keyword options that the named attack takes.

    Raises:
      ValueError: for an unknown attack.
    """
    _validate.one_of(REGISTRY, attack=name)
    parameters = inspect.signature(REGISTRY[name]).parameters
    return {option: parameter for option, parameter in parameters.items() if option != "threat"}


def create(name: str, threat: ThreatModel, **options: Any) -> AttackFn:
    """Returns an attack by name.

    Args:
      name: a key of ``REGISTRY``.
      threat: ball and box.
      **options: the factory's own keyword arguments.

    Raises:
      ValueError: for an unknown attack or option (with what is known), or an option out of range.
    """
    _validate.known_options(f"attack {name!r}", options, options_of(name))
    return REGISTRY[name](threat, **options)


__all__ = ["REGISTRY", "create", "example_keys", "fgsm", "options_of", "pgd"]
