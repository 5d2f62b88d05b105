"""Per-example results on disk, one file for each attack and chunk of examples.

Files are written atomically and never changed: an evaluation that was killed goes on with the
chunks that are missing. A header names what the records belong to; records of another model, threat
or setting are refused instead of mixed in.
"""

import io
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from gfa_jax import files


class RecordsMismatchError(ValueError):
    """The folder holds records of something else."""


class Records:
    """The records of one evaluation.

    Layout: ``header.json`` and ``<attack>/<first>-<last>.npz`` with one array ``[chunk]`` for each
    field of the result.
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

    def load(self, attack: str, first: int, last: int) -> dict[str, np.ndarray] | None:
        """Returns the record of examples ``first`` to ``last`` (inclusive), or ``None``.

        Nothing from disk is unpickled.

        Raises:
          ValueError: for a damaged file, naming it.
        """
        path = self._path(attack, first, last)
        if not path.exists():
            return None
        try:
            with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as stored:
                return {name: stored[name] for name in stored.files}
        except Exception as error:
            raise ValueError(
                f"record {str(path)!r} is damaged ({error}); delete it to compute it again."
            ) from error

    def save(self, attack: str, first: int, last: int, record: Mapping[str, np.ndarray]) -> None:
        """Writes the record of a chunk, atomically."""
        buffer = io.BytesIO()
        np.savez(buffer, **{name: np.asarray(value) for name, value in record.items()})  # type: ignore[arg-type]
        files.write_bytes(self._path(attack, first, last), buffer.getvalue())
