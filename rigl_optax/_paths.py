"""Names for the leaves of any pytree: strings like `Dense_0/kernel`."""

import collections
import re
from collections.abc import Sequence
from typing import Any

import jax

PyTree = Any
KeyPath = tuple[Any, ...]


def strip_variable(path: KeyPath) -> KeyPath:
    """Drops the trailing `value` key that an NNX Variable adds below its own.

    State trees with Variables and their pure counterparts name the same leaf by
    the same path then.
    """
    last = path[-1] if path else None
    if isinstance(last, jax.tree_util.GetAttrKey) and last.name == "value":
        return path[:-1]
    return path


def path_string(path: KeyPath) -> str:
    """The name of a leaf, `/` between its keys; a bare array has the name `""`."""
    return jax.tree_util.keystr(strip_variable(path), simple=True, separator="/")


def flatten_with_paths(tree: PyTree) -> list[tuple[str, Any]]:
    """Names and leaves of `tree`, in tree order.

    Raises:
      ValueError: If two leaves have the same name.
    """
    named = [(path_string(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]
    counts = collections.Counter(name for name, _ in named)
    duplicates = [name for name, n in counts.items() if n > 1]
    if duplicates:
        raise ValueError(f"two leaves of the tree have the same path: {listing(duplicates)}")
    return named


def listing(names: Sequence[str], limit: int = 40) -> str:
    """`names` for an error message, cut where nobody would read on."""
    shown = ", ".join(repr(name) for name in list(names)[:limit])
    rest = len(names) - limit
    return shown + (f", and {rest} more" if rest > 0 else "") if names else "none"


def compile_pattern(pattern: str, what: str) -> re.Pattern[str]:
    """A regular expression, or a clear error that says which argument is broken."""
    try:
        return re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(f"{what}: {pattern!r} is not a regular expression: {error}") from None
