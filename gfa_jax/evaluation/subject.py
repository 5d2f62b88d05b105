"""A classifier under evaluation, whoever trained it."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gfa_jax import data, losses, norms
from gfa_jax.attacks.base import is_misclassified
from gfa_jax.evaluation import loading
from gfa_jax.training import layout
from gfa_jax.types import Array, Features, PyTree, Taps

INPUT = "input"
"""The only layer of a classifier whose inside is unknown."""

ApplyLogits = Callable[[Any, Array], Array]
"""``(variables, inputs [B, ...]) -> logits [B, C]``, in evaluation mode."""

ApplyFeatures = Callable[[Any, Taps, Array], tuple[Array, Features]]
"""``(variables, taps, inputs [B, ...]) -> (logits [B, C], features)``, in evaluation mode."""


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """What an evaluation needs to know of a classifier.

    Attributes:
      name: of the run, for tables.
      apply_logits: ``(variables, inputs [B, ...]) -> logits [B, C]``, pure and per example.
      apply_features: the same with taps and features.
      variables: any pytree, on all devices of the mesh.
      test_set: the examples to evaluate on.
      layers: taps to report, the input side first.
      layer_norms: the norm of each tap that is not l2.
      mesh: this process's devices.
      weights_hash: SHA-256 of the variables.
      details: JSON-ready facts for the results: where the classifier comes from.
    """

    name: str
    apply_logits: ApplyLogits
    apply_features: ApplyFeatures
    variables: Any
    test_set: data.Dataset
    layers: tuple[str, ...]
    layer_norms: Mapping[str, str]
    mesh: jax.sharding.Mesh
    weights_hash: str
    details: Mapping[str, Any]

    def put(self, batch: Mapping[str, PyTree]) -> dict[str, PyTree]:
        """Returns a batch of arrays, spread over the devices."""
        return jax.device_put(dict(batch), layout.split(self.mesh))

    def judge(
        self, inputs: np.ndarray, labels: np.ndarray, batch_size: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns whether images are misclassified, their predicted classes and their margins.

        Args:
          inputs: float32 ``[N, H, W, C]``, N >= 1.
          labels: int32 ``[N]``.
          batch_size: examples on all devices at once, a multiple of their number.

        Returns:
          ``(wrong bool [N], predicted int32 [N], margin float32 [N])``: the largest other logit
          minus the label's.
        """
        parts = []
        for first in range(0, len(inputs), batch_size):
            rows = np.arange(first, first + batch_size)
            is_real = rows < len(inputs)
            rows = np.where(is_real, rows, 0)
            batch = self.put({"inputs": inputs[rows], "labels": labels[rows]})
            found = jax.device_get(_judge(self.apply_logits, self.variables, batch))
            parts.append([field[is_real] for field in found])
        wrong, predicted, margin = (np.concatenate(fields) for fields in zip(*parts, strict=True))
        return wrong, predicted, margin


def _judge_fn(
    apply_logits: ApplyLogits, variables: Any, batch: dict[str, Array]
) -> tuple[Array, Array, Array]:
    logits = apply_logits(variables, batch["inputs"])
    wrong = is_misclassified(logits, batch["labels"])
    reached = jnp.argmax(logits, axis=1).astype(jnp.int32)
    return wrong, reached, losses.margin(logits, batch["labels"]).astype(jnp.float32)


_judge = jax.jit(_judge_fn, static_argnums=0)


@functools.lru_cache(maxsize=16)
def _functions(module: nn.Module, layers: tuple[str, ...]) -> tuple[ApplyLogits, ApplyFeatures]:
    """Returns the same two functions for the same network.

    By their identity the programs of one evaluation are found again by the next of its kind.
    """

    def apply_features(variables: Any, taps: Taps, inputs: Array) -> tuple[Array, Features]:
        params, model_state = variables
        return loading.apply(module, layers, params, model_state, taps, inputs)

    def apply_logits(variables: Any, inputs: Array) -> Array:
        return apply_features(variables, {}, inputs)[0]

    return apply_logits, apply_features


def from_run(run: loading.LoadedRun, name: str) -> Subject:
    """Returns the model of a training run."""
    layers = tuple(run.classifier.layers)
    apply_logits, apply_features = _functions(run.classifier.module, layers)
    return Subject(
        name=name,
        apply_logits=apply_logits,
        apply_features=apply_features,
        variables=(run.params, run.model_state),
        test_set=run.test_set,
        layers=layers,
        layer_norms=run.classifier.layer_norms,
        mesh=run.mesh,
        weights_hash=run.weights_hash,
        details={
            "data": {"name": run.config.data.name, "split": run.split},
            "config": dict(run.saved_config),
            "checkpoint_step": run.step,
            "training": dict(run.training),
        },
    )


def from_function(
    logits_fn: Callable[..., Array],
    inputs: np.ndarray,
    labels: np.ndarray,
    *,
    variables: Any = None,
    name: str = "model",
    data_name: str = "given arrays",
) -> Subject:
    """Returns a classifier that this project did not train.

    Args:
      logits_fn: pure and traceable, in evaluation mode; each row of logits depends on its own
        input alone. ``inputs [B, ...] -> logits [B, C]`` or, with ``variables``,
        ``(variables, inputs) -> logits``. Inputs are what attackers change, in [0, 1]:
        normalisation belongs inside.
      inputs: float ``[N, H, W, C]`` in [0, 1], or uint8.
      labels: integers ``[N]``.
      variables: a pytree of arrays. Given, they are arguments of the compiled programs and part of
        the results' identity; otherwise they are constants that ``logits_fn`` closes over, and a
        change of them goes unnoticed when an evaluation is resumed.
      name: of the classifier.
      data_name: of the examples.

    Raises:
      ValueError: for inputs or labels that do not fit, or outputs that are no logits.
    """
    inputs, labels = np.asarray(inputs), np.asarray(labels)
    if inputs.dtype != np.uint8:
        inputs = inputs.astype(np.float32)
        if not (np.all(inputs >= 0) and np.all(inputs <= 1)):
            raise ValueError("inputs hold values outside of [0, 1], or NaN; scale images to it.")
    if not np.issubdtype(labels.dtype, np.integer) or labels.ndim != 1:
        raise ValueError(
            f"labels have shape {labels.shape} and dtype {labels.dtype}; expected integers [N]."
        )
    if variables is None:
        variables, function = {}, logits_fn

        def apply_logits(variables: Any, inputs: Array) -> Array:
            return function(inputs)
    else:
        apply_logits = logits_fn

    if inputs.ndim != 4:
        raise ValueError(f"inputs have shape {inputs.shape}; expected images [N, H, W, C].")
    example = jax.ShapeDtypeStruct((2, *inputs.shape[1:]), jnp.float32)
    logits = jax.eval_shape(apply_logits, variables, example)
    shape = getattr(logits, "shape", None)
    if shape is None or len(shape) != 2 or shape[0] != 2 or shape[1] < 2:
        raise ValueError(
            f"logits_fn returns {logits} for two inputs; expected an array [2, C] with C >= 2."
        )

    def apply_features(variables: Any, taps: Taps, inputs: Array) -> tuple[Array, Features]:
        feature = inputs + taps[INPUT] if taps else inputs
        return apply_logits(variables, feature), {INPUT: feature}

    num_classes = shape[1]
    mesh = layout.local_mesh()
    return Subject(
        name=name,
        apply_logits=apply_logits,
        apply_features=apply_features,
        variables=jax.device_put(variables, layout.replicated(mesh)),
        test_set=data.Dataset(
            images=inputs,
            labels=labels.astype(np.int32),
            ids=np.arange(len(inputs)),
            num_classes=num_classes,
            label_names=tuple(str(number) for number in range(num_classes)),
        ),
        layers=(INPUT,),
        layer_norms={},
        mesh=mesh,
        weights_hash=loading.hash_tree(variables),
        details={"data": {"name": data_name, "split": "test"}},
    )


def hash_examples(test_set: data.Dataset) -> str:
    """Returns the SHA-256 of images, labels and ids."""
    digest = hashlib.sha256()
    for array in (test_set.images, test_set.labels, test_set.ids):
        digest.update(f"{array.shape} {array.dtype}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def box_radius(norm: str, bounds: tuple[float, float], image_shape: tuple[int, ...]) -> float:
    """Returns the radius of the ball that holds the whole box around any of its points."""
    corner = np.full((1, *image_shape), bounds[1] - bounds[0], np.float32)
    return float(norms.vector_norm(jnp.asarray(corner), norm)[0])
