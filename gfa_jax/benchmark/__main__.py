"""Measures compiled training steps and attacks, and writes a table, a picture and the numbers.

    python -m gfa_jax.benchmark --models cnn6 --batch_sizes 128 --out runs/benchmark

A stopped one goes on where it stopped.
"""

import shlex
import sys
from collections.abc import Sequence

from gfa_jax import cli
from gfa_jax.benchmark import runner, tables


def main(argv: Sequence[str] | None = None) -> None:
    """Parses flags, measures, and prints the page."""
    argv = sys.argv[1:] if argv is None else list(argv)
    description = "Measures compiled training steps and attacks."
    flags = cli.parse(runner.Flags, argv, description=description)
    command = f"python -m gfa_jax.benchmark {shlex.join(argv)}".rstrip()
    print(tables.page(cli.run_or_fail(lambda: runner.run(flags, command))))


if __name__ == "__main__":
    main()
