"""Planted problems on small networks: strong attacks solve them, weak ones and chance do not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gfa_jax import ThreatModel, attacks, norms
from gfa_jax.attacks import estimators
from gfa_jax.evaluation import binarization

NUM = 24
RADII = {"linf": 0.1, "l2": 1.0, "l1": 8.0}
OPTIONS = {"num_inner": 50, "num_random": 40, "batch_size": 32}


def make_inputs():
    """Some coordinates at the bounds, where noise is clipped."""
    draw = np.random.default_rng(0).uniform(-0.2, 1.2, (NUM, 8, 8, 1))
    return jnp.asarray(np.clip(draw, 0, 1), jnp.float32)


INPUTS = make_inputs()
KEYS = attacks.example_keys(jax.random.key(3), jnp.arange(NUM))
# The inputs are more features than points, these are fewer.
NARROW = jnp.asarray(np.random.default_rng(1).normal(size=(64, 40)) / 8, jnp.float32)


def identity(inputs):
    return inputs


def narrow(inputs):
    return jnp.tanh(norms.flatten(inputs) @ NARROW)


def masked(inputs):
    return jax.lax.stop_gradient(inputs)


def shattered(inputs):
    """The inputs up to rounding, with gradients that say nothing of them."""
    ripple = 2e-3 * jnp.sin(4e4 * inputs)
    return inputs + (ripple - jax.lax.stop_gradient(ripple))


@functools.partial(jax.jit, static_argnames=("features_fn", "norm", "options"))
def _plant(features_fn, norm, keys, inputs, logit_range, options):
    return binarization.plant(
        features_fn,
        ThreatModel(norm, RADII[norm]),
        keys,
        inputs,
        logit_range=logit_range,
        **{**OPTIONS, **dict(options)},
    )


def plant(features_fn=identity, norm="linf", keys=KEYS, inputs=INPUTS, logit_range=1.0, **options):
    logit_range = jnp.broadcast_to(logit_range, len(inputs))
    return _plant(features_fn, norm, keys, inputs, logit_range, tuple(sorted(options.items())))


@functools.partial(jax.jit, static_argnames=("features_fn", "attack"))
def attack_problems(features_fn, attack, keys, inputs, problems):
    return binarization.attack_problems(features_fn, attack, keys, inputs, problems)


def create(name, norm="linf", **options):
    return attacks.create(name, ThreatModel(norm, RADII[norm]), **options)


def solve(features_fn, attack, norm="linf", **options):
    problems = plant(features_fn, norm, **options)
    result = attack_problems(features_fn, attack, KEYS, INPUTS, problems)
    return result, binarization.summary(result)


def margins(features_fn, problems, inputs):
    logits = binarization.binary_logits(features_fn, problems.heads)(inputs)
    return np.asarray(logits[:, 1] - logits[:, 0])


class TestBoundaryPoints:
    @pytest.mark.parametrize("norm", RADII)
    def test_they_lie_in_the_box_at_distance_epsilon(self, norm):
        threat = ThreatModel(norm, RADII[norm])
        points = jax.jit(functools.partial(binarization.boundary_points, threat))(KEYS, INPUTS)
        assert points.min() >= 0
        assert points.max() <= 1
        # Clipping has bitten.
        assert np.any((points == 0) & (INPUTS > 0)) or np.any((points == 1) & (INPUTS < 1))
        orders = {"linf": np.inf, "l2": 2, "l1": 1}
        flat = np.asarray(points - INPUTS, np.float64).reshape(NUM, -1)
        distances = np.linalg.norm(flat, ord=orders[norm], axis=1)
        np.testing.assert_allclose(distances, RADII[norm], rtol=1e-5)

    @pytest.mark.parametrize("norm", RADII)
    def test_an_unreachable_radius_gives_the_farthest_point_of_the_direction(self, norm):
        threat = ThreatModel(norm, 100.0)
        points = binarization.boundary_points(threat, KEYS[:4], INPUTS[:4])
        at_bounds = (points == 0) | (points == 1)
        assert at_bounds.mean() > 0.99
        assert np.all(np.isfinite(points))

    def test_an_example_draws_from_its_own_key(self):
        threat = ThreatModel("l2", 1.0)
        points = binarization.boundary_points(threat, KEYS, INPUTS)
        some = jnp.array([5, 2])
        again = binarization.boundary_points(threat, KEYS[some], INPUTS[some])
        np.testing.assert_allclose(again, points[some], atol=1e-6)
        assert np.all(np.abs(points[5] - INPUTS[5] - points[2] + INPUTS[2]).max() > 0.01)


class TestPlant:
    @pytest.mark.parametrize(("features_fn", "num_boundary"), [(identity, 1), (narrow, 3)])
    def test_heads_tell_planted_points_from_points_well_inside(self, features_fn, num_boundary):
        problems = plant(features_fn, num_boundary=num_boundary)
        assert np.all(problems.separable)
        np.testing.assert_allclose(problems.planted_distance, RADII["linf"], rtol=1e-5)
        # Just beyond the threshold: (1 - closeness) of the gap, which is less than the range.
        planted = margins(features_fn, problems, problems.planted)
        assert np.all((planted > 0) & (planted < 1e-3))
        np.testing.assert_allclose(problems.planted_margin, planted, atol=1e-5)
        clean = margins(features_fn, problems, INPUTS)
        assert np.all(clean < -0.05)
        inside = ThreatModel("linf", 0.95 * RADII["linf"])
        new = inside.random_start(KEYS, INPUTS)
        assert np.mean(margins(features_fn, problems, new) > 0) <= 0.05

    @pytest.mark.parametrize("norm", ["l2", "l1"])
    def test_other_norms(self, norm):
        problems = plant(norm=norm)
        assert np.all(problems.separable)
        np.testing.assert_allclose(problems.planted_distance, RADII[norm], rtol=1e-5)
        assert np.all(margins(identity, problems, problems.planted) > 0)
        assert np.all(margins(identity, problems, INPUTS) < 0)

    def test_the_range_of_margins(self):
        unit, large = plant(), plant(logit_range=jnp.linspace(1.0, 50.0, NUM))
        ranges = np.linspace(1.0, 50.0, NUM)
        np.testing.assert_array_equal(large.separable, unit.separable)
        np.testing.assert_allclose(
            margins(identity, large, INPUTS), ranges * margins(identity, unit, INPUTS), rtol=1e-4
        )

    def test_the_threshold_follows_the_closeness_and_chunks_change_nothing(self):
        near, half = plant(), plant(closeness=0.5, batch_size=7)
        # Planted points and weights are the same; the gap of margins is at most their range.
        np.testing.assert_array_equal(near.planted, half.planted)
        np.testing.assert_allclose(near.heads.weights, half.heads.weights, rtol=1e-2, atol=1e-3)
        gap = 2 * np.asarray(half.planted_margin)
        assert np.all((gap > 0.1) & (gap <= 1))
        np.testing.assert_allclose(near.planted_margin, 1e-3 * gap, atol=1e-5)
        np.testing.assert_allclose(half.random_margin - near.random_margin, 0.499 * gap, atol=1e-3)

    def test_examples_that_do_not_separate_are_drawn_again(self):
        # With so few features, the planted point lies among the others about as often as not.
        few = functools.partial(_few, 3)
        once, often = plant(few, num_draws=1), plant(few, num_draws=6)
        first = np.asarray(once.separable)
        assert 0 < first.mean() < 1
        assert np.mean(often.separable) > first.mean()
        np.testing.assert_array_equal(once.planted[first], often.planted[first])
        assert np.all(margins(few, often, often.planted)[np.asarray(often.separable)] > 0)
        # Where none separates, the head never says class 1.
        assert np.all(margins(few, once, once.planted)[~first] < 0)
        # Nor does it count.
        attack = create("pgd-margin", num_steps=5)
        result = attack_problems(few, attack, KEYS, INPUTS, once)
        found = binarization.summary(result)
        assert found["n"] == first.sum()
        assert found["num_not_separable"] == NUM - first.sum()
        assert not np.any((result.success | result.random_success)[~first])
        assert np.all((np.asarray(result.num_forwards) > 0) == first)


def _few(count, inputs):
    return norms.flatten(inputs)[:, :count]


class TestBinarizationTest:
    @pytest.mark.parametrize(
        ("features_fn", "norm", "name"),
        [
            (identity, "linf", "apgd-ce"),
            (narrow, "linf", "apgd-t"),
            (identity, "l2", "apgd-ce"),
            (identity, "l1", "apgd-ce"),
        ],
    )
    def test_strong_attacks_solve_what_chance_does_not(self, features_fn, norm, name):
        attack = create(name, norm, num_steps=20)
        result, found = solve(
            features_fn, attack, norm, num_boundary=3 if features_fn is narrow else 1
        )
        assert found["n"] == NUM
        assert found["asr"] >= 0.95
        assert found["r_asr"] <= 0.25
        assert found["margin_gain"] > 0
        assert found["adequate"]
        solved = np.asarray(result.success)
        assert np.all(np.asarray(result.margin)[solved] > 0)

    def test_weak_attacks_and_masked_gradients_are_told(self):
        problems = plant()
        assert np.all(problems.separable)
        weak = create("pgd-margin", num_steps=1, step_size=1e-3)
        strong = create("pgd-margin", num_steps=20)
        # Features whose gradients are masked are the same, and so are the problems.
        for features_fn, attack in ((identity, weak), (masked, strong), (shattered, strong)):
            result = attack_problems(features_fn, attack, KEYS, INPUTS, problems)
            found = binarization.summary(result)
            assert found["n"] == NUM
            assert found["asr"] <= 0.3
            assert not found["adequate"]
        square = create("square", num_queries=2000)
        assert np.mean(attack_problems(masked, square, KEYS, INPUTS, problems).success) >= 0.95

    def test_large_logits_disable_the_cross_entropy_alone(self):
        options = {"random_start": False, "num_steps": 10}
        cross_entropy = solve(identity, create("pgd", **options), logit_range=1e4)[1]
        margin = solve(identity, create("pgd-margin", **options), logit_range=1e4)[1]
        assert cross_entropy["asr"] <= 0.1
        assert margin["asr"] >= 0.95

    def test_an_example_does_not_depend_on_its_batch(self):
        attack = create("pgd-margin", num_steps=20)
        whole = attack_problems(identity, attack, KEYS, INPUTS, plant())
        test = functools.partial(binarization.binarization_test, identity, attack, **OPTIONS)
        few = jnp.array([5, 3])
        part = jax.jit(test)(KEYS[few], INPUTS[few])
        order = jax.random.permutation(jax.random.key(0), NUM)
        problems = plant(keys=KEYS[order], inputs=INPUTS[order])
        permuted = attack_problems(identity, attack, KEYS[order], INPUTS[order], problems)
        for indices, result in ((few, part), (order, permuted)):
            for name, field in result._asdict().items():
                expected = getattr(whole, name)[indices]
                if field.dtype == jnp.float32:
                    np.testing.assert_allclose(field, expected, rtol=1e-3, atol=2e-4, err_msg=name)
                else:
                    np.testing.assert_array_equal(field, expected, err_msg=name)

    def test_beyond_epsilon_is_no_success(self):
        attack = create("deepfool", "l2")
        problems = plant(norm="l2")
        assert np.all(attack_problems(identity, attack, KEYS, INPUTS, problems).success)
        heads = problems.heads
        # No point of the ball reaches class 1 any more, points beyond it do.
        farther = heads._replace(
            bias=heads.bias - 1.05 * RADII["l2"] * norms.vector_norm(heads.weights, "l2")
        )
        far = problems._replace(heads=farther)
        result = attack_problems(identity, attack, KEYS, INPUTS, far)
        assert not np.any(result.success)
        assert np.mean(np.asarray(result.margin) > 0) > 0.9


class TestSummary:
    RESULT = binarization.BinarizationResult(
        success=np.array([True, True, False, False]),
        random_success=np.array([False, True, False, False]),
        random_share=np.array([0.0, 0.5, 0.0, 0.0], np.float32),
        margin=np.array([0.5, 0.25, -1.0, -3.0], np.float32),
        random_margin=np.array([-0.5, 0.25, -0.5, -3.0], np.float32),
        separable=np.array([True, True, True, False]),
        planted_distance=np.ones(4, np.float32),
        num_forwards=np.ones(4, np.int32),
    )

    def test_it_counts_separable_examples(self):
        found = binarization.summary(self.RESULT)
        assert found == {
            "asr": pytest.approx(2 / 3),
            "r_asr": pytest.approx(1 / 3),
            "margin_gain": pytest.approx(0.5),
            "n": 3,
            "num_not_separable": 1,
            "adequate": False,
        }

    def test_without_problems_there_is_nothing_to_say(self):
        found = binarization.summary(self.RESULT._replace(separable=np.zeros(4, bool)))
        assert found["n"] == 0
        assert found["num_not_separable"] == 4
        assert found["asr"] is found["r_asr"] is found["margin_gain"] is found["adequate"] is None

    def test_what_is_enough_is_a_parameter(self):
        assert binarization.summary(self.RESULT, min_asr=0.6)["adequate"]
        with pytest.raises(ValueError, match=r"min_asr=1.5"):
            binarization.summary(self.RESULT, min_asr=1.5)


class TestRefusals:
    @pytest.mark.parametrize(
        "options",
        [
            {"num_inner": 1},
            {"num_inner": 2.5},
            {"num_boundary": 0},
            {"num_draws": 0},
            {"num_random": 0},
            {"batch_size": 0},
            {"inner_radius": 1.0},
            {"inner_radius": 0},
            {"closeness": 1.0},
            {"closeness": -0.1},
            {"logit_range": 0.0},
        ],
    )
    def test_options_out_of_range_are_named(self, options):
        ((name, value),) = options.items()
        with pytest.raises(ValueError, match=f"{name}={value}"):
            binarization.plant(identity, ThreatModel(), KEYS, INPUTS, **options)

    def test_keys_and_inputs_that_do_not_fit(self):
        with pytest.raises(ValueError, match="keys has shape"):
            binarization.plant(identity, ThreatModel(), KEYS[:2], INPUTS)
        with pytest.raises(ValueError, match="keys has shape None"):
            binarization.plant(identity, ThreatModel(), None, INPUTS)
        with pytest.raises(ValueError, match="bounds"):
            binarization.plant(identity, ThreatModel(), KEYS, INPUTS + 1)

    def test_attacks_that_reorder_or_need_another_model(self):
        problems = plant()
        with pytest.raises(ValueError, match="chunk_size"):
            attack_problems(identity, create("square", chunk_size=4), KEYS, INPUTS, problems)
        random = create("pgd", estimator=estimators.expectation(2))
        with pytest.raises(ValueError, match="randomised"):
            attack_problems(identity, random, KEYS, INPUTS, problems)
