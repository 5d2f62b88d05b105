"""Trains and evaluates what a study has no records of yet, and writes its page.

    python -m gfa_jax.study --study configs/study/cifar10.py --data_dir DIR

A stopped one goes on where it stopped. Started again beside a running one, with the same OUT, it
shares the work.
"""

import shlex
import sys
from collections.abc import Sequence

from gfa_jax import cli
from gfa_jax.study import runner


def main(argv: Sequence[str] | None = None) -> None:
    """Parses flags, works through the study, and says where its page is."""
    argv = sys.argv[1:] if argv is None else list(argv)
    description = "Trains and evaluates the recipes of a study, and writes its page."
    flags = cli.parse(runner.Flags, argv, description=description)
    command = f"python -m gfa_jax.study {shlex.join(argv)}".rstrip()
    cli.run_or_fail(lambda: runner.run(flags, command))


if __name__ == "__main__":
    main()
