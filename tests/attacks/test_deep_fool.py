"""Tests of DeepFool: closed forms, golden values of an independent implementation, invariants."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gfa_jax import ThreatModel
from gfa_jax.attacks.deep_fool import deepfool
from tests.attacks import minimum_norm, toy
from tests.attacks.minimum_norm import Linear, assert_same, linear, run, sizes


class TestLinearModels:
    @pytest.mark.parametrize("case", Linear.CASES)
    @pytest.mark.parametrize("norm", ["l2", "linf"])
    def test_one_step_reaches_the_nearest_boundary(self, norm, case):
        model = linear(*case)
        result = model.attack(deepfool, norm)
        nearest = model.radii(norm).min(axis=1)
        np.testing.assert_allclose(result.distance, 1.02 * (nearest + 1e-4), rtol=1e-4)
        assert np.all(result.success)
        np.testing.assert_array_equal(result.num_backwards, case[2] - 1)

    @pytest.mark.parametrize("norm", ["l2", "linf"])
    def test_torchattacks_goes_no_farther_than_the_overshoot(self, norm):
        model = linear(3, (2, 2, 3), 4)
        result = model.attack(deepfool, norm, variant="torchattacks", overshoot=0.1)
        np.testing.assert_allclose(result.distance, 1.1 * model.radii(norm).min(axis=1), rtol=1e-4)
        np.testing.assert_array_equal(result.num_backwards, 3)

    def test_bisections_come_down_to_the_boundary_itself(self):
        model, norm = linear(3, (2, 2, 3), 4), "l2"
        result = model.attack(deepfool, norm, num_bisections=10)
        nearest = model.radii(norm).min(axis=1)
        assert np.all(result.success)
        assert np.all(np.asarray(result.distance) >= nearest * (1 - 1e-5))
        np.testing.assert_allclose(result.distance, nearest, rtol=0.002)

    @pytest.mark.parametrize("norm", ["linf"])
    def test_targeted_reaches_the_boundary_where_no_third_class_is_ahead(self, norm):
        model = linear(8, (12,), 3)
        radii = model.radii(norm)
        nearest = np.argmin(radii, axis=1).astype(np.int32)
        result = model.attack(deepfool, norm, targets=nearest)
        np.testing.assert_allclose(result.distance, 1.02 * (radii.min(axis=1) + 1e-4), rtol=1e-4)
        farther = (3 - model.labels - nearest).astype(np.int32)
        result = model.attack(deepfool, norm, targets=farther)
        assert np.all(result.success)
        assert np.all(np.asarray(result.distance) >= radii[np.arange(8), farther])

    def test_only_candidates_are_looked_at(self):
        # Class 2 is the nearest, but ranked third by the logits.
        slopes = jnp.array([[0.0, 0.1, 1.0]])

        def logits_fn(points):
            return points.mean(axis=1, keepdims=True) @ slopes + jnp.array([[1.0, 0.5, 0.0]])

        arguments = {
            "inputs": np.full((1, 4), 0.4, np.float32),
            "labels": np.zeros(1, np.int32),
            "logits_fn": logits_fn,
        }
        two, three, every = (
            run(deepfool, "l2", **arguments, clip=False, num_candidates=count)
            for count in (2, 3, None)
        )
        # A change of the mean by 1 is one of length 2.
        np.testing.assert_allclose(three.distance, 1.02 * (2 * 0.6 + 1e-4), rtol=1e-5)
        assert_same(every, three, atol=0)
        assert two.num_backwards[0] < three.num_backwards[0] == 2
        np.testing.assert_allclose(two.distance, 1.02 * (2 * 4.6 + 1e-4), rtol=1e-5)


class TestGoldenModel:
    # An independent implementation of the original: l_2, no clipping.
    DISTANCES = (0.199571, 0.190181, 0.37767, 0.09664, 0.406794, 0.092549)
    STEPS = np.array([1, 1, 1, 2, 1, 2])

    def test_original_without_clipping(self):
        result = run(deepfool, "l2", clip=False)
        np.testing.assert_allclose(result.distance, self.DISTANCES, atol=1e-5)
        np.testing.assert_array_equal(result.num_backwards, 4 * self.STEPS)
        assert np.all(result.success)

    def test_the_last_step_is_verified(self):
        # Peers judge a point in the step after it: the last one goes unseen.
        result = run(deepfool, "l2", clip=False, num_steps=1)
        np.testing.assert_array_equal(result.success, self.STEPS == 1)
        np.testing.assert_allclose(
            np.asarray(result.distance)[self.STEPS == 1],
            np.array(self.DISTANCES)[self.STEPS == 1],
            atol=1e-5,
        )

    def test_torchattacks_steps_as_its_formula(self):
        """One step of an example at a time, in NumPy."""
        # With the usual overshoot, some points come so close to the boundary that rounding decides.
        overshoot = 0.1
        jacobian = jax.jit(jax.jacrev(lambda x: toy.logits_fn(x[None])[0]))
        logits_fn = jax.jit(toy.logits_fn)
        result = run(deepfool, "l2", variant="torchattacks", num_steps=4, overshoot=overshoot)
        for example in range(6):
            image, label = toy.INPUTS[example], toy.LABELS[example]
            for _ in range(4):
                logits = np.asarray(logits_fn(image[None]))[0]
                if np.argmax(logits) != label:
                    break
                rows = np.asarray(jacobian(image))
                slopes = np.delete(rows, label, axis=0) - rows[label][None]
                lead = np.abs(np.delete(logits, label) - logits[label])
                nearest = np.argmin(lead / np.linalg.norm(slopes, axis=1))
                slope = slopes[nearest]
                step = lead[nearest] * slope / np.sum(slope**2)
                image = np.clip(image + (1 + overshoot) * step, 0, 1)
            misled = np.argmax(logits_fn(image[None])[0]) != label
            assert result.success[example] == misled
            expected = image if misled else toy.INPUTS[example]
            np.testing.assert_allclose(result.adv_inputs[example], expected, atol=1e-5)
        assert 3 <= np.sum(result.success) < 6

    @pytest.mark.parametrize("norm", ["l2", "linf"])
    def test_bisections_only_improve_and_come_close_to_official_fab(self, norm):
        plain, refined = (run(deepfool, norm, num_bisections=count) for count in (0, 8))
        assert np.all(refined.success)
        assert np.all(np.asarray(refined.distance) <= np.asarray(plain.distance))
        assert np.any(np.asarray(refined.distance) < 0.99 * np.asarray(plain.distance))
        np.testing.assert_array_equal(refined.num_forwards, plain.num_forwards + 8)
        ratio = np.asarray(refined.distance) / toy.REACHABLE[norm]
        assert np.all(ratio > 0.97)
        assert np.all(ratio < {"l2": 1.1, "linf": 1.2}[norm])

    def test_away_from_the_prediction_the_label_plays_no_part(self):
        plain = run(deepfool, "l2", num_bisections=0)
        predicted = run(deepfool, "l2", labels=minimum_norm.WRONG, label="predicted")
        assert_same(predicted, plain, atol=0)

    @pytest.mark.parametrize("options", [{"num_gradients": 3}, {"chunk_size": 2}])
    def test_what_is_computed_at_once_changes_nothing(self, options):
        assert_same(run(deepfool, "l2", **options), run(deepfool, "l2", num_bisections=0))

    def test_gradients_too_small_or_not_finite_stall_the_example_alone(self):
        def logits_fn(points):
            logits = toy.logits_fn(points)
            rows = jnp.arange(len(points))[:, None]
            flat = jax.lax.stop_gradient(logits) + 1e-15 * logits
            # The gradient is 0 times infinity at pixel 0 of example 1.
            rooted = logits + jnp.sqrt(jnp.where(rows == 1, points[:, :1] * 0, 1.0))
            return jnp.where(rows == 0, flat, jnp.where(rows == 1, rooted, logits))

        result = run(deepfool, "l2", logits_fn=logits_fn)
        assert np.all(np.isfinite(result.adv_inputs))
        np.testing.assert_array_equal(result.success, [0, 1, 1, 1, 1, 1])
        assert result.num_backwards[0] == result.num_zero_gradients[0] == 4
        plain = run(deepfool, "l2", num_bisections=0)
        np.testing.assert_allclose(result.distance[2:], plain.distance[2:], rtol=1e-4)

    def test_float64_agrees(self):
        with jax.enable_x64(True):
            attack = deepfool(ThreatModel("l2", 0.3), clip=False)
            inputs = toy.INPUTS.astype(np.float64)
            result = jax.jit(attack, static_argnums=0)(toy.logits_fn, None, inputs, toy.LABELS)
            assert result.adv_inputs.dtype == np.float64
            distances = sizes(minimum_norm.perturbation(result, inputs), "l2")
        np.testing.assert_allclose(distances, self.DISTANCES, atol=2e-6)


class TestProperties(minimum_norm.Properties):
    FACTORY = deepfool
    OPTIONS = {"num_bisections": 8}  # noqa: RUF012
    # Whether any example is left undone.
    ALLOWED_COLLECTIVES = ("all-reduce",)

    def expected_counts(self, result):
        steps = np.asarray(result.num_backwards) // 4
        assert np.all((steps >= 1) & (steps <= 10))
        return 1 + 2 * steps + 8, 4 * steps

    @pytest.mark.parametrize("scale", [1e-3, 1e3, 1e30])
    def test_the_scale_of_the_logits_changes_nothing(self, scale):
        np.testing.assert_allclose(self.run(scale=scale).distance, self.run().distance, rtol=1e-4)

    @pytest.mark.parametrize("targets", [None, minimum_norm.TARGETS])
    def test_linf_is_consistent_too(self, targets):
        labels = minimum_norm.WRONG
        result = run(deepfool, "linf", labels=labels, targets=targets, num_bisections=0)
        minimum_norm.assert_consistent(
            result, "linf", toy.logits_fn, toy.INPUTS, labels, targets=targets
        )
        assert np.all(result.success)


class TestOptions:
    @pytest.mark.parametrize(
        ("norm", "options", "message"),
        [
            ("l1", {}, r"norm='l1' is not one of \['l2', 'linf'\]"),
            ("l2", {"num_steps": 0}, "num_steps=0 must be an integer >= 1"),
            ("l2", {"overshoot": -0.1}, r"overshoot=-0\.1 must be a finite number >= 0"),
            ("l2", {"variant": "foolbox"}, "variant='foolbox' is not one of"),
            ("l2", {"label": "given"}, "label='given' is not one of"),
            ("l2", {"num_candidates": 1}, "num_candidates=1 must be an integer >= 2"),
            ("l2", {"num_bisections": -1}, "num_bisections=-1 must be an integer >= 0"),
            ("l2", {"num_bisections": True}, "num_bisections=True must be an integer >= 0"),
            ("l2", {"chunk_size": 0}, "chunk_size=0 must be an integer >= 1"),
            ("l2", {"num_gradients": 0}, "num_gradients=0 must be an integer >= 1"),
        ],
    )
    def test_bad_options_are_named_with_their_value(self, norm, options, message):
        with pytest.raises(ValueError, match=message):
            deepfool(ThreatModel(norm), **options)

    def test_a_model_of_one_class_is_refused(self):
        with pytest.raises(ValueError, match="the model has 1 class"):
            deepfool(ThreatModel("l2"))(
                lambda x: toy.logits_fn(x)[:, :1], None, toy.INPUTS, np.zeros(6, np.int32)
            )
