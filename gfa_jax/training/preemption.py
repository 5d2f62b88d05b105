"""Requests to stop: SIGTERM, as schedulers send it before they take a machine, and Ctrl-C."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils

StopRequested = Callable[[int], str]
"""``step -> name of the signal to stop for, or ''``; every process must ask at every step."""


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequested]:
    """Collects SIGTERM and SIGINT instead of dying, so that the loop can save first.

    A SIGINT that follows either of them interrupts at once. With several processes, a signal to any
    of them stops all at the same step: JAX's runtime takes SIGTERM, and agrees on the step; there a
    second SIGINT interrupts.
    """
    if jax.process_count() > 1:
        with _handlers({signal.SIGINT: lambda: os.kill(os.getpid(), signal.SIGTERM)}):
            yield (
                lambda step: (
                    "SIGTERM" if multihost_utils.reached_preemption_sync_point(step) else ""
                )
            )
        return
    requests: list[str] = []

    def note(name: str) -> Callable[[], None]:
        return lambda: requests.append(name)

    with _handlers({number: note(number.name) for number in (signal.SIGTERM, signal.SIGINT)}):
        yield lambda step: requests[0] if requests else ""


@contextlib.contextmanager
def _handlers(actions: dict[signal.Signals, Callable[[], None]]) -> Iterator[None]:
    """Replaces signal handlers; a SIGINT after any of the signals interrupts."""
    received: list[int] = []

    def handle(number: int, frame: Any) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)
        actions[signal.Signals(number)]()

    try:
        previous = {number: signal.signal(number, handle) for number in actions}
    except ValueError:  # Not the main thread: signals are somebody else's.
        yield
        return
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
