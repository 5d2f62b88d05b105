"""Tests of C&W: closed forms, norms that official FAB finds, peers' bugs, invariants."""

import numpy as np
import pytest

from gfa_jax import ThreatModel, losses
from gfa_jax.attacks.carlini_wagner import cw
from tests.attacks import minimum_norm, toy
from tests.attacks.minimum_norm import Linear, linear, run
from tests.attacks.running import assert_same

# Steps and constants that succeed within a few short searches.
QUICK = {
    "num_steps": 25,
    "num_searches": 4,
    "initial_constant": 0.1,
    "learning_rate": 0.05,
    "confidence": 0.0,
}


def by_hand(example, abort):
    """Returns the best point, or None, and the steps made for one example of the golden model."""
    num_steps = QUICK["num_steps"]
    clean, label = toy.INPUTS[example].astype(np.float64), toy.LABELS[example]
    first, second = toy.FIRST.astype(np.float64), toy.SECOND.astype(np.float64)
    others = np.delete(np.arange(5), label)
    start = np.arctanh((2 * clean - 1) * 0.999999)
    origin = (np.tanh(start) + 1) / 2
    low, high, constant = 0.0, 1e10, QUICK["initial_constant"]
    best, best_size, count = None, np.inf, 0
    for _ in range(QUICK["num_searches"]):
        variable, mean, square = start, np.zeros(48), np.zeros(48)
        previous, found = np.inf, False
        for number in range(num_steps):
            count += 1
            point = (np.tanh(variable) + 1) / 2
            hidden = np.tanh(point @ first)
            logits = hidden @ second
            other = others[np.argmax(logits[others])]
            slope = first @ ((1 - hidden**2) * (second[:, label] - second[:, other]))
            slope = constant * slope * (logits[label] >= logits[other]) + 2 * (point - origin)
            slope *= (1 - np.tanh(variable) ** 2) / 2
            # Adam.
            mean, square = 0.9 * mean + 0.1 * slope, 0.999 * square + 0.001 * slope**2
            scale = np.sqrt(square / (1 - 0.999 ** (number + 1))) + 1e-8
            step = mean / (1 - 0.9 ** (number + 1)) / scale
            variable = variable - QUICK["learning_rate"] * step
            point = (np.tanh(variable) + 1) / 2
            logits = np.tanh(point @ first) @ second
            size = np.sum((point - origin) ** 2)
            if abort == "example" and number % (num_steps // 10) == 0:
                total = constant * max(logits[label] - logits[others].max(), 0) + size
                if total > 0.9999 * previous:
                    break
                previous = total
            if np.argmax(logits) != label:
                found = True
                if size < best_size:
                    best, best_size = point, size
        if found:
            high = min(high, constant)
            constant = (low + high) / 2
        else:
            low = max(low, constant)
            constant = (low + high) / 2 if high < 1e9 else 10 * constant
    return best, count


class TestGoldenModel:
    # Official FAB towards the class of second largest logit, which C&W moves to.
    SECOND_CLASS = np.array([0.203337, 0.181042, 0.339342, 0.099051, 0.444895, 0.099069])

    def test_it_comes_within_1_percent_of_official_fab(self):
        result = run(cw, "l2", num_steps=500)
        assert np.all(result.success)
        ratio = np.asarray(result.distance) / self.SECOND_CLASS
        assert np.all(ratio > 0.97)
        assert np.all(ratio < 1.01)

    def test_pixels_on_the_faces_of_the_box_move(self):
        # torchattacks takes the inverse tanh of 1 itself: they stay for ever.
        inputs = np.round(toy.INPUTS)
        labels = np.argmax(toy.logits_fn(inputs), axis=1).astype(np.int32)
        result = run(cw, "l2", num_steps=500, inputs=inputs, labels=labels)
        assert np.all(result.success)
        assert np.mean(np.abs(result.adv_inputs - inputs) > 1e-3) > 0.05

    @pytest.mark.parametrize("abort", ["none", "example"])
    def test_it_follows_the_official_loop(self, abort):
        """One example at a time, in float64."""
        result = run(cw, "l2", abort=abort, **QUICK)
        for example in range(6):
            best, num_steps = by_hand(example, abort)
            assert result.num_backwards[example] == 1 + num_steps
            assert result.success[example] == (best is not None)
            expected = toy.INPUTS[example] if best is None else best
            np.testing.assert_allclose(result.adv_inputs[example], expected, atol=1e-4)


class TestLinearModels:
    @pytest.mark.parametrize("case", Linear.CASES)
    def test_it_comes_within_2_percent_of_the_optimum(self, case):
        model = linear(*case)
        radii = model.radii("l2")
        # Untargeted, it follows the largest logit, which may belong to a farther class.
        targets = np.argmin(radii, axis=1).astype(np.int32)
        result = model.attack(cw, "l2", targets=targets, num_steps=200, initial_constant=0.1)
        assert np.all(result.success)
        ratio = np.asarray(result.distance) / radii.min(axis=1)
        assert np.all(ratio >= 1 - 1e-5)
        assert np.all(ratio < 1.02)


class TestBugsOfPeers:
    def test_a_negative_true_logit_is_attacked_too(self):
        plain, shifted = (run(cw, "l2", shift=shift, **QUICK) for shift in (0.0, -20.0))
        np.testing.assert_allclose(shifted.distance, plain.distance, rtol=1e-3)

    def test_failures_come_back_clean_not_black(self):
        result = run(cw, "l2", **{**QUICK, "initial_constant": 1e-7})
        assert not np.any(result.success)
        np.testing.assert_array_equal(result.adv_inputs, toy.INPUTS)
        clean = losses.margin(toy.logits_fn(toy.INPUTS), toy.LABELS)
        np.testing.assert_allclose(result.loss, clean, atol=1e-5)

    def test_the_reconstructed_clean_input_counts_when_it_misleads(self):
        # A pixel at the face of the box is drawn inwards by 1e-6, which this model sees.
        def logits_fn(points):
            gap = 1e7 * (points[:, :1] - np.float32(1 - 2e-7))
            return gap * np.array([[1.0, -1.0]], np.float32)

        inputs = np.ones((1, 4), np.float32)
        labels = np.zeros(1, np.int32)
        result = run(cw, "l2", inputs=inputs, labels=labels, logits_fn=logits_fn, **QUICK)
        assert result.success[0]
        assert 0 < result.distance[0] < 1e-5

    def test_chunks_change_nothing(self):
        whole = run(cw, "l2", abort="example", **QUICK)
        assert_same(run(cw, "l2", abort="example", chunk_size=4, **QUICK), whole, 1e-4, 1e-5)

    def test_fewer_than_ten_steps_may_abort(self):
        options = {**QUICK, "num_steps": 8, "learning_rate": 0.2, "abort": "example"}
        result = run(cw, "l2", **options)
        minimum_norm.assert_consistent(result, "l2", toy.logits_fn, toy.INPUTS, toy.LABELS)
        assert np.all(result.success)

    def test_examples_stop_one_by_one(self):
        options = {**QUICK, "abort": "example"}
        result = run(cw, "l2", **options)
        assert np.all(result.success)
        counts = np.asarray(result.num_backwards)
        assert len(set(counts)) > 2
        np.testing.assert_array_equal(result.num_forwards, 1 + counts)
        rows = np.array([2, 0, 2, 0, 2, 0])
        other = run(cw, "l2", inputs=toy.INPUTS[rows], labels=toy.LABELS[rows], **options)
        for name in ("adv_inputs", "num_backwards"):
            left, right = getattr(other, name)[:2], getattr(result, name)[rows[:2]]
            np.testing.assert_array_equal(left, right)

    def test_confidence_is_a_margin_and_costs_distance(self):
        plain, sure = (run(cw, "l2", **{**QUICK, "confidence": value}) for value in (0.0, 0.5))
        assert np.all(sure.success)
        assert np.all(np.asarray(sure.loss) >= 0.5)
        assert np.all(np.asarray(sure.distance) > np.asarray(plain.distance))


class TestProperties(minimum_norm.Properties):
    FACTORY = cw
    OPTIONS = QUICK

    def expected_counts(self, result):
        return 2 + 100, 1 + 100


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"chunk_size": 0}, "chunk_size=0 must be an integer >= 1"),
            ({"abort": "batch"}, r"abort='batch' is not one of \['example', 'none'\]"),
            ({"num_steps": 0}, "num_steps=0 must be an integer >= 1"),
            ({"num_searches": 0}, "num_searches=0 must be an integer >= 1"),
            ({"learning_rate": -1.0}, r"learning_rate=-1\.0 must be a finite number > 0"),
            ({"initial_constant": 0}, "initial_constant=0 must be a finite number > 0"),
            ({"confidence": -1}, "confidence=-1 must be a finite number >= 0"),
        ],
    )
    def test_bad_options_are_named_with_their_value(self, options, message):
        with pytest.raises(ValueError, match=message):
            cw(ThreatModel(), **options)

    def test_the_threat_gives_the_norm_that_is_reported_alone(self):
        in_l2, in_linf = (run(cw, norm, **QUICK) for norm in ("l2", "linf"))
        np.testing.assert_array_equal(in_linf.adv_inputs, in_l2.adv_inputs)
        moved = np.abs(np.asarray(in_linf.adv_inputs) - toy.INPUTS).max(axis=1)
        np.testing.assert_allclose(in_linf.distance, moved, rtol=1e-5)
