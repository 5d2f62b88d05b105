"""Tests of gradient estimators: means over the same keys by hand, lucky draws, batch invariance."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gfa_jax import ThreatModel, attacks, losses
from gfa_jax.attacks import base, estimators
from tests.attacks import toy

GOAL = base.untargeted(losses.margin, jnp.asarray(toy.LABELS))
NUM_SAMPLES = 3


def noisy_model(inputs, keys):
    """A randomised defence: noise on the input, large enough to bend the loss."""
    noise = jax.vmap(lambda key: jax.random.normal(key, inputs.shape[1:]))(keys)
    return toy.logits_fn(inputs + 0.1 * noise)


def twin(inputs):
    return jnp.tanh(2 * inputs @ toy.FIRST) @ toy.SECOND


# The estimator, and the model that it asks for.
CASES = {
    "exact": (estimators.EXACT, toy.logits_fn),
    "expectation": (estimators.expectation(NUM_SAMPLES), noisy_model),
    "noise_averaged": (estimators.noise_averaged(NUM_SAMPLES, scale=0.1), toy.logits_fn),
    "surrogate": (estimators.surrogate(twin), toy.logits_fn),
}


@functools.partial(jax.jit, static_argnames="case")
def evaluate(case, inputs=toy.INPUTS, labels=toy.LABELS, keys=toy.KEYS):
    estimator, model = CASES[case]
    goal = base.untargeted(losses.margin, labels)
    return estimator.evaluate(model, goal, inputs, keys), estimator.logits(model, inputs, keys)


@jax.jit
def gradient_of(points):
    """The exact gradient, by another way than the library's."""

    def margin(point, label):
        logits = toy.logits_fn(point[None])[0]
        return jnp.max(logits.at[label].set(-jnp.inf)) - logits[label]

    return jax.vmap(jax.grad(margin))(points, toy.LABELS)


def samples_of(keys):
    """Noise ``[K, B, D]`` of the samples of one evaluation, by the documented keys."""

    def draw(key, index):
        return jax.random.normal(jax.random.fold_in(key, index), toy.INPUTS.shape[1:])

    draw = jax.vmap(jax.vmap(draw, (0, None)), (None, 0))
    return 0.1 * np.asarray(jax.jit(draw)(keys, jnp.arange(NUM_SAMPLES)))


NOISE = samples_of(toy.KEYS)


class TestGradients:
    def test_exact(self):
        here, logits = evaluate("exact")
        np.testing.assert_allclose(here.gradient, gradient_of(toy.INPUTS), atol=1e-5)
        clean = toy.logits_fn(toy.INPUTS)
        np.testing.assert_allclose(here.loss, losses.margin(clean, toy.LABELS), rtol=1e-5)
        np.testing.assert_allclose(logits, clean, rtol=1e-5)

    @pytest.mark.parametrize("case", ["expectation", "noise_averaged"])
    def test_means_are_those_over_the_same_noise(self, case):
        here, _ = evaluate(case)
        gradients = [gradient_of(toy.INPUTS + noise) for noise in NOISE]
        np.testing.assert_allclose(here.gradient, np.mean(gradients, axis=0), atol=1e-5)
        # The samples differ, or the mean would say nothing.
        assert np.abs(gradients[0] - gradients[1]).max() > 0.1

    def test_expectation_reports_its_last_sample(self):
        here, _ = evaluate("expectation")
        last = toy.logits_fn(toy.INPUTS + NOISE[-1])
        np.testing.assert_allclose(here.loss, losses.margin(last, toy.LABELS), rtol=1e-4)
        np.testing.assert_array_equal(here.reached, np.argmax(last, axis=1) != toy.LABELS)

    def test_noise_averaged_reports_the_point_without_noise(self):
        here, logits = evaluate("noise_averaged")
        clean = toy.logits_fn(toy.INPUTS)
        np.testing.assert_allclose(here.loss, losses.margin(clean, toy.LABELS), rtol=1e-5)
        np.testing.assert_array_equal(here.reached, np.zeros(6))
        np.testing.assert_allclose(logits, clean, rtol=1e-5)

    def test_surrogate_differentiates_the_twin_and_judges_the_model(self):
        here, logits = evaluate("surrogate")
        clean = toy.logits_fn(toy.INPUTS)
        np.testing.assert_allclose(here.loss, losses.margin(clean, toy.LABELS), rtol=1e-5)
        np.testing.assert_allclose(logits, clean, rtol=1e-5)
        expected = jax.grad(lambda x: jnp.sum(losses.margin(twin(x), toy.LABELS)))(toy.INPUTS)
        np.testing.assert_allclose(here.gradient, expected, atol=1e-5)
        assert np.abs(expected - gradient_of(toy.INPUTS)).max() > 0.1

    @pytest.mark.parametrize("case", CASES)
    def test_types_do_not_depend_on_the_model(self, case):
        estimator, model = CASES[case]
        here = jax.eval_shape(
            lambda x: estimator.evaluate(
                lambda *x: model(*x).astype(jnp.bfloat16), GOAL, x, toy.KEYS
            ),
            toy.INPUTS,
        )
        assert [leaf.dtype.name for leaf in here] == ["float32", "bool", "float32"]

    @pytest.mark.parametrize("case", CASES)
    def test_permuting_the_batch_permutes_everything(self, case):
        order = np.array([4, 2, 0, 5, 1, 3])
        permuted = evaluate(case, toy.INPUTS[order], toy.LABELS[order], toy.KEYS[order])
        for one, other in zip(
            jax.tree.leaves(permuted), jax.tree.leaves(evaluate(case)), strict=True
        ):
            np.testing.assert_allclose(one, other[order], rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("case", CASES)
    def test_counts_are_the_passes_made(self, case):
        estimator, model = CASES[case]
        forwards, backwards = [], []

        @jax.custom_vjp
        def counted(values):
            return values

        def forward(values):
            jax.debug.callback(lambda: forwards.append(1))
            return values, None

        def backward(_, slopes):
            jax.debug.callback(lambda _: backwards.append(1), slopes[0, 0])
            return (slopes,)

        counted.defvjp(forward, backward)

        def counting(*arguments):
            return counted(model(*arguments))

        if case == "surrogate":
            estimator = estimators.surrogate(lambda x: counted(twin(x)))
        jax.jit(functools.partial(estimator.evaluate, counting, GOAL))(toy.INPUTS, toy.KEYS)
        jax.effects_barrier()
        assert len(backwards) == estimator.num_backwards
        # Passes that are not differentiated are the one without noise, and the model's own.
        undifferentiated = {"noise_averaged": 1, "surrogate": 1}.get(case, 0)
        assert len(forwards) == estimator.num_forwards - undifferentiated


class TestRandomModels:
    def test_judging_takes_the_mean_over_new_draws(self):
        drawn = []

        def model(inputs, keys):
            jax.debug.callback(lambda data: drawn.append(data), jax.random.key_data(keys))
            return jnp.stack([jax.vmap(jax.random.uniform)(keys), inputs[:, 0]], axis=1)

        estimator = estimators.expectation(NUM_SAMPLES)
        inputs, keys = jnp.zeros((2, 3)), toy.KEYS[:2]
        goal = base.untargeted(losses.margin, jnp.zeros(2, jnp.int32))
        jax.jit(functools.partial(estimator.evaluate, model, goal))(inputs, keys)
        jax.effects_barrier()
        gradient_draws = [drawn.pop() for _ in range(len(drawn))]
        logits = jax.jit(functools.partial(estimator.logits, model))(inputs, keys)
        jax.effects_barrier()
        assert len(drawn) == NUM_SAMPLES == len(gradient_draws)
        draws = [jax.vmap(jax.random.uniform)(jax.random.wrap_key_data(data)) for data in drawn]
        np.testing.assert_allclose(logits[:, 0], np.mean(draws, axis=0), rtol=1e-6)
        every = np.concatenate([*drawn, *gradient_draws])
        assert len(np.unique(every, axis=0)) == 4 * NUM_SAMPLES

    # Mean logits mislead beyond 0.66 alone; one pass in three misleads anywhere.
    @staticmethod
    def lucky(inputs, keys):
        draw = jax.vmap(jax.random.uniform)(keys)
        lead = jnp.where(draw < 0.33, 0.1, -1.0) + 4 * (inputs[:, 0] - 0.5)
        return jnp.stack([jnp.zeros(len(inputs)), lead], axis=1)

    def compiled(self, factory, estimator, **options):
        """Attacks 32 examples in a ball of a given radius."""
        inputs, labels = np.full((32, 2), 0.5, np.float32), np.zeros(32, np.int32)
        options = {"loss": "margin", "estimator": estimator, **options}

        def attack(epsilon):
            keys = attacks.example_keys(jax.random.key(1), np.arange(32))
            return factory(ThreatModel("linf", epsilon), **options)(
                self.lucky, keys, inputs, labels
            )

        return jax.jit(attack)

    @pytest.mark.parametrize(
        ("factory", "options"),
        [
            (attacks.apgd, {"num_steps": 3, "num_restarts": 2}),
            (attacks.pgd, {"num_steps": 3}),
            (attacks.fgsm, {}),
        ],
    )
    def test_lucky_draws_do_not_count(self, factory, options):
        attack = self.compiled(factory, estimators.expectation(30), **options)
        result = attack(0.01)
        assert np.sum(result.success) == 0
        assert np.sum(attack(0.4).success) == 32
        if factory is attacks.apgd:
            # The clean input, and for each run four gradients and the verdict.
            np.testing.assert_array_equal(result.num_forwards, np.full(32, 30 * (1 + 2 * (4 + 1))))
            np.testing.assert_array_equal(result.num_backwards, np.full(32, 30 * 2 * 4))

    def test_a_single_pass_would_count_them(self):
        # The same attack, judged on one draw: this is what the mean is for.
        one = estimators.expectation(30)._replace(is_random=False, num_judging=1)
        attack = self.compiled(attacks.apgd, one, num_steps=3)
        assert np.sum(attack(0.01).success) > 16

    def test_fgsm_is_not_judged_on_the_draws_of_its_gradient(self):
        # The model is misled by the draws that it was first asked with, and by no others.
        first = {bytes(np.asarray(row)) for row in _gradient_keys(toy.KEYS)}

        def is_known(data):
            return np.array([bytes(row) in first for row in np.asarray(data)])

        def model(inputs, keys):
            shape = jax.ShapeDtypeStruct((len(inputs),), bool)
            known = jax.pure_callback(is_known, shape, jax.random.key_data(keys))
            lead = jnp.where(known, 1.0, -1.0) + 0 * jnp.sum(inputs, axis=1)
            return jnp.stack([jnp.zeros(len(inputs)), jax.lax.stop_gradient(lead)], axis=1)

        attack = attacks.fgsm(ThreatModel(), estimator=estimators.expectation(NUM_SAMPLES))
        attack = jax.jit(functools.partial(attack, model))
        result = attack(toy.KEYS, toy.INPUTS, np.zeros(6, np.int32))
        np.testing.assert_array_equal(result.success, np.zeros(6))


def _gradient_keys(keys):
    """What the samples of FGSM's only gradient draw from."""
    of_run = estimators.fold_in(keys, 0)
    data = [jax.random.key_data(estimators.fold_in(of_run, i)) for i in range(NUM_SAMPLES)]
    return np.concatenate(data)


def test_averages_over_noise_see_through_a_rough_surface():
    # Small waves, of steep slopes: those of single points say little of the surface below.
    def rough(inputs):
        return toy.logits_fn(inputs) + 0.05 * jnp.sin(200 * inputs @ toy.FIRST[:, :5])

    def gradient(estimator):
        evaluate = functools.partial(estimator.evaluate, rough, GOAL)
        return np.asarray(jax.jit(evaluate)(toy.INPUTS, toy.KEYS).gradient)

    def cosines(gradient):
        smooth = np.asarray(gradient_of(toy.INPUTS))
        product = np.linalg.norm(gradient, axis=1) * np.linalg.norm(smooth, axis=1)
        return np.sum(gradient * smooth, axis=1) / product

    averaged = cosines(gradient(estimators.noise_averaged(20, scale=0.02)))
    assert np.all(averaged > 0.4)
    assert np.mean(averaged) > np.mean(cosines(gradient(estimators.EXACT))) + 0.2


@pytest.mark.parametrize(
    ("factory", "options", "message"),
    [
        (estimators.expectation, {"num_samples": 0}, "num_samples=0 must be an integer >= 1"),
        (estimators.noise_averaged, {"num_samples": 1.5}, r"num_samples=1\.5 must be an integer"),
        (estimators.noise_averaged, {"scale": 0.0}, r"scale=0\.0 must be a finite number > 0"),
    ],
)
def test_bad_options_are_named_with_their_value(factory, options, message):
    with pytest.raises(ValueError, match=message):
        factory(**options)
