"""The timed functions are derivatives of the same convolution, and rows say what was measured."""

import chex
import jax
import pytest

from benchmarks import convolutions


@pytest.mark.parametrize("stride", [1, 2])
def test_all_forms_give_the_same(stride, key, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    shape = convolutions.Shape(8, 3, 4, stride)
    sizes = ((2, 8, 8, 3), (3, 3, 3, 4), (2, 8 // stride, 8 // stride, 4))
    keys = jax.random.split(key, 3)
    arrays = [jax.random.normal(part, size) for part, size in zip(keys, sizes, strict=True)]
    ours = convolutions.kinds(shape, convolutions.ours)
    for kind, function in convolutions.kinds(shape, convolutions.xla).items():
        chex.assert_trees_all_close(ours[kind](*arrays), function(*arrays), rtol=1e-3, atol=1e-4)
    for kind, start in convolutions.torch_kinds(shape, arrays).items():
        found = start() if kind == "forward" else next(part for part in start() if part is not None)
        axes = (2, 3, 1, 0) if kind == "weight" else (0, 2, 3, 1)
        chex.assert_trees_all_close(
            found.numpy().transpose(axes), ours[kind](*arrays), rtol=1e-3, atol=1e-4
        )


def test_a_row_has_a_rate_for_each_form():
    flags = convolutions.Flags(batch_size=2, rounds=1)
    row = convolutions.row(convolutions.Shape(8, 2, 3, 2), flags)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:3] == ["8x8", "2 to 3", "2"]
    assert all(2 <= len(cell.split("/")) <= 3 for cell in cells[3:])
