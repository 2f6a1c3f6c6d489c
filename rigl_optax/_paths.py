"""Names the leaves of any pytree by strings like `Dense_0/kernel`."""

import collections
import functools
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rigl_optax._types import PyTree

KeyPath = tuple[Any, ...]

# Base classes of NNX variables and of Linen's annotated parameters.
_BOXES = {"Variable", "VariableState", "AxisMetadata"}


def is_box(node: Any) -> bool:
    """Returns whether a node is a variable of NNX or Linen around an array.

    Such a node adds a key `value` below its own. The node's class decides, so a field that happens
    to be called `value` is a key like any other.
    """
    kind: Any = type(node)
    return _is_box_type(kind)


@functools.cache
def _is_box_type(kind: type) -> bool:
    # By the names of the classes: the core does not import Flax.
    return any(
        base.__name__ in _BOXES and base.__module__.partition(".")[0] == "flax"
        for base in kind.__mro__
    )


def is_hole(node: Any) -> bool:
    """Returns whether a wrapper has put this node in place of a weight, or of a whole subtree."""
    return node is None or isinstance(node, optax.MaskedNode)


def leaves_with_path(
    tree: PyTree, is_leaf: Callable[[Any], bool] | None = None
) -> list[tuple[KeyPath, Any]]:
    """Returns the key paths and leaves of `tree`, in tree order.

    The key `value` that a variable adds is left out, so a tree with variables and the same tree of
    pure arrays have the same paths.

    Args:
      tree: Any pytree.
      is_leaf: As in `jax.tree.leaves`.
    """
    named = []

    def stop(node: Any) -> bool:
        return is_box(node) or (is_leaf is not None and is_leaf(node))

    for path, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=stop):
        if not is_box(node):
            named.append((path, node))
            continue
        for keys, child in split(node)[0]:
            is_value = keys == (jax.tree_util.GetAttrKey("value"),)
            for rest, leaf in leaves_with_path(child, is_leaf):
                named.append((path + (() if is_value and not rest else keys) + rest, leaf))
    return named


def split(node: Any) -> tuple[list[tuple[KeyPath, Any]], Any]:
    """Returns the children of a node with their keys, and the treedef that rebuilds the node."""
    return jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)


def path_string(path: KeyPath) -> str:
    """Joins the keys of a leaf with `/`; a bare array has the name `""`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def flatten_with_paths(
    tree: PyTree, is_leaf: Callable[[Any], bool] | None = None
) -> list[tuple[str, Any]]:
    """Returns the names and leaves of `tree`, in tree order.

    Args:
      tree: Any pytree.
      is_leaf: As in `jax.tree.leaves`.

    Raises:
      ValueError: If two leaves have the same name.
    """
    named = [(path_string(path), leaf) for path, leaf in leaves_with_path(tree, is_leaf)]
    counts = collections.Counter(name for name, _ in named)
    duplicates = [name for name, n in counts.items() if n > 1]
    if duplicates:
        raise ValueError(f"two leaves of the tree have the same path: {listing(duplicates)}")
    return named


def named_arrays(params: PyTree) -> list[tuple[str, Any]]:
    """Returns the names and leaves of parameters; Python's numbers become arrays, as in Optax.

    Raises:
      ValueError: If two leaves have the same name, or a leaf is not an array.
    """
    named = []
    for name, leaf in flatten_with_paths(params):
        if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
            named.append((name, leaf))
        elif isinstance(leaf, int | float | complex):
            named.append((name, jnp.asarray(leaf)))
        else:
            raise ValueError(
                f"params: {name!r} is no array, but {leaf!r}; give only what is trained, for an "
                "Equinox model eqx.filter(model, eqx.is_inexact_array)"
            )
    return named


def map_with_names(function: Callable[[str, Any], Any], tree: PyTree) -> PyTree:
    """Applies `function(name, leaf) -> leaf` to every leaf, and returns the tree of results."""
    leaves = [function(path_string(path), leaf) for path, leaf in leaves_with_path(tree)]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def listing(names: Sequence[str], limit: int = 40) -> str:
    """Lists `names` for an error message: at most `limit` of them, and how many more there are."""
    shown = ", ".join(repr(name) for name in list(names)[:limit])
    rest = len(names) - limit
    return shown + (f", and {rest} more" if rest > 0 else "") if names else "none"


def pattern_of_each(patterns: Collection[str], paths: Sequence[str], name: str) -> dict[str, str]:
    """Finds the pattern that matches each path; paths that none matches are left out.

    Args:
      patterns: Regular expressions, searched in the paths.
      paths: Of the sparse leaves.
      name: Of the argument, for errors.

    Raises:
      ValueError: If a pattern matches no path, or two match one.
    """
    regexes = {pattern: compile_pattern(pattern, name) for pattern in patterns}
    for pattern, regex in regexes.items():
        if not any(regex.search(path) for path in paths):
            raise ValueError(
                f"{name}: {pattern!r} matches no sparse leaf; sparse leaves are {listing(paths)}"
            )
    found = {}
    for path in paths:
        matching = [pattern for pattern, regex in regexes.items() if regex.search(path)]
        if len(matching) > 1:
            raise ValueError(f"{name}: {path!r} is matched by {' and '.join(map(repr, matching))}")
        if matching:
            found[path] = matching[0]
    return found


def compile_pattern(pattern: str, what: str) -> re.Pattern[str]:
    """Compiles a regular expression.

    Args:
      pattern: The regular expression.
      what: Name of the argument, for errors.

    Raises:
      ValueError: If it is not a regular expression; the message names the argument.
    """
    try:
        return re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(f"{what}: {pattern!r} is not a regular expression: {error}") from None
