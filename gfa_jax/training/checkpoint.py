"""Checkpoints (the only orbax import).

A checkpoint holds three items: ``model`` (parameters and model state that are evaluated, all that
evaluation needs), ``training`` (step, optimiser state and, where ``model`` is an average of
weights, the weights) and ``metadata`` (JSON). The latest two and the best ones are kept. Saving
goes on beside training and is atomic: a killed save leaves the previous checkpoint the latest.
"""

import contextlib
import errno
import functools
import json
import math
import pathlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from gfa_jax import distributed, failures
from gfa_jax.training.state import TrainState
from gfa_jax.types import ModelState, Params, PyTree

_KEEP_LATEST = 2  # The second is for the case that the first gets damaged.
# Orbax measures it on the clock of the day, which may jump by more than its default of ten minutes.
# A process that died is found out by JAX's own runtime.
_SAVE_SECONDS = 30 * 24 * 3600
# Errors of reading that say nothing of the file.
_PASSING = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE}


class DamagedCheckpointError(ValueError):
    """A checkpoint cannot be read."""


class SaveFailedError(OSError):
    """A checkpoint could not be written; those before it are intact.

    Threads of orbax may still wait for the part that failed, and keep a Python program from exiting
    until they give up: ``train.py`` leaves by ``os._exit``.
    """


class IncompatibleCheckpointError(ValueError):
    """A checkpoint's leaves are not those of the model; the message names the first that differ."""


@contextlib.contextmanager
def _readable(directory: object, step: int) -> Iterator[None]:
    """Names the checkpoint in errors of reading it."""
    try:
        yield
    except (IncompatibleCheckpointError, MemoryError, PermissionError):
        raise
    except Exception as error:
        if getattr(error, "errno", None) in _PASSING:
            raise
        raise DamagedCheckpointError(
            f"checkpoint {directory}/{step} cannot be read ({type(error).__name__}: {error})."
        ) from error


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(
        self,
        directory: pathlib.Path,
        *,
        metric: str = "",
        keep_best: int = 0,
        read_only: bool = False,
    ) -> None:
        """Opens or creates the folder.

        Checkpoints whose metrics cannot be read are moved aside, as in ``restore_latest``.

        Args:
          directory: of the checkpoints, one folder a step.
          metric: the name in ``save(metrics=...)`` whose largest values are the best; empty for
            none.
          keep_best: how many of the best are kept beside the latest.
          read_only: move nothing, as beside a training that may be going on.

        Raises:
          DamagedCheckpointError: where metrics cannot be read, with ``read_only``.
        """
        # max_to_keep with best_fn deletes the latest checkpoint when it is not among the best:
        # training would resume in the past.
        keep: list[Any] = [checkpoint_managers.LatestN(_KEEP_LATEST)]

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
        # Orbax reads all metrics at once, and refuses all checkpoints for one.
        if read_only:
            for error in _damaged_metrics(directory).values():
                raise error
        else:
            distributed.on_primary(lambda: _set_aside(directory, _damaged_metrics(directory)))
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
                enable_async_checkpointing=True,
                async_options=ocp.AsyncOptions(timeout_secs=_SAVE_SECONDS),
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
        """Saves a state under its step; returns once the state may be donated.

        What is left to write is written beside training: see ``wait``. A step that is saved already
        is left as it is.

        Args:
          state: of the step to save.
          metadata: JSON-ready values that come back from ``restore_latest``.
          metrics: plain floats; without the metric that chooses the best, they are not stored.

        Raises:
          SaveFailedError: where this save, or the rest of the one before it, fails.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        with self._writing():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    **{name: ocp.args.StandardSave(item) for name, item in _items(state).items()},
                    metadata=ocp.args.JsonSave(dict(metadata)),
                ),
                metrics=dict(metrics or {}) if self._metric else None,
            )

    def wait(self) -> None:
        """Returns when all that was saved is on disk.

        Raises:
          SaveFailedError: where it cannot be written.
        """
        with self._writing():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise SaveFailedError(
                f"a checkpoint could not be written to {self._manager.directory} "
                f"({type(error).__name__}: {error}). What was saved before is intact."
            ) from error

    def restore_latest(self, template: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """Returns the latest state and its metadata, or ``None`` without a checkpoint.

        A checkpoint that cannot be read is moved aside, to ``damaged_checkpoints`` beside the
        folder, with a warning, and the one before it is taken.

        Args:
          template: a state of ``jax.ShapeDtypeStruct`` leaves with the shardings to restore to; any
            device count.

        Raises:
          IncompatibleCheckpointError: where names, shapes or dtypes differ, naming the leaves.
          DamagedCheckpointError: where none of the checkpoints can be read; they stay.
        """
        self.wait()
        damaged: dict[int, DamagedCheckpointError] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                self._check_readable(step, template)
                with failures.felt_by_all():
                    found = self._restore(step, template)
            except DamagedCheckpointError as error:
                damaged[step] = error
                continue
            if damaged:
                directory = pathlib.Path(self._manager.directory)
                distributed.on_primary(functools.partial(_set_aside, directory, damaged))
                self._manager.reload()
            return found
        if damaged:
            raise next(iter(damaged.values()))
        return None

    def _check_readable(self, step: int, template: TrainState) -> None:
        """Lets process 0 of several read all of a checkpoint, for what it finds to be known to all.

        Restoring is collective: a process that failed at it could not say so to the others.
        """
        if jax.process_count() == 1:
            return
        failure: DamagedCheckpointError | None = None
        if distributed.is_primary():
            try:
                with _readable(self._manager.directory, step):
                    for name, item in _items(template).items():
                        _check_leaves(self._manager, step, name, item)
                        arrays = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), item)
                        ocp.StandardCheckpointHandler().restore(
                            self._manager.directory / str(step) / name,
                            args=ocp.args.StandardRestore(arrays),
                        )
            except DamagedCheckpointError as error:
                failure = error
        if distributed.any_process(failure is not None):
            raise failure or DamagedCheckpointError("process 0 cannot read it.")

    def _restore(self, step: int, template: TrainState) -> tuple[TrainState, dict[str, Any]]:
        items = _items(template)
        with _readable(self._manager.directory, step):
            for name, item in items.items():
                _check_leaves(self._manager, step, name, item)
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    **{name: ocp.args.StandardRestore(item) for name, item in items.items()},
                    metadata=ocp.args.JsonRestore(),
                ),
            )
        evaluated = restored["model"]["params"], restored["model"]["model_state"]
        weights = restored["training"].get("weights")
        params, model_state = evaluated if weights is None else weights
        state = TrainState(
            step=restored["training"]["step"],
            params=params,
            model_state=model_state,
            opt_state=restored["training"]["opt_state"],
            ema=None if weights is None else evaluated,
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
        self.wait()
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
        """Waits for what is being written; ``wait`` first to hear of failures."""
        # Orbax raises here what ``wait`` or ``save`` has raised already.
        with contextlib.suppress(Exception):
            self._manager.wait_until_finished()
        self._manager.close()


def _items(state: TrainState) -> dict[str, PyTree]:
    """Returns the parts of a state by the name of the item that holds them."""
    params, model_state = state.evaluated
    training = {"step": state.step, "opt_state": state.opt_state}
    if state.ema is not None:
        training["weights"] = (state.params, state.model_state)
    return {"model": {"params": params, "model_state": model_state}, "training": training}


def _damaged_metrics(directory: pathlib.Path) -> dict[int, DamagedCheckpointError]:
    """Returns the steps whose file of metrics is there and is no JSON."""
    damaged = {}
    for path in directory.glob("*/metrics/metrics"):
        try:
            json.loads(path.read_bytes())
        except ValueError as error:
            if (name := path.parents[1].name).isdigit():
                damaged[int(name)] = DamagedCheckpointError(
                    f"checkpoint {path.parents[1]} cannot be read ({path.name}: {error})."
                )
    return damaged


def _set_aside(directory: pathlib.Path, damaged: Mapping[int, Exception]) -> None:
    """Moves damaged checkpoints out of the folder, where they stay."""
    if not damaged:
        return
    aside = directory.parent / "damaged_checkpoints"
    aside.mkdir(exist_ok=True)
    for step, error in damaged.items():
        number = sum(path.name.split("-")[0] == str(step) for path in aside.iterdir())
        (directory / str(step)).rename(aside / f"{step}-{number}")
        warnings.warn(
            f"{error} It lies in {aside} now; training goes on from an older one.", stacklevel=4
        )


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
