"""Tests of the Square attack: its patterns and schedule, and the search on small images."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gfa_jax import ThreatModel, attacks, losses
from gfa_jax.attacks.square_attack import (
    Draw,
    _linf_step,
    _lp_step,
    _pattern,
    _sides,
    _start,
    _window,
    square,
    with_draws,
)
from tests.attacks import toy
from tests.attacks.running import (
    NORMS,
    assert_allowed,
    assert_judged,
    assert_same,
    rows,
    run,
    sizes,
)

HEIGHT, WIDTH, CHANNELS = 8, 7, 3


def _images():
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(HEIGHT * WIDTH * CHANNELS, 5)).astype(np.float32)
    images = rng.uniform(size=(8, HEIGHT, WIDTH, CHANNELS)).astype(np.float32)
    biases = -weights.sum(axis=0) / 2
    return weights, biases, images


WEIGHTS, BIASES, IMAGES = _images()


def logits_fn(images):
    return images.reshape(len(images), -1) @ WEIGHTS + BIASES[None]


LABELS = np.argmax(np.asarray(logits_fn(IMAGES)), axis=1).astype(np.int32)
WRONG = np.where(np.arange(8) == 1, (LABELS + 1) % 5, LABELS)
KEYS = jax.jit(attacks.example_keys)(jax.random.key(0), np.arange(8))
# A radius that breaks some of the images within some hundred queries, and not all.
MIDDLE = {"linf": 0.05, "l2": 0.5, "l1": 1.0}


def search(norm, epsilon=None, *, num_queries=60, **options):
    data = {"logits_fn": logits_fn, "inputs": IMAGES, "labels": LABELS, "keys": KEYS, **options}
    epsilon = MIDDLE[norm] if epsilon is None else epsilon
    return run(square, norm, epsilon, num_queries=num_queries, **data)


class TestSchedule:
    def test_sides_are_those_of_the_official_schedule(self):
        sides = _sides(5000, 0.8, 32, 32, False, "linf")
        # p halves strictly after 10, 50, 200, 500, 1000, 2000 and 4000 queries.
        for number, halvings in [(0, 0), (10, 0), (11, 1), (50, 1), (51, 2), (4000, 6), (4001, 7)]:
            assert sides[number] == round((0.8 / 2**halvings * 1024) ** 0.5)
        assert sides.min() == 3

    def test_rescaling_stretches_the_schedule(self):
        sides = _sides(1000, 0.8, 32, 32, True, "linf")
        np.testing.assert_array_equal(sides, _sides(10_000, 0.8, 32, 32, False, "linf")[::10])

    def test_bumps_have_odd_sides_from_three_inside_the_image(self):
        for norm in ("l2", "l1"):
            sides = _sides(5000, 0.8, 32, 32, False, norm)
            assert np.all(sides % 2 == 1)
            assert sides.min() == 3
            assert _sides(10, 1.0, 8, 6, False, norm).max() == 6


class TestPatterns:
    def test_a_bump_adds_up_layers_around_its_middle(self):
        # Side 3: a 1 x 3 bump above, minus a 2 x 3 bump below.
        for norm, power in (("l2", 2), ("l1", 4)):
            outer = 1 / 2**power
            upper = np.array([[outer, 1 + outer, outer]])
            lower = np.array([[outer, outer, outer], [outer, 1 + outer, outer]])
            order = {"l2": 2, "l1": 1}[norm]
            upper, lower = (bump / np.linalg.norm(bump.ravel(), order) for bump in (upper, lower))
            expected = np.concatenate([upper, -lower])
            expected /= np.linalg.norm(expected.ravel(), order)
            np.testing.assert_allclose(_pattern(3, norm), expected, rtol=1e-6)

    @pytest.mark.parametrize("norm", ["l2", "l1"])
    @pytest.mark.parametrize("side", [1, 2, 6, 7])
    def test_patterns_have_unit_norm(self, norm, side):
        pattern = _pattern(side, norm)
        assert pattern.shape == (side, side)
        assert sizes(pattern[None], norm)[0] == pytest.approx(1)


class TestWindows:
    @given(st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True), st.integers(1, 7))
    @settings(deadline=None, max_examples=40)
    def test_a_window_is_a_square_inside_the_image(self, row, column, side):
        uniform = jnp.array([[row, column]])
        mask, rows, columns = _window(uniform, jnp.int32(side), HEIGHT, WIDTH, True)
        expected = np.zeros((1, HEIGHT, WIDTH), bool)
        top, left = int(rows[0, 0]), int(columns[0, 0])
        expected[0, top : top + side, left : left + side] = True
        np.testing.assert_array_equal(mask, expected)
        assert mask.sum() == side**2

    @pytest.mark.parametrize("last_corner", [True, False])
    def test_corners_reach_every_place_and_the_last_one_on_demand(self, last_corner):
        places = jnp.linspace(0, 0.9999, 50)
        uniform = jnp.stack([places, places], axis=1)
        _, rows, columns = _window(uniform, jnp.int32(3), HEIGHT, WIDTH, last_corner)
        highest = HEIGHT - 3 if last_corner else HEIGHT - 4
        assert set(np.asarray(rows).ravel()) == set(range(highest + 1))
        assert columns.max() == highest - (HEIGHT - WIDTH)


def draw_of(corners, signs, flip):
    repeat = lambda value: np.repeat(np.asarray(value)[None], len(IMAGES), axis=0)  # noqa: E731
    return Draw(repeat(np.float32(corners)), repeat(np.float32(signs)), repeat(flip))


class TestSteps:
    def test_linf_puts_one_window_at_the_faces_of_the_ball(self):
        threat = ThreatModel("linf", 0.1)
        drawn = draw_of([[0.5, 0.0], [0, 0]], [1, -1, 1], False)
        start = np.asarray(_start(threat, KEYS, IMAGES))
        moved = np.array(_linf_step(threat, IMAGES, start, drawn, jnp.int32(2), True))
        top = int(0.5 * (HEIGHT - 2 + 1))
        window = (slice(None), slice(top, top + 2), slice(0, 2))
        expected = np.clip(IMAGES[window] + 0.1 * np.float32([1, -1, 1]), 0, 1)
        np.testing.assert_allclose(moved[window], expected, atol=1e-6)
        moved[window] = start[window]
        np.testing.assert_array_equal(moved, start)

    @pytest.mark.parametrize("norm", ["l2", "l1"])
    def test_the_others_move_mass_from_two_windows_into_one(self, norm):
        threat = ThreatModel(norm, MIDDLE[norm])
        images = np.full_like(IMAGES, 0.5)  # far from the box
        start = np.asarray(_start(threat, KEYS, images))
        side = 3
        drawn = draw_of([[0.0, 0.0], [0.9, 0.9]], [1, -1, 1], False)
        pattern = jnp.asarray(_pattern(side, norm), jnp.float32)
        data = (threat, images, start, drawn, jnp.int32(side), pattern, True)
        moved = np.asarray(_lp_step(*data)) - images
        np.testing.assert_allclose(sizes(moved, norm), MIDDLE[norm], rtol=1e-4)
        bottom, right = int(0.9 * (HEIGHT - 2)), int(0.9 * (WIDTH - 2))
        np.testing.assert_allclose(moved[:, bottom : bottom + 3, right : right + 3], 0, atol=1e-6)
        # Elsewhere the perturbation keeps its shape.
        before, after = (start - images)[:, 3:bottom], moved[:, 3:bottom]
        correlation = np.sum(before * after) / np.sqrt(np.sum(before**2) * np.sum(after**2))
        assert correlation == pytest.approx(1, abs=1e-4)
        if norm == "l1":  # projected: sizes shrink by one and the same amount, not in proportion
            return
        # In the window: the pattern, plus what was there, at unit norm each.
        old = (start - images)[:, :3, :3]
        length = np.linalg.norm(old.transpose(0, 3, 1, 2).reshape(8, 3, 9), axis=2)
        signs = np.float32([1, -1, 1])
        mixed = _pattern(side, norm)[None, :, :, None] * signs + old / length[:, None, None]
        ratio = moved[:, :3, :3] / mixed
        clear = np.abs(mixed) > 0.02
        for channel in range(CHANNELS):
            for example in range(len(IMAGES)):
                values = ratio[example, :, :, channel][clear[example, :, :, channel]]
                np.testing.assert_allclose(values, values[0], rtol=2e-3)

    @pytest.mark.parametrize("norm", NORMS)
    def test_the_start_lies_on_the_surface(self, norm):
        images = np.full_like(IMAGES, 0.5)
        start = np.asarray(_start(ThreatModel(norm, MIDDLE[norm]), KEYS, images)) - images
        # Tiles of unit mass fill the l_1 ball many times over: it is projected onto.
        np.testing.assert_allclose(sizes(start, norm), MIDDLE[norm], rtol=1e-4)
        if norm == "linf":  # vertical stripes
            np.testing.assert_array_equal(start, start[:, :1].repeat(HEIGHT, axis=1))
            assert len(np.unique(start[:, 0], axis=0)) == 8


class TestSearch:
    @pytest.mark.parametrize("norm", NORMS)
    @pytest.mark.parametrize("window", ["per_example", "shared"])
    def test_result_is_consistent_with_the_model_and_the_threat(self, norm, window):
        for epsilon in (MIDDLE[norm], 0.0):
            result = search(norm, epsilon, window=window, labels=WRONG)
            assert_allowed(result, norm, epsilon, IMAGES)
            assert_judged(result, logits_fn, WRONG, IMAGES)
            np.testing.assert_array_equal(result.adv_inputs[1], IMAGES[1])
            assert (result.num_forwards[1], result.success[1]) == (1, True)
            np.testing.assert_array_equal(result.num_backwards, np.zeros(8))
            if epsilon == 0:
                assert np.sum(result.success) == 1
                np.testing.assert_array_equal(np.delete(result.num_forwards, 1), np.full(7, 62))
            else:
                assert 3 <= np.sum(result.success) < 8

    @pytest.mark.parametrize("norm", NORMS)
    def test_it_succeeds_well_above_the_smallest_radius_and_never_below(self, norm):
        weights = WEIGHTS.T.astype(np.float64)
        logits = IMAGES.reshape(8, -1).astype(np.float64) @ WEIGHTS + BIASES
        lead = logits[np.arange(8), LABELS][:, None] - logits
        slopes = weights[None] - weights[LABELS][:, None]
        order = {"linf": 1, "l2": 2, "l1": np.inf}[norm]
        lengths = np.linalg.norm(slopes, ord=order, axis=2)
        lengths[np.arange(8), LABELS], lead[np.arange(8), LABELS] = 1, np.inf
        radii = (lead / lengths).min(axis=1)  # without the box: a lower bound
        for example, radius in enumerate(radii):
            assert not search(norm, 0.99 * radius).success[example]
        enough = {"linf": 4, "l2": 8, "l1": 60}[norm] * radii.max()
        assert np.all(search(norm, enough, num_queries=300).success)

    @pytest.mark.parametrize("norm", NORMS)
    def test_the_loss_never_falls_with_more_queries(self, norm):
        few, many = (search(norm, num_queries=number) for number in (20, 60))
        assert np.all(many.success >= few.success)
        failed = ~many.success
        assert np.all(many.loss[failed] >= few.loss[failed])
        assert np.any(many.loss > few.loss)

    @pytest.mark.parametrize("norm", NORMS)
    @pytest.mark.parametrize("window", ["per_example", "shared"])
    def test_permuting_splitting_and_padding_change_nothing(self, norm, window):
        whole = search(norm, window=window)
        for chosen in (np.array([4, 2, 0, 5, 1, 3, 7, 6]), np.array([3, 4, 5, 3, 3, 3, 3, 3])):
            data = {"inputs": IMAGES[chosen], "labels": LABELS[chosen], "keys": KEYS[chosen]}
            assert_same(search(norm, window=window, **data), rows(whole, chosen), 1e-5, 1e-5)

    @pytest.mark.parametrize("norm", ["linf", "l2"])
    @pytest.mark.parametrize("chunk_size", [3, 8, 100])
    def test_chunks_change_nothing(self, norm, chunk_size):
        # At a chunk of 3 the last chunk of 8 examples is not full.
        assert_same(search(norm, chunk_size=chunk_size), search(norm), 1e-4, 1e-5)

    def test_chunks_spare_broken_examples(self):
        seen = []

        def counted(images):
            jax.debug.callback(lambda: seen.append(1))
            return logits_fn(images)

        search("linf", num_queries=60, chunk_size=2, logits_fn=counted)
        jax.effects_barrier()
        queries = search("linf", num_queries=60).num_forwards
        # Two looks at the whole batch; then two examples at a time.
        assert len(seen) - 2 < 60 * 4
        assert 2 * (len(seen) - 2) >= np.sum(queries - 2)

    def test_it_ends_once_all_are_broken(self):
        calls = []

        def counted(images):
            jax.debug.callback(lambda: calls.append(1))
            return logits_fn(images)

        result = search("linf", 0.5, num_queries=1000, logits_fn=counted)
        jax.effects_barrier()
        assert np.all(result.success)
        assert len(calls) == result.num_forwards.max() < 100

    def test_without_a_random_start_it_starts_at_the_clean_image(self):
        visited = []

        def watched(images):
            jax.debug.callback(lambda images: visited.append(images), images)
            return logits_fn(images)

        search("linf", num_queries=2, random_start=False, logits_fn=watched)
        jax.effects_barrier()
        np.testing.assert_array_equal(visited[1], IMAGES)

    def test_restarts_draw_anew_and_spare_broken_examples(self):
        once, twice = (search("linf", 0.03, num_restarts=number) for number in (1, 2))
        assert np.all(twice.success >= once.success)
        np.testing.assert_array_equal(
            twice.num_forwards[once.success], once.num_forwards[once.success]
        )
        failed = ~once.success
        assert failed.sum() >= 2
        assert np.all(twice.loss[failed] >= once.loss[failed])
        assert np.any(twice.loss[failed] > once.loss[failed])

    def test_shared_windows_are_the_same_for_all(self):
        visited = []

        def watched(images):
            jax.debug.callback(lambda images: visited.append(images), images)
            return jnp.zeros((len(images), 5)) + jnp.arange(5)[None]  # never moves

        images = np.full_like(IMAGES, 0.5)
        data = {"inputs": images, "labels": np.full(8, 4, np.int32), "num_queries": 3}
        for window in ("shared", "per_example"):
            visited.clear()
            search("linf", window=window, random_start=False, logits_fn=watched, **data)
            jax.effects_barrier()
            for points in visited[2:]:
                assert (len(np.unique(points, axis=0)) == 1) == (window == "shared")

    @pytest.mark.parametrize("norm", NORMS)
    def test_a_constant_model_gives_no_nan(self, norm):
        result = search(norm, scale=0.0)
        assert_allowed(result, norm, MIDDLE[norm], IMAGES)
        np.testing.assert_array_equal(result.success, LABELS != 0)

    def test_a_targeted_attack_succeeds_at_its_targets_alone(self):
        targets = ((LABELS + 1 + np.arange(8) % 4) % 5).astype(np.int32)
        result = search("linf", 0.15, num_queries=300, extra={"targets": targets})
        predicted = np.argmax(np.asarray(logits_fn(result.adv_inputs)), axis=1)
        np.testing.assert_array_equal(result.success, predicted == targets)
        assert np.sum(result.success) >= 6
        clean = -losses.margin(logits_fn(IMAGES), targets)
        assert np.all(result.loss >= clean)

    def test_sharded_over_devices_equals_one_device_and_moves_no_examples(self):
        mesh = Mesh(np.array(jax.devices()), ("batch",))
        sharding = NamedSharding(mesh, PartitionSpec("batch"))
        batch = jax.device_put((KEYS, IMAGES, LABELS), sharding)
        for norm in ("linf", "l2"):
            attack = square(ThreatModel(norm, MIDDLE[norm]), num_queries=60)
            compiled = jax.jit(functools.partial(attack, logits_fn)).lower(*batch).compile()
            # The only communication is whether anything is left to do.
            for collective in ("all-gather", "all-to-all", "collective-permute"):
                assert collective not in compiled.as_text()
            assert_same(jax.device_get(compiled(*batch)), search(norm), 1e-5, 1e-5)


def test_draws_can_be_given():
    numbers = []

    def draw(keys, number, num_channels):
        jax.debug.callback(lambda number: numbers.append(int(number)), number)
        return Draw(
            jnp.zeros((len(keys), 2, 2)),
            jnp.ones((len(keys), num_channels)),
            jnp.zeros(len(keys), bool),
        )

    attack = with_draws(
        ThreatModel("linf", 1e-4),
        draw,
        num_queries=3,
        p_init=0.8,
        num_restarts=1,
        random_start=False,
        rescale_schedule=False,
        chunk_size=None,
        last_corner=False,
    )
    jax.jit(functools.partial(attack, logits_fn))(KEYS, IMAGES, LABELS)
    jax.effects_barrier()
    assert sorted(numbers) == [0, 1, 2]


def test_keys_are_needed_even_from_a_given_start():
    with pytest.raises(ValueError, match="keys=None, but this attack draws"):
        square(ThreatModel())(logits_fn, None, IMAGES, LABELS, start=IMAGES)


def test_inputs_that_are_no_images_are_refused():
    with pytest.raises(ValueError, match=r"inputs have shape \(6, 48\); Square needs images"):
        square(ThreatModel())(toy.logits_fn, toy.KEYS, toy.INPUTS, toy.LABELS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_queries": 0}, "num_queries=0 must be an integer >= 1"),
        ({"p_init": 0}, "p_init=0 must be a finite number > 0"),
        ({"p_init": 1.5}, r"p_init=1.5 must be a number in \[0, 1\]"),
        ({"window": "common"}, "window='common' is not one of"),
        ({"chunk_size": 0}, "chunk_size=0 must be an integer >= 1"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        square(ThreatModel(), **options)
