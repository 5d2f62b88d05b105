"""Small robust networks, the same in JAX and in PyTorch, for comparing attacks.

An attack on a network without any robustness succeeds at the first step and shows nothing, so these
are trained adversarially, for seconds. PyTorch is imported where it is used.
"""

import functools
import pathlib
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from gfa_jax import ThreatModel, attacks, data, models, objectives, taps
from gfa_jax.models.cnn import CNN
from gfa_jax.types import Array, LogitsFn, Params

DIGITS_BORDER = 1
"""Digits get an empty border, which makes them 10x10: Square starts l_2 and l_1 from 5 tiles a
side, and the official code fails on images, such as 8x8, that these do not fill."""

MODELS = ("small", *models.MODELS)
"""Names for ``create``."""


class Split(NamedTuple):
    """Images and labels.

    Attributes:
      images: float32 ``[N, H, W, C]`` in [0, 1].
      labels: int32 ``[N]``.
    """

    images: np.ndarray
    labels: np.ndarray

    def take(self, num: int) -> "Split":
        """Returns the first examples."""
        return Split(self.images[:num], self.labels[:num])


class Network(NamedTuple):
    """A trained classifier.

    Attributes:
      module: a linen module whose parameters are all its variables.
      params: its parameters.
    """

    module: nn.Module
    params: Params

    @property
    def logits_fn(self) -> LogitsFn:
        """The classifier as attacks see it."""
        return functools.partial(self.apply, self.params)

    def apply(self, params: Params, inputs: Array) -> Array:
        """Returns the logits ``[B, C]`` that the module has with these parameters."""
        logits: Array = self.module.apply({"params": params}, inputs, train=False)
        return logits


def load(
    num_test: int, *, data_dir: str | None = None, name: str = "digits"
) -> tuple[Split, Split]:
    """Returns a training split and ``num_test`` images that are not in it.

    Args:
      num_test: test images; digits have at most 700.
      data_dir: where prepared data sets lie.
      name: a data set of ``gfa_jax.data``; ``digits`` come with a border.

    Raises:
      ValueError: for a data set with fewer test images.
    """
    num_validation = 300 if name == "digits" else 0
    parts = {}
    for part in ("train", "test", *(["validation"] if num_validation else [])):
        dataset = data.load(name, part, data_dir=data_dir, num_validation=num_validation)
        images = data.to_float(dataset.images)
        if name == "digits":
            border = (DIGITS_BORDER, DIGITS_BORDER)
            images = np.pad(images, ((0, 0), border, border, (0, 0)))
        parts[part] = Split(np.asarray(images, np.float32), dataset.labels)
    held_out = [parts[part] for part in ("test", "validation") if part in parts]
    test = Split(*(np.concatenate(arrays) for arrays in zip(*held_out, strict=True)))
    if len(test.images) < num_test:
        raise ValueError(f"{name} has {len(test.images)} test images, fewer than {num_test}.")
    return parts["train"], test.take(num_test)


def create(name: str, split: Split) -> nn.Module:
    """Returns an untrained model with biases, for the images and classes of the data.

    Args:
      name: ``small``, two convolutions and a dense layer, or a model of ``gfa_jax.models``.
      split: the training data.
    """
    options = {
        "num_classes": int(split.labels.max()) + 1,
        "input_mean": tuple(split.images.mean(axis=(0, 1, 2)).tolist()),
        "input_std": tuple(split.images.std(axis=(0, 1, 2)).tolist()),
    }
    if name == "small":
        return CNN(stages=((16,), (32,)), dense=(64,), use_bias=True, global_pool=False, **options)
    return models.create(name, homogeneous=False, **options)


def train(
    module: nn.Module,
    split: Split,
    threat: ThreatModel,
    *,
    num_epochs: int,
    batch_size: int = 64,
    num_attack_steps: int = 4,
    learning_rate: float = 5e-3,
    seed: int = 0,
) -> Network:
    """Trains against PGD: the first third of the epochs on clean images, so that it gets going."""
    key = jax.random.key(seed)
    params = module.init(key, jnp.asarray(split.images[:1]))["params"]
    attack = attacks.pgd(threat, num_steps=num_attack_steps, keep="last")
    clean = objectives.cross_entropy()
    robust = objectives.adversarial(attack, clean)
    per_epoch = len(split.labels) // batch_size
    schedule = optax.cosine_decay_schedule(learning_rate, num_epochs * per_epoch)
    optimizer = optax.adam(schedule)
    model = taps.linen_model(module)

    @functools.partial(jax.jit, static_argnums=0)
    def step(
        objective: Any, params: Params, state: optax.OptState, batch: dict[str, Array], key: Array
    ) -> tuple[Params, optax.OptState]:
        gradient, _ = jax.grad(functools.partial(objective, model), has_aux=True)(
            params, batch, key
        )
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    rng = np.random.default_rng(seed)
    number = 0
    for epoch in range(num_epochs):
        objective = clean if epoch < num_epochs // 3 else robust
        order = rng.permutation(len(split.labels))
        for rows in order[: per_epoch * batch_size].reshape(per_epoch, batch_size):
            batch = {"inputs": split.images[rows], "labels": split.labels[rows]}
            params, state = step(objective, params, state, batch, jax.random.fold_in(key, number))
            number += 1
    return Network(module, jax.block_until_ready(params))


def save(path: pathlib.Path, params: Params) -> None:
    """Writes parameters to an ``.npz`` file."""
    flat = jax.tree_util.tree_leaves_with_path(params)
    arrays = {"/".join(part.key for part in where): np.asarray(leaf) for where, leaf in flat}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        np.savez(file, **arrays)


def restore(path: pathlib.Path) -> Params:
    """Reads what ``save`` wrote; nothing in the file is executed."""
    params: dict[str, Any] = {}
    with np.load(path, allow_pickle=False) as arrays:
        for name, value in arrays.items():
            *folders, leaf = name.split("/")
            node = params
            for folder in folders:
                node = node.setdefault(folder, {})
            node[leaf] = jnp.asarray(value)
    return params


def to_torch(network: Network) -> Any:
    """Returns the same function as a ``torch.nn.Module`` of images ``[B, C, H, W]``.

    It is a plain PyTorch network in the layout that its convolutions want, so that peers run at
    their own speed. Parameters ask for no gradient, as attacks need none.

    Raises:
      ValueError: for a module other than ``models.CNN`` without BatchNorm.
    """
    import torch

    module, params = network
    if not isinstance(module, CNN) or module.batch_norm:
        raise ValueError("only a CNN without BatchNorm can be written in PyTorch.")

    def fill(layer: Any, weights: dict[str, Array], axes: tuple[int, ...]) -> Any:
        with torch.no_grad():
            layer.weight.copy_(torch.tensor(np.asarray(weights["kernel"]).transpose(axes)))
            if layer.bias is not None:
                layer.bias.copy_(torch.tensor(np.asarray(weights["bias"])))
        return layer

    def convolution(weights: dict[str, Array]) -> Any:
        height, width, before, after = weights["kernel"].shape
        layer = torch.nn.Conv2d(
            before,
            after,
            (height, width),
            padding=module.padding.lower(),
            bias=module.use_bias,
        )
        return fill(layer, weights, (3, 2, 0, 1))

    def dense(weights: dict[str, Array]) -> Any:
        layer = torch.nn.Linear(*weights["kernel"].shape, bias=module.use_bias)
        return fill(layer, weights, (1, 0))

    class Normalize(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("mean", "std"):
                values = torch.tensor(getattr(module, f"input_{name}"), dtype=torch.float32)
                self.register_buffer(name, values[None, :, None, None])

        def forward(self, images: Any) -> Any:
            return (images - self.mean) / self.std

    class ChannelsLast(torch.nn.Module):
        """Flattens in the order of the JAX network."""

        def forward(self, hidden: Any) -> Any:
            return hidden.permute(0, 2, 3, 1).flatten(1)

    pool = torch.nn.AvgPool2d if module.pooling == "average" else torch.nn.MaxPool2d
    layers: list[Any] = [Normalize()]
    index = 0
    for stage, widths in enumerate(module.stages):
        for _ in widths:
            layers += [convolution(params[f"block_{index}"]["conv"]), torch.nn.ReLU()]
            index += 1
        last = module.global_pool and stage == len(module.stages) - 1
        layers.append(torch.nn.AdaptiveAvgPool2d(1) if last else pool(2))
    layers.append(ChannelsLast())
    for number in range(len(module.dense)):
        layers += [dense(params[f"dense_{number}"]["dense"]), torch.nn.ReLU()]
    layers.append(dense(params["head"]))
    return torch.nn.Sequential(*layers).requires_grad_(False).eval()
