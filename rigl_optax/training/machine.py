"""Describes the machine and the versions that a run was made with."""

import functools
import importlib.metadata
import os
import pathlib
import platform
from typing import Any

_PACKAGES = ("rigl_optax", "jax", "jaxlib", "optax", "flax", "numpy")


@functools.cache
def describe() -> dict[str, Any]:
    """Returns the processor, its cores, the system, and the versions of what computes the numbers.

    Other processors, or other versions of JAX, may round differently, so numbers can be compared to
    the last digit only where all of it is the same.
    """
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version()}
        | {name: _version(name) for name in _PACKAGES},
    }


def _processor() -> str:
    """Returns the name of the processor, as Linux knows it."""
    path = pathlib.Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
