"""A failure that one process of several meets ends all of them, at once and with its message.

Without that, the others would wait for it in a collective until the runtime's heartbeat kills them,
minutes later and without a word of the cause.
"""

import atexit
import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any

import jax

# The runtime's key-value store has no public name; orbax and JAX's own helpers take it from here.
from jax._src import distributed as _runtime

MENDABLE = (ValueError, OSError, ImportError)
"""Errors that a user can mend: their message says all, and no traceback is shown."""

_KEY = "gfa_jax/failure"
_LOOK_EVERY_SECONDS = 0.5
# The process that failed stays until the others have heard of it, for its death breaks their
# collectives; process 0 goes last, for it serves the message, and its death kills the others.
_STAY_SECONDS = 2.0

_watching = threading.Event()
_leaving = threading.Event()


class MetByAllError(RuntimeError):
    """An error that every process meets at the same step, so that none needs to be told."""


def is_mendable(error: BaseException) -> bool:
    """Whether the message of an error is all that a user needs (not with GFA_JAX_DEBUG set)."""
    return isinstance(error, MENDABLE) and not os.environ.get("GFA_JAX_DEBUG")


def watch() -> None:
    """Ends this process, with a message and exit code, once another one has failed.

    Does nothing where there is no other process.
    """
    # ``jax.process_count()`` would start the backend, and wait there for the other processes.
    if not jax.distributed.is_initialized() or (_runtime.global_state.num_processes or 1) == 1:
        return
    client, number = _runtime.global_state.client, _runtime.global_state.process_id

    def look() -> None:
        while not _leaving.wait(_LOOK_EVERY_SECONDS):
            if told := _read(client):
                code, _, text = told.partition(" ")
                _leaving.set()
                print(f"error: {text}", file=sys.stderr)
                _leave(int(code), 2 * _STAY_SECONDS if number == 0 else 0)

    thread = threading.Thread(target=look, name="failures", daemon=True)
    thread.start()
    _watching.set()

    def stop() -> None:
        _leaving.set()
        thread.join()

    # Before the runtime shuts down, which takes the client away.
    atexit.register(stop)


@contextlib.contextmanager
def felt_by_all() -> Iterator[None]:
    """Ends all processes where this one meets an exception; alone, or without ``watch``, it passes.

    Nothing else is run here before the end, such as ``finally`` blocks further out: they might wait
    for the others.
    """
    try:
        yield
    except MetByAllError:
        raise
    except (Exception, KeyboardInterrupt) as error:
        if _watching.is_set():
            _end_all(error)
        raise


def _end_all(error: BaseException) -> None:
    if _leaving.is_set():  # The failure of another one, whose message is being shown, broke this.
        threading.Event().wait()
    _leaving.set()
    if is_mendable(error):
        code = 2
        print(f"error: {error}", file=sys.stderr)
    else:
        code = 1
        traceback.print_exception(error)
    client: Any = _runtime.global_state.client
    number = _runtime.global_state.process_id
    kind = "" if is_mendable(error) else f"{type(error).__name__}: "
    with contextlib.suppress(Exception):  # Another one was first, or process 0 is gone.
        client.key_value_set(_KEY, f"{code} process {number}: {kind}{error}")
    _leave(code, 2 * _STAY_SECONDS if number == 0 else _STAY_SECONDS)


def _read(client: Any) -> str:
    """Returns what a failed process left; empty without."""
    try:
        return client.key_value_try_get(_KEY)
    except jax.errors.JaxRuntimeError:  # No such key, or process 0 is gone.
        return ""


def _leave(exit_code: int, after_seconds: float) -> None:
    time.sleep(after_seconds)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
