"""Starts from weights that were trained before: arrays of another tree, found by their names."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rigl_optax import _paths
from rigl_optax._distributions import DensePredicate, default_dense
from rigl_optax._types import PyTree


def start_from(
    params: PyTree,
    weights: PyTree,
    *,
    names: Mapping[str, str] | None = None,
    convert: Callable[[str, np.ndarray], Any] | None = None,
    keep: Sequence[str] = (),
) -> PyTree:
    r"""Returns parameters with the values of trained weights, each found by its name.

    Use it before `tx.init`, to sparsify a trained network: with `magnitude_masks`, or by any method
    that begins dense. `training.read_weights` reads workdirs, Orbax checkpoints and safetensors
    files; a Flax or NNX state is taken as it is.

    Args:
      params: Parameters, or their shapes: the tree that is wanted.
      weights: Any tree of arrays, such as a state of Flax or NNX, or a dict by name. What it has
        beyond params, such as an optimizer's state, is left out.
      names: `{pattern: name}`: a regular expression that matches the whole path of a parameter, and
        the name of its weights, in which `\1` stands for the first group, as in `re.sub`. The first
        pattern that matches counts; a parameter that none matches keeps its path as name.
      convert: `convert(path, array) -> array`, called for each of the arrays, as to transpose those
        of another framework.
      keep: Patterns, searched in paths, of parameters that keep their values, such as a new head.

    Returns:
      A tree like params, of their dtypes and shardings.

    Raises:
      ValueError: If weights are missing, have another shape, are no numbers, or are not finite; one
        error lists all of them. If a pattern matches no parameter, or a parameter to keep is only a
        shape.

    Examples:
      >>> params = {"Dense_0": {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)}}
      >>> torch = {"layers.0.weight": np.arange(6.0).reshape(3, 2), "layers.0.bias": np.ones(3)}
      >>> names = {r"Dense_(\d+)/kernel": r"layers.\1.weight", r"Dense_(\d+)/(.*)": r"layers.\1.\2"}
      >>> found = start_from(params, torch, names=names, convert=lambda path, x: x.T)
      >>> found["Dense_0"]["kernel"].tolist()
      [[0.0, 2.0, 4.0], [1.0, 3.0, 5.0]]
    """
    named = _paths.flatten_with_paths(params)
    paths = [path for path, _ in named]
    given = dict(_paths.flatten_with_paths(weights))
    name_of = _names(paths, names or {})
    kept = matching(paths, keep, "keep")
    problems, chosen = [], {}
    for path, leaf in named:
        name = name_of[path]
        if path in kept:
            if isinstance(leaf, jax.ShapeDtypeStruct):
                raise ValueError(f"keep: {path!r} is only a shape, it has no values to keep")
            chosen[path] = leaf
            continue
        label = repr(path) if name == path else f"{path!r} ({name!r})"
        if name not in given:
            problems.append(f"{label} is not there")
            continue
        array = given[name] if convert is None else convert(path, np.asarray(given[name]))
        if tuple(np.shape(array)) != tuple(leaf.shape):
            problems.append(f"{label} has shape {np.shape(array)}, not {tuple(leaf.shape)}")
        elif problem := _not_numbers(array):
            problems.append(f"{label} {problem}")
        else:
            chosen[path] = _placed(array, leaf)
    if problems:
        unused = [name for name in given if name not in name_of.values()]
        raise ValueError(
            f"{len(problems)} of {len(paths)} parameters do not come from the weights: "
            f"{'; '.join(problems)}. Weights that no parameter asks for: {_paths.listing(unused)}"
        )
    return _paths.map_with_names(lambda path, _: chosen[path], params)


def nonzero_masks(params: PyTree, dense: DensePredicate = default_dense) -> PyTree:
    """Returns masks of the weights that are not zero: those of a network that is sparse already.

    Use it to go on training a sparse network from a file: `static_sparse(inner, None,
    initial_masks=nonzero_masks(params))` keeps its masks, `rigl` goes on from them.

    Args:
      params: Parameters, any pytree of arrays.
      dense: As in `uniform`: says which leaves are dense, whatever is zero in them.

    Returns:
      A bool tree like params, for `initial_masks` of any method; all True for dense leaves.

    Raises:
      ValueError: If all weights of a leaf that is not dense are zero.

    Examples:
      >>> params = {"kernel": jnp.eye(3), "bias": jnp.zeros(3)}
      >>> masks = nonzero_masks(params)
      >>> int(masks["kernel"].sum()), int(masks["bias"].sum())
      (3, 3)
    """
    masks = {}
    for path, leaf in _paths.named_arrays(params):
        is_dense = dense(path, leaf)
        masks[path] = jnp.ones(leaf.shape, bool) if is_dense else jnp.asarray(leaf) != 0
        if not is_dense and leaf.size and not np.any(np.asarray(masks[path])):
            raise ValueError(f"params: all weights of {path!r} are zero")
    return _paths.map_with_names(lambda path, _: masks[path], params)


def _names(paths: Sequence[str], names: Mapping[str, str]) -> dict[str, str]:
    """Returns the name of the weights of each parameter."""
    patterns = {pattern: _paths.compile_pattern(pattern, "names") for pattern in names}
    found, used = {}, set()
    for path in paths:
        found[path] = path
        for pattern, regex in patterns.items():
            if match := regex.fullmatch(path):
                used.add(pattern)
                try:
                    found[path] = match.expand(names[pattern])
                except (re.error, IndexError) as error:
                    raise ValueError(f"names: {names[pattern]!r}: {error}") from None
                break
    if unused := [pattern for pattern in names if pattern not in used]:
        raise ValueError(
            f"names: {_paths.listing(unused)} match no parameter; they are {_paths.listing(paths)}"
        )
    return found


def matching(paths: Sequence[str], patterns: Sequence[str], name: str) -> set[str]:
    """Returns the paths in which one of the patterns is found.

    Raises:
      ValueError: If a pattern is found in none, or is no regular expression.
    """
    found = set()
    for pattern in patterns:
        regex = _paths.compile_pattern(pattern, name)
        matched = {path for path in paths if regex.search(path)}
        if not matched:
            raise ValueError(
                f"{name}: {pattern!r} matches no parameter; they are {_paths.listing(paths)}"
            )
        found |= matched
    return found


def _not_numbers(array: Any) -> str:
    """Says what is wrong with the values of an array; nothing if they are finite numbers."""
    dtype = jnp.result_type(array)
    if not jnp.issubdtype(dtype, jnp.number):
        return f"is of dtype {dtype}"
    if not bool(jnp.all(jnp.isfinite(jnp.asarray(array)))):
        return "is not finite"
    return ""


def _placed(array: Any, leaf: Any) -> jax.Array:
    value = jnp.asarray(array, leaf.dtype)
    sharding = getattr(leaf, "sharding", None)
    return value if sharding is None else jax.device_put(value, sharding)
