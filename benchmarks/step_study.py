"""The benchmark of training steps: ours and PyTorch's, on the same weights, images and threads."""

import dataclasses
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks import driver, networks
from benchmarks.peers import steps as torch_steps
from gfa_jax import _validate, cli, files
from gfa_jax.benchmark import environment, programs, timing
from gfa_jax.training import recipe

_SAME_LOSS = 1e-3
"""By how much first losses may differ, relatively, where nothing is drawn at random."""


@dataclasses.dataclass(frozen=True)
class Flags:
    """Flags of the benchmark."""

    out: str = "runs/benchmark-steps"
    """Folder of results.json and results.md; a new measurement takes its place."""
    model: str = "cnn6"
    """A CNN of gfa_jax.models, in its homogeneous form."""
    steps: str = "standard,gfa,fgsm_at,pgd_at"
    """Names joined by commas."""
    batch_size: int = 128
    """Examples."""
    image_size: int = 32
    """Height and width, of 3 channels."""
    rounds: int = 7
    """In which the programs take turns."""
    samples: int = 3
    """Of each program in a round."""
    sample_seconds: float = 0.5
    """About how long a sample takes."""
    threads: int | None = None
    """CPU threads of JAX and of PyTorch; as many as there are cores by default."""


def run(flags: Flags) -> str:
    """Measures everything in turns, writes the numbers and returns the page.

    Every step is there three times: ours, PyTorch's in its default layout and in channels-last.

    Raises:
      ValueError: for flags that do not fit, or where first losses differ.
      ImportError: without PyTorch.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    num_threads = driver.limit_threads(flags.threads)
    try:
        import torch
    except ImportError as error:
        raise ImportError(f"PyTorch is missing ({error}): make install-parity.") from error
    torch.set_num_threads(num_threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    device = "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"
    _validate.positive_integer(rounds=flags.rounds, samples=flags.samples)
    _validate.positive(sample_seconds=flags.sample_seconds)

    task = programs.Task(
        flags.model,
        batch_size=flags.batch_size,
        image_shape=(flags.image_size, flags.image_size, 3),
        precision="highest",
    )
    contenders: dict[str, Callable[[], Any]] = {}
    floating: dict[str, int | None] = {}
    # Nothing random, so that losses can be compared.
    fixed = "gfa.target=log_odds:data.crop_padding=0:data.flip=false"
    configs = {
        name: programs.step_config(f"{name}:{fixed}", task) for name in cli.split_names(flags.steps)
    }
    for name, config in configs.items():
        torch_steps.loss_fn(name, config.threat.epsilon)
    batch = programs.batch(task)
    images, labels = np.asarray(batch["inputs"], np.float32) / 255, np.asarray(batch["labels"])
    for name, config in configs.items():
        built = recipe.build(config, num_classes=task.num_classes, image_shape=task.image_shape)
        network = networks.Network(built.module, built.init(jax.random.key(0)).params)
        networks.to_torch(network)  # refuses other networks than CNNs before anything is compiled
        say(f"compiling {name}")
        ours = programs.train_step(config, task)
        floating[name] = ours.flops
        contenders[f"{name}, gfa_jax"] = ours.start
        first = float(ours.start()["loss"])
        for layout in ("contiguous", "channels_last"):
            model = networks.to_torch(network).to(device)
            if layout == "channels_last":
                model = model.to(memory_format=torch.channels_last)
            epsilon = config.threat.epsilon
            start = torch_steps.start_step(model, name, epsilon, images, labels)
            theirs = float(start())
            if name in ("standard", "gfa") and abs(theirs - first) > _SAME_LOSS * abs(first):
                raise ValueError(f"steps={name!r}: the losses differ: {first} and {theirs}.")
            contenders[f"{name}, PyTorch {layout}"] = _waiting(start, device)
    seconds = timing.interleaved(
        contenders,
        rounds=flags.rounds,
        samples=flags.samples,
        sample_seconds=flags.sample_seconds,
        progress=lambda number, name: say(f"round {number} of {flags.rounds}: {name}"),
    )
    results = {
        "environment": environment.describe()
        | {"torch": torch.__version__, "load": round(os.getloadavg()[0], 2)},
        "settings": dataclasses.asdict(flags),
        "flops": floating,
        "seconds": seconds,
    }
    out = pathlib.Path(flags.out)
    files.write_json(out / "results.json", results)
    page = table(results)
    files.write_bytes(out / "results.md", page.encode())
    return page


def _waiting(start: Callable[[], Any], device: str) -> Callable[[], Any]:
    """PyTorch on a GPU returns before it is done; JAX waits for arrays, not for tensors."""
    if device == "cpu":
        return start

    def run() -> None:
        import torch

        start()
        torch.cuda.synchronize()

    return run


def say(text: str) -> None:
    """Prints progress on standard error."""
    print(text, file=sys.stderr, flush=True)


def table(results: dict[str, Any]) -> str:
    """Returns the results as a Markdown page."""
    settings = results["settings"]
    lines = [
        "# Training steps beside PyTorch",
        "",
        ", ".join(f"{key} {value}" for key, value in results["environment"].items()) + ".",
        "",
        f"{settings['model']} (homogeneous), batch {settings['batch_size']} of "
        f"{settings['image_size']}x{settings['image_size']}x3, SGD with momentum, float32; median "
        f"and 90th percentile over {settings['rounds']} rounds of {settings['samples']} samples in "
        "turns. *Times PyTorch*: our time beside the faster of PyTorch's two layouts, median "
        "(lowest to highest) over rounds.",
        "",
        "| step | library | ms, median | p90 | times its standard step | times PyTorch | GFLOP/s |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    seconds = results["seconds"]
    for name in cli.split_names(settings["steps"]):
        libraries = ("gfa_jax", "PyTorch contiguous", "PyTorch channels_last")
        own = {library: seconds[f"{name}, {library}"] for library in libraries}
        medians = {
            library: timing.summary(values, values).median for library, values in own.items()
        }
        best = min(libraries[1:], key=lambda library: medians[library])
        for library in libraries:
            reference = seconds.get(f"standard, {library}", own[library])
            beside_standard = timing.summary(own[library], reference)
            beside = timing.summary(own[library], own[best])
            flops = results["flops"][name]
            cells = [
                name,
                library,
                f"{1e3 * beside.median:.4g}",
                f"{1e3 * beside.p90:.4g}",
                f"{beside_standard.ratio:.2f}",
                f"{beside.ratio:.2f} ({beside.lowest:.2f}-{beside.highest:.2f})",
                f"{flops / beside.median / 1e9:.4g}" if flops else "-",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
