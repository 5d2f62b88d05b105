"""Times every attack here and in PyTorch libraries, and compares what they find.

    python benchmarks/attacks.py --out runs/benchmark-attacks

All attack the same network with the same weights, on the same images, with the same numbers of
steps and threads. Results are written after every run, so that a stopped benchmark goes on where it
was; more rounds, attacks, norms or peers can be added in the same folder.

This file is intentionally short: see ``driver``, ``measure`` and ``peers``.
"""

import pathlib
import sys

# A script finds the modules of its own folder, not those of the project.
sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from benchmarks import driver  # noqa: E402
from gfa_jax import cli  # noqa: E402


def main() -> None:
    """Parses flags, measures and prints the table."""
    description = "Times every attack here and in PyTorch libraries, and compares what they find."
    flags = cli.parse(driver.Flags, description=description)
    cli.run_or_fail(lambda: driver.run(flags))


if __name__ == "__main__":
    main()
