"""Python files of the user, run as modules."""

import importlib.machinery
import importlib.util
import pathlib
import sys
import types


def run_module(path: pathlib.Path, name: str) -> types.ModuleType:
    """Runs a Python file and returns it as a module, anew at every call.

    Args:
      path: of an existing file that ends in ``.py``.
      name: under which it is known while it runs, as dataclasses and pickling want.

    Raises:
      ValueError: for a file that is no Python file.
    """
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or not isinstance(spec.loader, importlib.machinery.SourceFileLoader):
        raise ValueError(f"{str(path)!r} is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        # Not exec_module: it takes compiled files of the same size and second for this one.
        code = spec.loader.source_to_code(path.read_bytes(), str(path))
        exec(code, module.__dict__)
    except BaseException:
        del sys.modules[name]
        raise
    return module
