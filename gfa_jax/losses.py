"""Per-example classification losses without reduction.

Every loss takes ``logits [B, C]`` and ``labels [B]`` (int, in [0, C)) and returns float ``[B]``. A
larger value is worse for the classifier: attacks maximise these functions and training minimises
them. Logits are read in float32 or wider.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from gfa_jax import _validate, norms
from gfa_jax.types import Array, LossFn, TargetedLossFn


def _at(logits: Array, labels: Array) -> Array:
    return jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]


def _without(logits: Array, labels: Array) -> Array:
    """Returns the logits with those of the labels at minus infinity."""
    is_label = jnp.arange(logits.shape[1])[None, :] == labels[:, None]
    return jnp.where(is_label, -jnp.inf, logits)


def cross_entropy(logits: Array, labels: Array) -> Array:
    """Returns ``-log softmax(logits)_y``.

    Its gradient vanishes in float32 once the margin passes about 100.
    """
    return optax.losses.softmax_cross_entropy_with_integer_labels(norms.wide(logits), labels)


def log_odds(logits: Array, labels: Array) -> Array:
    """Returns ``logsumexp_{k != y} z_k - z_y``, the logit of being wrong.

    Its gradient has the direction of the cross-entropy's (``grad CE = (1 - p_y) grad log_odds``)
    but does not vanish as ``p_y -> 1``.
    """
    logits = norms.wide(logits)
    return jax.nn.logsumexp(_without(logits, labels), axis=1) - _at(logits, labels)


def margin(logits: Array, labels: Array) -> Array:
    """Returns ``max_{k != y} z_k - z_y``: positive where misclassified, 0 at a tie."""
    logits = norms.wide(logits)
    return jnp.max(_without(logits, labels), axis=1) - _at(logits, labels)


def _largest(logits: Array, count: int) -> list[Array]:
    """Returns the ``count`` largest logits of each example, largest first, each ``[B]``.

    Not ``lax.top_k``: XLA does not partition it, so that every device would gather the whole batch.
    """
    classes = jnp.arange(logits.shape[1])[None, :]
    found = []
    for _ in range(count):
        is_largest = classes == jnp.argmax(logits, axis=1)[:, None]
        found.append(jnp.sum(jnp.where(is_largest, logits, 0), axis=1))
        logits = jnp.where(is_largest, -jnp.inf, logits)
    return found


def class_difference(logits: Array, labels: Array, others: Array) -> Array:
    """Returns ``z_k - z_y`` for the classes ``k = others [B]``."""
    logits = norms.wide(logits)
    return _at(logits, others) - _at(logits, labels)


def dlr(logits: Array, labels: Array) -> Array:
    """Returns the difference-of-logits-ratio loss, invariant to shift and scale of the logits.

    ``(max_{k != y} z_k - z_y) / (z_(1) - z_(3) + 1e-12)`` (Croce & Hein 2020, arXiv 2003.01208, eq.
    6). With two classes there is no third logit and the ratio would be constant, so the margin is
    returned, as a fall-back of this library's own.
    """
    logits = norms.wide(logits)
    if logits.shape[1] < 3:
        return margin(logits, labels)
    first, _, third = _largest(logits, 3)
    return margin(logits, labels) / (first - third + 1e-12)


def dlr_targeted(logits: Array, labels: Array, targets: Array) -> Array:
    """Returns the targeted DLR loss ``-(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2 + 1e-12)``.

    Source: Croce & Hein 2020, arXiv 2003.01208, eq. 7. With three classes the denominator is
    ``z_(1) - z_(3)``, with two it is 1: fall-backs of this library's own.
    """
    logits = norms.wide(logits)
    difference = class_difference(logits, labels, targets)
    num_classes = logits.shape[1]
    if num_classes < 3:
        return difference
    first, _, third, *fourth = _largest(logits, min(4, num_classes))
    lower = (third + fourth[0]) / 2 if fourth else third
    return difference / (first - lower + 1e-12)


def kl(logits: Array, reference_logits: Array) -> Array:
    """Returns ``KL(softmax(reference_logits) || softmax(logits))``, both ``[B, C]``.

    It is the inner and the outer loss of TRADES.
    """
    log_probs = jax.nn.log_softmax(norms.wide(logits))
    reference_log_probs = jax.nn.log_softmax(norms.wide(reference_logits))
    return optax.losses.kl_divergence_with_log_targets(log_probs, reference_log_probs)


def sample_other_classes(key: Array, labels: Array, num_classes: int) -> Array:
    """Draws for each example a class other than its label, uniformly.

    Args:
      key: one typed PRNG key for the batch.
      labels: int ``[B]``.
      num_classes: at least 2.

    Returns:
      int ``[B]`` with ``others != labels``.

    Raises:
      ValueError: for fewer than two classes.
    """
    _validate_other_classes(num_classes)
    return (
        labels + jax.random.randint(key, labels.shape, 1, num_classes, labels.dtype)
    ) % num_classes


def sample_confused_classes(key: Array, logits: Array, labels: Array) -> Array:
    """Draws for each example a class other than its label, as probable as the logits make it.

    Class ``k`` has the probability ``p_k / (1 - p_y)``, of which the log-odds' gradient is the
    mean: ``grad log_odds = E_k grad (z_k - z_y)``.

    Args:
      key: one typed PRNG key for the batch.
      logits: ``[B, C]`` of at least 2 classes.
      labels: int ``[B]``.

    Returns:
      int ``[B]`` with ``others != labels``, in the labels' dtype.

    Raises:
      ValueError: for fewer than two classes.
    """
    _validate_other_classes(logits.shape[1])
    others = jax.random.categorical(key, _without(norms.wide(logits), labels), axis=1)
    return others.astype(labels.dtype)


def _validate_other_classes(num_classes: int) -> None:
    if num_classes < 2:
        raise ValueError(f"num_classes={num_classes} must be at least 2 to draw another class.")


LOSSES: dict[str, LossFn] = {
    "cross_entropy": cross_entropy,
    "log_odds": log_odds,
    "margin": margin,
    "dlr": dlr,
}
"""The losses of ``(logits, labels)`` by name."""


def _towards_targets(loss_fn: LossFn) -> TargetedLossFn:
    """Minimising the loss with the target as the label is what a targeted attack wants."""
    return lambda logits, labels, targets: -loss_fn(logits, targets)


TARGETED_LOSSES: dict[str, TargetedLossFn] = {
    "cross_entropy": _towards_targets(cross_entropy),
    "log_odds": _towards_targets(log_odds),
    "margin": _towards_targets(margin),
    "dlr": dlr_targeted,
}
"""The losses of ``(logits, labels, targets)`` by name: larger is closer to the target class."""


def get_targeted(loss: str | LossFn) -> TargetedLossFn:
    """Returns the targeted form of a loss.

    That of a function ``loss(logits, labels)`` is ``-loss(logits, targets)``.

    Raises:
      ValueError: for an unknown name.
    """
    if isinstance(loss, Callable):  # type: ignore[arg-type]
        return _towards_targets(loss)  # type: ignore[arg-type]
    _validate.one_of(TARGETED_LOSSES, loss=loss)
    return TARGETED_LOSSES[loss]  # type: ignore[index]


def get(loss: str | LossFn) -> LossFn:
    """Returns a loss by name; a function passes through.

    Raises:
      ValueError: for an unknown name.
    """
    if isinstance(loss, Callable):  # type: ignore[arg-type]
        return loss  # type: ignore[return-value]
    _validate.one_of(LOSSES, loss=loss)
    return LOSSES[loss]  # type: ignore[index]
