"""Tests of gfa_jax.losses: golden values, closed forms in float64, gradients and invariances."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.test_util import check_grads
from scipy.special import log_softmax, logsumexp, softmax

from gfa_jax import losses

NUM_CLASSES = 5
# No subnormal numbers: XLA flushes them to zero.
logit = st.floats(-20, 20, width=32, allow_subnormal=False)
logit_batches = hnp.arrays(np.float32, (4, NUM_CLASSES), elements=logit)
label_batches = hnp.arrays(np.int32, 4, elements=st.integers(0, NUM_CLASSES - 1))
fast = settings(max_examples=25, deadline=None, derandomize=True)

jitted = {name: jax.jit(loss) for name, loss in losses.LOSSES.items()}
gradients = {
    name: jax.jit(jax.grad(lambda logits, labels, loss=loss: jnp.sum(loss(logits, labels))))
    for name, loss in losses.LOSSES.items()
}


def random_logits(num_classes=NUM_CLASSES, num=6, scale=3.0, seed=0):
    rng = np.random.default_rng(seed)
    logits = scale * rng.normal(size=(num, num_classes)).astype(np.float32)
    return logits, rng.integers(0, num_classes, num).astype(np.int32)


def others_of(logits, label):
    return np.delete(logits.astype(np.float64), label)


class TestClosedForms:
    @given(logits=logit_batches, labels=label_batches)
    @fast
    def test_cross_entropy_is_minus_log_softmax(self, logits, labels):
        expected = -log_softmax(logits.astype(np.float64), axis=1)[np.arange(4), labels]
        values = jitted["cross_entropy"](logits, labels)
        np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-5)

    @given(logits=logit_batches, labels=label_batches)
    @fast
    def test_log_odds_is_the_logit_of_being_wrong(self, logits, labels):
        pairs = list(zip(logits, labels, strict=True))
        expected = [logsumexp(others_of(row, label)) - row[label] for row, label in pairs]
        values = jitted["log_odds"](logits, labels)
        np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-5)
        # CE = softplus(log odds).
        np.testing.assert_allclose(
            jitted["cross_entropy"](logits, labels), np.logaddexp(0, expected), rtol=1e-5, atol=1e-5
        )

    @given(logits=logit_batches, labels=label_batches)
    @fast
    def test_margin_is_positive_exactly_where_the_example_is_misclassified(self, logits, labels):
        pairs = list(zip(logits, labels, strict=True))
        expected = np.array([others_of(row, label).max() - row[label] for row, label in pairs])
        values = np.asarray(jitted["margin"](logits, labels))
        np.testing.assert_allclose(values, expected, rtol=1e-6, atol=1e-30)
        wrong = np.argmax(logits, axis=1) != labels
        np.testing.assert_array_equal(values[values != 0] > 0, wrong[values != 0])

    def test_class_difference_reads_the_two_logits(self):
        logits = jnp.array([[1.0, 5.0, -2.0], [0.5, 0.0, 3.0]])
        difference = losses.class_difference(logits, jnp.array([0, 2]), jnp.array([2, 0]))
        np.testing.assert_array_equal(difference, [-3, -2.5])

    @pytest.mark.parametrize("name", sorted(losses.LOSSES))
    def test_examples_do_not_interact(self, name):
        logits, labels = random_logits()
        order = np.array([2, 0, 5, 4, 1, 3])
        whole = np.asarray(losses.LOSSES[name](logits, labels))
        assert whole.shape == (6,)
        np.testing.assert_array_equal(
            losses.LOSSES[name](logits[order], labels[order]), whole[order]
        )
        np.testing.assert_allclose(
            losses.LOSSES[name](logits[:1], labels[:1]), whole[:1], rtol=1e-6
        )

    @pytest.mark.parametrize("name", sorted(losses.LOSSES))
    def test_large_logits_stay_finite(self, name):
        logits = jnp.array([[1e4, -1e4, 0.0, 5.0], [1e4, -1e4, 0.0, 5.0]])
        labels = jnp.array([0, 1])
        assert np.all(np.isfinite(losses.LOSSES[name](logits, labels)))
        assert np.all(np.isfinite(gradients[name](logits, labels)))


class TestGradients:
    @given(logits=logit_batches, labels=label_batches)
    @fast
    def test_cross_entropy_gradient_is_softmax_minus_one_hot(self, logits, labels):
        expected = softmax(logits.astype(np.float64), axis=1) - np.eye(NUM_CLASSES)[labels]
        values = gradients["cross_entropy"](logits, labels)
        np.testing.assert_allclose(values, expected, atol=1e-5)

    @given(logits=logit_batches, labels=label_batches)
    @fast
    def test_cross_entropy_gradient_is_the_log_odds_gradient_times_the_error(self, logits, labels):
        probability = softmax(logits.astype(np.float64), axis=1)[np.arange(4), labels]
        expected = (1 - probability)[:, None] * gradients["log_odds"](logits, labels)
        values = gradients["cross_entropy"](logits, labels)
        np.testing.assert_allclose(values, expected, atol=1e-5)

    def test_log_odds_gradient_survives_where_that_of_cross_entropy_vanishes(self):
        logits = jnp.array([[200.0, 1.0, 0.0]])
        labels = jnp.array([0])
        np.testing.assert_array_equal(gradients["cross_entropy"](logits, labels), np.zeros((1, 3)))
        expected = [[-1, *softmax([1.0, 0.0])]]
        np.testing.assert_allclose(gradients["log_odds"](logits, labels), expected, rtol=1e-6)

    def test_margin_gradient_picks_the_label_and_the_strongest_other(self):
        logits = jnp.array([[3.0, 1.0, 2.0], [3.0, 1.0, 2.0]])
        values = gradients["margin"](logits, jnp.array([0, 1]))
        np.testing.assert_array_equal(values, [[-1, 0, 1], [1, -1, 0]])

    def test_dlr_gradient_flows_through_the_sort(self):
        logits, labels = random_logits(seed=1)
        check_grads(
            lambda z: losses.dlr(z, labels), (logits,), order=1, modes="rev", atol=0.02, rtol=0.02
        )
        # Of degree 0 in the logits: the gradient is orthogonal to them, by Euler's theorem.
        values = gradients["dlr"](logits, labels)
        np.testing.assert_allclose(np.sum(values * logits, axis=1), np.zeros(6), atol=1e-5)


class TestDlr:
    LOGITS = jnp.array([[2, 1, 0.5, -1]])

    @pytest.mark.parametrize(("label", "expected"), [(0, -1 / 1.5), (1, 1 / 1.5)])
    def test_golden_values(self, label, expected):
        value = losses.dlr(self.LOGITS, jnp.array([label]))
        np.testing.assert_allclose(value, [expected], rtol=1e-6)

    def test_golden_value_of_the_targeted_form(self):
        value = losses.dlr_targeted(self.LOGITS, jnp.array([0]), jnp.array([2]))
        np.testing.assert_allclose(value, [-1.5 / 2.25], rtol=1e-6)

    def test_range_by_the_rank_of_the_label(self):
        logits = jnp.tile(jnp.array([[4.0, 3.0, 1.0, 0.0, -8.0]]), (5, 1))
        values = np.asarray(losses.dlr(logits, jnp.arange(5)))
        np.testing.assert_allclose(values, [-1 / 3, 1 / 3, 1, 4 / 3, 4], rtol=1e-6)

    @given(logits=logit_batches, shift=st.floats(-10, 10), scale=st.floats(0.1, 10))
    @fast
    def test_invariant_to_shift_and_positive_scale(self, logits, shift, scale):
        # Distinct logits: at ties the ratio is a quotient of roundings.
        logits = np.sort(logits, axis=1) + np.arange(NUM_CLASSES, dtype=np.float32)
        labels, targets = np.array([0, 1, 3, 4]), np.array([2, 0, 4, 3])
        changed = np.float32(scale) * logits + np.float32(shift)
        for loss in (
            lambda z: losses.dlr(z, labels),
            lambda z: losses.dlr_targeted(z, labels, targets),
        ):
            np.testing.assert_allclose(loss(changed), loss(logits), rtol=1e-3, atol=1e-3)

    def test_three_classes_use_the_third_logit(self):
        logits, labels, targets = jnp.array([[2.0, 1.0, 0.5]]), jnp.array([0]), jnp.array([2])
        np.testing.assert_allclose(losses.dlr(logits, labels), [-1 / 1.5], rtol=1e-6)
        np.testing.assert_allclose(losses.dlr_targeted(logits, labels, targets), [-1], rtol=1e-6)

    def test_two_classes_fall_back_to_differences_of_logits(self):
        logits, labels = jnp.array([[2.0, 0.5], [2.0, 0.5]]), jnp.array([0, 1])
        np.testing.assert_array_equal(losses.dlr(logits, labels), losses.margin(logits, labels))
        np.testing.assert_array_equal(losses.dlr(logits, labels), [-1.5, 1.5])
        np.testing.assert_array_equal(
            losses.dlr_targeted(logits, labels, jnp.array([1, 0])), [-1.5, 1.5]
        )

    @pytest.mark.parametrize("num_classes", [2, 3, 4])
    def test_equal_logits_give_finite_values_and_gradients(self, num_classes):
        logits, labels, targets = jnp.ones((1, num_classes)), jnp.array([0]), jnp.array([1])
        for loss in (losses.dlr, lambda z, y: losses.dlr_targeted(z, y, targets)):
            np.testing.assert_array_equal(loss(logits, labels), [0])
            assert np.all(np.isfinite(jax.grad(lambda z, f=loss: f(z, labels)[0])(logits)))


class TestKl:
    @given(logits=logit_batches, reference=logit_batches)
    @fast
    def test_value_against_float64_and_never_negative(self, logits, reference):
        log_p = log_softmax(reference.astype(np.float64), axis=1)
        log_q = log_softmax(logits.astype(np.float64), axis=1)
        expected = np.sum(np.exp(log_p) * (log_p - log_q), axis=1)
        values = np.asarray(losses.kl(logits, reference))
        np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-5)
        assert values.min() >= -1e-5

    def test_zero_with_zero_gradient_for_equal_distributions(self):
        logits, _ = random_logits()
        np.testing.assert_allclose(losses.kl(logits, logits + 3), np.zeros(6), atol=1e-6)
        slope = jax.grad(lambda z: jnp.sum(losses.kl(z, logits)))(jnp.asarray(logits))
        np.testing.assert_allclose(slope, np.zeros_like(logits), atol=1e-6)

    def test_the_reference_is_the_first_distribution_of_the_divergence(self):
        # KL(p || q) explodes where q misses mass of p, not where p misses mass of q.
        uniform, peaked = jnp.zeros((1, 2)), jnp.array([[50.0, 0.0]])
        np.testing.assert_allclose(losses.kl(uniform, peaked), [np.log(2)], rtol=1e-5)
        np.testing.assert_allclose(losses.kl(peaked, uniform), [25 - np.log(2)], rtol=1e-5)


class TestSampleOtherClasses:
    @pytest.mark.parametrize("num_classes", [2, 3, 10])
    def test_never_the_label_and_uniform_over_the_others(self, num_classes, key):
        num = 4000
        for label in (0, num_classes - 1):
            labels = jnp.full(num, label, jnp.int32)
            others = losses.sample_other_classes(key, labels, num_classes)
            assert others.dtype == jnp.int32
            counts = np.bincount(np.asarray(others), minlength=num_classes)
            assert len(counts) == num_classes
            assert counts[label] == 0
            # The statistic has mean d = num_classes - 2 and variance 2 d.
            expected = num / (num_classes - 1)
            statistic = np.sum((np.delete(counts, label) - expected) ** 2 / expected)
            degrees = num_classes - 2
            assert statistic <= degrees + 6 * np.sqrt(2 * degrees)

    def test_draws_differ_between_examples_and_keys(self, key):
        labels = jnp.zeros(100, jnp.int32)
        first = losses.sample_other_classes(key, labels, 10)
        second = losses.sample_other_classes(jax.random.key(1), labels, 10)
        assert len(np.unique(first)) == 9
        assert np.mean(np.asarray(first) == np.asarray(second)) < 0.3

    def test_fewer_than_two_classes_are_an_error(self, key):
        with pytest.raises(ValueError, match="num_classes=1 must be at least 2"):
            losses.sample_other_classes(key, jnp.zeros(3, jnp.int32), 1)


class TestSampleConfusedClasses:
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_others_come_as_often_as_their_probability_among_them(self, key, dtype):
        logits = jnp.asarray([3.0, -1.0, 0.0, 1.0], dtype)
        num, label = 20_000, 3
        labels = jnp.full(num, label, jnp.int32)
        others = losses.sample_confused_classes(key, jnp.tile(logits, (num, 1)), labels)
        assert others.dtype == jnp.int32
        counts = np.bincount(np.asarray(others), minlength=4)
        assert counts[label] == 0
        powers = np.exp([3.0, -1.0, 0.0])
        expected = num * powers / powers.sum()
        # The statistic has mean 2 and variance 4.
        assert np.sum((counts[:3] - expected) ** 2 / expected) <= 2 + 6 * 2

    def test_a_label_that_is_all_but_certain_is_never_drawn(self, key):
        logits = jnp.tile(jnp.asarray([1e4, 0.0, 0.0]), (200, 1))
        others = losses.sample_confused_classes(key, logits, jnp.zeros(200, jnp.int32))
        assert set(np.asarray(others).tolist()) == {1, 2}

    def test_fewer_than_two_classes_are_an_error(self, key):
        with pytest.raises(ValueError, match="num_classes=1 must be at least 2"):
            losses.sample_confused_classes(key, jnp.zeros((3, 1)), jnp.zeros(3, jnp.int32))


@pytest.mark.parametrize("name", sorted(losses.LOSSES))
def test_bfloat16_logits_are_read_in_float32(name):
    logits, labels = random_logits()
    narrow = jnp.asarray(logits, jnp.bfloat16)
    values = losses.LOSSES[name](narrow, labels)
    assert values.dtype == jnp.float32
    wide = narrow.astype(jnp.float32)
    np.testing.assert_array_equal(values, losses.LOSSES[name](wide, labels))


def test_bfloat16_logits_of_the_losses_with_more_arguments_are_read_in_float32():
    logits, labels = random_logits()
    narrow = jnp.asarray(logits, jnp.bfloat16)
    targets = (labels + 1) % NUM_CLASSES
    for values in (
        losses.class_difference(narrow, labels, targets),
        losses.dlr_targeted(narrow, labels, targets),
        losses.kl(narrow, narrow),
    ):
        assert values.dtype == jnp.float32


@pytest.mark.parametrize("name", sorted(losses.LOSSES))
def test_jit_equals_eager(name):
    logits, labels = random_logits()
    np.testing.assert_allclose(
        jitted[name](logits, labels), losses.LOSSES[name](logits, labels), rtol=1e-6
    )


def test_get_returns_losses_by_name_and_passes_functions_through():
    assert losses.get("dlr") is losses.dlr
    assert losses.get(losses.margin) is losses.margin


def test_unknown_loss_is_named_with_what_is_valid():
    with pytest.raises(ValueError, match=r"loss='cross_entrpy' .* Did you mean 'cross_entropy'"):
        losses.get("cross_entrpy")
