"""Per-example results on disk, one file for each attack and chunk of examples.

Files are written atomically and never changed: an evaluation that was killed goes on with the
batches that are missing. A header names what the records belong to; records of another model,
threat or setting are refused instead of mixed in.
"""

import io
import json
import pathlib
import re
import shutil
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from gfa_jax import files


class RecordsMismatchError(ValueError):
    """The folder holds records of something else."""


class Records:
    """The records of one evaluation.

    Layout: ``header.json`` and ``<attack>/<first>-<last>.npz`` with one array ``[chunk]`` for each
    field of the result. Until all runs of an attack on a chunk are made, their batches lie in
    ``<attack>/<first>-<last>.parts/``.
    """

    def __init__(self, directory: pathlib.Path, header: Mapping[str, Any]) -> None:
        """Opens or creates the folder.

        Args:
          directory: of the records.
          header: JSON-ready: all that the results depend on.

        Raises:
          RecordsMismatchError: where the folder's header differs, naming the entries. Nothing is
            changed.
        """
        self._directory = directory
        path = directory / "header.json"
        header = json.loads(json.dumps(header))
        if not path.exists():
            files.write_json(path, header)
            return
        before = files.read_json(path)
        changed = [
            f"{key}: {before.get(key)!r} there, {header.get(key)!r} now"
            for key in {**before, **header}
            if before.get(key) != header.get(key)
        ]
        if changed:
            raise RecordsMismatchError(
                f"{str(directory)!r} holds records of another evaluation:\n  "
                + "\n  ".join(changed)
                + "\nUse another --out folder."
            )

    def _path(self, attack: str, first: int, last: int) -> pathlib.Path:
        return self._directory / re.sub(r"[^\w.=-]", "_", attack) / f"{first:07d}-{last:07d}.npz"

    def parts(self, attack: str, first: int, last: int) -> "Parts":
        """Returns where the parts of a record are kept until it is whole."""
        return Parts(self._path(attack, first, last).with_suffix(".parts"))

    def load(self, attack: str, first: int, last: int) -> dict[str, np.ndarray] | None:
        """Returns the record of examples ``first`` to ``last`` (inclusive), or ``None``.

        Nothing from disk is unpickled.

        Raises:
          ValueError: for a damaged file, naming it.
        """
        return _read(self._path(attack, first, last))

    def wait_for(
        self, attack: str, first: int, last: int, *, seconds: float = 60.0
    ) -> dict[str, np.ndarray]:
        """Returns a record that this or another process has saved.

        A network file system may show it late.

        Raises:
          FileNotFoundError: where it does not come within so many seconds.
        """
        deadline = time.monotonic() + seconds
        while (record := self.load(attack, first, last)) is None:
            if time.monotonic() > deadline:
                path = self._path(attack, first, last)
                raise FileNotFoundError(
                    f"the record {str(path)!r} of another process did not come: --out must lie on "
                    "a file system that all processes share."
                )
            time.sleep(0.1)
        return record

    def save(self, attack: str, first: int, last: int, record: Mapping[str, np.ndarray]) -> None:
        """Writes the record of a chunk, atomically; its parts are no longer needed."""
        _write(self._path(attack, first, last), record)
        self.parts(attack, first, last).remove()


class Parts:
    """The batches of a record that is not whole yet (an ``attacks.compaction.Memory``)."""

    def __init__(self, directory: pathlib.Path) -> None:
        """Uses a folder, which need not exist."""
        self._directory = directory

    def load(self, name: str) -> dict[str, np.ndarray] | None:
        """Returns the arrays of a part, or ``None``.

        Raises:
          ValueError: for a damaged file, naming it.
        """
        return _read(self._directory / f"{name}.npz")

    def save(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Writes a part, atomically."""
        _write(self._directory / f"{name}.npz", arrays)

    def remove(self) -> None:
        """Deletes all parts."""
        shutil.rmtree(self._directory, ignore_errors=True)


def _read(path: pathlib.Path) -> dict[str, np.ndarray] | None:
    if not path.exists():
        return None
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except Exception as error:
        # Not NumPy's own words, which advise to load it unsafely.
        raise ValueError(
            f"record {str(path)!r} is damaged; delete it to compute it again."
        ) from error


def _write(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **{name: np.asarray(value) for name, value in arrays.items()})  # type: ignore[arg-type]
    files.write_bytes(path, buffer.getvalue())
