"""Runs an attack on many examples from the host, dropping those that are done between its runs.

Inside a compiled attack, an example that is broken costs as much as one that is not. Here each
restart, each target class and each member of an ensemble is run on what is left, in batches of few
sizes so that few programs are compiled. Every example has its own key, so that the results are
those of the compiled attack, up to the rounding of other batch sizes.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from gfa_jax import _validate
from gfa_jax.attacks import base
from gfa_jax.attacks.ensemble import Ensemble, merge, newly_broken, nothing_found
from gfa_jax.attacks.estimators import Estimator
from gfa_jax.attacks.runs import Attack
from gfa_jax.types import Array, AttackResult

ApplyVariables = Callable[..., Any]
"""``(variables, inputs [B, ...]) -> logits [B, C]``; for an attack that calls its model with more
than the inputs (``estimators``), with that."""
OnBatch = Callable[[str, int, int], None]
"""``(what is running, examples done, examples to do)``, for progress."""


class Memory(Protocol):
    """Where the results of batches are kept, so that an interrupted attack goes on."""

    def load(self, name: str) -> Mapping[str, np.ndarray] | None:
        """Returns what was saved under a name, or ``None``."""
        ...

    def save(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Saves arrays under a name, all or nothing."""
        ...


def attack_in_batches(
    attack: Attack | Ensemble,
    apply: ApplyVariables,
    variables: Any,
    keys: Array,
    inputs: np.ndarray,
    labels: np.ndarray,
    *,
    batch_size: int = 256,
    targets: np.ndarray | None = None,
    active: np.ndarray | None = None,
    sharding: jax.sharding.Sharding | None = None,
    on_batch: OnBatch | None = None,
    memory: Memory | None = None,
) -> AttackResult:
    """Attacks any number of examples; broken ones are dropped between runs and members.

    Args:
      attack: from ``attacks.create``.
      apply: the model as a function of its variables, which are arguments of the compiled program.
      variables: any pytree.
      keys: typed PRNG keys ``[N]``: ``attacks.example_keys`` of the positions in the data set.
      inputs: float ``[N, ...]`` in the threat model's bounds.
      labels: int ``[N]``.
      batch_size: examples attacked at once; see ``bucket_sizes``.
      targets: int ``[N]`` for a targeted attack.
      active: bool ``[N]``, the examples to attack; the others come back clean, without success and
        at no count. All by default.
      sharding: how a batch is spread over devices; the variables must be there already.
      on_batch: called after every batch.
      memory: keeps the result of every batch. An attack that is called again with the same
        arguments takes from it what is there: the result is the same, bit by bit.

    Returns:
      The result for all examples, in NumPy. The clean input is judged once a run, and so counted.

    Raises:
      ValueError: for inputs, labels or targets that an attack cannot work on, sizes that do not
        fit, or a memory of something else.
    """
    base.check_inputs(attack.threat, inputs, labels)
    size = len(inputs)
    for name, values in (("keys", keys), ("targets", targets), ("active", active)):
        if values is not None and values.shape != (size,):
            raise ValueError(f"{name} has shape {values.shape}; expected {(size,)}.")
    sizes = bucket_sizes(batch_size, 1 if sharding is None else sharding.num_devices)
    inputs = np.asarray(inputs, jax.dtypes.canonicalize_dtype(inputs.dtype))
    asked: Any = np.ones(size, bool) if active is None else np.asarray(active, bool)
    examples = {"inputs": inputs, "labels": np.asarray(labels, np.int32)}
    if targets is not None:
        examples["targets"] = np.asarray(targets, np.int32)

    def count_classes(member: Attack) -> int:
        some_inputs = jax.ShapeDtypeStruct((sizes[-1], *inputs.shape[1:]), inputs.dtype)
        some_keys = jax.ShapeDtypeStruct((sizes[-1],), keys.dtype)
        logits = _logits.eval_shape(member.estimator, apply, variables, some_inputs, some_keys)
        num_classes: int = logits.shape[1]
        for name in set(examples) - {"inputs"}:
            base.check_classes(examples[name], num_classes, name)
        return num_classes

    def run_batch(
        member: Attack, run: int | None, chosen: np.ndarray, is_real: np.ndarray
    ) -> AttackResult:
        batch = {field: values[chosen] for field, values in examples.items()}
        batch |= {"keys": _take(keys, chosen), "active": is_real}
        if sharding is not None:
            batch = jax.device_put(batch, sharding)
        index = None if run is None else jnp.int32(run)
        new = _attack_batch(member, apply, variables, batch, index)
        return jax.tree.map(lambda leaf: np.asarray(leaf)[is_real], new)

    def run_member(name: str, member: Attack, rest: Array) -> AttackResult:
        # Copies, to be written to.
        found = jax.tree.map(np.array, nothing_found(inputs))
        num_runs = member.num_runs(count_classes(member))
        # Runs that all examples go through anyway need not be programs of their own.
        runs = [None] if num_runs == 1 or member.stop == "never" else range(num_runs)
        for run in runs:
            done_before = member.is_done(found.success, found.distance) if run else ~rest
            left = np.flatnonzero(rest & ~done_before)
            text = name if run is None else f"{name} {run + 1}/{num_runs}".strip()
            done = 0
            for number, (chosen, is_real) in enumerate(_batches(left, sizes)):
                rows = chosen[is_real]
                new = _remembered(
                    memory,
                    f"{name or 'attack'}-{run or 0}-{number}",
                    rows,
                    inputs[rows],
                    functools.partial(run_batch, member, run, chosen, is_real),
                )
                _store(member, found, rows, new)
                done += len(rows)
                if on_batch is not None:
                    on_batch(text, done, len(left))
        return found

    if isinstance(attack, Attack):
        return run_member("", attack, asked)
    result = nothing_found(inputs)
    for name, member in attack.members.items():
        rest = asked & ~result.success
        new = attack.judge(member, inputs, run_member(name, member, rest))
        merged = merge(result, new, rest)
        broken = newly_broken(merged, result.success)
        result = merged._replace(members={**result.members, name: broken})
    return result


def bucket_sizes(batch_size: int, num_devices: int = 1) -> tuple[int, ...]:
    """Returns the batch sizes that programs are compiled for, largest first.

    They are ``batch_size``, a quarter and a sixteenth of it, rounded up to multiples of the number
    of devices.

    Raises:
      ValueError: for a batch size that is not an integer >= 1.
    """
    _validate.positive_integer(batch_size=batch_size)
    sizes = {-(-max(1, batch_size // factor) // num_devices) * num_devices for factor in (1, 4, 16)}
    return tuple(sorted(sizes, reverse=True))


def _batches(
    indices: np.ndarray, sizes: tuple[int, ...]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields index arrays of one of the sizes, and which of their entries are not padding."""
    # How full a batch must be, unless it is of the smallest size. An accelerator takes about as
    # long for a batch of any size, so that few are best; a CPU computes what padding costs.
    filled = 0.75 if jax.default_backend() == "cpu" else 0.5
    while len(indices):
        fitting = [size for size in sizes if len(indices) >= filled * size]
        bucket = fitting[0] if fitting else sizes[-1]
        chosen, indices = indices[:bucket], indices[bucket:]
        active = np.arange(bucket) < len(chosen)
        yield np.concatenate([chosen, np.repeat(chosen[:1], bucket - len(chosen))]), active


def _logits_fn(
    estimator: Estimator, apply: ApplyVariables, variables: Any, inputs: Array, keys: Array
) -> Array:
    return estimator.logits(functools.partial(apply, variables), inputs, keys)


# Compiled never; but what was traced once is not traced again.
_logits = jax.jit(_logits_fn, static_argnames=("estimator", "apply"))


# Outside of jit, indexing takes as long as a step of an attack.
_take = jax.jit(lambda keys, chosen: keys[chosen])


def _attack_batch_fn(
    attack: Attack, apply: ApplyVariables, variables: Any, batch: dict[str, Any], run: Array | None
) -> AttackResult:
    return attack(
        functools.partial(apply, variables),
        batch["keys"],
        batch["inputs"],
        batch["labels"],
        targets=batch.get("targets"),
        active=batch["active"],
        run=run,
    )


_attack_batch = jax.jit(_attack_batch_fn, static_argnames=("attack", "apply"))


def _remembered(
    memory: Memory | None,
    name: str,
    rows: np.ndarray,
    inputs: np.ndarray,
    compute: Callable[[], AttackResult],
) -> AttackResult:
    """Returns the result of a batch from memory or, where it is not there yet, by computing it.

    Raises:
      ValueError: where the memory holds the result of other examples.
    """
    if memory is None:
        return compute()
    kept = memory.load(name)
    if kept is None:
        result = compute()
        # Images that did not move, most of them for strong models, are known.
        moved = np.any((result.adv_inputs != inputs).reshape(len(rows), -1), axis=1)
        fields = {key: value for key, value in result._asdict().items() if key != "members"}
        fields |= {"adv_inputs": result.adv_inputs[moved], "moved": moved, "rows": rows}
        memory.save(name, fields)
        return result
    if not np.array_equal(kept["rows"], rows):
        raise ValueError(
            f"the memory of {name} holds examples {kept['rows'].tolist()}, not {rows.tolist()}: it "
            "belongs to another attack."
        )
    fields = {key: value for key, value in kept.items() if key not in ("moved", "rows")}
    adv_inputs = inputs.copy()
    adv_inputs[kept["moved"]] = kept["adv_inputs"]
    return AttackResult(**{**fields, "adv_inputs": adv_inputs, "members": {}})


def _store(attack: Attack, found: AttackResult, rows: np.ndarray, new: AttackResult) -> None:
    """Writes what a run found into the rows of ``found``, where it is better."""
    old = jax.tree.map(lambda leaf: leaf[rows], found)
    scores = (-old.distance, -new.distance) if attack.keep == "closest" else (old.loss, new.loss)
    better = base.is_better(old.success, scores[0], new.success, scores[1])
    # The first run's clean loss replaces nothing at all.
    better |= np.isneginf(old.loss)
    for field in ("adv_inputs", "success", "distance", "loss"):
        getattr(found, field)[rows[better]] = getattr(new, field)[better]
    for field in ("num_forwards", "num_backwards", "num_zero_gradients"):
        getattr(found, field)[rows] += getattr(new, field)
