"""Operations between a model's inputs and its logits that have no useful derivative.

They are found in the program itself, without running it: a rounding hides gradients whatever the
examples are (Athalye et al. 2018, arXiv 1802.00420; Pintor et al. 2022, arXiv 2106.09947).
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from gfa_jax.types import Array, LogitsFn

_WITHOUT_DERIVATIVE = frozenset(
    {
        "argmax",
        "argmin",
        "bitcast_convert_type",
        "ceil",
        "floor",
        "io_callback",
        "nextafter",
        "pure_callback",
        "round",
        "sign",
        "stop_gradient",
    }
)
_LOOPS = frozenset({"scan", "while"})
_PASSES_ON = frozenset(
    {
        "broadcast_in_dim",
        "closed_call",
        "convert_element_type",
        "copy",
        "jit",
        "max",
        "pjit",
        "reshape",
        "select_n",
        "squeeze",
    }
)
"""Operations that a maximum may pass before it is held constant."""


def operations(logits_fn: LogitsFn, inputs: Array | np.ndarray) -> list[str]:
    """Returns the operations between inputs and logits that have no useful derivative (D14).

    These are roundings, signs, choices of an index, casts to integers, callbacks and
    ``stop_gradient``. ReLU, maxima, poolings and selections are fine, and so is the maximum that a
    softmax or logsumexp subtracts and holds constant. An operation counts only if it depends on the
    inputs and the logits on it. A part with a derivative of its own (``jax.custom_vjp``) is looked
    into: a rounding is found there too, whatever derivative it pretends to have.

    Args:
      logits_fn: the model.
      inputs: ``[B, ...]``; shape and dtype are used.

    Returns:
      Sorted names of ``jax.lax`` operations.
    """
    jaxpr = jax.make_jaxpr(logits_fn)(jax.ShapeDtypeStruct(inputs.shape, inputs.dtype)).jaxpr
    found: set[str] = set()
    _follow(jaxpr, [True] * len(jaxpr.invars), found)
    return sorted(found)


def _inner_jaxprs(eqn: core.JaxprEqn) -> list[core.Jaxpr]:
    leaves = jax.tree.leaves(
        list(eqn.params.values()), is_leaf=lambda value: isinstance(value, core.Jaxpr)
    )
    return [
        leaf.jaxpr if isinstance(leaf, core.ClosedJaxpr) else leaf
        for leaf in leaves
        if isinstance(leaf, core.Jaxpr | core.ClosedJaxpr)
    ]


def _name_of_break(eqn: core.JaxprEqn) -> str | None:
    """Returns the name of an operation without a useful derivative; ``None`` for others."""
    name = eqn.primitive.name
    if name == "convert_element_type":
        old = eqn.invars[0].aval.dtype  # type: ignore[attr-defined]
        new = eqn.params["new_dtype"]
        if jnp.issubdtype(old, jnp.floating) and jnp.issubdtype(new, jnp.integer):
            return f"convert_element_type to {np.dtype(new).name}"
    return name if name in _WITHOUT_DERIVATIVE else None


def _follow(jaxpr: core.Jaxpr, of_inputs: Sequence[bool], found: set[str]) -> list[bool]:
    """Adds the breaks between inputs and outputs; returns which outputs depend on the inputs."""
    # With a literal in place of a variable, nothing is followed.
    dependent = {var for var, flag in zip(jaxpr.invars, of_inputs, strict=True) if flag}
    needed = {var for var in jaxpr.outvars if isinstance(var, core.Var)}
    for eqn in reversed(jaxpr.eqns):
        if any(var in needed for var in eqn.outvars):
            needed.update(var for var in eqn.invars if isinstance(var, core.Var))
    producers: dict[core.Var, core.JaxprEqn] = {}
    for eqn in jaxpr.eqns:
        producers.update(dict.fromkeys(eqn.outvars, eqn))
        flags = [isinstance(var, core.Var) and var in dependent for var in eqn.invars]
        if not any(flags) or not any(var in needed for var in eqn.outvars):
            continue
        name = _name_of_break(eqn)
        if name is not None and not (
            name == "stop_gradient" and _is_maximum(eqn.invars[0], producers)
        ):
            found.add(name)
        inner = _inner_jaxprs(eqn)
        outputs = [True] * len(eqn.outvars)
        # A call maps arguments one to one; what a loop or a branch does is taken to mix them all.
        is_call = (
            len(inner) == 1
            and eqn.primitive.name not in _LOOPS
            and len(inner[0].invars) == len(flags)
            and len(inner[0].outvars) == len(outputs)
        )
        for part in inner:
            result = _follow(part, flags if is_call else [True] * len(part.invars), found)
            if is_call:
                outputs = result
        dependent.update(var for var, flag in zip(eqn.outvars, outputs, strict=True) if flag)
    return [isinstance(var, core.Var) and var in dependent for var in jaxpr.outvars]


def _is_maximum(var: Any, producers: dict[core.Var, core.JaxprEqn]) -> bool:
    """Returns whether a value is a maximum of others, up to its shape."""
    eqn = producers.get(var) if isinstance(var, core.Var) else None
    if eqn is None:
        return False
    if eqn.primitive.name == "reduce_max":
        return True
    return eqn.primitive.name in _PASSES_ON and (
        any(_is_maximum(operand, producers) for operand in eqn.invars)
        or any(
            inner_eqn.primitive.name == "reduce_max"
            for part in _inner_jaxprs(eqn)
            for inner_eqn in part.eqns
        )
    )
