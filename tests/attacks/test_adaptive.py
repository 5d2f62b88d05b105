"""Tests of attacks made against alignment: geometry by hand, and that they find successes."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gfa_jax import ThreatModel, attacks, losses, taps
from gfa_jax.attacks import adaptive, base, estimators
from tests.attacks import running, toy

GOAL = base.untargeted(losses.margin, jnp.asarray(toy.LABELS))


def apply_fn(taps, inputs):
    """The golden model with two taps: before and after its nonlinearity."""
    linear = inputs.reshape(len(inputs), -1) @ toy.FIRST + taps.get("linear", 0)
    hidden = jnp.tanh(linear) + taps.get("hidden", 0)
    return hidden @ toy.SECOND, {"linear": linear, "hidden": hidden}


@functools.partial(jax.jit, static_argnames=("layers", "mix"))
def direction(layers, mix, inputs=toy.INPUTS):
    """The estimator's loss, success and gradient; without layers, that of the input."""
    if layers is None:
        estimator, model = adaptive.tangential_estimator(mix), toy.logits_fn
    else:
        estimator, model = adaptive.feature_tangential_estimator(layers, mix), apply_fn
    return estimator.evaluate(model, GOAL, inputs, None)


plain = jax.jit(functools.partial(base.evaluate, toy.logits_fn, GOAL))


def in_float64():
    """Features, slopes at ``linear`` and ``hidden``, and the matrix to the input, from NumPy."""
    first, second = toy.FIRST.astype(np.float64), toy.SECOND.astype(np.float64)
    linear = toy.INPUTS.astype(np.float64) @ first
    logits = np.tanh(linear) @ second
    rows = np.arange(6)
    rest = logits.copy()
    rest[rows, toy.LABELS] = -np.inf
    slopes = second.T[np.argmax(rest, axis=1)] - second.T[toy.LABELS]
    inner = 1 - np.tanh(linear) ** 2
    return linear, np.tanh(linear), slopes * inner, slopes, inner, first


def without_radial(slopes, features):
    share = np.sum(slopes * features, axis=1) / np.sum(features**2, axis=1)
    return slopes - share[:, None] * features, share[:, None] * features


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


class TestTangential:
    def test_at_mix_0_the_gradient_is_orthogonal_to_the_input(self):
        gradient = np.asarray(direction(None, 0.0).gradient, np.float64)
        sizes = np.linalg.norm(gradient, axis=1) * np.linalg.norm(toy.INPUTS, axis=1)
        cosines = np.sum(gradient * toy.INPUTS, axis=1) / sizes
        np.testing.assert_allclose(cosines, np.zeros(6), atol=1e-6)
        full = np.asarray(plain(toy.INPUTS).gradient, np.float64)
        assert np.all(np.abs(np.sum(full * toy.INPUTS, axis=1)) > 0.01)
        expected, _ = without_radial(full, toy.INPUTS)
        np.testing.assert_allclose(gradient, expected, atol=1e-5)

    def test_at_mix_1_it_is_the_plain_gradient_and_linear_between(self):
        full, none = (np.asarray(direction(None, mix).gradient) for mix in (1.0, 0.0))
        np.testing.assert_allclose(full, plain(toy.INPUTS).gradient, atol=1e-5)
        np.testing.assert_allclose(
            direction(None, 0.25).gradient, 0.25 * full + 0.75 * none, atol=1e-5
        )

    def test_loss_and_success_are_the_models(self):
        for layers in (None, ("linear",)):
            here, expected = direction(layers, 0.0), plain(toy.INPUTS)
            np.testing.assert_allclose(here.loss, expected.loss, rtol=1e-5)
            np.testing.assert_array_equal(here.reached, expected.reached)

    def test_a_black_image_has_no_radial_direction(self):
        black = np.zeros_like(toy.INPUTS)
        np.testing.assert_allclose(
            direction(None, 0.0, black).gradient, plain(black).gradient, atol=1e-5
        )


class TestFeatureTangential:
    @pytest.mark.parametrize("mix", [0.0, 0.3])
    def test_one_layer_by_hand(self, mix):
        linear, _, slopes, _, _, first = in_float64()
        tangential, radial = without_radial(slopes, linear)
        expected = unit((tangential + mix * radial) @ first.T)
        gradient = direction(("linear",), mix).gradient
        np.testing.assert_allclose(gradient, expected, atol=1e-5)

    def test_layers_are_added_with_unit_norm(self):
        linear, hidden, slopes, hidden_slopes, inner, first = in_float64()
        at_linear, _ = without_radial(slopes, linear)
        at_hidden, _ = without_radial(hidden_slopes, hidden)
        expected = unit(at_linear @ first.T) + unit((at_hidden * inner) @ first.T)
        for layers in ((), ("hidden", "linear")):
            gradient = direction(layers, 0.0).gradient
            np.testing.assert_allclose(gradient, expected, atol=1e-5)

    @pytest.mark.parametrize("layer", ["linear", "hidden"])
    def test_at_mix_1_it_points_along_the_plain_gradient(self, layer):
        gradient = direction((layer,), 1.0).gradient
        expected = unit(np.asarray(plain(toy.INPUTS).gradient))
        np.testing.assert_allclose(gradient, expected, atol=1e-5)

    def test_a_loss_that_is_flat_gives_zero_and_no_nan(self):
        flat = GOAL._replace(loss=lambda logits: 0 * logits[:, 0])
        estimator = adaptive.feature_tangential_estimator()
        evaluate = jax.jit(functools.partial(estimator.evaluate, apply_fn, flat))
        np.testing.assert_array_equal(evaluate(toy.INPUTS, None).gradient, np.zeros((6, 48)))

    def test_permuting_the_batch_permutes_the_gradient(self):
        order = np.array([4, 2, 0, 5, 1, 3])
        estimator = adaptive.feature_tangential_estimator()
        goal = base.untargeted(losses.margin, jnp.asarray(toy.LABELS[order]))
        permuted = jax.jit(functools.partial(estimator.evaluate, apply_fn, goal))
        gradient = permuted(toy.INPUTS[order], None).gradient
        np.testing.assert_allclose(gradient, direction((), 0.0).gradient[order], atol=1e-5)


def moved_is_misled(taps, inputs):
    """Misled at every point but the clean one, without slopes: it shows where PGD starts."""
    _, features = apply_fn(taps, inputs)
    moved = jnp.any(inputs != toy.INPUTS, axis=1, keepdims=True)
    right = jax.nn.one_hot(toy.LABELS, 5)
    return jnp.where(moved, jnp.roll(right, 1, axis=1), right), features


GUIDES = toy.INPUTS[np.array([3, 2, 5, 0, 1, 4])]


class TestFeatures:
    NUM_STEPS = 10

    @staticmethod
    @functools.partial(jax.jit, static_argnames=("layers", "guided"))
    def starts(layers, guided):
        threat = ThreatModel("linf", 0.1)
        options = {"layers": layers, "num_feature_steps": TestFeatures.NUM_STEPS, "num_steps": 1}
        attack = adaptive.pgd_features(threat, guides=GUIDES if guided else None, **options)
        result = attack(moved_is_misled, toy.KEYS, toy.INPUTS, toy.LABELS)
        start = threat.random_start(estimators.fold_in(toy.KEYS, 0), toy.INPUTS)
        return result, start

    @staticmethod
    def distances(points, reference, layer):
        points, reference = (np.asarray(apply_fn({}, x)[1][layer]) for x in (points, reference))
        return np.sum((points - reference) ** 2, axis=1) / np.sum(reference**2, axis=1)

    @pytest.mark.parametrize("layer", ["linear", "hidden"])
    def test_the_first_steps_move_the_features_away(self, layer):
        result, start = self.starts(layer, False)
        assert np.all(result.success)
        running.assert_allowed(jax.device_get(result), "linf", 0.1)
        found = self.distances(result.adv_inputs, toy.INPUTS, layer)
        assert np.all(found > 3 * self.distances(start, toy.INPUTS, layer))

    def test_by_default_all_layers_are_moved(self):
        result, _ = self.starts("", False)
        both, _ = self.starts("linear+hidden", False)
        np.testing.assert_array_equal(result.adv_inputs, both.adv_inputs)
        for layer in ("linear", "hidden"):
            one, _ = self.starts(layer, False)
            assert np.mean(np.abs(result.adv_inputs - one.adv_inputs)) > 1e-3

    def test_guides_are_approached(self):
        result, start = self.starts("hidden", True)
        found = self.distances(result.adv_inputs, GUIDES, "hidden")
        assert np.all(found < self.distances(toy.INPUTS, GUIDES, "hidden"))
        assert np.all(found < self.distances(start, GUIDES, "hidden"))

    def test_counts_are_the_passes_made(self):
        calls = []

        def counted(taps, inputs):
            jax.debug.callback(lambda: calls.append(1))
            return apply_fn(taps, inputs)

        # In a tiny ball nothing is found.
        attack = adaptive.pgd_features(ThreatModel("linf", 1e-4), num_feature_steps=3, num_steps=2)
        attack = jax.jit(functools.partial(attack, counted))
        result = attack(toy.KEYS, toy.INPUTS, toy.LABELS)
        jax.effects_barrier()
        assert len(calls) == result.num_forwards[0] == 1 + (1 + 3) + (2 + 1)
        np.testing.assert_array_equal(result.num_backwards, np.full(6, 3 + 2))
        np.testing.assert_array_equal(result.num_zero_gradients, np.zeros(6))

    def test_features_that_cannot_be_moved_are_counted(self):
        def stuck(taps, inputs):
            return toy.logits_fn(inputs), {"one": jnp.ones((len(inputs), 2))}

        attack = adaptive.pgd_features(ThreatModel("linf", 1e-4), num_feature_steps=3, num_steps=2)
        result = jax.jit(functools.partial(attack, stuck))(toy.KEYS, toy.INPUTS, toy.LABELS)
        np.testing.assert_array_equal(result.num_zero_gradients, np.full(6, 3))


class TestTransfer:
    THREAT = ThreatModel("linf", 0.05)

    def test_the_attack_starts_at_what_the_source_found(self):
        def source_fn(inputs):
            return toy.logits_fn(inputs[:, ::-1])

        source = attacks.pgd(self.THREAT, num_steps=3, keep="last")
        # A constant model moves nothing, so that the start comes back.
        attack = attacks.pgd(self.THREAT, num_steps=2, keep="last")
        both = attacks.from_transfer(source_fn, source, attack)

        @jax.jit
        def run():
            data = (toy.KEYS, toy.INPUTS, toy.LABELS)
            return both(lambda x: 0 * toy.logits_fn(x), *data), source(source_fn, *data)

        result, expected = run()
        np.testing.assert_allclose(result.adv_inputs, expected.adv_inputs, atol=1e-6)
        assert np.all(expected.distance > 0.04)
        # The passes through the other model are not counted.
        np.testing.assert_array_equal(result.num_forwards, np.full(6, 3))
        np.testing.assert_array_equal(result.num_backwards, np.full(6, 2))

    def test_all_arguments_reach_both(self):
        seen = []

        def recorder(model, *positional, **named):
            seen.append((model, positional, named))
            return attacks.runs.Found(*[f"found{len(seen)}"] * 6)

        result = attacks.from_transfer("source", recorder, recorder)(
            "model", "keys", "inputs", "labels", targets="targets", start="start", active="active"
        )
        named = {"targets": "targets", "start": "start", "active": "active"}
        positional = ("keys", "inputs", "labels")
        assert seen == [
            ("source", positional, named),
            ("model", positional, {**named, "start": "found1"}),
        ]
        assert result.adv_inputs == "found2"


class Small(nn.Module):
    @nn.compact
    def __call__(self, inputs):
        hidden = nn.tanh(nn.Dense(8, name="first")(inputs))
        return nn.Dense(5, name="head")(nn.tanh(nn.Dense(8, name="second")(hidden)))


@functools.lru_cache
def small_model():
    module = Small()
    variables = jax.jit(module.init)(jax.random.key(0), toy.INPUTS)
    return module, jax.tree.map(lambda leaf: 2 * leaf, variables)


class TestRegistry:
    OPTIONS = {  # noqa: RUF012
        "apgd-tangential": {"num_steps": 10},
        "apgd-noise-averaged": {"num_steps": 10, "num_samples": 4},
        "apgd-feature-tangential": {"num_steps": 10, "layers": "first+second"},
        "pgd-features": {"num_steps": 10, "num_feature_steps": 5, "layers": "second"},
    }

    def test_what_needs_features_says_so(self):
        needy = set()
        for name in attacks.REGISTRY:
            attack = attacks.create(name, ThreatModel("l2", 0.5))
            if any(part.estimator.needs_features for part in attack.parts().values()):
                needy.add(name)
        assert needy == {"apgd-feature-tangential", "pgd-features"}

    @pytest.mark.parametrize("name", OPTIONS)
    def test_they_find_successes_in_an_unmodified_linen_model(self, name):
        module, variables = small_model()
        threat = ThreatModel("l2", 0.5)
        attack = attacks.create(name, threat, **self.OPTIONS[name])
        tapped = taps.tap_linen(module, variables, layers=("first", "second"))
        model = tapped
        if not attack.estimator.needs_features:
            model = functools.partial(module.apply, variables)
        logits_fn = jax.jit(functools.partial(module.apply, variables))
        labels = np.argmax(logits_fn(toy.INPUTS), axis=1)
        attack = jax.jit(functools.partial(attack, model))
        result = jax.device_get(attack(toy.KEYS, toy.INPUTS, labels))
        running.assert_allowed(result, "l2", 0.5)
        assert np.sum(result.success) >= 3
        predicted = np.argmax(logits_fn(result.adv_inputs), axis=1)
        np.testing.assert_array_equal(result.success, predicted != labels)

    def test_names_of_layers_are_split(self):
        for layers in ("linear+hidden", ["linear", "hidden"], ("linear", "hidden")):
            assert adaptive._layer_names(layers) == ("linear", "hidden")
        assert adaptive._layer_names("") == adaptive._layer_names(()) == ()

    def test_options_reach_the_estimator(self):
        threat = ThreatModel("linf", 0.1)
        estimator = attacks.create("apgd-tangential", threat, mix=0.25).estimator
        evaluate = jax.jit(functools.partial(estimator.evaluate, toy.logits_fn, GOAL))
        here = evaluate(toy.INPUTS, None)
        np.testing.assert_allclose(here.gradient, direction(None, 0.25).gradient, atol=1e-5)
        assert attacks.create("apgd-noise-averaged", threat, num_samples=7).estimator[2:4] == (8, 7)


def no_taps(taps, inputs):
    return toy.logits_fn(inputs), {}


class TestErrors:
    @pytest.mark.parametrize("mix", [-0.1, 1.1, float("nan")])
    @pytest.mark.parametrize("name", ["apgd-tangential", "apgd-feature-tangential"])
    def test_mix_is_a_share(self, name, mix):
        with pytest.raises(ValueError, match=r"mix=.* must be a number in \[0, 1\]"):
            attacks.create(name, ThreatModel(), mix=mix)

    @pytest.mark.parametrize(
        ("name", "options", "message"),
        [
            ("pgd-features", {"num_feature_steps": 0}, "num_feature_steps=0 must be an integer"),
            ("pgd-features", {"num_steps": 0}, "num_steps=0 must be an integer >= 1"),
            ("pgd-features", {"loss": "nll"}, "loss='nll' is not one of"),
            ("apgd-noise-averaged", {"scale": -1.0}, r"scale=-1\.0 must be a finite number > 0"),
            ("apgd-tangential", {"layers": "first"}, "takes no option 'layers'"),
        ],
    )
    def test_bad_options_are_named_with_their_value(self, name, options, message):
        with pytest.raises(ValueError, match=message):
            attacks.create(name, ThreatModel(), **options)

    @pytest.mark.parametrize("name", ["apgd-feature-tangential", "pgd-features"])
    def test_models_without_taps_or_the_layer_asked_for(self, name):
        def trace(model, **options):
            attack = attacks.create(name, ThreatModel(), **options)
            jax.eval_shape(functools.partial(attack, model), toy.KEYS, toy.INPUTS, toy.LABELS)

        trace(apply_fn)
        with pytest.raises(ValueError, match="the model has no taps"):
            trace(no_taps)
        with pytest.raises(ValueError, match="layers='hiden' is not one of .* Did you mean 'hidde"):
            trace(apply_fn, layers="linear+hiden")
