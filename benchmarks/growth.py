"""Says how a step's cost grows with the batch, the aligned layers and the attack's steps.

    python benchmarks/growth.py --out docs/performance

Writes ``growth.md`` and ``growth.png``. In each sweep the programs take turns; times are multiples
of the standard step at the sweep's batch, or of the smallest batch's step.
"""

import dataclasses
import io
import pathlib
import sys
from collections.abc import Mapping, Sequence

# A script finds the modules of its own folder, not those of the project.
sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

import numpy as np  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from gfa_jax import _validate, cli, files  # noqa: E402
from gfa_jax.benchmark import environment, programs, timing  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Flags:
    """Flags of the sweeps."""

    out: str = "runs/growth"
    """Folder of growth.md and growth.png."""
    model: str = "cnn6"
    """A key of gfa_jax.models.MODELS with six blocks."""
    batch_size: int = 32
    """Of the sweeps over layers and steps."""
    batch_sizes: str = "16,32,64,128"
    """Of the sweep over batches."""
    steps: str = "1,2,5,10,20"
    """Of PGD."""
    rounds: int = 5
    """In which the programs take turns."""


Sweep = Mapping[int, timing.Summary]
"""Times as multiples of the reference, by what grows."""


def run(flags: Flags) -> None:
    """Measures the sweeps, writes the page and the picture, and prints the page.

    Raises:
      ValueError: for flags that do not fit.
    """
    _validate.positive_integer(batch_size=flags.batch_size, rounds=flags.rounds)
    sizes, steps = (_numbers(flags, name) for name in ("batch_sizes", "steps"))
    sweeps = {
        "images in a batch, GFA": batches(flags, sizes),
        "aligned hidden layers, GFA": layers(flags),
        "steps of PGD, adversarial training": attack_steps(flags, steps),
    }
    out = pathlib.Path(flags.out)
    page = render(sweeps, flags)
    files.write_bytes(out / "growth.md", page.encode())
    files.write_bytes(out / "growth.png", picture(sweeps))
    print(page)


def _numbers(flags: Flags, name: str) -> list[int]:
    texts = cli.split_names(getattr(flags, name))
    if len(texts) < 3 or not all(text.isdecimal() and int(text) for text in texts):
        raise ValueError(f"{name}={getattr(flags, name)!r} must be three or more positive numbers.")
    return sorted({int(text) for text in texts})


def batches(flags: Flags, sizes: Sequence[int]) -> Sweep:
    """Returns the time of GFA's step at several batches, in that of the smallest."""
    return _measure(
        {size: ("gfa", programs.Task(flags.model, batch_size=size)) for size in sizes},
        min(sizes),
        flags.rounds,
    )


def layers(flags: Flags) -> Sweep:
    """Returns the time of GFA's step with the input and the first hidden layers aligned."""
    task = programs.Task(flags.model, batch_size=flags.batch_size)
    steps = {-1: ("standard", task), 0: ("gfa_input", task)}
    steps |= {
        number: (f"gfa:gfa.hidden_layers=block_[0-{number - 1}]", task) for number in range(1, 7)
    }
    return _measure(steps, -1, flags.rounds)


def attack_steps(flags: Flags, numbers: Sequence[int]) -> Sweep:
    """Returns the time of adversarial training's step."""
    task = programs.Task(flags.model, batch_size=flags.batch_size)
    steps = {-1: ("standard", task)}
    steps |= {number: (f"pgd_at:attack.num_steps={number}", task) for number in numbers}
    return _measure(steps, -1, flags.rounds)


def _measure(steps: Mapping[int, tuple[str, programs.Task]], reference: int, rounds: int) -> Sweep:
    made = {
        str(number): programs.train_step(programs.step_config(step, task), task)
        for number, (step, task) in steps.items()
    }
    seconds = timing.interleaved(
        {name: program.start for name, program in made.items()},
        rounds=rounds,
        samples=1,
        sample_seconds=0.2,
    )
    return {
        number: timing.summary(seconds[str(number)], seconds[str(reference)])
        for number in steps
        if number >= 0
    }


def fit(sweep: Sweep) -> tuple[float, float, float]:
    """Returns slope, intercept and the share of variance of the line through the medians."""
    numbers = np.array(list(sweep), float)
    ratios = np.array([one.ratio for one in sweep.values()])
    slope, intercept = np.polyfit(numbers, ratios, 1)
    left = ratios - (slope * numbers + intercept)
    return float(slope), float(intercept), float(1 - left.var() / ratios.var())


def render(sweeps: Mapping[str, Sweep], flags: Flags) -> str:
    """Returns the sweeps as Markdown."""
    lines = [
        f"{flags.model}, {environment.cpu_name()}; medians (lowest to highest) of {flags.rounds} "
        "rounds, in standard steps; of batches, in steps of the smallest.",
        "",
    ]
    for name, sweep in sweeps.items():
        slope, intercept, share = fit(sweep)
        cells = [
            f"{number}: {one.ratio:.2f} ({one.lowest:.2f}-{one.highest:.2f})"
            for number, one in sweep.items()
        ]
        lines += [
            f"* {name}: {', '.join(cells)}. Line: {intercept:.2f} + {slope:.3f} n, R² {share:.3f}.",
        ]
    return "\n".join(lines) + "\n"


def picture(sweeps: Mapping[str, Sweep]) -> bytes:
    """Returns a PNG with a panel for each sweep: medians, ranges, and the line through them."""
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    for axes, (name, sweep) in zip(figure.subplots(1, len(sweeps)), sweeps.items(), strict=True):
        numbers, found = np.array(list(sweep)), list(sweep.values())
        ratios = np.array([one.ratio for one in found])
        spread = [
            ratios - [one.lowest for one in found],
            np.array([one.highest for one in found]) - ratios,
        ]
        slope, intercept, _ = fit(sweep)
        axes.errorbar(numbers, ratios, yerr=spread, fmt="o", color="#0072B2", capsize=3)
        axes.plot(numbers, slope * numbers + intercept, color="#D55E00", linewidth=1)
        axes.set(xlabel=name, ylim=(0, None))
        axes.grid(color="#dddddd", linewidth=0.6)
    figure.axes[0].set_ylabel("time")
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=130, metadata={"Software": None})
    return file.getvalue()


def main() -> None:
    """Parses flags, measures and prints the page."""
    flags = cli.parse(Flags, description="Says how a step's cost grows.")
    cli.run_or_fail(lambda: run(flags))


if __name__ == "__main__":
    main()
