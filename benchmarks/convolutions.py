"""Convolutions on CPU: ours, XLA's own and PyTorch's, in value and in derivatives.

python benchmarks/convolutions.py
"""

import dataclasses
import pathlib
import statistics
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

# A script finds the modules of its own folder, not those of the project.
sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax import lax  # noqa: E402

from gfa_jax import _validate, cli  # noqa: E402
from gfa_jax.benchmark import environment, timing  # noqa: E402
from gfa_jax.models import convolution  # noqa: E402


class Shape(NamedTuple):
    """A 3x3 convolution with padding 1 of square images."""

    size: int
    before: int
    after: int
    stride: int = 1


SHAPES = (
    Shape(32, 3, 32),
    Shape(32, 32, 32),
    Shape(16, 64, 64),
    Shape(8, 128, 128),
    Shape(32, 64, 128, 2),
)
PADS = ((1, 1), (1, 1))


@dataclasses.dataclass(frozen=True)
class Flags:
    """Flags of the benchmark."""

    batch_size: int = 128
    """Images."""
    rounds: int = 5
    """In which forms take turns."""


def ours(shape: Shape, inputs: Any, kernel: Any) -> Any:
    """This library's convolution."""
    strides = (shape.stride, shape.stride)
    return convolution.conv_general_dilated(
        inputs, kernel, strides, PADS, dimension_numbers=convolution.FLAX_NHWC
    )


def xla(shape: Shape, inputs: Any, kernel: Any) -> Any:
    """XLA's own."""
    strides = (shape.stride, shape.stride)
    return lax.conv_general_dilated(
        inputs, kernel, strides, PADS, dimension_numbers=convolution.FLAX_NHWC
    )


def kinds(shape: Shape, convolve: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """Returns compiled functions of ``(inputs, kernel, cotangent)`` by what they give.

    ``second`` differentiates the input gradient with respect to kernel and cotangent, as alignment
    does.
    """

    def input_gradient(inputs: Any, kernel: Any, cotangent: Any) -> Any:
        return jax.vjp(lambda x: convolve(shape, x, kernel), inputs)[1](cotangent)[0]

    def weight_gradient(inputs: Any, kernel: Any, cotangent: Any) -> Any:
        return jax.vjp(lambda k: convolve(shape, inputs, k), kernel)[1](cotangent)[0]

    def second(inputs: Any, kernel: Any, cotangent: Any) -> Any:
        energy = lambda k, c: jnp.vdot(inputs, input_gradient(inputs, k, c))  # noqa: E731
        return jax.grad(energy, (0, 1))(kernel, cotangent)

    forward = lambda inputs, kernel, cotangent: convolve(shape, inputs, kernel)  # noqa: E731
    functions = {"forward": forward, "input": input_gradient, "weight": weight_gradient}
    return {name: jax.jit(function) for name, function in (functions | {"second": second}).items()}


def torch_kinds(shape: Shape, arrays: Any) -> dict[str, Callable[[], Any]]:
    """Returns the same of PyTorch, without ``second``; empty without it."""
    try:
        import torch
    except ImportError:
        return {}
    inputs, kernel, cotangent = arrays
    last = {"memory_format": torch.channels_last}
    x, c = (
        torch.tensor(np.asarray(array).transpose(0, 3, 1, 2)).contiguous(**last)
        for array in (inputs, cotangent)
    )
    k = torch.tensor(np.asarray(kernel).transpose(3, 2, 0, 1)).contiguous(**last)
    strides = [shape.stride] * 2

    def gradient(mask: list[bool]) -> Callable[[], Any]:
        return lambda: torch.ops.aten.convolution_backward(
            c, x, k, None, strides, [1, 1], [1, 1], False, [0, 0], 1, mask
        )

    return {
        "forward": lambda: torch.nn.functional.conv2d(x, k, stride=strides, padding=1),
        "input": gradient([True, False, False]),
        "weight": gradient([False, True, False]),
    }


def main() -> None:
    """Parses flags, measures and prints the table."""
    flags = cli.parse(Flags, description="Times convolutions and their derivatives on CPU.")
    cli.run_or_fail(lambda: _validate.positive_integer(**dataclasses.asdict(flags)))
    jax.config.update("jax_platforms", "cpu")
    print(", ".join(f"{key} {value}" for key, value in environment.describe().items()) + ".\n")
    print(
        f"3x3, batch {flags.batch_size}; GFLOP/s of the median over {flags.rounds} rounds in "
        "turns: XLA's own, ours, PyTorch channels-last. *Second*: a weight gradient and a forward "
        "pass.\n"
    )
    print("| positions | channels | stride | forward | input gradient | weight gradient | second |")
    print("|---|---|---|---|---|---|---|")
    for shape in SHAPES:
        print(row(shape, flags), flush=True)


def row(shape: Shape, flags: Flags) -> str:
    """Measures one shape and returns its line of the table."""
    outputs = (shape.size - 1) // shape.stride + 1
    keys = jax.random.split(jax.random.key(0), 3)
    sizes = (
        (flags.batch_size, shape.size, shape.size, shape.before),
        (3, 3, shape.before, shape.after),
        (flags.batch_size, outputs, outputs, shape.after),
    )
    arrays = [jax.random.normal(key, size) for key, size in zip(keys, sizes, strict=True)]
    work = 2 * 9 * flags.batch_size * outputs**2 * shape.before * shape.after
    starts: dict[str, Callable[[], Any]] = {}
    for library, convolve in (("XLA", xla), ("ours", ours)):
        for kind, function in kinds(shape, convolve).items():
            starts[f"{kind} {library}"] = lambda function=function: function(*arrays)
    for kind, start in torch_kinds(shape, arrays).items():
        starts[f"{kind} PyTorch"] = start
    seconds = timing.interleaved(starts, rounds=flags.rounds, samples=1, sample_seconds=0.1)
    cells = []
    for kind in ("forward", "input", "weight", "second"):
        rates = []
        for library in ("XLA", "ours", "PyTorch"):
            if samples := seconds.get(f"{kind} {library}"):
                median = statistics.median(value for part in samples for value in part)
                rates.append(f"{(2 if kind == 'second' else 1) * work / median / 1e9:.0f}")
        cells.append(" / ".join(rates))
    return (
        f"| {shape.size}x{shape.size} | {shape.before} to {shape.after} | {shape.stride} | "
        + " | ".join(cells)
        + " |"
    )


if __name__ == "__main__":
    main()
