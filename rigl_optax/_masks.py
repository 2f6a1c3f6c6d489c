"""Masks: draw them, check them, find them in an optimizer state, apply them."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rigl_optax import _blend, _explicit, _layout, _paths, _random, _selection, _structure
from rigl_optax._layout import Layout, SparseLeaf
from rigl_optax._state import SparseState

PyTree = Any


def random_masks(layout: Layout, seed: _random.Seed) -> list[jax.Array]:
    """A mask for each leaf, uniformly random with exactly the zeros the layout asks for.

    Each has its parameter's sharding and is made with it: never whole on one device.
    """
    shapes = tuple(tuple(leaf.shape) for leaf in layout.leaves)
    word = jnp.asarray(seed, jnp.uint32)
    draw = functools.partial(_draw_masks, shapes, tuple(layout.sparse))
    if any(isinstance(leaf, jax.core.Tracer) for leaf in layout.leaves):
        return [_explicit.like(m, leaf) for m, leaf in zip(draw(word), layout.leaves, strict=True)]
    return _compiled_draw(draw.args, _shardings(layout.leaves))(word)


def _draw_masks(
    shapes: tuple[tuple[int, ...], ...], sparse: tuple[SparseLeaf, ...], seed: jax.Array
) -> list[jax.Array]:
    masks = [jnp.ones(shape, bool) for shape in shapes]
    if not sparse:
        return masks
    packing = _layout.packing(sparse)
    scores = _random.random_scores(
        seed, _random.Purpose.INITIAL_MASK, [s.position for s in sparse], packing
    )
    zeros = np.repeat(np.asarray([s.zeros for s in sparse], np.int32), packing.layers)
    k = packing.per_row(jnp.asarray(packing.sizes() - zeros))
    chosen = _selection.top_k(scores, packing.rows, k)
    for s, mask in zip(sparse, packing.unpack(chosen), strict=True):
        masks[s.position] = s.expand(mask)
    return masks


@functools.lru_cache(maxsize=64)
def _compiled_draw(args: tuple[Any, ...], shardings: tuple[Any, ...]) -> Callable:
    """Compiled once for the same layout: only the seed differs between runs."""
    return jax.jit(functools.partial(_draw_masks, *args), out_shardings=list(shardings))


def copied_masks(layout: Layout, initial_masks: PyTree) -> list[jax.Array]:
    """Copies of the user's masks, checked against params.

    Raises:
      ValueError: If the trees differ, a shape differs, a mask is not boolean, a dense leaf's
        mask has a False, or a mask does not fit its structure.
    """
    given = dict(_paths.flatten_with_paths(initial_masks))
    paths = layout.paths
    missing = [path for path in paths if path not in given]
    extra = [path for path in given if path not in paths]
    if missing or extra:
        raise ValueError(
            f"initial_masks: must have the tree structure of params; missing "
            f"{_paths.listing(missing)}, unknown {_paths.listing(extra)}"
        )
    sparse = {s.path: s for s in layout.sparse}
    for path, leaf in zip(paths, layout.leaves, strict=True):
        mask = given[path] if hasattr(given[path], "dtype") else np.asarray(given[path])
        if mask.dtype != np.bool_:
            raise ValueError(f"initial_masks: {path!r} has dtype {mask.dtype}, must be bool")
        if tuple(mask.shape) != tuple(leaf.shape):
            raise ValueError(
                f"initial_masks: {path!r} has shape {tuple(mask.shape)}, "
                f"its parameter {tuple(leaf.shape)}"
            )
        if isinstance(mask, jax.core.Tracer):
            continue
        if path not in sparse and not np.all(np.asarray(mask)):
            raise ValueError(
                f"initial_masks: {path!r} has inactive weights, but the distribution keeps it "
                f"dense; sparse leaves are {_paths.listing(sorted(sparse))}"
            )
        if path in sparse and mask.size and not np.any(np.asarray(mask)):
            raise ValueError(f"initial_masks: nothing is active in {path!r}")
        if path in sparse:
            layers = np.asarray(mask) if sparse[path].stacked else np.asarray(mask)[None]
            with jax.ensure_compile_time_eval():  # `init` may be traced; the mask is not
                wrong = {sparse[path].structure.misfit(layer) for layer in layers} - {""}
            if wrong:
                raise ValueError(
                    f"initial_masks: {path!r} does not fit {sparse[path].structure}: {wrong.pop()}"
                )
    masks = [jnp.array(given[path], copy=True) for path in paths]
    if any(isinstance(leaf, jax.core.Tracer) for leaf in layout.leaves):
        return [_explicit.like(m, leaf) for m, leaf in zip(masks, layout.leaves, strict=True)]
    return [
        mask
        if sharding is None or isinstance(mask, jax.core.Tracer)
        else jax.device_put(mask, sharding)
        for mask, sharding in zip(masks, _shardings(layout.leaves), strict=True)
    ]


def counted(layout: Layout, initial_masks: PyTree) -> Layout:
    """The layout with the zeros of the user's masks: of the sparsest layer, or part, of each leaf.

    None where a mask is traced.
    """
    given = dict(_paths.flatten_with_paths(initial_masks))

    def zeros(leaf: SparseLeaf) -> int | None:
        if isinstance(given[leaf.path], jax.core.Tracer):
            return None
        mask = np.asarray(given[leaf.path])
        if leaf.structure != _structure.UNSTRUCTURED:
            with jax.ensure_compile_time_eval():  # `init` may be traced; the mask is not
                mask = np.asarray(leaf.groups(jnp.asarray(mask)))
        return int((~mask.reshape(leaf.rankings, -1)).sum(1).max())

    return layout._replace(sparse=[leaf._replace(zeros=zeros(leaf)) for leaf in layout.sparse])


def get_masks(opt_state: PyTree) -> PyTree:
    """The masks, wherever in an optimizer state the sparse transformation's state sits.

    Args:
      opt_state: State of a transformation, or of a chain, MultiSteps, inject_hyperparams,
        partition, `nnx.Optimizer`, ... around one or several of ours.

    Returns:
      A tree with the structure of params: bool arrays of the parameters' shapes. Several
      states (`optax.partition`, `optax.masked`) are merged; a leaf that none of them
      covers is dense, and as its shape is unknown here, its mask is a scalar True.

    Raises:
      ValueError: If there is no such state, or two cover the same leaf.

    Example:
      >>> import optax, rigl_optax
      >>> params = {"kernel": jnp.ones((4, 5)), "bias": jnp.ones(5)}
      >>> tx = rigl_optax.rigl(optax.sgd(0.1), sparsity=0.5, end=1_000)
      >>> int(get_masks(tx.init(params))["kernel"].sum())
      10
    """
    is_ours = lambda node: isinstance(node, SparseState)  # noqa: E731
    states = [s for s in jax.tree.leaves(opt_state, is_leaf=is_ours) if is_ours(s)]
    if not states:
        found = sorted({type(leaf).__name__ for leaf in jax.tree.leaves(opt_state)})
        raise ValueError(
            f"no SparseState in the optimizer state ({type(opt_state).__name__} with leaves of "
            f"type {_paths.listing(found)}): was the optimizer wrapped?"
        )

    def is_leaf(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    def merge(path: _paths.KeyPath, *masks: Any) -> Any:
        covering = [m for m in masks if not is_leaf(m)]
        if len(covering) > 1:
            raise ValueError(f"two SparseStates cover {_paths.path_string(path)!r}")
        return covering[0] if covering else jnp.ones((), bool)

    trees = [state.masks for state in states]
    return jax.tree_util.tree_map_with_path(merge, *trees, is_leaf=is_leaf)


def apply_masks(params: PyTree, opt_state: PyTree) -> PyTree:
    """`params` with every inactive weight exactly 0.

    Use it once after `init`, so that the first forward pass is sparse already, and on
    averages of the weights before they are evaluated or exported. Leaves are matched by
    path, so pure trees and trees of NNX Variables both work.

    Args:
      params: Parameters, or anything of their structure, as an average of them.
      opt_state: Whatever `get_masks` takes.

    Returns:
      A tree of the structure, shapes and dtypes of `params`.

    Raises:
      ValueError: If there are no masks, or they belong to other parameters.

    Example:
      >>> import optax, rigl_optax
      >>> params = {"kernel": jnp.ones((4, 5)), "bias": jnp.ones(5)}
      >>> tx = rigl_optax.rigl(optax.sgd(0.1), sparsity=0.5, end=1_000)
      >>> float(apply_masks(params, tx.init(params))["kernel"].sum())
      10.0
    """
    found = _paths.flatten_with_paths(get_masks(opt_state))
    # A scalar stands for what nobody covers, a leaf or a whole subtree: dense.
    masks = {path: mask for path, mask in found if mask.ndim}
    named = dict(_paths.flatten_with_paths(params))
    unknown = [path for path in masks if path not in named]
    if unknown:
        raise ValueError(
            f"masks of {_paths.listing(unknown)} have no parameter; params have "
            f"{_paths.listing(list(named))}"
        )
    for path, mask in masks.items():
        if mask.shape != named[path].shape:
            raise ValueError(
                f"{path!r}: the mask has shape {mask.shape}, the parameter {named[path].shape}"
            )

    def apply(path: _paths.KeyPath, param: jax.Array) -> jax.Array:
        mask = masks.get(_paths.path_string(path))
        return param if mask is None else _blend.masked(mask, param)

    return jax.tree_util.tree_map_with_path(apply, params)


def _shardings(leaves: list[Any]) -> tuple[Any, ...]:
    """Where leaves or shapes are to be, None where nobody said: those stay free to move."""
    return tuple(
        leaf.sharding if getattr(leaf, "committed", hasattr(leaf, "sharding")) else None
        for leaf in leaves
    )
