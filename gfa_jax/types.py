"""The type aliases of the library: its architecture on one screen.

A classifier is seen at three levels, each a plain function:

* ``LogitsFn`` -- all that an attack knows: ``inputs -> logits``.
* ``ApplyFn`` -- what feature gradients need: ``(taps, inputs) -> (logits, features)``. ``taps`` is
  a dict of additive zeros, one for each tapped feature and of its shape, or ``{}`` for none. The
  gradient with respect to a tap is the gradient with respect to the feature.
* ``ModelFn`` -- what a training objective needs: the same with parameters, a mode, and the state
  that a forward pass updates.

An ``Objective`` turns a ``ModelFn`` into a scalar to minimise. With the model bound,
``functools.partial(objective, model)`` is the function ``(params, batch, key) -> (loss, aux)`` that
``jax.value_and_grad(..., has_aux=True)`` takes.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax

Array = jax.Array
PyTree = Any
Params = PyTree
ModelState = PyTree
"""State that a forward pass in training mode updates, such as BatchNorm statistics; ``{}`` for
none."""

Features = dict[str, Array]
"""Tapped values by tap name, each of shape ``[B, ...]``."""
Taps = dict[str, Array]
"""Additive zeros by tap name; ``{}`` for none, otherwise the names and shapes of the features."""
Metrics = dict[str, Array]
"""Scalars by name, as ``train/...`` in the logs."""
Batch = Mapping[str, Array]
"""``inputs`` float ``[B, H, W, C]`` in bounds, ``labels`` int32 ``[B]``; more keys are allowed and
ignored."""

LogitsFn = Callable[[Array], Array]
"""``inputs [B, ...] -> logits [B, C]``, pure, with parameters and mode closed over."""
LossFn = Callable[[Array, Array], Array]
"""``(logits [B, C], labels [B]) -> loss [B]``: per example, without reduction. Attacks maximise it,
training minimises it."""
TargetedLossFn = Callable[[Array, Array, Array], Array]
"""``(logits [B, C], labels [B], targets [B]) -> loss [B]``: larger is closer to the target."""
ApplyFn = Callable[[Taps, Array], tuple[Array, Features]]
"""``(taps, inputs [B, ...]) -> (logits [B, C], features)``."""


class ModelFn(Protocol):
    """A classifier as objectives see it."""

    def __call__(
        self, params: Params, taps: Taps, inputs: Array, *, train: bool
    ) -> tuple[tuple[Array, Features], ModelState]:
        """Returns ``((logits [B, C], features), updated model state)``."""
        ...


class Aux(NamedTuple):
    """What an objective returns beside its loss."""

    metrics: Metrics
    model_state: ModelState


class Objective(Protocol):
    """A training objective: pure, traceable, differentiable with respect to ``params``."""

    def __call__(
        self, model: ModelFn, params: Params, batch: Batch, key: Array
    ) -> tuple[Array, Aux]:
        """Returns the scalar loss of the batch (a mean over its examples) and ``Aux``."""
        ...


class AttackResult(NamedTuple):
    """What an attack found, one entry for each example. No gradient flows through any field.

    Attributes:
      adv_inputs: ``[B, ...]``, inside the box, and inside the ball unless the attack looks for the
        smallest perturbation. An attack that keeps the best point gives the clean input where it
        failed.
      success: bool ``[B]``, whether the model is misled at ``adv_inputs``: ``argmax logits !=
        labels``, or ``== targets`` for a targeted attack. True at distance 0 where the clean input
        misleads it already. An attack that looks for the smallest perturbation succeeds at any
        distance.
      distance: float32 ``[B]``, the threat norm of ``adv_inputs - inputs``.
      loss: float32 ``[B]``, the attack's own loss: of ``adv_inputs`` where it succeeded, otherwise
        the largest seen. Auto-PGD gives the largest seen in either case.
      num_forwards: int32 ``[B]``, model evaluations spent on the example.
      num_backwards: int32 ``[B]``, gradient evaluations spent on the example; a Jacobian counts one
        for each row.
      num_zero_gradients: int32 ``[B]``, gradient evaluations that gave exactly zero everywhere: a
        sign of saturation or masking.
      members: for an ensemble, bool ``[B]`` for each attack by name: whether this attack broke the
        example, which those before it did not. Otherwise empty.
    """

    adv_inputs: Array
    success: Array
    distance: Array
    loss: Array
    num_forwards: Array
    num_backwards: Array
    num_zero_gradients: Array
    members: dict[str, Array]


class AttackFn(Protocol):
    """An attack: pure and traceable, closed over its threat model and options."""

    def __call__(
        self,
        logits_fn: LogitsFn,
        keys: Array | None,
        inputs: Array,
        labels: Array,
        *,
        targets: Array | None = None,
        start: Array | None = None,
        active: Array | None = None,
    ) -> AttackResult:
        """Attacks each example on its own.

        Args:
          logits_fn: the model under attack.
          keys: typed PRNG keys ``[B]``, one for each example (``attacks.example_keys``); ``None``
            for an attack that draws nothing.
          inputs: float ``[B, ...]`` in the threat model's bounds.
          labels: int32 ``[B]``, the true classes.
          targets: int32 ``[B]``: the attack is a targeted one and succeeds only where the model
            predicts these classes.
          start: ``[B, ...]``, where to start instead of at the clean input or a random point, such
            as adversarial examples of another model.
          active: bool ``[B]``, the examples to attack; the others come back clean, without success
            and at no count.
        """
        ...
