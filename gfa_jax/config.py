"""The schema of training recipes: primitives only, checked before anything is compiled or written.

A file in ``configs/`` returns a ``TrainConfig`` from ``get_config()``; the command line overrides
single fields (``--config.optimizer.learning_rate=0.1``). Only training, evaluation and
the command lines see these classes; everything below takes plain keyword arguments.
"""

import dataclasses
import difflib
import inspect
import json
import pathlib
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

from gfa_jax import _modules, _validate, alignment, files, losses, norms, objectives
from gfa_jax.models import MODELS
from gfa_jax.models.layers import INITIALIZERS

ATTACKS = ("none", "fgsm", "pgd")
LOSSES = ("cross_entropy", "trades", "mart", "logit_pairing")
PAIRED_LOSSES = ("trades", "mart", "logit_pairing")
"""The losses that see clean and adversarial examples side by side."""
NOISES = ("none", "uniform", "normal")
INPUTS = ("attacked", "clean")
OPTIMIZERS = ("adamw", "sgd")
SCHEDULES = ("constant", "cosine", "linear", "onecycle", "step")
Options = dict[str, bool | int | float | str | None]
"""Keyword arguments that ``config.json`` can hold."""
PRECISIONS = ("default", "high", "highest")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which examples are trained on, and how they are augmented."""

    name: str = "digits"
    """``digits``, ``arrays:PATH.npz``, or ``tfds:<name>``."""
    data_dir: str | None = None
    """Of tfds: where prepared data sets lie; its own default otherwise."""
    num_validation: int = 300
    """Examples held out of the training split, for tuning and checkpoint choice; test images serve
    neither."""
    max_train_examples: int | None = None
    """Train on the first so many only."""
    crop_padding: int = 0
    """Zero padding of the random crop, in pixels; 0 for no crop."""
    flip: bool = False
    """Random horizontal flips."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The classifier."""

    name: str = "cnn4"
    """A key of ``gfa_jax.models.MODELS``."""
    homogeneous: bool = True
    """Without biases and normalisation layers, as alignment needs it."""
    width: float = 1.0
    """Factor on all channel counts."""
    initializer: str = "he"
    """``he`` or ``orthogonal``."""
    input_mean: tuple[float, ...] = (0.0,)
    """Mean of the normalisation inside the model: one value, or one for each channel."""
    input_std: tuple[float, ...] = (1.0,)
    """Its standard deviation, in the same way."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ThreatConfig:
    """What the model should resist.

    Training attacks, alignment at the input, and evaluation use it.
    """

    norm: str = "linf"
    """``linf``, ``l2`` or ``l1``."""
    epsilon: float = 8 / 255
    """Radius, for images in [0, 1]."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """What is trained on the examples, before regularisers; see ``gfa_jax.objectives``."""

    name: str = "cross_entropy"
    """``cross_entropy`` (of adversarial examples where there is an attack), or a loss on pairs of
    clean and adversarial examples: ``trades``, ``mart`` or ``logit_pairing``."""
    beta: float = 6.0
    """Of the losses on pairs: the weight of what ties the two sides together."""
    label_smoothing: float = 0.0
    """Of cross_entropy, in [0, 1]."""
    statistics: str = "clean"
    """Of the losses on pairs: whose pass updates BatchNorm's running statistics, ``clean`` or
    ``adversarial``."""
    weight_perturbation: float = 0.0
    """gamma of adversarial weight perturbation (AWP), around the loss and all regularisers; 0 for
    none."""
    weight_perturbation_start: float = 0.0
    """Share of training after which it sets in."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoiseConfig:
    """Noise on the inputs, before anything else sees them: an attack starts from noisy inputs."""

    name: str = "none"
    """``none``, ``uniform`` (clipped to the box) or ``normal`` (not clipped)."""
    scale: float = 0.0
    """In input units: radius of uniform, standard deviation of normal."""
    warmup_fraction: float = 0.0
    """Share of training over which the scale rises linearly from 0."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RegularizerConfig:
    """A penalty that is added to the loss; not hashable, for its options are a dictionary."""

    name: str
    """A key of ``gfa_jax.objectives.REGULARIZERS``, or one of your own: ``package.module:function``
    or ``file.py:function``; see docs/objectives.md."""
    weight: float = 0.0
    """At the end of its warm-up; 0 switches the term off."""
    warmup_fraction: float = 0.0
    """Share of training over which the weight rises linearly from 0."""
    inputs: str = "clean"
    """``clean``, or ``attacked`` for adversarial examples where there is an attack."""
    options: Options = dataclasses.field(default_factory=dict)
    """Keyword arguments of the regulariser."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GFAConfig:
    """The alignment term; see ``gfa_jax.objectives.gfa``."""

    weight: float = 0.0
    """lambda at the end of its warm-up; 0 switches the term off."""
    warmup_fraction: float = 0.5
    """Share of training over which lambda rises linearly from 0."""
    inputs: str = "attacked"
    """``attacked`` (adversarial examples where there is an attack) or ``clean``."""
    target: str = "sampled_margin"
    """``sampled_margin``, ``log_odds``, ``margin``, ``cross_entropy`` or ``dlr``."""
    form: str = "log"
    """``linear``, ``log``, ``squared``, ``absolute`` or ``tangential``."""
    input_weight: float = 1.0
    """Weight of the normalised input among the layers; 0 leaves it out."""
    hidden_weight: float = 1.0
    """Weight of each hidden layer; 0 leaves them out."""
    hidden_layers: str = ""
    """Pattern of the hidden taps; empty for the model's own."""
    input_norm: str = "threat"
    """Norm of the input feature; ``threat`` for that of the threat model. Hidden layers use l2."""
    second_order: str = "exact"
    """``exact`` or ``finite_difference``."""
    displacement: float = 0.02
    """Of the finite difference, as a share of feature norms."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttackConfig:
    """Adversarial examples to train on."""

    name: str = "none"
    """``none`` (train on clean examples), ``fgsm`` or ``pgd``."""
    num_steps: int = 7
    """Of pgd."""
    step_size: float | None = None
    """In input units; by default 2.5 epsilon / num_steps (pgd) or 1.25 epsilon (fgsm)."""
    random_start: bool = True
    """Start at a random point of the ball."""
    start_std: float = 0.0
    """Of pgd: start instead at the clean input plus normal noise of this standard deviation, in
    input units; 0 leaves the start to random_start."""
    loss: str = "cross_entropy"
    """What the attack maximises: a key of ``gfa_jax.losses.LOSSES``, or ``kl`` (pgd alone)."""
    warmup_fraction: float = 0.0
    """Share of training over which epsilon rises linearly from 0. Bias-free networks need a gentle
    start."""
    train_mode: bool = False
    """Whether the attack sees BatchNorm in training mode."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optax chain: clipping, decay masked to kernels, update rule, schedule."""

    name: str = "adamw"
    """``adamw`` or ``sgd``."""
    learning_rate: float = 2e-3
    """Peak."""
    schedule: str = "onecycle"
    """``constant``, ``cosine``, ``linear``, ``onecycle`` (linear up over warmup_fraction, cosine
    down) or ``step`` (x0.1 at each of drops)."""
    warmup_fraction: float = 0.25
    """Of onecycle, and of the linear warm-up of the others (0 for none)."""
    drops: tuple[float, ...] = (0.5, 0.75)
    """Of step: shares of training, ascending."""
    momentum: float = 0.9
    """Of sgd."""
    nesterov: bool = True
    """Of sgd."""
    weight_decay: float = 1e-4
    """Applied to kernels only."""
    clip_norm: float = 1.0
    """Global gradient norm; 0 for no clipping."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How often training logs, evaluates and saves."""

    log_every: int = 20
    """Steps between lines of metrics.jsonl."""
    eval_every: int = 0
    """Steps between evaluations on the validation split; 0 for the end only."""
    eval_attack_steps: int = 10
    """Steps of the PGD (margin loss, the threat model) whose accuracy chooses the best checkpoint;
    0 for clean accuracy."""
    eval_examples: int = 1000
    """At most so many validation examples."""
    eval_batch_size: int = 250
    """Examples evaluated at once."""
    checkpoint_every: int = 0
    """Steps between checkpoints; 0 for the end only. An evaluation saves too."""
    keep_best: int = 1
    """Best checkpoints kept beside the latest."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A whole recipe."""

    seed: int = 0
    """Of initialisation, batches, augmentation and attacks."""
    batch_size: int = 64
    """Global; divisible by the number of devices."""
    train_steps: int = 1000
    """Optimiser steps."""
    precision: str = "default"
    """Of float32 products on accelerators (``jax_default_matmul_precision``): ``default``, ``high``
    or ``highest``. No effect on CPU."""
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    threat: ThreatConfig = ThreatConfig()
    loss: LossConfig = LossConfig()
    gfa: GFAConfig = GFAConfig()
    regularizers: tuple[RegularizerConfig, ...] = ()
    attack: AttackConfig = AttackConfig()
    noise: NoiseConfig = NoiseConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    loop: LoopConfig = LoopConfig()


def validate(config: TrainConfig, *, num_devices: int = 1) -> None:
    """Checks everything that needs neither data nor a model.

    Raises:
      ValueError: naming the field, its value and what would be valid.
    """
    _validate.positive_integer(
        **{
            "config.batch_size": config.batch_size,
            "config.train_steps": config.train_steps,
            "config.attack.num_steps": config.attack.num_steps,
            "config.loop.log_every": config.loop.log_every,
            "config.loop.eval_examples": config.loop.eval_examples,
            "config.loop.eval_batch_size": config.loop.eval_batch_size,
        }
    )
    if config.batch_size % num_devices:
        raise ValueError(
            f"config.batch_size={config.batch_size} must be divisible by the {num_devices} devices."
        )
    _validate.one_of(PRECISIONS, **{"config.precision": config.precision})
    _validate.one_of(MODELS, **{"config.model.name": config.model.name})
    _validate.one_of(INITIALIZERS, **{"config.model.initializer": config.model.initializer})
    _validate.one_of(norms.DUALS, **{"config.threat.norm": config.threat.norm})
    _validate.one_of(objectives.TARGETS, **{"config.gfa.target": config.gfa.target})
    _validate.one_of(alignment.FORMS, **{"config.gfa.form": config.gfa.form})
    _validate.one_of(("threat", *norms.DUALS), **{"config.gfa.input_norm": config.gfa.input_norm})
    _validate.one_of(
        objectives.SECOND_ORDER, **{"config.gfa.second_order": config.gfa.second_order}
    )
    _validate.one_of(INPUTS, **{"config.gfa.inputs": config.gfa.inputs})
    _validate.one_of(ATTACKS, **{"config.attack.name": config.attack.name})
    _validate.one_of((*losses.LOSSES, "kl"), **{"config.attack.loss": config.attack.loss})
    _validate.one_of(LOSSES, **{"config.loss.name": config.loss.name})
    _validate.one_of(objectives.STATISTICS, **{"config.loss.statistics": config.loss.statistics})
    _validate.one_of(NOISES, **{"config.noise.name": config.noise.name})
    _validate.one_of(OPTIMIZERS, **{"config.optimizer.name": config.optimizer.name})
    _validate.one_of(SCHEDULES, **{"config.optimizer.schedule": config.optimizer.schedule})
    _validate.positive(
        **{
            "config.model.width": config.model.width,
            "config.optimizer.learning_rate": config.optimizer.learning_rate,
            "config.attack.step_size": config.attack.step_size,
            "config.data.max_train_examples": config.data.max_train_examples,
            **{f"config.model.input_std[{i}]": std for i, std in enumerate(config.model.input_std)},
        }
    )
    _validate.non_negative(
        **{
            "config.threat.epsilon": config.threat.epsilon,
            "config.gfa.weight": config.gfa.weight,
            "config.gfa.input_weight": config.gfa.input_weight,
            "config.gfa.hidden_weight": config.gfa.hidden_weight,
            "config.loss.beta": config.loss.beta,
            "config.loss.weight_perturbation": config.loss.weight_perturbation,
            "config.attack.start_std": config.attack.start_std,
            "config.noise.scale": config.noise.scale,
            "config.optimizer.weight_decay": config.optimizer.weight_decay,
            "config.optimizer.clip_norm": config.optimizer.clip_norm,
            "config.data.num_validation": config.data.num_validation,
            "config.data.crop_padding": config.data.crop_padding,
            "config.loop.eval_every": config.loop.eval_every,
            "config.loop.eval_attack_steps": config.loop.eval_attack_steps,
            "config.loop.checkpoint_every": config.loop.checkpoint_every,
            "config.loop.keep_best": config.loop.keep_best,
        }
    )
    _validate.fraction(
        **{
            "config.gfa.warmup_fraction": config.gfa.warmup_fraction,
            "config.attack.warmup_fraction": config.attack.warmup_fraction,
            "config.noise.warmup_fraction": config.noise.warmup_fraction,
            "config.loss.label_smoothing": config.loss.label_smoothing,
            "config.loss.weight_perturbation_start": config.loss.weight_perturbation_start,
        }
    )
    for name, share in {
        "config.optimizer.warmup_fraction": config.optimizer.warmup_fraction,
        "config.optimizer.momentum": config.optimizer.momentum,
    }.items():
        if not 0 <= share < 1:
            raise ValueError(f"{name}={share} must lie in [0, 1).")
    drops = config.optimizer.drops
    if not all(0 < drop < 1 for drop in drops) or list(drops) != sorted(set(drops)):
        raise ValueError(f"config.optimizer.drops={drops} must ascend within (0, 1).")
    if not 0 < config.gfa.displacement < 1:
        raise ValueError(f"config.gfa.displacement={config.gfa.displacement} must lie in (0, 1).")
    input_norm = config.threat.norm if config.gfa.input_norm == "threat" else config.gfa.input_norm
    if config.gfa.form == "tangential" and config.gfa.input_weight > 0 and input_norm != "l2":
        raise ValueError(
            f"config.gfa.form='tangential' is defined for l2 alone, and config.gfa.input_norm is "
            f"{input_norm!r}: set config.gfa.input_norm='l2' or config.gfa.input_weight=0."
        )
    _validate_loss(config)
    for index, regularizer in enumerate(config.regularizers):
        _validate_regularizer(regularizer, f"config.regularizers[{index}]")


def _validate_loss(config: TrainConfig) -> None:
    """Checks what loss, attack and noise ask of each other."""
    attack, loss = config.attack, config.loss
    if loss.name in PAIRED_LOSSES and attack.name == "none":
        raise ValueError(
            f"config.loss.name={loss.name!r} needs adversarial examples, and "
            "config.attack.name='none': set it to 'pgd'."
        )
    if loss.label_smoothing and loss.name != "cross_entropy":
        raise ValueError(
            f"config.loss.label_smoothing={loss.label_smoothing} is for config.loss.name="
            f"'cross_entropy', which is {loss.name!r}."
        )
    for field, value in (
        ("loss", attack.loss if attack.loss == "kl" else None),
        ("start_std", attack.start_std),
    ):
        if value and attack.name != "pgd":
            raise ValueError(
                f"config.attack.{field}={value!r} needs config.attack.name='pgd', which is "
                f"{attack.name!r}."
            )
    if attack.name == "fgsm" and attack.step_size is not None and not attack.random_start:
        raise ValueError(
            f"config.attack.step_size={attack.step_size} needs config.attack.random_start=True: "
            "plain FGSM always moves by epsilon."
        )
    if attack.loss == "kl" and not (attack.random_start or attack.start_std):
        raise ValueError(
            "config.attack.loss='kl' has no gradient at the clean input: set "
            "config.attack.random_start=True or config.attack.start_std."
        )
    if (config.noise.name == "none") != (config.noise.scale == 0):
        raise ValueError(
            f"config.noise.name={config.noise.name!r} does not fit config.noise.scale="
            f"{config.noise.scale}: give both for noise, neither for none."
        )


def _validate_regularizer(regularizer: RegularizerConfig, path: str) -> None:
    name = regularizer.name
    if ":" not in name:  # Otherwise an entry of the user's own.
        _validate.one_of(objectives.REGULARIZERS, **{f"{path}.name": name})
    _validate.one_of(INPUTS, **{f"{path}.inputs": regularizer.inputs})
    _validate.non_negative(**{f"{path}.weight": regularizer.weight})
    _validate.fraction(**{f"{path}.warmup_fraction": regularizer.warmup_fraction})
    if not isinstance(regularizer.options, dict):
        raise ValueError(f"{path}.options={regularizer.options!r} must be a dictionary.")
    for option, value in regularizer.options.items():
        if type(value) not in (bool, int, float, str, type(None)) or not isinstance(option, str):
            raise ValueError(
                f"{path}.options[{option!r}]={value!r} of type {type(value).__name__} must be a "
                "bool, int, float, str or None under a name, so that config.json can hold it."
            )
    reserved = {"weight", "threat", "cross_entropy_weight"} & {*regularizer.options}
    if reserved:
        raise ValueError(
            f"{path}.options={regularizer.options} must not hold {sorted(reserved)}: the recipe "
            "gives them."
        )


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """Returns the nested fields as JSON-ready values (tuples as lists)."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(values: Mapping[str, Any]) -> TrainConfig:
    """Returns the config whose ``to_dict`` gave ``values``.

    Raises:
      ValueError: for unknown fields (with a suggestion): the file is of another version.
    """
    return _from_dict(TrainConfig, values, "config")


def read_saved(path: pathlib.Path) -> TrainConfig:
    """Returns the config in a run's ``config.json``.

    Raises:
      ValueError: for a damaged file or one of another version, naming it.
    """
    values = files.read_json(path).get("config")
    if not isinstance(values, dict):
        raise ValueError(f"{str(path)!r} is damaged: it holds no config.")
    return from_dict(values)


def _from_dict(cls: Any, values: Mapping[str, Any], path: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(cls)}
    arguments = {}
    for name, value in values.items():
        if name not in fields:
            raise ValueError(
                f"unknown field {path}.{name}.{_validate.suggestion(name, fields)} "
                f"Fields are {sorted(fields)}."
            )
        kind = fields[name].type
        element = typing.get_args(kind)[0] if typing.get_origin(kind) is tuple else None
        if dataclasses.is_dataclass(kind):
            value = _section(kind, value, f"{path}.{name}")
        elif dataclasses.is_dataclass(element) and isinstance(value, list):
            value = [
                _section(element, item, f"{path}.{name}[{index}]")
                for index, item in enumerate(value)
            ]
        arguments[name] = tuple(value) if isinstance(value, list) else value
    return cls(**arguments)


def _section(cls: Any, values: Any, path: str) -> Any:
    if not isinstance(values, Mapping):
        raise ValueError(f"{path}={values!r} must hold fields.")
    return _from_dict(cls, values, path)


FREE_FIELDS = frozenset(
    {"config.data.data_dir", "config.loop.log_every", "config.loop.checkpoint_every"}
)
"""Fields that may change when a run is resumed: no result depends on them."""


def differences(old: Mapping[str, Any], new: Mapping[str, Any], path: str = "config") -> list[str]:
    """Returns a line for each field that differs between two dicts, the free ones aside."""
    lines = []
    for name in sorted({*old, *new}):
        before, after = old.get(name), new.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += differences(before, after, f"{path}.{name}")
        elif _are_sections(before) and _are_sections(after) and len(before) == len(after):
            for index, pair in enumerate(zip(before, after, strict=True)):
                lines += differences(*pair, f"{path}.{name}[{index}]")
        elif before != after and f"{path}.{name}" not in FREE_FIELDS:
            lines.append(f"{path}.{name}: {before!r} there, {after!r} now")
    return lines


def _are_sections(value: Any) -> TypeGuard[list[Mapping[str, Any]]]:
    return isinstance(value, list) and all(isinstance(item, Mapping) for item in value)


def choose(recipes: Mapping[str, Callable[[], TrainConfig]], name: str) -> TrainConfig:
    """Returns the named one of several recipes: ``get_config(name)`` of a file that holds many.

    Raises:
      ValueError: for an unknown name, with a suggestion.
    """
    _validate.one_of(recipes, recipe=name)
    return recipes[name]()


def load_file(path: str) -> TrainConfig:
    """Returns ``get_config()`` of a Python file, or ``get_config(NAME)`` for ``FILE.py:NAME``.

    Raises:
      FileNotFoundError: for a missing file, with close matches.
      ValueError: for a file without ``get_config()``, one that takes a name and gets none (or the
        reverse), a name that it does not know, or one that returns something else.
    """
    path, separator, name = path.partition(".py:")
    path += ".py" if separator else ""
    file = pathlib.Path(path)
    if not file.is_file():
        candidates = (
            [str(other) for other in file.parent.glob("*.py")] if file.parent.is_dir() else []
        )
        close = difflib.get_close_matches(str(file), candidates, n=3)
        known = (
            f" Close: {', '.join(close)}."
            if close
            else f" There: {', '.join(sorted(candidates)) or 'nothing'}."
        )
        raise FileNotFoundError(f"config file {path!r} does not exist.{known}")
    module = _modules.run_module(file, f"gfa_jax_config_{file.stem}")
    if not hasattr(module, "get_config"):
        raise ValueError(f"config file {path!r} has no get_config().")
    parameters = inspect.signature(module.get_config).parameters.values()
    takes_name = any(parameter.default is parameter.empty for parameter in parameters)
    if takes_name != bool(name):
        names = ", ".join(getattr(module, "RECIPES", ()))
        raise ValueError(
            f"config file {path!r} holds several recipes: name one, as in {path}:NAME"
            f"{f' ({names})' if names else ''}."
            if takes_name
            else f"config file {path!r} holds one recipe, and takes no name such as {name!r}."
        )
    config = module.get_config(name) if name else module.get_config()
    if not isinstance(config, TrainConfig):
        raise ValueError(
            f"get_config() of {path!r} returns {type(config).__name__}, "
            "not gfa_jax.config.TrainConfig."
        )
    return config
