"""Tests of gfa_jax.attacks.base: keys, gradients of single examples, and the best point."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gfa_jax import ThreatModel, attacks, losses
from gfa_jax.attacks import base


def quadratic(inputs):
    """Logits whose gradients differ at every point."""
    return jnp.stack([jnp.sum(inputs**2, axis=1), jnp.sum(inputs, axis=1)], axis=1)


def best_of(loss, success):
    """A best point of each example that is its own index."""
    num = len(loss)
    points = jnp.arange(num, dtype=jnp.float32)[:, None]
    return base.Best(points, jnp.array(loss), jnp.array(success))


class TestExampleKeys:
    def test_a_key_depends_on_its_index_alone(self, key):
        keys = base.example_keys(key, jnp.array([0, 1, 2, 3]))
        others = base.example_keys(key, jnp.array([3, 1]))
        data = jax.random.key_data(keys)
        np.testing.assert_array_equal(jax.random.key_data(others), data[jnp.array([3, 1])])

    def test_indices_and_base_keys_give_different_keys(self, key):
        indices = jnp.arange(1000)
        keys = jnp.concatenate(
            [base.example_keys(key, indices), base.example_keys(jax.random.key(1), indices)]
        )
        assert keys.shape == (2000,)
        assert jnp.issubdtype(keys.dtype, jax.dtypes.prng_key)
        assert len(np.unique(jax.random.key_data(keys), axis=0)) == 2000


class TestCheckInputs:
    INPUTS = jnp.array([[0.0, 0.5], [1.0, 0.25]])
    LABELS = jnp.array([0, 1])

    def test_valid_arrays_pass_known_or_traced(self):
        threat = ThreatModel()
        base.check_inputs(threat, self.INPUTS, self.LABELS)
        base.check_inputs(threat, np.asarray(self.INPUTS), np.asarray(self.LABELS))
        base.check_inputs(threat, self.INPUTS.astype(jnp.bfloat16), self.LABELS)
        base.check_inputs(threat, jnp.zeros((0, 2)), jnp.zeros(0, jnp.int32))
        jax.jit(functools.partial(base.check_inputs, threat))(self.INPUTS - 9, self.LABELS)
        # Known arrays that a traced function closes over.
        jax.jit(lambda: base.check_inputs(threat, self.INPUTS, self.LABELS))()

    def test_inputs_at_bounds_that_float32_rounds_pass(self):
        bounds = (-0.3, 0.1)
        base.check_inputs(ThreatModel(bounds=bounds), jnp.array([bounds]), jnp.array([0]))

    @pytest.mark.parametrize(
        ("inputs", "labels", "message"),
        [
            (jnp.zeros((2, 3), jnp.uint8), jnp.zeros(2, jnp.int32), "inputs have dtype uint8"),
            (
                jnp.full((2, 3), 1.5),
                jnp.zeros(2, jnp.int32),
                r"inputs lie in \[1\.5, 1\.5\]",
            ),
            (jnp.full((2, 3), -0.5), jnp.zeros(2, jnp.int32), r"inputs lie in \[-0\.5, -0\.5\]"),
            (jnp.full((2, 3), jnp.nan), jnp.zeros(2, jnp.int32), r"inputs lie in \[nan, nan\]"),
            (jnp.zeros((2, 3)), jnp.zeros(3, jnp.int32), r"labels have shape \(3,\) .* \(2,\)"),
            (jnp.zeros((2, 3)), jnp.zeros((2, 5)), r"labels have shape \(2, 5\) and dtype float32"),
            (jnp.zeros((2, 3)), jnp.zeros(2), "labels have .* dtype float32; expected integers"),
            (jnp.zeros((2, 3)), jnp.array([0, -1]), "labels hold -1; classes are counted from 0"),
        ],
    )
    def test_what_an_attack_cannot_work_on_is_named(self, inputs, labels, message):
        with pytest.raises(ValueError, match=message):
            base.check_inputs(ThreatModel(), inputs, labels)


class TestEvaluate:
    def test_each_gradient_is_that_of_its_own_loss(self):
        inputs = jnp.array([[0.5, 0.2], [0.9, 0.8], [0.1, 0.1]])
        labels = jnp.array([0, 1, 0])
        result = base.evaluate(quadratic, base.untargeted(losses.margin, labels), inputs)
        # margin = (z_1 - z_0) or its negative.
        sign = jnp.array([[1.0], [-1.0], [1.0]])
        np.testing.assert_allclose(result.gradient, sign * (1 - 2 * inputs), atol=1e-6)
        np.testing.assert_allclose(result.loss, losses.margin(quadratic(inputs), labels), rtol=1e-6)
        np.testing.assert_array_equal(result.reached, [True, False, True])

    def test_the_gradient_does_not_depend_on_the_batch_size(self):
        inputs = jnp.array([[0.5, 0.2], [0.9, 0.8]])
        labels = jnp.array([0, 1])
        whole = base.evaluate(quadratic, base.untargeted(losses.cross_entropy, labels), inputs)
        alone = base.evaluate(
            quadratic, base.untargeted(losses.cross_entropy, labels[:1]), inputs[:1]
        )
        np.testing.assert_allclose(alone.gradient, whole.gradient[:1], rtol=1e-6)

    def test_the_loss_is_float32_for_a_bfloat16_model(self):
        inputs, labels = jnp.ones((2, 3)), jnp.zeros(2, jnp.int32)

        def narrow(inputs):
            return quadratic(inputs.astype(jnp.bfloat16))

        result = base.evaluate(narrow, base.untargeted(losses.margin, labels), inputs)
        assert result.loss.dtype == jnp.float32
        assert result.gradient.dtype == jnp.float32

    def test_gradients_that_are_not_finite_are_zero_and_do_not_spread(self):
        def rooted(inputs):
            return jnp.stack([jnp.sum(jnp.sqrt(inputs), axis=1), inputs[:, 0]], axis=1)

        inputs = jnp.array([[0.0, 0.25], [0.25, 0.25], [-1.0, 0.25]])
        gradient = base.evaluate(
            rooted, base.untargeted(losses.margin, jnp.zeros(3, jnp.int32)), inputs
        ).gradient
        np.testing.assert_allclose(gradient, [[0, -1], [0, -1], [0, -1]], atol=1e-6)


def test_misclassified_is_argmax_with_ties_to_the_first_class():
    logits = jnp.array([[1.0, 2.0, 0.0], [2.0, 2.0, 0.0], [2.0, 2.0, 0.0]])
    wrong = base.is_misclassified(logits, jnp.array([0, 0, 1]))
    np.testing.assert_array_equal(wrong, [True, False, True])


def test_is_zero_means_exactly_zero_everywhere():
    gradient = jnp.zeros((3, 2, 2)).at[1, 0, 1].set(1e-30).at[2].set(-1)
    np.testing.assert_array_equal(base.is_zero(gradient), [True, False, False])


class TestBest:
    @pytest.mark.parametrize(
        ("old", "new", "replaced"),
        [
            # (loss, misclassified)
            ((1.0, False), (2.0, False), True),
            ((2.0, False), (1.0, False), False),
            ((1.0, True), (2.0, True), True),
            ((2.0, True), (1.0, True), False),
            ((1.0, True), (9.0, False), False),  # failures never replace a success
            ((9.0, False), (1.0, True), True),  # a success replaces every failure
            ((1.0, False), (1.0, False), False),  # of equals the first stays
            ((1.0, False), (np.nan, False), False),
            ((1.0, True), (np.nan, True), False),
            ((1.0, False), (np.nan, True), True),
        ],
    )
    def test_misclassified_points_come_first_then_the_larger_loss(self, old, new, replaced):
        best = base.Best(jnp.zeros((1, 2, 2)), jnp.array([old[0]]), jnp.array([old[1]]))
        updated = best.update(jnp.ones((1, 2, 2)), jnp.array([new[0]]), jnp.array([new[1]]))
        np.testing.assert_array_equal(updated.adv_inputs, np.full((1, 2, 2), float(replaced)))
        np.testing.assert_array_equal(updated.loss, [new[0] if replaced else old[0]])
        np.testing.assert_array_equal(updated.success, [old[1] or new[1]])

    def test_examples_are_updated_one_by_one(self):
        best = best_of([1.0, 1.0, 1.0], [False, False, True])
        updated = best.update(
            10 + best.adv_inputs, jnp.array([2.0, 0.0, 5.0]), jnp.array([False, True, False])
        )
        np.testing.assert_array_equal(updated.adv_inputs, [[10], [11], [2]])
        np.testing.assert_array_equal(updated.loss, [2, 0, 1])
        np.testing.assert_array_equal(updated.success, [False, True, True])


@pytest.mark.parametrize(
    ("inputs", "labels", "message"),
    [
        (
            jnp.zeros((2, 3), jnp.uint8),
            jnp.zeros(2, jnp.int32),
            "dtype uint8; attacks need floating",
        ),
        (
            jnp.full((2, 3), 1.5),
            jnp.zeros(2, jnp.int32),
            r"inputs lie in \[1.5, 1.5\], outside bounds",
        ),
        (jnp.full((2, 3), jnp.nan), jnp.zeros(2, jnp.int32), "inputs lie in .nan"),
        (jnp.zeros((2, 3)), jnp.zeros(3, jnp.int32), r"labels have shape \(3,\).*shape \(2,\)"),
        (jnp.zeros((2, 3)), jnp.zeros(2), "dtype float32; expected integers"),
        (jnp.zeros((2, 3)), jnp.array([0, -1]), "labels hold -1"),
    ],
)
def test_inputs_and_labels_that_no_attack_can_use_are_refused(inputs, labels, message):
    for attack in (attacks.fgsm(ThreatModel()), attacks.pgd(ThreatModel(), num_steps=1)):
        with pytest.raises(ValueError, match=message):
            attack(
                lambda x: x, attacks.example_keys(jax.random.key(0), jnp.arange(2)), inputs, labels
            )
