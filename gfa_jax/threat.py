"""Threat models: which perturbations an attacker may use.

A perturbation is allowed when its norm is at most ``epsilon`` and the perturbed input stays inside
``bounds``. All functions are per example (axis 0 is the batch), pure and traceable; ``epsilon`` may
be a traced scalar, so that it can follow a schedule.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from gfa_jax import _validate, bisection, norms
from gfa_jax.types import Array


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["epsilon"], meta_fields=["norm", "bounds"]
)
@dataclasses.dataclass(frozen=True)
class ThreatModel:
    """A norm ball around the clean input, intersected with the box of valid inputs.

    Attributes:
      norm: ``linf``, ``l2`` or ``l1``.
      epsilon: radius in input units, such as ``8 / 255``; >= 0.
      bounds: ``(lower, upper)`` of valid inputs.

    Raises:
      ValueError: for an unknown norm, an epsilon that is negative or not finite, or bounds that are
        not ``lower < upper``.
    """

    norm: str = "linf"
    epsilon: float | Array = 8 / 255
    bounds: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        """Checks the fields; a traced epsilon passes."""
        _validate.one_of(norms.DUALS, norm=self.norm)
        _validate.non_negative(epsilon=self.epsilon)
        if len(self.bounds) != 2 or not self.bounds[0] < self.bounds[1]:
            raise ValueError(
                f"bounds={self.bounds!r} must be a pair (lower, upper) with lower < upper."
            )

    @property
    def dual_norm(self) -> str:
        """The name of the norm that measures gradients against this threat."""
        return norms.dual(self.norm)

    def distance(self, inputs: Array, adv_inputs: Array) -> Array:
        """Returns the threat norm ``[B]`` of ``adv_inputs - inputs``."""
        return norms.vector_norm(adv_inputs - inputs, self.norm)

    def project(self, inputs: Array, adv_inputs: Array) -> Array:
        """Returns allowed points close to ``adv_inputs``.

        l_inf and l_1 give the exact Euclidean projection onto ball and box. l_2 scales into the
        ball and then clips to the box, as all reference attacks do: allowed, since clipping moves
        towards the clean input, but not always the nearest allowed point.

        Args:
          inputs: clean inputs ``[B, ...]`` inside the bounds.
          adv_inputs: any points of the same shape.

        Returns:
          ``[B, ...]``, within the bounds and within epsilon up to float rounding.
        """
        lower, upper = self.bounds
        perturbation = adv_inputs - inputs
        if self.norm == "linf":
            perturbation = jnp.clip(perturbation, -self.epsilon, self.epsilon)
        elif self.norm == "l2":
            scale = _shrink(norms.vector_norm(perturbation, "l2"), self.epsilon)
            perturbation = norms.expand(scale, inputs) * perturbation
        else:
            perturbation = project_l1_box(inputs, perturbation, self.epsilon, self.bounds)
        # A traced epsilon may be wider than the inputs.
        return jnp.clip(inputs + perturbation, lower, upper).astype(inputs.dtype)

    def random_start(self, keys: Array, inputs: Array) -> Array:
        """Returns a random allowed point for each example.

        l_inf: uniform in the ball, then clipped. l_2: a uniform direction with a radius uniform in
        [0, epsilon], then clipped (torchattacks' PGDL2). l_1: a Laplace direction with the same
        radius, projected.

        Args:
          keys: typed PRNG keys ``[B]``; each example uses only its own.
          inputs: clean inputs ``[B, ...]``.
        """
        draw = functools.partial(
            _draw_unit_ball, norm=self.norm, shape=inputs.shape[1:], dtype=inputs.dtype
        )
        return self.project(inputs, inputs + self.epsilon * jax.vmap(draw)(keys))

    def steepest_step(self, inputs: Array, gradients: Array, *, sparsity: float = 0.99) -> Array:
        """Returns the steepest ascent direction of unit threat norm.

        l_inf: the sign. l_2: the normalised gradient. l_1: the sign of the largest coordinates
        divided by their number, skipping coordinates that would leave the box at once (SLIDE,
        Tramer & Boneh 2019, arXiv 1904.13000).

        Args:
          inputs: the current points ``[B, ...]``; only l_1 looks at them.
          gradients: ``[B, ...]``; an all-zero gradient gives a zero step.
          sparsity: for l_1, the share of coordinates that stay put, in [0, 1).
        """
        if self.norm == "linf":
            return jnp.sign(gradients)
        if self.norm == "l2":
            scaled, _ = norms.rescale(gradients)
            # At least 1 unless the gradient is zero.
            length = norms.vector_norm(scaled, "l2")
            return scaled / norms.expand(jnp.maximum(length, 1), scaled)
        lower, upper = self.bounds
        blocked = ((inputs <= lower) & (gradients < 0)) | ((inputs >= upper) & (gradients > 0))
        magnitude = norms.flatten(jnp.abs(jnp.where(blocked, 0, gradients)))
        num_kept = max(1, round((1 - sparsity) * magnitude.shape[1]))
        # Not top_k: XLA does not partition it, so that every device would gather the whole batch.
        # Nor a sort, which is slow on CPU. What is infinite counts as the largest float.
        finite = jnp.minimum(magnitude, jnp.finfo(magnitude.dtype).max)
        rank = jnp.full(magnitude.shape[0], magnitude.shape[1] - num_kept)
        threshold = bisection.order_statistic(finite, rank)[:, None]
        kept = (magnitude >= threshold) & (magnitude > 0)
        signs = jnp.where(kept, jnp.sign(norms.flatten(gradients)), 0)
        count = jnp.maximum(jnp.sum(kept, axis=1, keepdims=True), 1)
        return (signs / count).reshape(gradients.shape).astype(gradients.dtype)

    def linear_maximizer(self, inputs: Array, gradients: Array) -> Array:
        """Returns the allowed points that maximise ``<gradients, adv_inputs>``: FGSM's single step.

        l_inf and l_1 are exact with the box: l_inf moves every coordinate as far as it may, l_1
        fills the coordinates of largest gradient to the box until the radius is spent. l_2 is
        ``epsilon g / |g|_2``, then clipped (FGM).

        Args:
          inputs: clean inputs ``[B, ...]``.
          gradients: ``[B, ...]``; coordinates of zero gradient stay put.
        """
        lower, upper = self.bounds
        if self.norm != "l1":
            step = self.epsilon * self.steepest_step(inputs, gradients)
            return self.project(inputs, inputs + step)
        flat_gradients, flat_inputs = norms.flatten(gradients), norms.flatten(inputs)
        room = jnp.where(flat_gradients > 0, upper - flat_inputs, flat_inputs - lower)
        room = jnp.where(flat_gradients == 0, 0, jnp.minimum(room, self.epsilon))
        order = jnp.argsort(-jnp.abs(flat_gradients), axis=1)
        sorted_room = jnp.take_along_axis(room, order, axis=1)
        spent_before = jnp.cumsum(sorted_room, axis=1) - sorted_room
        sorted_move = jnp.clip(self.epsilon - spent_before, 0, sorted_room)
        move = jnp.take_along_axis(sorted_move, jnp.argsort(order, axis=1), axis=1)
        step = (jnp.sign(flat_gradients) * move).reshape(inputs.shape)
        return self.project(inputs, inputs + step)


def _shrink(size: Array, limit: float | Array) -> Array:
    """Returns the factor ``[B]``, at most 1, that brings vectors of ``size [B]`` to ``limit``."""
    return jnp.where(size > limit, limit / jnp.where(size > 0, size, 1), 1).astype(size.dtype)


def _draw_unit_ball(key: Array, *, norm: str, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    """Draws one perturbation of norm at most 1."""
    if norm == "linf":
        return jax.random.uniform(key, shape, dtype, -1, 1)
    direction_key, radius_key = jax.random.split(key)
    sample = jax.random.normal if norm == "l2" else jax.random.laplace
    direction = sample(direction_key, shape, dtype)
    radius = jax.random.uniform(radius_key, (), dtype)
    return radius * direction / norms.vector_norm(direction[None], norm)[0]


def project_l1_box(
    inputs: Array,
    perturbation: Array,
    epsilon: float | Array,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> Array:
    """Projects onto ``{|d|_1 <= epsilon} and {lower <= inputs + d <= upper}``, exactly.

    The projection is ``sign(d) min(max(|d| - t, 0), room)`` where ``room`` is the distance to the
    box and ``t`` is 0 or the root of ``|projection|_1 = epsilon`` (Croce & Hein 2021, arXiv
    2103.01208, Prop. 2.1). Projecting onto the ball and then clipping is not the same: it gives up
    radius. The root is bracketed by bisection to float resolution; one exact step on the active
    set, where the equation is linear, then solves it.

    Args:
      inputs: clean inputs ``[B, ...]`` inside the bounds.
      perturbation: ``[B, ...]``.
      epsilon: radius >= 0.
      bounds: the box.

    Returns:
      The projected perturbations ``[B, ...]``; their l_1 norm never exceeds epsilon by more than
      summation rounding.
    """
    lower, upper = bounds
    flat = norms.flatten(perturbation)
    flat_inputs = norms.flatten(inputs)
    magnitude = jnp.abs(flat)
    room = jnp.maximum(jnp.where(flat > 0, upper - flat_inputs, flat_inputs - lower), 0)

    def moved(threshold: Array) -> Array:
        return jnp.clip(magnitude - threshold, 0, room)

    def bisect(_: int, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bracket
        middle = (low + high) / 2
        too_long = jnp.sum(moved(middle), axis=1, keepdims=True) > epsilon
        return jnp.where(too_long, middle, low), jnp.where(too_long, high, middle)

    low = jnp.zeros_like(magnitude[:, :1])
    high = jnp.max(magnitude, axis=1, keepdims=True, initial=0)
    num_bisections = jnp.finfo(flat.dtype).nmant + 2
    low, high = jax.lax.fori_loop(0, num_bisections, bisect, (low, high))
    middle = (low + high) / 2
    saturated = magnitude - middle >= room
    active = (magnitude > middle) & ~saturated
    num_active = jnp.sum(active, axis=1, keepdims=True)
    fixed = jnp.sum(jnp.where(saturated & (magnitude > middle), room, 0), axis=1, keepdims=True)
    exact = (
        fixed + jnp.sum(jnp.where(active, magnitude, 0), axis=1, keepdims=True) - epsilon
    ) / jnp.maximum(num_active, 1)
    threshold = jnp.where(num_active > 0, jnp.clip(exact, low, high), high)
    needed = jnp.sum(moved(jnp.zeros_like(low)), axis=1, keepdims=True) > epsilon
    size = moved(jnp.where(needed, threshold, 0))
    size = size * _shrink(jnp.sum(size, axis=1), epsilon)[:, None]
    return (jnp.sign(flat) * size).reshape(perturbation.shape)
