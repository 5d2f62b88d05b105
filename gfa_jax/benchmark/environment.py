"""What times depend on besides the program."""

import os
import pathlib
import platform
from typing import Any

from gfa_jax.training import run_folder

_VARIABLES = ("XLA_FLAGS", "GLIBC_TUNABLES", "LD_PRELOAD")
"""Environment variables that change how fast programs run."""


def describe() -> dict[str, Any]:
    """Returns versions, devices, the processor, its threads, and what variables ask for."""
    return {
        **run_folder.versions(),
        "processor": cpu_name(),
        "threads": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1,
        **{name: os.environ[name] for name in _VARIABLES if os.environ.get(name)},
    }


def cpu_name() -> str:
    """Returns the processor's name."""
    path = pathlib.Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
