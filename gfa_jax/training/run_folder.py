"""The folder of a run: whose it is, and that only one trainer is in it."""

import contextlib
import fcntl
import importlib.metadata
import pathlib
import platform
from collections.abc import Iterator

import jax

import gfa_jax
from gfa_jax import config as config_lib
from gfa_jax import distributed, files
from gfa_jax.config import TrainConfig


class WorkdirMismatchError(ValueError):
    """The folder belongs to a run of another config."""


def versions() -> dict[str, str]:
    """Returns the versions and devices that a result depends on."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return {
        "gfa_jax": gfa_jax.__version__,
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in packages},
        "devices": (
            f"{jax.device_count()} x {jax.devices()[0].device_kind} ({jax.default_backend()})"
            f"{processes}"
        ),
    }


def claim(workdir: pathlib.Path, config: TrainConfig) -> None:
    """Writes ``config.json``, or checks that the folder's own is the same.

    Raises:
      WorkdirMismatchError: listing the fields that differ. Nothing is written.
    """
    path = workdir / "config.json"
    values = config_lib.to_dict(config)
    if path.exists():
        before = config_lib.to_dict(config_lib.read_saved(path))
        if changed := config_lib.differences(before, values):
            raise WorkdirMismatchError(
                f"workdir {str(workdir)!r} holds a run of another config:\n  "
                + "\n  ".join(changed)
                + "\nUse another workdir."
            )
        return
    files.write_json(path, {"config": values, "versions": versions()})


@contextlib.contextmanager
def only_trainer(workdir: pathlib.Path) -> Iterator[None]:
    """Keeps a second trainer out of the folder; the lock dies with its process, which is process 0.

    Raises:
      ValueError: where another one is there, on every process.
    """
    with contextlib.ExitStack() as stack:

        def lock() -> None:
            file = stack.enter_context((workdir / ".lock").open("w"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(f"another process trains in workdir {str(workdir)!r}.") from error

        distributed.on_primary(lock)
        yield
