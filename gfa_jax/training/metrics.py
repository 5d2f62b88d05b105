"""Metrics as one JSON object per line."""

import json
import pathlib
from collections.abc import Mapping

from gfa_jax import files


def read(path: pathlib.Path) -> list[dict[str, float]]:
    """Returns the lines of a metrics file, without the unfinished last line that a crash leaves."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class MetricsWriter:
    """Appends lines to ``metrics.jsonl``.

    A run that resumes from step n first drops the lines after n: training repeats those steps and
    writes them again.
    """

    def __init__(self, path: pathlib.Path, *, resume_step: int) -> None:
        """Opens the file for appending after the lines up to ``resume_step``."""
        kept = [row for row in read(path) if row["step"] <= resume_step]
        files.write_bytes(path, "".join(json.dumps(row) + "\n" for row in kept).encode())
        self._file = path.open("a", buffering=1)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends one line with the step and the metrics."""
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
