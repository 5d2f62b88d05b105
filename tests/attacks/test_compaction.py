"""Tests that attacks run from the host on what is left find what the compiled attacks find."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gfa_jax import ThreatModel, attacks
from gfa_jax.attacks import compaction, ensemble, estimators, runs
from tests.attacks import toy

THREAT = ThreatModel("linf", 0.3)
RUNS = 4


def scripted(keep="best", stop="success", seen=None):
    """An attack whose inputs say what happens, so that it does not matter where they are.

    Coordinate 1 is the first run that succeeds, in sixteenths; a run moves coordinate 0 by less
    than the one before, the first two beyond epsilon.
    """

    def run(model, keys, problem, goal, index):
        if seen is not None:
            seen.append(problem.inputs.shape)
        inputs = problem.inputs
        draw = jax.vmap(jax.random.uniform)(keys)
        success = index >= jnp.round(16 * inputs[:, 1])
        # Later runs have the lower loss, so that the order matters.
        points = inputs.at[:, 0].add((RUNS - index) / 8)
        one = jnp.ones(len(inputs), jnp.int32)
        return runs.Found(points, success, draw - index - 3, 10 * one, 3 * one, one)

    goal = runs.goal_of("margin")
    return runs.Attack(THREAT, goal, run, num_restarts=RUNS, keep=keep, stop=stop)


def apply_scripted(variables, inputs):
    """Class 1 leads where coordinate 2 says so."""
    lead = 2 * (inputs[:, 2] - 0.5) * variables["scale"]
    return jnp.stack([jnp.zeros_like(lead), lead], axis=1)


VARIABLES = {"scale": np.float32(1)}


def scripted_examples(size, seed=0):
    rng = np.random.default_rng(seed)
    inputs = np.zeros((size, 3), np.float32)
    inputs[:, 1] = rng.integers(0, 6, size) / 16
    inputs[:, 2] = rng.uniform(0, 0.7, size)
    return attacks.example_keys(jax.random.key(3), np.arange(size)), inputs, np.zeros(size, int)


def whole_of(attack, apply, variables, *examples, **options):
    """The compiled attack on all examples at once."""
    return jax.device_get(
        jax.jit(lambda v, *e: attack(functools.partial(apply, v), *e, **options))(
            variables, *examples
        )
    )


class Memory:
    """A memory that breaks down after some entries."""

    def __init__(self, room):
        self.kept, self.room = {}, room

    def load(self, name):
        return self.kept.get(name)

    def save(self, name, arrays):
        assert name not in self.kept
        if len(self.kept) >= self.room:
            raise KeyboardInterrupt
        self.kept[name] = {key: np.array(value) for key, value in arrays.items()}


def num_runs_made(result, backwards_of_a_run):
    return np.asarray(result.num_backwards) // backwards_of_a_run


def assert_equal(batched, whole, extra_forwards=0, rtol=0.0, atol=0.0):
    for field in ("success", "num_backwards", "num_zero_gradients"):
        np.testing.assert_array_equal(getattr(batched, field), getattr(whole, field), field)
    np.testing.assert_array_equal(batched.num_forwards, whole.num_forwards + extra_forwards)
    for field in ("adv_inputs", "distance", "loss"):
        one, other = getattr(batched, field), getattr(whole, field)
        np.testing.assert_allclose(one, other, rtol=rtol, atol=atol, err_msg=field)
    assert list(batched.members) == list(whole.members)
    for name, flags in batched.members.items():
        np.testing.assert_array_equal(flags, whole.members[name], name)
    for leaf in jax.tree.leaves(batched):
        assert isinstance(leaf, np.ndarray)


class TestScriptedAttacks:
    @pytest.mark.parametrize(
        ("size", "batch_size", "keep", "stop"),
        [
            (37, 16, "best", "success"),
            (13, 8, "closest", "epsilon"),
            (13, 8, "best", "never"),
            (3, 64, "best", "success"),  # below every bucket
        ],
    )
    def test_batches_find_what_the_compiled_attack_finds(self, size, batch_size, keep, stop):
        attack, examples = scripted(keep, stop), scripted_examples(size)
        before = [np.array(leaf) for leaf in examples[1:]]
        batched = compaction.attack_in_batches(
            attack, apply_scripted, VARIABLES, *examples, batch_size=batch_size
        )
        whole = whole_of(attack, apply_scripted, VARIABLES, *examples)
        made = num_runs_made(whole, 3)
        assert stop == "never" or size == 3 or len(np.unique(made)) >= 3
        # The clean input is judged in every run.
        looks = 0 if stop == "never" else np.maximum(made - 1, 0)
        assert_equal(batched, whole, looks)
        for leaf, old in zip(examples[1:], before, strict=True):
            np.testing.assert_array_equal(leaf, old)  # results are not written into the inputs

    def test_an_example_does_not_depend_on_the_others(self):
        attack, (keys, inputs, labels) = scripted(), scripted_examples(13)
        run = functools.partial(compaction.attack_in_batches, attack, apply_scripted, VARIABLES)
        whole = run(keys, inputs, labels, batch_size=8)
        rows = np.array([12, 4, 7])
        some = run(keys[rows], inputs[rows], labels[rows], batch_size=8)
        assert_equal(some, jax.tree.map(lambda field: field[rows], whole))

    def test_all_misclassified_or_none_at_all(self):
        attack, (keys, inputs, labels) = scripted(), scripted_examples(5)
        run = functools.partial(compaction.attack_in_batches, attack, apply_scripted, VARIABLES)
        inputs[:, 2] = 1
        result = run(keys, inputs, labels, batch_size=4)
        np.testing.assert_array_equal(result.success, np.ones(5))
        np.testing.assert_array_equal(result.distance, np.zeros(5))
        np.testing.assert_array_equal(result.adv_inputs, inputs)
        np.testing.assert_array_equal(result.num_forwards, np.ones(5))
        np.testing.assert_array_equal(result.num_backwards, np.zeros(5))
        empty = run(keys[:0], inputs[:0], labels[:0], batch_size=4)
        assert empty.adv_inputs.shape == (0, 3)
        assert empty.success.shape == (0,)

    def test_few_programs_are_compiled_and_only_once(self):
        seen = []
        attack, examples = scripted(seen=seen), scripted_examples(50)
        run = functools.partial(compaction.attack_in_batches, attack, apply_scripted, batch_size=16)
        before = compaction._attack_batch._cache_size()
        run(VARIABLES, *examples)
        num_programs = compaction._attack_batch._cache_size() - before
        assert {shape[0] for shape in seen} <= {16, 4, 1}
        assert num_programs == len({shape[0] for shape in seen}) >= 2
        # Neither other variables, nor other numbers of examples, nor other runs need new ones.
        run({"scale": np.float32(2)}, *scripted_examples(33, seed=1))
        assert compaction._attack_batch._cache_size() - before <= 3

    def test_examples_that_are_not_active_come_back_clean_at_no_count(self):
        attack, (keys, inputs, labels) = scripted(), scripted_examples(13)
        active = np.arange(13) % 3 > 0
        run = functools.partial(compaction.attack_in_batches, attack, apply_scripted, VARIABLES)
        some = run(keys, inputs, labels, batch_size=8, active=active)
        alone = run(keys[active], inputs[active], labels[active], batch_size=8)
        assert_equal(jax.tree.map(lambda field: field[active], some), alone)
        rest = jax.tree.map(lambda field: field[~active], some)
        np.testing.assert_array_equal(rest.adv_inputs, inputs[~active])
        for counted in (rest.success, rest.distance, rest.num_forwards, rest.num_backwards):
            assert not np.any(counted)
        with pytest.raises(ValueError, match=r"active has shape \(4,\); expected \(13,\)"):
            run(keys, inputs, labels, active=active[:4])

    @pytest.mark.parametrize("stopped_after", [0, 1, 3, 100])
    @pytest.mark.parametrize("is_ensemble", [False, True])
    def test_a_stopped_attack_goes_on_from_memory(self, stopped_after, is_ensemble):
        attack = scripted("closest", "epsilon")
        if is_ensemble:
            members = {"one": attack, "other": scripted("best", "success")}
            attack = ensemble.Ensemble(ThreatModel("linf", 0.2), members)
        examples = scripted_examples(37)
        run = functools.partial(
            compaction.attack_in_batches, attack, apply_scripted, VARIABLES, *examples, batch_size=8
        )
        memory = Memory(stopped_after)
        if stopped_after < 100:
            with pytest.raises(KeyboardInterrupt):
                run(memory=memory)
        memory.room = 100
        assert_equal(run(memory=memory), run())
        computed = list(memory.kept)
        assert len(computed) == len(set(computed)) > 5
        memory.room = 0  # now all is there
        assert_equal(run(memory=memory), run())

    def test_the_memory_of_other_examples_is_refused(self):
        memory = Memory(100)
        run = functools.partial(compaction.attack_in_batches, scripted(), apply_scripted, VARIABLES)
        run(*scripted_examples(13), memory=memory)
        with pytest.raises(ValueError, match=r"attack-0-0 holds examples \[0, 1, .*\], not"):
            run(*scripted_examples(5), memory=memory)

    def test_progress(self):
        told = []
        keys, inputs, labels = scripted_examples(10)
        inputs[:, 1:] = 0
        inputs[:3, 1] = 2 / 16  # three examples need three runs
        compaction.attack_in_batches(
            scripted(),
            apply_scripted,
            VARIABLES,
            *(keys, inputs, labels),
            batch_size=4,
            on_batch=lambda *what: told.append(what),
        )
        assert told == [
            *(("1/4", done, 10) for done in (4, 8, 9, 10)),
            *(("2/4", 3, 3), ("3/4", 3, 3)),  # three quarters of a batch
        ]
        told.clear()
        attack = ensemble.Ensemble(THREAT, {"first": scripted(stop="never"), "last": scripted()})
        inputs[:3, 1] = 5 / 16
        compaction.attack_in_batches(
            attack,
            apply_scripted,
            VARIABLES,
            *(keys, inputs, labels),
            batch_size=16,
            on_batch=lambda *what: told.append(what),
        )
        first = [("first", done, 10) for done in (4, 8, 9, 10)]
        assert told == [*first, *((f"last {i}/4", 3, 3) for i in range(1, 5))]

    @pytest.mark.parametrize("size", [3, 13])
    def test_batches_are_spread_over_devices(self, size, monkeypatch):
        mesh = Mesh(np.array(jax.devices()), ("batch",))
        assert mesh.size == 4
        sharding = NamedSharding(mesh, PartitionSpec("batch"))
        attack, examples = scripted(), scripted_examples(size)
        seen = []

        def record(attack, apply, variables, batch, run):
            new = jitted(attack, apply, variables, batch, run)
            seen.append((batch["inputs"].sharding, batch["inputs"].shape[0], new.success.sharding))
            return new

        jitted = compaction._attack_batch
        monkeypatch.setattr(compaction, "_attack_batch", record)
        run = functools.partial(compaction.attack_in_batches, attack, apply_scripted, VARIABLES)
        result = run(*examples, batch_size=6, sharding=sharding)
        assert seen
        for given, batch, found in seen:
            assert given == sharding
            assert batch in (8, 4)
            assert len(found.device_set) == 4
            assert not found.is_fully_replicated
        monkeypatch.setattr(compaction, "_attack_batch", jitted)
        assert_equal(result, run(*examples, batch_size=4))

    def test_inputs_stay_on_the_host_but_for_their_batch(self):
        # Of many examples only a batch fits on a device; here there is no batch at all.
        attack = ensemble.Ensemble(THREAT, {"a": scripted("closest", "epsilon"), "b": scripted()})
        examples = scripted_examples(0)
        with jax.transfer_guard_host_to_device("disallow_explicit"):
            result = compaction.attack_in_batches(attack, apply_scripted, VARIABLES, *examples)
        assert list(result.members) == ["a", "b"]
        assert result.adv_inputs.shape == (0, 3)

    def test_an_ensemble_of_scripted_members(self):
        members = {"near": scripted("closest", "epsilon"), "best": scripted()}
        attack = ensemble.Ensemble(THREAT, members)
        examples = scripted_examples(13, seed=2)
        examples[1][:, 1] = np.arange(13) % 6 / 16
        batched = compaction.attack_in_batches(
            attack, apply_scripted, VARIABLES, *examples, batch_size=4
        )
        whole = whole_of(attack, apply_scripted, VARIABLES, *examples)
        for field in ("success", "adv_inputs", "distance", "loss", "num_backwards"):
            np.testing.assert_array_equal(getattr(batched, field), getattr(whole, field), field)
        assert 0 < np.sum(whole.success) < 13
        for name, flags in whole.members.items():
            np.testing.assert_array_equal(batched.members[name], flags)


IMAGES = toy.INPUTS.reshape(6, 4, 4, 3)
EPSILON = 0.0375


def apply_toy(variables, inputs):
    return variables["scale"] * toy.logits_fn(inputs)


class TestRealAttacks:
    """Six examples in batches of four; the second is filled up, or a single example."""

    def run(self, attack, **options):
        def batched(scale, labels, **arguments):
            return compaction.attack_in_batches(
                attack,
                apply_toy,
                {"scale": np.float32(scale)},
                *(toy.KEYS, IMAGES, labels),
                batch_size=4,
                **arguments,
            )

        @jax.jit
        def whole(scale, labels, **arguments):
            logits_fn = functools.partial(apply_toy, {"scale": scale})
            return attack(logits_fn, toy.KEYS, IMAGES, labels, **arguments)

        return batched, lambda *given, **arguments: jax.device_get(whole(*given, **arguments))

    # Some broken, some not, one misclassified already; all misclassified; nothing broken.
    CASES = (
        (1.0, np.array([0, 3, 0, 4, 0, 4], np.int32)),
        (1.0, np.full(6, 1, np.int32)),
        (0.0, np.zeros(6, np.int32)),
    )
    AUTOATTACK = attacks.autoattack(ThreatModel("linf", EPSILON), num_steps=4, num_queries=30)

    # One test, so that the programs of the members are compiled once.
    def test_autoattack_and_its_members(self):
        for name in ("apgd-t", "fab-t", "square", None):
            attack = self.AUTOATTACK if name is None else self.AUTOATTACK.members[name]
            batched, whole = self.run(attack)
            for scale, labels in self.CASES:
                found, expected = batched(scale, labels), whole(scale, labels)
                made = {"apgd-t": 5, "fab-t": 4}.get(name)
                looks = np.maximum(num_runs_made(expected, made) - 1, 0) if made else 0
                if name is None:
                    looks = found.num_forwards - expected.num_forwards
                    assert np.all((looks >= 0) & (looks <= 3 + 3))
                # Other batch sizes round differently.
                assert_equal(found, expected, looks, rtol=1e-5, atol=1e-5)
                assert np.all(found.success) or scale == 0 or labels[0] == 0
            assert not np.any(found.success)
        assert set(found.members) == {"apgd-ce", "apgd-t", "fab-t", "square"}

    def test_pgd_with_restarts_and_targets(self):
        threat = ThreatModel("linf", EPSILON)
        batched, whole = self.run(attacks.pgd(threat, num_steps=4, num_restarts=2))
        scale, labels = self.CASES[0]
        result = batched(scale, labels)
        assert_equal(result, whole(scale, labels), rtol=1e-5, atol=1e-6)
        assert 0 < np.sum(result.success) < 6
        targets = np.array([1, 2, 0, 0, 3, 1], np.int64)
        result = batched(scale, labels, targets=targets)
        expected = whole(scale, labels, targets=targets)
        assert_equal(result, expected, rtol=1e-5, atol=1e-6)
        predicted = np.argmax(toy.logits_fn(result.adv_inputs), axis=1)
        np.testing.assert_array_equal(result.success, predicted == targets)

    def test_models_that_take_more_than_inputs(self):
        # A randomised model gets keys, and one with features taps.
        def noisy(variables, inputs, keys):
            noise = jax.vmap(lambda key: jax.random.normal(key, inputs.shape[1:]))(keys)
            return apply_toy(variables, inputs + 0.01 * noise)

        estimator = estimators.expectation(2)
        attack = attacks.fgsm(ThreatModel("linf", EPSILON), estimator=estimator)
        variables = {"scale": np.float32(1)}
        examples = (toy.KEYS, IMAGES, toy.LABELS)
        run = functools.partial(compaction.attack_in_batches, batch_size=4)
        result = run(attack, noisy, variables, *examples)
        whole = whole_of(attack, noisy, variables, *examples)
        assert_equal(result, whole, rtol=1e-5, atol=1e-6)

        def tapped(variables, taps, inputs):
            return apply_toy(variables, inputs), {}

        estimator = estimators.Estimator(
            lambda model, inputs, keys: model({}, inputs)[0],
            lambda model, goal, inputs, keys: estimators.EXACT.evaluate(
                lambda x: model({}, x)[0], goal, inputs, keys
            ),
        )
        attack = attacks.fgsm(ThreatModel("linf", EPSILON), estimator=estimator)
        plain = attacks.fgsm(ThreatModel("linf", EPSILON))
        result = run(attack, tapped, variables, *examples)
        expected = run(plain, apply_toy, variables, *examples)
        assert_equal(result, expected, rtol=1e-5, atol=1e-6)


class TestBuckets:
    @pytest.mark.parametrize(
        ("batch_size", "num_devices", "sizes"),
        [
            (256, 1, (256, 64, 16)),
            (256, 8, (256, 64, 16)),
            (100, 8, (104, 32, 8)),
            (6, 4, (8, 4)),
            (2, 1, (2, 1)),
            (1, 1, (1,)),
            (1, 4, (4,)),
        ],
    )
    def test_sizes(self, batch_size, num_devices, sizes):
        assert compaction.bucket_sizes(batch_size, num_devices) == sizes

    @pytest.mark.parametrize("size", [0, 1, 2, 4, 5, 16, 17, 35, 64])
    def test_every_example_is_in_one_batch_and_padding_is_told(self, size):
        indices = np.arange(100, 100 + size)
        seen = []
        for chosen, active in compaction._batches(indices, (16, 4, 1)):
            assert len(chosen) == len(active)
            assert len(chosen) in (16, 4, 1)
            assert np.all(np.isin(chosen, indices))
            assert active[0]
            # Little of a batch is padding on CPU.
            assert len(chosen) == 1 or np.sum(active) >= 0.75 * len(chosen)
            seen.extend(chosen[active])
        np.testing.assert_array_equal(seen, indices)


class TestErrors:
    def attack(self, attack=None, keys=toy.KEYS, inputs=IMAGES, labels=toy.LABELS, **options):
        attack = attacks.pgd(THREAT, num_steps=1) if attack is None else attack
        variables = {"scale": np.float32(1)}
        return compaction.attack_in_batches(
            attack, apply_toy, variables, keys, inputs, labels, **options
        )

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"labels": toy.LABELS[:5]}, r"labels have shape \(5,\)"),
            ({"labels": toy.LABELS.astype(np.float32)}, "labels have .* dtype float32"),
            ({"labels": toy.LABELS - 1}, "labels hold -1; classes are counted from 0"),
            ({"labels": toy.LABELS + 1}, "labels hold 5, but the logits have 5 classes"),
            ({"targets": toy.LABELS + 1}, "targets hold 5, but the logits have 5 classes"),
            ({"targets": toy.LABELS[:5]}, r"targets has shape \(5,\); expected \(6,\)"),
            ({"keys": toy.KEYS[:5]}, r"keys has shape \(5,\); expected \(6,\)"),
            ({"inputs": (255 * IMAGES).astype(np.uint8)}, "inputs have dtype uint8"),
            ({"inputs": 2 * IMAGES}, r"inputs lie in .* outside bounds"),
            ({"batch_size": 0}, "batch_size=0 must be an integer >= 1"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, options, message):
        with pytest.raises(ValueError, match=message):
            self.attack(**options)

    def test_targets_of_attacks_that_choose_their_own(self):
        with pytest.raises(ValueError, match="targets were given to an attack that chooses its"):
            self.attack(attacks.apgd_targeted(THREAT), targets=toy.LABELS)
