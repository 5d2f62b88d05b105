"""Runs the probes on a subset of examples and sums them up in plain numbers.

``measure`` is called from the host; ``diagnostics.diagnose`` judges what it returns.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gfa_jax import _validate
from gfa_jax.attacks import base
from gfa_jax.attacks.estimators import fold_in
from gfa_jax.evaluation import (
    attack_probes,
    gradient_probes,
    hard_label,
    nondifferentiable,
    path_probes,
    surface_probes,
)
from gfa_jax.threat import ThreatModel
from gfa_jax.types import Array, LogitsFn


@dataclasses.dataclass(frozen=True)
class Level:
    """How much ``measure`` spends.

    Attributes:
      num_steps: of the attacks that are compared by their steps (D2), rising.
      num_restarts: numbers of restarts that are compared (D9), rising.
      restart_steps: steps of each restart, and of the attacks on scaled logits (D10).
      path_steps: steps of the attack whose losses are kept (D11, D13, D16, D17).
      num_draws: random points for each example (D7).
      num_drawn_examples: examples at most for which they are drawn.
      num_directions: along which labels alone are looked at, for each example (D6).
      num_labelled: examples at most for which that is done, the first.
      num_noise: random points for the linearity of the loss (D13) and its stability (D15).
      num_compared: examples at most whose logits are compared between passes (D22).
    """

    num_steps: tuple[int, ...]
    num_restarts: tuple[int, ...]
    restart_steps: int
    path_steps: int
    num_draws: int
    num_drawn_examples: int
    num_directions: int
    num_labelled: int
    num_noise: int
    num_compared: int


LEVELS = {
    "quick": Level((1, 5, 10, 20, 50), (1, 5), 20, 50, 1000, 100, 10, 100, 20, 64),
    "full": Level(
        (1, 5, 10, 20, 50, 100, 200), (1, 5, 20), 50, 200, 10_000, 100, 200, 500, 100, 256
    ),
}
"""The levels of ``measure`` by name."""


def _as_pytree(logits_fn: LogitsFn) -> LogitsFn:
    """Returns the model as an argument that compiled functions take."""
    if isinstance(logits_fn, jax.tree_util.Partial):
        return logits_fn
    return jax.tree_util.Partial(logits_fn)


@jax.jit
def _logits(logits_fn: LogitsFn, inputs: Array) -> Array:
    return logits_fn(inputs)


def inconsistency(
    logits_fn: LogitsFn,
    inputs: Array | np.ndarray,
    *,
    num_passes: int = 5,
    num_single: int = 4,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns how much logits depend on the pass and on the rest of the batch (D22).

    Compares passes of the same batch, of the batch in reverse order, of the batch with as many
    blank inputs after it, and of single examples. Runs from the host.

    Args:
      logits_fn: the model.
      inputs: float ``[B, ...]``.
      num_passes: passes of the same batch.
      num_single: the first so many examples are also passed alone.

    Returns:
      ``(largest difference from the first pass [B], as a share of the example's largest |logit|;
      logits [B, C])``.
    """
    call = functools.partial(_logits, _as_pytree(logits_fn))
    inputs = jnp.asarray(inputs)
    size = len(inputs)
    first = np.asarray(call(inputs), np.float32)
    largest = np.zeros(size, np.float32)

    def compare(logits: Array, examples: slice) -> None:
        difference = np.abs(np.asarray(logits, np.float32) - first[examples]).max(axis=1)
        # What is not a number differs from everything.
        difference = np.where(np.isnan(difference), np.inf, difference)
        largest[examples] = np.maximum(largest[examples], difference)

    for _ in range(num_passes - 1):
        compare(call(inputs), slice(None))
    compare(call(inputs[::-1])[::-1], slice(None))
    compare(call(jnp.concatenate([inputs, jnp.zeros_like(inputs)]))[:size], slice(None))
    for index in range(min(num_single, size)):
        alone = slice(index, index + 1)
        compare(call(inputs[alone]), alone)
    scale = np.maximum(np.abs(first).max(axis=1), np.finfo(np.float32).tiny)
    return largest / scale, first


Probe = Callable[..., Any]


@functools.lru_cache(maxsize=64)
def _compiled(probe: Probe, options: tuple[tuple[str, Any], ...]) -> Probe:
    """Returns the probe with its static options, compiled once for the process."""
    return jax.jit(functools.partial(probe, **dict(options)))


@dataclasses.dataclass(frozen=True)
class _Subset:
    """Examples that are probed batch by batch.

    Attributes:
      logits_fn: the model, as a pytree.
      keys: typed PRNG keys ``[N]``.
      inputs: ``[N, ...]``.
      labels: int32 ``[N]``.
      threat: ball and box.
      batch_size: examples at once.
      sharding: how a batch is spread over devices, or ``None``.
      known: what probes have returned already.
    """

    logits_fn: LogitsFn
    keys: Array
    inputs: np.ndarray
    labels: np.ndarray
    threat: ThreatModel
    batch_size: int
    sharding: jax.sharding.Sharding | None
    known: dict[Any, Any] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        """Returns the number of examples."""
        return len(self.labels)

    def take(self, indices: np.ndarray) -> "_Subset":
        """Returns some of the examples."""
        return dataclasses.replace(
            self,
            keys=self.keys[indices],
            inputs=self.inputs[indices],
            labels=self.labels[indices],
            batch_size=self.batch_size if self.sharding else min(self.batch_size, len(indices)),
            known={},
        )

    def probe(self, number: int, probe: Probe, *arguments: Any, **options: Any) -> Any:
        """Returns a probe's values for all examples, in NumPy, examples along the last axis.

        The last batch is filled with copies of the last example.

        Args:
          number: of the keys, so that probes draw apart.
          probe: the function.
          *arguments: NumPy scalars, traced, after the threat model.
          **options: static.
        """
        static = tuple(sorted(options.items()))
        called = (number, probe, arguments, static)
        if called not in self.known:
            function = _compiled(probe, static)
            parts = [self._batch(function, number, first, arguments) for first in self._firsts()]
            self.known[called] = jax.tree.map(
                lambda *values: np.concatenate(values, axis=-1), *parts
            )
        return self.known[called]

    def _firsts(self) -> range:
        return range(0, len(self), self.batch_size)

    def _batch(self, function: Probe, number: int, first: int, arguments: tuple[Any, ...]) -> Any:
        indices = np.minimum(np.arange(first, first + self.batch_size), len(self) - 1)
        batch = (fold_in(self.keys[indices], number), self.inputs[indices], self.labels[indices])
        if self.sharding is not None:
            batch = jax.device_put(batch, self.sharding)
        values = jax.device_get(function(self.logits_fn, *batch, self.threat, *arguments))
        kept = min(self.batch_size, len(self) - first)
        return jax.tree.map(lambda value: value[..., :kept], values)


def measure(
    logits_fn: LogitsFn,
    keys: Array,
    inputs: np.ndarray,
    labels: np.ndarray,
    threat: ThreatModel,
    *,
    level: str | Level = "quick",
    survived: np.ndarray | None = None,
    only: Collection[str] | None = None,
    batch_size: int = 256,
    sharding: jax.sharding.Sharding | None = None,
) -> dict[str, dict[str, Any]]:
    """Runs probes on a subset of examples; from the host.

    Args:
      logits_fn: the model. ``jax.tree_util.Partial(apply, variables)`` keeps the variables out of
        the compiled programs, which later models of the same ``apply`` then share.
      keys: typed PRNG keys ``[N]`` (``attacks.example_keys``).
      inputs: float ``[N, ...]`` within the bounds.
      labels: int ``[N]``.
      threat: ball and box; epsilon > 0.
      level: a key of ``LEVELS``, or how much to spend.
      survived: bool ``[N]``, the examples that resisted the attacks: random points are drawn around
        the first of these. By default those that are right and resist the restarts.
      only: the ids of ``MEASURED`` to run; all by default.
      batch_size: examples at once.
      sharding: how a batch is spread over devices; the model's variables must be there already.

    Returns:
      A dict that JSON can hold: by diagnostic id, ``n`` (examples) and what was found, with the
      curves behind it. What is not a finite number is ``None``.

    Raises:
      ValueError: for inputs or labels that an attack cannot work on, an unknown level or id, or
        sizes that do not fit.
    """
    base.check_inputs(threat, inputs, labels)
    _validate.positive_integer(batch_size=batch_size)
    _validate.positive(epsilon=threat.epsilon)
    if isinstance(level, str):
        _validate.one_of(LEVELS, level=level)
        level = LEVELS[level]
    for identifier in only or ():
        _validate.one_of(MEASURED, only=identifier)
    size = len(inputs)
    if not size:
        raise ValueError(f"inputs has shape {inputs.shape}; probes need at least one example.")
    if keys.shape != (size,):
        raise ValueError(f"keys has shape {keys.shape}; expected {(size,)}.")
    if survived is not None and (survived.shape != (size,) or survived.dtype != bool):
        raise ValueError(
            f"survived has shape {survived.shape} and dtype {survived.dtype}; expected bool of "
            f"shape {(size,)}."
        )
    if sharding is not None and batch_size % sharding.num_devices:
        raise ValueError(
            f"batch_size={batch_size} must be a multiple of the {sharding.num_devices} devices."
        )
    subset = _Subset(
        _as_pytree(logits_fn),
        keys,
        np.asarray(inputs),
        np.asarray(labels, np.int32),
        threat,
        batch_size if sharding else min(batch_size, size),
        sharding,
    )
    return {
        identifier: {"n": size, **summarise(subset, level, survived)}
        for identifier, summarise in _SUMMARIES.items()
        if only is None or identifier in only
    }


def _number(value: Any) -> float | None:
    """Returns a float; ``None`` for what is not finite, which JSON cannot hold."""
    return float(value) if np.isfinite(value) else None


def _numbers(values: Any) -> list[float | None]:
    return [_number(value) for value in values]


def _compared(counts: Sequence[int], resist: np.ndarray) -> dict[str, Any]:
    """Returns accuracies along ``resist [K, N]``, and on how many examples neighbours differ."""
    return {
        "counts": list(counts),
        "accuracy": _numbers(resist.mean(axis=1)),
        "num_differing": (resist[1:] != resist[:-1]).sum(axis=1).tolist(),
    }


Survived = np.ndarray | None


def _sum_up_steps(subset: _Subset, level: Level, survived: Survived) -> dict[str, Any]:
    resist = [
        subset.probe(2, attack_probes.resists_steps, np.int32(count)) for count in level.num_steps
    ]
    return _compared(level.num_steps, np.stack(resist))


def _make_restarts(subset: _Subset, level: Level) -> tuple[np.ndarray, np.ndarray]:
    return subset.probe(
        9,
        attack_probes.restarts,
        num_restarts=max(level.num_restarts),
        num_steps=level.restart_steps,
    )


def _walk(subset: _Subset, level: Level) -> path_probes.PathSigns:
    return subset.probe(17, path_probes.path_signs, num_steps=level.path_steps)


def _left(subset: _Subset, level: Level, survived: Survived) -> np.ndarray:
    """Returns which examples resisted the attacks, by default the restarts."""
    # Inputs that are wrong without an attack count as broken by any run.
    return survived if survived is not None else ~np.any(_make_restarts(subset, level)[0], axis=0)


def _sum_up_labels(subset: _Subset, level: Level, survived: Survived) -> dict[str, Any]:
    first = np.arange(min(level.num_labelled, len(subset)))
    distances = subset.take(first).probe(
        6, hard_label.closest_by_labels, num_directions=level.num_directions
    )
    left = _left(subset, level, survived)[first]
    found = distances[np.isfinite(distances)]
    return {
        "n": len(first),
        "num_directions": level.num_directions,
        "num_survivors": int(left.sum()),
        "num_within": int(np.sum(left & (distances <= subset.threat.epsilon))),
        "median": _number(np.median(distances)),
        "found_share": len(found) / len(first),
        "distances": _numbers(distances),
    }


def _sum_up_draws(subset: _Subset, level: Level, survived: Survived) -> dict[str, Any]:
    drawn = np.flatnonzero(_left(subset, level, survived))[: level.num_drawn_examples]
    first = (
        subset.take(drawn).probe(7, attack_probes.random_draws, num_draws=level.num_draws)
        if drawn.size
        else np.zeros(0, np.int32)
    )
    return {
        "n": len(first),
        "num_draws": level.num_draws,
        "num_broken": int((first >= 0).sum()),
        "first": first[first >= 0].tolist(),
    }


def _sum_up_restarts(subset: _Subset, level: Level, survived: Survived) -> dict[str, Any]:
    broken, _ = _make_restarts(subset, level)
    resist = [~broken[:count].any(axis=0) for count in level.num_restarts]
    return {**_compared(level.num_restarts, np.stack(resist)), "num_steps": level.restart_steps}


def _sum_up_loss(subset: _Subset, level: Level, survived: Survived) -> dict[str, Any]:
    gaps = subset.probe(23, surface_probes.logit_statistics)[3]
    gaps = gaps[np.isfinite(gaps) & (gaps > 0)]
    # The gap of half of the examples is then below 1. Ties have none to scale.
    temperature = float(np.median(gaps)) if gaps.size else 1.0
    resist = [
        subset.probe(
            10,
            attack_probes.resists_cross_entropy,
            np.float32(divisor),
            num_steps=level.restart_steps,
        )
        for divisor in (1.0, temperature)
    ]
    return {
        "temperature": temperature,
        "num_steps": level.restart_steps,
        "accuracy": _numbers(np.mean(resist, axis=1)),
        "num_differing": int((resist[0] != resist[1]).sum()),
    }


def _sum_up_sizes(subset: _Subset, level: Level, survived: Survived) -> dict[str, Any]:
    sizes, underflows = subset.probe(11, gradient_probes.gradient_sizes)
    names = ("clean", "random_start", "cross_entropy", "path")
    medians = [*np.median(sizes, axis=1), np.median(_walk(subset, level).gradient_size)]
    return {
        "median_gradient": dict(zip(names, _numbers(medians), strict=True)),
        "underflow_share": float(underflows.mean()),
    }


def _sum_up_agreement(subset: _Subset, level: Level, survived: Survived) -> dict[str, Any]:
    cosines, agreeing = subset.probe(12, gradient_probes.gradient_agreement)
    errors = np.median(subset.probe(12, gradient_probes.derivative_errors), axis=-1)
    return {
        "radii": list(gradient_probes.RADII),
        "median_cosine": _numbers(np.median(cosines, axis=1)),
        "median_sign_agreement": _numbers(np.median(agreeing, axis=1)),
        "steps": list(gradient_probes.DIFFERENCE_STEPS),
        "median_error": {
            name: _numbers(row)
            for name, row in zip(gradient_probes.DIRECTIONS, errors, strict=True)
        },
    }


def _sum_up_linearity(subset: _Subset, level: Level, survived: Survived) -> dict[str, Any]:
    errors = subset.probe(13, surface_probes.linearity_errors, num_draws=level.num_noise)
    return {
        "num_draws": level.num_noise,
        "median": _number(np.median(errors)),
        "quantile_95": _number(np.quantile(errors, 0.95)),
        "num_steps": level.path_steps,
        "falling_share": _number(_walk(subset, level).falling_share.mean()),
    }


def _sum_up_missing(subset: _Subset, level: Level, survived: Survived) -> dict[str, Any]:
    (clean, _, cross_entropy), _ = subset.probe(11, gradient_probes.gradient_sizes)
    return {
        "zero_share": float(np.mean(clean == 0)),
        "zero_share_cross_entropy": float(np.mean(cross_entropy == 0)),
        "operations": nondifferentiable.operations(subset.logits_fn, subset.inputs[:2]),
    }


def _sum_up_stability(subset: _Subset, level: Level, survived: Survived) -> dict[str, Any]:
    lower, upper = subset.threat.bounds
    radius = surface_probes.NOISE_RADIUS * (upper - lower)
    values = subset.probe(15, surface_probes.instability, num_draws=level.num_noise, radius=radius)
    return {"num_draws": level.num_noise, "radius": radius, "mean": _number(values.mean())}


def _sum_up_results(subset: _Subset, level: Level, survived: Survived) -> dict[str, Any]:
    _, wrong = _make_restarts(subset, level)
    return {
        "num_contradictions": int(wrong.any(axis=0).sum()),
        "passed_share": float(_walk(subset, level).passed.mean()),
    }


def _sum_up_late_rise(subset: _Subset, level: Level, survived: Survived) -> dict[str, Any]:
    rise = _walk(subset, level).late_rise
    return {
        "num_steps": level.path_steps,
        "last_steps": path_probes.LAST_STEPS,
        "mean_rise": _number(rise.mean()),
        "quantiles": [0.5, 0.9, 1.0],
        "rise": _numbers(np.quantile(rise, (0.5, 0.9, 1.0))),
    }


def _sum_up_consistency(subset: _Subset, level: Level, survived: Survived) -> dict[str, Any]:
    difference, logits = inconsistency(subset.logits_fn, subset.inputs[: level.num_compared])
    sums_to_one = np.allclose(logits.sum(axis=1), 1, atol=1e-3)
    return {
        "n": len(difference),
        "max_difference": _number(difference.max()),
        "probabilities": bool(sums_to_one and np.all(logits >= 0)),
    }


def _sum_up_logits(subset: _Subset, level: Level, survived: Survived) -> dict[str, Any]:
    largest, lead, saturated, _ = subset.probe(23, surface_probes.logit_statistics)
    quantiles = (0.05, 0.25, 0.5, 0.75, 0.95)
    return {
        "max_logit": _number(largest.max()),
        "quantiles": list(quantiles),
        "lead": _numbers(np.quantile(lead, quantiles)),
        "saturated_share": float(saturated.mean()),
    }


_SUMMARIES: dict[str, Callable[[_Subset, Level, Survived], dict[str, Any]]] = {
    "D2": _sum_up_steps,
    "D6": _sum_up_labels,
    "D7": _sum_up_draws,
    "D9": _sum_up_restarts,
    "D10": _sum_up_loss,
    "D11": _sum_up_sizes,
    "D12": _sum_up_agreement,
    "D13": _sum_up_linearity,
    "D14": _sum_up_missing,
    "D15": _sum_up_stability,
    "D16": _sum_up_results,
    "D17": _sum_up_late_rise,
    "D22": _sum_up_consistency,
    "D23": _sum_up_logits,
}

MEASURED = tuple(_SUMMARIES)
"""The ids of the diagnostics that ``measure`` measures."""
