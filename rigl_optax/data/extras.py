"""Imports what only some datasets need, and says which extra of the package brings it."""

import functools
import importlib
from types import ModuleType


@functools.cache
def load(module: str, extra: str) -> ModuleType:
    """Imports a module, when it is first needed.

    Raises:
      ImportError: If something that it needs is not installed; the message names the extra.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as missing:
        raise ImportError(
            f"this dataset needs {missing.name}: pip install 'rigl-optax[{extra}]'"
        ) from None
