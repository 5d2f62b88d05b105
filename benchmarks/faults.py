"""Breaks training in many ways and says what was lost, how long recovery took, and what came out.

    python benchmarks/faults.py --out runs/faults

Every faulty run is resumed to its end and compared with one that nothing happened to, bit for bit.
Some ten minutes on 2 CPU cores. This file is intentionally short: see ``fault_study``.
"""

import pathlib
import sys

# A script finds the modules of its own folder, not those of the project.
sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from benchmarks import fault_study  # noqa: E402
from gfa_jax import cli  # noqa: E402


def main() -> None:
    """Parses flags, breaks runs and prints the table."""
    flags = cli.parse(fault_study.Flags, description="Breaks training and resumes it.")
    cli.run_or_fail(lambda: print(fault_study.table(fault_study.run(flags))))


if __name__ == "__main__":
    main()
