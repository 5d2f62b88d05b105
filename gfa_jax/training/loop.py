"""The training loop: from a config and a folder to a trained model.

Training can be stopped and resumed at any moment.
"""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax

from gfa_jax import _validate, data, distributed, failures
from gfa_jax import config as config_lib
from gfa_jax.config import TrainConfig
from gfa_jax.training import (
    checkpoint,
    guards,
    layout,
    preemption,
    recipe,
    run_folder,
    state,
    validation,
)
from gfa_jax.training.metrics import MetricsWriter, to_floats
from gfa_jax.training.metrics import read as read_metrics
from gfa_jax.training.progress import Progress, format_seconds
from gfa_jax.types import Array


@dataclasses.dataclass
class _Run:
    """The parts of a run that its helpers share."""

    config: TrainConfig
    recipe: recipe.Recipe
    workdir: pathlib.Path
    tensorboard: bool
    mesh: jax.sharding.Mesh
    train_set: data.Dataset | data.LazyDataset
    validation_set: data.Dataset | None

    @functools.cached_property
    def train_batch(self) -> data.InputFn:
        """``step -> batch`` on the devices."""
        return data.train_input(
            self.train_set,
            self.config.batch_size,
            seed=self.config.seed,
            sharding=layout.split(self.mesh),
            placement=self.config.data.placement,
        )

    @property
    def template(self) -> state.TrainState:
        return self.recipe.template(self.mesh)

    def trace_step(self) -> jax.stages.Lowered:
        """Traces the train step without compiling it."""
        train_step = self.recipe.train_step(self.mesh)
        return train_step.lower(self.template, self.train_batch(0), self.keys[1])

    @functools.cached_property
    def keys(self) -> tuple[Array, Array]:
        """The keys of initialisation and of training, on every device."""
        return layout.everywhere(
            lambda: tuple(jax.random.split(jax.random.key(self.config.seed))), self.mesh
        )

    @property
    def best_metric(self) -> str:
        if self.validation_set is None:
            return ""
        return (
            "eval/robust_accuracy" if self.config.loop.eval_attack_steps else "eval/clean_accuracy"
        )


def train_and_evaluate(
    config: TrainConfig,
    workdir: str | pathlib.Path,
    *,
    stop_after: int | None = None,
    tensorboard: bool = False,
) -> dict[str, float]:
    """Trains a model; run again after any kind of stop, it goes on from the latest checkpoint.

    On the same devices, a resumed run gives bit-identical results to an uninterrupted one; on
    others, in more or fewer processes, they are equal up to rounding. Writes ``config.json``,
    ``metrics.jsonl`` and ``checkpoints/`` under ``workdir``, which all processes share. SIGTERM and
    Ctrl-C, to any process, save a checkpoint at the same step on all, and return.

    Args:
      config: the recipe.
      workdir: folder of the run.
      stop_after: stop, saved, once this many steps are done (schedules still span the whole
        training).
      tensorboard: whether to write TensorBoard events to ``workdir/tensorboard`` too.

    Returns:
      The last validation metrics (``eval/...``), or the last training metrics without a validation
      split.

    Raises:
      ValueError: for a bad config, data that does not fit, or a folder of another config, before
        anything is compiled or written.
      checkpoint.SaveFailedError: for a checkpoint that cannot be written, such as on a full disk.
      guards.TrainingFailedError: for a loss that is not finite or a collapse; the last good
        checkpoint stays.
    """
    workdir = pathlib.Path(workdir)
    config_lib.validate(config, num_devices=jax.device_count(), num_processes=jax.process_count())
    if stop_after is not None:
        _validate.positive_integer(stop_after=stop_after)
    train_set, validation_set = _load_data(config)
    built = recipe.build(
        config, num_classes=train_set.num_classes, image_shape=train_set.image_shape
    )
    run = _Run(
        config,
        built,
        workdir,
        tensorboard,
        layout.data_mesh(fsdp=config.fsdp),
        train_set,
        validation_set,
    )
    last_step = min(stop_after or config.train_steps, config.train_steps)
    with jax.default_matmul_precision(config.precision):
        # Tracing finds the mistakes that need the model, such as a pattern without a match.
        traced_step = run.trace_step()
        evaluator = _make_evaluator(run)
        distributed.on_primary(lambda: run_folder.claim(workdir, config))
        with run_folder.only_trainer(workdir), preemption.stop_requests() as stop_requested:
            checkpoints = checkpoint.Checkpoints(
                workdir / "checkpoints", metric=run.best_metric, keep_best=config.loop.keep_best
            )
            try:
                with failures.felt_by_all():
                    return _train(
                        run, traced_step, evaluator, checkpoints, stop_requested, last_step
                    )
            finally:
                checkpoints.close()


def _load_data(
    config: TrainConfig,
) -> tuple[data.Dataset | data.LazyDataset, data.Dataset | None]:
    options: dict[str, Any] = {
        "data_dir": config.data.data_dir,
        "num_validation": config.data.num_validation,
    }
    load = data.open_lazily if config.data.placement == "stream" else data.load
    train_set = load(
        config.data.name, "train", max_examples=config.data.max_train_examples, **options
    )
    if not config.data.num_validation:
        return train_set, None
    return train_set, data.load(
        config.data.name, "validation", max_examples=config.loop.eval_examples, **options
    )


def _train(
    run: _Run,
    traced_step: jax.stages.Lowered,
    evaluator: validation.Evaluator | None,
    checkpoints: checkpoint.Checkpoints,
    stop_requested: preemption.StopRequested,
    last_step: int,
) -> dict[str, float]:
    config, built = run.config, run.recipe
    template = run.template
    init_key, train_key = run.keys
    restored = checkpoints.restore_latest(template)
    current, metadata = restored or (
        jax.jit(built.init, out_shardings=built.shardings(run.mesh))(init_key),
        {"train_seconds": 0.0},
    )
    first_step = int(current.step)
    if first_step >= last_step:
        if distributed.is_primary():
            print(f"{run.workdir}: step {first_step} of {config.train_steps} is done already.")
        return _last_metrics(run.workdir / "metrics.jsonl")
    seconds_before = float(metadata["train_seconds"])
    writer = distributed.on_primary(
        lambda: MetricsWriter(
            run.workdir / "metrics.jsonl",
            resume_step=first_step,
            tensorboard=run.workdir / "tensorboard" if run.tensorboard else None,
        )
    )
    progress = Progress("train", config.train_steps, first_step)
    progress.say(
        f"{config.model.name}: {state.num_params(template.params):,} parameters, "
        f"{len(run.train_set)} training examples, {run_folder.versions()['devices']}"
        + (f"; resumed at step {first_step}" if restored else "")
    )

    def evaluate(current: state.TrainState) -> dict[str, float]:
        if evaluator is None:
            return {}
        with progress.chrono.paused():
            result = evaluator(current)
        if writer is not None:
            writer.write(int(current.step), result)
        progress.say(
            f"step {int(current.step)}: "
            + ", ".join(f"{name} {value:.4f}" for name, value in result.items())
        )
        return result

    def save(current: state.TrainState, metrics: Mapping[str, float]) -> None:
        with progress.chrono.paused():
            checkpoints.save(
                current, {"train_seconds": seconds_before + progress.chrono.seconds}, metrics
            )

    guard = guards.CollapseGuard(run.train_set.num_classes)
    result: dict[str, float] = {}
    try:
        with progress.chrono.paused():
            compile_start = time.monotonic()
            train_step = traced_step.compile()
            progress.say(f"compiled the step in {time.monotonic() - compile_start:.1f} s")
        pending: tuple[int, Mapping[str, Array]] | None = None

        def settle() -> dict[str, float]:
            """Reads, judges and logs the metrics of the pending step.

            It is the step before the one just started, and has run while the host was busy.
            """
            if pending is None:
                return {}
            number, values = pending[0], to_floats(pending[1])
            guards.check_finite(number, values)
            guard.check(number, values)
            rate = config.batch_size * (number - first_step) / max(progress.chrono.seconds, 1e-9)
            due = number % config.loop.log_every == 0 or number == config.train_steps
            if writer is not None and due:
                named = {f"train/{name}": value for name, value in values.items()}
                writer.write(
                    number,
                    {
                        **named,
                        "train/learning_rate": float(built.learning_rate(number - 1)),
                        "examples_per_second": rate,
                    },
                )
            progress.update(
                number,
                f"{rate:.0f} examples/s  loss {values['loss']:.3f}  "
                f"accuracy {values['accuracy']:.3f}",
            )
            return {f"train/{name}": value for name, value in values.items()}

        for index in range(first_step, last_step):
            current, metrics = train_step(current, run.train_batch(index), train_key)
            settle()
            number = index + 1
            pending = number, metrics
            request = stop_requested(number)
            stop = bool(request) or number == last_step
            at_eval = number == config.train_steps or _is_due(number, config.loop.eval_every)
            if stop or at_eval or _is_due(number, config.loop.checkpoint_every):
                # A state is saved only after its own metrics were found finite.
                result = settle()
                pending = None
                try:
                    if at_eval:
                        with failures.felt_by_all():
                            result = evaluate(current) or result
                finally:
                    # Also where the evaluation fails: it must not cost the training. (Of several
                    # processes, those that did not fail would not come to save.)
                    save(current, result)
            if request:
                checkpoints.wait()
                progress.say(f"{request}: saved step {number}; the same command resumes.")
                return result
        checkpoints.wait()
        progress.say(
            f"done: step {last_step} of {config.train_steps}, "
            f"{format_seconds(seconds_before + progress.chrono.seconds)} of training."
        )
        return result
    finally:
        progress.close()
        if writer is not None:
            writer.close()


def _last_metrics(path: pathlib.Path) -> dict[str, float]:
    """Returns the last validation metrics of a finished run, or else its last training metrics."""
    rows = read_metrics(path)
    evaluations = [row for row in rows if any(name.startswith("eval/") for name in row)]
    last = (evaluations or rows or [{}])[-1]
    return {name: value for name, value in last.items() if name.startswith(("eval/", "train/"))}


def _is_due(number: int, every: int) -> bool:
    return every > 0 and number % every == 0


def _make_evaluator(run: _Run) -> validation.Evaluator | None:
    """Returns ``state -> validation metrics``; without a validation split there is none."""
    if run.validation_set is None:
        return None
    return validation.make_evaluator(
        run.config, run.recipe, run.validation_set, run.mesh, run.template
    )
