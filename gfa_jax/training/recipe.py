"""From a config to the functions that training and evaluation run.

``objective`` beside it translates the objective.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import optax

from gfa_jax import models
from gfa_jax.config import TrainConfig
from gfa_jax.data import random_crop_flip, to_float
from gfa_jax.threat import ThreatModel
from gfa_jax.training import layout, objective, optimizers, state, step
from gfa_jax.types import Array


@dataclasses.dataclass(frozen=True)
class Classifier:
    """What a config says about the trained model: all that an evaluation needs.

    Attributes:
      module: the classifier.
      image_shape: ``(H, W, C)``.
      threat: the threat model.
      layers: all taps of the model that are reported.
      layer_norms: norm of each tap that is not l2.
    """

    module: nn.Module
    image_shape: tuple[int, ...]
    threat: ThreatModel
    layers: tuple[str, ...]
    layer_norms: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Recipe(Classifier):
    """What a config means for a data set of given classes and image shape.

    Attributes:
      train_layers: the taps that the objective aligns; empty without alignment.
      objective_at: the objective at a step.
      learning_rate: schedule.
      optimizer: the chain.
      augment: ``(key, stored images) -> inputs``.
      step_options: more keyword arguments of ``step.make_train_step``.
    """

    train_layers: tuple[str, ...]
    objective_at: objective.ObjectiveAt
    learning_rate: optax.Schedule
    optimizer: optax.GradientTransformation
    augment: Callable[[Array, Array], Array]
    step_options: Mapping[str, Any]

    def init(self, key: Array) -> state.TrainState:
        """Returns the state at step 0; traceable."""
        return state.create(
            self.module,
            self.optimizer,
            key,
            self.image_shape,
            with_ema=self.step_options["ema_decay"] > 0,
        )

    def train_step(self, mesh: jax.sharding.Mesh) -> step.TrainStep:
        """Returns the jitted training step; see ``step.make_train_step``."""
        return step.make_train_step(
            self.module,
            self.objective_at,
            self.optimizer,
            layers=self.train_layers,
            augment=self.augment,
            mesh=mesh,
            shardings=self.shardings(mesh),
            **self.step_options,
        )

    def shardings(self, mesh: jax.sharding.Mesh) -> state.TrainState:
        """Returns where the arrays of the state lie."""
        return layout.of_state(mesh, jax.eval_shape(self.init, jax.random.key(0)))

    def template(self, mesh: jax.sharding.Mesh) -> state.TrainState:
        """Returns shapes, dtypes and shardings of the state, on all devices of the mesh."""
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            jax.eval_shape(self.init, jax.random.key(0)),
            self.shardings(mesh),
        )


def build_classifier(
    config: TrainConfig,
    *,
    num_classes: int,
    image_shape: tuple[int, ...],
    for_training: bool = False,
) -> Classifier:
    """Builds the classifier; nothing that only training needs is looked at.

    Args:
      config: the recipe.
      num_classes: of the data.
      image_shape: ``(H, W, C)``.
      for_training: whether it computes as ``config.model.dtype`` and ``remat`` say. Otherwise it is
        in float32, whatever it was trained in: attacks follow gradients that bfloat16 blurs.

    Raises:
      ValueError: where model and images do not fit, or for a pattern of layers that is no regular
        expression, naming the fields.
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
        activation_fn=config.model.activation_fn,
        initializer=config.model.initializer,
        input_mean=config.model.input_mean,
        input_std=config.model.input_std,
        **(_training_options(config) if for_training else {}),
    )
    hidden = config.gfa.hidden_layers or spec.hidden_layers
    try:
        re.compile(hidden)
    except re.error as error:
        raise ValueError(
            f"config.gfa.hidden_layers={hidden!r} is not a valid regular expression: {error}."
        ) from error
    input_norm = config.threat.norm if config.gfa.input_norm == "threat" else config.gfa.input_norm
    return Classifier(
        module=module,
        image_shape=image_shape,
        threat=ThreatModel(norm=config.threat.norm, epsilon=config.threat.epsilon),
        layers=(spec.input_layer, hidden),
        layer_norms={spec.input_layer: input_norm},
    )


def _training_options(config: TrainConfig) -> dict[str, Any]:
    """Returns how the model computes in training: memory, speed and devices, not its function."""
    return {
        "dtype": config.model.dtype,
        "remat": config.model.remat,
        "axis_name": layout.DATA_AXIS if config.parallelism == "pmap" else None,
    }


def build(config: TrainConfig, *, num_classes: int, image_shape: tuple[int, ...]) -> Recipe:
    """Builds the recipe.

    Raises:
      ValueError: where model and images do not fit, or for options that a part of the objective
        refuses, naming the fields.
    """
    classifier = build_classifier(
        config, num_classes=num_classes, image_shape=image_shape, for_training=True
    )
    input_layer, hidden = classifier.layers
    learning_rate = optimizers.schedule(
        config.optimizer.schedule,
        learning_rate=config.optimizer.learning_rate,
        num_steps=config.train_steps,
        warmup_fraction=config.optimizer.warmup_fraction,
        drops=config.optimizer.drops,
    )
    optimizer = optimizers.create(
        config.optimizer.name,
        learning_rate,
        momentum=config.optimizer.momentum,
        nesterov=config.optimizer.nesterov,
        weight_decay=config.optimizer.weight_decay,
        clip_norm=config.optimizer.clip_norm,
    )
    if hidden == input_layer:
        raise ValueError(
            f"config.gfa.hidden_layers={hidden!r} is the input's tap: weigh it by "
            "config.gfa.input_weight, and set config.gfa.hidden_weight=0 to align nothing else."
        )
    # The first pattern that matches a tap counts: a broad one leaves the input its own weight.
    aligned = {input_layer: config.gfa.input_weight, hidden: config.gfa.hidden_weight}
    if config.gfa.hidden_weight == 0:
        del aligned[hidden]
    if config.gfa.input_weight == 0 and not (
        config.gfa.hidden_weight > 0 and re.fullmatch(hidden, input_layer)
    ):
        del aligned[input_layer]
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
        **vars(classifier),
        train_layers=tuple(aligned),
        objective_at=objective.objective_at(
            config, aligned, classifier.layer_norms, {input_layer: config.gfa.input_ceiling}
        ),
        learning_rate=learning_rate,
        optimizer=optimizer,
        augment=augment,
        step_options={
            "parallelism": config.parallelism,
            "accumulation_steps": config.accumulation_steps,
            "ema_decay": config.ema_decay,
        },
    )
