"""Models by name."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from gfa_jax import _validate
from gfa_jax.models import activations, layers
from gfa_jax.models.cnn import CNN
from gfa_jax.models.resnet import ResNet
from gfa_jax.models.vit import ViT

ModelFactory = Callable[..., nn.Module]

DTYPES = ("float32", "bfloat16")
"""Of a model's computation."""


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """One entry of the registry.

    Attributes:
      factory: ``(num_classes, homogeneous, width, activation_fn, initializer, input_mean,
        input_std, dtype, remat, axis_name) -> module`` (all by keyword); the module's ``__call__``
        is ``(inputs, train) -> logits``.
      input_layer: the tap of the network's normalised input.
      hidden_layers: the pattern of the taps that are aligned by default.
      min_size: the smallest image height and width that the model takes.
      description: one line.
      has_homogeneous_form: whether ``homogeneous`` may be true.
    """

    factory: ModelFactory
    input_layer: str
    hidden_layers: str
    min_size: int
    description: str
    has_homogeneous_form: bool = True


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


def _resnet(stem: int, stages: Sequence[Sequence[int]]) -> ModelFactory:
    def factory(*, width: float, **options: object) -> nn.Module:
        return ResNet(
            stem=_scaled(((stem,),), width)[0][0],
            stages=_scaled(stages, width),
            **options,  # type: ignore[arg-type]
        )

    return factory


def _wide_resnet(depth: int, factor: int) -> ModelFactory:
    """A WideResNet has three stages of ``(depth - 4) / 6`` blocks with two convolutions each."""
    num_blocks = (depth - 4) // 6
    return _resnet(16, [[features * factor] * num_blocks for features in (16, 32, 64)])


def _vit(num_heads: int) -> ModelFactory:
    def factory(
        *,
        homogeneous: bool,
        width: float,
        activation_fn: str,
        initializer: str,
        axis_name: str | None,
        **options: object,
    ) -> nn.Module:
        # There is no homogeneous form, and no BatchNorm either.
        del homogeneous, axis_name
        if activation_fn != "relu":
            raise ValueError(
                f"activation_fn={activation_fn!r} is for networks of ReLUs; a ViT has GELU: leave "
                "the default."
            )
        if initializer != "he":
            raise ValueError(
                f"initializer={initializer!r} is for networks of ReLUs; a ViT has an "
                "initialisation of its own: leave the default."
            )
        head_width = max(1, round(64 * width))
        features = num_heads * head_width
        return ViT(
            features=features,
            depth=12,
            num_heads=num_heads,
            hidden=4 * features,
            **options,  # type: ignore[arg-type]
        )

    return factory


_CNN_TAPS: dict[str, Any] = {"input_layer": "normalize", "hidden_layers": "(block|dense)_[0-9]+"}
_RESNET_TAPS: dict[str, Any] = {"input_layer": "normalize", "hidden_layers": "block_[0-9]+"}
# Logits have degree 0 in what a ViT's last LayerNorm sees, and degree 1 in what it gives, but for
# the head's bias.
_VIT_TAPS: dict[str, Any] = {"input_layer": "normalize", "hidden_layers": "norm"}

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
    "preact_resnet18": ModelSpec(
        factory=_resnet(64, ((64, 64), (128, 128), (256, 256), (512, 512))),
        min_size=8,
        description=(
            "Pre-activation ResNet-18 for 32x32 images, 11.2 M parameters, with a last BatchNorm."
        ),
        **_RESNET_TAPS,
    ),
    "wide_resnet28_10": ModelSpec(
        factory=_wide_resnet(28, 10),
        min_size=4,
        description="WideResNet-28-10 without dropout for 32x32 images, 36.5 M parameters.",
        **_RESNET_TAPS,
    ),
    "wide_resnet34_10": ModelSpec(
        factory=_wide_resnet(34, 10),
        min_size=4,
        description="WideResNet-34-10 without dropout for 32x32 images, 46.2 M parameters.",
        **_RESNET_TAPS,
    ),
    "vit_tiny": ModelSpec(
        factory=_vit(3),
        min_size=4,
        description="ViT-Ti on patches of 4x4, mean of the tokens, 5.4 M parameters.",
        has_homogeneous_form=False,
        **_VIT_TAPS,
    ),
    "vit_small": ModelSpec(
        factory=_vit(6),
        min_size=4,
        description="ViT-S on patches of 4x4, mean of the tokens, 21.3 M parameters.",
        has_homogeneous_form=False,
        **_VIT_TAPS,
    ),
}


def create(
    name: str,
    *,
    num_classes: int,
    homogeneous: bool = True,
    width: float = 1.0,
    activation_fn: str = "relu",
    initializer: str = "he",
    input_mean: Sequence[float] = (0.0,),
    input_std: Sequence[float] = (1.0,),
    dtype: str = "float32",
    remat: bool = False,
    axis_name: str | None = None,
) -> nn.Module:
    """Returns a model by name.

    Args:
      name: a key of ``MODELS``.
      num_classes: logits, at least 2.
      homogeneous: without biases and normalisation layers, so that every layer's map to the logits
        has degree 1 and alignment is possible; otherwise the usual form with biases (and BatchNorm
        in ``cnn7`` and residual networks). ViTs have the usual form only.
      width: factor on all channel counts, > 0.
      activation_fn: ``relu``, ``leaky_relu`` (slope .01 below 0), ``scaled_silu``
        (``activations.scaled_silu``), or, where it need not be homogeneous, ``gelu`` or ``silu``;
        ViTs, which have GELU, take the default only.
      initializer: ``he`` or ``orthogonal``; ViTs, which have their own, take the default only.
      input_mean: subtracted from images inside the model, one value or one for each channel.
      input_std: divides them; > 0.
      dtype: of the computation, one of ``DTYPES``. Parameters, statistics, normalised inputs and
        logits are float32 in either, other features of this dtype.
      remat: whether blocks are computed again in backward passes, which takes less memory.
      axis_name: of ``jax.pmap``: BatchNorm in training mode sees the batch of all its devices.

    Raises:
      ValueError: for an unknown name, a value out of range, or an option that the model lacks.
    """
    _validate.one_of(MODELS, model=name)
    _validate.one_of(layers.INITIALIZERS, initializer=initializer)
    activations.validate(activation_fn, homogeneous=homogeneous)
    _validate.one_of(DTYPES, dtype=dtype)
    _validate.positive(width=width, **{f"input_std[{i}]": std for i, std in enumerate(input_std)})
    if num_classes < 2:
        raise ValueError(f"num_classes={num_classes} must be at least 2.")
    if homogeneous and not MODELS[name].has_homogeneous_form:
        raise ValueError(
            f"model={name!r} has no homogeneous form: pass homogeneous=False. docs/models.md says "
            "where it can be aligned."
        )
    return MODELS[name].factory(
        num_classes=num_classes,
        homogeneous=homogeneous,
        width=width,
        activation_fn=activation_fn,
        initializer=initializer,
        input_mean=tuple(input_mean),
        input_std=tuple(input_std),
        # ``None`` keeps the inputs' own, which may be wider.
        dtype=None if dtype == "float32" else jnp.dtype(dtype),
        remat=remat,
        axis_name=axis_name,
    )
