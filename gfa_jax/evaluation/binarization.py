"""The binarisation test: is an attack strong enough for a defended network?

A low success rate of an attack may mean a robust network or a weak attack. Here the answer is
known: for each image, the network's last layer is replaced by a linear head of two classes that has
an adversarial example inside the ball, planted there. It tells random points well inside the ball
(class 0, with the image itself) from a point at distance epsilon (class 1). An attack that often
finds no point of class 1 is too weak for this network, whatever robustness it reports.

    test = functools.partial(binarization.binarization_test, features_fn, attack)
    print(binarization.summary(jax.jit(test)(keys, inputs)))

Source: Zimmermann et al. 2022, arXiv 2206.13991, and the authors' code
(``active_tests/decision_boundary_binarization.py`` of google-research/active-adversarial-tests).
The heads differ in how they are solved and placed; see ``plant``.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gfa_jax import _validate, norms
from gfa_jax.attacks import base
from gfa_jax.attacks.ensemble import Ensemble
from gfa_jax.attacks.estimators import fold_in
from gfa_jax.attacks.runs import Attack
from gfa_jax.evaluation import logistic
from gfa_jax.threat import ThreatModel
from gfa_jax.types import Array, LogitsFn

FeaturesFn = Callable[[Array], Array]
"""``inputs [B, ...] -> features [B, ...]``, pure and deterministic, with parameters closed over:
what the last layer of the defended network sees. More than one axis is one vector."""

# The indices of an example's key.
_INNER, _BOUNDARY, _RANDOM_INSIDE, _RANDOM_BOUNDARY, _ATTACK = range(5)


class Heads(NamedTuple):
    """Linear heads, one for each example: ``(features - center) @ weights + bias``.

    The value is the margin of class 1 over class 0. Features are centred first, so that a small
    difference of large features is not lost in rounding.

    Attributes:
      center: float32 ``[B, F]``.
      weights: float32 ``[B, F]``.
      bias: float32 ``[B]``.
    """

    center: Array
    weights: Array
    bias: Array


class Problems(NamedTuple):
    """Binary problems with a planted solution, one for each example.

    Attributes:
      heads: of each example. Where none separates, one that says class 0 everywhere.
      planted: ``[B, ...]``, the planted adversarial example; of several, that of smallest margin.
      planted_distance: float32 ``[B]``, its threat norm: epsilon, or the largest that the box
        allows in the direction drawn.
      planted_margin: float32 ``[B]``, the margin of class 1 there: above 0 where separable.
      separable: bool ``[B]``, whether a head was found that separates; otherwise the example says
        nothing about an attack.
      random_margin: float32 ``[B]``, the largest margin of class 1 at random points of the ball.
      random_share: float32 ``[B]``, the share of these points that are class 1.
    """

    heads: Heads
    planted: Array
    planted_distance: Array
    planted_margin: Array
    separable: Array
    random_margin: Array
    random_share: Array


class BinarizationResult(NamedTuple):
    """What an attack made of the planted problems, one entry for each example.

    Attributes:
      success: bool ``[B]``, whether the attack found a point of class 1 within epsilon.
      random_success: bool ``[B]``, whether one of the random points was of class 1: the problem is
        easy.
      random_share: float32 ``[B]``, the share of random points of class 1.
      margin: float32 ``[B]``, the margin of class 1 at the point that the attack returned. An
        attack that returns the clean input where it failed shows the clean margin there.
      random_margin: float32 ``[B]``, the largest margin of class 1 at the random points.
      separable: bool ``[B]``; the other examples are not attacked, and count for nothing.
      planted_distance: float32 ``[B]``, how far away the planted point is.
      num_forwards: int32 ``[B]``, the attack's model evaluations.
    """

    success: Array
    random_success: Array
    random_share: Array
    margin: Array
    random_margin: Array
    separable: Array
    planted_distance: Array
    num_forwards: Array


def binarization_test(
    features_fn: FeaturesFn,
    attack: Attack | Ensemble,
    keys: Array,
    inputs: Array,
    **options: Any,
) -> BinarizationResult:
    """Plants a binary problem for each image and attacks it.

    Traceable. An example's result depends on its own key alone, not on the batch, up to the
    rounding of other batch sizes.

    Give the attack the options with which it judged the network. With two classes, the DLR losses
    have no third logit and fall back to the margin (``losses.dlr``); attacks that try several
    target classes have one to try.

    Args:
      features_fn: of the defended network.
      attack: from ``attacks.create``; its threat model is that of the test. Each example has a head
        of its own, so that the attack must leave the batch in order: those that set examples aside
        (``chunk_size`` below the batch size) are refused.
      keys: typed PRNG keys ``[B]``, one for each example (``attacks.example_keys``).
      inputs: float ``[B, ...]`` in the bounds. The whole batch is attacked at once.
      **options: of ``plant``.

    Raises:
      ValueError: for options out of range, keys or inputs that do not fit, and attacks on
        randomised models, on features or in chunks.
    """
    problems = plant(features_fn, attack.threat, keys, inputs, **options)
    return attack_problems(features_fn, attack, keys, inputs, problems)


def attack_problems(
    features_fn: FeaturesFn,
    attack: Attack | Ensemble,
    keys: Array,
    inputs: Array,
    problems: Problems,
) -> BinarizationResult:
    """Attacks planted problems; several attacks can share them. Traceable.

    Args:
      features_fn: as for ``plant``.
      attack: as for ``binarization_test``, of the threat model that the problems were planted in.
      keys: as for ``plant``.
      inputs: as for ``plant``.
      problems: from ``plant``.

    Raises:
      ValueError: for attacks on randomised models, on features or in chunks.
    """
    for part in attack.parts().values():
        if part.estimator.is_random or part.estimator.needs_features:
            raise ValueError(
                "attack is made for randomised models or looks at features, but the binary models "
                "are plain functions of the inputs: use an attack on logits, such as apgd-ce."
            )
    logits_fn = binary_logits(features_fn, problems.heads)
    labels = jnp.zeros(inputs.shape[0], jnp.int32)
    found = attack(logits_fn, fold_in(keys, _ATTACK), inputs, labels, active=problems.separable)
    success = found.success
    if attack.keep == "closest":
        success &= found.distance <= attack.threat.epsilon
    logits = logits_fn(found.adv_inputs)
    return BinarizationResult(
        success=success,
        random_success=problems.separable & (problems.random_share > 0),
        random_share=problems.random_share,
        margin=logits[:, 1] - logits[:, 0],
        random_margin=problems.random_margin,
        separable=problems.separable,
        planted_distance=problems.planted_distance,
        num_forwards=found.num_forwards,
    )


def summary(
    result: BinarizationResult, *, min_asr: float = 0.95
) -> dict[str, float | int | bool | None]:
    """Returns what a test says of an attack, as plain numbers.

    The entries: ``asr``, the share of problems that the attack solved; ``r_asr``, the share that
    random points solved, which should be low, since problems that chance solves say little;
    ``margin_gain``, the mean of ``margin - random_margin`` over the problems that the attack
    solved; ``n``, the problems; ``num_not_separable``, the examples left out, for which no head was
    found; ``adequate``, whether ``asr`` is at least ``min_asr``. What is asked of no problem is
    ``None``.

    Args:
      result: of one or more batches, concatenated.
      min_asr: below it an attack is too weak for the network, in [0, 1].

    Raises:
      ValueError: for a ``min_asr`` outside [0, 1].
    """
    _validate.fraction(min_asr=min_asr)
    host = jax.tree.map(np.asarray, result)

    def mean(values: np.ndarray, where: np.ndarray) -> float | None:
        return float(np.mean(values[where], dtype=np.float64)) if where.any() else None

    counted = host.separable
    asr = mean(host.success, counted)
    return {
        "asr": asr,
        "r_asr": mean(host.random_success, counted),
        "margin_gain": mean(host.margin - host.random_margin, counted & host.success),
        "n": int(counted.sum()),
        "num_not_separable": int((~counted).sum()),
        "adequate": None if asr is None else asr >= min_asr,
    }


def plant(
    features_fn: FeaturesFn,
    threat: ThreatModel,
    keys: Array,
    inputs: Array,
    *,
    num_inner: int = 999,
    num_boundary: int = 1,
    inner_radius: float = 0.95,
    closeness: float = 0.999,
    logit_range: float | Array = 1.0,
    num_draws: int = 10,
    num_random: int = 200,
    batch_size: int = 250,
) -> Problems:
    """Plants an adversarial example for each image.

    Class 0 are the image and random points within ``inner_radius * epsilon``, class 1 random points
    at distance epsilon (``boundary_points``). The head is the logistic regression that tells their
    features apart, both classes weighing the same, with a ridge too small to matter but where the
    classes do not separate. Its threshold is then moved to where the planted point is only just of
    class 1. Where no head separates, the planted point is drawn again, and at last given up.

    The authors' code solves with scikit-learn without ridge. Its ``decision_boundary_closeness``
    goes from the regression's own threshold to the planted point; here ``closeness`` goes from the
    largest inner score, which leaves all inner points in class 0 wherever that threshold lay.

    Examples are planted one after another, and features computed ``batch_size`` points at a time:
    memory does not grow with the batch but by the problems themselves. Traceable.

    Args:
      features_fn: of the defended network.
      threat: ball and box.
      keys: typed PRNG keys ``[B]``.
      inputs: float ``[B, ...]`` in the bounds.
      num_inner: points of class 0, the image included; at least 2.
      num_boundary: planted points. The threshold is that of the one of smallest score.
      inner_radius: of the inner points, as a share of epsilon, in (0, 1).
      closeness: where the threshold lies, from the largest inner score (0) to the planted point's
        score (1), in [0, 1). The closer to 1, the harder the problem; rounding of the features sets
        the limit.
      logit_range: range of the margin of class 1 over the points of a problem; a number or ``[B]``.
        Give the range of the network's own margins to see whether its scale disables an attack, as
        large logits do the cross-entropy (``rescale_logits="adaptive"`` of the authors).
      num_draws: times that planted points are drawn.
      num_random: random points that try to solve the problem by luck: so many in the ball
        (``ThreatModel.random_start``) and so many at distance epsilon. As many as the attack makes
        forward passes is a fair comparison.
      batch_size: points that the network sees at once.

    Raises:
      ValueError: for options out of range, and keys or inputs that do not fit.
    """
    _validate.positive_integer(
        num_inner=num_inner,
        num_boundary=num_boundary,
        num_draws=num_draws,
        num_random=num_random,
        batch_size=batch_size,
    )
    if num_inner < 2:
        raise ValueError(
            f"num_inner={num_inner} must be at least 2: the image and some random points."
        )
    _validate.positive(logit_range=logit_range)
    if not 0 < inner_radius < 1:
        raise ValueError(f"inner_radius={inner_radius!r} must be a number in (0, 1).")
    if not 0 <= closeness < 1:
        raise ValueError(f"closeness={closeness!r} must be a number in [0, 1).")
    size = inputs.shape[0]
    base.check_inputs(threat, inputs, np.zeros(size, np.int32))
    if keys is None or keys.shape != (size,):
        shape = None if keys is None else keys.shape
        raise ValueError(
            f"keys has shape {shape}; expected one typed key for each of the {size} examples "
            "(attacks.example_keys)."
        )
    inner_threat = dataclasses.replace(threat, epsilon=inner_radius * threat.epsilon)

    def draw_boundary(keys: Array, inputs: Array) -> Array:
        return boundary_points(threat, keys, inputs)

    def plant_one(arguments: tuple[Array, Array, Array]) -> Problems:
        key, clean, margin_range = arguments
        center = _flat_features(features_fn, clean[None])

        def features_of(draw: _DrawFn, key: Array, count: int) -> Array:
            """Returns centred features ``[count, F]`` of points that are not kept."""
            num_chunks = -(-count // batch_size)
            chunk = -(-count // num_chunks)
            keys = base.example_keys(key, jnp.arange(num_chunks * chunk))
            features = jax.lax.map(
                lambda some: _flat_features(features_fn, draw(some, _repeat(clean, chunk))),
                keys.reshape(num_chunks, chunk),
            )
            return features.reshape(num_chunks * chunk, -1)[:count] - center

        inner = features_of(
            inner_threat.random_start, jax.random.fold_in(key, _INNER), num_inner - 1
        )
        inner = jnp.concatenate([jnp.zeros_like(center), inner])
        boundary_key = jax.random.fold_in(key, _BOUNDARY)

        def draw(number: Array) -> _Draw:
            draw_key = jax.random.fold_in(boundary_key, number)
            keys = base.example_keys(draw_key, jnp.arange(num_boundary))
            points = draw_boundary(keys, _repeat(clean, num_boundary))
            outer = _flat_features(features_fn, points) - center
            weights, bias, margins, separable = logistic.fit_head(inner, outer, closeness)
            lowest = jnp.argmin(margins)
            return _Draw(number + 1, points[lowest], weights, bias, margins[lowest], separable)

        drawn = jax.lax.while_loop(
            lambda last: ~last.separable & (last.number < num_draws),
            lambda last: draw(last.number),
            _Draw(
                number=jnp.zeros((), jnp.int32),
                point=clean,
                weights=jnp.zeros_like(center[0]),
                bias=jnp.zeros_like(center[0, 0]),
                margin=jnp.zeros_like(center[0, 0]),
                separable=jnp.zeros((), bool),
            ),
        )
        weights = margin_range * jnp.where(drawn.separable, drawn.weights, 0)
        bias = margin_range * jnp.where(drawn.separable, drawn.bias, -1)

        def random_margins(draw: _DrawFn, index: int) -> Array:
            features = features_of(draw, jax.random.fold_in(key, index), num_random)
            return logistic.margins(features, weights[None], bias)

        luck = jnp.concatenate(
            [
                random_margins(threat.random_start, _RANDOM_INSIDE),
                random_margins(draw_boundary, _RANDOM_BOUNDARY),
            ]
        )
        return Problems(
            heads=Heads(center[0], weights, bias),
            planted=drawn.point,
            planted_distance=threat.distance(clean[None], drawn.point[None])[0].astype(jnp.float32),
            planted_margin=margin_range * jnp.where(drawn.separable, drawn.margin, -1),
            separable=drawn.separable,
            random_margin=jnp.max(luck),
            random_share=jnp.mean(luck > 0, dtype=jnp.float32),
        )

    inputs = jnp.asarray(inputs)
    ranges = jnp.broadcast_to(jnp.asarray(logit_range, jnp.float32), (size,))
    return jax.lax.stop_gradient(jax.lax.map(plant_one, (keys, inputs, ranges)))


_DrawFn = Callable[[Array, Array], Array]
"""``(keys [N], clean [N, ...]) -> points [N, ...]``."""


class _Draw(NamedTuple):
    """A planted point and its head: the number of draws so far, and what ``_fit_head`` returned."""

    number: Array
    point: Array
    weights: Array
    bias: Array
    margin: Array
    separable: Array


def binary_logits(features_fn: FeaturesFn, heads: Heads) -> LogitsFn:
    """Returns the binary models of a batch as one function of it.

    The logits are ``[-margin / 2, margin / 2]``.

    Args:
      features_fn: of the defended network.
      heads: ``[B, ...]``.

    Returns:
      ``inputs [B, ...] -> logits [B, 2]``, for the examples of the heads in their order. It raises
      ValueError for another number of examples.
    """

    def logits_fn(inputs: Array) -> Array:
        if inputs.shape[0] != heads.bias.shape[0]:
            raise ValueError(
                f"inputs hold {inputs.shape[0]} examples, but there are heads for "
                f"{heads.bias.shape[0]}: every example has a head of its own, so that an attack "
                "must leave the batch in order (no chunk_size)."
            )
        features = _flat_features(features_fn, inputs)
        margin = logistic.margins(features - heads.center, heads.weights, heads.bias)
        return jnp.stack([-margin / 2, margin / 2], axis=1)

    return logits_fn


_LARGEST_EXPONENT = 24
_NUM_BISECTIONS = 40


def boundary_points(threat: ThreatModel, keys: Array, inputs: Array) -> Array:
    """Draws a point of the box at distance epsilon for each example.

    A random direction (l_inf: uniform in the cube, l_2: normal, l_1: Laplace, so that those of the
    last two are uniform on the sphere) is scaled until, after clipping to the box, the perturbation
    has norm epsilon. The scale is found by bisection of its exponent, within about 1e-6.

    Args:
      threat: ball and box.
      keys: typed PRNG keys ``[B]``; each example uses only its own.
      inputs: clean inputs ``[B, ...]`` inside the bounds.

    Returns:
      ``[B, ...]``, not beyond epsilon up to rounding, and as far as the box allows in the direction
      drawn where that is less.
    """
    lower, upper = threat.bounds
    sample = _SAMPLERS[threat.norm]
    directions = jax.vmap(lambda key: sample(key, inputs.shape[1:], inputs.dtype))(keys)
    length = norms.vector_norm(directions, threat.norm)
    directions = directions / norms.expand(jnp.where(length > 0, length, 1), directions)

    def scaled(exponent: Array) -> Array:
        step = norms.expand((threat.epsilon * 2**exponent).astype(inputs.dtype), inputs)
        return jnp.clip(inputs + step * directions, lower, upper)

    def is_inside(exponent: Array) -> Array:
        return threat.distance(inputs, scaled(exponent)) <= threat.epsilon

    def bisect(_: int, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bracket
        middle = (low + high) / 2
        inside = is_inside(middle)
        return jnp.where(inside, middle, low), jnp.where(inside, high, middle)

    # Half of epsilon is inside whatever the rounding. Clipping only shortens.
    low = jnp.full(inputs.shape[0], -1, jnp.float32)
    high = jnp.full(inputs.shape[0], _LARGEST_EXPONENT, jnp.float32)
    low, high = jax.lax.fori_loop(0, _NUM_BISECTIONS, bisect, (low, high))
    return scaled(low)


_SAMPLERS: dict[str, Callable[..., Array]] = {
    "linf": lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -1, 1),
    "l2": jax.random.normal,
    "l1": jax.random.laplace,
}


def _repeat(example: Array, count: int) -> Array:
    return jnp.broadcast_to(example[None], (count, *example.shape))


def _flat_features(features_fn: FeaturesFn, inputs: Array) -> Array:
    return norms.flatten(features_fn(inputs)).astype(jnp.float32)
