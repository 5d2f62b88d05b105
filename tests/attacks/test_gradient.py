"""Tests of FGSM and PGD: closed forms on linear models, a golden nonlinear model, and invariants.

Attacks are built inside jitted helpers with epsilon and the scale of the logits as arguments, so
that one compilation serves many radii, and saturated and constant models besides the plain one.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gfa_jax import ThreatModel, attacks, losses
from gfa_jax.attacks import estimators
from tests.attacks import toy

NORMS = ("linf", "l2", "l1")
ORDERS = {"linf": np.inf, "l2": 2, "l1": 1}
DUAL_ORDERS = {"linf": 1, "l2": 2, "l1": np.inf}


# A radius at which examples 3 and 5 alone can be fooled.
MIDDLE = {"linf": 0.025, "l2": 0.14, "l1": 0.43}


@functools.partial(jax.jit, static_argnames=("name", "norm", "logits_fn", "options"))
def _run(name, norm, logits_fn, options, epsilon, scale, keys, inputs, labels):
    attack = attacks.create(name, ThreatModel(norm, epsilon), **dict(options))
    return attack(lambda points: scale * logits_fn(points), keys, inputs, labels)


def run(
    name,
    norm,
    epsilon,
    *,
    logits_fn=toy.logits_fn,
    scale=1.0,
    keys=toy.KEYS,
    inputs=toy.INPUTS,
    labels=toy.LABELS,
    **options,
):
    options = tuple(sorted(options.items()))
    return _run(name, norm, logits_fn, options, epsilon, scale, keys, inputs, labels)


def sizes(perturbations, norm):
    flat = np.asarray(perturbations, np.float64).reshape(len(perturbations), -1)
    return np.linalg.norm(flat, ord=ORDERS[norm], axis=1)


def assert_same(left, right, atol=1e-5):
    for name in set(left._fields) - {"members"}:
        one, other = getattr(left, name), getattr(right, name)
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=atol, err_msg=name)


def assert_at_least_as_strong(strong, weak):
    """Misclassified points first, then the larger loss, example by example."""
    assert np.all(strong.success >= weak.success)
    same = np.asarray(strong.success == weak.success)
    assert np.all(np.asarray(strong.loss)[same] >= np.asarray(weak.loss)[same])


class TestLinearModels:
    """The minimal perturbation to class k is ``(z_y - z_k) / |a_k - a_y|`` in the dual norm."""

    @staticmethod
    def problem(batch, shape, num_classes, seed):
        """Weights, interior inputs of small margins, labels and the radius to each other class."""
        rng = np.random.default_rng(seed)
        weights = rng.normal(size=(12, num_classes)).astype(np.float32)
        inputs = rng.uniform(0.45, 0.55, (batch, *shape)).astype(np.float32)
        # All logits are 0 at the centre of the box: the margins are small.
        biases = -weights.sum(axis=0) / 2
        logits = inputs.reshape(batch, 12) @ weights + biases
        return weights, biases, inputs, np.argmax(logits, axis=1).astype(np.int32)

    @staticmethod
    def radii(weights, biases, inputs, labels, norm):
        weights = weights.astype(np.float64)
        logits = inputs.reshape(len(inputs), -1).astype(np.float64) @ weights + biases
        lead = logits[np.arange(len(labels)), labels][:, None] - logits
        slopes = weights.T[None] - weights.T[labels][:, None]
        lengths = np.linalg.norm(slopes, ord=DUAL_ORDERS[norm], axis=2)
        lengths[np.arange(len(labels)), labels] = 1
        lead[np.arange(len(labels)), labels] = np.inf
        return lead / lengths

    @staticmethod
    @functools.partial(jax.jit, static_argnames=("name", "norm", "options"))
    def attack(name, norm, options, epsilon, weights, biases, others, keys, inputs, labels):
        """Attacks the linear model; ``others`` are the classes to move to, ``None`` for any."""

        def logits_fn(points):
            return points.reshape(len(points), -1) @ weights + biases[None]

        def towards_other(logits, labels):
            return losses.class_difference(logits, labels, others)

        loss = {"loss": towards_other} if others is not None else {}
        attack = attacks.create(name, ThreatModel(norm, epsilon), **dict(options), **loss)
        result = attack(logits_fn, keys, inputs, labels)
        return result.success, result.distance

    @pytest.mark.parametrize(
        ("batch", "shape", "num_classes"), [(1, (12,), 2), (3, (2, 2, 3), 4), (8, (12,), 3)]
    )
    @pytest.mark.parametrize("norm", NORMS)
    @pytest.mark.parametrize(
        ("name", "options"), [("fgsm", ()), ("pgd", (("num_steps", 30), ("random_start", False)))]
    )
    def test_succeeds_just_above_the_minimal_radius_and_fails_just_below(
        self, name, options, norm, batch, shape, num_classes
    ):
        weights, biases, inputs, labels = self.problem(batch, shape, num_classes, seed=batch)
        radii = self.radii(weights, biases, inputs, labels, norm)
        nearest = np.argmin(radii, axis=1)
        data = (weights, biases, nearest, None, inputs, labels)
        for example, radius in enumerate(radii.min(axis=1)):
            assert radius < 0.35  # the box does not matter
            for factor, expected in ((0.998, False), (1.002, True)):
                success, distance = self.attack(name, norm, options, radius * factor, *data)
                assert success[example] == expected
                assert distance[example] <= radius * factor * (1 + 1e-5) + 1e-6

    @pytest.mark.parametrize("norm", NORMS)
    def test_pgd_reaches_the_minimal_radius_from_random_starts(self, norm):
        weights, biases, inputs, labels = self.problem(3, (12,), 4, seed=1)
        radii = self.radii(weights, biases, inputs, labels, norm)
        data = (weights, biases, np.argmin(radii, axis=1), toy.KEYS[:3], inputs, labels)
        options = (("num_steps", 60),)
        for example, radius in enumerate(radii.min(axis=1)):
            for factor, expected in ((0.998, False), (1.02, True)):
                success, _ = self.attack("pgd", norm, options, radius * factor, *data)
                assert success[example] == expected

    @pytest.mark.parametrize("name", ["pgd", "pgd-margin", "pgd-dlr"])
    def test_no_loss_beats_the_minimal_radius_and_all_succeed_well_above(self, name):
        weights, biases, inputs, labels = self.problem(8, (12,), 4, seed=8)
        radii = self.radii(weights, biases, inputs, labels, "linf")
        data = (weights, biases, None, None, inputs, labels)
        options = (("num_steps", 20), ("random_start", False))
        for example, row in enumerate(radii):
            farthest = row[np.isfinite(row)].max()
            for epsilon, expected in ((0.998 * row.min(), False), (1.1 * farthest, True)):
                success, _ = self.attack(name, "linf", options, epsilon, *data)
                assert success[example] == expected

    @pytest.mark.parametrize("norm", ["linf", "l1"])
    def test_pgd_finds_the_best_point_of_ball_and_box_from_corners(self, norm):
        # FGSM is exact for a linear loss with the box (it solves the linear program).
        rng = np.random.default_rng(0)
        weights = rng.normal(size=(12, 2)).astype(np.float32)
        inputs = rng.choice([0.0, 0.05, 0.5, 1.0], (6, 12)).astype(np.float32)
        labels = np.argmax(inputs @ weights, axis=1).astype(np.int32)

        def logits_fn(points):
            return points @ weights

        for epsilon in {"linf": (0.1, 0.7), "l1": (0.3, 2.0)}[norm]:
            options = {"logits_fn": logits_fn, "inputs": inputs, "labels": labels}
            exact = run("fgsm", norm, epsilon, loss="margin", **options)
            found = run(*("pgd-margin", norm, epsilon), num_steps=60, random_start=False, **options)
            clean = losses.margin(logits_fn(inputs), labels)
            gain = (found.loss - clean) / (exact.loss - clean)
            np.testing.assert_allclose(gain, 1, atol=0.01)


class TestFgsm:
    def test_linf_is_one_sign_step_clipped_to_the_box(self):
        gradient = jax.grad(lambda x: jnp.sum(losses.cross_entropy(toy.logits_fn(x), toy.LABELS)))(
            toy.INPUTS
        )
        expected = np.clip(toy.INPUTS + 0.1 * np.sign(gradient), 0, 1)
        result = run("fgsm", "linf", 0.1, keys=None)
        np.testing.assert_allclose(result.adv_inputs, expected, atol=1e-7)

    @pytest.mark.parametrize("step_size", [None, 0.04])
    def test_random_start_form_steps_from_its_start_and_projects(self, step_size):
        epsilon = 0.05
        options = {} if step_size is None else {"step_size": step_size}
        result = run("fgsm", "linf", epsilon, random_start=True, **options)
        keys = estimators.fold_in(toy.KEYS, 0)
        start = np.asarray(ThreatModel("linf", epsilon).random_start(keys, toy.INPUTS))
        gradient = jax.grad(lambda x: jnp.sum(losses.cross_entropy(toy.logits_fn(x), toy.LABELS)))(
            start
        )
        step = (1.25 * epsilon if step_size is None else step_size) * np.sign(gradient)
        moved = np.clip(start + step - toy.INPUTS, -epsilon, epsilon)
        np.testing.assert_allclose(result.adv_inputs, np.clip(toy.INPUTS + moved, 0, 1), atol=1e-6)

    def test_pgd_of_one_step_is_fgsm(self):
        one_step = run("pgd", "linf", 0.05, num_steps=1, random_start=False, keep="last")
        np.testing.assert_allclose(
            one_step.adv_inputs, run("fgsm", "linf", 0.05).adv_inputs, atol=1e-7
        )


class TestGoldenModel:
    def test_the_model_is_the_one_of_the_golden_values(self):
        logits = toy.logits_fn(toy.INPUTS)
        np.testing.assert_array_equal(np.argmax(logits, axis=1), toy.LABELS)
        first = [3.744814, -3.742564, 0.716215, -1.177469, -2.042097]
        np.testing.assert_allclose(logits[0], first, atol=1e-5)
        losses_of_clean = [0.057602, 0.139508, 0.008407, 0.247462, 0.006095, 0.462117]
        np.testing.assert_allclose(
            losses.cross_entropy(logits, toy.LABELS), losses_of_clean, atol=1e-5
        )

    @pytest.mark.parametrize(
        ("norm", "epsilon", "apgd_loss"),
        [
            ("linf", 0.1, [4.234756, 4.099686, 1.940679, 3.970231, 1.689217, 5.05122]),
            ("l2", 0.5, [4.091962, 4.867232, 2.636981, 3.949804, 1.035832, 5.052242]),
            ("l1", 2.0, [0.309507, 3.505497, 6.182621, 4.122089, 0.013123, 0.9261]),
        ],
    )
    def test_pgd_with_many_steps_reaches_the_losses_of_official_apgd(
        self, norm, epsilon, apgd_loss
    ):
        # APGD ran 20 steps of cross-entropy from the clean input.
        result = run("pgd", norm, epsilon, num_steps=100, random_start=False)
        assert np.all(np.asarray(result.loss) >= np.array(apgd_loss) - 0.06)
        assert np.all(result.success)

    def test_losses_differ_where_official_apgd_finds_that_they_do(self):
        # In l_inf at 0.1, cross-entropy fools example 4 and DLR does not.
        result = run("pgd-dlr", "linf", 0.1, num_steps=20, random_start=False)
        np.testing.assert_array_equal(result.success, [1, 1, 1, 1, 0, 1])
        assert result.loss[4] == pytest.approx(-0.026619, abs=1e-3)

    @pytest.mark.parametrize("norm", NORMS)
    def test_pgd_succeeds_above_the_norms_that_official_fab_finds_and_not_below(self, norm):
        for example, radius in enumerate(toy.REACHABLE[norm]):
            for factor, expected in ((1.2, True), (0.75, False)):
                result = run("pgd", norm, factor * radius, num_steps=100, random_start=False)
                assert result.success[example] == expected


ATTACKS = {
    "fgsm": ("fgsm", {}),
    "fgsm_random": ("fgsm", {"random_start": True}),
    "pgd_best": ("pgd", {"num_steps": 8, "num_restarts": 2}),
    "pgd_last": ("pgd", {"num_steps": 8, "keep": "last"}),
}


class TestInvariants:
    # Example 1 gets a wrong label: its clean input is misclassified already.
    WRONG = np.array([0, 3, 0, 4, 0, 4], np.int32)

    @pytest.mark.parametrize("norm", NORMS)
    @pytest.mark.parametrize("case", ATTACKS)
    def test_result_is_consistent_with_the_model_and_the_threat(self, case, norm):
        name, options = ATTACKS[case]
        for epsilon in (MIDDLE[norm], 0.3 * MIDDLE[norm]):
            result = run(name, norm, epsilon, labels=self.WRONG, **options)
            adv_inputs = np.asarray(result.adv_inputs)
            perturbation = adv_inputs.astype(np.float64) - toy.INPUTS
            assert adv_inputs.min() >= 0
            assert adv_inputs.max() <= 1
            # Adding a perturbation to an input rounds each coordinate.
            slack = {"linf": 1, "l2": 7, "l1": 48}[norm] * 6e-8
            assert np.all(sizes(perturbation, norm) <= epsilon * (1 + 1e-6) + slack)
            np.testing.assert_allclose(
                result.distance, sizes(perturbation, norm), rtol=1e-5, atol=1e-7
            )
            logits = toy.logits_fn(adv_inputs)
            np.testing.assert_array_equal(result.success, np.argmax(logits, 1) != self.WRONG)
            if case != "pgd_best":
                fresh = losses.cross_entropy(logits, self.WRONG)
                np.testing.assert_allclose(result.loss, fresh, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("norm", NORMS)
    def test_best_returns_the_clean_input_for_failures_and_for_inputs_broken_already(self, norm):
        options = {"labels": self.WRONG, **ATTACKS["pgd_best"][1]}
        result = run("pgd", norm, MIDDLE[norm], **options)
        np.testing.assert_array_equal(result.success, [0, 1, 0, 1, 0, 1])
        for example in (0, 1, 2, 4):
            np.testing.assert_array_equal(result.adv_inputs[example], toy.INPUTS[example])
            assert result.distance[example] == 0
        for example in (3, 5):
            assert result.distance[example] > 0.5 * toy.REACHABLE[norm][example]
            fresh = losses.cross_entropy(toy.logits_fn(result.adv_inputs), self.WRONG)
            np.testing.assert_allclose(result.loss[example], fresh[example], rtol=1e-4)
        # Failures still report the largest loss that was seen.
        clean = np.asarray(losses.cross_entropy(toy.logits_fn(toy.INPUTS), self.WRONG))
        assert np.all(np.asarray(result.loss)[[0, 2, 3, 4, 5]] > clean[[0, 2, 3, 4, 5]])
        np.testing.assert_allclose(result.loss[1], clean[1], rtol=1e-6)

    @pytest.mark.parametrize(
        ("case", "num_forwards", "num_backwards"),
        [("fgsm", 2, 1), ("fgsm_random", 2, 1), ("pgd_best", 19, 16), ("pgd_last", 9, 8)],
    )
    def test_counts_are_those_of_the_docstrings(self, case, num_forwards, num_backwards):
        name, options = ATTACKS[case]
        result = run(name, "linf", MIDDLE["linf"], labels=self.WRONG, **options)
        forwards, backwards = np.full(6, num_forwards), np.full(6, num_backwards)
        if case == "pgd_best":  # the second input is misclassified, and left alone
            forwards[1], backwards[1] = 1, 0
        np.testing.assert_array_equal(result.num_forwards, forwards)
        np.testing.assert_array_equal(result.num_backwards, backwards)
        np.testing.assert_array_equal(result.num_zero_gradients, np.zeros(6))

    @pytest.mark.parametrize("case", ["fgsm", "pgd_best", "pgd_last"])
    def test_the_model_really_runs_as_often_as_counted(self, case):
        name, options = ATTACKS[case]
        calls = []

        def counted(inputs):
            jax.debug.callback(lambda: calls.append(1))
            return toy.logits_fn(inputs)

        result = run(name, "linf", MIDDLE["linf"], logits_fn=counted, **options)
        jax.effects_barrier()
        assert len(calls) == result.num_forwards[0]

    @pytest.mark.parametrize("norm", NORMS)
    def test_best_is_at_least_as_strong_as_last_with_the_same_keys(self, norm):
        for epsilon in (MIDDLE[norm], 2 * MIDDLE[norm]):
            last = run("pgd", norm, epsilon, num_steps=8, keep="last")
            assert_at_least_as_strong(run("pgd", norm, epsilon, num_steps=8), last)

    @pytest.mark.parametrize("norm", NORMS)
    def test_more_restarts_are_at_least_as_strong_with_the_same_keys(self, norm):
        for epsilon in (MIDDLE[norm], 2 * MIDDLE[norm]):
            one = run("pgd", norm, epsilon, num_steps=8)
            two = run("pgd", norm, epsilon, num_steps=8, num_restarts=2)
            assert_at_least_as_strong(two, one)
            assert np.any(np.asarray(two.loss) > np.asarray(one.loss))

    def test_more_steps_of_one_size_are_at_least_as_strong(self):
        options = {"step_size": 0.01, "random_start": False}
        few = run("pgd", "linf", 0.03, num_steps=4, **options)
        many = run("pgd", "linf", 0.03, num_steps=8, **options)
        assert_at_least_as_strong(many, few)

    @pytest.mark.parametrize("norm", NORMS)
    @pytest.mark.parametrize("case", ATTACKS)
    def test_epsilon_zero_returns_the_clean_input(self, case, norm):
        name, options = ATTACKS[case]
        result = run(name, norm, 0.0, labels=self.WRONG, **options)
        np.testing.assert_array_equal(result.adv_inputs, toy.INPUTS)
        np.testing.assert_array_equal(result.distance, np.zeros(6))
        np.testing.assert_array_equal(result.success, [0, 1, 0, 0, 0, 0])
        assert np.all(np.isfinite(result.loss))


class TestStarts:
    """Constant models, of scale 0, never move a point: they show where an attack starts."""

    @pytest.mark.parametrize("norm", NORMS)
    def test_without_random_start_the_walk_starts_at_the_clean_input(self, norm):
        options = {"num_steps": 3, "keep": "last", "random_start": False}
        result = run("pgd", norm, 0.1, scale=0.0, **options)
        np.testing.assert_array_equal(result.adv_inputs, toy.INPUTS)
        np.testing.assert_array_equal(result.num_zero_gradients, np.full(6, 3))

    @pytest.mark.parametrize("norm", NORMS)
    def test_with_random_start_it_starts_inside_the_ball_and_off_the_clean_input(self, norm):
        result = run("pgd", norm, 0.1, scale=0.0, **ATTACKS["pgd_last"][1])
        assert np.all(np.asarray(result.distance) > 0)
        assert np.all(np.asarray(result.distance) <= 0.1 * (1 + 1e-5))
        np.testing.assert_array_equal(result.num_zero_gradients, np.full(6, 8))

    @pytest.mark.parametrize("norm", NORMS)
    def test_fgsm_counts_a_zero_gradient_and_stays(self, norm):
        result = run("fgsm", norm, 0.1, scale=0.0)
        np.testing.assert_array_equal(result.adv_inputs, toy.INPUTS)
        np.testing.assert_array_equal(result.num_zero_gradients, np.ones(6))

    def test_best_and_last_start_at_the_same_point(self):
        def fooled_off_the_clean_input(inputs):
            moved = jnp.any(inputs != toy.INPUTS, axis=1, keepdims=True)
            fooled = jnp.roll(jax.nn.one_hot(toy.LABELS, 5), 1, axis=1)
            return jnp.where(moved, fooled, jax.nn.one_hot(toy.LABELS, 5))

        options = {"logits_fn": fooled_off_the_clean_input, "num_steps": 2}
        best = run("pgd", "linf", 0.1, **options)
        last = run("pgd", "linf", 0.1, keep="last", **options)
        assert np.all(best.success)
        np.testing.assert_allclose(best.adv_inputs, last.adv_inputs, atol=1e-7)

    def test_restarts_start_at_different_points(self):
        # The loss is the distance to a point outside: the largest of more starts is larger.
        def logits_fn(inputs):
            level = jax.lax.stop_gradient(jnp.mean(inputs, axis=1, keepdims=True))
            return jnp.concatenate([10 - level, jnp.zeros((len(inputs), 4))], axis=1)

        labels = np.zeros(6, np.int32)
        options = {"logits_fn": logits_fn, "labels": labels, "num_steps": 1}
        one = run("pgd", "linf", 0.3, num_restarts=1, **options)
        many = run("pgd", "linf", 0.3, num_restarts=20, **options)
        assert np.all(np.asarray(many.loss) >= np.asarray(one.loss))
        assert np.sum(np.asarray(many.loss) > np.asarray(one.loss)) >= 4


class TestMasking:
    def test_cross_entropy_fails_on_a_saturated_model_and_the_zero_gradients_tell(self):
        result = run("pgd", "linf", MIDDLE["linf"], scale=1000.0, **ATTACKS["pgd_best"][1])
        np.testing.assert_array_equal(result.success[:3], [0, 0, 0])
        assert np.all(np.asarray(result.num_zero_gradients)[:3] >= 12)  # of 16

    @pytest.mark.parametrize("name", ["pgd-margin", "pgd-dlr"])
    def test_margin_losses_fool_the_saturated_model_as_the_plain_one(self, name):
        plain = run(name, "linf", 0.06, num_steps=20, random_start=False)
        result = run(name, "linf", 0.06, scale=1000.0, num_steps=20, random_start=False)
        np.testing.assert_array_equal(plain.success, [1, 1, 0, 1, 0, 1])
        for field in ("success", "distance", "num_zero_gradients"):
            np.testing.assert_allclose(getattr(result, field), getattr(plain, field), rtol=1e-4)

    @pytest.mark.parametrize("norm", ["linf", "l2"])
    def test_a_gradient_that_is_not_finite_never_leaves_the_box(self, norm):
        def rooted(inputs):
            logits = toy.logits_fn(inputs)
            return logits - jnp.sum(jnp.sqrt(inputs), axis=1, keepdims=True) * jnp.arange(5.0)[None]

        inputs = np.where(np.arange(48) % 7 == 0, 0, toy.INPUTS).astype(np.float32)
        labels = np.zeros(6, np.int32)
        options = {"inputs": inputs, "labels": labels, "num_steps": 5, "random_start": False}
        result = run("pgd", norm, 0.1, logits_fn=rooted, keep="last", **options)
        assert np.all(np.isfinite(result.adv_inputs))
        assert np.all(np.asarray(result.distance) > 0)


class TestBatchAndCompilation:
    OPTIONS = ATTACKS["pgd_best"][1]

    def whole(self, norm):
        return run("pgd", norm, MIDDLE[norm], **self.OPTIONS)

    @pytest.mark.parametrize("norm", NORMS)
    def test_permuting_the_batch_permutes_the_result(self, norm):
        order = np.array([4, 2, 0, 5, 1, 3])
        permuted = run(
            *("pgd", norm, MIDDLE[norm]),
            **{"keys": toy.KEYS[order], "inputs": toy.INPUTS[order], "labels": toy.LABELS[order]},
            **self.OPTIONS,
        )
        assert_same(permuted, jax.tree.map(lambda field: field[order], self.whole(norm)))

    @pytest.mark.parametrize("norm", NORMS)
    def test_splitting_and_padding_the_batch_change_nothing(self, norm):
        # Two batches of four, the second padded with copies of other examples.
        chunks = [np.array([0, 1, 2, 3]), np.array([4, 5, 0, 0])]
        parts = [
            run(
                *("pgd", norm, MIDDLE[norm]),
                **{"keys": toy.KEYS[rows], "inputs": toy.INPUTS[rows], "labels": toy.LABELS[rows]},
                **self.OPTIONS,
            )
            for rows in chunks
        ]
        joined = jax.tree.map(lambda *fields: jnp.concatenate(fields)[:6], *parts)
        assert_same(joined, self.whole(norm))

    @pytest.mark.parametrize("norm", ["linf", "l1"])
    def test_sharded_over_devices_equals_one_device_without_communication(self, norm):
        rows = np.array([0, 1, 2, 3, 4, 5, 0, 1])
        attack = attacks.pgd(ThreatModel(norm, MIDDLE[norm]), **self.OPTIONS)
        mesh = Mesh(np.array(jax.devices()), ("batch",))
        assert mesh.size == 4
        batch = jax.device_put(
            (toy.KEYS[rows], toy.INPUTS[rows], toy.LABELS[rows]),
            NamedSharding(mesh, PartitionSpec("batch")),
        )
        compiled = jax.jit(attack, static_argnums=0).lower(toy.logits_fn, *batch).compile()
        result = compiled(*batch)
        assert len(result.adv_inputs.sharding.device_set) == 4
        assert not result.adv_inputs.sharding.is_fully_replicated
        for collective in ("all-reduce", "all-gather", "all-to-all", "collective-permute"):
            assert collective not in compiled.as_text()
        local = jax.device_get(result)
        assert_same(jax.tree.map(lambda field: field[:6], local), jax.device_get(self.whole(norm)))

    @pytest.mark.parametrize("norm", ["l1"])
    def test_vmap_over_batches_equals_one_batch(self, norm):
        attack = attacks.pgd(ThreatModel(norm, MIDDLE[norm]), **self.OPTIONS)
        stacked = jax.jit(jax.vmap(functools.partial(attack, toy.logits_fn)))(
            toy.KEYS.reshape(2, 3), toy.INPUTS.reshape(2, 3, -1), toy.LABELS.reshape(2, 3)
        )
        flat = jax.tree.map(lambda field: field.reshape(6, *field.shape[2:]), stacked)
        assert_same(flat, self.whole(norm))

    def test_unrolling_changes_nothing(self):
        options = {"num_steps": 4, "step_size": 0.01, "random_start": False}
        unrolled = run("pgd", "linf", 0.03, unroll=True, **options)
        assert_same(unrolled, run("pgd", "linf", 0.03, **options))

    def test_without_jit_the_result_is_the_same(self):
        compiled = run("pgd", "linf", 0.025, **ATTACKS["pgd_last"][1])
        attack = attacks.pgd(ThreatModel("linf", 0.025), **ATTACKS["pgd_last"][1])
        assert_same(attack(toy.logits_fn, toy.KEYS, toy.INPUTS, toy.LABELS), compiled)

    def test_a_traced_step_size_equals_a_number(self):
        @jax.jit
        def traced(step_size):
            attack = attacks.pgd(
                ThreatModel("linf", 0.03), num_steps=4, step_size=step_size, random_start=False
            )
            return attack(toy.logits_fn, None, toy.INPUTS, toy.LABELS)

        static = run("pgd", "linf", 0.03, num_steps=4, step_size=0.01, random_start=False)
        assert_same(traced(0.01), static)

    @pytest.mark.parametrize("case", ["fgsm", "pgd_best", "pgd_last"])
    def test_no_gradient_flows_through_any_field(self, case):
        name, options = ATTACKS[case]
        attack = attacks.create(name, ThreatModel("l2", 0.3), **options)

        def total(inputs, first):
            def logits_fn(points):
                return jnp.tanh(points @ first) @ toy.SECOND

            result = attack(logits_fn, toy.KEYS, inputs, toy.LABELS)
            return jnp.sum(result.adv_inputs**2) + jnp.sum(result.distance + result.loss)

        value, slopes = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(toy.INPUTS, toy.FIRST)
        assert np.isfinite(value)
        for slope in slopes:
            np.testing.assert_array_equal(slope, np.zeros_like(slope))


class TestOptions:
    @pytest.mark.parametrize(
        ("factory", "options", "message"),
        [
            (attacks.fgsm, {"loss": "nll"}, "loss='nll' is not one of"),
            (
                attacks.fgsm,
                {"step_size": 0.1},
                r"step_size=0\.1 needs random_start=True",
            ),
            (
                attacks.fgsm,
                {"step_size": 0.0, "random_start": True},
                r"step_size=0\.0 must be a finite number > 0",
            ),
            (attacks.pgd, {"loss": "nll"}, "loss='nll' is not one of"),
            (attacks.pgd, {"num_steps": 0}, "num_steps=0 must be an integer >= 1"),
            (attacks.pgd, {"num_steps": 2.5}, r"num_steps=2\.5 must be an integer >= 1"),
            (attacks.pgd, {"num_steps": True}, "num_steps=True must be an integer >= 1"),
            (attacks.pgd, {"num_restarts": -1}, "num_restarts=-1 must be an integer >= 1"),
            (attacks.pgd, {"step_size": -0.5}, r"step_size=-0\.5 must be a finite number > 0"),
            (
                attacks.pgd,
                {"step_size": float("nan")},
                "step_size=nan must be a finite number > 0",
            ),
            (attacks.pgd, {"keep": "first"}, r"keep='first' is not one of \['best', 'last'\]"),
            (
                attacks.pgd,
                {"num_restarts": 2, "random_start": False},
                "num_restarts=2 with random_start=False would repeat the same run",
            ),
            (
                attacks.pgd,
                {"num_restarts": 2, "keep": "last"},
                "num_restarts=2 needs keep='best'",
            ),
        ],
    )
    def test_bad_options_are_named_with_their_value(self, factory, options, message):
        with pytest.raises(ValueError, match=message):
            factory(ThreatModel(), **options)

    @pytest.mark.parametrize("case", ["fgsm_random", "pgd_best", "pgd_last"])
    def test_random_starts_need_one_key_for_each_example(self, case):
        name, options = ATTACKS[case]
        attack = attacks.create(name, ThreatModel(), **options)
        with pytest.raises(ValueError, match="keys=None, but this attack draws"):
            attack(toy.logits_fn, None, toy.INPUTS, toy.LABELS)
        with pytest.raises(ValueError, match=r"keys has shape \(5,\); expected .* 6 examples"):
            attack(toy.logits_fn, toy.KEYS[:5], toy.INPUTS, toy.LABELS)
        with pytest.raises(ValueError, match=r"keys has shape \(6, 2\); expected one typed key"):
            attack(toy.logits_fn, jax.random.key_data(toy.KEYS), toy.INPUTS, toy.LABELS)

    def test_attacks_that_draw_nothing_ignore_keys(self):
        for name, options in (("fgsm", {}), ("pgd", {"random_start": False, "num_steps": 4})):
            with_keys, without = (
                run(name, "linf", 0.03, keys=k, **options) for k in (toy.KEYS, None)
            )
            assert_same(without, with_keys, atol=0)
