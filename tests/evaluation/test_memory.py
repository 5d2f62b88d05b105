"""Tests of the memory estimate against arrays of known size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gfa_jax.evaluation import memory, subject

IMAGES = np.zeros((4, 8, 8, 1), np.float32)


def model(width):
    variables = {"in": jnp.ones((64, width)), "out": jnp.ones((width, 3))}

    def logits_fn(variables, inputs):
        hidden = jnp.tanh(inputs.reshape(len(inputs), -1) @ variables["in"])
        return hidden @ variables["out"]

    return subject.from_function(logits_fn, IMAGES, np.zeros(4, np.int32), variables=variables)


def test_weights_and_activations_are_counted():
    small, wide = memory.estimate(model(64), 4), memory.estimate(model(4096), 4)
    weights = 4 * (64 + 3) * 4096
    assert wide.needed > weights
    assert wide.needed < 3 * weights
    assert small.needed < wide.needed / 20
    # Hidden values of each device's share of the batch.
    large = memory.estimate(model(4096), 4 * 1024)
    share = 4 * 4096 * 4 * 1024 / jax.device_count()
    assert large.needed - wide.needed >= 0.9 * share


def test_what_does_not_fit_is_refused():
    found = memory.Estimate(needed=3 * 2**30, available=2**30)
    with pytest.raises(ValueError, match="batch_size=512 is too large.*3,072 MiB.*1,024 MiB"):
        found.check(512)
    memory.Estimate(needed=2**30, available=2**31).check(512)
    memory.Estimate(needed=2**60, available=None).check(512)
    assert "free" not in memory.Estimate(1, None).text


def test_this_machine_has_some_left():
    available = memory.estimate(model(8), 4).available
    assert available is None or available > 0
