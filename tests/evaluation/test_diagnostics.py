"""Tests of the diagnostics: each fires on the numbers that it is about, and not on chance."""

import numpy as np
import pytest

from gfa_jax.evaluation import diagnostics

NUM_EXAMPLES = 1000


def robust_for(share):
    """The first so many examples stay right."""
    return np.arange(NUM_EXAMPLES) < share * NUM_EXAMPLES


def status_of(identifier, robust, *, curve=((0.0, 0.9), (0.1, 0.5), (1.0, 0.0)), zero=0.0):
    entries = diagnostics.diagnose(
        robust, curve=curve, curve_examples=NUM_EXAMPLES, box=1.0, zero_gradient_share=zero
    )
    (entry,) = [entry for entry in entries if entry["id"] == identifier]
    assert diagnostics.masking_suspected(entries) == any(
        entry["status"] == "FAIL" and entry["id"] != "D11" for entry in entries
    )
    return entry["status"]


@pytest.mark.parametrize("iterative", ["pgd", "pgd-margin", "apgd-ce:num_steps=50", "apgd-t"])
def test_d1_fails_where_one_step_beats_many(iterative):
    assert status_of("D1", {"fgsm": robust_for(0.5), iterative: robust_for(0.6)}) == "FAIL"
    assert status_of("D1", {"fgsm": robust_for(0.5), iterative: robust_for(0.4)}) == "PASS"
    assert status_of("D1", {iterative: robust_for(0.4)}) == "NA"


def test_d3_fails_where_accuracy_rises_with_the_radius():
    rising = ((0.0, 0.9), (0.1, 0.4), (0.2, 0.6), (1.0, 0.0))
    assert status_of("D3", {}, curve=rising) == "FAIL"
    assert status_of("D3", {}) == "PASS"


def test_d4_fails_where_the_whole_box_is_not_enough():
    assert status_of("D4", {}, curve=((0.0, 0.9), (1.0, 0.1))) == "FAIL"
    assert status_of("D4", {}) == "PASS"


@pytest.mark.parametrize("gradient", ["pgd", "apgd-dlr"])
def test_d5_fails_where_square_breaks_what_gradients_do_not(gradient):
    masked = {gradient: robust_for(0.6), "square:num_queries=9": robust_for(0.59)}
    assert status_of("D5", masked) == "FAIL"
    # Square alone may be the weaker attack by far; what matters is what it alone breaks.
    weaker = {gradient: robust_for(0.4), "square": robust_for(0.7)}
    assert status_of("D5", weaker) == "PASS"
    elsewhere = {gradient: robust_for(0.4), "square": robust_for(0.7) & ~robust_for(0.01)}
    assert status_of("D5", elsewhere) == "FAIL"
    one_alone = {gradient: robust_for(0.4), "square": robust_for(0.7) & ~robust_for(0.001)}
    assert status_of("D5", one_alone) == "PASS"
    assert status_of("D5", {gradient: robust_for(0.4)}) == "NA"


@pytest.mark.parametrize("loss", ["pgd-dlr", "apgd-dlr"])
def test_d10_warns_where_cross_entropy_is_the_weaker_loss(loss):
    assert status_of("D10", {"apgd-ce": robust_for(0.6), loss: robust_for(0.4)}) == "WARN"
    assert status_of("D10", {"apgd-ce": robust_for(0.4), loss: robust_for(0.4)}) == "PASS"


def test_d11_fails_for_any_zero_gradient():
    assert status_of("D11", {}, zero=1e-6) == "FAIL"
    assert status_of("D11", {}) == "PASS"
