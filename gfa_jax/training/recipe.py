"""From a config to the functions that training and evaluation run: the one translator."""

import dataclasses
import re
from collections.abc import Callable

import flax.linen as nn
import jax
import optax

from gfa_jax import attacks, models, objectives
from gfa_jax.config import TrainConfig
from gfa_jax.data import random_crop_flip, to_float
from gfa_jax.threat import ThreatModel
from gfa_jax.training import optimizers
from gfa_jax.types import Array, Objective


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a config means for a data set of given classes and image shape.

    Attributes:
      module: the classifier.
      image_shape: ``(H, W, C)``.
      threat: the threat model.
      layers: all taps of the model that are reported.
      layer_norms: norm of each tap that is not l2.
      train_layers: the taps that the objective aligns; empty without alignment.
      objective_at: the objective at a step.
      learning_rate: schedule.
      optimizer: the chain.
      augment: ``(key, stored images) -> inputs``.
    """

    module: nn.Module
    image_shape: tuple[int, ...]
    threat: ThreatModel
    layers: tuple[str, ...]
    layer_norms: dict[str, str]
    train_layers: tuple[str, ...]
    objective_at: Callable[[Array], Objective]
    learning_rate: optax.Schedule
    optimizer: optax.GradientTransformation
    augment: Callable[[Array, Array], Array]


def build(config: TrainConfig, *, num_classes: int, image_shape: tuple[int, ...]) -> Recipe:
    """Builds the recipe.

    Raises:
      ValueError: where model and images do not fit, naming the fields.
    """
    spec = models.MODELS[config.model.name]
    height, width, channels = image_shape
    if min(height, width) < spec.min_size:
        raise ValueError(
            f"config.model.name={config.model.name!r} needs images of at least "
            f"{spec.min_size}x{spec.min_size}; config.data.name={config.data.name!r} has "
            f"{height}x{width}."
        )
    for field in ("input_mean", "input_std"):
        values = getattr(config.model, field)
        if len(values) not in (1, channels):
            raise ValueError(
                f"config.model.{field}={values} must have one value, or {channels} for images of "
                f"{channels} channels."
            )
    module = models.create(
        config.model.name,
        num_classes=num_classes,
        homogeneous=config.model.homogeneous,
        width=config.model.width,
        initializer=config.model.initializer,
        input_mean=config.model.input_mean,
        input_std=config.model.input_std,
    )
    learning_rate = optimizers.schedule(
        config.optimizer.schedule,
        learning_rate=config.optimizer.learning_rate,
        num_steps=config.train_steps,
        warmup_fraction=config.optimizer.warmup_fraction,
    )
    optimizer = optimizers.create(
        config.optimizer.name,
        learning_rate,
        momentum=config.optimizer.momentum,
        weight_decay=config.optimizer.weight_decay,
        clip_norm=config.optimizer.clip_norm,
    )
    hidden = config.gfa.hidden_layers or spec.hidden_layers
    try:
        re.compile(hidden)
    except re.error as error:
        raise ValueError(
            f"config.gfa.hidden_layers={hidden!r} is not a valid regular expression: {error}."
        ) from error
    input_norm = config.threat.norm if config.gfa.input_norm == "threat" else config.gfa.input_norm
    if hidden == spec.input_layer:
        raise ValueError(
            f"config.gfa.hidden_layers={hidden!r} is the input's tap: weigh it by "
            "config.gfa.input_weight, and set config.gfa.hidden_weight=0 to align nothing else."
        )
    # The first pattern that matches a tap counts: a broad one leaves the input its own weight.
    aligned = {spec.input_layer: config.gfa.input_weight, hidden: config.gfa.hidden_weight}
    if config.gfa.hidden_weight == 0:
        del aligned[hidden]
    if config.gfa.input_weight == 0 and not (
        config.gfa.hidden_weight > 0 and re.fullmatch(hidden, spec.input_layer)
    ):
        del aligned[spec.input_layer]
    if config.gfa.weight == 0:
        aligned = {}
    elif not any(aligned.values()):
        raise ValueError(
            "config.gfa.input_weight=0 and config.gfa.hidden_weight=0 leave no layer to align: set "
            "config.gfa.weight=0 for none."
        )

    def augment(key: Array, images: Array) -> Array:
        return random_crop_flip(
            key, to_float(images), padding=config.data.crop_padding, flip=config.data.flip
        )

    return Recipe(
        module=module,
        image_shape=image_shape,
        threat=ThreatModel(norm=config.threat.norm, epsilon=config.threat.epsilon),
        layers=(spec.input_layer, hidden),
        layer_norms={spec.input_layer: input_norm},
        train_layers=tuple(aligned),
        objective_at=_objective_at(config, aligned, {spec.input_layer: input_norm}),
        learning_rate=learning_rate,
        optimizer=optimizer,
        augment=augment,
    )


def _ramp(final: float, fraction: float, num_steps: int) -> Callable[[Array], float | Array]:
    """Returns a linear rise from 0 to ``final`` over a share of training.

    Where nothing changes, it gives a plain number.
    """
    steps = round(fraction * num_steps)
    if final == 0 or steps == 0:
        return lambda step: final
    return optax.schedules.linear_schedule(0.0, final, steps)


def _objective_at(
    config: TrainConfig, layer_weights: dict[str, float], layer_norms: dict[str, str]
) -> Callable[[Array], Objective]:
    weight_at = _ramp(config.gfa.weight, config.gfa.warmup_fraction, config.train_steps)
    epsilon_at = _ramp(config.threat.epsilon, config.attack.warmup_fraction, config.train_steps)

    def objective_at(step: Array) -> Objective:
        objective = objectives.gfa(
            weight_at(step),
            layer_weights=layer_weights,
            layer_norms={
                layer: norm for layer, norm in layer_norms.items() if layer in layer_weights
            },
            target=config.gfa.target,
            form=config.gfa.form,
            second_order=config.gfa.second_order,
            displacement=config.gfa.displacement,
        )
        if config.attack.name == "none":
            return objective
        epsilon = epsilon_at(step)
        threat = ThreatModel(norm=config.threat.norm, epsilon=epsilon)
        step_size: float | Array | None = config.attack.step_size
        if step_size is not None and config.threat.epsilon > 0:
            # It follows the radius through its warm-up.
            step_size = step_size / config.threat.epsilon * epsilon
        attack = attacks.create(config.attack.name, threat, **_attack_options(config, step_size))
        return objectives.adversarial(attack, objective, attack_train_mode=config.attack.train_mode)

    # Raises on bad options now.
    jax.eval_shape(lambda step: (objective_at(step), step)[1], jax.ShapeDtypeStruct((), "int32"))
    return objective_at


def _attack_options(config: TrainConfig, step_size: float | Array | None) -> dict[str, object]:
    options: dict[str, object] = {"random_start": config.attack.random_start}
    if config.attack.name == "pgd":
        options |= {"num_steps": config.attack.num_steps, "keep": "last"}
    if step_size is not None:
        options["step_size"] = step_size
    return options
