"""A trained run, read back for evaluation."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gfa_jax import _validate, data, files, taps
from gfa_jax import config as config_lib
from gfa_jax.config import TrainConfig
from gfa_jax.training import checkpoint, layout, recipe
from gfa_jax.types import Array, Features, ModelState, Params, Taps

SPLITS = ("test", "validation")
"""Examples that a run was not trained on."""


@dataclasses.dataclass(frozen=True)
class LoadedRun:
    """A model with its test images.

    Attributes:
      config: of the training run.
      saved_config: its fields as the run has them, without those of later versions.
      classifier: what the config says about it.
      split: that the examples are of.
      test_set: the examples to evaluate on.
      params: parameters, replicated over the mesh.
      model_state: other variables.
      step: of the checkpoint.
      training: what it cost: ``steps``, ``examples`` seen and ``seconds`` of training steps.
      weights_hash: SHA-256 of all variables.
      mesh: over this process's devices.
    """

    config: TrainConfig
    saved_config: Mapping[str, Any]
    classifier: recipe.Classifier
    split: str
    test_set: data.Dataset
    params: Params
    model_state: ModelState
    step: int
    training: Mapping[str, float]
    weights_hash: str
    mesh: jax.sharding.Mesh

    def apply(
        self, params: Params, model_state: ModelState, tap_values: Taps, inputs: Array
    ) -> tuple[Array, Features]:
        """Returns ``(logits, features)`` in evaluation mode, with every reported layer tapped."""
        classifier = self.classifier
        return apply(classifier.module, classifier.layers, params, model_state, tap_values, inputs)


def apply(
    module: nn.Module,
    layers: tuple[str, ...],
    params: Params,
    model_state: ModelState,
    tap_values: Taps,
    inputs: Array,
) -> tuple[Array, Features]:
    """Applies a network in evaluation mode.

    Args:
      module: the classifier.
      layers: its taps.
      params: parameters.
      model_state: other variables.
      tap_values: added to the features of some taps, each of the feature's shape; or empty.
      inputs: images in [0, 1], float ``[B, H, W, C]``.

    Returns:
      ``(logits [B, classes], features)``, the feature of every tap by name.
    """
    model = taps.linen_model(module, model_state, layers=layers)
    return model(params, tap_values, inputs, train=False)[0]


def load_run(
    workdir: pathlib.Path,
    *,
    which: str = "latest",
    split: str = "test",
    num_examples: int | None = None,
    data_dir: str | None = None,
) -> LoadedRun:
    """Reads the config, the checkpoint and the examples of a run.

    Args:
      workdir: of ``train.py``.
      which: ``latest``, ``best`` or a step.
      split: of the run's data, ``test`` or ``validation``.
      num_examples: the first so many examples of it; all by default.
      data_dir: replaces ``config.data.data_dir``.

    Raises:
      FileNotFoundError: for a folder that is no run, a missing checkpoint or data set.
      ValueError: for another split, or one that the run does not have.
      checkpoint.IncompatibleCheckpointError: naming the leaves that differ.
    """
    _validate.one_of(SPLITS, split=split)
    path = workdir / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"workdir {str(workdir)!r} holds no run: {path.name} is missing. Train one with "
            "train.py --workdir."
        )
    config = config_lib.read_saved(path)
    if not (workdir / "checkpoints").is_dir():
        raise FileNotFoundError(
            f"workdir {str(workdir)!r} holds no checkpoint yet. Run train.py with it until one is "
            "saved."
        )
    test_set = data.load(
        config.data.name,
        split,
        data_dir=data_dir or config.data.data_dir,
        num_validation=config.data.num_validation,
        max_examples=num_examples,
    )
    built = recipe.build_classifier(
        config, num_classes=test_set.num_classes, image_shape=test_set.image_shape
    )
    everywhere = layout.replicated(layout.data_mesh())

    def init() -> dict[str, object]:
        variables = dict(
            built.module.init(jax.random.key(0), jnp.zeros((1, *built.image_shape)), train=False)
        )
        return {"params": variables.pop("params"), "model_state": variables}

    shapes = jax.eval_shape(init)
    template = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere),
        shapes,
    )
    metric = "eval/robust_accuracy" if config.loop.eval_attack_steps else "eval/clean_accuracy"
    checkpoints = checkpoint.Checkpoints(
        workdir / "checkpoints",
        metric=metric,
        keep_best=config.loop.keep_best,
        read_only=True,
    )
    try:
        params, model_state, at_step = checkpoints.restore_model(template, which)
        metadata = checkpoints.read_metadata(at_step)
    finally:
        checkpoints.close()
    mesh = layout.local_mesh()
    if jax.process_count() > 1:
        # All processes read it together; each works alone from here on.
        params, model_state = jax.device_put(
            jax.tree.map(np.asarray, (params, model_state)), layout.replicated(mesh)
        )
    return LoadedRun(
        config,
        files.read_json(path)["config"],
        built,
        split,
        test_set,
        params,
        model_state,
        at_step,
        {
            "steps": at_step,
            "examples": at_step * config.batch_size,
            "seconds": float(metadata["train_seconds"]),
        },
        hash_tree((params, model_state)),
        mesh,
    )


def hash_tree(tree: object) -> str:
    """Returns the SHA-256 of names, shapes, dtypes and bytes of a tree's leaves."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        value = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {value.shape} {value.dtype}".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()
