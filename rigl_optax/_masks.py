"""Draws masks, checks them, finds them in an optimizer state, and applies them."""

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rigl_optax import _layout, _paths, _structures
from rigl_optax._layout import Layout, SparseLeaf
from rigl_optax._ranking import _random, _top_k
from rigl_optax._state import SparseState
from rigl_optax._types import PyTree, Seed
from rigl_optax._xla import _blend, _sharding


def random_masks(layout: Layout, seed: Seed) -> list[jax.Array]:
    """Draws a uniformly random mask for each leaf, with exactly the zeros of the layout.

    A mask is made with the sharding of its parameter, so it is never whole on one device.
    """
    shapes = tuple(tuple(leaf.shape) for leaf in layout.leaves)
    # Arrays, so that another seed does not compile the draw again.
    positions = [s.position for s in layout.sparse]
    keys = jax.tree.map(jnp.asarray, _random.keys(seed, _random.Purpose.INITIAL_MASK, positions))
    # What follows from constants alone, the compiler copies for each use, and shards no copy.
    keys = jax.lax.optimization_barrier(keys)
    draw = functools.partial(_draw_masks, shapes, tuple(layout.sparse))
    if any(isinstance(leaf, jax.core.Tracer) for leaf in layout.leaves):
        return [_sharding.like(m, leaf) for m, leaf in zip(draw(keys), layout.leaves, strict=True)]
    return _compiled_draw(draw.args, _shardings(layout.leaves))(keys)


def _draw_masks(
    shapes: tuple[tuple[int, ...], ...], sparse: tuple[SparseLeaf, ...], keys: _random.Keys
) -> list[jax.Array]:
    masks = [jnp.ones(shape, bool) for shape in shapes]
    if not sparse:
        return masks
    packing = _layout.packing(sparse)
    scores = _random.draw(keys, packing)
    zeros = np.repeat(np.asarray([s.zeros for s in sparse], np.int32), packing.rankings_per_leaf)
    k = packing.per_row(jnp.asarray(packing.sizes() - zeros))
    chosen = _top_k.top_k(scores, packing.ranking_ids, k)
    for s, mask, score in zip(sparse, packing.unpack(chosen), packing.unpack(scores), strict=True):
        is_square = s.structure.transposable and s.zeros != 0
        masks[s.position] = s.expand(s.choose(score) if is_square else mask)
    return masks


@functools.lru_cache(maxsize=64)
def _compiled_draw(args: tuple[Any, ...], shardings: tuple[Any, ...]) -> Callable:
    """Compiles the draw once for each layout: only the seed differs between runs."""
    return jax.jit(functools.partial(_draw_masks, *args), out_shardings=list(shardings))


def copied_masks(layout: Layout, initial_masks: PyTree) -> list[jax.Array]:
    """Checks the user's masks against params, and copies them.

    Returns:
      A bool array for each leaf, with the sharding of its parameter.

    Raises:
      ValueError: If the trees differ, a shape differs, a mask is not boolean, a dense leaf's
        mask has a False, or a mask does not fit its structure.
    """
    given = of_params(initial_masks, layout.paths, layout.leaves, "initial_masks")
    paths = layout.paths
    sparse = {s.path: s for s in layout.sparse}
    for path in paths:
        mask = given[path]
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
            with jax.ensure_compile_time_eval():  # `init` may be traced; the mask is not
                wrong = sparse[path].misfit(np.asarray(mask))
                if wrong and sparse[path].fits_as_stack(np.asarray(mask)):
                    wrong += (
                        "; each slice along its first axis fits: if that counts layers, pass a "
                        "distribution that says so, as erk(0.9, stacked=(pattern,))"
                    )
            if wrong:
                raise ValueError(
                    f"initial_masks: {path!r} does not fit {sparse[path].structure}: {wrong}"
                )
    masks = [jnp.array(given[path], copy=True) for path in paths]
    if any(isinstance(leaf, jax.core.Tracer) for leaf in layout.leaves):
        return [_sharding.like(m, leaf) for m, leaf in zip(masks, layout.leaves, strict=True)]
    return [
        mask
        if sharding is None or isinstance(mask, jax.core.Tracer)
        else jax.device_put(mask, sharding)
        for mask, sharding in zip(masks, _shardings(layout.leaves), strict=True)
    ]


def warn_of_stacks(layout: Layout, initial_masks: PyTree) -> None:
    """Warns of masks that look like those of stacked layers, if no distribution says so."""
    given = over_paths(initial_masks, layout.paths, "initial_masks", allow_missing=True)
    suspects = []
    for leaf in layout.sparse:
        mask = given[leaf.path]
        if mask is None or isinstance(mask, jax.core.Tracer):
            continue
        if len(leaf.shape) < 3 or leaf.shape[0] < 2:
            continue
        slices = np.asarray(mask).reshape(leaf.shape[0], -1)
        # Equal numbers in all slices, but not the same weights: so drawn, or trained, as layers.
        is_even = np.unique(slices.sum(1)).size == 1 and (slices != slices[0]).any()
        if is_even and leaf.structure == _structures.UNSTRUCTURED:
            suspects.append(f"{leaf.path} ({slices.shape[0]} of {int(slices[0].sum())})")
    if suspects:
        warnings.warn(
            "initial_masks: the slices along the first axis have equal numbers of active weights "
            f"in {', '.join(suspects)}. If that axis counts layers, weights would move between "
            "them: with sparsity=None a leaf is one layer. Pass a distribution too, such as "
            "erk(0.9, stacked=(pattern,)), or without `stacked` if these are no layers",
            stacklevel=3,
        )


def counted(layout: Layout, initial_masks: PyTree) -> Layout:
    """Returns the layout with the zeros of the user's masks.

    The zeros of a leaf are those of its sparsest ranking; None if its mask is traced.
    """
    given = of_params(initial_masks, layout.paths, layout.leaves, "initial_masks")

    def zeros(leaf: SparseLeaf) -> int | None:
        if isinstance(given[leaf.path], jax.core.Tracer):
            return None
        mask = np.asarray(given[leaf.path])
        if leaf.structure != _structures.UNSTRUCTURED:
            with jax.ensure_compile_time_eval():  # `init` may be traced; the mask is not
                mask = np.asarray(leaf.groups(jnp.asarray(mask)))
        return int((~mask.reshape(leaf.rankings, -1)).sum(1).max())

    return layout._replace(sparse=[leaf._replace(zeros=zeros(leaf)) for leaf in layout.sparse])


def of_params(
    masks: PyTree,
    paths: Sequence[str],
    leaves: Sequence[Any],
    name: str = "masks",
    *,
    allow_missing: bool = False,
) -> dict[str, Any]:
    """Finds the mask of each parameter.

    Args:
      masks: A tree of masks like params, a tree of another kind with the same paths, or a dict of
        paths. A scalar True, `optax.MaskedNode()` or None stands for a dense leaf, or for a
        subtree of dense leaves.
      paths: Paths of the parameters.
      leaves: The parameters, or their shapes.
      name: Name of the argument, for errors.
      allow_missing: Whether parameters without a mask count as dense.

    Returns:
      `{path: mask}`, bool arrays of the parameters' shapes; all True for dense parameters.

    Raises:
      ValueError: If a mask is missing, belongs to no parameter, has another shape than its
        parameter, or is not boolean.
    """
    mask_of = _checked(masks, paths, leaves, name, allow_missing=allow_missing)
    return {
        path: np.broadcast_to(np.True_, np.shape(leaf)) if mask_of[path] is None else mask_of[path]
        for path, leaf in zip(paths, leaves, strict=True)
    }


def _checked(
    masks: PyTree, paths: Sequence[str], leaves: Sequence[Any], name: str, *, allow_missing: bool
) -> dict[str, Any]:
    """Does what `of_params` does, but returns None for dense parameters."""
    mask_of = over_paths(masks, paths, name, allow_missing=allow_missing)
    for path, leaf in zip(paths, leaves, strict=True):
        mask, shape = mask_of[path], np.shape(leaf)
        if mask is None:
            continue
        if mask.dtype != np.bool_:
            raise ValueError(f"{name}: {path!r} has dtype {mask.dtype}, must be bool")
        if tuple(mask.shape) != shape:
            raise ValueError(
                f"{name} do not fit params: {path!r} has a mask of shape {tuple(mask.shape)}, the "
                f"parameter has {shape}"
            )
    return mask_of


def over_paths(
    masks: PyTree, paths: Sequence[str], name: str = "masks", *, allow_missing: bool = False
) -> dict[str, Any]:
    """Finds the mask of each path, of any shape; None for dense ones. See `of_params`.

    Raises:
      ValueError: If a mask is missing, or belongs to none of the paths.
    """
    given, dense = {}, set()
    for path, mask in _paths.flatten_with_paths(masks, is_leaf=_paths.is_hole):
        if _paths.is_hole(mask):
            dense.add(path)
            continue
        mask = mask if hasattr(mask, "dtype") else np.asarray(mask)
        if not mask.ndim and mask.dtype == np.bool_:
            if not isinstance(mask, jax.core.Tracer) and not mask:
                raise ValueError(f"{name}: {path!r} is False; a scalar stands for dense leaves")
            dense.add(path)
        else:
            given[path] = mask

    def covering(path: str) -> str | None:
        """Returns the path of the hole that stands for this leaf, or for a subtree around it."""
        ends = [i for i, letter in enumerate(path) if letter == "/"]
        return next((p for p in ("", *(path[:i] for i in ends), path) if p in dense), None)

    cover = {path: covering(path) for path in paths if path not in given}
    missing = [path for path, hole in cover.items() if hole is None]
    extra = [path for path in given if path not in set(paths)]
    if extra or (missing and not allow_missing):
        wrong = [
            f"{_paths.listing(names)} {'has' if len(names) == 1 else 'have'} no {what}"
            for names, what in ((missing, "mask"), (extra, "parameter"))
            if names and not (allow_missing and what == "mask")
        ]
        raise ValueError(
            f"{name} do not fit params: {'; '.join(wrong)}; params have "
            f"{_paths.listing(list(paths))}"
        )
    return {path: given.get(path) for path in paths}


def get_masks(opt_state: PyTree, params: PyTree | None = None) -> PyTree:
    """Finds the masks in an optimizer state, wherever the state of a sparse transformation sits.

    Args:
      opt_state: State of a sparse transformation, or of a chain, MultiSteps, inject_hyperparams,
        partition, `nnx.Optimizer`, ... around one or several of them.
      params: Parameters, or their shapes. Needed only if a wrapper (`optax.partition`,
        `optax.masked`) gives the sparse transformation a part of them, for the shapes of the
        others.

    Returns:
      A tree with the structure of params: bool arrays of the parameters' shapes. The masks of
      several states (`optax.partition`, `optax.masked`) are merged; a leaf that none of them
      covers is dense, all True. Without `params` its shape is unknown, and its mask is a scalar
      True; if a whole subtree is left out, one scalar stands for it. Every function that takes
      masks takes such scalars too.

    Raises:
      ValueError: If there is no such state, two states cover the same leaf, or masks do not fit
        `params`.

    Examples:
      >>> import optax, rigl_optax
      >>> params = {"kernel": jnp.ones((4, 5)), "bias": jnp.ones(5)}
      >>> tx = rigl_optax.rigl(optax.sgd(0.1), sparsity=0.5, end=1_000)
      >>> int(get_masks(tx.init(params))["kernel"].sum())
      10
    """
    states = _states(opt_state)
    if not states:
        raise ValueError(_not_found(opt_state))
    merged = _merged((), [state.masks for state in states])
    if params is None:
        return merged
    named = _paths.flatten_with_paths(params)
    paths, leaves = [path for path, _ in named], [leaf for _, leaf in named]
    mask_of = _checked(merged, paths, leaves, "masks", allow_missing=False)
    # Masks of dense leaves are made where their parameters are; a tracer's placement is unknown.
    shardings: Sequence[Any] = [None] * len(leaves)
    if not any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        shardings = _shardings(leaves)
    masks = [
        jnp.ones(np.shape(leaf), bool, device=sharding) if mask_of[path] is None else mask_of[path]
        for path, leaf, sharding in zip(paths, leaves, shardings, strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(params), masks)


def _states(opt_state: PyTree) -> list[SparseState]:
    is_ours = lambda node: isinstance(node, SparseState)  # noqa: E731
    return [s for s in jax.tree.leaves(opt_state, is_leaf=is_ours) if is_ours(s)]


def _not_found(opt_state: PyTree) -> str:
    """Writes the error message for a state without a `SparseState`."""
    # A checkpoint that is restored without a target, and NNX, turn the NamedTuple into a mapping.
    fields = {"masks", "inner_state", "rewirings"}

    def was_ours(node: Any) -> bool:
        return isinstance(node, Mapping) and fields <= set(node)

    nodes = jax.tree.leaves(opt_state, is_leaf=was_ours)
    if any(was_ours(node) for node in nodes):
        return (
            "no SparseState in the optimizer state, but a mapping with its fields: it was restored "
            "without a target, or split by NNX; restore it into tx.init(params), or take "
            "optimizer.opt_state of an nnx.Optimizer"
        )
    kinds = sorted({type(leaf).__name__ for leaf in nodes})
    return (
        f"no SparseState in the optimizer state ({type(opt_state).__name__} with leaves of "
        f"type {_paths.listing(kinds)}): was the optimizer wrapped?"
    )


def _merged(path: _paths.KeyPath, trees: Sequence[Any]) -> Any:
    """Merges trees of masks, each with holes where others have masks.

    A hole in all of them becomes a scalar True.
    """
    trees = [tree for tree in trees if not isinstance(tree, optax.MaskedNode)]
    if not trees:
        return jnp.ones((), bool)
    if trees[0] is None:
        return None
    # One level at a time, since trees with holes have other structures below them.
    children, treedefs = zip(*(_paths.split(tree) for tree in trees), strict=True)
    if jax.tree_util.treedef_is_leaf(treedefs[0]):
        if len(trees) > 1:
            raise ValueError(f"two SparseStates cover {_paths.path_string(path)!r}")
        return trees[0]
    if any(other != treedefs[0] for other in treedefs):
        raise ValueError(
            f"the SparseStates have different trees at {_paths.path_string(path)!r}: do they "
            "belong to the same params?"
        )
    merged = [
        _merged(path + nodes[0][0], [node for _, node in nodes])
        for nodes in zip(*children, strict=True)
    ]
    return treedefs[0].unflatten(merged)


def apply_masks(params: PyTree, opt_state: PyTree) -> PyTree:
    """Returns `params` with every inactive weight set to 0.

    Use it once after `init`, so that the first forward pass is sparse already, and on
    averages of the weights before they are evaluated or exported. Leaves are matched by
    path, so pure trees and trees of NNX Variables both work.

    Args:
      params: Parameters, or a tree of their structure, such as an average of them.
      opt_state: An optimizer state, as `get_masks` takes it; or masks, such as those of
        `snip_masks` or of an export.

    Returns:
      A tree of the structure, shapes and dtypes of `params`.

    Raises:
      ValueError: If there are no masks, or they belong to other parameters.

    Examples:
      >>> import optax, rigl_optax
      >>> params = {"kernel": jnp.ones((4, 5)), "bias": jnp.ones(5)}
      >>> tx = rigl_optax.rigl(optax.sgd(0.1), sparsity=0.5, end=1_000)
      >>> float(apply_masks(params, tx.init(params))["kernel"].sum())
      10.0
    """
    masks = _given(params, opt_state)

    def apply(path: str, param: Any) -> Any:
        return param if masks[path] is None else _blend.masked(masks[path], param)

    return _paths.map_with_names(apply, params)


def check(params: PyTree, opt_state: PyTree) -> None:
    """Raises unless every inactive weight is exactly 0.

    Use it outside of jit, after the first steps and now and then: it finds what undoes sparsity
    from outside, such as a transformation that comes after the sparse one in a chain.

    Args:
      params: Parameters, or a tree of their structure, such as an average of them.
      opt_state: An optimizer state, as `get_masks` takes it; or masks.

    Raises:
      ValueError: If an inactive weight is not 0; the message says in which leaves, and how many.
        Also if there are no masks, or they belong to other parameters.
      TypeError: If params or masks are traced.

    Examples:
      >>> import optax, rigl_optax
      >>> params = {"kernel": jnp.ones((4, 5)), "bias": jnp.ones(5)}
      >>> opt_state = rigl_optax.rigl(optax.sgd(0.1), sparsity=0.5, end=1_000).init(params)
      >>> check(apply_masks(params, opt_state), opt_state)
      >>> check(params, opt_state)
      Traceback (most recent call last):
      ...
      ValueError: inactive weights that are not 0: 'kernel' (10 of 10). ...
    """
    masks = _given(params, opt_state)
    named = [(p, x) for p, x in _paths.flatten_with_paths(params) if masks[p] is not None]
    if any(isinstance(x, jax.core.Tracer) for pair in named for x in (pair[1], masks[pair[0]])):
        raise TypeError("check reads the numbers: call it outside of jit, grad and vmap")
    counts = {path: _alive(masks[path], leaf) for path, leaf in named}
    wrong = [f"{p!r} ({n} of {total})" for p, (n, total) in jax.device_get(counts).items() if n]
    if wrong:
        shown = ", ".join(wrong[:40]) + (f", and {len(wrong) - 40} more" if wrong[40:] else "")
        raise ValueError(
            f"inactive weights that are not 0: {shown}. Before the first step, call apply_masks. "
            "Later, a transformation that comes after the sparse one (in a chain, or around it as "
            "lookahead) scales or adds to its updates: put it inside"
        )


# Jitted, so that no array of the size of a weight is made, and scalars alone come to the host.
@jax.jit
def _alive(mask: jax.Array, leaf: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Counts the inactive weights that are not 0 (NaN is one of them), and all inactive ones."""
    return jnp.count_nonzero(~mask & (leaf != 0)), jnp.count_nonzero(~mask)


def _given(params: PyTree, opt_state: PyTree) -> dict[str, Any]:
    """Returns the mask of each leaf, from a state or from masks themselves; None if dense."""
    masks = opt_state
    leaves = jax.tree.leaves(opt_state)
    are_masks = leaves and all(
        isinstance(x, bool) or getattr(x, "dtype", None) == np.bool_ for x in leaves
    )
    if not are_masks or _states(opt_state):
        masks = get_masks(opt_state)
    named = _paths.flatten_with_paths(params)
    mask_of = _checked(
        masks, [p for p, _ in named], [x for _, x in named], "masks", allow_missing=True
    )
    return {path: None if mask is None else jnp.asarray(mask) for path, mask in mask_of.items()}


def _shardings(leaves: list[Any]) -> tuple[Any, ...]:
    """Returns the shardings of leaves or shapes; None for uncommitted arrays, which may move."""
    return tuple(
        leaf.sharding if getattr(leaf, "committed", hasattr(leaf, "sharding")) else None
        for leaf in leaves
    )
