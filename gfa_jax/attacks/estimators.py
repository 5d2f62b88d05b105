"""Where an attack gets its gradients from: the model itself, or an average of noisy passes.

``EXACT`` differentiates the model. The others look through a defence that hides its gradient:
randomness (``expectation``), a noisy loss surface (``noise_averaged``), a part that cannot be
differentiated (``surrogate``). Success is judged on the model itself, whatever the gradient.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gfa_jax import _validate
from gfa_jax.attacks import base
from gfa_jax.types import Array, LogitsFn

Model = Any
"""What the attack is called with: ``logits_fn``, or what the estimator asks for instead."""


EvaluateFn = Callable[[Model, base.Goal, Array, Array | None], base.Evaluation]
"""``(model, goal, inputs, keys) -> Evaluation``; keys ``[B]`` are fresh at every call."""


class Estimator(NamedTuple):
    """How an attack sees a model.

    Attributes:
      logits: ``(model, inputs, keys) -> logits [B, C]``, on which success is judged.
      evaluate: loss, success and gradient, ``(model, goal, inputs, keys) -> Evaluation``.
      num_forwards: passes of one ``evaluate``.
      num_backwards: gradients of one ``evaluate``.
      num_judging: passes of one ``logits``.
      needs_keys: whether it draws.
      is_random: whether the model itself does, so that a success on the way may be luck.
      needs_features: whether the model is an ``ApplyFn`` instead of a ``LogitsFn``.
    """

    logits: Callable[[Model, Array, Array | None], Array]
    evaluate: EvaluateFn
    num_forwards: int = 1
    num_backwards: int = 1
    num_judging: int = 1
    needs_keys: bool = False
    is_random: bool = False
    needs_features: bool = False


_JUDGING = 2**31 - 1
"""The key index of the passes that judge a point, which no sample of a gradient uses."""


def fold_in(keys: Array, index: int | Array) -> Array:
    """Returns new keys ``[B]`` for one and the same index."""
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, index)


def _exact_logits(logits_fn: LogitsFn, inputs: Array, keys: Array | None) -> Array:
    return logits_fn(inputs)


def _exact_evaluate(
    logits_fn: LogitsFn, goal: base.Goal, inputs: Array, keys: Array | None
) -> base.Evaluation:
    return base.evaluate(logits_fn, goal, inputs)


EXACT = Estimator(_exact_logits, _exact_evaluate)
"""The model's own gradient."""


def _average(
    num_samples: int, sample: Callable[[Array], base.Evaluation], keys: Array
) -> base.Evaluation:
    """Averages gradients over samples; loss and success are those of the last one.

    So it is in AutoAttack's APGD (``eot_iter``).
    """

    def add(index: Array, carry: base.Evaluation) -> base.Evaluation:
        here = sample(fold_in(keys, index))
        return here._replace(gradient=carry.gradient + here.gradient)

    first = sample(fold_in(keys, 0))
    total = jax.lax.fori_loop(1, num_samples, add, first)
    return total._replace(gradient=total.gradient / num_samples)


def expectation(num_samples: int = 20) -> Estimator:
    """Expectation over transformation, for randomised models (Athalye et al. 2018, 1802.00420).

    The model is ``logits_fn(inputs [B, ...], keys [B]) -> logits``, and draws from the keys. The
    gradient is the mean over samples, loss and success on the way are those of the last sample
    (AutoAttack's ``eot_iter``). Final success is judged on the mean logits of ``num_samples`` new
    passes: a single pass would count lucky draws.

    Args:
      num_samples: passes for each gradient.

    Raises:
      ValueError: for a number of samples that is not an integer >= 1.
    """
    _validate.positive_integer(num_samples=num_samples)

    def logits(model: Model, inputs: Array, keys: Array | None) -> Array:
        assert keys is not None
        # Not the draws of a gradient that was given the same keys.
        keys = fold_in(keys, _JUDGING)

        def add(index: Array, total: Array) -> Array:
            return total + model(inputs, fold_in(keys, index))

        total = jax.lax.fori_loop(1, num_samples, add, model(inputs, fold_in(keys, 0)))
        return total / num_samples

    def evaluate(
        model: Model, goal: base.Goal, inputs: Array, keys: Array | None
    ) -> base.Evaluation:
        assert keys is not None

        def sample(keys: Array) -> base.Evaluation:
            return base.evaluate(lambda inputs: model(inputs, keys), goal, inputs)

        return _average(num_samples, sample, keys)

    return Estimator(
        logits,
        evaluate,
        num_forwards=num_samples,
        num_backwards=num_samples,
        num_judging=num_samples,
        needs_keys=True,
        is_random=True,
    )


def noise_averaged(num_samples: int = 20, *, scale: float = 0.02) -> Estimator:
    """Gradients averaged over Gaussian noise on the input, for noisy loss surfaces.

    Loss and success are those of the point without noise, in a pass of their own.

    Args:
      num_samples: noisy gradients for each step.
      scale: standard deviation of the noise in input units, > 0.

    Raises:
      ValueError: for options out of range.
    """
    _validate.positive_integer(num_samples=num_samples)
    _validate.positive(scale=scale)

    def evaluate(
        logits_fn: Model, goal: base.Goal, inputs: Array, keys: Array | None
    ) -> base.Evaluation:
        assert keys is not None

        def sample(keys: Array) -> base.Evaluation:
            draw = lambda key: jax.random.normal(key, inputs.shape[1:], inputs.dtype)  # noqa: E731
            return base.evaluate(logits_fn, goal, inputs + scale * jax.vmap(draw)(keys))

        gradient = _average(num_samples, sample, keys).gradient
        logits = logits_fn(inputs)
        return base.Evaluation(
            goal.loss(logits).astype(jnp.float32), goal.reached(logits), gradient
        )

    return Estimator(_exact_logits, evaluate, num_samples + 1, num_samples, needs_keys=True)


def surrogate(surrogate_logits_fn: LogitsFn) -> Estimator:
    """Gradients of another model at the same point (BPDA, Athalye et al. 2018, 1802.00420).

    The other model may be an undefended twin, or the model itself with smooth activations.

    Args:
      surrogate_logits_fn: differentiable, of the same classes.
    """

    def evaluate(
        logits_fn: Model, goal: base.Goal, inputs: Array, keys: Array | None
    ) -> base.Evaluation:
        logits = logits_fn(inputs)
        gradient = base.evaluate(surrogate_logits_fn, goal, inputs).gradient
        return base.Evaluation(
            goal.loss(logits).astype(jnp.float32), goal.reached(logits), gradient
        )

    return Estimator(_exact_logits, evaluate, num_forwards=2)
