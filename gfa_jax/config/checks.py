"""What a recipe's fields must be, checked before anything is compiled or written."""

from gfa_jax import _validate, alignment, losses, norms, objectives
from gfa_jax.config.schema import (
    ATTACKS,
    INPUTS,
    LOSSES,
    NOISES,
    OPTIMIZERS,
    PAIRED_LOSSES,
    PARALLELISMS,
    PRECISIONS,
    SCHEDULES,
    RegularizerConfig,
    TrainConfig,
)
from gfa_jax.data import PLACEMENTS
from gfa_jax.models import MODELS
from gfa_jax.models.activations import ACTIVATIONS
from gfa_jax.models.layers import INITIALIZERS
from gfa_jax.models.registry import DTYPES


def validate(config: TrainConfig, *, num_devices: int = 1, num_processes: int = 1) -> None:
    """Checks everything that needs neither data nor a model.

    Args:
      config: the recipe.
      num_devices: of all processes.
      num_processes: that train together.

    Raises:
      ValueError: naming the field, its value and what would be valid.
    """
    _validate.positive_integer(
        **{
            "config.batch_size": config.batch_size,
            "config.train_steps": config.train_steps,
            "config.fsdp": config.fsdp,
            "config.accumulation_steps": config.accumulation_steps,
            "config.attack.num_steps": config.attack.num_steps,
            "config.loop.log_every": config.loop.log_every,
            "config.loop.eval_examples": config.loop.eval_examples,
            "config.loop.eval_batch_size": config.loop.eval_batch_size,
        }
    )
    _validate_parallelism(config, num_devices, num_processes)
    _validate.one_of(DTYPES, **{"config.model.dtype": config.model.dtype})
    _validate.one_of(PLACEMENTS, **{"config.data.placement": config.data.placement})
    _validate.one_of(PRECISIONS, **{"config.precision": config.precision})
    _validate.one_of(MODELS, **{"config.model.name": config.model.name})
    _validate.one_of(ACTIVATIONS, **{"config.model.activation_fn": config.model.activation_fn})
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
        "config.ema_decay": config.ema_decay,
    }.items():
        if not 0 <= share < 1:
            raise ValueError(f"{name}={share} must lie in [0, 1).")
    drops = config.optimizer.drops
    if not all(0 < drop < 1 for drop in drops) or list(drops) != sorted(set(drops)):
        raise ValueError(f"config.optimizer.drops={drops} must ascend within (0, 1).")
    if not 0 < config.gfa.displacement < 1:
        raise ValueError(f"config.gfa.displacement={config.gfa.displacement} must lie in (0, 1).")
    if not 0 < config.gfa.input_ceiling <= 1:
        raise ValueError(f"config.gfa.input_ceiling={config.gfa.input_ceiling} must lie in (0, 1].")
    if config.gfa.form == "tangential" and config.gfa.input_ceiling < 1:
        raise ValueError(
            f"config.gfa.input_ceiling={config.gfa.input_ceiling}: the form 'tangential' has no "
            "ceiling."
        )
    input_norm = config.threat.norm if config.gfa.input_norm == "threat" else config.gfa.input_norm
    if config.gfa.form == "tangential" and config.gfa.input_weight > 0 and input_norm != "l2":
        raise ValueError(
            f"config.gfa.form='tangential' is defined for l2 alone, and config.gfa.input_norm is "
            f"{input_norm!r}: set config.gfa.input_norm='l2' or config.gfa.input_weight=0."
        )
    _validate_loss(config)
    for index, regularizer in enumerate(config.regularizers):
        _validate_regularizer(regularizer, f"config.regularizers[{index}]")


def _validate_parallelism(config: TrainConfig, num_devices: int, num_processes: int) -> None:
    _validate.one_of(PARALLELISMS, **{"config.parallelism": config.parallelism})
    parts = num_devices * config.accumulation_steps
    if config.batch_size % parts:
        times = (
            f" times config.accumulation_steps={config.accumulation_steps}"
            if config.accumulation_steps > 1
            else ""
        )
        raise ValueError(
            f"config.batch_size={config.batch_size} must be divisible by the {num_devices} devices"
            f"{times}."
        )
    if num_devices % config.fsdp:
        raise ValueError(
            f"config.fsdp={config.fsdp} must be a divisor of the {num_devices} devices."
        )
    if config.parallelism == "pmap" and num_processes > 1:
        raise ValueError(
            f"config.parallelism='pmap' runs in one process, and there are {num_processes}: use "
            "'jit'."
        )
    if config.parallelism == "pmap" and config.fsdp > 1:
        raise ValueError(
            f"config.fsdp={config.fsdp} needs config.parallelism='jit': pmap keeps state whole."
        )
    if config.parallelism == "pmap" and config.loss.weight_perturbation > 0:
        raise ValueError(
            f"config.loss.weight_perturbation={config.loss.weight_perturbation} needs "
            "config.parallelism='jit': pmap would perturb along each device's own gradient."
        )


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
