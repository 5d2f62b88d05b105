"""Progress of long runs: time per step and ETA without compilation, evaluation and saving."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

import rich.console
import rich.progress

from gfa_jax import distributed


class Chrono:
    """A stopwatch of useful work.

    Attributes:
      seconds: of work so far, without pauses.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Starts at zero, running.

        Args:
          clock: gives seconds. The default is monotonic: a change of the system time does no harm.
        """
        self._clock = clock
        self._before = 0.0
        self._started: float | None = clock()

    @property
    def seconds(self) -> float:
        """Seconds of work so far."""
        return self._before + (0.0 if self._started is None else self._clock() - self._started)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Does not count the time inside the block. Pauses do not nest."""
        self._before, self._started = self.seconds, None
        try:
            yield
        finally:
            self._started = self._clock()


def format_seconds(seconds: float) -> str:
    """Returns ``1:02:03`` or ``2:03``."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


class Progress:
    """A live bar on a terminal; elsewhere a line every few seconds. Process 0 alone shows it."""

    def __init__(
        self,
        label: str,
        total: int,
        done: int = 0,
        *,
        console: rich.console.Console | None = None,
        line_every: float = 10.0,
    ) -> None:
        """Shows ``label`` and counts from ``done`` to ``total``.

        Args:
          label: what is running.
          total: of the units that ``update`` counts.
          done: where a resumed run starts.
          console: where to print; standard error by default, so that results on standard output
            stay clean.
          line_every: seconds between lines where there is no terminal.
        """
        silent = not distributed.is_primary()
        self.console = console or rich.console.Console(
            file=sys.stderr, highlight=False, quiet=silent
        )
        self._label, self._total, self._first = label, total, done
        self._line_every, self._last_line = line_every, time.monotonic()
        self.chrono = Chrono()
        self._bar: rich.progress.Progress | None = None
        if self.console.is_terminal and not silent:
            columns = (
                "{task.description}",
                rich.progress.BarColumn(),
                "{task.completed}/{task.total}",
                "{task.fields[note]}",
            )
            self._bar = rich.progress.Progress(*columns, console=self.console, transient=True)
            self._bar.start()
            self._task = self._bar.add_task(label, total=total, completed=done, note="")

    def update(self, done: int, note: str = "") -> None:
        """Shows that ``done`` of ``total`` units are finished, with a short note."""
        rate = (done - self._first) / self.chrono.seconds if self.chrono.seconds > 0 else 0.0
        eta = f"ETA {format_seconds((self._total - done) / rate)}" if rate > 0 else "ETA ?"
        text = f"{eta}  {note}"
        if self._bar is not None:
            self._bar.update(self._task, completed=done, note=text)
        elif time.monotonic() - self._last_line >= self._line_every or done == self._total:
            self._last_line = time.monotonic()
            self.console.print(
                f"{self._label} {done}/{self._total}  {text}", markup=False, soft_wrap=True
            )

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        self.console.print(text, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Removes the bar."""
        if self._bar is not None:
            self._bar.stop()
