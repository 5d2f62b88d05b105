"""Models by name."""

import dataclasses
from collections.abc import Callable, Sequence

import flax.linen as nn

from gfa_jax import _validate
from gfa_jax.models.cnn import CNN, INITIALIZERS

ModelFactory = Callable[..., nn.Module]


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """One entry of the registry.

    Attributes:
      factory: ``(num_classes, homogeneous, width, initializer, input_mean, input_std) -> module``
        (all by keyword); the module's ``__call__`` is ``(inputs, train) -> logits``.
      input_layer: the tap of the network's normalised input.
      hidden_layers: the pattern of the taps that are aligned by default.
      min_size: the smallest image height and width that the model takes.
      description: one line.
    """

    factory: ModelFactory
    input_layer: str
    hidden_layers: str
    min_size: int
    description: str


def _scaled(stages: Sequence[Sequence[int]], width: float) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(max(1, round(features * width)) for features in stage) for stage in stages)


def _small_cnn(stages: Sequence[Sequence[int]]) -> ModelFactory:
    def factory(*, homogeneous: bool, width: float, **options: object) -> nn.Module:
        return CNN(stages=_scaled(stages, width), use_bias=not homogeneous, **options)  # type: ignore[arg-type]

    return factory


def _cnn7(*, homogeneous: bool, width: float, **options: object) -> nn.Module:
    return CNN(
        stages=_scaled(((64, 64), (128, 128)), width),
        dense=_scaled(((256, 256),), width)[0],
        use_bias=not homogeneous,
        batch_norm=not homogeneous,
        pooling="max",
        global_pool=False,
        padding="VALID",
        **options,  # type: ignore[arg-type]
    )


_CNN_TAPS = {"input_layer": "normalize", "hidden_layers": "(block|dense)_[0-9]+"}

MODELS: dict[str, ModelSpec] = {
    "cnn4": ModelSpec(
        factory=_small_cnn(((16, 16), (32, 32))),
        min_size=4,
        description="4 convolutions of 16 to 32 channels, for 8x8 digits.",
        **_CNN_TAPS,
    ),
    "cnn6": ModelSpec(
        factory=_small_cnn(((32, 32), (64, 64), (128, 128))),
        min_size=8,
        description=(
            "6 convolutions of 32 to 128 channels with average pooling, for 32x32 images on a CPU."
        ),
        **_CNN_TAPS,
    ),
    "cnn7": ModelSpec(
        factory=_cnn7,
        min_size=20,
        description=(
            "4 convolutions and 3 dense layers, 1.15 M parameters: the 'cifar' network of "
            "MTandHJ/PyTorch-Robust."
        ),
        **_CNN_TAPS,
    ),
}


def create(
    name: str,
    *,
    num_classes: int,
    homogeneous: bool = True,
    width: float = 1.0,
    initializer: str = "he",
    input_mean: Sequence[float] = (0.0,),
    input_std: Sequence[float] = (1.0,),
) -> nn.Module:
    """Returns a model by name.

    Args:
      name: a key of ``MODELS``.
      num_classes: logits, at least 2.
      homogeneous: without biases and normalisation layers, so that every layer's map to the logits
        has degree 1 and alignment is possible; otherwise the usual form with biases (and BatchNorm
        in ``cnn7``).
      width: factor on all channel counts, > 0.
      initializer: ``he`` or ``orthogonal``.
      input_mean: subtracted from images inside the model, one value or one for each channel.
      input_std: divides them; > 0.

    Raises:
      ValueError: for an unknown name or a value out of range.
    """
    _validate.one_of(MODELS, model=name)
    _validate.one_of(INITIALIZERS, initializer=initializer)
    _validate.positive(width=width, **{f"input_std[{i}]": std for i, std in enumerate(input_std)})
    if num_classes < 2:
        raise ValueError(f"num_classes={num_classes} must be at least 2.")
    return MODELS[name].factory(
        num_classes=num_classes,
        homogeneous=homogeneous,
        width=width,
        initializer=initializer,
        input_mean=tuple(input_mean),
        input_std=tuple(input_std),
    )
