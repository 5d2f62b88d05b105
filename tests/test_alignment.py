"""Alignment, penalties and the radial/tangential split against closed forms and float64."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from gfa_jax import alignment, losses, taps

NORMS = ("linf", "l2", "l1")


def draw(key, shape=(5, 3, 4)):
    left, right = jax.random.split(key)
    return jax.random.normal(left, shape), jax.random.normal(right, shape)


def test_opposite_gradient_is_aligned_and_equal_gradient_is_anti_aligned(key):
    feature, _ = draw(key)
    chex.assert_trees_all_close(alignment.alignment(feature, -3 * feature), jnp.ones(5), rtol=1e-6)
    chex.assert_trees_all_close(alignment.alignment(feature, feature / 7), -jnp.ones(5), rtol=1e-6)


def test_orthogonal_gradient_has_no_alignment():
    feature = jnp.array([[1.0, 0.0, 2.0]])
    assert alignment.alignment(feature, jnp.array([[2.0, 5.0, -1.0]]))[0] == 0


def test_linf_alignment_is_one_exactly_for_multiples_of_the_gradient_sign(key):
    _, grads = draw(key)
    chex.assert_trees_all_close(
        alignment.alignment(-0.3 * jnp.sign(grads), grads, "linf"), jnp.ones(5), rtol=1e-6
    )
    almost = (-0.3 * jnp.sign(grads)).at[:, 0, 0].multiply(0.5)
    assert np.all(alignment.alignment(almost, grads, "linf") < 1 - 1e-4)


@pytest.mark.parametrize("norm", NORMS)
def test_matches_a_float64_reference(key, norm):
    features, grads = draw(key)
    order = {"linf": np.inf, "l2": 2, "l1": 1}[norm]
    dual = {"linf": 1, "l2": 2, "l1": np.inf}[norm]
    h, g = (np.asarray(v, np.float64).reshape(5, -1) for v in (features, grads))
    expected = (
        -np.sum(h * g, axis=1)
        / np.linalg.norm(h, ord=order, axis=1)
        / np.linalg.norm(g, ord=dual, axis=1)
    )
    chex.assert_trees_all_close(alignment.alignment(features, grads, norm), expected, rtol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31 - 1), st.sampled_from(NORMS), st.floats(-30, 30), st.floats(-30, 30))
def test_bounded_and_scale_invariant(seed, norm, log_feature_scale, log_grad_scale):
    features, grads = draw(jax.random.key(seed), (4, 6))
    value = alignment.alignment(features, grads, norm)
    assert np.all(np.abs(value) <= 1 + 1e-6)
    scaled = alignment.alignment(10**log_feature_scale * features, 10**log_grad_scale * grads, norm)
    chex.assert_trees_all_close(scaled, value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("form", ["linear", "log", "squared", "absolute"])
def test_zero_features_and_gradients_give_zero_alignment_and_finite_derivatives(norm, form):
    zero, one = jnp.zeros((2, 4)), jnp.ones((2, 4))
    for features, grads in ((zero, one), (one, zero), (zero, zero)):
        chex.assert_trees_all_equal(alignment.alignment(features, grads, norm), jnp.zeros(2))
        slopes = jax.grad(
            lambda h, g: jnp.sum(alignment.penalty(h, g, form=form, norm=norm)), argnums=(0, 1)
        )(features, grads)
        assert all(np.all(slope == 0) for slope in slopes)


def test_low_precision_inputs_are_computed_in_float32(key):
    features, grads = draw(key, (4, 512))
    low = alignment.alignment(features.astype(jnp.bfloat16), grads.astype(jnp.bfloat16))
    assert low.dtype == jnp.float32
    chex.assert_trees_all_close(low, alignment.alignment(features, grads), atol=2e-3)


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("linear", lambda a: 1 - a),
        ("log", lambda a: -np.log(np.log1p(np.exp(20 * a)) / 20)),
        ("squared", lambda a: 1 - a**2),
        ("absolute", lambda a: 1 - np.abs(a)),
    ],
)
def test_penalty_forms(key, form, expected):
    features, grads = draw(key)
    cosine = np.asarray(alignment.alignment(features, grads), np.float64)
    chex.assert_trees_all_close(
        alignment.penalty(features, grads, form=form), expected(cosine), rtol=1e-5
    )


@pytest.mark.parametrize("form", ["linear", "log", "squared", "absolute"])
def test_nothing_is_asked_above_the_ceiling(key, form):
    features, grads = draw(key)
    cosine = np.asarray(alignment.alignment(features, grads))
    size = np.abs(cosine) if form in ("squared", "absolute") else cosine
    ceiling = float(np.quantile(size, 0.75))

    def penalty(grads, ceiling):
        return alignment.penalty(features, grads, form=form, ceiling=ceiling)

    above = size > ceiling
    assert ceiling > 0
    assert above.any()
    chex.assert_trees_all_close(penalty(grads, ceiling)[~above], penalty(grads, 1.0)[~above])
    # Above it, all have the penalty of the ceiling.
    assert np.ptp(penalty(grads, ceiling)[above]) == 0
    assert np.all(penalty(grads, ceiling)[above] > penalty(grads, 1.0)[above])
    slopes = jax.grad(lambda grads: penalty(grads, ceiling).sum())(grads)
    moves = np.abs(slopes).reshape(len(size), -1).sum(axis=1)
    assert np.all(moves[above] == 0)
    assert np.all(moves[size < ceiling] > 0)


def test_tangential_penalty_is_the_length_of_the_tangential_gradient_times_that_of_the_feature():
    features, grads = jnp.array([[3.0, 0.0]]), jnp.array([[7.0, 2.0]])
    chex.assert_trees_all_close(
        alignment.penalty(features, grads, form="tangential"), jnp.array([6.0])
    )


def test_split_is_orthogonal_and_complete(key):
    vectors, reference = draw(key)
    radial, tangential = alignment.radial_tangential(vectors, reference)
    chex.assert_trees_all_close(radial + tangential, vectors, atol=1e-6)
    chex.assert_trees_all_close(
        jnp.sum(tangential * reference, axis=(1, 2)), jnp.zeros(5), atol=1e-5
    )
    share = alignment.tangential_share(vectors, reference)
    cosine = alignment.alignment(reference, vectors)
    chex.assert_trees_all_close(share, 1 - cosine**2, atol=1e-5)


def test_split_at_a_zero_reference_is_all_tangential():
    vectors = jnp.ones((2, 3))
    radial, tangential = alignment.radial_tangential(vectors, jnp.zeros((2, 3)))
    chex.assert_trees_all_equal(radial, jnp.zeros((2, 3)))
    chex.assert_trees_all_equal(tangential, vectors)
    chex.assert_trees_all_equal(
        alignment.tangential_share(jnp.zeros((2, 3)), vectors), jnp.zeros(2)
    )


@pytest.mark.parametrize("form", alignment.FORMS)
@pytest.mark.parametrize("norm", NORMS)
def test_derivatives_agree_with_float64_differences(key, form, norm):
    if form == "tangential" and norm != "l2":
        pytest.skip("defined for l2 alone")
    with jax.enable_x64(True):
        features, grads = (v.astype(jnp.float64) for v in draw(key, (3, 5)))
        check_grads(
            lambda h, g: alignment.penalty(h, g, form=form, norm=norm),
            (features, grads),
            order=2,
            modes=["rev"],
            eps=1e-6,
            atol=1e-4,
            rtol=1e-4,
        )


def bias_free_network(key, depth=3, width=16, inputs=8, classes=4):
    """Returns ``apply_fn`` of a random ReLU network without biases, with a tap on every layer's
    input."""
    keys = jax.random.split(key, depth + 1)
    sizes = [inputs] + [width] * depth
    weights = [
        jax.random.normal(k, (m, n)) / np.sqrt(m)
        for k, m, n in zip(keys, sizes, [*sizes[1:], classes], strict=True)
    ]

    def apply_fn(tap_values, inputs):
        features = {}
        hidden = inputs
        for index, weight in enumerate(weights):
            hidden = hidden + tap_values.get(f"h{index}", 0)
            features[f"h{index}"] = hidden
            hidden = hidden @ weight
            if index < len(weights) - 1:
                hidden = jax.nn.relu(hidden)
        return hidden, features

    return apply_fn


def test_radius_identity_of_homogeneous_networks(key):
    """Euler's theorem: ``<h, -grad margin> = margin``, so that ``margin / |g|_q = |h|_p a``."""
    network_key, input_key, label_key = jax.random.split(key, 3)
    apply_fn = bias_free_network(network_key)
    inputs = jax.random.normal(input_key, (20, 8))
    labels = jax.random.randint(label_key, (20,), 0, 4)
    logits, features, grads = taps.feature_gradients(apply_fn, inputs, labels, target="margin")
    margin = -losses.margin(logits, labels)
    for name in features:
        inner = -jnp.sum(features[name] * grads[name], axis=1)
        chex.assert_trees_all_close(inner, margin, rtol=1e-4, atol=1e-5)
        for norm, order, dual in (("l2", 2, 2), ("linf", np.inf, 1)):
            radius = margin / jnp.linalg.norm(grads[name], ord=dual, axis=1)
            size = jnp.linalg.norm(features[name], ord=order, axis=1)
            chex.assert_trees_all_close(
                size * alignment.alignment(features[name], grads[name], norm),
                radius,
                rtol=1e-4,
                atol=1e-5,
            )


def test_radial_degree_tells_homogeneous_from_normalised_features(key):
    apply_fn = bias_free_network(key)
    inputs = jax.random.normal(key, (6, 8))
    labels = jnp.zeros(6, jnp.int32)

    def degree(apply_fn, name):
        first = lambda logits, labels: logits[:, 0]  # noqa: E731
        logits, features, grads = taps.feature_gradients(apply_fn, inputs, labels, target=first)
        return alignment.radial_degree(features[name], grads[name], logits[:, 0])

    chex.assert_trees_all_close(degree(apply_fn, "h0"), jnp.ones(6), rtol=1e-4)

    def normalised(tap_values, inputs):
        shifted = inputs + tap_values.get("before", 0)
        unit = shifted / jnp.linalg.norm(shifted, axis=1, keepdims=True)
        return apply_fn({}, unit)[0], {"before": shifted}

    chex.assert_trees_all_close(degree(normalised, "before"), jnp.zeros(6), atol=1e-4)
    assert np.isnan(alignment.radial_degree(inputs, inputs, jnp.zeros(6))).all()


def test_bad_arguments_name_the_argument_and_what_is_valid():
    ones = jnp.ones((2, 3))
    with pytest.raises(ValueError, match=r"norm='l3' is not one of \['l1', 'l2', 'linf'\]"):
        alignment.alignment(ones, ones, "l3")
    with pytest.raises(ValueError, match=r"ceiling=1.5 must lie in \(0, 1\]"):
        alignment.penalty(ones, ones, ceiling=1.5)
    with pytest.raises(ValueError, match="ceiling=0.5: the form 'tangential' has none"):
        alignment.penalty(ones, ones, form="tangential", ceiling=0.5)
    with pytest.raises(ValueError, match=r"form='logg'.*Did you mean 'log'"):
        alignment.penalty(ones, ones, form="logg")
    with pytest.raises(ValueError, match="'tangential' is defined for the norm 'l2' alone"):
        alignment.penalty(ones, ones, form="tangential", norm="linf")
    with pytest.raises(AssertionError):
        alignment.alignment(ones, jnp.ones((1, 3)))
