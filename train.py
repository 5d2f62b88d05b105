"""Trains a classifier.

    python train.py --config configs/digits_gfa.py --workdir runs/digits_gfa

This file is intentionally short: the loop is ``gfa_jax.training.loop``.
"""

import jax

from gfa_jax import cli, distributed
from gfa_jax.training import checkpoint, dry_run, guards, loop


def main() -> None:
    """Parses flags and trains."""
    flags = cli.parse_train()
    cli.run_or_fail(lambda: distributed.initialize(flags))
    if flags.compile_cache:
        jax.config.update("jax_compilation_cache_dir", flags.compile_cache)
    if flags.dry_run:
        text = cli.run_or_fail(lambda: dry_run.text(flags.config, dry_run.plan(flags.config)))
        if distributed.is_primary():
            print(text)
        return

    def train() -> None:
        try:
            loop.train_and_evaluate(
                flags.config,
                flags.workdir,
                stop_after=flags.stop_after,
                tensorboard=flags.tensorboard,
            )
        except checkpoint.SaveFailedError as error:
            # Threads of orbax still wait for the part of the save that failed.
            cli.fail_at_once(str(error))

    try:
        cli.run_or_fail(train)
    except guards.TrainingFailedError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
