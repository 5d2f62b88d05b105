"""AutoAttack: several attacks one after another, each on what the others left.

Croce & Hein 2020, arXiv 2003.01208, section 5; versions and settings as in the authors' code.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gfa_jax import _validate, norms
from gfa_jax.attacks import base
from gfa_jax.attacks.auto_pgd import apgd, apgd_targeted
from gfa_jax.attacks.estimators import EXACT, Model, expectation
from gfa_jax.attacks.fast_boundary import fab, fab_targeted
from gfa_jax.attacks.runs import Attack
from gfa_jax.attacks.square_attack import square
from gfa_jax.threat import ThreatModel
from gfa_jax.types import Array, AttackResult

VERSIONS = ("standard", "plus", "rand", "custom")
MEMBERS = ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square")


@dataclasses.dataclass(frozen=True, eq=False)
class Ensemble:
    """Attacks in order; an ``AttackFn``.

    Calling it makes them all in one compiled program: an attack that has nothing left to do is
    skipped. ``attacks.compaction`` runs the same attacks with the same result on the examples that
    are left alone.

    Attributes:
      threat: what counts as success: a member's point within ``epsilon`` of the clean input.
      members: attacks by name, in order.
    """

    threat: ThreatModel
    members: Mapping[str, Attack]

    @property
    def keep(self) -> str:
        """Returns what the result holds, as ``Attack.keep``."""
        return "best"

    def parts(self) -> Mapping[str, Attack]:
        """Returns the members by name."""
        return self.members

    def __call__(
        self,
        logits_fn: Model,
        keys: Array | None,
        inputs: Array,
        labels: Array,
        *,
        targets: Array | None = None,
        start: Array | None = None,
        active: Array | None = None,
    ) -> AttackResult:
        """Attacks each example until the first member breaks it; see ``AttackFn``.

        Returns:
          ``members`` tells which member broke each example; ``loss`` is that member's, or the last
          one's where all failed.

        Raises:
          ValueError: for arguments that do not fit; see ``Attack``.
        """
        base.check_inputs(self.threat, inputs, labels)
        inputs, labels = jnp.asarray(inputs), jnp.asarray(labels)
        asked = jnp.ones(labels.shape, bool) if active is None else jnp.asarray(active)
        result = nothing_found(inputs)
        for name, member in self.members.items():
            left = asked & ~result.success
            attack = functools.partial(
                self._attack, member, logits_fn, keys, inputs, labels, targets, start
            )
            broken_before = result.success
            result = jax.lax.cond(left.any(), attack, lambda left, result: result, left, result)
            result = result._replace(
                members={**result.members, name: newly_broken(result, broken_before)}
            )
        return result

    def _attack(
        self,
        member: Attack,
        logits_fn: Model,
        keys: Array | None,
        inputs: Array,
        labels: Array,
        targets: Array | None,
        start: Array | None,
        left: Array,
        result: AttackResult,
    ) -> AttackResult:
        new = member(logits_fn, keys, inputs, labels, targets=targets, start=start, active=left)
        return merge(result, self.judge(member, inputs, new), left)

    def judge(
        self, member: Attack, inputs: Array | np.ndarray, result: AttackResult
    ) -> AttackResult:
        """Turns successes of a minimum-norm member beyond epsilon into failures.

        The members are not kept, so that results of all attacks have one structure.
        """
        result = result._replace(members={})
        if member.keep != "closest":
            return result
        xp = _numpy_of(inputs)
        near = result.success & (result.distance <= self.threat.epsilon)
        return result._replace(
            adv_inputs=xp.where(norms.expand(near, result.adv_inputs), result.adv_inputs, inputs),
            success=near,
            distance=xp.where(near, result.distance, 0),
            loss=xp.where(near | ~result.success, result.loss, -xp.inf),
        )


def _numpy_of(values: Array | np.ndarray) -> Any:
    """Returns ``jax.numpy``, or NumPy for its arrays: what is on the host stays there."""
    return values.__array_namespace__()


def nothing_found(inputs: Any) -> AttackResult:
    """Returns the result before any attack: clean inputs at no count, in NumPy if they are."""
    xp, size = _numpy_of(inputs), inputs.shape[0]
    none = xp.zeros(size, xp.int32)
    loss = xp.full(size, -xp.inf, xp.float32)
    distance = xp.zeros(size, xp.float32)
    return AttackResult(inputs, none > 0, distance, loss, none, none, none, members={})


def newly_broken(result: AttackResult, broken_before: Array) -> Array:
    """Returns what the last member broke: at distance 0 it was the clean input that misled."""
    return result.success & ~broken_before & (result.distance > 0)


def merge(old: AttackResult, new: AttackResult, attacked: Array) -> AttackResult:
    """Returns ``new`` where ``attacked [B]``, ``old`` elsewhere; counts are added up."""

    def choose(new_field: Array, old_field: Array) -> Array:
        expanded = norms.expand(attacked, new_field)
        return _numpy_of(new_field).where(expanded, new_field, old_field)

    return AttackResult(
        adv_inputs=choose(new.adv_inputs, old.adv_inputs),
        success=choose(new.success, old.success),
        distance=choose(new.distance, old.distance),
        loss=_numpy_of(new.loss).where(attacked & (new.loss > -jnp.inf), new.loss, old.loss),
        num_forwards=old.num_forwards + new.num_forwards,
        num_backwards=old.num_backwards + new.num_backwards,
        num_zero_gradients=old.num_zero_gradients + new.num_zero_gradients,
        members=old.members,
    )


def autoattack(
    threat: ThreatModel,
    *,
    version: str = "standard",
    members: str | Sequence[str] = (),
    num_steps: int = 100,
    num_queries: int = 5000,
    num_samples: int = 20,
    chunk_size: int | None = None,
) -> Ensemble:
    """AutoAttack, with the settings of the authors' code.

    ``standard``: apgd-ce, apgd-t (9 classes), fab-t (9 classes), square; in l_1 apgd-ce makes 5
    restarts and apgd-t tries 5 classes. ``plus``: apgd-ce and apgd-dlr (5 restarts each), fab (5),
    square, apgd-t, fab-t. ``rand``, for randomised models: apgd-ce and apgd-dlr on gradients that
    are means of ``num_samples`` passes; the model is ``logits_fn(inputs, keys)``. ``custom``: the
    ``members`` named, with the settings of ``plus``.

    Args:
      threat: ball and box.
      version: ``standard``, ``plus``, ``rand`` or ``custom``.
      members: for ``custom``, some of ``MEMBERS`` in order, as a sequence or joined by ``+``.
      num_steps: of the gradient attacks.
      num_queries: of the Square attack.
      num_samples: of ``rand``.
      chunk_size: of the Square attack.

    Raises:
      ValueError: for an unknown version or member, or members without ``custom``.
    """
    _validate.one_of(VERSIONS, version=version)
    names = tuple(members.split("+") if isinstance(members, str) else members)
    names = tuple(name for name in names if name)
    if (version == "custom") != bool(names):
        raise ValueError(
            f"version={version!r} with members={members!r}: custom needs members, the others have "
            f"theirs. Known are {list(MEMBERS)}."
        )
    for name in names:
        _validate.one_of(MEMBERS, members=name)
    if len(set(names)) < len(names):
        raise ValueError(f"members={members!r} names an attack twice.")
    standard, is_l1 = version == "standard", threat.norm == "l1"
    num_restarts = {"standard": 5 if is_l1 else 1, "rand": 1}.get(version, 5)
    estimator = expectation(num_samples) if version == "rand" else EXACT
    auto_pgd = functools.partial(
        apgd, threat, num_steps=num_steps, num_restarts=num_restarts, estimator=estimator
    )
    num_targets = 5 if standard and is_l1 else 9
    make: dict[str, Callable[[], Attack]] = {
        "apgd-ce": auto_pgd,
        "apgd-dlr": functools.partial(auto_pgd, loss="dlr"),
        "apgd-t": lambda: apgd_targeted(threat, num_steps=num_steps, num_targets=num_targets),
        "fab": lambda: fab(threat, num_steps=num_steps, num_restarts=5),
        "fab-t": lambda: fab_targeted(threat, num_steps=num_steps),
        "square": lambda: square(threat, num_queries=num_queries, chunk_size=chunk_size),
    }
    order = names or _ORDER[version]
    return Ensemble(threat, {name: make[name]() for name in order})


_ORDER = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce", "apgd-dlr"),
}
