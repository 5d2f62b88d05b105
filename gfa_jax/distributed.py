"""JAX's multi-process runtime: when it is started, and how processes agree.

Every process runs the same program on its own devices; ``jax.distributed`` connects them. Files are
written by process 0 alone, but for checkpoints, whose arrays every process writes. What one process
fails at ends all: see ``failures``.
"""

import dataclasses
import importlib.util
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from gfa_jax import _validate, failures

Value = TypeVar("Value")

MODES = ("auto", "on", "off")
_MAX_MESSAGE = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cluster:
    """Flags that say which processes work together."""

    distributed: str = "auto"
    """``on`` starts JAX's multi-process runtime, which finds the other processes on Cloud TPU,
    Slurm, Open MPI and Kubernetes; ``off`` never does; ``auto`` where several processes are
    evident."""
    coordinator_address: str | None = None
    """HOST:PORT of process 0, where nothing can be found out."""
    num_processes: int | None = None
    """Of all hosts together; with --coordinator_address."""
    process_id: int | None = None
    """Of this process, from 0; with --coordinator_address."""


def initialize(cluster: Cluster, environment: Mapping[str, str] = os.environ) -> None:
    """Starts the multi-process runtime where asked for; must run before JAX is used.

    From then on an error of one process ends all of them (``failures``), which a program that calls
    ``jax.distributed.initialize`` itself does without.

    Raises:
      ValueError: for flags that do not fit, or where the other processes cannot be found.
    """
    _validate.one_of(MODES, distributed=cluster.distributed)
    explicit: dict[str, Any] = {
        "coordinator_address": cluster.coordinator_address,
        "num_processes": cluster.num_processes,
        "process_id": cluster.process_id,
    }
    given = {name: value for name, value in explicit.items() if value is not None}
    if given and len(given) < len(explicit):
        missing = ", ".join(f"--{name}" for name in explicit if name not in given)
        raise ValueError(
            f"{', '.join(f'{n}={v!r}' for n, v in given.items())} needs {missing} too."
        )
    if given and cluster.distributed == "off":
        raise ValueError("distributed='off' does not go with --coordinator_address.")
    if given:
        _check_explicit(cluster)
    if not given and (
        cluster.distributed == "off"
        or (cluster.distributed == "auto" and not several_processes(environment))
    ):
        return
    try:
        jax.distributed.initialize(**given)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"the multi-process runtime did not start: {error} Give --coordinator_address, "
            "--num_processes and --process_id, or --distributed=off for one process."
        ) from error
    failures.watch()


def _check_explicit(cluster: Cluster) -> None:
    host, colon, port = str(cluster.coordinator_address).rpartition(":")
    if not (host and colon and port.isdecimal() and 0 < int(port) < 2**16):
        raise ValueError(
            f"coordinator_address={cluster.coordinator_address!r} must be HOST:PORT, such as "
            "10.0.0.1:1234."
        )
    _validate.positive_integer(num_processes=cluster.num_processes)
    if not 0 <= int(cluster.process_id or 0) < int(cluster.num_processes or 1):
        raise ValueError(
            f"process_id={cluster.process_id} must lie in [0, num_processes) = "
            f"[0, {cluster.num_processes})."
        )


def several_processes(environment: Mapping[str, str]) -> bool:
    """Whether the environment says that this process is one of several, or on a Cloud TPU.

    Args:
      environment: such as ``os.environ``. Looked at: JAX's own variable, a Slurm step, Open MPI,
        and the workers of Cloud TPU (GKE names them; elsewhere a TPU device and its library are the
        sign).
    """
    if environment.get("JAX_COORDINATOR_ADDRESS") or environment.get(
        "MEGASCALE_COORDINATOR_ADDRESS"
    ):
        return True
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"):
        if environment.get(name, "").isdigit() and int(environment[name]) > 1:
            return True
    if "," in environment.get("TPU_WORKER_HOSTNAMES", ""):
        return True
    has_device = any(pathlib.Path(path).exists() for path in ("/dev/accel0", "/dev/vfio/0"))
    wants_tpu = environment.get("JAX_PLATFORMS", "tpu").split(",")[0] == "tpu"
    return has_device and wants_tpu and importlib.util.find_spec("libtpu") is not None


def is_primary() -> bool:
    """Whether this is process 0, which writes files and talks."""
    return jax.process_index() == 0


def on_primary(action: Callable[[], Value]) -> Value | None:
    """Runs an action on process 0; its failure is every process's.

    Without that, the others would wait for it at the next collective until a timeout.

    Returns:
      What the action returns; ``None`` on the other processes.

    Raises:
      ValueError: on the other processes, with the message of process 0's error; on process 0 the
        error itself.
    """
    if jax.process_count() == 1:
        return action()
    failure: Exception | None = None
    result: Value | None = None
    if is_primary():
        try:
            result = action()
        except Exception as error:
            failure = error
    message = np.zeros(_MAX_MESSAGE, np.uint8)
    if failure is not None:
        text = (str(failure) or type(failure).__name__).encode()[:_MAX_MESSAGE]
        message[: len(text)] = np.frombuffer(text, np.uint8)
    told = bytes(np.asarray(multihost_utils.broadcast_one_to_all(message))).rstrip(b"\0")
    if failure is not None:
        raise failure
    if told:
        raise ValueError(told.decode(errors="replace"))
    return result


def wait_for_all(name: str) -> None:
    """Returns when every process is here; the name is the same on all."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def any_process(flag: bool) -> bool:
    """Returns whether the flag is set on any process; all must call it."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))
