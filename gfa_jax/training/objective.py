"""From a config to its objective at every step.

The parts nest in one order, each left out where the config has none of it:

    noisy(noise, paired(attack, weight_perturbation(gamma, sum_of(loss, gfa, regularisers...))))

The terms inside see clean and adversarial examples side by side.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gfa_jax import attacks, objectives
from gfa_jax.config import PAIRED_LOSSES, LossConfig, RegularizerConfig, TrainConfig
from gfa_jax.threat import ThreatModel
from gfa_jax.types import Array, AttackFn, Objective

ObjectiveAt = Callable[[Array], Objective]
"""``step -> objective``; the step is an int32 scalar that may be traced."""


def objective_at(
    config: TrainConfig,
    layer_weights: Mapping[str, float],
    layer_norms: Mapping[str, str],
    layer_ceilings: Mapping[str, float] | None = None,
) -> ObjectiveAt:
    """Returns the objective of a recipe as a function of the step.

    Args:
      config: the recipe.
      layer_weights: weights of the aligned taps by pattern; empty without alignment.
      layer_norms: norms of taps by pattern, those that are not l2.
      layer_ceilings: ceilings of the alignment by pattern, where there are any.

    Raises:
      ValueError: for options that a part refuses.
    """
    num_steps = config.train_steps
    epsilon_at = ramp(config.threat.epsilon, config.attack.warmup_fraction, num_steps)
    noise_at = ramp(config.noise.scale, config.noise.warmup_fraction, num_steps)
    gamma_at = _jump(
        config.loss.weight_perturbation, config.loss.weight_perturbation_start, num_steps
    )
    terms_at = _terms(config, layer_weights, layer_norms, layer_ceilings or {})

    def build(step: Array) -> Objective:
        objective = objectives.sum_of(*terms_at(step))
        objective = objectives.weight_perturbation(gamma_at(step), objective)
        if config.attack.name != "none":
            objective = objectives.paired(
                _attack(config, epsilon_at(step)),
                objective,
                start_std=config.attack.start_std or None,
                attack_train_mode=config.attack.train_mode,
            )
        if config.noise.name == "none":
            return objective
        return objectives.noisy(_NOISES[config.noise.name](noise_at(step)), objective)

    # Raises on bad options now.
    jax.eval_shape(lambda step: (build(step), step)[1], jax.ShapeDtypeStruct((), "int32"))
    return build


_NOISES: Mapping[str, Callable[[float | Array], objectives.NoiseFn]] = {
    "uniform": objectives.uniform_noise,
    "normal": objectives.normal_noise,
}


def ramp(final: float, fraction: float, num_steps: int) -> Callable[[Array], float | Array]:
    """Returns a linear rise from 0 to ``final`` over a share of training.

    Where nothing changes, it gives a plain number.
    """
    steps = round(fraction * num_steps)
    if final == 0 or steps == 0:
        return lambda step: final
    return optax.schedules.linear_schedule(0.0, final, steps)


def _jump(final: float, fraction: float, num_steps: int) -> Callable[[Array], float | Array]:
    """Returns 0 and, from a share of training on, ``final``."""
    first = round(fraction * num_steps)
    if final == 0 or first == 0:
        return lambda step: final
    return lambda step: jnp.where(step < first, 0.0, final)


def _terms(
    config: TrainConfig,
    layer_weights: Mapping[str, float],
    layer_norms: Mapping[str, str],
    layer_ceilings: Mapping[str, float],
) -> Callable[[Array], list[Objective]]:
    """Returns the loss and its regularisers at a step.

    The cross-entropy rides on the first regulariser that sees the same inputs, whose forward pass
    has its logits: passes of its own would cost two thirds of a plain step.
    """
    attacked = config.attack.name != "none"
    threat = ThreatModel(norm=config.threat.norm, epsilon=config.threat.epsilon)
    makers: list[tuple[bool, Callable[[Array, float], Objective]]] = []
    if layer_weights:
        gfa_weight_at = ramp(config.gfa.weight, config.gfa.warmup_fraction, config.train_steps)
        norms = {layer: norm for layer, norm in layer_norms.items() if layer in layer_weights}
        ceilings = {
            layer: ceiling for layer, ceiling in layer_ceilings.items() if layer in layer_weights
        }

        def alignment(step: Array, cross_entropy_weight: float) -> Objective:
            return objectives.gfa(
                gfa_weight_at(step),
                layer_weights=layer_weights,
                layer_norms=norms,
                layer_ceilings=ceilings,
                target=config.gfa.target,
                form=config.gfa.form,
                second_order=config.gfa.second_order,
                displacement=config.gfa.displacement,
                cross_entropy_weight=cross_entropy_weight,
            )

        makers.append((attacked and config.gfa.inputs == "attacked", alignment))
    for index, entry in enumerate(config.regularizers):
        if entry.weight == 0:
            continue
        weight_at = ramp(entry.weight, entry.warmup_fraction, config.train_steps)

        def regularizer(
            step: Array,
            cross_entropy_weight: float,
            index: int = index,
            entry: RegularizerConfig = entry,
            weight_at: Callable[[Array], float | Array] = weight_at,
        ) -> Objective:
            try:
                return objectives.regularizer(
                    entry.name,
                    weight_at(step),
                    threat=threat,
                    cross_entropy_weight=cross_entropy_weight,
                    **entry.options,
                )
            except ValueError as error:
                raise ValueError(f"config.regularizers[{index}]: {error}") from error

        makers.append((attacked and entry.inputs == "attacked", regularizer))
    host = None
    if config.loss.name == "cross_entropy" and not config.loss.label_smoothing:
        host = next((maker for maker in makers if maker[0] == attacked), None)
    if host is not None:
        makers.remove(host)
        makers.insert(0, host)

    def terms_at(step: Array) -> list[Objective]:
        terms = [
            _placed(moved, maker(step, float(index == 0 and host is not None)))
            for index, (moved, maker) in enumerate(makers)
        ]
        if host is None:
            loss = _loss(config.loss)
            paired = config.loss.name in PAIRED_LOSSES
            terms.insert(0, _placed(attacked and not paired, loss))
        return terms

    return terms_at


def _placed(moved: bool, objective: Objective) -> Objective:
    return objectives.at_adversarial(objective) if moved else objective


def _loss(loss: LossConfig) -> Objective:
    if loss.name == "cross_entropy":
        return objectives.cross_entropy(loss.label_smoothing)
    if loss.name == "trades":
        return objectives.trades(None, loss.beta, statistics=loss.statistics)
    if loss.name == "mart":
        return objectives.mart(None, loss.beta, statistics=loss.statistics)
    return objectives.logit_pairing(None, loss.beta, statistics=loss.statistics)


def _attack(config: TrainConfig, epsilon: float | Array) -> AttackFn:
    threat = ThreatModel(norm=config.threat.norm, epsilon=epsilon)
    options: dict[str, Any] = {
        "loss": config.attack.loss,
        # The attack's own start is not used where ``paired`` gives one.
        "random_start": config.attack.random_start or config.attack.start_std > 0,
    }
    if config.attack.name == "pgd":
        options |= {"num_steps": config.attack.num_steps, "keep": "last"}
    if config.attack.step_size is not None:
        # It follows the radius through its warm-up.
        share = epsilon / config.threat.epsilon if config.threat.epsilon > 0 else 1.0
        options["step_size"] = config.attack.step_size * share
    return attacks.create(config.attack.name, threat, **options)
