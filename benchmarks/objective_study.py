"""The benchmark of objectives: what each reaches on digits, and what a step of it costs."""

import dataclasses
import os
import pathlib
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from configs import (
    digits_baselines,
    digits_fgsm_at,
    digits_gfa,
    digits_gfa_at,
    digits_pgd_at,
    digits_standard,
)
from gfa_jax import _validate, cli, data, files
from gfa_jax import config as config_lib
from gfa_jax.benchmark import programs, timing
from gfa_jax.config import TrainConfig
from gfa_jax.evaluation import loading
from gfa_jax.study.judge import Judge
from gfa_jax.training import loop, run_folder

RECIPES: Mapping[str, Callable[[], TrainConfig]] = {
    "standard": digits_standard.get_config,
    "gfa": digits_gfa.get_config,
    "fgsm_at": digits_fgsm_at.get_config,
    "pgd_at": digits_pgd_at.get_config,
    "gfa_at": digits_gfa_at.get_config,
    **digits_baselines.RECIPES,
}

ATTACKS: Mapping[str, str] = {
    "PGD": "pgd:num_steps=40",
    "PGD, margin": "pgd-margin:num_steps=40",
    "APGD-T": "apgd-t",
    "Square": "square:num_queries=1000:chunk_size=64",
}
"""By column of the table: the attack as for ``eval.py``."""


@dataclasses.dataclass(frozen=True)
class Flags:
    """Flags of the benchmark."""

    out: str = "runs/objectives"
    """Folder of the runs, results.json and results.md."""
    recipes: str = ",".join(RECIPES)
    """Names joined by commas."""
    seeds: int = 3
    """Trainings of each recipe: seeds 0, 1, ..."""
    rounds: int = 7
    """Measurements of each step's time; the recipes take turns. 0 for none."""
    train_steps: int | None = None
    """Of each training, in place of the recipe's, to try the benchmark itself."""


def run(flags: Flags) -> None:
    """Measures what is not there yet, writes results.json and results.md, and prints the table.

    Raises:
      ValueError: for an unknown recipe, numbers out of range, or results of other versions,
        devices or recipes.
    """
    _validate.positive_integer(seeds=flags.seeds)
    _validate.non_negative(rounds=flags.rounds)
    out = pathlib.Path(flags.out)
    configs = {}
    for name in cli.split_names(flags.recipes):
        config = config_lib.choose(RECIPES, name)
        if flags.train_steps is not None:
            config = dataclasses.replace(config, train_steps=flags.train_steps)
        config_lib.validate(config)
        configs[name] = config
    results = _read(out / "results.json")
    if flags.rounds:
        missing = {
            name: config
            for name, config in configs.items()
            if results["costs"].get(name, {}).get("config") != config_lib.to_dict(config)
        }
        results["costs"] |= _costs(missing, flags.rounds) if missing else {}
        files.write_json(out / "results.json", results)
    judge = Judge()
    for seed in range(flags.seeds):
        for name, config in configs.items():
            key = f"{name}/seed{seed}"
            seeded = dataclasses.replace(config, seed=seed)
            run_folder.claim(out / key, seeded)  # refuses the run of another recipe
            if key not in results["accuracies"]:
                print(f"== {key}", flush=True)
                loop.train_and_evaluate(seeded, out / key)
                results["accuracies"][key] = _attacked(judge, out / key)
                files.write_json(out / "results.json", results)
    page = table(results, list(configs))
    (out / "results.md").write_text(page)
    print(page)


def _read(path: pathlib.Path) -> dict[str, Any]:
    environment = run_folder.versions() | {"threads": str(os.cpu_count())}
    if not path.exists():
        return {"environment": environment, "costs": {}, "accuracies": {}}
    results = files.read_json(path)
    if results["environment"] != environment:
        raise ValueError(
            f"{path} was measured with {results['environment']}, this is {environment}: use "
            "another --out."
        )
    return results


def _attacked(judge: Judge, workdir: pathlib.Path) -> dict[str, float]:
    """Returns accuracies on the test images, by column."""
    run = loading.load_run(workdir)
    size = len(run.test_set)
    right = worst = judge.is_right(run, size)
    accuracies = {"clean": float(right.mean())}
    for column, spec in ATTACKS.items():
        everyone = np.ones(size, bool)
        found = judge.attack(run, spec, run.classifier.threat, everyone, size)
        resists = ~np.asarray(found.success)
        accuracies[column] = float((right & resists).mean())
        worst = worst & resists
    return accuracies | {"worst case": float(worst.mean())}


def _costs(configs: Mapping[str, TrainConfig], rounds: int) -> dict[str, dict[str, Any]]:
    """Returns time and operations of a step, as multiples of the standard one's."""
    configs = {"standard": RECIPES["standard"]()} | dict(configs)
    made = {}
    for name, config in configs.items():
        print(f"compiling the step of {name}", flush=True)
        described = data.describe(config.data.name, data_dir=config.data.data_dir)
        task = programs.Task(
            config.model.name,
            batch_size=config.batch_size,
            image_shape=described.image_shape,
            num_classes=described.num_classes,
        )
        made[name] = programs.train_step(config, task)
    seconds = timing.interleaved(
        {name: program.start for name, program in made.items()},
        rounds=rounds,
        samples=3,
        sample_seconds=0.05,
    )
    costs = {}
    for name, config in configs.items():
        summary = timing.summary(seconds[name], seconds["standard"])
        costs[name] = {
            "config": config_lib.to_dict(config),
            "flops": made[name].flops / made["standard"].flops,
            "time": summary.ratio,
            "fastest": summary.lowest,
            "slowest": summary.highest,
        }
    return costs


def table(results: Mapping[str, Any], names: list[str]) -> str:
    """Returns the results as a Markdown page."""
    environment = ", ".join(f"{key} {value}" for key, value in results["environment"].items())
    columns = ["clean", *ATTACKS, "worst case"]
    lines = [
        "# Objectives on digits",
        "",
        f"{environment}.",
        "",
        "Accuracy in % on the 400 test images, mean +- standard deviation over seeds. Time and "
        "FLOPs of a step are multiples of the standard step's: time is the median (fastest to "
        "slowest) of rounds, FLOPs count matrix products and convolutions.",
        "",
        "| objective | seeds | " + " | ".join(columns) + " | time of a step | FLOPs |",
        "|---|---:|" + "---:|" * (len(columns) + 2),
    ]
    for name in names:
        runs = [
            accuracies
            for key, accuracies in results["accuracies"].items()
            if key.startswith(f"{name}/")
        ]
        cells = [_spread([100 * run[column] for run in runs]) for column in columns]
        cost = results["costs"].get(name)
        times = (
            [f"{cost['time']:.1f} ({cost['fastest']:.1f}-{cost['slowest']:.1f})"] if cost else ["-"]
        )
        times.append(f"{cost['flops']:.1f}" if cost else "-")
        lines.append("| " + " | ".join([name, str(len(runs)), *cells, *times]) + " |")
    return "\n".join(lines) + "\n"


def _spread(values: list[float]) -> str:
    if not values:
        return "-"
    mean = f"{statistics.mean(values):.1f}"
    return f"{mean} +- {statistics.stdev(values):.1f}" if len(values) > 1 else mean
