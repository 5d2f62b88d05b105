"""What the probes of a model have in common.

A probe shows whether gradient attacks can be trusted on a model. Each is a pure function of
``(logits_fn, keys, inputs, labels, threat)``, of static options, and returns one value for each
example along the last axis: ``attack_probes``, ``path_probes``, ``gradient_probes``,
``surface_probes`` and ``hard_label``. ``probing.measure`` runs them on a fixed subset and sums them
up in plain numbers; ``diagnostics.diagnose`` judges those.

Gradients are those of the log-odds of being wrong unless said otherwise: they have the direction of
the cross-entropy's but do not vanish on confident examples, so that a saturated loss, which has
probes of its own (D10, D11, D23), is not taken for a masked gradient.

Sources: Carlini et al. 2019 (arXiv 1902.06705), Athalye et al. 2018 (arXiv 1802.00420), Pintor et
al. 2022 (arXiv 2106.09947; "indicators of attack failure"), Qin et al. 2019 (arXiv 1907.02610;
local linearity), Andriushchenko & Flammarion 2020 (arXiv 2007.02617; gradient agreement).
"""

import jax
import jax.numpy as jnp

from gfa_jax import losses, norms
from gfa_jax.attacks import base
from gfa_jax.attacks.estimators import fold_in
from gfa_jax.threat import ThreatModel
from gfa_jax.types import Array, LogitsFn, LossFn

Loss = str | LossFn


def loss_at(logits_fn: LogitsFn, labels: Array, loss: Loss, points: Array) -> Array:
    """Returns the loss of each example, float32 ``[B]``."""
    return losses.get(loss)(logits_fn(points), labels).astype(jnp.float32)


def gradient_at(logits_fn: LogitsFn, labels: Array, loss: Loss, points: Array) -> Array:
    """Returns the gradient of each example's loss, ``[B, ...]``; what is not finite is 0."""
    goal = base.untargeted(losses.get(loss), labels)
    return base.evaluate(logits_fn, goal, points).gradient


def uphill_step(
    logits_fn: LogitsFn,
    threat: ThreatModel,
    inputs: Array,
    goal: base.Goal,
    step_size: float | Array,
    points: Array,
) -> tuple[Array, base.Evaluation]:
    """Returns the points after one step of PGD, and what was found before it."""
    here = base.evaluate(logits_fn, goal, points)
    moved = points + step_size * threat.steepest_step(points, here.gradient)
    return threat.project(inputs, moved), here


def random_directions(threat: ThreatModel, keys: Array, inputs: Array) -> Array:
    """Returns a random direction of unit threat norm for each example.

    l_inf: random signs. l_2: normal. l_1: random signs on a random share of the coordinates, its
    logarithm uniform from a single one to all, and zero elsewhere.

    Args:
      threat: its norm is used.
      keys: typed PRNG keys ``[B]``.
      inputs: ``[B, ...]``; shape and dtype are used.

    Returns:
      ``[B, ...]``.
    """
    shape, dtype = inputs.shape[1:], inputs.dtype

    def draw(key: Array) -> Array:
        if threat.norm == "linf":
            return jax.random.rademacher(key, shape, dtype)
        if threat.norm == "l2":
            return jax.random.normal(key, shape, dtype)
        sign_key, share_key, place_key = jax.random.split(key, 3)
        places = jax.random.uniform(place_key, shape, dtype)
        share = places.size ** -jax.random.uniform(share_key, (), dtype)
        # The lowest always counts, so that no direction is zero.
        chosen = places <= jnp.maximum(share, jnp.min(places))
        return jnp.where(chosen, jax.random.rademacher(sign_key, shape, dtype), 0)

    directions = jax.vmap(draw)(keys)
    length = norms.vector_norm(directions, threat.norm)
    return directions / norms.expand(jnp.where(length > 0, length, 1), directions)


def surface_points(threat: ThreatModel, keys: Array, inputs: Array) -> Array:
    """Returns a random point on the surface of each ball, as far as the box allows.

    They lie along ``random_directions``: in l_inf a corner, which changes logits more than a
    uniform draw does.

    Args:
      threat: ball and box.
      keys: typed PRNG keys ``[B]``.
      inputs: ``[B, ...]``.
    """
    directions = random_directions(threat, keys, inputs)
    return threat.project(inputs, inputs + threat.epsilon * directions)


def ball_points(threat: ThreatModel, keys: Array, inputs: Array, number: int | Array) -> Array:
    """Returns the random points of a number: of the surface if it is even, else of the ball."""
    keys = fold_in(keys, number)
    return jax.lax.cond(
        jnp.asarray(number) % 2 == 0,
        lambda: surface_points(threat, keys, inputs),
        lambda: threat.random_start(keys, inputs),
    )
