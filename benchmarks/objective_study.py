"""The benchmark of objectives: what each reaches on digits, and what a step of it costs."""

import dataclasses
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs import (
    digits_baselines,
    digits_fgsm_at,
    digits_gfa,
    digits_gfa_at,
    digits_pgd_at,
    digits_standard,
)
from gfa_jax import ThreatModel, _validate, attacks, data, files
from gfa_jax import config as config_lib
from gfa_jax.attacks import compaction
from gfa_jax.config import TrainConfig
from gfa_jax.evaluation import loading
from gfa_jax.training import flops, layout, loop, recipe, run_folder

RECIPES: Mapping[str, Callable[[], TrainConfig]] = {
    "standard": digits_standard.get_config,
    "gfa": digits_gfa.get_config,
    "fgsm_at": digits_fgsm_at.get_config,
    "pgd_at": digits_pgd_at.get_config,
    "gfa_at": digits_gfa_at.get_config,
    **digits_baselines.RECIPES,
}

ATTACKS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "PGD": ("pgd", {"num_steps": 40}),
    "PGD, margin": ("pgd-margin", {"num_steps": 40}),
    "APGD-T": ("apgd-t", {}),
    "Square": ("square", {"num_queries": 1000, "chunk_size": 64}),
}
"""By column of the table: the attack and its options."""

_STEPS = 20
"""Of one measurement of a step's time."""


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
    for name in flags.recipes.split(","):
        config = config_lib.choose(RECIPES, name.strip())
        if flags.train_steps is not None:
            config = dataclasses.replace(config, train_steps=flags.train_steps)
        config_lib.validate(config)
        configs[name.strip()] = config
    results = _read(out / "results.json")
    if flags.rounds:
        missing = {
            name: config
            for name, config in configs.items()
            if results["costs"].get(name, {}).get("config") != config_lib.to_dict(config)
        }
        results["costs"] |= _costs(missing, flags.rounds) if missing else {}
        files.write_json(out / "results.json", results)
    attack = _Attacker()
    for seed in range(flags.seeds):
        for name, config in configs.items():
            key = f"{name}/seed{seed}"
            seeded = dataclasses.replace(config, seed=seed)
            run_folder.claim(out / key, seeded)  # refuses the run of another recipe
            if key not in results["accuracies"]:
                print(f"== {key}", flush=True)
                loop.train_and_evaluate(seeded, out / key)
                results["accuracies"][key] = attack(out / key)
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


class _Attacker:
    """Attacks trained models; those of one architecture share their compiled programs."""

    def __init__(self) -> None:
        self._functions: dict[Any, Callable[..., Any]] = {}
        self._attacks: dict[tuple[str, ThreatModel], Any] = {}

    def __call__(self, workdir: pathlib.Path) -> dict[str, float]:
        """Returns accuracies on the test images, by column."""
        run = loading.load_run(workdir)
        module = run.classifier.module
        apply = self._functions.setdefault(
            module, lambda variables, inputs: module.apply(variables, inputs, train=False)
        )
        variables = {"params": run.params, **run.model_state}
        images, labels = np.asarray(data.to_float(run.test_set.images)), run.test_set.labels
        right = np.asarray(jnp.argmax(apply(variables, images), axis=1) == labels)
        worst = right
        accuracies = {"clean": float(right.mean())}
        keys = attacks.example_keys(jax.random.key(0), jnp.asarray(run.test_set.ids))
        for column, (name, options) in ATTACKS.items():
            threat = run.classifier.threat
            # Programs are found again by the identity of attack and function.
            attack = self._attacks.setdefault(
                (column, threat), attacks.create(name, threat, **options)
            )
            found = compaction.attack_in_batches(
                attack,
                apply,
                variables,
                keys,
                images,
                labels,
                batch_size=len(labels),
            )
            resists = ~np.asarray(found.success)
            accuracies[column] = float((right & resists).mean())
            worst = worst & resists
        return accuracies | {"worst case": float(worst.mean())}


def _costs(configs: Mapping[str, TrainConfig], rounds: int) -> dict[str, dict[str, Any]]:
    """Returns time and operations of a step, as multiples of the standard one's."""
    configs = {"standard": RECIPES["standard"]()} | dict(configs)
    measures: dict[str, Callable[[], float]] = {}
    operations = {}
    for name, config in configs.items():
        print(f"compiling the step of {name}", flush=True)
        measures[name], operations[name] = _step(config)
    seconds: dict[str, list[float]] = {name: [] for name in configs}
    for number in range(rounds):
        print(f"round {number + 1} of {rounds}", flush=True)
        # A busy moment falls on neighbours: every objective is next to a standard step.
        for name, measure in measures.items():
            seconds[name].append(measure() / measures["standard"]())
    return {
        name: {
            "config": config_lib.to_dict(configs[name]),
            "flops": operations[name] / operations["standard"],
            "time": statistics.median(ratios),
            "fastest": min(ratios),
            "slowest": max(ratios),
        }
        for name, ratios in seconds.items()
    }


def _step(config: TrainConfig) -> tuple[Callable[[], float], int]:
    """Returns a measurement of the seconds of a step, and its operations."""
    examples = data.load(config.data.name, "train", num_validation=config.data.num_validation)
    built = recipe.build(config, num_classes=examples.num_classes, image_shape=examples.image_shape)
    train_step = built.train_step(layout.data_mesh())
    batch = data.train_batch(examples, config.batch_size, seed=0, step=0)
    batch = {name: jnp.asarray(value) for name, value in batch.items()}
    key = jax.random.key(0)
    current = jax.jit(built.init)(key)
    operations = flops.count(train_step, current, batch, key)
    compiled = train_step.lower(current, batch, key).compile()

    def measure() -> float:
        nonlocal current
        started = time.perf_counter()
        for _ in range(_STEPS):
            current, _ = compiled(current, batch, key)
        jax.block_until_ready(current)
        return (time.perf_counter() - started) / _STEPS

    measure()
    return measure, operations


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
