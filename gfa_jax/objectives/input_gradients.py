"""Cross-entropy plus a penalty on derivatives with respect to the input.

All penalties are means over the batch of a number for each example, from gradients of the *summed*
cross-entropy (the one of the label; no smoothing), so that an example's gradient is its own. They
see the model in training mode: BatchNorm normalises with the statistics of the batch, through which
examples interact, and the statistics of the step are those of the clean pass. That pass serves the
cross-entropy, too. Gradients are reduced in float32 or wider. The derivative of a penalty at a zero
gradient is 0.

To add a penalty to an objective that has a loss of its own, give ``cross_entropy_weight=0``:

    attack = attacks.fgsm(threat, random_start=True)
    fgsm_training = adversarial(attack, cross_entropy())
    objective = sum_of(fgsm_training, grad_align(0.2, threat, cross_entropy_weight=0))
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gfa_jax import _validate, losses, norms
from gfa_jax.attacks import base as attacks_base
from gfa_jax.objectives.classification import Penalty, regularized, wide
from gfa_jax.threat import ThreatModel
from gfa_jax.types import Array, Batch, LossFn, ModelFn, ModelState, Objective, Params


class _Pass(NamedTuple):
    """The model at one point of each example.

    Attributes:
      loss: ``[B]``: the cross-entropy, or what else was differentiated.
      gradient: of its sum with respect to the inputs, ``[B, ...]``, float32 or wider.
      logits: ``[B, C]``.
      model_state: after the pass.
    """

    loss: Array
    gradient: Array
    logits: Array
    model_state: ModelState


def _pass(
    model: ModelFn,
    params: Params,
    inputs: Array,
    labels: Array,
    *,
    loss_fn: LossFn = losses.cross_entropy,
    train: bool = True,
) -> _Pass:
    """One forward and one backward pass, differentiable with respect to ``params``."""

    def summed_loss(inputs: Array) -> tuple[Array, tuple[Array, Array, ModelState]]:
        (logits, _), model_state = model(params, {}, inputs, train=train)
        loss = loss_fn(logits, labels)
        return jnp.sum(loss), (loss, logits, model_state)

    gradient, (loss, logits, model_state) = jax.grad(summed_loss, has_aux=True)(inputs)
    return _Pass(loss, wide(gradient), logits, model_state)


def _size(vectors: Array, norm: str, squared: bool) -> Array:
    """Returns the norm ``[B]`` or its square, with derivative 0 at zero."""
    if squared and norm == "l2":
        return norms.dot(vectors, vectors)
    # Squares of small gradients would underflow. A norm has degree 1: holding the scale constant
    # leaves its derivative as it is.
    scaled, scale = norms.rescale(vectors)
    size = norms.vector_norm(scaled, norm) * scale
    return size * size if squared else size


def grad_align(
    weight: float | Array, threat: ThreatModel, *, cross_entropy_weight: float | Array = 1.0
) -> Objective:
    """GradAlign (Andriushchenko & Flammarion 2020, arXiv 2007.02617, eq. 3).

    ``penalty = mean [1 - cos(g(x), g(x + eta))]`` with the input gradients ``g`` of the
    cross-entropy, both differentiated, and ``eta`` a random point of the threat model
    (``ThreatModel.random_start``: in l_inf uniform in ``[-epsilon, epsilon]``, clipped to the box).
    As in the authors' code, the mean is over the examples where neither gradient is zero, and both
    passes are in training mode.

    Metrics: those of ``cross_entropy()``, ``grad_align_penalty``, ``grad_align_weight`` and
    ``grad_align_zero_gradients`` (the share of examples left out).

    Args:
      weight: >= 0 (0.2 in the paper at epsilon 8/255); may be traced. A Python 0 gives exactly
        ``cross_entropy()``.
      threat: where ``eta`` is drawn; a radius of 0 makes the penalty 0.
      cross_entropy_weight: 0 leaves the penalty alone, to add to another objective.

    Raises:
      ValueError: for a negative weight.
    """

    def penalty_fn(model: ModelFn, params: Params, batch: Batch, key: Array) -> Penalty:
        inputs, labels = batch["inputs"], batch["labels"]
        keys = attacks_base.example_keys(key, jnp.arange(inputs.shape[0]))
        clean = _pass(model, params, inputs, labels)
        moved = _pass(model, params, threat.random_start(keys, inputs), labels)
        left, right = norms.rescale(clean.gradient)[0], norms.rescale(moved.gradient)[0]
        product = norms.vector_norm(left, "l2") * norms.vector_norm(right, "l2")
        nonzero = product > 0
        cosine = norms.dot(left, right) / jnp.where(nonzero, product, 1)
        value = jnp.sum(jnp.where(nonzero, 1 - cosine, 0)) / jnp.maximum(jnp.sum(nonzero), 1)
        metrics = {"grad_align_zero_gradients": jnp.mean(~nonzero)}
        return Penalty(value, metrics, clean.logits, clean.model_state)

    return regularized(penalty_fn, weight, cross_entropy_weight, name="grad_align")


def gradient_norm(
    weight: float | Array,
    norm: str = "l2",
    *,
    squared: bool = True,
    cross_entropy_weight: float | Array = 1.0,
) -> Objective:
    """Input gradient regularisation: ``penalty = mean |g(x)|^2``, or ``mean |g(x)|``.

    With the defaults it is that of Ross & Doshi-Velez 2018 (arXiv 1711.09404, section 3; double
    backpropagation, Drucker & Le Cun 1992). With ``norm=threat.dual_norm``, ``squared=False`` and
    epsilon as the weight, the loss is the first-order estimate of the adversarial loss in the
    threat's ball (Lyu et al. 2015, arXiv 1511.06385).

    Metrics: those of ``cross_entropy()``, ``gradient_norm_penalty`` and ``gradient_norm_weight``.

    Args:
      weight: >= 0; may be traced. A Python 0 gives exactly ``cross_entropy()``.
      norm: of the gradients: ``l2``, ``l1`` (against l_inf attacks) or ``linf`` (against l_1).
      squared: whether each example's norm is squared.
      cross_entropy_weight: 0 leaves the penalty alone, to add to another objective.

    Raises:
      ValueError: for a negative weight or an unknown norm.
    """
    _validate.one_of(norms.DUALS, norm=norm)

    def penalty_fn(model: ModelFn, params: Params, batch: Batch, key: Array) -> Penalty:
        del key
        clean = _pass(model, params, batch["inputs"], batch["labels"])
        value = jnp.mean(_size(clean.gradient, norm, squared))
        return Penalty(value, {}, clean.logits, clean.model_state)

    return regularized(penalty_fn, weight, cross_entropy_weight, name="gradient_norm")


def linearized_margins(
    weight: float | Array,
    threat: ThreatModel,
    *,
    epsilon: float | Array | None = None,
    samples_class: bool = True,
    cross_entropy_weight: float | Array = 1.0,
) -> Objective:
    """The cross-entropy where linearised margins are worst in the threat's ball.

    ``penalty = mean [softplus(s + epsilon |g|_q) - softplus(s)]`` with the log-odds ``s`` of being
    wrong, for which ``softplus(s)`` is the cross-entropy, and the gradient ``g`` of the margin to
    one other class. So with weight 1 the loss is ``mean softplus(s + epsilon |g|_q)``, the first
    order of the adversarial loss in margins, where ``gradient_norm`` is the first order in the
    cross-entropy, which saturates. Margins are linearised so by Elsayed et al. 2018 (arXiv
    1803.05598), with another loss; this one is this project's.

    It is what alignment becomes when it counts as much as it changes the loss: by its definition
    ``|g|_q = <-g, h> / (|h|_p a)`` for the alignment ``a`` of the input ``h`` (``alignment``), in a
    network without biases the margin over the radius.

    Metrics: those of ``cross_entropy()``, ``linearized_margins_penalty``,
    ``linearized_margins_decrease`` (the mean of ``epsilon |g|_q``, in logits) and
    ``linearized_margins_weight``.

    Args:
      weight: >= 0, usually 1; may be traced. A Python 0 gives exactly ``cross_entropy()``.
      threat: gives the dual norm q, and epsilon.
      epsilon: in input units, > 0; the threat's by default. Less of it makes up for every class
        having its own worst perturbation. May be traced.
      samples_class: whether the margin is that to a class drawn by its probability at every step
        (``losses.sample_confused_classes``); else to all of them in one, ``g = grad s``, in which
        the gradients of different classes cancel in part.
      cross_entropy_weight: 0 leaves the penalty alone, to add to another objective.

    Raises:
      ValueError: for arguments out of range; with ``samples_class``, at the first trace, for a
        model of one class.
    """
    if epsilon is not None:
        _validate.positive(epsilon=epsilon)
    radius = threat.epsilon if epsilon is None else epsilon

    def penalty_fn(model: ModelFn, params: Params, batch: Batch, key: Array) -> Penalty:
        def sampled_margin(logits: Array, labels: Array) -> Array:
            others = losses.sample_confused_classes(key, logits, labels)
            return losses.class_difference(logits, labels, others)

        loss_fn = sampled_margin if samples_class else losses.log_odds
        clean = _pass(model, params, batch["inputs"], batch["labels"], loss_fn=loss_fn)
        decrease = radius * _size(clean.gradient, threat.dual_norm, squared=False)
        log_odds = losses.log_odds(clean.logits, batch["labels"])
        added = jax.nn.softplus(log_odds + decrease) - jax.nn.softplus(log_odds)
        metrics = {"linearized_margins_decrease": jnp.mean(decrease)}
        return Penalty(jnp.mean(added), metrics, clean.logits, clean.model_state)

    return regularized(penalty_fn, weight, cross_entropy_weight, name="linearized_margins")


def jacobian_norm(
    weight: float | Array,
    num_projections: int | None = 1,
    *,
    cross_entropy_weight: float | Array = 1.0,
) -> Objective:
    """Jacobian regularisation (Hoffman et al. 2019, arXiv 1908.02729, Algorithm 1).

    ``penalty = mean |J(x)|_F^2 / 2`` with the Jacobian ``J [C, D]`` of the logits, estimated
    without bias as ``C / K sum_k |v_k J|_2^2 / 2`` from K directions, uniform on the unit sphere
    and drawn for each example at every step.

    Metrics: those of ``cross_entropy()``, ``jacobian_norm_penalty`` and ``jacobian_norm_weight``.

    Args:
      weight: lambda_JR >= 0 (0.01 to 0.1 in the paper); may be traced. A Python 0 gives exactly
        ``cross_entropy()``.
      num_projections: K; ``None`` for the exact norm, from C backward passes.
      cross_entropy_weight: 0 leaves the penalty alone, to add to another objective.

    Raises:
      ValueError: for a negative weight or a number of projections below 1.
    """
    if num_projections is not None:
        _validate.positive_integer(num_projections=num_projections)

    def penalty_fn(model: ModelFn, params: Params, batch: Batch, key: Array) -> Penalty:
        def logits_fn(inputs: Array) -> tuple[Array, ModelState]:
            (logits, _), model_state = model(params, {}, inputs, train=True)
            return logits, model_state

        logits, pull_back, model_state = jax.vjp(logits_fn, batch["inputs"], has_aux=True)
        if num_projections is None:
            rows = jnp.eye(logits.shape[1])[:, None, :]
            directions = jnp.broadcast_to(rows, (logits.shape[1], *logits.shape))
            scale = 1.0
        else:
            directions = _unit_directions(key, num_projections, logits.shape)
            scale = logits.shape[1] / num_projections

        def squared_size(direction: Array) -> Array:
            (projected,) = pull_back(direction.astype(logits.dtype))
            return jnp.mean(norms.dot(wide(projected), wide(projected)))

        # A loop: one copy of the backward pass is compiled, and memory does not grow with C.
        value = jnp.sum(jax.lax.map(squared_size, directions))
        return Penalty(scale * value / 2, {}, logits, model_state)

    return regularized(penalty_fn, weight, cross_entropy_weight, name="jacobian_norm")


def _unit_directions(key: Array, count: int, shape: tuple[int, ...]) -> Array:
    """Returns ``[count, B, C]``, uniform on the unit sphere of each row."""
    keys = attacks_base.example_keys(key, jnp.arange(shape[0]))
    draw = jax.vmap(lambda key: jax.random.normal(key, (count, *shape[1:])))
    directions = jnp.moveaxis(draw(keys), 0, 1)
    return directions / jnp.linalg.norm(directions, axis=-1, keepdims=True)


def curvature(
    weight: float | Array,
    h: float | Array,
    *,
    squared: bool = True,
    cross_entropy_weight: float | Array = 1.0,
) -> Objective:
    """CURE, curvature regularisation (Moosavi-Dezfooli et al. 2019, arXiv 1811.09716, eq. 6).

    ``penalty = mean |g(x + h z) - g(x)|_2^2`` with the input gradients ``g`` of the cross-entropy,
    both differentiated, and the direction ``z = sign g(x) / |sign g(x)|_2``, held constant: a
    finite difference of the Hessian along ``z``, times h. An example of zero gradient has no
    direction: it stays, and adds nothing. The authors' code takes the norm without the square
    (``squared=False``) with weight 4 and raises h over the first epochs; it takes the gradients in
    evaluation mode, this function in training mode. ``x + h z`` is not clipped to the box.

    Metrics: those of ``cross_entropy()``, ``curvature_penalty`` and ``curvature_weight``.

    Args:
      weight: gamma >= 0; may be traced. A Python 0 gives exactly ``cross_entropy()``.
      h: l_2 length of the displacement, in input units, > 0; may be traced.
      squared: whether each example's norm is squared.
      cross_entropy_weight: 0 leaves the penalty alone, to add to another objective.

    Raises:
      ValueError: for a negative weight, or h that is not positive.
    """
    _validate.positive(h=h)

    def penalty_fn(model: ModelFn, params: Params, batch: Batch, key: Array) -> Penalty:
        del key
        inputs, labels = batch["inputs"], batch["labels"]
        clean = _pass(model, params, inputs, labels)
        signs = jax.lax.stop_gradient(jnp.sign(clean.gradient))
        # At least 1 unless the gradient is zero.
        length = jnp.maximum(norms.vector_norm(signs, "l2"), 1)
        displaced = (inputs + h * signs / norms.expand(length, signs)).astype(inputs.dtype)
        moved = _pass(model, params, displaced, labels)
        value = jnp.mean(_size(moved.gradient - clean.gradient, "l2", squared))
        return Penalty(value, {}, clean.logits, clean.model_state)

    return regularized(penalty_fn, weight, cross_entropy_weight, name="curvature")


def local_linearity(
    weight: float | Array,
    threat: ThreatModel,
    *,
    gradient_ratio: float | Array = 0.75,
    num_steps: int = 10,
    step_size: float | Array | None = None,
    attack_train_mode: bool = False,
    cross_entropy_weight: float | Array = 1.0,
) -> Objective:
    """Local linearity regularisation, LLR (Qin et al. 2019, arXiv 1907.02610, Algorithm 1).

    ``penalty = mean |l(x + d) - l(x) - <d, g(x)>| + r mean |<d, g(x)>|`` with the cross-entropy
    ``l``, its input gradient ``g``, and the perturbation ``d`` that maximises the first term: found
    by projected steepest ascent from a random start, and held constant. (The authors ascend by Adam
    or by signs.) With the paper's lambda and mu, ``weight`` is lambda and r is mu / lambda.

    Metrics: those of ``cross_entropy()``, ``local_linearity_penalty``, ``linearity_violation``,
    ``linear_change`` (the two means) and ``local_linearity_weight``.

    Args:
      weight: lambda >= 0 (4 in the paper on CIFAR-10); may be traced. A Python 0 gives exactly
        ``cross_entropy()``.
      threat: ball and box of the perturbations.
      gradient_ratio: r >= 0 (3 / 4 in the paper on CIFAR-10); may be traced.
      num_steps: steps of ascent.
      step_size: in input units; default ``2.5 * epsilon / num_steps``; may be traced.
      attack_train_mode: the model's mode during the ascent: BatchNorm with running statistics by
        default, or with the batch's. The penalty itself takes both its passes in training mode.
      cross_entropy_weight: 0 leaves the penalty alone, to add to another objective.

    Raises:
      ValueError: for arguments out of range.
    """
    _validate.non_negative(weight=weight, gradient_ratio=gradient_ratio)
    _validate.positive_integer(num_steps=num_steps)
    if step_size is not None:
        _validate.positive(step_size=step_size)
    step = 2.5 * threat.epsilon / num_steps if step_size is None else step_size

    def violation(loss: Array, clean: _Pass, perturbation: Array) -> tuple[Array, Array]:
        """Returns the error of the linear model and its change ``[B]``."""
        change = norms.dot(perturbation, clean.gradient)
        error = loss - clean.loss - change
        # jnp.abs has derivative 1 at 0, where there is no error to reduce.
        return error * jnp.sign(error), change * jnp.sign(change)

    def find(model: ModelFn, params: Params, batch: Batch, key: Array) -> Array:
        """Returns the points that violate linearity most, as constants."""
        inputs, labels = batch["inputs"], batch["labels"]
        frozen = jax.lax.stop_gradient(params)
        clean = _pass(model, frozen, inputs, labels, train=attack_train_mode)

        def summed(points: Array) -> Array:
            logits = model(frozen, {}, points, train=attack_train_mode)[0][0]
            loss = losses.cross_entropy(logits, labels)
            return jnp.sum(violation(loss, clean, wide(points) - wide(inputs))[0])

        def ascend(_: int, points: Array) -> Array:
            gradient = attacks_base.finite(jax.grad(summed)(points))
            return threat.project(inputs, points + step * threat.steepest_step(points, gradient))

        keys = attacks_base.example_keys(key, jnp.arange(inputs.shape[0]))
        start = threat.random_start(keys, inputs)
        return jax.lax.stop_gradient(jax.lax.fori_loop(0, num_steps, ascend, start))

    def penalty_fn(model: ModelFn, params: Params, batch: Batch, key: Array) -> Penalty:
        inputs, labels = batch["inputs"], batch["labels"]
        points = find(model, params, batch, key)
        clean = _pass(model, params, inputs, labels)
        (moved_logits, _), _ = model(params, {}, points, train=True)
        moved_loss = losses.cross_entropy(moved_logits, labels)
        error, change = violation(moved_loss, clean, wide(points) - wide(inputs))
        value = jnp.mean(error) + gradient_ratio * jnp.mean(change)
        metrics = {"linearity_violation": jnp.mean(error), "linear_change": jnp.mean(change)}
        return Penalty(value, metrics, clean.logits, clean.model_state)

    return regularized(penalty_fn, weight, cross_entropy_weight, name="local_linearity")
