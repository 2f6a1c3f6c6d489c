"""Combinations that are refused, since something in them would silently be wrong."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax

from rigl_optax import _paths
from rigl_optax._layout import Layout
from rigl_optax._state import SparseState
from rigl_optax._types import PyTree

# Wrappers of Optax behind which an optimizer may see some of the leaves only.
_PARTIAL = {"PartitionState", "MultiTransformState", "MaskedState"}


def check_params(params: PyTree) -> None:
    """Raises a ValueError if these are no parameters, but the state of an optimizer."""

    def is_wrong(node: Any) -> bool:
        return _is_state(node) or isinstance(node, optax.LookaheadParams)

    for path, node in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_wrong):
        where = _paths.path_string(path)
        if isinstance(node, optax.LookaheadParams):
            raise ValueError(
                f"params: LookaheadParams at {where!r}: lookahead does not work with sparse "
                "training. Inside, fast and slow weights would have masks of their own; around, "
                "it averages networks of different topologies"
            )
        if _is_state(node):
            raise ValueError(
                f"params: {type(node).__name__} at {where!r}, which is an optimizer's state; give "
                "the parameters"
            )


def check_inner_state(state: PyTree) -> None:
    """Raises a ValueError if an inner optimizer cannot work inside, as far as its state shows."""

    def is_wrong(node: Any) -> bool:
        return isinstance(node, SparseState | optax.contrib.SAMState)

    for node in jax.tree.leaves(state, is_leaf=is_wrong):
        if isinstance(node, SparseState):
            raise ValueError(
                "inner: is sparse already; two sparse methods around one optimizer rewire each "
                "other's weights. For several methods, one for each layer, use optax.partition "
                "around them"
            )
        if isinstance(node, optax.contrib.SAMState) and node.cache is not None:
            raise ValueError(
                "inner: contrib.sam takes turns between steps to adversarial weights and steps of "
                "the optimizer, and a rewiring would replace some of either; use opaque_mode=True"
            )


def check_frozen(
    update: Callable[..., tuple[PyTree, PyTree]], inner_state: PyTree, layout: Layout
) -> None:
    """Raises a ValueError if an optimizer ignores the gradient of a sparse leaf.

    Rewirings would go on taking weights out of such a layer, and those that grow in their place
    would stay at 0. It is looked for only where a wrapper may have left out leaves; it is not
    seen through control flow, as that of `optax.apply_if_finite`.

    Args:
      update: Of the inner optimizer.
      inner_state: From its `init`.
      layout: Of the parameters.
    """
    if not _has(inner_state, _PARTIAL):
        return
    weights = layout.treedef.unflatten(layout.leaves)
    try:
        closed = jax.make_jaxpr(update)(weights, inner_state, weights)
    except Exception:  # it wants more arguments, or other gradients: nothing can be seen
        return
    reached = _reached(closed.jaxpr, len(layout.leaves))
    frozen = [s.path for s in layout.sparse if not reached[s.position] >> s.position & 1]
    if frozen:
        raise ValueError(
            f"inner: {_paths.listing(frozen)} never learn, since their gradients are ignored "
            "(optax.freeze, set_to_zero, selective_transform); rewirings would take weights out "
            "of them all the same. Keep them dense by `dense` of the distribution, or freeze "
            "around: optax.partition({'train': rigl(...), 'frozen': optax.set_to_zero()}, labels)"
        )


def _reached(jaxpr: Any, number: int) -> list[int]:
    """For each update, which gradients can have an effect on it sooner or later, as bits.

    Args:
      jaxpr: Of `update(gradients, state, params)`.
      number: Of leaves of the parameters.
    """
    from jax.extend import core  # slow to import: it brings Pallas

    inputs = [1 << i for i in range(number)] + [0] * (len(jaxpr.invars) - number)
    while True:
        seen = dict(zip(jaxpr.invars, inputs, strict=True))

        def bits(variables: Sequence[Any], seen: dict[Any, int] = seen) -> int:
            found = 0
            for variable in variables:
                if isinstance(variable, core.Var):
                    found |= seen.get(variable, 0)
            return found

        for equation in jaxpr.eqns:
            reached = bits(equation.invars)
            seen |= dict.fromkeys(equation.outvars, reached)
        outputs = [bits([variable]) for variable in jaxpr.outvars]
        state = outputs[number:]
        if len(state) != len(inputs) - 2 * number:  # the state changes its form
            return [-1] * number
        now = inputs[:number] + [a | b for a, b in zip(inputs[number:-number], state, strict=True)]
        now += inputs[-number:]
        if now == inputs:
            return outputs[:number]
        inputs = now


def check_params_given(params: PyTree | None) -> None:
    """Raises a ValueError if `update` was called without parameters."""
    if params is None:
        raise ValueError(
            "update needs params: call tx.update(grads, opt_state, params); weights are "
            "ranked, and inactive ones set to 0"
        )


def flat_masks(layout: Layout, masks: PyTree) -> list[Any]:
    """Returns the leaves of masks; raises a ValueError if they do not fit the parameters."""
    leaves = layout.treedef.flatten_up_to(masks)
    for path, mask, weight in zip(layout.paths, leaves, layout.leaves, strict=True):
        if mask.shape != weight.shape:
            raise ValueError(
                f"{path!r}: the state's mask has shape {mask.shape}, the parameter "
                f"{weight.shape}; the state belongs to other params"
            )
    return leaves


def flat_gradients(layout: Layout, gradients: PyTree) -> list[Any]:
    """Returns the leaves of gradients; raises a ValueError if they do not fit the parameters."""
    try:
        leaves = layout.treedef.flatten_up_to(gradients)
    except (ValueError, TypeError):
        found = [path for path, _ in _paths.flatten_with_paths(gradients)]
        missing = [path for path in layout.paths if path not in found]
        unknown = [path for path in found if path not in layout.paths]
        raise ValueError(
            "gradients do not fit params: "
            + (
                f"missing {_paths.listing(missing)}, unknown {_paths.listing(unknown)}"
                if missing or unknown
                else f"another kind of tree, {jax.tree.structure(gradients)} instead of "
                f"{layout.treedef}"
            )
        ) from None
    for path, gradient, weight in zip(layout.paths, leaves, layout.leaves, strict=True):
        if gradient is None:
            raise ValueError(f"gradients do not fit params: None for {path!r}")
        if not jax.tree_util.all_leaves([gradient]):
            raise ValueError(f"gradients do not fit params: a subtree in place of {path!r}")
        if np.shape(gradient) != np.shape(weight):
            raise ValueError(
                f"gradients do not fit params: the gradient of {path!r} has shape "
                f"{np.shape(gradient)}, the parameter {np.shape(weight)}"
            )
    return leaves


def _is_state(node: Any) -> bool:
    kind = type(node)
    is_optax = kind.__module__.partition(".")[0] == "optax" and kind.__name__.endswith("State")
    return isinstance(node, SparseState) or (is_optax and hasattr(node, "_fields"))


def _has(state: PyTree, names: set[str]) -> bool:
    def is_one(node: Any) -> bool:
        return type(node).__name__ in names

    return any(is_one(node) for node in jax.tree.leaves(state, is_leaf=is_one))
