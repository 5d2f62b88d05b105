"""Objectives made of objectives: on other inputs, and sums."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from gfa_jax import _validate, norms
from gfa_jax.attacks import base as attacks_base
from gfa_jax.objectives.classification import is_known
from gfa_jax.types import Array, AttackFn, Aux, Batch, Metrics, ModelFn, Objective, Params

ADV_INPUTS = "adv_inputs"
"""The key of a batch under which ``paired`` leaves the adversarial examples."""

NoiseFn = Callable[[Array, Array], Array]
"""``(typed PRNG keys [B], inputs [B, ...]) -> noisy inputs [B, ...]``."""


def adversarial(
    attack: AttackFn, objective: Objective, *, attack_train_mode: bool = False
) -> Objective:
    """Adversarial training: an objective on adversarial examples of the current parameters.

    No gradient flows through the attack. Metrics are the inner objective's, on the adversarial
    inputs.

    Args:
      attack: such as ``attacks.pgd(threat, num_steps=10, keep="last")``.
      objective: any objective: ``cross_entropy()`` gives PGD-AT or FGSM-AT, ``gfa(...)`` alignment
        at adversarial points.
      attack_train_mode: whether the attack sees the model in training mode (BatchNorm with batch
        statistics, as in the code of Rice et al. 2020) or in evaluation mode. The statistics of its
        passes are discarded either way.
    """

    def adversarial_objective(
        model: ModelFn, params: Params, batch: Batch, key: Array
    ) -> tuple[Array, Aux]:
        attack_key, objective_key = jax.random.split(key)
        adv_inputs = _attacked(attack, model, params, batch, attack_key, None, attack_train_mode)
        return objective(model, params, {**batch, "inputs": adv_inputs}, objective_key)

    return adversarial_objective


def paired(
    attack: AttackFn,
    objective: Objective,
    *,
    start_std: float | Array | None = None,
    attack_train_mode: bool = False,
) -> Objective:
    """An objective on clean and adversarial examples side by side.

    The batch keeps its clean ``inputs`` and gains ``adv_inputs``, those of the current parameters.
    What lies between attack and objective sees both: TRADES with adversarial weight perturbation
    is ``paired(attack, weight_perturbation(0.005, trades(None, 6.0)), start_std=0.001)``. No
    gradient flows through the attack.

    Args:
      attack: such as ``attacks.pgd(threat, loss="kl", keep="last")``.
      objective: one that reads ``adv_inputs``: ``trades(None, ...)``, ``mart(None, ...)`` or
        ``logit_pairing(None, ...)``.
      start_std: where the attack starts: at the clean input plus normal noise of this standard
        deviation, projected onto ball and box; may be traced. ``None``: where the attack says.
      attack_train_mode: whether the attack sees the model in training mode (BatchNorm with batch
        statistics) or in evaluation mode. The statistics of its passes are discarded either way.

    Raises:
      ValueError: for a standard deviation that is not positive.
    """
    if start_std is not None:
        _validate.positive(start_std=start_std)

    def paired_objective(
        model: ModelFn, params: Params, batch: Batch, key: Array
    ) -> tuple[Array, Aux]:
        attack_key, objective_key = jax.random.split(key)
        start = None
        if start_std is not None:
            attack_key, start_key = jax.random.split(attack_key)
            start = normal_noise(start_std)(_example_keys(start_key, batch), batch["inputs"])
        adv_inputs = _attacked(attack, model, params, batch, attack_key, start, attack_train_mode)
        return objective(model, params, {**batch, ADV_INPUTS: adv_inputs}, objective_key)

    return paired_objective


def _example_keys(key: Array, batch: Batch) -> Array:
    return attacks_base.example_keys(key, jnp.arange(batch["inputs"].shape[0]))


def _attacked(
    attack: AttackFn,
    model: ModelFn,
    params: Params,
    batch: Batch,
    key: Array,
    start: Array | None,
    train: bool,
) -> Array:
    """Returns adversarial examples of the current parameters, as constants."""
    frozen = jax.lax.stop_gradient(params)

    def logits_fn(inputs: Array) -> Array:
        return model(frozen, {}, inputs, train=train)[0][0]

    # Attacks of one's own may take no start.
    options = {} if start is None else {"start": start}
    result = attack(
        logits_fn, _example_keys(key, batch), batch["inputs"], batch["labels"], **options
    )
    return jax.lax.stop_gradient(result.adv_inputs)


def adversarial_inputs(batch: Batch) -> Array:
    """Returns the adversarial examples that ``paired`` left in the batch.

    Raises:
      ValueError: for a batch without them.
    """
    if ADV_INPUTS not in batch:
        raise ValueError(
            f"the batch has no {ADV_INPUTS!r}: an objective made with attack=None belongs inside "
            "paired(attack, ...)."
        )
    return batch[ADV_INPUTS]


def at_adversarial(objective: Objective) -> Objective:
    """An objective at the adversarial examples that ``paired`` left in the batch.

    So terms at clean and at adversarial inputs share one attack: alignment at adversarial points
    next to TRADES is ``paired(attack, sum_of(trades(None, 6.0), at_adversarial(gfa(1.0,
    cross_entropy_weight=0))))``. With nothing else, ``paired(attack, at_adversarial(objective))``
    is ``adversarial(attack, objective)``.

    Raises:
      ValueError: at the first trace, for a batch without adversarial examples.
    """

    def moved_objective(
        model: ModelFn, params: Params, batch: Batch, key: Array
    ) -> tuple[Array, Aux]:
        return objective(model, params, {**batch, "inputs": adversarial_inputs(batch)}, key)

    return moved_objective


def noisy(noise: NoiseFn, objective: Objective) -> Objective:
    """An objective on noisy inputs: ``batch["inputs"]`` is replaced before anything else sees it.

    Around ``cross_entropy()`` it is data augmentation, around ``adversarial(...)`` the attack takes
    the noisy inputs for the clean ones: its ball is around them, and the total perturbation is not
    clipped to it.

    Args:
      noise: ``(keys [B], inputs) -> noisy inputs``, such as ``uniform_noise(radius)``.
      objective: any objective. Metrics and BatchNorm statistics are its own, on noisy inputs.
    """

    def noisy_objective(
        model: ModelFn, params: Params, batch: Batch, key: Array
    ) -> tuple[Array, Aux]:
        noise_key, objective_key = jax.random.split(key)
        inputs = noise(_example_keys(noise_key, batch), batch["inputs"])
        return objective(model, params, {**batch, "inputs": inputs}, objective_key)

    return noisy_objective


def uniform_noise(
    radius: float | Array, *, bounds: tuple[float, float] | None = (0.0, 1.0)
) -> NoiseFn:
    """Uniform noise in ``[-radius, radius]`` at every coordinate.

    Args:
      radius: in input units, >= 0; may be traced.
      bounds: the box that noisy inputs are clipped to; ``None`` for none.

    Raises:
      ValueError: for a negative radius.
    """
    _validate.non_negative(radius=radius)

    def draw(key: Array, example: Array) -> Array:
        return jax.random.uniform(key, example.shape, example.dtype, -1, 1)

    return _additive(draw, radius, bounds)


def normal_noise(std: float | Array, *, bounds: tuple[float, float] | None = None) -> NoiseFn:
    """Normal noise of standard deviation ``std`` at every coordinate.

    Args:
      std: in input units, >= 0; may be traced.
      bounds: the box that noisy inputs are clipped to; ``None``, the default, for none, as in
        training for randomised smoothing (Cohen et al. 2019, arXiv 1902.02918).

    Raises:
      ValueError: for a negative standard deviation.
    """
    _validate.non_negative(std=std)

    def draw(key: Array, example: Array) -> Array:
        return jax.random.normal(key, example.shape, example.dtype)

    return _additive(draw, std, bounds)


def _additive(
    draw: Callable[[Array, Array], Array],
    scale: float | Array,
    bounds: tuple[float, float] | None,
) -> NoiseFn:
    def noise(keys: Array, inputs: Array) -> Array:
        noisy_inputs = inputs + scale * jax.vmap(draw)(keys, inputs)
        if bounds is not None:
            noisy_inputs = jnp.clip(noisy_inputs, *bounds)
        # A traced scale may be wider than the inputs.
        return noisy_inputs.astype(inputs.dtype)

    return noise


def weight_perturbation(gamma: float | Array, objective: Objective) -> Objective:
    """Adversarial weight perturbation (AWP; Wu, Xia & Wang 2020, arXiv 2004.05884).

    The objective at ``params + v``, where every kernel (a parameter of more than one axis) moves
    along its own gradient g to a given share of its norm, ``v_l = gamma |w_l|_2 g_l / |g_l|_2``:
    one step of ascent, on the bound of the layer-wise relative size. Biases and BatchNorm
    parameters stay (as in the authors' code), and so does a kernel of zero gradient. No gradient
    flows through ``v``; the gradient at the perturbed parameters is the one to descend from
    ``params``.

    The paper perturbs the weights on adversarial examples that were found before: put it *inside*
    the attack, ``adversarial(attack, weight_perturbation(0.01, cross_entropy()))``. Around an
    attack, that attack would run twice, the second time on perturbed weights; for TRADES and MART
    see ``paired``.

    Metrics and BatchNorm statistics are the inner objective's at the perturbed parameters, which
    the authors' code trains with; the statistics of the ascent are discarded.

    Args:
      gamma: relative size of the perturbation, >= 0 (0.01 for adversarial training, 0.005 for
        TRADES); may be traced. A Python 0 gives exactly ``objective``.
      objective: the objective to ascend, and then to descend.

    Raises:
      ValueError: for a negative gamma.
    """
    _validate.non_negative(gamma=gamma)
    if is_known(gamma, 0):
        return objective

    def relative(weights: Array, gradient: Array) -> Array:
        if weights.ndim <= 1:
            return jnp.zeros_like(weights)
        precise = jnp.promote_types(weights.dtype, jnp.float32)
        # One vector each. Gradients late in training are small: their squares would underflow.
        direction, _ = norms.rescale(gradient.astype(precise)[None])
        length = norms.vector_norm(direction, "l2")[0]
        size = gamma * norms.vector_norm(weights.astype(precise)[None], "l2")[0]
        step = size * direction[0] / jnp.where(length > 0, length, 1)
        return step.astype(weights.dtype)

    def perturbed_objective(
        model: ModelFn, params: Params, batch: Batch, key: Array
    ) -> tuple[Array, Aux]:
        frozen = jax.lax.stop_gradient(params)
        # The same key: what the objective draws is part of what is ascended.
        gradients = jax.grad(lambda values: objective(model, values, batch, key)[0])(frozen)
        perturbation = jax.lax.stop_gradient(jax.tree.map(relative, frozen, gradients))
        return objective(model, jax.tree.map(jnp.add, params, perturbation), batch, key)

    return perturbed_objective


def sum_of(*objectives: Objective) -> Objective:
    """Adds objectives evaluated on the same batch.

    The loss is the sum; the model state is the first objective's. Metrics keep their names; where
    an earlier objective has one of that name, that of the n-th is ``term_n/...``. ``loss`` is the
    sum. Objectives that hold a cross-entropy each are added with ``cross_entropy_weight=0`` in all
    but one. The sum of one objective is that objective.

    Raises:
      ValueError: for no objective.
    """
    if not objectives:
        raise ValueError("sum_of needs at least one objective.")
    if len(objectives) == 1:
        return objectives[0]

    def summed_objective(
        model: ModelFn, params: Params, batch: Batch, key: Array
    ) -> tuple[Array, Aux]:
        keys = jax.random.split(key, len(objectives))
        results = [
            term(model, params, batch, term_key)
            for term, term_key in zip(objectives, keys, strict=True)
        ]
        metrics: Metrics = {}
        for number, (_, aux) in enumerate(results, start=1):
            metrics |= {
                f"term_{number}/{name}" if name in metrics else name: value
                for name, value in aux.metrics.items()
            }
        loss = functools.reduce(jnp.add, [loss for loss, _ in results])
        return loss, Aux({**metrics, "loss": loss}, results[0][1].model_state)

    return summed_objective
