"""Tests of attacks as series of runs: scripted runs against a plain loop, then real attacks.

A scripted run does to example ``b`` what a table says, so that which of several runs is kept, when
they stop and what they count has an expected value from ten lines of Python.
"""

import functools
from typing import NamedTuple

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gfa_jax import ThreatModel, attacks, losses
from gfa_jax.attacks import base, estimators, runs
from tests.attacks import running, toy

RUNS, BATCH = 4, 5
INPUTS = np.full((BATCH, 2), 0.5, np.float32)
LABELS = np.zeros(BATCH, np.int32)
EVERYONE = np.ones(BATCH, bool)
RESIST = -np.ones(BATCH, np.float32)
# Moves are multiples of 1/16: five of them leave the ball.
THREAT = ThreatModel("linf", 0.3)
STEP = 1 / 16


class Script(NamedTuple):
    """What each run does to each example, ``[RUNS, BATCH]``.

    Attributes:
      success: what the run says of itself.
      loss: likewise.
      steps: how far it moves the first coordinate, in sixteenths.
    """

    success: np.ndarray
    loss: np.ndarray
    steps: np.ndarray

    @classmethod
    def of(cls, success, loss=0, steps=1):
        """Each table from anything that broadcasts; rows are runs."""
        shape = (RUNS, BATCH)
        return cls(
            np.broadcast_to(np.asarray(success, bool), shape),
            np.broadcast_to(np.asarray(loss, np.float32), shape),
            np.broadcast_to(np.asarray(steps, np.float32), shape),
        )


FORWARDS, BACKWARDS, ZEROS = 10, 3, 2


def attack_of(script, goal=None, visit=None, **options):
    """An attack whose runs follow the script; ``visit(model, keys, problem)`` may look around."""

    def run(model, keys, problem, goal, index):
        if visit is not None:
            visit(model, keys, problem)
        success, loss, steps = (jnp.asarray(table)[index] for table in script)
        one = jnp.ones(len(loss), jnp.int32)
        points = problem.inputs.at[:, 0].add((STEP * steps).astype(problem.inputs.dtype))
        counts = FORWARDS * one, BACKWARDS * one, ZEROS * one
        return runs.Found(points, success, loss, *counts)

    goal = runs.goal_of("margin") if goal is None else goal
    options = {"num_restarts": RUNS, "draws": False, **options}
    return runs.Attack(THREAT, goal, run, **options)


def model_of(margins):
    """A model of two classes that says the same everywhere: class 1 leads by the margins."""
    return lambda inputs: jnp.stack([jnp.zeros(len(margins)), jnp.asarray(margins)], axis=1)


@functools.partial(jax.jit, static_argnames=("keep", "stop"))
def _scripted(keep, stop, script, margins, active, run):
    attack = attack_of(script, keep=keep, stop=stop)
    return attack(model_of(margins), None, INPUTS, LABELS, active=active, run=run)


def scripted(keep, stop, script, *, margins=RESIST, active=EVERYONE, run=None):
    return jax.device_get(_scripted(keep, stop, script, margins, active, run))


def is_done(stop, success, steps):
    near = abs(steps) * STEP <= 0.3
    return {"success": success, "epsilon": success and near, "never": False}[stop]


def followed(keep, stop, script, margins, active):
    """What should come out: a loop over examples and runs, one by one."""
    rows = []
    for example in range(BATCH):
        success, loss, steps = margins[example] > 0, margins[example], 0.0
        num_made = 0
        for run in range(RUNS):
            misled_already = margins[example] > 0
            if misled_already or not active[example] or is_done(stop, success, steps):
                break
            num_made += 1
            new = tuple(table[run, example] for table in script)
            score = -abs(steps) if keep == "closest" else loss
            new_score = -abs(new[2]) if keep == "closest" else new[1]
            if (new[0] and not success) or (new[0] == success and new_score > score):
                success, loss, steps = new
        success = success and active[example]
        steps = steps if success else 0.0
        counts = (num_made * FORWARDS + active[example], num_made * BACKWARDS, num_made * ZEROS)
        rows.append((0.5 + STEP * steps, success, STEP * abs(steps), loss, *counts))
    return [np.array(column) for column in zip(*rows, strict=True)]


def assert_followed(result, expected):
    np.testing.assert_array_equal(result.adv_inputs[:, 0], expected[0])
    np.testing.assert_array_equal(result.adv_inputs[:, 1], np.full(BATCH, 0.5))
    for field, values in zip(result[1:7], expected[1:], strict=True):
        np.testing.assert_array_equal(field, values)


tables = functools.partial(st.lists, min_size=RUNS * BATCH, max_size=RUNS * BATCH)


@st.composite
def scripts(draw):
    shape = (RUNS, BATCH)
    return Script(
        np.array(draw(tables(st.booleans()))).reshape(shape),
        np.array(draw(tables(st.integers(-3, 3))), np.float32).reshape(shape),
        np.array(draw(tables(st.integers(-8, 8))), np.float32).reshape(shape),
    )


margins = st.lists(st.sampled_from([-2, -1, 1]), min_size=BATCH, max_size=BATCH)
masks = st.lists(st.booleans(), min_size=BATCH, max_size=BATCH)
RULES = [
    ("best", "success"),
    ("best", "never"),
    ("closest", "success"),
    ("closest", "epsilon"),
    ("closest", "never"),
]


class TestScriptedRuns:
    @pytest.mark.parametrize(("keep", "stop"), RULES)
    @hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
    @hypothesis.given(script=scripts(), margins=margins, active=masks)
    def test_the_compiled_loop_is_a_plain_loop(self, keep, stop, script, margins, active):
        margins, active = np.array(margins, np.float32), np.array(active)
        result = scripted(keep, stop, script, margins=margins, active=active)
        assert_followed(result, followed(keep, stop, script, margins, active))

    @pytest.mark.parametrize(("keep", "stop"), RULES)
    @hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
    @hypothesis.given(script=scripts(), margins=margins, active=masks)
    def test_runs_made_one_by_one_merge_to_the_loop(self, keep, stop, script, margins, active):
        margins, active = np.array(margins, np.float32), np.array(active)
        whole = scripted(keep, stop, script, margins=margins, active=active)
        parts, still = [], active.copy()
        success, score = np.zeros(BATCH, bool), np.full(BATCH, -np.inf)
        best = np.zeros(BATCH, int)
        for run in range(RUNS):
            part = scripted(keep, stop, script, margins=margins, active=still, run=run)
            parts.append(part)
            new_score = -part.distance if keep == "closest" else part.loss
            better = still & ((part.success & ~success) | (part.success == success))
            better &= (part.success & ~success) | (new_score > score)
            best[better], score[better] = run, new_score[better]
            success |= part.success
            near = np.array([p.distance for p in parts])[best, np.arange(BATCH)] <= 0.3
            misled_already = margins > 0
            done = {"success": success, "epsilon": success & near, "never": misled_already}[stop]
            still &= ~done

        def merged(field):
            return np.stack([getattr(part, field) for part in parts])[best, np.arange(BATCH)]

        np.testing.assert_array_equal(whole.success, success)
        for field in ("adv_inputs", "distance"):
            np.testing.assert_array_equal(getattr(whole, field), merged(field))
        np.testing.assert_array_equal(whole.loss[active], merged("loss")[active])
        for field in ("num_backwards", "num_zero_gradients"):
            total = sum(getattr(part, field) for part in parts)
            np.testing.assert_array_equal(getattr(whole, field), total)

    def test_best_prefers_success_to_loss_and_closest_to_distance(self):
        # By run: a failure of large loss, a far success, a near success of small loss, a failure.
        script = Script.of(
            [[False], [True], [True], [False]], [[9], [2], [1], [9]], [[1], [4], [2], [1]]
        )
        best, closest = (scripted(keep, "never", script) for keep in ("best", "closest"))
        np.testing.assert_array_equal(best.distance, np.full(BATCH, 4 * STEP))
        np.testing.assert_array_equal(best.loss, np.full(BATCH, 2))
        np.testing.assert_array_equal(closest.distance, np.full(BATCH, 2 * STEP))
        np.testing.assert_array_equal(closest.loss, np.full(BATCH, 1))

    @pytest.mark.parametrize(("stop", "num_made"), [("success", 1), ("epsilon", 2), ("never", 4)])
    def test_stop_rules(self, stop, num_made):
        # The first run succeeds beyond epsilon, the second within.
        script = Script.of(True, 0, [[7], [4], [3], [2]])
        result = scripted("closest", stop, script)
        np.testing.assert_array_equal(result.num_backwards, np.full(BATCH, num_made * BACKWARDS))
        nearest = {"success": 7, "epsilon": 4, "never": 2}[stop]
        np.testing.assert_array_equal(result.distance, np.full(BATCH, nearest * STEP))

    def test_a_run_of_its_own_ignores_the_others(self):
        script = Script.of([[True], [False], [True], [True]], 0, [[1], [2], [3], [4]])
        for run, steps in enumerate([1, 0, 3, 4]):
            result = scripted("best", "success", script, run=run)
            np.testing.assert_array_equal(result.distance, np.full(BATCH, steps * STEP))
            np.testing.assert_array_equal(result.num_forwards, np.full(BATCH, 1 + FORWARDS))

    def test_failures_come_back_clean_with_the_largest_loss(self):
        result = scripted("best", "success", Script.of(False, [[-5], [3], [2], [-5]], 2))
        np.testing.assert_array_equal(result.adv_inputs, INPUTS)
        np.testing.assert_array_equal(result.loss, np.full(BATCH, 3))
        low = scripted("best", "success", Script.of(False, -5, 2))
        np.testing.assert_array_equal(low.loss, RESIST)

    def test_a_nan_loss_is_kept_only_with_success(self):
        fails = scripted("best", "success", Script.of(False, np.nan))
        np.testing.assert_array_equal(fails.loss, RESIST)
        succeeds = scripted("best", "success", Script.of(True, np.nan))
        np.testing.assert_array_equal(succeeds.distance, np.full(BATCH, STEP))

    @pytest.mark.parametrize("run", [None, 2])
    def test_with_targets_by_rank_the_clean_loss_is_the_first_runs(self, run):
        # Towards the last target the clean loss is lower; runs made apart merge all the same.
        logits = jnp.tile(jnp.array([[4.0, 3.0, 1.0, 0.0]]), (BATCH, 1))
        goal = runs.goal_of_ranks("margin", 1)
        attack = attack_of(Script.of(False, -9), goal, num_restarts=1, num_targets=9)
        result = attack(lambda inputs: logits, None, INPUTS, LABELS, run=run)
        np.testing.assert_array_equal(result.loss, np.full(BATCH, -1.0))
        np.testing.assert_array_equal(
            result.num_forwards, np.full(BATCH, 1 + FORWARDS * (3 if run is None else 1))
        )


class TestLast:
    """``keep="last"``: one run, whose point is returned as it is."""

    @staticmethod
    def attack(script, margins=RESIST, active=None):
        attack = attack_of(script, keep="last", stop="never", num_restarts=1)
        return attack(model_of(margins), None, INPUTS, LABELS, active=active)

    def test_the_point_is_returned_whatever_the_success(self):
        result = self.attack(Script.of([True, False, True, False, False], 7, 2))
        np.testing.assert_array_equal(result.success, [1, 0, 1, 0, 0])
        np.testing.assert_array_equal(result.distance, np.full(BATCH, 2 * STEP))
        np.testing.assert_array_equal(result.loss, np.full(BATCH, 7))
        np.testing.assert_array_equal(result.num_forwards, np.full(BATCH, FORWARDS))

    def test_inputs_misclassified_already_are_attacked_too(self):
        result = self.attack(Script.of(False), margins=-RESIST)
        np.testing.assert_array_equal(result.distance, np.full(BATCH, STEP))
        np.testing.assert_array_equal(result.success, np.zeros(BATCH))

    def test_inactive_examples_stay_at_no_cost(self):
        active = np.array([1, 0, 1, 0, 1], bool)
        result = self.attack(Script.of(True), active=active)
        np.testing.assert_array_equal(result.success, active)
        np.testing.assert_array_equal(result.adv_inputs[~active], INPUTS[~active])
        for field, count in zip(result[4:7], (FORWARDS, BACKWARDS, ZEROS), strict=True):
            np.testing.assert_array_equal(field, np.where(active, count, 0))

    def test_the_model_is_seen_by_the_run_alone(self):
        calls = []

        def logits_fn(inputs):
            calls.append(1)
            return model_of(RESIST)(inputs)

        attack_of(Script.of(False), keep="last")(logits_fn, None, INPUTS, LABELS)
        assert not calls

    def test_clean_logits_for_kl_are_counted(self):
        attack = attacks.pgd(THREAT, loss="kl", keep="last", num_steps=2)
        calls = []

        def logits_fn(inputs):
            jax.debug.callback(lambda: calls.append(1))
            return toy.logits_fn(inputs)

        result = jax.jit(functools.partial(attack, logits_fn))(toy.KEYS, toy.INPUTS, toy.LABELS)
        jax.effects_barrier()
        assert len(calls) == result.num_forwards[0] == 4


class TestSkipping:
    """Once every example is done, the model is not called any more."""

    @staticmethod
    def num_calls(script, **options):
        calls = []

        def logits_fn(inputs):
            jax.debug.callback(lambda: calls.append(1))
            return model_of(options.get("margins", RESIST))(inputs)

        def visit(model, keys, problem):
            model(problem.inputs)

        attack = attack_of(script, visit=visit, stop=options.get("stop", "success"))
        jax.jit(functools.partial(attack, logits_fn))(
            None, INPUTS, LABELS, active=options.get("active")
        )
        jax.effects_barrier()
        return len(calls)

    def test_runs_end_with_the_last_example(self):
        assert self.num_calls(Script.of(True)) == 1 + 1
        late = Script.of([[True] * 4 + [False], [False] * 5, [True] * 5, [True] * 5])
        assert self.num_calls(late) == 1 + 3
        assert self.num_calls(Script.of(False)) == 1 + RUNS

    def test_examples_that_were_not_asked_for_keep_nothing_running(self):
        late = Script.of([[True] * 4 + [False]] * 4)
        assert self.num_calls(late, active=np.array([1, 1, 1, 1, 0], bool)) == 1 + 1

    def test_inputs_misclassified_already_keep_nothing_running(self):
        assert self.num_calls(Script.of(False), margins=-RESIST) == 1

    def test_never_goes_on(self):
        assert self.num_calls(Script.of(True), stop="never") == 1 + RUNS


class TestKeysAndStarts:
    def test_each_run_has_keys_of_its_own_and_the_clean_look_others(self):
        seen = []

        def look(model, keys, problem):
            seen.append(np.asarray(jax.random.key_data(keys)))

        def logits(model, inputs, keys):
            look(None, keys, None)
            return model(inputs)

        estimator = estimators.EXACT._replace(logits=logits, needs_keys=True)
        keys = toy.KEYS[:BATCH]
        for run in range(3):
            attack = attack_of(Script.of(False), visit=look, estimator=estimator, draws=True)
            attack(model_of(RESIST), keys, INPUTS, LABELS, run=run)
        for run, of_run in enumerate(seen[1::2]):
            np.testing.assert_array_equal(
                of_run, jax.random.key_data(estimators.fold_in(keys, run))
            )
        np.testing.assert_array_equal(seen[0], seen[2])
        assert len(np.unique(np.concatenate([seen[0], *seen[1::2]]), axis=0)) == 4 * BATCH

    def test_a_given_start_is_projected_and_used_without_keys(self):
        # A model of constant logits never moves the point.
        start = toy.INPUTS + np.linspace(-1, 1, 48, dtype=np.float32)[None]
        options = {"num_steps": 2, "keep": "last", "extra": {"start": start}}
        result = running.run(attacks.pgd, "linf", 0.1, scale=0.0, keys=None, **options)
        projected = np.clip(np.clip(start, toy.INPUTS - 0.1, toy.INPUTS + 0.1), 0, 1)
        np.testing.assert_allclose(result.adv_inputs, projected, atol=1e-6)
        running.assert_allowed(result, "linf", 0.1)
        # One that is allowed stays as it is.
        options["extra"] = {"start": result.adv_inputs}
        again = running.run(attacks.pgd, "linf", 0.2, scale=0.0, keys=None, **options)
        np.testing.assert_allclose(again.adv_inputs, result.adv_inputs, atol=1e-6)


class TestTargets:
    # The class predicted already (example 2), near ones and far ones.
    TARGETS = np.array([1, 2, 0, 0, 3, 1], np.int32)

    def test_success_is_at_the_target_alone(self):
        extra = {"targets": self.TARGETS}
        options = {"num_steps": 30, "keep": "last", "loss": "margin", "random_start": False}
        missed = 0
        for epsilon in (0.02, 0.05, 0.1, 0.3):
            result = running.run(attacks.pgd, "linf", epsilon, extra=extra, **options)
            predicted = np.argmax(toy.logits_fn(result.adv_inputs), axis=1)
            np.testing.assert_array_equal(result.success, predicted == self.TARGETS)
            missed += np.sum((predicted != toy.LABELS) & ~result.success)
        assert np.all(result.success)
        assert missed >= 1  # a wrong class that is not the target does not count

    def test_inputs_of_the_target_class_already_succeed_at_distance_0(self):
        extra = {"targets": self.TARGETS}
        result = running.run(attacks.apgd, "linf", 0.3, extra=extra, num_steps=3)
        assert result.success[2]
        assert result.distance[2] == result.num_backwards[2] == 0
        np.testing.assert_array_equal(result.adv_inputs[2], toy.INPUTS[2])
        assert np.all(result.num_backwards[[0, 1, 3, 4, 5]] > 0)


class TestGoals:
    LOGITS = jnp.array([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [1.0, 1.0, 0.0]])
    LABELS = jnp.array([0, 2, 1])

    def problem(self, logits=LOGITS, labels=LABELS, targets=None):
        inputs = jnp.zeros((len(labels), 1))
        active = jnp.ones(len(labels), bool)
        return runs.Problem(inputs, labels, targets, None, logits, active)

    @pytest.mark.parametrize("name", sorted(losses.LOSSES))
    def test_untargeted(self, name):
        goal = runs.goal_of(name)(self.problem(), 0)
        np.testing.assert_array_equal(
            goal.loss(self.LOGITS), losses.get(name)(self.LOGITS, self.LABELS)
        )
        # Ties go to the first class.
        np.testing.assert_array_equal(goal.reached(self.LOGITS), [False, True, True])
        assert goal.targets is None
        assert goal.labels is self.LABELS

    @pytest.mark.parametrize("name", sorted(losses.LOSSES))
    def test_targeted(self, name):
        targets = jnp.array([0, 1, 2])
        goal = runs.goal_of(name)(self.problem(targets=targets), 0)
        expected = losses.get_targeted(name)(self.LOGITS, self.LABELS, targets)
        np.testing.assert_array_equal(goal.loss(self.LOGITS), expected)
        np.testing.assert_array_equal(goal.reached(self.LOGITS), [True, True, False])

    def test_a_function_is_a_loss_too(self):
        goal = runs.goal_of(lambda logits, labels: logits[:, 0] + labels)(self.problem(), 0)
        np.testing.assert_array_equal(goal.loss(self.LOGITS), [2, 2, 2])

    def test_kl_is_the_divergence_from_the_clean_predictions(self):
        goal = runs.goal_of("kl")(self.problem(), 0)
        clean, moved = jax.nn.softmax(self.LOGITS), self.LOGITS[:, ::-1] + 1
        expected = jnp.sum(clean * (jnp.log(clean) - jax.nn.log_softmax(moved)), axis=1)
        np.testing.assert_allclose(goal.loss(moved), expected, atol=1e-6)
        np.testing.assert_allclose(goal.loss(self.LOGITS), np.zeros(3), atol=1e-7)
        slopes = jax.grad(lambda logits: jnp.sum(goal.loss(logits)))(self.LOGITS)
        np.testing.assert_allclose(slopes, np.zeros((3, 3)), atol=1e-7)
        # Success is against the labels, not the clean predictions.
        np.testing.assert_array_equal(goal.reached(self.LOGITS), [False, True, True])

    def test_kl_has_no_targeted_form(self):
        with pytest.raises(ValueError, match="loss='kl' has no targeted form"):
            runs.goal_of("kl")(self.problem(targets=self.LABELS), 0)

    def test_an_unknown_loss_is_refused_at_once(self):
        with pytest.raises(ValueError, match="loss='klx' is not one of"):
            runs.goal_of("klx")
        with pytest.raises(ValueError, match="loss='nll' is not one of"):
            runs.goal_of_ranks("nll", 1)

    def test_ranks_go_from_the_second_largest_clean_logit_down(self):
        logits = jnp.array([[3.0, 0.0, 1.0, 2.0], [0.0, 1.0, 9.0, 2.0]])
        problem = self.problem(logits, jnp.array([0, 2]))
        goal_fn = runs.goal_of_ranks("margin", num_restarts=2)
        targets = [goal_fn(problem, index).targets for index in range(6)]
        np.testing.assert_array_equal(
            np.stack(targets, axis=1), [[3, 3, 2, 2, 1, 1], [3, 3, 1, 1, 0, 0]]
        )
        traced = jax.jit(lambda index: goal_fn(problem, index).targets)
        np.testing.assert_array_equal(traced(5), targets[5])
        assert targets[0].dtype == problem.labels.dtype

    def test_of_equal_logits_the_lower_class_comes_first_and_never_the_label(self):
        logits = jnp.array([[1.0, 1.0, 1.0, 1.0], [0.0, 2.0, 1.0, 1.0]])
        labels = jnp.array([0, 1])  # what argmax predicts
        goal_fn = runs.goal_of_ranks("margin", 1)
        targets = [goal_fn(self.problem(logits, labels), index).targets for index in range(3)]
        np.testing.assert_array_equal(np.stack(targets, axis=1), [[1, 2, 3], [2, 3, 0]])

    @hypothesis.settings(max_examples=30, deadline=None, derandomize=True)
    @hypothesis.given(st.lists(st.integers(-2, 2), min_size=5, max_size=5))
    def test_ranks_are_a_permutation_of_all_classes_but_the_predicted_one(self, row):
        ranked = np.asarray(base.classes_by_rank(jnp.array([row], jnp.float32)))[0]
        expected = sorted(range(5), key=lambda index: (-row[index], index))
        np.testing.assert_array_equal(ranked, expected)
        assert ranked[0] == np.argmax(row)

    def test_any_wrong_class_counts_whatever_the_rank(self):
        goal = runs.goal_of_ranks("dlr", 1)(self.problem(), 1)
        np.testing.assert_array_equal(goal.reached(self.LOGITS), [False, True, True])
        expected = losses.dlr_targeted(self.LOGITS, self.LABELS, goal.targets)
        np.testing.assert_array_equal(goal.loss(self.LOGITS), expected)

    @pytest.mark.parametrize(
        ("num_classes", "num_targets", "num_runs"), [(2, 9, 3), (3, 9, 6), (10, 9, 27), (10, 4, 12)]
    )
    def test_there_are_as_many_targets_as_other_classes(self, num_classes, num_targets, num_runs):
        attack = attacks.apgd_targeted(THREAT, num_targets=num_targets, num_restarts=3)
        assert attack.num_runs(num_classes) == num_runs
        assert attacks.apgd(THREAT, num_restarts=3).num_runs(num_classes) == 3

    @pytest.mark.parametrize("num_classes", [2, 3])
    def test_few_classes(self, num_classes):
        tried = []

        def goal_fn(problem, index):
            goal = runs.goal_of_ranks("dlr", 1)(problem, index)
            jax.debug.callback(lambda targets: tried.append(targets.tolist()), goal.targets)
            return goal

        attack = attack_of(Script.of(False), goal_fn, num_restarts=1, num_targets=9)
        logits = jnp.tile(jnp.arange(num_classes, 0.0, -1)[None], (BATCH, 1))
        result = attack(lambda inputs: logits, None, INPUTS, LABELS)
        jax.effects_barrier()
        # Once for the clean loss, and then once a run.
        assert [row[0] for row in tried] == [1, *range(1, num_classes)]
        np.testing.assert_array_equal(
            result.num_backwards, np.full(BATCH, BACKWARDS * (num_classes - 1))
        )


class TestRandomModels:
    def test_a_success_on_the_way_is_judged_again(self):
        # Points beyond 0.7 mislead; the runs claim success everywhere.
        def logits(model, inputs, keys):
            lead = jnp.where(inputs[:, 0] > 0.7, 1.0, -1.0)
            return jnp.stack([jnp.zeros(len(inputs)), lead], axis=1)

        estimator = estimators.Estimator(logits, None, num_judging=7, is_random=True)
        steps = [[1, 1, 4, 1, 1], [1, 4, 1, 1, 1], [1, 1, 1, 1, 1], [4, 1, 1, 1, 1]]
        attack = attack_of(Script.of(True, 0, steps), estimator=estimator)
        result = jax.jit(functools.partial(attack, None))(None, INPUTS, LABELS)
        np.testing.assert_array_equal(result.success, [1, 1, 1, 0, 0])
        np.testing.assert_array_equal(result.distance, np.array([4, 4, 4, 0, 0], np.float32) * STEP)
        num_made = np.array([4, 2, 1, 4, 4])
        np.testing.assert_array_equal(result.num_backwards, num_made * BACKWARDS)
        np.testing.assert_array_equal(result.num_forwards, 7 + num_made * (FORWARDS + 7))


class TestRealAttacks:
    """The same on attacks that move, with few steps."""

    # At this radius two classes of one example, and three examples, can be reached.
    EPSILON = 0.04

    def apgd_t(self, **extra):
        return running.run(
            attacks.apgd_targeted, "linf", self.EPSILON, num_steps=4, num_targets=3, extra=extra
        )

    def test_runs_made_one_by_one_equal_the_compiled_loop(self):
        whole = self.apgd_t()
        assert 0 < np.sum(whole.success) < 6
        still, success = np.ones(6, bool), np.zeros(6, bool)
        adv_inputs, loss = toy.INPUTS.copy(), np.full(6, -np.inf, np.float32)
        num_backwards = np.zeros(6, int)
        for run in range(3):
            part = self.apgd_t(active=still, run=np.int32(run))
            better = part.success | (still & (part.loss > loss))
            adv_inputs[better], loss[better] = part.adv_inputs[better], part.loss[better]
            success |= part.success
            num_backwards += part.num_backwards
            still &= ~part.success
        np.testing.assert_array_equal(whole.success, success)
        np.testing.assert_allclose(whole.adv_inputs, adv_inputs, atol=1e-6)
        np.testing.assert_allclose(whole.loss, loss, rtol=1e-5)
        np.testing.assert_array_equal(whole.num_backwards, num_backwards)

    def test_the_model_runs_as_often_as_counted(self):
        calls = []

        def logits_fn(inputs):
            jax.debug.callback(lambda: calls.append(1))
            return toy.logits_fn(inputs)

        # Example 4 resists.
        example = {name: getattr(toy, name.upper())[4:5] for name in ("keys", "inputs", "labels")}
        options = {"num_steps": 3, "num_restarts": 2, "logits_fn": logits_fn, **example}
        result = running.run(attacks.apgd, "linf", 0.01, **options)
        jax.effects_barrier()
        assert len(calls) == result.num_forwards[0] == 1 + 2 * 4

    def test_inputs_misclassified_already_and_inactive_ones(self):
        labels = np.array([0, 3, 0, 4, 0, 4], np.int32)
        active = np.array([1, 1, 1, 0, 1, 1], bool)
        result = running.run(
            attacks.apgd_targeted,
            "linf",
            self.EPSILON,
            labels=labels,
            num_steps=4,
            num_targets=3,
            extra={"active": active},
        )
        np.testing.assert_array_equal(result.adv_inputs[[1, 3]], toy.INPUTS[[1, 3]])
        np.testing.assert_array_equal(result.success[[1, 3]], [True, False])
        np.testing.assert_array_equal(result.num_forwards[[1, 3]], [1, 0])
        for field in ("distance", "num_backwards", "num_zero_gradients"):
            np.testing.assert_array_equal(getattr(result, field)[[1, 3]], [0, 0])
        running.assert_same(
            running.rows(result, [0, 2, 4, 5]), running.rows(self.apgd_t(), [0, 2, 4, 5])
        )

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64])
    @pytest.mark.parametrize("norm", ["linf", "l1"])
    def test_dtypes(self, dtype, norm):
        with jax.enable_x64(dtype == jnp.float64):
            attack = attacks.apgd_targeted(ThreatModel(norm, 0.1), num_steps=2)
            inputs = jnp.asarray(toy.INPUTS, dtype)
            start = toy.INPUTS.astype(np.float32)
            attack = functools.partial(attack, lambda x: toy.logits_fn(x.astype(jnp.float32)))
            result = jax.eval_shape(attack, toy.KEYS, inputs, toy.LABELS, start=start)
        kinds = [leaf.dtype.name for leaf in jax.tree.leaves(result)]
        assert kinds == [jnp.dtype(dtype).name, "bool", *["float32"] * 2, *["int32"] * 3]

    def test_sharded_over_devices_only_the_end_is_told(self):
        # This run needs no communication, so that all there is comes from the loop.
        mesh = Mesh(np.array(jax.devices()), ("batch",))
        assert mesh.size == 4
        rows = np.array([0, 1, 2, 3, 4, 5, 0, 1])
        batch = (toy.KEYS[rows], toy.INPUTS[rows], toy.LABELS[rows], np.ones(8, bool))
        batch = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("batch")))

        def run(model, keys, problem, goal, index):
            loss = goal.loss(model(problem.inputs))
            draw = jax.vmap(jax.random.uniform)(keys)
            moved = problem.inputs + 0.01 * draw[:, None]
            none = jnp.zeros(len(loss), jnp.int32)
            return runs.Found(moved, draw > 0.8, loss + draw, none, none, none)

        goal = runs.goal_of_ranks("dlr", 2)
        attack = runs.Attack(THREAT, goal, run, num_restarts=2, num_targets=3, keep="closest")
        attack = jax.jit(functools.partial(attack, toy.logits_fn))
        compiled = attack.lower(*batch[:3], active=batch[3]).compile()
        text = compiled.as_text()
        assert "all-reduce" in text  # whether anything is left to do
        for collective in ("all-gather", "all-to-all", "collective-permute"):
            assert collective not in text
        result = compiled(*batch[:3], active=batch[3])
        assert not result.adv_inputs.sharding.is_fully_replicated
        local = attack(toy.KEYS[rows], toy.INPUTS[rows], toy.LABELS[rows])
        running.assert_same(jax.device_get(result), jax.device_get(local), atol=1e-6)

    def test_no_gradient_flows_through_any_field(self):
        def total(inputs, margins):
            script = Script(*(jnp.asarray(table) for table in Script.of(True)))
            script = script._replace(loss=script.loss + jnp.sum(margins))
            attack = attack_of(script, visit=None)
            result = attack(model_of(margins), None, inputs, LABELS)
            return jnp.sum(result.adv_inputs**2) + jnp.sum(result.distance + result.loss)

        slopes = jax.jit(jax.grad(total, argnums=(0, 1)))(INPUTS, RESIST)
        for slope in slopes:
            np.testing.assert_array_equal(slope, np.zeros_like(slope))


class TestErrors:
    PGD = attacks.pgd(ThreatModel(), num_steps=1)
    KEYS = toy.KEYS

    def attack(self, attack=PGD, keys=toy.KEYS, inputs=toy.INPUTS, labels=toy.LABELS, **options):
        return attack(toy.logits_fn, keys, inputs, labels, **options)

    def test_keys_are_needed_by_attacks_that_draw(self):
        with pytest.raises(ValueError, match="keys=None, but this attack draws for each example"):
            self.attack(keys=None)
        random = attacks.apgd(ThreatModel(), random_start=False, estimator=estimators.expectation())
        with pytest.raises(ValueError, match="keys=None, but this attack draws for each example"):
            self.attack(random, keys=None, start=toy.INPUTS)

    @pytest.mark.parametrize("keys", [toy.KEYS[:5], jax.random.key(0)])
    def test_keys_are_one_for_each_example(self, keys):
        with pytest.raises(ValueError, match=r"keys has shape \(5?,?\); expected one typed key"):
            self.attack(keys=keys)

    def test_starts_have_the_shape_of_the_inputs(self):
        with pytest.raises(ValueError, match=r"start has shape \(5, 48\); expected \(6, 48\)"):
            self.attack(start=toy.INPUTS[:5])

    @pytest.mark.parametrize(
        ("active", "message"),
        [
            (np.ones(5, bool), r"active has shape \(5,\) and dtype bool; expected bool"),
            (np.ones(6, np.int32), r"active has shape \(6,\) and dtype int32; expected bool"),
        ],
    )
    def test_active_is_a_mask(self, active, message):
        with pytest.raises(ValueError, match=message):
            self.attack(active=active)

    @pytest.mark.parametrize("attack", [attacks.apgd_targeted, attacks.fab_targeted])
    def test_attacks_that_choose_their_classes_take_none(self, attack):
        with pytest.raises(ValueError, match=r"targets were given .* without -t in its name"):
            self.attack(attack(ThreatModel()), targets=toy.LABELS)

    @pytest.mark.parametrize(
        ("targets", "message"),
        [
            (np.zeros(5, np.int32), r"targets have shape \(5,\) and dtype int32; expected integ"),
            (np.zeros(6, np.float32), "targets have shape .* dtype float32; expected integers"),
            (np.full(6, -1, np.int32), "targets hold negative values"),
        ],
    )
    def test_targets_are_classes(self, targets, message):
        with pytest.raises(ValueError, match=message):
            self.attack(targets=targets)

    @pytest.mark.parametrize("keep", ["best", "last"])
    def test_labels_and_targets_beyond_the_classes_are_refused(self, keep):
        attack = attacks.pgd(ThreatModel(), num_steps=1, keep=keep, random_start=False)
        wrong = np.array([0, 0, 0, 4, 0, 5], np.int32)
        with pytest.raises(ValueError, match="hold 5, but the logits have 5 classes"):
            self.attack(attack, labels=wrong)
        with pytest.raises(ValueError, match="hold 5, but the logits have 5 classes"):
            self.attack(attack, targets=wrong)

    def test_traced_values_pass(self):
        # Inside jit only shapes and dtypes are known.
        jax.eval_shape(lambda labels: self.attack(labels=labels, targets=labels), toy.LABELS + 9)
