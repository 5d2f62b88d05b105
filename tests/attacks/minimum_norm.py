"""What the tests of all attacks that look for the smallest perturbation share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gfa_jax import ThreatModel, losses
from tests.attacks import toy

ORDERS = {"linf": np.inf, "l2": 2, "l1": 1}
DUAL_ORDERS = {"linf": 1, "l2": 2, "l1": np.inf}

# Example 1 gets a wrong label: its clean input is misclassified already.
WRONG = np.array([0, 3, 0, 4, 0, 4], np.int32)
# The class predicted already (example 2), the one nearest, and far ones.
TARGETS = np.array([1, 2, 0, 0, 3, 1], np.int32)


@functools.partial(jax.jit, static_argnames=("factory", "norm", "bounds", "static", "logits_fn"))
def _run(factory, norm, bounds, static, logits_fn, traced, scaling, arguments):
    epsilon, scale, shift = scaling
    attack = factory(ThreatModel(norm, epsilon, bounds), **dict(static), **traced)
    inputs, labels, targets, active = arguments

    def scaled(points):
        return scale * logits_fn(points) + shift

    return attack(scaled, None, inputs, labels, targets=targets, active=active)


def run(
    factory,
    norm,
    *,
    inputs=toy.INPUTS,
    labels=toy.LABELS,
    targets=None,
    active=None,
    logits_fn=toy.logits_fn,
    epsilon=0.3,
    scale=1.0,
    shift=0.0,
    bounds=(0.0, 1.0),
    **options,
):
    """Attacks ``scale * logits + shift``.

    One compilation serves all values of epsilon, scale and shift, and of options that are floats.
    """
    traced = {name: value for name, value in options.items() if isinstance(value, float)}
    static = tuple(sorted((name, options[name]) for name in options.keys() - traced.keys()))
    active = np.ones(len(inputs), bool) if active is None else active
    arguments = (inputs, labels, targets, active)
    scaling = (epsilon, scale, shift)
    return _run(factory, norm, bounds, static, logits_fn, traced, scaling, arguments)


def sizes(perturbations, norm):
    flat = np.asarray(perturbations, np.float64).reshape(len(perturbations), -1)
    return np.linalg.norm(flat, ord=ORDERS[norm], axis=1)


def perturbation(result, inputs=toy.INPUTS):
    return np.asarray(result.adv_inputs, np.float64) - inputs


def assert_same(left, right, rtol=1e-5, atol=1e-5):
    for name in set(left._fields) - {"members"}:
        one, other = getattr(left, name), getattr(right, name)
        np.testing.assert_allclose(one, other, rtol=rtol, atol=atol, err_msg=name)


def assert_consistent(result, norm, logits_fn, inputs, labels, bounds=(0.0, 1.0), targets=None):
    """The box, the distance, success and loss against the model, and clean failures."""
    adv_inputs = np.asarray(result.adv_inputs)
    assert np.all(np.isfinite(adv_inputs))
    assert adv_inputs.min() >= np.float32(bounds[0])
    assert adv_inputs.max() <= np.float32(bounds[1])
    distances = sizes(perturbation(result, inputs), norm)
    np.testing.assert_allclose(result.distance, distances, rtol=1e-5, atol=1e-7)
    logits = logits_fn(adv_inputs)
    predicted = np.argmax(logits, axis=1)
    misled = predicted != labels if targets is None else predicted == targets
    # On the boundary, programs that round differently may disagree.
    clear = np.abs(result.loss) > 1e-6 * np.abs(logits).max()
    np.testing.assert_array_equal(np.asarray(result.success)[clear], misled[clear])
    margin = losses.margin(logits, labels) if targets is None else -losses.margin(logits, targets)
    np.testing.assert_allclose(result.loss, margin, rtol=1e-4, atol=1e-5 * np.abs(logits).max())
    failed = ~np.asarray(result.success)
    np.testing.assert_array_equal(adv_inputs[failed], np.asarray(inputs)[failed])


def counting_model():
    """Returns the golden model, and two lists that grow by one for each pass it makes."""
    forwards, backwards = [], []

    @jax.custom_vjp
    def logits_fn(inputs):
        jax.debug.callback(lambda: forwards.append(1))
        return toy.logits_fn(inputs)

    def forward(inputs):
        return logits_fn(inputs), inputs

    def backward(inputs, cotangent):
        # The argument makes a map over rows call once for each row.
        jax.debug.callback(lambda _: backwards.append(1), cotangent[0, 0])
        return jax.vjp(toy.logits_fn, inputs)[1](cotangent)

    logits_fn.defvjp(forward, backward)
    return logits_fn, forwards, backwards


@functools.cache
def linear(*case):
    """One model for each case: what has been compiled for it serves again."""
    return Linear(*case)


class Linear:
    """Linear models, where the smallest perturbation to class k has a closed form.

    It is ``(z_y - z_k) / |a_k - a_y|`` in the dual norm, far from the faces of the box.
    """

    CASES = ((1, (12,), 2), (3, (2, 2, 3), 4), (8, (12,), 3))

    def __init__(self, batch, shape, num_classes):
        rng = np.random.default_rng(batch)
        self.weights = rng.normal(size=(12, num_classes)).astype(np.float32)
        self.inputs = rng.uniform(0.45, 0.55, (batch, *shape)).astype(np.float32)
        # All logits are 0 at the centre of the box: the margins are small.
        self.biases = -self.weights.sum(axis=0) / 2
        self.labels = np.argmax(self.logits_fn(self.inputs), axis=1).astype(np.int32)

    def logits_fn(self, points):
        return points.reshape(len(points), -1) @ self.weights + self.biases[None]

    def radii(self, norm):
        """The distance ``[B, C]`` to each class; infinite to the label."""
        logits = self.logits_fn(self.inputs.astype(np.float64))
        rows = np.arange(len(self.labels))
        lead = logits[rows, self.labels][:, None] - logits
        weights = self.weights.T.astype(np.float64)
        slopes = weights[None] - weights[self.labels][:, None]
        lengths = np.linalg.norm(slopes, ord=DUAL_ORDERS[norm], axis=2)
        lengths[rows, self.labels], lead[rows, self.labels] = 1, np.inf
        assert np.all((lead / lengths).min(axis=1) < 0.35)  # the box does not matter
        return lead / lengths

    def attack(self, factory, norm, **options):
        return run(
            factory,
            norm,
            inputs=self.inputs,
            labels=self.labels,
            logits_fn=self.logits_fn,
            **options,
        )


class Properties:
    """Invariants of every such attack; a subclass says of which."""

    FACTORY = None
    NORM = "l2"
    OPTIONS = {}  # noqa: RUF012
    ALLOWED_COLLECTIVES = ()

    def run(self, **arguments):
        return run(type(self).FACTORY, self.NORM, **{**self.OPTIONS, **arguments})

    def attack(self, **options):
        return type(self).FACTORY(ThreatModel(self.NORM, 0.3), **{**self.OPTIONS, **options})

    def expected_counts(self, result):
        """Returns forwards, backwards of one attacked example for each, from the attack's doc."""
        raise NotImplementedError

    def test_result_is_consistent_with_the_model_at_any_epsilon(self):
        result = self.run(labels=WRONG)
        assert_consistent(result, self.NORM, toy.logits_fn, toy.INPUTS, WRONG)
        assert np.all(result.success)
        assert_same(self.run(labels=WRONG, epsilon=0.0), result, rtol=0, atol=0)

    def test_inputs_misclassified_already_stay_at_the_cost_of_one_look(self):
        result = self.run(labels=WRONG)
        np.testing.assert_array_equal(result.adv_inputs[1], toy.INPUTS[1])
        assert result.success[1]
        assert result.distance[1] == result.num_backwards[1] == result.num_zero_gradients[1] == 0
        assert result.num_forwards[1] == 1

    def test_inactive_examples_stay_at_no_cost(self):
        active = np.array([1, 0, 1, 0, 1, 1], bool)
        result = self.run(active=active)
        np.testing.assert_array_equal(result.adv_inputs[~active], toy.INPUTS[~active])
        np.testing.assert_array_equal(result.success, active)
        np.testing.assert_array_equal(np.asarray(result.num_forwards)[~active], 0)
        np.testing.assert_array_equal(np.asarray(result.num_backwards)[~active], 0)

    def test_the_model_runs_as_often_as_counted(self):
        logits_fn, forwards, backwards = counting_model()
        rows = slice(5, 6)
        result = self.run(inputs=toy.INPUTS[rows], labels=toy.LABELS[rows], logits_fn=logits_fn)
        jax.effects_barrier()
        assert result.num_backwards[0] > 0
        assert (len(forwards), len(backwards)) == (
            result.num_forwards[0],
            result.num_backwards[0],
        )

    def test_counts_are_those_of_the_docstring(self):
        result = self.run()
        forwards, backwards = self.expected_counts(result)
        np.testing.assert_array_equal(result.num_forwards, forwards)
        np.testing.assert_array_equal(result.num_backwards, backwards)
        np.testing.assert_array_equal(result.num_zero_gradients, np.zeros(6))

    def test_permuting_the_batch_permutes_the_result(self):
        order = np.array([4, 2, 0, 5, 1, 3])
        permuted = self.run(inputs=toy.INPUTS[order], labels=toy.LABELS[order])
        assert_same(permuted, jax.tree.map(lambda field: field[order], self.run()), 1e-6, 1e-6)

    def test_splitting_and_padding_the_batch_change_nothing(self):
        chunks = [np.array([0, 1, 2, 0, 0, 0]), np.array([3, 4, 5, 4, 4, 4])]
        parts = [self.run(inputs=toy.INPUTS[rows], labels=toy.LABELS[rows]) for rows in chunks]
        joined = jax.tree.map(lambda *fields: jnp.concatenate([f[:3] for f in fields]), *parts)
        assert_same(joined, self.run(), 1e-6, 1e-6)

    def test_sharded_over_devices_equals_one_device(self):
        rows = np.array([0, 1, 2, 3, 4, 5, 0, 1])
        mesh = Mesh(np.array(jax.devices()), ("batch",))
        assert mesh.size == 4
        batch = jax.device_put(
            (toy.INPUTS[rows], toy.LABELS[rows]), NamedSharding(mesh, PartitionSpec("batch"))
        )
        attack = functools.partial(self.attack(), toy.logits_fn, None)
        compiled = jax.jit(attack).lower(*batch).compile()
        result = compiled(*batch)
        assert not result.adv_inputs.sharding.is_fully_replicated
        for collective in ("all-reduce", "all-gather", "all-to-all", "collective-permute"):
            if collective not in self.ALLOWED_COLLECTIVES:
                assert collective not in compiled.as_text()
        local = jax.device_get(result)
        assert_same(jax.tree.map(lambda field: field[:6], local), jax.device_get(self.run()))

    def test_vmap_over_batches_equals_one_batch(self):
        stacked = jax.jit(jax.vmap(functools.partial(self.attack(), toy.logits_fn, None)))(
            toy.INPUTS.reshape(2, 3, -1), toy.LABELS.reshape(2, 3)
        )
        flat = jax.tree.map(lambda field: field.reshape(6, *field.shape[2:]), stacked)
        assert_same(flat, self.run())

    def test_a_constant_model_is_never_misled_and_every_gradient_is_zero(self):
        result = self.run(scale=0.0)
        # All logits are equal: class 0 is predicted.
        np.testing.assert_array_equal(result.success, toy.LABELS != 0)
        np.testing.assert_array_equal(result.adv_inputs, toy.INPUTS)
        np.testing.assert_array_equal(result.loss, np.zeros(6))
        np.testing.assert_array_equal(result.num_zero_gradients, result.num_backwards)
        assert np.all(np.asarray(result.num_backwards)[toy.LABELS == 0] > 0)

    @pytest.mark.parametrize("scale", [1e3, 1e30])
    def test_saturated_logits_give_no_nan(self, scale):
        result = self.run(scale=scale)
        assert_consistent(
            result, self.NORM, lambda x: scale * toy.logits_fn(x), toy.INPUTS, toy.LABELS
        )

    def test_pixels_on_the_faces_of_the_box(self):
        inputs = np.round(toy.INPUTS)
        labels = np.argmax(toy.logits_fn(inputs), axis=1).astype(np.int32)
        result = self.run(inputs=inputs, labels=labels)
        assert_consistent(result, self.NORM, toy.logits_fn, inputs, labels)

    def test_a_targeted_attack_reaches_its_targets_whatever_the_labels(self):
        result = self.run(targets=TARGETS)
        assert_consistent(result, self.NORM, toy.logits_fn, toy.INPUTS, toy.LABELS, targets=TARGETS)
        assert np.all(result.success)
        np.testing.assert_array_equal(result.adv_inputs[2], toy.INPUTS[2])
        assert result.num_backwards[2] == 0
        assert_same(self.run(targets=TARGETS, labels=WRONG), result, rtol=0, atol=0)

    def test_other_bounds(self):
        # The same model in other units: lengths and slopes change with them.
        bounds = (-1.0, 3.0)
        inputs = 4 * toy.INPUTS - 1

        def logits_fn(points):
            return toy.logits_fn((points + 1) / 4)

        result = self.run(inputs=inputs, logits_fn=logits_fn, bounds=bounds)
        assert_consistent(result, self.NORM, logits_fn, inputs, toy.LABELS, bounds)
        assert np.all(result.success)
        adv_inputs = np.asarray(result.adv_inputs)
        assert np.any((adv_inputs < -0.1) & (inputs < 0.1))
        assert np.any((adv_inputs > 1.5) & (adv_inputs != inputs))

    def test_no_gradient_flows_through_any_field(self):
        def total(inputs, first):
            def logits_fn(points):
                return jnp.tanh(points @ first) @ toy.SECOND

            result = self.attack()(logits_fn, None, inputs, toy.LABELS)
            return jnp.sum(result.adv_inputs**2) + jnp.sum(result.distance + result.loss)

        value, slopes = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(toy.INPUTS, toy.FIRST)
        assert np.isfinite(value)
        for slope in slopes:
            np.testing.assert_array_equal(slope, np.zeros_like(slope))

    def test_half_precision_inputs_give_no_nan(self):
        result = self.run(inputs=jnp.asarray(toy.INPUTS, jnp.bfloat16))
        assert result.adv_inputs.dtype == jnp.bfloat16
        assert np.all(np.isfinite(np.asarray(result.adv_inputs, np.float32)))
        np.testing.assert_allclose(result.distance, self.run().distance, rtol=0.2)

    def test_without_jit_the_result_is_the_same(self):
        assert_same(self.attack()(toy.logits_fn, None, toy.INPUTS, toy.LABELS), self.run())

    def test_a_start_is_refused(self):
        with pytest.raises(ValueError, match="start was given to an attack that always starts"):
            attack = functools.partial(self.attack(), toy.logits_fn, None)
            jax.eval_shape(functools.partial(attack, start=toy.INPUTS), toy.INPUTS, toy.LABELS)
