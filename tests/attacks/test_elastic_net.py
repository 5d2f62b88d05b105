"""Tests of EAD: golden values of an independent implementation, closed forms, peers' bugs."""

import numpy as np
import pytest

from gfa_jax import ThreatModel, losses
from gfa_jax.attacks.elastic_net import ead
from tests.attacks import minimum_norm, toy
from tests.attacks.minimum_norm import Linear, linear, perturbation, run, sizes
from tests.attacks.running import assert_same

# Constants that succeed within a few searches of a few steps.
QUICK = {"num_steps": 20, "num_searches": 4, "initial_constant": 0.1, "confidence": 0.0}


def by_hand(example, *, rule, variant, abort, shift, confidence):
    """Returns the best point, or None, and the steps made for one example of the golden model."""
    num_steps, learning_rate, beta = QUICK["num_steps"], 0.01, 1e-3
    clean, label = toy.INPUTS[example].astype(np.float64), toy.LABELS[example]
    first, second = toy.FIRST.astype(np.float64), toy.SECOND.astype(np.float64)
    others = np.delete(np.arange(5), label)
    is_canonical = variant != "torchattacks"

    def look(point):
        """Returns the logits, the hinge and its gradient."""
        hidden = np.tanh(point @ first)
        logits = hidden @ second + shift
        other = others[np.argmax(logits[others])]
        is_seen = is_canonical or logits[label] > 0
        gap = is_seen * logits[label] - logits[other] + confidence
        slope = first @ ((1 - hidden**2) * (is_seen * second[:, label] - second[:, other]))
        return logits, max(gap, 0), slope * (gap >= 0)

    def measure(point, rule):
        length = np.sum(np.abs(point - clean))
        return length if rule == "l1" else np.sum((point - clean) ** 2) + beta * length

    low, high, constant = 0.0, 1e10, QUICK["initial_constant"]
    best, best_size, count = None, np.inf, 0
    point = lookahead = clean
    for _ in range(QUICK["num_searches"]):
        if is_canonical:
            point = lookahead = clean
        previous, found = np.inf, False
        for number in range(num_steps):
            count += 1
            _, missing, gradient = look(lookahead)
            slope = constant * gradient + 2 * (lookahead - clean)
            if variant == "art" and missing == 0:
                slope = 0 * slope
            moved = lookahead - learning_rate * np.sqrt(1 - number / num_steps) * slope
            change = moved - clean
            shrunk = clean + np.sign(change) * np.maximum(np.abs(change) - beta, 0)
            before, point = point, np.clip(shrunk, 0, 1)
            lookahead = point + (number + 1) / (number + 4) * (point - before)
            logits, hinge, _ = look(point)
            if abort == "example" and number % (num_steps // 10) == 0:
                hinge -= 0 if is_canonical else confidence
                total = constant * hinge + measure(point, "en")
                if total > previous * (0.9999 if is_canonical else 0.999999):
                    break
                previous = total
            if np.argmax(logits + confidence * (np.arange(5) == label)) != label:
                found = True
                if measure(point, rule) < best_size:
                    best, best_size = point, measure(point, rule)
        if found:
            high = min(high, constant)
            constant = (low + high) / 2
        else:
            low = max(low, constant)
            constant = (low + high) / 2 if high < 1e9 else 10 * constant
    return best, count


class TestGoldenModel:
    # An independent implementation of the official code, with the defaults and no abort.
    EN_L1 = (0.85892, 0.654653, 1.208934, 0.466934, 1.66557, 0.385425)
    EN_L2 = (0.209834, 0.191911, 0.355826, 0.109563, 0.464021, 0.110044)
    L1_L1 = (0.81006, 0.579675, 1.055494, 0.426926, 1.532448, 0.325359)

    def test_the_elastic_net_rule(self):
        result = run(ead, "l1")
        assert np.all(result.success)
        np.testing.assert_allclose(sizes(perturbation(result), "l1"), self.EN_L1, atol=1e-4)
        np.testing.assert_allclose(sizes(perturbation(result), "l2"), self.EN_L2, atol=1e-4)

    def test_the_l1_rule(self):
        result = run(ead, "l1", rule="l1")
        assert np.all(result.success)
        np.testing.assert_allclose(result.distance, self.L1_L1, atol=1e-4)

    @pytest.mark.parametrize(
        ("variant", "rule", "abort", "confidence"),
        [
            ("canonical", "en", "example", 0.3),
            ("art", "l1", "none", 0.0),
            ("art", "en", "example", 0.3),
            ("torchattacks", "en", "none", 0.0),
            ("torchattacks", "l1", "example", 2.0),
        ],
    )
    def test_it_follows_the_official_loop(self, variant, rule, abort, confidence):
        """One example at a time, in float64."""
        # The shift makes some of the true logits negative.
        options = {"rule": rule, "variant": variant, "abort": abort, "shift": -4.0}
        options["confidence"] = confidence
        result = run(ead, "l1", **{**QUICK, **options})
        for example in range(6):
            best, num_steps = by_hand(example, **options)
            assert result.num_backwards[example] == num_steps
            assert result.success[example] == (best is not None)
            expected = toy.INPUTS[example] if best is None else best
            np.testing.assert_allclose(result.adv_inputs[example], expected, atol=1e-4)

    def test_the_threat_norm_measures_but_does_not_steer(self):
        one, other = (run(ead, norm, **QUICK) for norm in ("l1", "linf"))
        np.testing.assert_array_equal(one.adv_inputs, other.adv_inputs)
        np.testing.assert_allclose(other.distance, sizes(perturbation(one), "linf"), rtol=1e-5)


class TestLinearModels:
    @pytest.mark.parametrize("case", Linear.CASES)
    def test_the_l1_rule_comes_within_8_percent_of_the_optimum(self, case):
        model = linear(*case)
        radii = model.radii("l1")
        # Untargeted, it follows the largest logit, which may belong to a farther class.
        result = model.attack(
            ead,
            "l1",
            targets=np.argmin(radii, axis=1).astype(np.int32),
            rule="l1",
            initial_constant=0.1,
            beta=1e-2,
        )
        assert np.all(result.success)
        ratio = np.asarray(result.distance) / radii.min(axis=1)
        assert np.all(ratio >= 1 - 1e-5)
        assert np.all(ratio < 1.08)

    def test_one_step_is_the_formula(self):
        model = linear(1, (12,), 2)
        constant, rate, beta = 3.0, 0.01, 0.02
        other = 1 - model.labels[0]
        slope = model.weights[:, other] - model.weights[:, model.labels[0]]
        moved = model.inputs[0] + rate * constant * slope
        change = moved - model.inputs[0]
        shrunk = np.sign(change) * np.maximum(np.abs(change) - beta, 0)
        expected = np.clip(model.inputs[0] + shrunk, 0, 1)
        assert np.any(shrunk == 0)
        options = {"num_steps": 1, "num_searches": 1, "learning_rate": rate, "beta": beta}
        result = model.attack(ead, "l1", initial_constant=constant, **options)
        # Peers that judge a point in the step after it miss the last one.
        assert result.success[0]
        np.testing.assert_allclose(result.adv_inputs[0], expected, atol=1e-6)


class TestBugsOfPeers:
    def test_a_negative_true_logit_is_attacked_too(self):
        plain, shifted = (run(ead, "l1", shift=shift, **QUICK) for shift in (0.0, -20.0))
        np.testing.assert_allclose(shifted.distance, plain.distance, rtol=1e-3)
        # The other variant sees the other classes alone there.
        options = {"variant": "torchattacks", "rule": "en", "abort": "none", **QUICK}
        lame = run(ead, "l1", shift=-20.0, **options)
        assert not np.allclose(lame.adv_inputs, plain.adv_inputs, atol=0.01)

    def test_targeted_torchattacks_reads_the_target_lamely_too(self):
        options = {"variant": "torchattacks", "targets": minimum_norm.TARGETS, **QUICK}
        high, low = (run(ead, "l1", shift=shift, **options) for shift in (20.0, -20.0))
        for shift, result in ((20.0, high), (-20.0, low)):
            minimum_norm.assert_consistent(
                result,
                "l1",
                lambda points, shift=shift: toy.logits_fn(points) + shift,
                toy.INPUTS,
                toy.LABELS,
                targets=minimum_norm.TARGETS,
            )
        assert np.all(high.success)
        assert not np.allclose(high.adv_inputs, low.adv_inputs, atol=0.01)

    def test_failures_come_back_clean_not_black(self):
        result = run(ead, "l1", **{**QUICK, "initial_constant": 1e-7})
        assert not np.any(result.success)
        np.testing.assert_array_equal(result.adv_inputs, toy.INPUTS)
        np.testing.assert_array_equal(result.distance, np.zeros(6))
        clean = losses.margin(toy.logits_fn(toy.INPUTS), toy.LABELS)
        np.testing.assert_allclose(result.loss, clean, atol=1e-5)

    def test_chunks_change_nothing(self):
        options = {**QUICK, "abort": "example"}
        whole = run(ead, "l1", **options)
        assert_same(run(ead, "l1", chunk_size=4, **options), whole, 1e-4, 1e-5)

    def test_fewer_than_ten_steps_may_abort(self):
        options = {"num_steps": 5, "num_searches": 2, "initial_constant": 10.0}
        result = run(ead, "l1", abort="example", **options)
        assert set(np.asarray(result.num_backwards)) <= set(range(2, 11))
        minimum_norm.assert_consistent(result, "l1", toy.logits_fn, toy.INPUTS, toy.LABELS)
        assert np.all(result.success)

    def test_the_confidence_of_one_example_is_no_concern_of_another(self):
        # torchattacks adds it to the logits of all labels in the batch.
        confident = {**QUICK, "confidence": 0.5}
        result = run(ead, "l1", **confident)
        assert np.all(result.success)
        assert np.all(np.asarray(result.loss) >= 0.5)
        rows = np.array([3, 3, 3, 5, 5, 5])
        alone = run(ead, "l1", inputs=toy.INPUTS[rows], labels=toy.LABELS[rows], **confident)
        np.testing.assert_array_equal(alone.distance[0], result.distance[3])
        assert np.all(np.asarray(result.distance) > np.asarray(run(ead, "l1", **QUICK).distance))

    def test_examples_stop_one_by_one(self):
        options = {**QUICK, "variant": "canonical", "rule": "en", "abort": "example"}
        result = run(ead, "l1", **options)
        assert np.all(result.success)
        counts = np.asarray(result.num_backwards)
        assert len(set(counts)) > 2
        assert counts.max() < 80
        np.testing.assert_array_equal(result.num_forwards, 1 + 2 * counts)
        rows = np.array([2, 0, 2, 0, 2, 0])
        other = run(ead, "l1", inputs=toy.INPUTS[rows], labels=toy.LABELS[rows], **options)
        for name in ("adv_inputs", "num_backwards"):
            left, right = getattr(other, name)[:2], getattr(result, name)[rows[:2]]
            np.testing.assert_array_equal(left, right)


class TestProperties(minimum_norm.Properties):
    FACTORY = ead
    NORM = "l1"
    OPTIONS = QUICK

    def expected_counts(self, result):
        return 1 + 2 * 80, 80


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"rule": "l2"}, r"rule='l2' is not one of \['en', 'l1'\]"),
            ({"variant": "foolbox"}, "variant='foolbox' is not one of"),
            ({"chunk_size": 0}, "chunk_size=0 must be an integer >= 1"),
            ({"abort": "batch"}, r"abort='batch' is not one of \['example', 'none'\]"),
            ({"num_steps": 0}, "num_steps=0 must be an integer >= 1"),
            ({"num_searches": 1.5}, r"num_searches=1\.5 must be an integer >= 1"),
            ({"learning_rate": 0.0}, r"learning_rate=0\.0 must be a finite number > 0"),
            ({"initial_constant": -1}, "initial_constant=-1 must be a finite number > 0"),
            ({"beta": -1e-3}, r"beta=-0\.001 must be a finite number >= 0"),
            ({"confidence": float("inf")}, "confidence=inf must be a finite number >= 0"),
        ],
    )
    def test_bad_options_are_named_with_their_value(self, options, message):
        with pytest.raises(ValueError, match=message):
            ead(ThreatModel("l1"), **options)
