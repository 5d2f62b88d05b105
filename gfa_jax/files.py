"""Writing files so that a reader never sees half of one."""

import json
import os
import pathlib
import tempfile
from typing import Any


def write_bytes(path: pathlib.Path, content: bytes) -> None:
    """Replaces a file atomically: after a crash there is the old content or the new, not a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes private files; results are as readable as any other file of the user.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        pathlib.Path(temporary).unlink(missing_ok=True)
        raise


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
      ValueError: for a damaged file, naming it.
    """
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is damaged: {error}.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{str(path)!r} is damaged: it holds no JSON object.")
    return value


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes indented JSON atomically.

    Raises:
      ValueError: for NaN and infinities, which are not JSON.
    """
    write_bytes(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def put_aside(path: pathlib.Path) -> pathlib.Path:
    """Renames a file or folder to ``NAME.old-1``, or the next number that is free.

    Returns:
      Where it lies now.

    Raises:
      FileNotFoundError: where there is none.
    """
    number = 1
    while (aside := path.with_name(f"{path.name}.old-{number}")).exists():
        number += 1
    path.rename(aside)
    return aside
