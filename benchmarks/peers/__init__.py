"""PyTorch libraries that attacks are compared with, one file each.

A peer's module has ``NAME``, ``PACKAGE`` (as pip knows it), ``ATTACKS``, functions by the names of
``gfa_jax.attacks.REGISTRY``, ``NOTES``, where an attack of that name is known to do something else,
and ``SLOW``, the attacks that take minutes for some hundred images. A function is
``(model, images [B, C, H, W], labels [B], task) -> adversarial images``; it raises
``UnsupportedError`` for a norm that the peer does not have.
"""

import importlib
import importlib.metadata
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

PEERS = ("official", "torchattacks", "foolbox", "art", "adv_lib")
"""Modules of this package."""


class UnsupportedError(Exception):
    """The peer has no such attack for this norm."""


class Task(NamedTuple):
    """What an attack is asked for; each reads the fields that it has a use for.

    Attributes:
      norm: ``linf``, ``l2`` or ``l1``.
      epsilon: the radius, for attacks inside a ball.
      num_steps: gradient steps, of each search for attacks that search.
      step_size: of attacks with a fixed one.
      num_targets: target classes of multi-targeted attacks.
      num_queries: of Square.
      num_searches: values of the trade-off constant that EAD and C&W try.
      num_classes: logits of the model.
      seed: of whatever is drawn.
    """

    norm: str
    epsilon: float
    num_steps: int = 100
    step_size: float = 0.0
    num_targets: int = 9
    num_queries: int = 5000
    num_searches: int = 9
    num_classes: int = 10
    seed: int = 0

    @property
    def cw_constant(self) -> float:
        """C&W's first constant: its code's 1e-3, or torchattacks' 1 where it is the only one."""
        return 1.0 if self.num_searches == 1 else 1e-3


class Peer(NamedTuple):
    """A peer that can be used here.

    Attributes:
      name: for tables.
      version: of the installed package.
      attacks: functions by name.
      notes: known deviations by attack, or by attack and norm (``apgd-t l2``).
      slow: attacks that take minutes.
    """

    name: str
    version: str
    attacks: Mapping[str, Callable[[Any, Any, Any, Task], Any]]
    notes: Mapping[str, str]
    slow: frozenset[str]


def load(name: str) -> Peer:
    """Returns a peer.

    Raises:
      ImportError: where it, or something that it imports, is missing or broken.
    """
    try:
        with warnings.catch_warnings():  # deprecations in what they import
            warnings.simplefilter("ignore")
            module = importlib.import_module(f"benchmarks.peers.{name}")
    except Exception as error:  # a library that does not fit another one fails in many ways
        raise ImportError(f"{name}: {type(error).__name__}: {error}") from error
    version = importlib.metadata.version(module.PACKAGE)
    return Peer(module.NAME, version, module.ATTACKS, module.NOTES, frozenset(module.SLOW))


def pick(task: Task, values: Mapping[str, Any]) -> Any:
    """Returns the value of the task's norm.

    Raises:
      UnsupportedError: where there is none.
    """
    if task.norm not in values:
        raise UnsupportedError(f"not for {task.norm}")
    return values[task.norm]
