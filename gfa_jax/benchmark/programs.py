"""What is measured: compiled training steps and attacks on synthetic images that lie on devices."""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gfa_jax import _validate, attacks, cli, data, models
from gfa_jax import config as config_lib
from gfa_jax.config import (
    AttackConfig,
    DataConfig,
    GFAConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from gfa_jax.threat import ThreatModel
from gfa_jax.training import dry_run, flops, layout, recipe
from gfa_jax.types import Array


class Program(NamedTuple):
    """A compiled program on its arguments.

    Attributes:
      start: runs it once more, without waiting for it; returns what to wait for.
      batch_size: examples that a run takes, over all devices.
      flops: operations of its products, loops included, over all devices; ``None`` where a loop has
        no fixed length.
      memory_bytes: of one device at its peak; ``None`` where the compiler does not tell.
      trace_seconds: from Python to XLA's input.
      compile_seconds: of XLA.
      compiled: the program itself.
    """

    start: Callable[[], Any]
    batch_size: int
    flops: int | None
    memory_bytes: int | None
    trace_seconds: float
    compile_seconds: float
    compiled: jax.stages.Compiled


_GFA = GFAConfig(weight=1.0, warmup_fraction=0.0)
_PGD = AttackConfig(name="pgd", num_steps=10)

STEPS: Mapping[str, Mapping[str, Any]] = {
    "standard": {},
    "gfa": {"gfa": _GFA},
    "gfa_finite_difference": {
        "gfa": dataclasses.replace(_GFA, second_order="finite_difference"),
    },
    "gfa_input": {"gfa": dataclasses.replace(_GFA, hidden_weight=0.0)},
    "fgsm_at": {"attack": AttackConfig(name="fgsm")},
    "pgd_at": {"attack": _PGD},
    "trades": {"attack": dataclasses.replace(_PGD, loss="kl"), "loss": LossConfig(name="trades")},
    "gfa_at": {"attack": _PGD, "gfa": _GFA},
}
"""Sections of the config by step: GFA aligns the input and all hidden layers (``gfa_input`` the
input alone), attacks take 10 steps of PGD or one of FGSM, ``gfa_at`` aligns at PGD's examples."""


class Task(NamedTuple):
    """What the programs of one group have in common.

    Attributes:
      model: a key of ``models.MODELS``.
      dtype: of the model's computation in training steps; attacks compute in float32.
      batch_size: over all devices.
      image_shape: ``(H, W, C)``.
      num_classes: C.
      homogeneous: whether the model takes its homogeneous form, where it has one.
      remat: whether training steps compute blocks again.
      precision: of float32 products.
    """

    model: str
    dtype: str = "float32"
    batch_size: int = 128
    image_shape: tuple[int, int, int] = (32, 32, 3)
    num_classes: int = 10
    homogeneous: bool = True
    remat: bool = False
    precision: str = "default"


def step_config(step: str, task: Task) -> TrainConfig:
    """Returns the recipe of a step.

    Args:
      step: ``name[:field=value[:field=value]]``: a key of ``STEPS``, then fields of the config that
        differ, such as ``pgd_at:attack.num_steps=5``.
      task: model, batch and precision.

    Raises:
      ValueError: for an unknown step or field, or values that are not valid.
    """
    name, *changes = step.strip().split(":")
    if name not in STEPS:
        raise ValueError(f"steps={step!r} is unknown; valid: {', '.join(STEPS)}.")
    _validate.one_of(models.MODELS, model=task.model)
    spec = models.MODELS[task.model]
    config = TrainConfig(
        batch_size=task.batch_size,
        precision=task.precision,
        data=DataConfig(crop_padding=4, flip=True),
        model=ModelConfig(
            name=task.model,
            homogeneous=task.homogeneous and spec.has_homogeneous_form,
            dtype=task.dtype,
            remat=task.remat,
        ),
        # So slow that the weights stay as they are, whatever the images.
        optimizer=OptimizerConfig(name="sgd", learning_rate=1e-6, schedule="constant"),
        **STEPS[name],
    )
    values = config_lib.to_dict(config)
    for change in changes:
        path, separator, text = change.partition("=")
        *sections, field = path.split(".")
        section: Any = values
        for part in sections:
            section = section.get(part) if isinstance(section, dict) else None
        known = isinstance(section, dict) and field in section
        if not separator or not known or isinstance(section[field], dict | list):
            raise ValueError(
                f"steps={step!r}: {change!r} is not field=value with a field of the config that "
                "has one value, such as attack.num_steps=5."
                + (_validate.suggestion(field, section) if isinstance(section, dict) else "")
            )
        section[field] = cli.parse_value(text, section[field], f"steps={step!r}: {path}")
    config = config_lib.from_dict(values)
    config_lib.validate(config, num_devices=jax.device_count())
    return config


def adapted(config: TrainConfig, task: Task) -> TrainConfig:
    """Returns a recipe with the model, batch, type and precision of a task.

    Raises:
      ValueError: where they do not go together.
    """
    model = dataclasses.replace(config.model, name=task.model, dtype=task.dtype, remat=task.remat)
    config = dataclasses.replace(
        config, model=model, batch_size=task.batch_size, precision=task.precision
    )
    config_lib.validate(config, num_devices=jax.device_count())
    return config


def train_step(config: TrainConfig, task: Task) -> Program:
    """Compiles the training step of a recipe, exactly as ``train.py`` does.

    Raises:
      ValueError: where the recipe and the images do not fit.
    """
    built = recipe.build(config, num_classes=task.num_classes, image_shape=task.image_shape)
    mesh = layout.data_mesh(fsdp=config.fsdp)
    step = built.train_step(mesh)
    key = layout.everywhere(lambda: jax.random.key(0), mesh)
    split = layout.split(mesh)
    examples = {name: jax.device_put(value, split) for name, value in batch(task).items()}
    template = built.template(mesh)
    with jax.default_matmul_precision(config.precision):
        operations = flops.count(step, template, examples, key)
        compiled, seconds = _compile(step, template, examples, key)
        state = jax.jit(built.init, out_shardings=built.shardings(mesh))(jax.random.key(0))

    def start() -> Any:
        nonlocal state
        state, metrics = compiled(state, examples, key)
        return metrics

    return Program(start, task.batch_size, operations, _memory(compiled), *seconds, compiled)


def create_attack(name: str, options: Mapping[str, Any], threat: ThreatModel) -> attacks.Attack:
    """Returns an attack that is one program.

    Raises:
      ValueError: for an unknown attack or option, or an ensemble.
    """
    made = attacks.create(name, threat, **options)
    if isinstance(made, attacks.Ensemble):
        raise ValueError(
            f"attacks={name!r} is an ensemble, which runs from the host: name its parts, or see "
            "benchmarks/attacks.py."
        )
    return made


def attack(name: str, options: Mapping[str, Any], threat: ThreatModel, task: Task) -> Program:
    """Compiles an attack on one batch and an untrained model, whose own predictions are the labels.

    Examples that are done stay in the batch. The attacks that take a batch apart on the host
    (``compaction``) need a trained model to show what they save: ``benchmarks/attacks.py``.

    Args:
      name: a key of ``attacks.REGISTRY`` that is one attack.
      options: its options.
      threat: ball and box.
      task: model, batch and precision.

    Raises:
      ValueError: for an unknown attack or option, or an ensemble.
    """
    made = create_attack(name, options, threat)
    module = models.create(
        task.model,
        num_classes=task.num_classes,
        homogeneous=task.homogeneous and models.MODELS[task.model].has_homogeneous_form,
    )
    images, mesh = data.to_float(batch(task)["inputs"]), layout.data_mesh()
    with jax.default_matmul_precision(task.precision):
        variables = jax.jit(functools.partial(module.init, train=False))(
            jax.random.key(0), images[:1]
        )
        apply = jax.jit(functools.partial(module.apply, train=False))
        labels = jnp.argmax(apply(variables, images), axis=1)
        variables = jax.device_put(variables, layout.replicated(mesh))
        keys = attacks.example_keys(jax.random.key(0), jnp.arange(task.batch_size))
        examples = jax.device_put((keys, images, labels), layout.split(mesh))

        def run(variables: Any, keys: Array, images: Array, labels: Array) -> Any:
            return made(
                lambda inputs: module.apply(variables, inputs, train=False), keys, images, labels
            )

        arguments = (variables, *examples)
        try:
            operations: int | None = flops.count(run, *arguments)
        except ValueError:
            operations = None
        compiled, seconds = _compile(jax.jit(run), *arguments)
    return Program(
        lambda: compiled(*arguments),
        task.batch_size,
        operations,
        _memory(compiled),
        *seconds,
        compiled,
    )


def product(size: int = 2048) -> Program:
    """A matrix product: what the device reaches with nothing else to do."""
    one, other = jax.random.normal(jax.random.key(0), (2, size, size))
    compiled, seconds = _compile(jax.jit(jnp.matmul), one, other)
    return Program(
        lambda: compiled(one, other), 1, 2 * size**3, _memory(compiled), *seconds, compiled
    )


def batch(task: Task) -> dict[str, Array]:
    """Returns random images, uint8 ``[B, H, W, C]``, and labels, int32 ``[B]``."""
    pixels, labels = jax.random.split(jax.random.key(1))
    shape = (task.batch_size, *task.image_shape)
    return {
        "inputs": jax.random.randint(pixels, shape, 0, 256).astype(jnp.uint8),
        "labels": jax.random.randint(labels, shape[:1], 0, task.num_classes),
    }


def _compile(function: Any, *args: Any) -> tuple[jax.stages.Compiled, tuple[float, float]]:
    started = time.perf_counter()
    lowered = function.lower(*args)
    traced = time.perf_counter()
    compiled = lowered.compile()
    return compiled, (traced - started, time.perf_counter() - traced)


def _memory(compiled: jax.stages.Compiled) -> int | None:
    memory = compiled.memory_analysis()
    return None if memory is None else dry_run.peak_bytes(memory)
