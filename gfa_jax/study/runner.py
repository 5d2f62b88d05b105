"""Works through a study: trains, judges, records, and writes the page."""

import contextlib
import dataclasses
import fcntl
import pathlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from gfa_jax import _validate, cli, data, files
from gfa_jax.evaluation import evaluate, loading
from gfa_jax.evaluation.records import RecordsMismatchError
from gfa_jax.study import judge as judge_lib
from gfa_jax.study import page, plan, records
from gfa_jax.training import dry_run, guards, loop, run_folder


@dataclasses.dataclass(frozen=True)
class Flags:
    """Flags of a study."""

    study: str
    """File whose get_study() returns the study, such as configs/study/cifar10.py."""
    data_dir: str | None = None
    """Where prepared data sets lie."""
    out: str = "runs/study"
    """Folder of the runs with their weights; needed only while a study is worked through."""
    records: str = ""
    """Folder of the records, from which the page is written; OUT/records by default."""
    page: str = ""
    """The page; OUT/study.md by default. Its pictures lie in a folder of the same stem."""
    trials: str = ""
    """Names of trials to work through, separated by commas; all by default."""
    max_seeds: int | None = None
    """At most so many seeds of each trial."""
    validation_only: bool = False
    """Leave test images for a later call."""
    write_only: bool = False
    """Write the page from the records there are, and train nothing."""


def run(flags: Flags, command: str) -> None:
    """Trains and judges what has no record, and writes the page.

    A record is written as soon as a stage is done. A model that has to be trained anew, because
    its run is gone and a stage is missing, is judged anew: on test images, where
    ``validation_only`` leaves them for later, by the call that does not; the record it replaces is
    kept beside the new one (``records.replace``). Trials that another process with the same ``out``
    works on are passed over. The page is that of the study as its file says when the work is done.

    Args:
      flags: see ``Flags``.
      command: quoted in the page.

    Raises:
      ValueError: for a study or flags that do not fit, or records of other recipes, before
        anything is trained.
      FileNotFoundError: for a missing study or data set.
    """
    study = plan.load_study(flags.study)
    chosen = cli.split_names(flags.trials) if flags.trials else list(study.trials)
    if not chosen:
        raise ValueError(f"trials={flags.trials!r} names no trial; without it, all are worked on.")
    for name in chosen:
        _validate.one_of(study.trials, trials=name)
    if flags.max_seeds is not None:
        _validate.positive_integer(max_seeds=flags.max_seeds)
    out = pathlib.Path(flags.out)
    folder = pathlib.Path(flags.records) if flags.records else out / "records"
    target = pathlib.Path(flags.page) if flags.page else out / "study.md"
    _check_paths(out, folder, target)
    # All records are looked at before the first hour is spent.
    records.gather(study, folder)
    if not flags.write_only:
        _check_runs(study, chosen, out)
        config = study.trials[chosen[0]].config.data
        data.load(config.name, "test", data_dir=flags.data_dir, max_examples=1)
    # Seeds outside, so that every trial has one before any has the next.
    judge = judge_lib.Judge()
    rounds = max(len(study.trials[name].seeds) for name in chosen)
    if not flags.write_only:
        for number in range(min(rounds, flags.max_seeds or rounds)):
            for name in chosen:
                seeds = study.trials[name].seeds
                if number < len(seeds):
                    _work(study, name, seeds[number], out, folder, flags, judge)
    if not flags.write_only:
        # What is said of the trials may have been written while they ran.
        study = plan.load_study(flags.study)
    page.write(study, records.gather(study, folder), target, command)
    print(f"written: {target}", file=sys.stderr)


def _check_paths(out: pathlib.Path, folder: pathlib.Path, target: pathlib.Path) -> None:
    """Refuses places that could not be written to, hours later.

    Raises:
      ValueError: naming the flag.
    """
    if not target.suffix or target.is_dir():
        raise ValueError(
            f"page={str(target)!r} must be a file with an ending, such as study.md: its pictures "
            "lie in a folder without."
        )
    for name, path in (("out", out), ("records", folder), ("page", target.with_suffix(""))):
        first = next(one for one in (path, *path.parents) if one.exists())
        if not first.is_dir():
            raise ValueError(f"{name}={str(path)!r} cannot be a folder: {str(first)!r} is a file.")


def _check_runs(study: plan.Study, chosen: Sequence[str], out: pathlib.Path) -> None:
    """Refuses the runs of other recipes that lie where these would.

    Raises:
      ValueError: naming the folder and the fields that differ.
    """
    for name in chosen:
        for seed in study.trials[name].seeds:
            workdir = out / f"{name}-seed{seed}"
            if (workdir / "config.json").exists():
                run_folder.claim(workdir, study.trials[name].at(seed))


def _work(
    study: plan.Study,
    name: str,
    seed: int,
    out: pathlib.Path,
    folder: pathlib.Path,
    flags: Flags,
    judge: judge_lib.Judge,
) -> None:
    """Does what is missing for one seed of a trial, unless another process is at it."""
    trial, protocol = study.trials[name], study.protocol
    config = trial.at(seed)
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, data_dir=flags.data_dir)
    )
    path = records.path_of(folder, name, seed)
    workdir = out / f"{name}-seed{seed}"
    with _alone(workdir) as is_mine:
        if not is_mine:
            print(f"== {name}, seed {seed}: another process is at it", file=sys.stderr)
            return
        record = records.read(path, config)
        stages = _missing(record, trial, protocol)
        if flags.validation_only:
            stages = [stage for stage in stages if stage == "validation"]
        if not stages:
            return
        print(f"== {name}, seed {seed}: {', '.join(stages)}", file=sys.stderr, flush=True)
        record |= {"trial": name, "seed": seed, "config": records.portable(config)}
        try:
            started = time.monotonic()
            loop.train_and_evaluate(config, workdir)
            print(f"   trained in {time.monotonic() - started:.0f} s", file=sys.stderr)
        except guards.TrainingFailedError as error:
            # What was judged before was another model.
            kept = {name: record[name] for name in ("trial", "seed", "config")}
            records.replace(path, config, kept | {"failure": str(error)})
            return
        run = loading.load_run(workdir, data_dir=flags.data_dir, num_examples=1)
        if run.step < config.train_steps:
            raise SystemExit("stopped; the same command goes on.")
        if record.get("weights_hash") != run.weights_hash:
            judged = [stage for stage in plan.STAGES if stage in record]
            record = {key: value for key, value in record.items() if key not in judged}
            stages = [
                stage
                for stage in plan.STAGES
                if stage in (*judged, *stages)
                and (stage == "validation" or not flags.validation_only)
            ]
            record |= {
                "weights_hash": run.weights_hash,
                "training": dict(run.training),
                "environment": run_folder.versions(),
                "step_flops": dry_run.step_flops(config),
            }
        for stage in stages:
            judgement = _judge(stage, judge, protocol, workdir, flags.data_dir)
            record[stage] = {
                "protocol": plan.settings(protocol, stage),
                "environment": run_folder.versions(),
                **judgement,
            }
            record = records.replace(path, config, record)


def _judge(
    stage: str,
    judge: judge_lib.Judge,
    protocol: plan.Protocol,
    workdir: pathlib.Path,
    data_dir: str | None,
) -> dict[str, Any]:
    """Returns what a page needs to know of a trained model."""
    specs = plan.attacks_of(protocol)
    if stage == "test":
        flags = evaluate.EvalFlags(
            str(workdir),
            attacks=",".join(dict.fromkeys([*specs["paper"], *specs["honest"]])),
            num_examples=protocol.num_test_examples,
            batch_size=protocol.batch_size,
            diagnostics=protocol.diagnostics,
            data_dir=data_dir,
        )
        try:
            results = evaluate.evaluate(flags)
        except RecordsMismatchError:
            # Of other weights, versions or settings: it is kept, and made anew.
            files.put_aside(workdir / "eval")
            results = evaluate.evaluate(flags)
        with np.load(workdir / "eval" / "outcomes.npz", allow_pickle=False) as outcomes:
            return records.summary(results, outcomes)
    is_validation = stage == "validation"
    run = loading.load_run(
        workdir,
        split="validation" if is_validation else "test",
        num_examples=(
            protocol.num_validation_examples if is_validation else protocol.num_test_examples
        ),
        data_dir=data_dir,
    )
    if is_validation:
        return judge.accuracies(run, specs["validation"], protocol.batch_size)
    if stage == "radii":
        return judge.radii(run, protocol.batch_size)
    return judge.distances(run, specs["distances"], protocol.distance_norm, protocol.batch_size)


def _missing(record: records.Record, trial: plan.Trial, protocol: plan.Protocol) -> list[str]:
    """Returns the evaluations that are to be made."""
    if record.get("failure"):
        return []
    return [stage for stage in plan.stages(trial, protocol) if stage not in record]


@contextlib.contextmanager
def _alone(workdir: pathlib.Path) -> Iterator[bool]:
    """Says whether nobody else works on this run; the lock dies with its process."""
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / ".study-lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
