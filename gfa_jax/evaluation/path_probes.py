"""Probes of what PGD meets on its way: its losses and gradients from step to step.

See ``probes`` for what a probe is.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gfa_jax import losses, norms
from gfa_jax.attacks import base
from gfa_jax.evaluation import probes
from gfa_jax.threat import ThreatModel
from gfa_jax.types import Array, LogitsFn

LAST_STEPS = 10
"""The last steps of an attack, in which its loss should not rise any more (D17)."""
LEAST_FALL = 1e-3
"""Share of the height of a path by which its loss must fall for a step to count as a fall (D13)."""


class Path(NamedTuple):
    """What a run of PGD met on its way.

    Attributes:
      loss: float32 ``[num_steps + 1, B]``.
      reached: bool ``[num_steps + 1, B]``, whether the point misleads the model.
      gradient_size: float32 ``[num_steps, B]``, l_1 norms of the gradients of the steps.
    """

    loss: Array
    reached: Array
    gradient_size: Array


def loss_path(
    logits_fn: LogitsFn,
    keys: Array,
    inputs: Array,
    labels: Array,
    threat: ThreatModel,
    *,
    num_steps: int,
    loss: probes.Loss = "log_odds",
) -> Path:
    """Returns what a run of PGD meets on its way.

    Args:
      logits_fn: the model.
      keys: typed PRNG keys ``[B]``.
      inputs: float ``[B, ...]`` within the bounds.
      labels: int ``[B]``.
      threat: ball and box.
      num_steps: steps of 2.5 epsilon in all, from a random start.
      loss: to maximise.
    """
    goal = base.untargeted(losses.get(loss), labels)
    step_size = 2.5 * threat.epsilon / num_steps

    def body(points: Array, _: None) -> tuple[Array, Path]:
        points, here = probes.uphill_step(logits_fn, threat, inputs, goal, step_size, points)
        size = norms.vector_norm(here.gradient, "l1").astype(jnp.float32)
        return points, Path(here.loss, here.reached, size)

    start = threat.random_start(keys, inputs)
    points, path = jax.lax.scan(body, start, length=num_steps)
    logits = logits_fn(points)
    last, last_reached = goal.loss(logits).astype(jnp.float32), goal.reached(logits)
    return Path(
        jnp.concatenate([path.loss, last[None]]),
        jnp.concatenate([path.reached, last_reached[None]]),
        path.gradient_size,
    )


def late_rise(path: Array) -> Array:
    """Returns how much of the rise of a loss falls to the last steps (D17).

    The path is rescaled to [0, 1] and made cumulative; the value is what it gains in the last
    ``LAST_STEPS`` steps (Pintor et al. 2022, indicator 4). 0 for a path that is level.

    Args:
      path: float ``[K, B]``, K > ``LAST_STEPS``.

    Returns:
      ``[B]``, in [0, 1].

    Raises:
      ValueError: for a path that is too short.
    """
    if len(path) <= LAST_STEPS:
        raise ValueError(
            f"path has {len(path)} points; the rise over the last {LAST_STEPS} steps needs more."
        )
    best = jax.lax.cummax(path, axis=0)
    height = best[-1] - jnp.min(path, axis=0)
    return jnp.where(
        height > 0, (best[-1] - best[-1 - LAST_STEPS]) / jnp.where(height > 0, height, 1), 0
    )


def falling_share(path: Array) -> Array:
    """Returns in how many steps of an ascent the loss falls: it passed over a maximum (D13).

    Falls of less than ``LEAST_FALL`` of the height of the path do not count, nor do those that
    rounding explains: the former are those of steps that go to and fro over a smooth ridge.

    Args:
      path: float ``[K, B]``, K > 1.

    Returns:
      Shares ``[B]`` of the K - 1 steps; NaN where the path holds one.
    """
    height = jnp.max(path, axis=0) - jnp.min(path, axis=0)
    rounding = 8 * jnp.finfo(path.dtype).eps * jnp.max(jnp.abs(path), axis=0)
    least = jnp.maximum(LEAST_FALL * height, rounding)
    falls = path[:-1] - path[1:] > least[None]
    return jnp.where(jnp.isnan(height), jnp.nan, jnp.mean(falls, axis=0))


class PathSigns(NamedTuple):
    """What a run of PGD says of each example, each ``[B]``.

    Attributes:
      late_rise: see ``late_rise``.
      passed: whether it misled the model on the way but not in the end.
      falling_share: see ``falling_share``.
      gradient_size: median of the l_1 norms of its gradients.
    """

    late_rise: Array
    passed: Array
    falling_share: Array
    gradient_size: Array


def path_signs(
    logits_fn: LogitsFn,
    keys: Array,
    inputs: Array,
    labels: Array,
    threat: ThreatModel,
    *,
    num_steps: int,
) -> PathSigns:
    """Returns what a run of PGD on the log-odds shows (D11, D13, D16, D17); see ``loss_path``."""
    path = loss_path(logits_fn, keys, inputs, labels, threat, num_steps=num_steps)
    return PathSigns(
        late_rise(path.loss),
        jnp.any(path.reached, axis=0) & ~path.reached[-1],
        falling_share(path.loss),
        jnp.median(path.gradient_size, axis=0),
    )
