"""Tests of the search for constants, against loops in plain Python."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gfa_jax import losses
from gfa_jax.attacks import base, constants
from gfa_jax.attacks.runs import Problem

THRESHOLDS = np.array([1e-4, 0.003, 0.5, 77.0, 1e6, np.inf], np.float32)


def constants_by_hand(threshold, initial, num_searches):
    """The constants that the official codes try for an example that needs ``threshold``."""
    low, high, constant, tried = 0.0, 1e10, initial, []
    for number in range(num_searches):
        if num_searches >= 10 and number == num_searches - 1:
            constant = high
        tried.append(constant)
        if constant >= threshold:
            high = min(high, constant)
            if high < 1e9:
                constant = (low + high) / 2
        else:
            low = max(low, constant)
            constant = (low + high) / 2 if high < 1e9 else constant * 10
    return tried


@functools.partial(jax.jit, static_argnames=("num_searches", "options"))
def search(thresholds, objectives, active, first_step, num_searches, options):
    """A search that succeeds from a constant and a step on; its points are the steps made."""

    def step(number, walk, constant, some):
        made = walk + 1
        needed = thresholds[some.labels]
        here = constants.Iterate(
            adv_inputs=jnp.stack([made, constant], axis=1),
            measure=constant,
            objective=objectives[number] * jnp.ones_like(constant),
            loss=constant,
            reached=(constant >= needed) & (number >= first_step),
            zero_gradient=constant < needed,
        )
        return made, here

    none = jnp.zeros_like(thresholds)
    options = {"initial_constant": 1e-3, **dict(options)}
    return constants.search(
        step,
        none,
        Problem(
            inputs=jnp.stack([none, none], axis=1),
            labels=jnp.arange(len(thresholds)),
            targets=None,
            start=None,
            clean_logits=none[:, None],
            active=active,
        ),
        num_steps=len(objectives),
        num_searches=num_searches,
        **options,
    )


def run(
    num_searches=4, objectives=(1.0,), thresholds=THRESHOLDS, active=None, first_step=0, **options
):
    active = np.ones(len(thresholds), bool) if active is None else active
    objectives = np.array(objectives, np.float32)
    static = num_searches, tuple(sorted(options.items()))
    return search(thresholds, objectives, active, first_step, *static)


class TestBracket:
    @pytest.mark.parametrize("initial", [1e-3, 10.0])
    def test_constants_are_those_of_the_official_codes(self, initial):
        known = constants.bracket(initial, jnp.zeros(len(THRESHOLDS)))
        narrow = jax.jit(constants.Bracket.narrow)
        tried = []
        for _ in range(9):
            tried.append(known.constant)
            known = narrow(known, known.constant >= THRESHOLDS)
        expected = [constants_by_hand(threshold, initial, 9) for threshold in THRESHOLDS]
        np.testing.assert_allclose(np.transpose(tried), expected, rtol=1e-5)

    def test_constants_never_overflow(self):
        known = constants.bracket(1e-3, jnp.zeros(1))
        for _ in range(60):
            known = known.narrow(jnp.array([False]))
        np.testing.assert_allclose(known.constant, [1e10])


class TestSearch:
    @pytest.mark.parametrize("num_searches", [1, 4, 12])
    def test_the_smallest_successful_constant_is_kept(self, num_searches):
        result = run(num_searches)
        for example, threshold in enumerate(THRESHOLDS):
            tried = constants_by_hand(threshold, 1e-3, num_searches)
            enough = [constant for constant in tried if constant >= threshold]
            assert result.success[example] == bool(enough)
            np.testing.assert_allclose(
                result.measure[example], min(enough, default=np.inf), rtol=1e-5
            )
            np.testing.assert_allclose(
                result.adv_inputs[example, 1], min(enough, default=0), rtol=1e-5
            )
            assert result.num_steps[example] == num_searches
            assert result.num_zero_gradients[example] == num_searches - len(enough)

    def test_the_tenth_search_repeats_the_smallest_success(self):
        # Nine failures lead to 1e5; the repeat jumps to the upper end.
        assert not run(9, thresholds=np.array([5e9], np.float32)).success[0]
        repeated = run(10, thresholds=np.array([5e9], np.float32))
        assert repeated.success[0]
        np.testing.assert_allclose(repeated.measure, [1e10], rtol=1e-6)

    @pytest.mark.parametrize("reset", [True, False])
    def test_every_search_starts_anew_or_goes_on(self, reset):
        # The constants are 0.001, 0.01, 0.1, 1 for the first example, 0.001, 0.0005, 0.00025,
        # 0.000375 for the second and 0.001, 0.0005, 0.00075, 0.000625 for the third.
        result = run(4, (1.0,) * 3, thresholds=np.array([0.5, 4e-4, 7e-4], np.float32), reset=reset)
        numbers = np.array([3, 1, 2])
        expected = np.ones(3) if reset else 1 + 3 * numbers
        np.testing.assert_array_equal(result.adv_inputs[:, 0], expected)

    def test_an_example_that_no_longer_improves_rests_until_the_next_search(self):
        # 20 steps: checks at every second one; the fourth check, step 6, sees no progress.
        objectives = [10, 0, 9, 99, 8, 0, 7.9999, *[1] * 13]
        # At 0.999999 it is the sixth, step 10.
        for factor, steps in ((0.9999, 7), (0.999999, 11)):
            result = run(2, objectives, abort_factor=factor)
            np.testing.assert_array_equal(result.num_steps, np.full(6, 2 * steps))
            assert result.success[0]

    def test_the_point_of_the_check_that_stops_is_not_kept(self):
        # The only success is that of the second step, which is worse than the first.
        aborting, plain = (
            run(1, (1.0, 2.0), np.zeros(1, np.float32), first_step=1, **options)
            for options in ({"abort_factor": 0.9999}, {})
        )
        assert plain.success[0]
        assert not aborting.success[0]
        np.testing.assert_array_equal(aborting.num_steps, [2])

    def test_the_first_check_compares_with_nothing(self):
        result = run(1, (1e20, 1e19), abort_factor=0.9999)
        np.testing.assert_array_equal(result.num_steps, np.full(6, 2))

    def test_a_search_ends_once_the_active_examples_rest(self):
        nobody = np.zeros(6, bool)
        result = run(2, (1.0, 0.5), active=nobody, abort_factor=0.9999)
        np.testing.assert_array_equal(result.num_steps, np.zeros(6))


class TestTerms:
    LOGITS = np.array([[1.0, 0.7, 0.2], [0.5, 0.5, 0.1], [0.0, 2.0, 0.3], [0.0, 1.0, 0.0]])
    LABELS = np.zeros(4, np.int32)

    @pytest.mark.parametrize("confidence", [0.0, 0.5, 1.0])
    def test_confident_compares_after_raising_the_label(self, confidence):
        goal = constants.confident(base.untargeted(losses.margin, self.LABELS), confidence)
        raised = self.LOGITS + confidence * np.array([[1, 0, 0]])
        expected = np.argmax(raised, axis=1) != 0
        np.testing.assert_array_equal(goal.reached(jnp.array(self.LOGITS)), expected)

    @pytest.mark.parametrize("confidence", [0.0, 0.5, 1.0])
    def test_confident_lowers_the_target(self, confidence):
        targets = np.ones(4, np.int32)
        goal = base.targeted(losses.get_targeted("margin"), self.LABELS, targets)
        lowered = self.LOGITS - confidence * np.array([[0, 1, 0]])
        expected = np.argmax(lowered, axis=1) == 1
        reached = constants.confident(goal, confidence).reached(jnp.array(self.LOGITS))
        np.testing.assert_array_equal(reached, expected)

    def test_pull_is_the_gradient_of_the_weighted_hinge(self):
        loss = jnp.array([-1.0, 0.2, 0.7, -3.0])
        slopes = jnp.array([[1.0, 2.0], [3.0, -1.0], [5.0, 5.0], [0.0, 0.0]])
        weights = jnp.array([1.0, 10.0, 100.0, 1e10])

        def total(points):
            return jnp.sum(weights * constants.hinge(loss + jnp.sum(slopes * points, axis=1), 0.5))

        expected = jax.grad(total)(jnp.zeros((4, 2)))
        np.testing.assert_allclose(constants.pull(weights, loss, slopes, 0.5), expected)
        np.testing.assert_allclose(constants.hinge(loss, 0.5), [1.5, 0.3, 0, 3.5], rtol=1e-6)

    def test_a_tie_is_left(self):
        pulled = constants.pull(jnp.ones(1), jnp.zeros(1), jnp.ones((1, 2)), 0.0)
        np.testing.assert_array_equal(pulled, [[-1, -1]])
