"""What the diagnostics take from the attacks."""

import jax
import numpy as np
import pytest

from gfa_jax import ThreatModel, attacks
from gfa_jax.evaluation import masking
from tests.attacks import toy


def outcome(success, num_zero_gradients, num_backwards):
    fields = {"num_zero_gradients": num_zero_gradients, "num_backwards": num_backwards}
    return {"success": np.array(success)} | {
        name: np.array(values, np.int32) for name, values in fields.items()
    }


def test_zero_gradients_count_where_the_attack_failed():
    outcomes = {
        "one": outcome([True, False, False], [9, 1, 0], [10, 10, 10]),
        "two": outcome([False, True, True], [2, 5, 0], [20, 10, 0]),
    }
    assert masking.zero_gradient_share(outcomes) == 3 / 40
    assert masking.zero_gradient_share({}) == 0
    assert masking.zero_gradient_share({"all": outcome([True], [3], [4])}) == 0


@pytest.mark.parametrize(("loss", "is_masked"), [("dlr", False), ("cross_entropy", True)])
def test_a_saturated_model_is_told_by_the_cross_entropy_alone(loss, is_masked):
    """The DLR does not depend on the size of logits, and is flat at some points that are wrong."""
    attack = attacks.apgd(ThreatModel("linf", 0.1), loss=loss, num_steps=20, random_start=False)
    logits_fn = lambda inputs: 1e4 * toy.logits_fn(inputs)  # noqa: E731
    found = jax.device_get(attack(logits_fn, None, toy.INPUTS, toy.LABELS))
    assert np.sum(found.num_zero_gradients) > 0
    assert (masking.zero_gradient_share({loss: found._asdict()}) > 0) == is_masked
