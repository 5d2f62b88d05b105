"""Counts the floating-point operations of a function's products, loops included.

XLA's own count (``compiled.cost_analysis()``) takes the body of a loop once, whatever the number of
iterations, so that an attack of ten steps would count as one.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.extend import core


def count(function: Callable[..., Any], *args: Any) -> int:
    """Returns twice the multiplications of the matrix products and convolutions of a call.

    Sums of products of another form do not count, such as ``models.convolution`` has on CPU for
    small images of few channels; on one CPU device, large ones of 3 channels count as having 4.

    Equal expressions count once and results that nobody uses not at all, as XLA has them; loops
    count as often as they run, and of branches the dearest.

    Args:
      function: traceable.
      *args: arrays, or ``jax.ShapeDtypeStruct``s.

    Raises:
      ValueError: for a loop with a product in it and an unknown number of iterations.
    """
    closed = jax.make_jaxpr(function)(*args)
    return _Graph().run(closed.jaxpr)


class _Graph:
    """Equations as nodes, equal ones as one."""

    def __init__(self) -> None:
        self._numbers: dict[Any, int] = {}
        self._flops: dict[int, int] = {}
        self._inputs: dict[int, Sequence[int]] = {}
        self._fresh: Iterator[int] = itertools.count()

    def run(self, jaxpr: core.Jaxpr) -> int:
        """Returns the operations that the outputs of a closed computation need."""
        outputs = self._inline(jaxpr, [next(self._fresh) for _ in jaxpr.invars])
        reached: set[int] = set()
        pending = list(outputs)
        while pending:
            node = pending.pop()
            if node not in reached:
                reached.add(node)
                pending += self._inputs.get(node, ())
        return sum(self._flops.get(node, 0) for node in reached)

    def _inline(self, jaxpr: core.Jaxpr, inputs: Sequence[int]) -> list[int]:
        values: dict[Any, int] = dict(zip(jaxpr.invars, inputs, strict=True))
        for variable in jaxpr.constvars:
            values[variable] = next(self._fresh)

        def read(atom: Any) -> int:
            if isinstance(atom, core.Literal):
                return self._number(("literal", str(atom.val), str(atom.aval)))
            return values[atom]

        for equation in jaxpr.eqns:
            arguments = [read(atom) for atom in equation.invars]
            inner = _called(equation)
            if inner is not None:
                results = self._inline(inner, arguments)
            else:
                results = self._node(equation, arguments)
            values.update(zip(equation.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _node(self, equation: core.JaxprEqn, arguments: Sequence[int]) -> list[int]:
        shapes = [str(variable.aval) for variable in equation.outvars]
        key = (equation.primitive.name, str(equation.params), *shapes, *arguments)
        node = self._number(key)
        self._flops[node] = _operations(equation)
        self._inputs[node] = arguments
        results = []
        for index in range(len(equation.outvars)):
            results.append(self._number((key, index)))
            self._inputs[results[-1]] = [node]
        return results

    def _number(self, key: Any) -> int:
        if key not in self._numbers:
            self._numbers[key] = next(self._fresh)
        return self._numbers[key]


def _called(equation: core.JaxprEqn) -> core.Jaxpr | None:
    """Returns the computation of an equation that does nothing but call it."""
    if equation.primitive.name in ("scan", "while", "cond", "shard_map"):
        return None
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if name in equation.params:
            return _open(equation.params[name])
    return None


def _open(jaxpr: Any) -> core.Jaxpr:
    return jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr


def _shape(atom: Any) -> tuple[int, ...]:
    shape: tuple[int, ...] = atom.aval.shape
    return shape


def _operations(equation: core.JaxprEqn) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        shape = _shape(equation.invars[0])
        depth = math.prod(shape[axis] for axis in contracted)
        return 2 * depth * math.prod(_shape(equation.outvars[0]))
    if name == "conv_general_dilated":
        numbers = params["dimension_numbers"]
        kernel = _shape(equation.invars[1])
        depth = math.prod(kernel) // kernel[numbers.rhs_spec[0]]
        # Of a dilated input, as in the gradient of a strided convolution, all but one are zeros.
        zeros = math.prod(params["lhs_dilation"])
        return 2 * depth * math.prod(_shape(equation.outvars[0])) // zeros
    if name == "scan":
        return int(params["length"]) * _Graph().run(_open(params["jaxpr"]))
    if name == "shard_map":  # What ``jax.pmap`` becomes: one device's share.
        return int(params["mesh"].size) * _Graph().run(_open(params["jaxpr"]))
    if name == "cond":
        return max(_Graph().run(_open(branch)) for branch in params["branches"])
    if name == "while":
        inside = _Graph().run(_open(params["body_jaxpr"]))
        if inside:
            raise ValueError("a loop with products in it has no fixed number of iterations.")
    return 0
