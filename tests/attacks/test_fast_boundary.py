"""Tests of FAB: values of the official code, projections against an optimiser, invariants."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from scipy import optimize

from gfa_jax import ThreatModel, losses
from gfa_jax.attacks.fast_boundary import _to_hyperplane, fab, fab_targeted
from tests.attacks import minimum_norm, toy
from tests.attacks.running import NORMS, assert_judged, assert_same, rows, run, sizes

WRONG = minimum_norm.WRONG

project = jax.jit(
    lambda norm, *data: _to_hyperplane(ThreatModel(norm), *data), static_argnames="norm"
)


class TestHyperplane:
    @pytest.mark.parametrize(
        ("norm", "near", "far"),
        [
            ("linf", [0.088889, -0.088889, 0.088889, -0.088889], [0.222222, -0.222222] * 2),
            ("l2", [0.064, -0.128, 0.032, -0.064], [0.16, -0.32, 0.08, -0.16]),
            ("l1", [0, -0.2, 0, 0], [0, -0.5, 0, 0]),
        ],
    )
    def test_golden_values(self, norm, near, far):
        points = np.array([[0, 1, 0.5, 0.25]] * 4, np.float32)
        slopes = np.array([[1, -2, 0.5, -1]] * 4, np.float32)
        # <slope, point> = -2 is to become -1.6, -1, 9 (which the box does not allow), and -2.
        moves = project(norm, points, slopes, np.float32([-0.4, -1, -11, 0]))
        np.testing.assert_allclose(moves[0], near, atol=1e-6)
        np.testing.assert_allclose(moves[1], far, atol=1e-6)
        np.testing.assert_allclose(moves[2], [1, -1, 0.5, -0.25], atol=1e-6)
        np.testing.assert_array_equal(moves[3], np.zeros(4))

    @pytest.mark.parametrize("norm", NORMS)
    def test_no_feasible_move_is_shorter(self, norm):
        rng = np.random.default_rng(0)
        points = rng.choice([0, 0.2, 0.7, 1.0], (20, 5)).astype(np.float32)
        slopes = rng.normal(size=(20, 5)).astype(np.float32)
        slopes[::4, 1] = 0
        slopes[1::4, 2] = slopes[1::4, 3]  # ties, for l_1
        differences = rng.normal(size=20).astype(np.float32) * 0.6
        moves = np.asarray(project(norm, points, slopes, differences), np.float64)
        num_feasible = 0
        for point, slope, difference, move in zip(points, slopes, differences, moves, strict=True):
            assert np.all(point + move >= 0)
            assert np.all(point + move <= 1)
            best = shortest(norm, point, slope, difference)
            if best is None:  # as far as the box allows
                room = np.where(np.sign(slope) == np.sign(difference), point, 1 - point)
                np.testing.assert_allclose(np.abs(move), room * (slope != 0), atol=1e-6)
                continue
            num_feasible += 1
            np.testing.assert_allclose(slope @ move, -difference, atol=1e-5)
            assert sizes(move[None], norm)[0] <= best * (1 + 1e-4) + 1e-6
        assert 8 <= num_feasible < 20

    def test_zero_slopes_do_not_move(self):
        for norm in NORMS:
            moves = project(norm, np.ones((1, 3)) / 2, np.zeros((1, 3)), np.ones(1))
            np.testing.assert_array_equal(moves, np.zeros((1, 3)))


def shortest(norm, point, slope, difference):
    """The size of the shortest move in the box, by scipy; ``None`` where there is none."""
    size = len(point)
    bounds = [(-value, 1 - value) for value in point]
    if norm == "l2":
        ends = np.stack([-slope * point, slope * (1 - point)])
        if not ends.min(axis=0).sum() < -difference < ends.max(axis=0).sum():
            return None
        constraint = {"type": "eq", "fun": lambda move: slope @ move + difference}
        found = optimize.minimize(
            lambda move: move @ move,
            np.zeros(size),
            jac=lambda move: 2 * move,
            bounds=bounds,
            constraints=constraint,
            options={"ftol": 1e-14, "maxiter": 500},
        )
        return np.sqrt(found.fun)
    # min s or sum(s) with -s <= move <= s.
    identity = np.eye(size)
    bound = np.ones((size, 1)) if norm == "linf" else identity
    cost = np.concatenate([np.zeros(size), np.ones(bound.shape[1])])
    limits = np.block([[identity, -bound], [-identity, -bound]])
    equal = np.concatenate([slope, np.zeros(bound.shape[1])])[None]
    found = optimize.linprog(
        cost,
        A_ub=limits,
        b_ub=np.zeros(2 * size),
        A_eq=equal,
        b_eq=[-difference],
        bounds=bounds + [(0, None)] * bound.shape[1],
    )
    return found.fun if found.success else None


class TestGoldenValues:
    """The official code on the golden model: 30 steps from the clean input."""

    @pytest.mark.parametrize("norm", NORMS)
    def test_any_class(self, norm):
        result = run(fab, norm, 9.0, num_steps=30, keys=None)
        np.testing.assert_allclose(result.distance, toy.REACHABLE[norm], atol=5e-6)
        assert np.all(result.success)

    @pytest.mark.parametrize("norm", NORMS)
    def test_towards_the_second_class(self, norm):
        expected = toy.REACHABLE[norm].copy()
        if norm == "linf":
            expected[5] = 0.018284
        if norm == "l2":
            expected[4:] = 0.444895, 0.099069
        result = run(fab_targeted, norm, 9.0, num_steps=30, num_targets=1, keys=None)
        np.testing.assert_allclose(result.distance, expected, atol=5e-6)


class TestLinearModels:
    @pytest.mark.parametrize(("batch", "shape", "num_classes"), minimum_norm.Linear.CASES)
    @pytest.mark.parametrize("norm", NORMS)
    @pytest.mark.parametrize("factory", [fab, fab_targeted])
    def test_reaches_the_smallest_radius(self, factory, norm, batch, shape, num_classes):
        linear = minimum_norm.Linear(batch, shape, num_classes)
        options = {} if factory is fab else {"stop": "never"}
        result = run(
            factory,
            norm,
            9.0,
            keys=None,
            num_steps=30,
            logits_fn=linear.logits_fn,
            inputs=linear.inputs,
            labels=linear.labels,
            **options,
        )
        radii = linear.radii(norm).min(axis=1)
        assert np.all(result.success)
        assert np.all(result.distance >= radii * (1 - 1e-5) - 1e-7)
        np.testing.assert_allclose(result.distance, radii, rtol=0.01)


class TestInvariants:
    CASE = pytest.mark.parametrize(
        ("factory", "options"),
        [
            (fab, {"num_steps": 8, "num_restarts": 2, "stop": "never"}),
            (fab_targeted, {"num_steps": 8, "num_targets": 3}),
        ],
    )

    @CASE
    @pytest.mark.parametrize("norm", NORMS)
    def test_result_is_consistent_at_any_distance(self, norm, factory, options):
        result = run(factory, norm, 1e-3, labels=WRONG, **options)
        assert_judged(result, toy.logits_fn, WRONG)
        assert np.all(result.success)
        measured = sizes(result.adv_inputs.astype(np.float64) - toy.INPUTS, norm)
        np.testing.assert_allclose(result.distance, measured, rtol=1e-5, atol=1e-7)
        assert result.adv_inputs.min() >= 0
        assert result.adv_inputs.max() <= 1
        assert np.all(result.distance[[0, 2, 3, 4, 5]] > 1e-3)
        # What is misclassified already is skipped.
        np.testing.assert_array_equal(result.adv_inputs[1], toy.INPUTS[1])
        assert (result.num_forwards[1], result.num_backwards[1]) == (1, 0)
        margin = losses.margin(toy.logits_fn(result.adv_inputs), WRONG)
        np.testing.assert_allclose(result.loss, margin, atol=1e-5)

    @CASE
    def test_permuting_splitting_and_padding_change_nothing(self, factory, options):
        for norm in NORMS:
            whole = run(factory, norm, 0.03, **options)
            for chosen in (np.array([4, 2, 0, 5, 1, 3]), np.array([3, 4, 5, 3, 3, 3])):
                data = {"inputs": toy.INPUTS[chosen], "labels": toy.LABELS[chosen]}
                part = run(factory, norm, 0.03, keys=toy.KEYS[chosen], **data, **options)
                assert_same(part, rows(whole, chosen), 1e-4, 1e-5)

    def test_sharded_over_devices_equals_one_device_and_moves_no_examples(self):
        chosen = np.array([0, 1, 2, 3, 4, 5, 0, 1])
        mesh = Mesh(np.array(jax.devices()), ("batch",))
        batch = jax.device_put(
            (toy.INPUTS[chosen], toy.LABELS[chosen]), NamedSharding(mesh, PartitionSpec("batch"))
        )
        for norm in ("linf", "l1"):
            attack = functools.partial(fab(ThreatModel(norm, 9.0), num_steps=8), toy.logits_fn)
            compiled = jax.jit(functools.partial(attack, None)).lower(*batch).compile()
            # The search for a level asks all devices whether it has ended.
            ended = {"l1": ("all-reduce",)}.get(norm, ())
            for collective in ("all-gather", "all-to-all", "collective-permute", *ended):
                assert collective not in compiled.as_text()
            result = rows(jax.device_get(compiled(*batch)), slice(0, 6))
            assert_same(result, run(fab, norm, 9.0, num_steps=8, keys=None), 1e-4, 1e-5)

    def test_counts_are_those_of_the_docstring(self):
        result = run(fab, "l2", 0.01, num_steps=8, num_restarts=2)
        np.testing.assert_array_equal(result.num_forwards, np.full(6, 1 + 2 * 2 * 8))
        np.testing.assert_array_equal(result.num_backwards, np.full(6, 2 * 4 * 8))

    def test_chunks_of_gradients_change_nothing(self):
        whole = run(fab, "l2", 0.01, num_steps=8, keys=None)
        assert_same(
            run(fab, "l2", 0.01, num_steps=8, num_gradients=3, keys=None), whole, 1e-4, 1e-5
        )

    def test_later_runs_skip_what_is_broken_within_epsilon_and_never_lengthen(self):
        options = {"num_steps": 8, "num_restarts": 2}
        epsilon = 0.2  # breaks examples 1, 3 and 5
        once = run(fab, "l2", epsilon, num_steps=8, keys=None)
        stopping, going_on = (
            run(fab, "l2", epsilon, stop=stop, **options) for stop in ("epsilon", "never")
        )
        skipped = once.distance <= epsilon
        np.testing.assert_array_equal(skipped, [0, 1, 0, 1, 0, 1])
        np.testing.assert_array_equal(stopping.num_backwards, np.where(skipped, 32, 64))
        np.testing.assert_array_equal(going_on.num_backwards, np.full(6, 64))
        for result in (stopping, going_on):
            assert np.all(result.distance <= once.distance * (1 + 1e-6))

    def test_restarts_begin_at_half_epsilon(self):
        visited = []

        def logits_fn(points):
            jax.debug.callback(lambda points: visited.append(points), points)
            return toy.logits_fn(points)

        inputs = np.full_like(toy.INPUTS, 0.5)
        labels = np.argmax(np.asarray(toy.logits_fn(inputs)), axis=1).astype(np.int32)
        options = {"num_steps": 1, "num_restarts": 2, "stop": "never"}
        data = {"inputs": inputs, "labels": labels, "logits_fn": logits_fn}
        run(fab, "l2", 0.3, **data, **options)
        jax.effects_barrier()
        # The judgement, then two passes for each of two runs of one step.
        np.testing.assert_allclose(sizes(visited[1] - inputs, "l2"), 0, atol=1e-6)
        np.testing.assert_allclose(sizes(visited[3] - inputs, "l2"), 0.15, rtol=1e-4)

    @pytest.mark.parametrize("norm", NORMS)
    def test_a_constant_model_gives_zero_gradients_and_no_nan(self, norm):
        result = run(fab, norm, 0.1, scale=0.0, num_steps=8, keys=None)
        np.testing.assert_array_equal(result.success, toy.LABELS != 0)
        np.testing.assert_array_equal(result.adv_inputs, toy.INPUTS)
        np.testing.assert_array_equal(result.num_zero_gradients, np.where(toy.LABELS == 0, 8, 0))

    @pytest.mark.parametrize("num_classes", [2, 3])
    @pytest.mark.parametrize("factory", [fab, fab_targeted])
    def test_few_classes(self, factory, num_classes):
        def logits_fn(points):
            return toy.logits_fn(points)[:, :num_classes]

        labels = np.argmax(np.asarray(logits_fn(toy.INPUTS)), axis=1).astype(np.int32)
        result = run(
            factory, "l2", 9.0, logits_fn=logits_fn, labels=labels, num_steps=12, keys=None
        )
        assert_judged(result, logits_fn, labels)
        assert np.sum(result.success) >= 4

    def test_a_targeted_attack_succeeds_at_its_targets_alone(self):
        targets = minimum_norm.TARGETS
        result = run(fab, "l2", 9.0, num_steps=30, keys=None, extra={"targets": targets})
        predicted = np.argmax(np.asarray(toy.logits_fn(result.adv_inputs)), axis=1)
        np.testing.assert_array_equal(result.success, predicted == targets)
        assert np.sum(result.success) >= 5
        assert result.distance[2] == 0
        # No class is nearer than the nearest, up to what FAB falls short of.
        moved = result.distance > 0
        assert np.all(result.distance[moved] >= 0.95 * toy.REACHABLE["l2"][moved])


@pytest.mark.parametrize(
    ("factory", "options", "message"),
    [
        (fab, {"num_steps": 0}, "num_steps=0 must be an integer >= 1"),
        (fab, {"alpha_max": 2}, r"alpha_max=2 must be a number in \[0, 1\]"),
        (fab, {"beta": -0.1}, r"beta=-0.1 must be a number in \[0, 1\]"),
        (fab, {"eta": 0}, "eta=0 must be a finite number > 0"),
        (fab, {"stop": "success"}, "stop='success' is not one of"),
        (fab, {"num_gradients": 0}, "num_gradients=0 must be an integer >= 1"),
        (fab_targeted, {"num_targets": 0}, "num_targets=0 must be an integer >= 1"),
    ],
)
def test_bad_options_are_named(factory, options, message):
    with pytest.raises(ValueError, match=message):
        factory(ThreatModel(), **options)
