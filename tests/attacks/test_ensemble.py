"""Tests of AutoAttack: who broke what, by scripted members and by real ones; and its settings."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gfa_jax import ThreatModel, attacks, losses
from gfa_jax.attacks import ensemble, runs
from tests.attacks import running, toy

IMAGES = toy.INPUTS.reshape(6, 4, 4, 3)
# Example 1 gets a wrong label: its clean input is misclassified already.
WRONG = np.array([0, 3, 0, 4, 0, 4], np.int32)
STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")
# Steps are sixteenths: five of them leave the ball.
THREAT = ThreatModel("linf", 0.3)
STEP = 1 / 16
BATCH = 4
FORWARDS = 5


def member(success, steps, loss, keep):
    """An attack of one run, that says of itself what it is told to."""

    def run(model, keys, problem, goal, index):
        model(problem.inputs)
        one = jnp.ones(BATCH, jnp.int32)
        points = problem.inputs + (STEP * steps)[:, None]
        return runs.Found(points, success, loss, FORWARDS * one, 2 * one, one)

    return runs.Attack(THREAT, runs.goal_of("margin"), run, keep=keep, draws=False)


KEEPS = ("best", "closest", "best")


@jax.jit
def scripted(success, steps, loss, margins, active):
    """Three members, the second of which looks for the smallest perturbation; ``[3, B]``."""
    tables = zip(success, steps, loss, KEEPS, strict=True)
    members = {f"member{i}": member(*table) for i, table in enumerate(tables)}
    attack = ensemble.Ensemble(THREAT, members)

    def logits_fn(inputs):
        return jnp.stack([jnp.zeros(BATCH), margins], axis=1)

    inputs, labels = np.full((BATCH, 2), 0.5, np.float32), np.zeros(BATCH, np.int32)
    return attack(logits_fn, None, inputs, labels, active=active)


def followed(success, steps, loss, margins, active):
    """What should come out, example by example."""
    rows = []
    for example in range(BATCH):
        done = won = False
        distance, seen, num_made, counted, broke = 0.0, -np.inf, 0, 0, [False] * 3
        for index in range(3):
            if done or not active[example]:
                continue
            counted += 1  # the clean input
            if margins[example] > 0:
                done = won = True
                seen = margins[example]
                continue
            num_made += 1
            size = abs(steps[index, example]) * STEP
            near = KEEPS[index] == "best" or size <= 0.3
            found = success[index, example]
            if KEEPS[index] == "best":
                seen = (
                    loss[index, example] if found else max(margins[example], loss[index, example])
                )
            else:
                seen = loss[index, example] if found else margins[example]
            if found and near:
                done = won = True
                distance = size
                broke[index] = size > 0
        rows.append((won, distance, seen, counted + FORWARDS * num_made, 2 * num_made, *broke))
    return [np.array(column) for column in zip(*rows, strict=True)]


def table(elements):
    rows = st.lists(elements, min_size=3 * BATCH, max_size=3 * BATCH)
    return rows.map(lambda values: np.array(values).reshape(3, BATCH))


class TestScriptedMembers:
    @hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
    @hypothesis.given(
        success=table(st.booleans()),
        steps=table(st.integers(-8, 8).filter(bool)).map(np.float32),
        loss=table(st.integers(-3, 3)).map(np.float32),
        margins=st.lists(st.sampled_from([-2.0, -2.0, 1.0]), min_size=BATCH, max_size=BATCH),
        active=st.lists(st.booleans(), min_size=BATCH, max_size=BATCH),
    )
    def test_the_compiled_ensemble_is_a_plain_loop(self, success, steps, loss, margins, active):
        margins, active = np.array(margins, np.float32), np.array(active)
        result = jax.device_get(scripted(success, steps, loss, margins, active))
        won, distance, seen, forwards, backwards, *broke = followed(
            success, steps, loss, margins, active
        )
        np.testing.assert_array_equal(result.success, won)
        np.testing.assert_array_equal(result.distance, distance)
        moved = np.abs(result.adv_inputs - 0.5)
        np.testing.assert_array_equal(moved, np.stack([distance] * 2, axis=1))
        np.testing.assert_array_equal(result.loss[active], seen[active])
        np.testing.assert_array_equal(result.num_forwards, forwards)
        np.testing.assert_array_equal(result.num_backwards, backwards)
        np.testing.assert_array_equal(result.num_zero_gradients, backwards / 2)
        assert list(result.members) == ["member0", "member1", "member2"]
        for flags, expected in zip(result.members.values(), broke, strict=True):
            np.testing.assert_array_equal(flags, expected)
        # Each example has one member that broke it, or none.
        total = sum(flags.astype(int) for flags in result.members.values())
        np.testing.assert_array_equal(total, won & (margins < 0))

    def test_a_far_success_of_a_minimum_norm_member_is_none(self):
        # The second member alone succeeds, and too far for two examples.
        success = np.array([[0] * 4, [1] * 4, [0] * 4], bool)
        steps = np.array([[1] * 4, [4, 5, -4, -5], [1] * 4], np.float32)
        everyone, loss = np.ones(BATCH, bool), np.zeros((3, BATCH), np.float32)
        resist = -np.ones(BATCH, np.float32)
        result = jax.device_get(scripted(success, steps, loss, resist, everyone))
        np.testing.assert_array_equal(result.success, [1, 0, 1, 0])
        np.testing.assert_array_equal(result.members["member1"], [1, 0, 1, 0])
        np.testing.assert_array_equal(result.distance, np.array([4, 0, 4, 0]) * STEP)
        np.testing.assert_array_equal(result.adv_inputs[[1, 3]], np.full((2, 2), 0.5))
        # Members that stay in the ball by themselves are not measured again.
        success, steps = np.ones((3, BATCH), bool), np.full((3, BATCH), 8, np.float32)
        result = scripted(success, steps, loss, resist, everyone)
        np.testing.assert_array_equal(result.members["member0"], np.ones(BATCH))

    def test_members_with_nothing_left_are_not_run(self):
        calls = []

        def num_calls(success, **options):
            calls.clear()
            tables = (np.array(success), np.ones(BATCH, np.float32), np.zeros(BATCH, np.float32))
            members = {name: member(*tables, "best") for name in "abc"}
            attack = ensemble.Ensemble(THREAT, members)

            def logits_fn(inputs):
                jax.debug.callback(lambda: calls.append(1))
                return jnp.tile(jnp.array([[1.0, 0.0]]), (BATCH, 1))

            inputs, labels = np.full((BATCH, 2), 0.5, np.float32), np.zeros(BATCH, np.int32)
            jax.jit(functools.partial(attack, logits_fn))(None, inputs, labels, **options)
            jax.effects_barrier()
            return len(calls)

        # Two passes a member: the clean input, and the run's own.
        assert num_calls([True] * BATCH) == 2
        assert num_calls([True] * 3 + [False]) == 6
        assert num_calls([True] * 3 + [False], active=np.array([1, 1, 1, 0], bool)) == 2
        assert num_calls([True] * BATCH, active=np.zeros(BATCH, bool)) == 0


@functools.partial(jax.jit, static_argnames=("name", "norm"))
def _real(name, norm, epsilon, labels, active):
    attack = attacks.autoattack(ThreatModel(norm, epsilon), num_steps=4, num_queries=30)
    if name != "autoattack":
        attack = attack.members[name]
    return attack(toy.logits_fn, toy.KEYS, IMAGES, labels, active=active)


@functools.lru_cache
def real(name, epsilon, labels=None, active=None):
    labels = toy.LABELS if labels is None else np.array(labels, np.int32)
    active = np.ones(6, bool) if active is None else np.array(active)
    return jax.device_get(_real(name, "linf", epsilon, labels, active))


class TestStandard:
    # At the radii of the middle some examples resist some members.
    EPSILONS = (0.014, 0.0172, 0.02, 0.036, 0.0375, 0.06, 0.076, 0.11)

    def test_success_is_that_of_any_member_alone_with_the_same_keys(self):
        for epsilon in self.EPSILONS:
            whole = real("autoattack", epsilon)
            left = np.ones(6, bool)
            total = np.zeros(6, int)
            for name in STANDARD:
                alone = real(name, epsilon)
                broken = alone.success
                if name == "fab-t":
                    broken = broken & (alone.distance <= np.float32(epsilon))
                first = left & broken
                np.testing.assert_array_equal(whole.members[name], first)
                # Two programs may round differently.
                for field in ("adv_inputs", "distance"):
                    one, other = (getattr(of, field)[first] for of in (whole, alone))
                    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
                # Later targets are skipped alike, and Square counts its queries.
                total += np.where(left, alone.num_forwards, 0)
                left &= ~broken
            np.testing.assert_array_equal(whole.success, ~left)
            np.testing.assert_array_equal(whole.adv_inputs[left], IMAGES[left])
            np.testing.assert_array_equal(whole.num_forwards, total)
            running.assert_allowed(whole, "linf", epsilon, IMAGES)

    def test_some_examples_resist_at_some_radii_and_members_differ(self):
        results = [real("autoattack", epsilon) for epsilon in self.EPSILONS]
        num_broken = [int(np.sum(result.success)) for result in results]
        assert num_broken == sorted(num_broken)
        assert num_broken[0] == 0
        assert num_broken[-1] == 6
        later = [np.sum(r.members["apgd-t"]) + np.sum(r.members["fab-t"]) for r in results]
        assert sum(later) >= 1

    def test_success_is_misclassification_at_the_point_given(self):
        for epsilon in (0.02, 0.06):
            result = real("autoattack", epsilon, tuple(WRONG))
            predicted = np.argmax(toy.logits_fn(result.adv_inputs), axis=1)
            np.testing.assert_array_equal(result.success, predicted != WRONG)

    def test_inputs_misclassified_already_belong_to_no_member(self):
        result = real("autoattack", 0.06, tuple(WRONG))
        assert result.success[1]
        assert not any(flags[1] for flags in result.members.values())
        assert result.distance[1] == result.num_backwards[1] == 0
        assert result.num_forwards[1] == 1
        np.testing.assert_array_equal(result.adv_inputs[1], IMAGES[1])
        others = [0, 2, 3, 4, 5]
        whole = real("autoattack", 0.06)
        running.assert_same(running.rows(result, others), running.rows(whole, others))

    def test_examples_that_were_not_asked_for_stay_at_no_cost(self):
        active = (True, False, True, False, True, True)
        result = real("autoattack", 0.06, None, active)
        np.testing.assert_array_equal(result.num_forwards[[1, 3]], [0, 0])
        np.testing.assert_array_equal(result.success[[1, 3]], [0, 0])
        np.testing.assert_array_equal(result.adv_inputs[[1, 3]], IMAGES[[1, 3]])
        assert not any(np.any(flags[[1, 3]]) for flags in result.members.values())
        rows = [0, 2, 4, 5]
        running.assert_same(
            running.rows(result, rows), running.rows(real("autoattack", 0.06), rows)
        )

    def test_counts_are_those_of_the_settings(self):
        # Five classes: apgd-t and fab-t try four, with 4 steps each.
        result = real("autoattack", 0.001)
        np.testing.assert_array_equal(result.num_backwards, np.full(6, 5 + 4 * 5 + 4 * 4))
        forwards = (1 + 5) + (1 + 4 * 5) + (1 + 4 * 2 * 4) + (1 + 31)
        np.testing.assert_array_equal(result.num_forwards, np.full(6, forwards))

    def test_sharded_over_devices_only_the_end_is_told(self):
        rows = np.array([0, 1, 2, 3, 4, 5, 0, 1])
        mesh = Mesh(np.array(jax.devices()), ("batch",))
        assert mesh.size == 4
        batch = jax.device_put(
            (toy.KEYS[rows], IMAGES[rows], toy.LABELS[rows]),
            NamedSharding(mesh, PartitionSpec("batch")),
        )
        attack = attacks.autoattack(ThreatModel("linf", 0.0375), num_steps=4, num_queries=30)
        compiled = jax.jit(functools.partial(attack, toy.logits_fn)).lower(*batch).compile()
        text = compiled.as_text()
        for collective in ("all-gather", "all-to-all", "collective-permute"):
            assert collective not in text
        result = compiled(*batch)
        assert not result.adv_inputs.sharding.is_fully_replicated
        whole = running.rows(jax.device_get(result), slice(6))
        running.assert_same(whole, real("autoattack", 0.0375))


@pytest.fixture
def recorded(monkeypatch):
    """The members as their factories were called: names and options."""
    for name in ("apgd", "apgd_targeted", "fab", "fab_targeted", "square"):
        recorder = lambda threat, name=name, **options: (name, threat, options)  # noqa: E731
        monkeypatch.setattr(ensemble, name, recorder)

    def made(norm="linf", **options):
        threat = ThreatModel(norm, 0.1)
        members = {}
        for name, (factory, of, given) in attacks.autoattack(threat, **options).members.items():
            assert of is threat
            estimator = given.pop("estimator", None)
            if estimator is not None:
                given["num_samples"] = estimator.num_forwards if estimator.is_random else None
            members[name] = (factory, {k: v for k, v in given.items() if v is not None})
        return members

    return made


def apgd(num_restarts, **options):
    return ("apgd", {"num_steps": 100, "num_restarts": num_restarts, **options})


APGD_T = ("apgd_targeted", {"num_steps": 100, "num_targets": 9})
FAB_T = ("fab_targeted", {"num_steps": 100})
SQUARE = ("square", {"num_queries": 5000})
PLUS = {
    "apgd-ce": apgd(5),
    "apgd-dlr": apgd(5, loss="dlr"),
    "fab": ("fab", {"num_steps": 100, "num_restarts": 5}),
    "square": SQUARE,
    "apgd-t": APGD_T,
    "fab-t": FAB_T,
}


class TestSettings:
    """The versions of the authors' code."""

    @pytest.mark.parametrize("norm", ["linf", "l2"])
    def test_standard(self, recorded, norm):
        members = recorded(norm)
        assert tuple(members) == STANDARD
        assert members == {
            "apgd-ce": apgd(1),
            "apgd-t": APGD_T,
            "fab-t": FAB_T,
            "square": SQUARE,
        }

    def test_standard_in_l1(self, recorded):
        members = recorded("l1")
        assert tuple(members) == STANDARD
        assert members["apgd-ce"] == apgd(5)
        assert members["apgd-t"] == ("apgd_targeted", {"num_steps": 100, "num_targets": 5})
        assert members["fab-t"] == FAB_T

    @pytest.mark.parametrize("norm", ["linf", "l1"])
    def test_plus(self, recorded, norm):
        members = recorded(norm, version="plus")
        assert tuple(members) == tuple(PLUS)
        assert members == PLUS

    @pytest.mark.parametrize("norm", ["linf", "l1"])
    def test_rand(self, recorded, norm):
        members = recorded(norm, version="rand", num_samples=7)
        assert list(members.items()) == [
            ("apgd-ce", apgd(1, num_samples=7)),
            ("apgd-dlr", apgd(1, num_samples=7, loss="dlr")),
        ]

    @pytest.mark.parametrize("given", ["square+apgd-ce", ["square", "apgd-ce"]])
    def test_custom_has_the_settings_of_plus_in_the_order_given(self, recorded, given):
        members = recorded(version="custom", members=given)
        assert list(members.items()) == [("square", SQUARE), ("apgd-ce", apgd(5))]
        assert recorded(version="custom", members=ensemble.MEMBERS) == PLUS

    def test_options_reach_the_members(self, recorded):
        members = recorded(version="plus", num_steps=3, num_queries=7, chunk_size=2)
        assert members["square"] == ("square", {"num_queries": 7, "chunk_size": 2})
        for name in set(members) - {"square"}:
            assert members[name][1]["num_steps"] == 3

    def test_defaults_of_the_factories_are_the_authors(self):
        members = attacks.autoattack(ThreatModel("l2", 0.5), version="plus").members
        assert members["fab-t"].num_targets == members["apgd-t"].num_targets == 9
        assert members["fab-t"].num_restarts == members["apgd-t"].num_restarts == 1
        assert members["square"].num_restarts == 1
        for name, attack in members.items():
            assert attack.stop == ("epsilon" if name.startswith("fab") else "success")
            assert attack.keep == ("closest" if name.startswith("fab") else "best")
        problem = runs.Problem(None, np.array([0]), None, None, None, None)
        logits = np.array([[1.0, 0.5, -1.0]], np.float32)
        for name, loss in (("apgd-ce", "cross_entropy"), ("apgd-dlr", "dlr")):
            value = members[name].goal(problem, 0).loss(logits)
            np.testing.assert_allclose(value, losses.get(loss)(logits, np.array([0])))


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"version": "standart"}, "version='standart' is not one of .* mean 'standard'"),
            ({"version": "custom"}, r"version='custom' with members=\(\): custom needs members"),
            ({"version": "custom", "members": ""}, "custom needs members, .* Known are .*'fab-t'"),
            ({"members": "square"}, "version='standard' with members='square': custom needs mem"),
            ({"version": "plus", "members": ["fab"]}, "version='plus' with members=.*'fab'"),
            (
                {"version": "custom", "members": "square+apgd"},
                "members='apgd' is not one of .*apgd-ce",
            ),
            ({"num_steps": 0}, "num_steps=0 must be an integer >= 1"),
            ({"version": "rand", "num_samples": 0}, "num_samples=0 must be an integer >= 1"),
        ],
    )
    def test_bad_options_are_named_with_what_is_known(self, options, message):
        with pytest.raises(ValueError, match=message):
            attacks.autoattack(ThreatModel(), **options)

    def test_targets_need_members_that_take_them(self):
        attack = attacks.autoattack(ThreatModel(), num_steps=1, num_queries=1)
        arguments = (toy.logits_fn, toy.KEYS, IMAGES, toy.LABELS)
        with pytest.raises(ValueError, match="targets were given to an attack that chooses its ow"):
            attack(*arguments, targets=toy.LABELS)

    def test_arguments_are_checked_as_by_single_attacks(self):
        attack = attacks.autoattack(ThreatModel(), num_steps=1, num_queries=1)
        with pytest.raises(ValueError, match="keys=None, but this attack draws"):
            attack(toy.logits_fn, None, IMAGES, toy.LABELS)
        with pytest.raises(ValueError, match="labels have shape"):
            attack(toy.logits_fn, toy.KEYS, IMAGES, toy.LABELS[:, None])
        with pytest.raises(ValueError, match=r"inputs lie in \[1\..*\], outside bounds"):
            attack(toy.logits_fn, toy.KEYS, IMAGES + 1, toy.LABELS)
        with pytest.raises(ValueError, match="active has shape .* expected bool"):
            attack(toy.logits_fn, toy.KEYS, IMAGES, toy.LABELS, active=np.ones(6, np.int32))
