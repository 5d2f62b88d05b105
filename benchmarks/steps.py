"""Training steps beside the same steps in PyTorch, in turns.

    python benchmarks/steps.py --out runs/benchmark-steps

See ``step_study``.
"""

import pathlib
import sys

# A script finds the modules of its own folder, not those of the project.
sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from benchmarks import step_study  # noqa: E402
from gfa_jax import cli  # noqa: E402


def main() -> None:
    """Parses flags, measures and prints the table."""
    flags = cli.parse(step_study.Flags, description="Times training steps beside PyTorch's.")
    print(cli.run_or_fail(lambda: step_study.run(flags)))


if __name__ == "__main__":
    main()
