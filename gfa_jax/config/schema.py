"""The fields of a recipe: frozen dataclasses of primitives, with their defaults."""

import dataclasses

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
PARALLELISMS = ("jit", "pmap")


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
    placement: str = "auto"
    """Where training examples lie: ``device`` (all of them on every device), ``host`` (in memory),
    ``stream`` (on disk, decoded when needed; needs the grain extra), or ``auto``: ``device`` where
    they fit, else ``host``. The batches are the same."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The classifier."""

    name: str = "cnn4"
    """A key of ``gfa_jax.models.MODELS``."""
    homogeneous: bool = True
    """Without biases and normalisation layers, as alignment needs it."""
    width: float = 1.0
    """Factor on all channel counts."""
    activation_fn: str = "relu"
    """``relu``, ``leaky_relu``, ``scaled_silu`` (smooth and homogeneous), or, where ``homogeneous``
    is false, ``gelu`` or ``silu``."""
    initializer: str = "he"
    """``he`` or ``orthogonal``."""
    input_mean: tuple[float, ...] = (0.0,)
    """Mean of the normalisation inside the model: one value, or one for each channel."""
    input_std: tuple[float, ...] = (1.0,)
    """Its standard deviation, in the same way."""
    dtype: str = "float32"
    """Of the model's computation in training, ``float32`` or ``bfloat16``. Parameters, statistics,
    logits, losses and alignment are float32 in either; evaluation computes in float32."""
    remat: bool = False
    """Compute each block again in backward passes instead of keeping what is inside: less memory,
    more time."""


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
    input_ceiling: float = 1.0
    """Alignment of the input beyond which nothing more is asked of an example, in (0, 1]; 1 for no
    ceiling. For the l_inf norm it is about the radius over the largest normalised pixel."""
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
    """Global; divisible by the number of devices times accumulation_steps."""
    train_steps: int = 1000
    """Optimiser steps."""
    precision: str = "default"
    """Of float32 products on accelerators (``jax_default_matmul_precision``): ``default``, ``high``
    or ``highest``. No effect on CPU."""
    parallelism: str = "jit"
    """``jit`` (one program on global arrays) or ``pmap`` (one on each device's share)."""
    fsdp: int = 1
    """Devices over which parameters and the optimiser's state are split, a divisor of their number;
    1 keeps them whole on every device."""
    accumulation_steps: int = 1
    """Parts of a batch whose gradients are averaged, one after another: memory is that of a part.
    BatchNorm and weight perturbations see the parts."""
    ema_decay: float = 0.0
    """Of an exponential moving average of the weights, which is what evaluations use; 0 for
    none."""
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
