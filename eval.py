"""Evaluates a trained run.

    python eval.py --workdir runs/digits_gfa --attacks fgsm,pgd,pgd-margin --epsilon 0.15

This file is intentionally short: the driver is ``gfa_jax.evaluation.evaluate``.
"""

import signal

from gfa_jax import cli, distributed
from gfa_jax.evaluation import evaluate, report


def main() -> None:
    """Parses flags, evaluates and prints the table."""
    description = "Attacks a run of train.py and writes results.json, records and report.html."
    flags = cli.parse(evaluate.EvalFlags, description=description)
    cli.run_or_fail(lambda: distributed.initialize(flags))
    # JAX's runtime takes SIGTERM for training; an evaluation may end anywhere.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    results = cli.run_or_fail(lambda: evaluate.evaluate(flags))
    if distributed.is_primary():
        report.print_table([results])


if __name__ == "__main__":
    main()
