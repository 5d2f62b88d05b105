"""What one call of the benchmark measures, in which order, and where results go."""

import dataclasses
import functools
import itertools
import os
import pathlib
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import jax

from gfa_jax import _validate, cli, files, models
from gfa_jax import config as config_lib
from gfa_jax.benchmark import environment, programs, tables, timing
from gfa_jax.config.schema import PRECISIONS
from gfa_jax.evaluation.evaluate import parse_attack
from gfa_jax.threat import ThreatModel
from gfa_jax.training import devices, recipe
from gfa_jax.training.progress import Progress


@dataclasses.dataclass(frozen=True)
class Flags:
    """Flags of the benchmark; lists are separated by commas."""

    out: str = "runs/benchmark"
    """Folder of results.json, results.md and results.png; a stopped benchmark goes on in it."""
    models: str = "cnn6"
    """Keys of gfa_jax.models.MODELS."""
    steps: str = ",".join(programs.STEPS)
    """Training steps; fields of the config after colons: pgd_at:attack.num_steps=5. The first is
    what the others are compared with. Empty for none."""
    configs: str = ""
    """Files of recipes, FILE.py or FILE.py:NAME, whose steps are measured too; models, batch,
    types and precision are replaced by those asked for."""
    attacks: str = ""
    """Attacks, as for eval.py: pgd:num_steps=10,apgd-ce."""
    batch_sizes: str = "128"
    """Over all devices."""
    dtypes: str = "float32"
    """Of the model in training: float32, bfloat16."""
    precision: str = "default"
    """Of float32 products on accelerators: default, high, highest."""
    image_size: int = 32
    """Height and width."""
    channels: int = 3
    """Of the images."""
    num_classes: int = 10
    """Logits."""
    homogeneous: bool = True
    """Without biases and normalisation layers, where a model has such a form."""
    remat: bool = False
    """Compute blocks again in backward passes."""
    norm: str = "linf"
    """Of the attacks: linf, l2 or l1."""
    epsilon: float = 8 / 255
    """Their radius."""
    rounds: int = 7
    """In which the programs take turns."""
    samples: int = 3
    """Of each program in a round."""
    sample_seconds: float = 0.5
    """About how long a sample takes; a program that takes longer runs once."""
    peak_flops: float | None = None
    """Operations per second of a device, for MFU; by default those of a known data sheet."""


_SETTINGS = [
    *("homogeneous", "remat", "precision", "image_size", "channels", "num_classes"),
    *("norm", "epsilon", "rounds", "samples", "sample_seconds", "peak_flops"),
]
"""Flags that one folder of results has in common."""


Steps = Mapping[str, Callable[[programs.Task], config_lib.TrainConfig]]
"""Recipes of steps, by what the table calls them."""
Attacks = Mapping[str, tuple[str, dict[str, Any]]]
"""Names and options of attacks, by what the table calls them."""


def run(flags: Flags, command: str) -> dict[str, Any]:
    """Measures what the folder does not have yet, and writes everything after each group.

    Args:
      flags: see ``Flags``.
      command: recorded with the results.

    Returns:
      The content of ``results.json``.

    Raises:
      ValueError: for flags that are not valid, before anything is compiled, or a folder of results
        with other settings, versions or devices.
    """
    tasks, steps, attacks = _plan(flags)
    out = pathlib.Path(flags.out)
    settings = {name: getattr(flags, name) for name in _SETTINGS}
    results = _resumed(out / "results.json", settings, command)
    for task, kind in itertools.product(tasks, ("step", "attack")):
        names = steps if kind == "step" else attacks
        if kind == "attack" and task.dtype != tasks[0].dtype:
            continue  # Attacks compute in float32.
        dtype = task.dtype if kind == "step" else "float32"
        group: dict[str, Any] = {
            "model": task.model,
            "kind": kind,
            "batch_size": task.batch_size,
            "dtype": dtype,
            "image_shape": list(task.image_shape),
        }
        wanted = group | {"names": list(names)}
        if not names or any(wanted.items() <= one.items() for one in results["groups"]):
            continue
        makers: dict[str, Callable[[], programs.Program]] = {}
        for name in names:
            if kind == "step":
                makers[name] = functools.partial(programs.train_step, steps[name](task), task)
            else:
                makers[name] = functools.partial(
                    programs.attack, *attacks[name], _threat(flags), task
                )
        title = f"{task.model} {dtype} {task.batch_size}"
        results["groups"].append(wanted | _measure(makers, flags, title, dtype))
        files.write_json(out / "results.json", results)
        files.write_bytes(out / "results.md", tables.page(results).encode())
        files.write_bytes(out / "results.png", tables.picture(results))
    return results


def _plan(flags: Flags) -> tuple[list[programs.Task], Steps, Attacks]:
    """Checks the flags and returns what they ask for."""
    _validate.one_of(PRECISIONS, precision=flags.precision)
    numbers = ("rounds", "samples", "image_size", "channels")
    _validate.positive_integer(**{name: getattr(flags, name) for name in numbers})
    _validate.positive(sample_seconds=flags.sample_seconds)
    if flags.peak_flops is not None:
        _validate.positive(peak_flops=flags.peak_flops)
    sizes = cli.split_names(flags.batch_sizes)
    for size in sizes:
        if not size.isdecimal() or int(size) == 0 or int(size) % jax.device_count():
            raise ValueError(
                f"batch_sizes={flags.batch_sizes!r} must be positive multiples of the number of "
                f"devices, {jax.device_count()}, such as {128 * jax.device_count()}."
            )
    tasks = []
    for model, dtype, size in itertools.product(
        cli.split_names(flags.models), cli.split_names(flags.dtypes), sizes
    ):
        _validate.one_of(models.registry.DTYPES, dtypes=dtype)
        task = programs.Task(
            model,
            dtype,
            int(size),
            (flags.image_size, flags.image_size, flags.channels),
            flags.num_classes,
            flags.homogeneous,
            flags.remat,
            flags.precision,
        )
        tasks.append(task)
    steps: dict[str, Callable[[programs.Task], config_lib.TrainConfig]] = {
        name: functools.partial(programs.step_config, name) for name in cli.split_names(flags.steps)
    }
    for name in cli.split_names(flags.configs):
        steps[name] = functools.partial(programs.adapted, config_lib.load_file(name))
    for task in tasks:
        configs = [step(task) for step in steps.values()]
        # For attacks alone: whether the model takes these images.
        configs = configs or [programs.step_config("standard", task)]
        for config in configs:
            recipe.build(config, num_classes=task.num_classes, image_shape=task.image_shape)
    threat = _threat(flags)
    attacks = {spec: parse_attack(spec) for spec in cli.split_names(flags.attacks)}
    for name, options in attacks.values():
        programs.create_attack(name, options, threat)
    if not tasks or not (steps or attacks):
        raise ValueError(
            f"models={flags.models!r}, steps={flags.steps!r} and attacks={flags.attacks!r} leave "
            "nothing to measure."
        )
    return tasks, steps, attacks


def _threat(flags: Flags) -> ThreatModel:
    return ThreatModel(norm=flags.norm, epsilon=flags.epsilon)


def _resumed(path: pathlib.Path, settings: Mapping[str, Any], command: str) -> dict[str, Any]:
    now = environment.describe()
    if not path.exists():
        return {
            "command": command,
            "settings": dict(settings),
            "environment": now,
            "groups": [],
        }
    results = files.read_json(path)
    for part, asked in (("settings", settings), ("environment", now)):
        if results.get(part) != dict(asked):
            raise ValueError(
                f"{path} was measured with {results.get(part)}, this is {dict(asked)}: use another "
                "--out."
            )
    return results


def _measure(
    makers: Mapping[str, Callable[[], programs.Program]], flags: Flags, title: str, dtype: str
) -> dict[str, Any]:
    """Compiles the programs of a group, lets them take turns, and returns what was found."""
    progress = Progress(title, len(makers) * (flags.rounds + 2), 0)
    made: dict[str, programs.Program] = {}
    try:
        for number, (name, make) in enumerate(makers.items()):
            progress.update(number, f"compiling {name}")
            made[name] = make()
        done = len(makers)

        def tell(number: int, name: str) -> None:
            nonlocal done
            done += 1
            progress.update(done, f"round {number} of {flags.rounds}: {name}")

        load = os.getloadavg()[0]
        seconds = timing.interleaved(
            {name: program.start for name, program in made.items()},
            rounds=flags.rounds,
            samples=flags.samples,
            sample_seconds=flags.sample_seconds,
            progress=tell,
        )
    finally:
        progress.close()
    product = programs.product()
    reached = timing.interleaved({"": product.start}, rounds=1, samples=5, sample_seconds=0.2)[""]
    sheet = devices.of_kind(jax.devices()[0].device_kind)
    peak = flags.peak_flops or (sheet.peak_of(flags.precision, dtype) if sheet else None)
    return {
        "num_devices": jax.device_count(),
        "load": load,
        "peak_flops": peak,
        "product_flops": (product.flops or 0) / statistics.median(reached[0]),
        "programs": [
            {
                "name": name,
                "seconds": seconds[name],
                **{
                    key: value
                    for key, value in program._asdict().items()
                    if key not in ("start", "compiled")
                },
            }
            for name, program in made.items()
        ],
    }
