"""Adversarial attacks as pure compiled functions, and their registry.

threat = gfa_jax.ThreatModel(norm="linf", epsilon=8 / 255)
attack = gfa_jax.attacks.create("apgd-ce", threat, num_steps=100)
result = jax.jit(attack, static_argnums=0)(logits_fn, keys, inputs, labels)

An attack makes one or several runs (``runs``); ``compaction`` makes them one by one on what is left
of many examples. ``estimators`` say where gradients come from.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from gfa_jax import _validate
from gfa_jax.attacks.adaptive import (
    apgd_feature_tangential,
    apgd_noise_averaged,
    apgd_tangential,
    from_transfer,
    pgd_features,
)
from gfa_jax.attacks.auto_pgd import apgd, apgd_targeted
from gfa_jax.attacks.base import example_keys
from gfa_jax.attacks.carlini_wagner import cw
from gfa_jax.attacks.compaction import attack_in_batches
from gfa_jax.attacks.deep_fool import deepfool
from gfa_jax.attacks.elastic_net import ead
from gfa_jax.attacks.ensemble import Ensemble, autoattack
from gfa_jax.attacks.fast_boundary import fab, fab_targeted
from gfa_jax.attacks.gradient import fgsm, pgd
from gfa_jax.attacks.runs import Attack
from gfa_jax.attacks.square_attack import square
from gfa_jax.threat import ThreatModel

REGISTRY: dict[str, Callable[..., Attack | Ensemble]] = {
    "fgsm": fgsm,
    "pgd": pgd,
    "pgd-margin": functools.partial(pgd, loss="margin"),
    "pgd-dlr": functools.partial(pgd, loss="dlr"),
    "pgd-kl": functools.partial(pgd, loss="kl"),
    "apgd-ce": apgd,
    "apgd-dlr": functools.partial(apgd, loss="dlr"),
    "apgd-t": apgd_targeted,
    "fab": fab,
    "fab-t": fab_targeted,
    "square": square,
    "deepfool": deepfool,
    "ead-en": functools.partial(ead, rule="en"),
    "ead-l1": functools.partial(ead, rule="l1"),
    "cw": cw,
    "autoattack": autoattack,
    "apgd-tangential": apgd_tangential,
    "apgd-feature-tangential": apgd_feature_tangential,
    "apgd-noise-averaged": apgd_noise_averaged,
    "pgd-features": pgd_features,
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


def create(name: str, threat: ThreatModel, **options: Any) -> Attack | Ensemble:
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


__all__ = [
    "REGISTRY",
    "Attack",
    "Ensemble",
    "apgd",
    "apgd_feature_tangential",
    "apgd_noise_averaged",
    "apgd_tangential",
    "apgd_targeted",
    "attack_in_batches",
    "autoattack",
    "create",
    "cw",
    "deepfool",
    "ead",
    "example_keys",
    "fab",
    "fab_targeted",
    "fgsm",
    "from_transfer",
    "options_of",
    "pgd",
    "pgd_features",
    "square",
]
