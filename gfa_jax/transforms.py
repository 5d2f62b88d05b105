"""Objectives as optax transformations, to chain with any others.

    tx = optax.chain(
        transforms.add_gfa_gradient(3.0),
        optax.clip_by_global_norm(1.0),
        optax.add_decayed_weights(5e-4),
        optax.sgd(0.1),
    )
    updates, opt_state = tx.update(grads, opt_state, params, model=model, batch=batch, key=key)

A penalty joins an update rule as weight decay does. docs/transforms.md shows it with SAM, gradient
accumulation and others, and says what the one pass of ``objectives.gfa(weight)`` saves.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gfa_jax import _validate, objectives
from gfa_jax.types import Array, Batch, ModelFn, Objective, Params, PyTree

Mask = PyTree | Callable[[Params], PyTree]
"""Booleans as a tree of the parameters' structure or a prefix of it, or a function that makes such
a tree of the parameters."""


class AddObjectiveGradientState(NamedTuple):
    """The state of ``add_objective_gradient``.

    Attributes:
      count: int32 scalar, the calls so far; what a schedule of the weight receives.
    """

    count: Array  # type: ignore[assignment]  # Optax's name, which hides tuple.count.


def add_objective_gradient(
    objective: Objective, weight: float | Array | optax.Schedule = 1.0, *, mask: Mask | None = None
) -> optax.GradientTransformationExtraArgs:
    """Adds ``weight(count) * d objective / d params`` to the updates.

    ``update`` takes what an objective takes: ``tx.update(updates, state, params, model=model,
    batch=batch, key=key)``; ``optax.chain`` hands these on, and other arguments are ignored. The
    objective is evaluated at the ``params`` of the call. Its metrics are discarded, and so is its
    model state: BatchNorm statistics are those of the pass that gave the incoming gradients.

    With the updates of ``cross_entropy()`` and a regulariser made with ``cross_entropy_weight=0``,
    the sum is the gradient of the regularised objective, if both see the same key.

    Args:
      objective: ``(model, params, batch, key) -> (loss, aux)``, of ``objectives`` or your own,
        usually with weight 1: ``gradient_norm(1.0, cross_entropy_weight=0)``.
      weight: >= 0, a number, an array (may be traced) or a schedule of the number of calls; arrays
        and schedules are not checked. A Python 0 skips the pass.
      mask: true where the gradient is added; the other updates pass through as they are. It does
        what ``optax.masked`` cannot do here, which hides the other parameters from the objective.

    Returns:
      The transformation. ``init`` gives ``AddObjectiveGradientState``; the updates keep their
      dtypes.

    Raises:
      ValueError: at once for a weight that is negative or not finite; from ``init`` and ``update``
        inside ``optax.masked`` or ``optax.partition``; from ``update``, before the objective is
        traced, without ``params`` or an argument of the objective.
    """
    if not callable(weight):
        _validate.non_negative(weight=weight)

    def init_fn(params: Params) -> AddObjectiveGradientState:
        _refuse_hidden(params)
        return AddObjectiveGradientState(jnp.zeros([], jnp.int32))

    def update_fn(
        updates: optax.Updates,
        state: AddObjectiveGradientState,
        params: Params | None = None,
        *,
        model: ModelFn | None = None,
        batch: Batch | None = None,
        key: Array | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, AddObjectiveGradientState]:
        del extra_args
        if params is None:
            raise ValueError(
                "add_objective_gradient requires the current value of the parameters, but `params` "
                "was not passed to `update`."
            )
        _refuse_hidden(params)
        if model is None or batch is None or key is None:
            raise _missing(model=model, batch=batch, key=key)
        new_state = AddObjectiveGradientState(optax.safe_increment(state.count))
        if isinstance(weight, int | float) and weight == 0:
            return updates, new_state
        scale = weight(state.count) if callable(weight) else weight
        chosen = _expand(mask(params) if callable(mask) else mask, params)

        def loss_fn(params: Params) -> Array:
            return objective(model, params, batch, key)[0]

        def add(keep: bool, update: Array, gradient: Array) -> Array:
            # The compiler drops the backward passes of parameters that stay.
            return (update + scale * gradient).astype(update.dtype) if keep else update

        return jax.tree.map(add, chosen, updates, jax.grad(loss_fn)(params)), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def add_gfa_gradient(
    weight: float | Array | optax.Schedule = 1.0, *, mask: Mask | None = None, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """Adds ``weight(count)`` times the gradient of the alignment penalty to the updates.

    It is ``add_objective_gradient(objectives.gfa(1.0, cross_entropy_weight=0, **options), weight)``
    and behind ``jax.grad`` of ``cross_entropy()`` the same as ``jax.grad`` of
    ``gfa(weight, **options)``, which needs one backward pass less. Put it first in a chain, where
    what follows (clipping, momentum) sees the sum.

    Args:
      weight: as in ``add_objective_gradient``. ``optax.inject_hyperparams(add_gfa_gradient)``
        keeps it in the optimiser's state.
      mask: as in ``add_objective_gradient``.
      **options: of ``objectives.gfa``: ``target``, ``form``, ``layer_norms`` and the others.

    Raises:
      ValueError: as ``add_objective_gradient`` and ``objectives.gfa`` do.
    """
    # optax.inject_hyperparams hands on **options as one argument of that name.
    options |= options.pop("options", {})
    if "cross_entropy_weight" in options:
        raise ValueError(
            f"cross_entropy_weight={options['cross_entropy_weight']!r}: add_gfa_gradient adds the "
            "penalty alone; use add_objective_gradient for anything else."
        )
    objective = objectives.gfa(1.0, cross_entropy_weight=0, **options)
    return add_objective_gradient(objective, weight, mask=mask)


def _refuse_hidden(params: Params) -> None:
    """Raises ValueError where a wrapper has put placeholders in place of parameters."""

    def is_hidden(node: PyTree) -> bool:
        return isinstance(node, optax.MaskedNode)

    if any(is_hidden(leaf) for leaf in jax.tree.leaves(params, is_leaf=is_hidden)):
        raise ValueError(
            "add_objective_gradient needs all parameters, but optax.masked and optax.partition "
            "hide those outside of their mask. Use its own mask=..., and put it before them in the "
            "chain."
        )


def _missing(**arguments: Any) -> ValueError:
    names = [name for name, value in arguments.items() if value is None]
    call = ", ".join(f"{name}={name}" for name in arguments)
    return ValueError(
        f"update got no {' and no '.join(repr(name) for name in names)}: add_objective_gradient is "
        f"called as tx.update(grads, opt_state, params, {call}). Wrappers that are a plain "
        "optax.GradientTransformation do not hand on arguments; add it outside of them."
    )


def _expand(mask: PyTree | None, params: Params) -> PyTree:
    """Returns a boolean for each parameter; ``None`` stands for all of them."""
    if mask is None:
        return jax.tree.map(lambda _: True, params)
    return jax.tree.map(lambda keep, below: jax.tree.map(lambda _: bool(keep), below), mask, params)
