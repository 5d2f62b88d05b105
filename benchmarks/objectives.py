"""Trains every objective on digits, with several seeds, and says what it reaches and what it costs.

    python benchmarks/objectives.py --out runs/objectives

Accuracies are of the 400 test images, the worst case over PGD on the cross-entropy, PGD on the
margin, Auto-PGD towards the other classes and Square. Step times are medians over rounds in which
the objectives take turns. A stopped benchmark goes on where it was.

This file is intentionally short: see ``objective_study``.
"""

import pathlib
import sys

# A script finds the modules of its own folder, not those of the project.
sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from benchmarks import objective_study  # noqa: E402
from gfa_jax import cli  # noqa: E402


def main() -> None:
    """Parses flags, trains, measures and prints the table."""
    description = "Trains every objective on digits: accuracies with seeds, and step times."
    flags = cli.parse(objective_study.Flags, description=description)
    cli.run_or_fail(lambda: objective_study.run(flags))


if __name__ == "__main__":
    main()
