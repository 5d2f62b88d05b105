"""A search for close adversarial points that sees nothing but labels (D6).

What it finds owes nothing to gradients, losses or scores: where it does better than attacks that
use them, those are being fooled (Carlini et al. 2019, arXiv 1902.06705). It is the search along
random directions that decision-based attacks start from (Brendel et al. 2018, arXiv 1712.04248;
Cheng et al. 2019, arXiv 1807.04457), without their descent: far weaker than they are on a sound
model, so that it should never win.
"""

import jax
import jax.numpy as jnp

from gfa_jax import norms
from gfa_jax.attacks import base
from gfa_jax.attacks.estimators import fold_in
from gfa_jax.evaluation import probes
from gfa_jax.threat import ThreatModel
from gfa_jax.types import Array, LogitsFn


def closest_by_labels(
    logits_fn: LogitsFn,
    keys: Array,
    inputs: Array,
    labels: Array,
    threat: ThreatModel,
    *,
    num_directions: int,
    num_radii: int = 8,
    num_halvings: int = 10,
) -> Array:
    """Returns how near the nearest wrong label along random directions is (D6).

    Along each direction, points are looked at on a grid of radii, up to the diameter of the box at
    first and then to the radius of the best point so far; the step of the grid on which the label
    turns wrong is halved again and again. Points are clipped to the box, and their distances are
    measured after that. An example's result depends on its own key alone.

    Args:
      logits_fn: the model, of which only the class is used.
      keys: typed PRNG keys ``[B]``.
      inputs: float ``[B, ...]`` within the bounds.
      labels: int ``[B]``.
      threat: norm and box; its radius is not used.
      num_directions: directions for each example.
      num_radii: of the grid.
      num_halvings: of its step.

    Returns:
      Distances in the threat norm, ``[B]``: 0 where the model is wrong at the input, infinite where
      no point misled it.
    """
    lower, upper = threat.bounds

    def look(directions: Array, radius: Array) -> tuple[Array, Array]:
        """Returns where a radius ``[B]`` misleads, and the distance that it has in the box."""
        points = jnp.clip(inputs + norms.expand(radius, inputs) * directions, lower, upper)
        wrong = base.is_misclassified(logits_fn(points), labels)
        return wrong, threat.distance(inputs, points)

    def search(number: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        reach, best = carry
        directions = probes.random_directions(threat, fold_in(keys, number), inputs)

        def try_radius(index: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            first, nearest = carry
            wrong, distance = look(directions, reach * (index + 1) / num_radii)
            is_first = wrong & (first == num_radii)
            return jnp.where(is_first, index, first), jnp.where(is_first, distance, nearest)

        none = jnp.full(labels.shape, num_radii, jnp.int32), jnp.full_like(best, jnp.inf)
        first, nearest = jax.lax.fori_loop(0, num_radii, try_radius, none)
        turned = (first < num_radii) & (best > 0)

        def halve(_: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            low, high, nearest = carry
            middle = (low + high) / 2
            wrong, distance = look(directions, middle)
            return (
                jnp.where(wrong, low, middle),
                jnp.where(wrong, middle, high),
                jnp.where(wrong, distance, nearest),
            )

        low, high = reach * first / num_radii, reach * (first + 1) / num_radii
        # Most directions are no better than the best before them, often for the whole batch.
        _, high, nearest = jax.lax.cond(
            jnp.any(turned),
            lambda bracket: jax.lax.fori_loop(0, num_halvings, halve, bracket),
            lambda bracket: bracket,
            (low, high, nearest),
        )
        better = turned & (nearest < best)
        return jnp.where(better, high, reach), jnp.where(better, nearest, best)

    # Of one example: XLA would reduce a whole batch of constants when it compiles, for seconds.
    diameter = norms.vector_norm(jnp.full_like(inputs[:1], upper - lower), threat.norm)
    whole = jnp.broadcast_to(diameter, labels.shape)
    clean_wrong = base.is_misclassified(logits_fn(inputs), labels)
    start = whole, jnp.where(clean_wrong, 0, jnp.full_like(whole, jnp.inf))
    return jax.lax.fori_loop(0, num_directions, search, start)[1]
