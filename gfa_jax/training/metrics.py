"""Metrics as one JSON object per line, and as TensorBoard events where asked for."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from gfa_jax import files
from gfa_jax.types import Array


def to_floats(metrics: Mapping[str, Array]) -> dict[str, float]:
    """Fetches scalars from the device."""
    return {name: float(value) for name, value in jax.device_get(metrics).items()}


def read(path: pathlib.Path) -> list[dict[str, float]]:
    """Returns the lines of a metrics file.

    An unfinished last line, as a crash leaves it, is dropped.

    Raises:
      ValueError: for any other damaged line, naming it.
    """
    if not path.exists():
        return []
    lines = path.read_text().splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            row["step"] + 0
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines):
                break
            raise ValueError(
                f"{str(path)!r} is damaged in line {number}: {line[:60]!r}."
            ) from error
        rows.append(row)
    return rows


class MetricsWriter:
    """Appends lines to ``metrics.jsonl``.

    A run that resumes from step n first drops the lines after n: training repeats those steps and
    writes them again.
    """

    def __init__(
        self, path: pathlib.Path, *, resume_step: int, tensorboard: pathlib.Path | None = None
    ) -> None:
        """Opens the file for appending after the lines up to ``resume_step``.

        Args:
          path: of the JSON lines.
          resume_step: the last step that stays.
          tensorboard: folder of TensorBoard events; ``None`` for none.

        Raises:
          ImportError: with a TensorBoard folder and without tensorboardX.
        """
        self._events: Any = None
        if tensorboard is not None:
            self._events = _summary_writer(tensorboard, purge_step=resume_step + 1)
        kept = [row for row in read(path) if row["step"] <= resume_step]
        files.write_bytes(path, "".join(json.dumps(row) + "\n" for row in kept).encode())
        self._file = path.open("a", buffering=1)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends one line with the step and the metrics."""
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        if self._events is not None:
            for name, value in metrics.items():
                self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
        if self._events is not None:
            self._events.close()


def _summary_writer(directory: pathlib.Path, *, purge_step: int) -> Any:
    try:
        import tensorboardX
    except ImportError as error:
        raise ImportError("TensorBoard events need: pip install 'gfa_jax[tensorboard]'.") from error
    return tensorboardX.SummaryWriter(str(directory), purge_step=purge_step)
