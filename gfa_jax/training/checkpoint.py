"""Checkpoints (the only orbax import).

A checkpoint holds three items: ``model`` (parameters and model state, all that evaluation needs),
``training`` (step and optimiser state) and ``metadata`` (JSON). The latest and the best ones are
kept. Saving is atomic: a killed save leaves the previous checkpoint the latest.
"""

import contextlib
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from gfa_jax.training.state import TrainState
from gfa_jax.types import ModelState, Params, PyTree


class IncompatibleCheckpointError(ValueError):
    """A checkpoint's leaves are not those of the model; the message names the first that differ."""


@contextlib.contextmanager
def _readable(directory: object, step: int) -> Iterator[None]:
    """Names the checkpoint in errors of reading it."""
    try:
        yield
    except IncompatibleCheckpointError:
        raise
    except Exception as error:
        raise ValueError(
            f"checkpoint {directory}/{step} cannot be read ({type(error).__name__}: {error}). "
            "Delete its folder to go on from an older one."
        ) from error


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, directory: pathlib.Path, *, metric: str = "", keep_best: int = 0) -> None:
        """Opens or creates the folder.

        Args:
          directory: of the checkpoints, one folder a step.
          metric: the name in ``save(metrics=...)`` whose largest values are the best; empty for
            none.
          keep_best: how many of the best are kept beside the latest.
        """
        # max_to_keep with best_fn deletes the latest checkpoint when it is not among the best:
        # training would resume in the past.
        keep: list[Any] = [checkpoint_managers.LatestN(1)]

        def score(metrics: Mapping[str, float]) -> float:
            # Checkpoints between two evaluations have no metric and come last.
            return metrics.get(metric, -math.inf)

        if metric and keep_best:
            keep.append(
                checkpoint_managers.BestN(
                    get_metric_fn=score,
                    n=keep_best,
                    reverse=False,
                    keep_checkpoints_without_metrics=False,
                )
            )
        self._metric = metric
        self._manager = ocp.CheckpointManager(
            directory.absolute(),
            # Named handlers let a fresh process read the leaves' shapes before it restores them.
            item_handlers={
                "model": ocp.StandardCheckpointHandler(),
                "training": ocp.StandardCheckpointHandler(),
                "metadata": ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(keep),
                best_fn=score if metric else None,
                enable_async_checkpointing=False,
            ),
        )

    @property
    def latest_step(self) -> int | None:
        """The step of the latest checkpoint; ``None`` without any."""
        return self._manager.latest_step()

    def save(
        self,
        state: TrainState,
        metadata: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Saves a state under its step; returns when it is on disk.

        A step that is saved already is left as it is.

        Args:
          state: of the step to save.
          metadata: JSON-ready values that come back from ``restore_latest``.
          metrics: plain floats; without the metric that chooses the best, they are not stored.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                model=ocp.args.StandardSave(
                    {"params": state.params, "model_state": state.model_state}
                ),
                training=ocp.args.StandardSave({"step": state.step, "opt_state": state.opt_state}),
                metadata=ocp.args.JsonSave(dict(metadata)),
            ),
            metrics=dict(metrics or {}) if self._metric else None,
        )
        self._manager.wait_until_finished()

    def restore_latest(self, template: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """Returns the latest state and its metadata, or ``None`` without a checkpoint.

        Args:
          template: a state of ``jax.ShapeDtypeStruct`` leaves with the shardings to restore to; any
            device count.

        Raises:
          IncompatibleCheckpointError: where names, shapes or dtypes differ, naming the leaves.
        """
        step = self.latest_step
        if step is None:
            return None
        model = {"params": template.params, "model_state": template.model_state}
        training = {"step": template.step, "opt_state": template.opt_state}
        with _readable(self._manager.directory, step):
            _check_leaves(self._manager, step, "model", model)
            _check_leaves(self._manager, step, "training", training)
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    model=ocp.args.StandardRestore(model),
                    training=ocp.args.StandardRestore(training),
                    metadata=ocp.args.JsonRestore(),
                ),
            )
        state = TrainState(
            step=restored["training"]["step"],
            params=restored["model"]["params"],
            model_state=restored["model"]["model_state"],
            opt_state=restored["training"]["opt_state"],
        )
        return state, dict(restored["metadata"])

    def restore_model(
        self, template: PyTree, which: str | int = "latest"
    ) -> tuple[Params, ModelState, int]:
        """Returns parameters, model state and step of one checkpoint.

        Args:
          template: ``{"params": ..., "model_state": ...}`` of ``jax.ShapeDtypeStruct`` leaves with
            shardings.
          which: ``latest``, ``best``, or a step.

        Raises:
          FileNotFoundError: where there is no such checkpoint, listing those that exist.
          IncompatibleCheckpointError: as ``restore_latest``.
        """
        steps = sorted(self._manager.all_steps())
        choices: dict[str | int, int | None] = {
            "latest": self.latest_step,
            "best": self._best_step(),
            **{step: step for step in steps},
        }
        step = choices.get(int(which) if str(which).isdigit() else which)
        if step is None:
            raise FileNotFoundError(
                f"checkpoint={which!r} does not exist in {self._manager.directory}; "
                f"steps there: {steps or 'none'}."
            )
        with _readable(self._manager.directory, step):
            _check_leaves(self._manager, step, "model", template)
            restored = self._manager.restore(
                step, args=ocp.args.Composite(model=ocp.args.StandardRestore(template))
            )["model"]
        return restored["params"], restored["model_state"], step

    def read_metadata(self, step: int) -> dict[str, Any]:
        """Returns what was saved beside the state of a step."""
        with _readable(self._manager.directory, step):
            arguments = ocp.args.Composite(metadata=ocp.args.JsonRestore())
            return dict(self._manager.restore(step, args=arguments)["metadata"])

    def _best_step(self) -> int | None:
        best = self._manager.best_step() if self._metric else None
        return best if best is not None and self._metric in self._manager.metrics(best) else None

    def close(self) -> None:
        """Waits for what is being written."""
        self._manager.close()


def _leaves(tree: PyTree) -> dict[str, tuple[tuple[int, ...], str]]:
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (tuple(leaf.shape), str(leaf.dtype))
        for path, leaf in paths
    }


def _check_leaves(manager: ocp.CheckpointManager, step: int, item: str, template: PyTree) -> None:
    """Compares saved and expected leaves by name.

    Orbax would cast dtypes silently and does not always name a leaf.
    """
    saved_tree = getattr(
        manager.item_metadata(step)[item], "tree", manager.item_metadata(step)[item]
    )
    saved, expected = _leaves(saved_tree), _leaves(template)
    problems = [f"{name} is missing" for name in expected if name not in saved]
    problems += [f"{name} is not part of the model" for name in saved if name not in expected]
    problems += [
        f"{name} has shape {saved[name][0]} and dtype {saved[name][1]}, "
        f"expected {expected[name][0]} and {expected[name][1]}"
        for name in expected
        if name in saved and saved[name] != expected[name]
    ]
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise IncompatibleCheckpointError(
            f"checkpoint {manager.directory}/{step} does not fit: in {item}, "
            f"{'; '.join(problems[:3])}{more}."
        )
