"""Tests of gfa_jax.threat against float64 references, optimality conditions and linear programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from gfa_jax import ThreatModel, norms
from gfa_jax.threat import project_l1_box

NORMS = ("linf", "l2", "l1")
UNIT = (0.0, 1.0)
WIDE = (-2.12, 2.64)
ORDERS = {"linf": np.inf, "l2": 2, "l1": 1}

fast = settings(max_examples=25, deadline=None, derandomize=True)
seeds = st.integers(0, 10_000)

# Jitted with epsilon as an argument: one compilation for each norm, box and shape.
project_perturbation = jax.jit(project_l1_box)
project = jax.jit(lambda threat, inputs, points: threat.project(inputs, points))
maximize = jax.jit(lambda threat, inputs, gradients: threat.linear_maximizer(inputs, gradients))
start = jax.jit(lambda threat, keys, inputs: threat.random_start(keys, inputs))
steepest = jax.jit(
    lambda threat, inputs, gradients, sparsity: threat.steepest_step(
        inputs, gradients, sparsity=sparsity
    ),
    static_argnums=3,
)


def problem(seed, shape=(4, 6), bounds=UNIT, scale=0.5):
    """Inputs in the box, many of them on its faces, and points around them."""
    rng = np.random.default_rng(seed)
    lower, upper = bounds
    inputs = np.clip(rng.uniform(lower - 0.4, upper + 0.4, shape), lower, upper).astype(np.float32)
    points = inputs + scale * rng.normal(size=shape).astype(np.float32)
    return inputs, points


def sizes(perturbations, norm):
    flat = np.asarray(perturbations, np.float64).reshape(len(perturbations), -1)
    return np.linalg.norm(flat, ord=ORDERS[norm], axis=1)


def rounding(threat, inputs):
    """How far ``inputs + perturbation`` may round away from the perturbation, in the norm."""
    ulps = np.float64(np.finfo(np.float32).eps) * max(abs(bound) for bound in threat.bounds)
    num_coordinates = inputs[0].size
    return ulps * {"linf": 1, "l2": num_coordinates**0.5, "l1": num_coordinates}[threat.norm]


def assert_allowed(threat, inputs, points):
    points = np.asarray(points)
    lower, upper = np.float32(threat.bounds)
    assert points.min() >= lower
    assert points.max() <= upper
    limit = float(threat.epsilon) * (1 + 1e-6) + rounding(threat, inputs)
    assert np.all(sizes(points.astype(np.float64) - inputs, threat.norm) <= limit)


def l1_box_reference(inputs, perturbation, epsilon, bounds):
    """Exact projection of one vector in float64: the root lies between two sorted breakpoints."""
    inputs, perturbation = inputs.astype(np.float64), perturbation.astype(np.float64)
    magnitude = np.abs(perturbation)
    room = np.maximum(np.where(perturbation > 0, bounds[1] - inputs, inputs - bounds[0]), 0)

    def moved(threshold):
        return np.clip(magnitude - threshold, 0, room)

    breakpoints = np.unique(np.concatenate([[0], magnitude, np.maximum(magnitude - room, 0)]))
    lengths = np.array([moved(threshold).sum() for threshold in breakpoints])
    if lengths[0] <= epsilon:
        return np.sign(perturbation) * moved(0)
    # Lengths fall from above epsilon to 0, linearly between breakpoints.
    threshold = np.interp(epsilon, lengths[::-1], breakpoints[::-1])
    return np.sign(perturbation) * moved(threshold)


def linear_program(inputs, direction, threat):
    """The largest ``<direction, d>`` over one example's allowed perturbations, in float64."""
    lower, upper = threat.bounds
    radius = threat.epsilon if threat.norm == "linf" else np.inf
    up = [(0, min(radius, max(upper - value, 0))) for value in inputs.astype(np.float64)]
    down = [(0, min(radius, max(value - lower, 0))) for value in inputs.astype(np.float64)]
    in_ball = {}
    if threat.norm == "l1":
        in_ball = {"A_ub": np.ones((1, 2 * len(inputs))), "b_ub": [threat.epsilon]}
    direction = direction.astype(np.float64)
    solution = linprog(np.concatenate([-direction, direction]), bounds=up + down, **in_ball)
    assert solution.status == 0
    return -solution.fun


class TestProject:
    @pytest.mark.parametrize("bounds", [UNIT, WIDE])
    @pytest.mark.parametrize("norm", NORMS)
    @given(seed=seeds, epsilon=st.floats(0, 8), scale=st.sampled_from([1e-3, 0.1, 2.0]))
    @fast
    def test_result_is_allowed_and_projecting_again_changes_nothing(
        self, norm, bounds, seed, epsilon, scale
    ):
        threat = ThreatModel(norm, epsilon, bounds)
        inputs, points = problem(seed, bounds=bounds, scale=scale)
        projected = project(threat, inputs, points)
        assert_allowed(threat, inputs, projected)
        np.testing.assert_allclose(project(threat, inputs, projected), projected, atol=2e-6)

    @pytest.mark.parametrize("norm", NORMS)
    @given(seed=seeds, share=st.floats(0, 1))
    @fast
    def test_allowed_points_stay(self, norm, seed, share):
        inputs, points = problem(seed)
        points = np.clip(points, 0, 1)
        size = sizes(points.astype(np.float64) - inputs, norm)
        points = inputs + (points - inputs) * np.float32(share)
        threat = ThreatModel(norm, float(size.max()))
        np.testing.assert_allclose(project(threat, inputs, points), points, atol=2e-7)

    @pytest.mark.parametrize("bounds", [UNIT, WIDE])
    @given(seed=seeds, epsilon=st.floats(0, 2))
    @fast
    def test_linf_is_the_nearest_allowed_point(self, bounds, seed, epsilon):
        inputs, points = problem(seed, bounds=bounds)
        low = np.maximum(inputs - epsilon, bounds[0])
        high = np.minimum(inputs + epsilon, bounds[1])
        projected = project(ThreatModel("linf", epsilon, bounds), inputs, points)
        np.testing.assert_allclose(projected, np.clip(points, low, high), atol=1e-6)

    @pytest.mark.parametrize("bounds", [UNIT, WIDE])
    @pytest.mark.parametrize("shape", [(4, 6), (2, 40)])
    @given(seed=seeds, epsilon=st.floats(0, 5), scale=st.sampled_from([0.05, 0.5, 5.0]))
    @fast
    def test_l1_equals_the_breakpoint_reference(self, bounds, shape, seed, epsilon, scale):
        inputs, points = problem(seed, shape, bounds, scale)
        projected = project(ThreatModel("l1", epsilon, bounds), inputs, points)
        for clean, point, result in zip(inputs, points, np.asarray(projected), strict=True):
            expected = clean + l1_box_reference(clean, point - clean, epsilon, bounds)
            np.testing.assert_allclose(result, expected, atol=3e-6)

    @pytest.mark.parametrize("norm", ["linf", "l1"])
    @pytest.mark.parametrize("epsilon", [0.1, 0.5, 2.0])
    def test_optimality_condition_of_the_nearest_allowed_point(self, norm, epsilon):
        # p projects z onto a convex set if and only if no q of the set has <z - p, q - p> > 0.
        threat = ThreatModel(norm, epsilon)
        inputs, points = problem(3)
        projected = np.asarray(project(threat, inputs, points))
        for clean, point, result in zip(inputs, points, projected, strict=True):
            residual = point - result
            best = linear_program(clean, residual, threat)
            assert best <= residual @ (result - clean) + 1e-5

    @pytest.mark.parametrize(
        ("epsilon", "expected"),
        [
            (0.25, [0.225, 1, 0.475, 0.5]),
            (0.5, [0.35, 1, 0.35, 0.5]),
            (1.0, [0.533333, 1, 0.166667, 0.633333]),
            (5.0, [0.6, 1, 0.1, 0.7]),
        ],
    )
    def test_l1_golden_values(self, epsilon, expected):
        inputs = np.array([[0, 1, 0.5, 0.5]], np.float32)
        perturbation = np.array([[0.6, 0.3, -0.4, 0.2]], np.float32)
        projected = project(ThreatModel("l1", epsilon), inputs, inputs + perturbation)
        np.testing.assert_allclose(projected, [expected], atol=1e-6)

    def test_l1_of_equal_magnitudes_shrinks_them_equally(self):
        inputs = np.full((1, 4), 0.5, np.float32)
        perturbation = np.array([[0.25, -0.25, 0.25, -0.25]], np.float32)
        projected = project(ThreatModel("l1", 0.8), inputs, inputs + perturbation)
        np.testing.assert_allclose(projected - inputs, 0.8 * perturbation, rtol=1e-6)

    def test_l1_uses_the_whole_radius_where_ball_then_clip_would_not(self):
        inputs = np.array([[0.9, 0.5, 0.5, 0.5]], np.float32)
        points = np.array([[1.9, 0.9, 0.5, 0.5]], np.float32)
        projected = project(ThreatModel("l1", 0.5), inputs, points)
        np.testing.assert_allclose(projected, [[1.0, 0.9, 0.5, 0.5]], atol=1e-6)

    @pytest.mark.parametrize("epsilon", [1e-3, 0.5, 12.0, 200.0, 1e4])
    @pytest.mark.parametrize("scale", [1e-3, 0.3])
    def test_l1_is_accurate_in_float32_for_images(self, epsilon, scale):
        inputs, points = problem(1, (2, 32, 32, 3), scale=scale)
        perturbation = points - inputs
        projected = np.asarray(project_perturbation(inputs, perturbation, epsilon))
        assert np.all(sizes(projected, "l1") <= epsilon * (1 + 1e-6))
        for clean, wanted, result in zip(inputs, perturbation, projected, strict=True):
            expected = l1_box_reference(clean.ravel(), wanted.ravel(), epsilon, UNIT)
            np.testing.assert_allclose(result.ravel(), expected, atol=1e-6)
            # Many small coordinates must not lose radius together.
            assert np.abs(result).sum() == pytest.approx(np.abs(expected).sum(), rel=1e-5)

    def test_l2_inside_the_box_is_the_radial_projection(self):
        inputs = np.full((2, 3), 0.5, np.float32)
        points = inputs + np.array([[0.3, 0, -0.4], [0.01, 0.02, 0]], np.float32)
        projected = ThreatModel("l2", 0.25).project(inputs, points)
        np.testing.assert_allclose(projected[0] - 0.5, [0.15, 0, -0.2], atol=1e-7)
        np.testing.assert_allclose(projected[1], points[1], atol=1e-7)

    def test_l2_scales_into_the_ball_before_it_clips(self):
        inputs = jnp.array([[0.9, 0.5]])
        projected = ThreatModel("l2", 0.5).project(inputs, inputs + jnp.array([[0.6, 0.8]]))
        np.testing.assert_allclose(projected, [[1.0, 0.9]], atol=1e-6)

    @pytest.mark.parametrize("norm", NORMS)
    def test_infinite_bounds_mean_no_box(self, norm):
        threat = ThreatModel(norm, 0.5, (-np.inf, np.inf))
        inputs, points = problem(0, scale=3)
        projected = np.asarray(project(threat, inputs, points))
        np.testing.assert_allclose(sizes(projected - inputs, norm), 0.5, rtol=1e-5)


class TestLinearMaximizer:
    @pytest.mark.parametrize("bounds", [UNIT, WIDE])
    @pytest.mark.parametrize("norm", ["linf", "l1"])
    @given(seed=seeds, epsilon=st.floats(0, 6))
    @settings(max_examples=15, deadline=None, derandomize=True)
    def test_it_solves_the_linear_program(self, norm, bounds, seed, epsilon):
        threat = ThreatModel(norm, epsilon, bounds)
        inputs, points = problem(seed, (2, 5), bounds)
        gradients = np.round(points - inputs, 1)  # with ties and zeros
        moved = np.asarray(maximize(threat, inputs, gradients))
        assert_allowed(threat, inputs, moved)
        for clean, gradient, point in zip(inputs, gradients, moved, strict=True):
            value = gradient.astype(np.float64) @ (point.astype(np.float64) - clean)
            assert value == pytest.approx(linear_program(clean, gradient, threat), abs=1e-5)

    def test_l2_moves_along_the_gradient_and_clips(self):
        inputs = jnp.array([[0.5, 0.5], [0.5, 0.9]])
        moved = ThreatModel("l2", 0.5).linear_maximizer(
            inputs, jnp.array([[3.0, -4.0], [3.0, 4.0]])
        )
        np.testing.assert_allclose(moved, [[0.8, 0.1], [0.8, 1.0]], atol=1e-6)

    def test_l1_spends_the_radius_on_the_largest_gradients_first(self):
        inputs = jnp.array([[0.5, 0.8, 0.0, 0.5]])
        gradients = jnp.array([[1.0, 3.0, -4.0, -2.0]])
        moved = ThreatModel("l1", 0.6).linear_maximizer(inputs, gradients)
        np.testing.assert_allclose(moved, [[0.5, 1.0, 0.0, 0.1]], atol=1e-6)

    @pytest.mark.parametrize("epsilon", [0.5, 12.0])
    def test_l1_spends_the_whole_radius_on_images(self, epsilon):
        inputs, points = problem(2, (2, 32, 32, 3))
        moved = np.asarray(maximize(ThreatModel("l1", epsilon), inputs, points - inputs))
        np.testing.assert_allclose(sizes(moved - inputs, "l1"), epsilon, rtol=1e-5)

    @pytest.mark.parametrize("norm", NORMS)
    def test_infinite_bounds_mean_no_box(self, norm):
        threat = ThreatModel(norm, 0.5, (-np.inf, np.inf))
        inputs, points = problem(0)
        moved = np.asarray(maximize(threat, inputs, points - inputs))
        np.testing.assert_allclose(sizes(moved - inputs, norm), 0.5, rtol=1e-5)

    @pytest.mark.parametrize("norm", NORMS)
    def test_zero_gradients_stay_put(self, norm):
        inputs, points = problem(0)
        gradients = points - inputs
        gradients[0] = 0
        gradients[1, 2] = 0
        moved = maximize(ThreatModel(norm, 0.3), inputs, gradients)
        np.testing.assert_array_equal(moved[0], inputs[0])
        assert moved[1, 2] == inputs[1, 2]


class TestSteepestStep:
    @pytest.mark.parametrize("norm", NORMS)
    @given(seed=seeds)
    @fast
    def test_unit_norm_and_largest_inner_product_inside_the_box(self, norm, seed):
        inputs = np.full((3, 8), 0.5, np.float32)
        gradients = np.random.default_rng(seed).normal(size=(3, 8)).astype(np.float32)
        step = np.asarray(steepest(ThreatModel(norm), inputs, gradients, 0.99))
        np.testing.assert_allclose(sizes(step, norm), 1, rtol=1e-6)
        # Among unit vectors the inner product is at most the dual norm, by Hoelder.
        np.testing.assert_allclose(
            norms.dot(gradients, step), sizes(gradients, norms.dual(norm)), rtol=1e-5
        )

    @pytest.mark.parametrize("norm", NORMS)
    @pytest.mark.parametrize("factor", [1e-30, 1e-10, 1e25])
    def test_direction_does_not_depend_on_the_size_of_the_gradient(self, norm, factor):
        inputs = jnp.full((2, 5), 0.5)
        gradients = jnp.array([[1.0, -2, 3, 0.5, 0.25], [0.5, 0, 0, -1, 0.25]])
        threat = ThreatModel(norm)
        expected = steepest(threat, inputs, gradients, 0.99)
        scaled = steepest(threat, inputs, factor * gradients, 0.99)
        np.testing.assert_allclose(scaled, expected, rtol=1e-5)

    @pytest.mark.parametrize("norm", NORMS)
    def test_zero_gradient_gives_zero_step(self, norm):
        inputs = jnp.array([[0.0, 0.5, 1.0], [0.5, 0.5, 0.5]])
        gradients = jnp.array([[0.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
        step = ThreatModel(norm).steepest_step(inputs, gradients)
        np.testing.assert_array_equal(step[0], np.zeros(3))
        np.testing.assert_allclose(step[1], [0, 1, 0], rtol=1e-6)

    def test_slide_skips_coordinates_that_would_leave_the_box(self):
        inputs = jnp.array([[1.0, 0.0, 0.5, 1.0], [1.0, 0.0, 1.0, 0.0]])
        gradients = jnp.array([[9.0, -8.0, 2.0, -3.0], [1.0, -1.0, 2.0, -2.0]])
        step = steepest(ThreatModel("l1"), inputs, gradients, 0.99)
        np.testing.assert_array_equal(step[0], [0, 0, 0, -1])
        np.testing.assert_array_equal(step[1], np.zeros(4))  # all are blocked

    def test_slide_skips_by_the_bounds_of_the_threat_model(self):
        inputs = jnp.array([[1.0, 2.0]])
        step = ThreatModel("l1", bounds=(-1.0, 2.0)).steepest_step(inputs, jnp.array([[1.0, 5.0]]))
        np.testing.assert_array_equal(step, [[1, 0]])

    @pytest.mark.parametrize(
        ("sparsity", "num_moved"), [(0.99, 1), (0.9, 10), (0.5, 50), (0.0, 100), (0.999, 1)]
    )
    def test_slide_moves_the_share_of_largest_coordinates(self, sparsity, num_moved):
        gradients = np.random.default_rng(0).normal(size=(3, 5, 5, 4)).astype(np.float32)
        inputs = np.full_like(gradients, 0.5)
        step = steepest(ThreatModel("l1"), inputs, gradients, sparsity)
        for gradient, moved in zip(gradients.reshape(3, -1), norms.flatten(step), strict=True):
            largest = np.argsort(-np.abs(gradient))[:num_moved]
            expected = np.zeros(100)
            expected[largest] = np.sign(gradient[largest]) / num_moved
            np.testing.assert_allclose(moved, expected, rtol=1e-6)

    def test_slide_never_moves_zero_coordinates_to_fill_the_share(self):
        gradients = jnp.array([[0.0, 0.0, 3.0, -1.0]])
        step = ThreatModel("l1").steepest_step(jnp.full((1, 4), 0.5), gradients, sparsity=0.0)
        np.testing.assert_allclose(step, [[0, 0, 0.5, -0.5]])


class TestRandomStart:
    def draw(self, norm, key):
        """4000 perturbations far from the faces of the box."""
        inputs = np.full((4000, 3), 0.5, np.float32)
        keys = jax.random.split(key, 4000)
        return np.asarray(start(ThreatModel(norm, 0.2), keys, inputs)) - inputs

    @pytest.mark.parametrize("bounds", [UNIT, WIDE])
    @pytest.mark.parametrize("norm", NORMS)
    def test_starts_are_allowed(self, norm, bounds, key):
        inputs, _ = problem(0, (4000, 3), bounds)
        keys = jax.random.split(key, 4000)
        for epsilon in (0.0, 0.03, 1.0, 50.0):
            threat = ThreatModel(norm, epsilon, bounds)
            starts = start(threat, keys, inputs)
            assert_allowed(threat, inputs, starts)
            assert epsilon > 0 or np.array_equal(starts, inputs)

    @pytest.mark.parametrize("norm", NORMS)
    def test_a_start_depends_on_its_own_key_alone(self, norm, key):
        threat = ThreatModel(norm, 0.1)
        inputs = np.full((4000, 3), 0.5, np.float32)
        keys = jax.random.split(key, 4001)
        first = np.asarray(start(threat, keys[:-1], inputs))
        shifted = np.asarray(start(threat, keys[1:], inputs))
        np.testing.assert_array_equal(first[1:], shifted[:-1])
        assert len(np.unique(first[:, 0])) > 3990  # different keys, different starts

    def test_linf_starts_are_uniform_in_the_cube(self, key):
        drawn = self.draw("linf", key)[:, :2] / 0.2
        limits = (-1 - 1e-5, 1 + 1e-5)
        counts, _, _ = np.histogram2d(*drawn.T, bins=4, range=[limits, limits])
        # 16 cells, corners included, of 250 each: the deviation is 15.
        assert counts.sum() == 4000
        assert np.abs(counts - 250).max() < 5 * 15.3

    @pytest.mark.parametrize("norm", ["l2", "l1"])
    def test_radii_are_uniform_and_directions_symmetric(self, norm, key):
        drawn = self.draw(norm, key)
        radii = sizes(drawn, norm) / 0.2
        counts, _ = np.histogram(radii, bins=10, range=(0, 1 + 1e-5))
        assert counts.sum() == 4000
        assert np.abs(counts - 400).max() < 5 * np.sqrt(400)
        directions = drawn / sizes(drawn, norm)[:, None]
        assert np.abs(directions.mean(axis=0)).max() < 5 / np.sqrt(4000)
        assert np.abs((directions > 0).mean(axis=0) - 0.5).max() < 5 * 0.5 / np.sqrt(4000)
        spread = directions.std(axis=0)
        np.testing.assert_allclose(spread, spread.mean(), rtol=0.1)

    def test_l2_directions_are_isotropic(self, key):
        drawn = self.draw("l2", key)
        directions = drawn / sizes(drawn, "l2")[:, None]
        # On the sphere of R^3 each coordinate is uniform in [-1, 1], along any axis.
        for axis in (np.eye(3)[0], np.ones(3) / np.sqrt(3)):
            counts, _ = np.histogram(directions @ axis, bins=8, range=(-1 - 1e-5, 1 + 1e-5))
            assert np.abs(counts - 500).max() < 5 * np.sqrt(500)

    def test_l1_directions_are_laplace(self, key):
        drawn = self.draw("l1", key)
        share = np.abs(drawn[:, 0]) / sizes(drawn, "l1")
        # |d_1| / |d|_1 is Beta(1, 2), of distribution function 1 - (1 - t)^2.
        counts, _ = np.histogram(1 - (1 - share) ** 2, bins=8, range=(-1e-5, 1 + 1e-5))
        assert np.abs(counts - 500).max() < 5 * np.sqrt(500)


@jax.jit
def everything(threat, inputs, points):
    return {
        "project": threat.project(inputs, points),
        "linear_maximizer": threat.linear_maximizer(inputs, points - inputs),
        "steepest_step": threat.steepest_step(inputs, points - inputs),
        "distance": threat.distance(inputs, points),
    }


@pytest.mark.parametrize("norm", NORMS)
def test_examples_do_not_interact(norm):
    threat = ThreatModel(norm, 0.4)
    inputs, points = problem(0)
    order = np.array([3, 1, 0, 2])
    whole = everything(threat, inputs, points)
    permuted = everything(threat, inputs[order], points[order])
    alone = everything(threat, inputs[2:3], points[2:3])
    for name, values in whole.items():
        np.testing.assert_array_equal(permuted[name], values[order], err_msg=name)
        np.testing.assert_allclose(alone[name], values[2:3], rtol=1e-6, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("norm", NORMS)
def test_epsilon_zero_allows_the_clean_input_alone(norm):
    inputs, points = problem(0)
    results = everything(ThreatModel(norm, 0.0), inputs, points)
    for name in ("project", "linear_maximizer"):
        np.testing.assert_array_equal(results[name], inputs, err_msg=name)


@pytest.mark.parametrize("norm", NORMS)
def test_a_traced_epsilon_gives_what_a_number_gives(norm):
    inputs, points = problem(0)
    threat = ThreatModel(norm, 0.3)
    traced = everything(threat, inputs, points)
    static = {
        "project": threat.project(inputs, points),
        "linear_maximizer": threat.linear_maximizer(inputs, points - inputs),
    }
    for name, values in static.items():
        np.testing.assert_allclose(traced[name], values, atol=1e-6, err_msg=name)


def test_a_threat_model_is_a_pytree_of_its_epsilon():
    inputs, points = problem(0)
    threats = ThreatModel("linf", jnp.array([0.1, 0.3]))
    batch = jax.vmap(project, in_axes=(0, None, None))(threats, inputs, points)
    for epsilon, projected in zip((0.1, 0.3), batch, strict=True):
        expected = project(ThreatModel("linf", epsilon), inputs, points)
        np.testing.assert_allclose(projected, expected, atol=1e-7)
    assert jax.tree.leaves(ThreatModel(epsilon=0.25)) == [0.25]


@pytest.mark.parametrize("norm", NORMS)
def test_distance_is_the_norm_of_the_difference(norm):
    inputs, points = problem(0, (3, 2, 2, 3))
    threat = ThreatModel(norm)
    np.testing.assert_allclose(
        threat.distance(inputs, points), sizes(points - inputs, norm), rtol=1e-5
    )
    assert threat.dual_norm == norms.dual(norm)


def test_defaults_are_those_of_cifar10():
    assert ThreatModel() == ThreatModel("linf", 8 / 255, (0.0, 1.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "l3"}, r"norm='l3' is not one of \['l1', 'l2', 'linf'\]"),
        ({"norm": "Linf"}, r"norm='Linf' .* Did you mean 'linf'"),
        ({"epsilon": -0.1}, r"epsilon=-0\.1 must be a finite number >= 0"),
        ({"epsilon": float("inf")}, "epsilon=inf must be a finite number"),
        ({"epsilon": float("nan")}, "epsilon=nan must be a finite number"),
        ({"bounds": (1.0, 0.0)}, r"bounds=\(1\.0, 0\.0\) must be a pair"),
        ({"bounds": (0.5, 0.5)}, r"bounds=\(0\.5, 0\.5\) must be a pair"),
        ({"bounds": (0.0, float("nan"))}, r"bounds=\(0\.0, nan\) must be a pair"),
        ({"bounds": (0.0, 1.0, 2.0)}, r"bounds=\(0\.0, 1\.0, 2\.0\) must be a pair"),
    ],
)
def test_bad_arguments_are_named_with_their_value(options, message):
    with pytest.raises(ValueError, match=message):
        ThreatModel(**options)
