"""Optimisers and schedules by name, all from optax."""

from collections.abc import Sequence

import jax
import optax

from gfa_jax import _validate
from gfa_jax.types import Params


def schedule(
    name: str,
    *,
    learning_rate: float,
    num_steps: int,
    warmup_fraction: float,
    drops: Sequence[float] = (0.5, 0.75),
) -> optax.Schedule:
    """Returns a learning-rate schedule of the step.

    Args:
      name: ``constant``; ``cosine`` (to 0); ``linear`` (to 0); ``onecycle`` (linear from peak / 25
        over ``warmup_fraction``, then cosine to peak / 1e4); ``step`` (x 0.1 at each of ``drops``).
        All but ``onecycle`` start with a linear warm-up over ``warmup_fraction``.
      learning_rate: the peak.
      num_steps: of the whole training.
      warmup_fraction: in [0, 1].
      drops: of ``step``: shares of training, in (0, 1).

    Raises:
      ValueError: for an unknown name, or a warm-up that leaves no step. Drops are not checked.
    """
    warmup_steps = round(warmup_fraction * num_steps)
    if warmup_steps >= num_steps:
        raise ValueError(
            f"warmup_fraction={warmup_fraction} of {num_steps} steps leaves none after the warm-up."
        )
    if name == "onecycle":
        first, last = learning_rate / 25, learning_rate / 1e4
        return optax.schedules.warmup_cosine_decay_schedule(
            first, learning_rate, warmup_steps, num_steps, last
        )
    if name == "constant":
        main: optax.Schedule = optax.schedules.constant_schedule(learning_rate)
    elif name == "cosine":
        main = optax.schedules.cosine_decay_schedule(
            learning_rate, max(1, num_steps - warmup_steps)
        )
    elif name == "linear":
        main = optax.schedules.linear_schedule(learning_rate, 0.0, num_steps - warmup_steps)
    elif name == "step":
        factors: dict[int, float] = {}
        for drop in drops:
            # Drops within the warm-up show from its end on.
            boundary = max(0, round(drop * num_steps) - warmup_steps)
            factors[boundary] = 0.1 * factors.get(boundary, 1.0)
        main = optax.schedules.piecewise_constant_schedule(learning_rate, factors)
    else:
        raise ValueError(
            f"schedule={name!r} is not one of ['constant', 'cosine', 'linear', 'onecycle', 'step']."
        )
    if warmup_steps == 0:
        return main
    warmup = optax.schedules.linear_schedule(0.0, learning_rate, warmup_steps)
    return optax.schedules.join_schedules([warmup, main], [warmup_steps])


def is_kernel(params: Params) -> Params:
    """Returns the weight-decay mask: true for leaves of two or more axes.

    Biases and normalisation scales stay free of decay.
    """
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def create(
    name: str,
    learning_rate: optax.Schedule,
    *,
    momentum: float,
    nesterov: bool = True,
    weight_decay: float,
    clip_norm: float,
) -> optax.GradientTransformation:
    """Returns the chain: clip by global norm, update rule with decay on kernels, learning rate.

    Args:
      name: ``adamw`` (decoupled decay) or ``sgd`` (decay is added to the gradient, as in the
        field's recipes).
      learning_rate: schedule.
      momentum: of sgd.
      nesterov: of sgd.
      weight_decay: >= 0.
      clip_norm: global norm of the gradient; 0 for no clipping.

    Raises:
      ValueError: for an unknown name.
    """
    _validate.one_of(("adamw", "sgd"), optimizer=name)
    clip = optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity()
    if name == "adamw":
        return optax.chain(
            clip, optax.adamw(learning_rate, weight_decay=weight_decay, mask=is_kernel)
        )
    decay = optax.add_decayed_weights(weight_decay, mask=is_kernel)
    return optax.chain(clip, decay, optax.sgd(learning_rate, momentum=momentum, nesterov=nesterov))
