"""How the sparse kernels of a run are held: dense arrays with masks, or only their active blocks.

Everything that training does differently for the two is a method here, so that no other module asks
which of them a run has.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

import rigl_optax
from rigl_optax import Block, _paths, condensed

PyTree = Any
Predicate = Callable[[jax.Array], jax.Array]
PaddedBlocks = Callable[[], Mapping[str, tuple[Block, bool]]]
Rescale = Callable[[PyTree, PyTree], PyTree]
ChooseTopologies = Callable[[PyTree], dict[str, condensed.BlockTopology]]


class Entries(NamedTuple):
    """How much an entry of a mask stands for: a weight, or the weights of a block.

    Attributes:
      weights: int32: how many weights; of the shape of the mask, or a scalar for all entries.
      inputs: int32 vector, or a scalar: inputs of the layer along the mask's last axis but one.
      outputs: int32 vector, or a scalar: outputs of the layer along its last axis.
    """

    weights: np.ndarray
    inputs: np.ndarray
    outputs: np.ndarray


class Representation(Protocol):
    """Everything that depends on how sparse kernels are held; `state` is a `TrainState`.

    Attributes:
      has_rewiring_program: Whether rewirings are a compiled program of their own; otherwise one
        program does both kinds of step.
    """

    has_rewiring_program: bool

    def start(self, tx: Any, params: PyTree) -> tuple[PyTree, PyTree]:
        """Makes sparse parameters and the optimizer's state from freshly initialised ones."""

    def bind(self, params: PyTree, state: Any, probes: Any = None) -> PyTree:
        """Returns the parameters as the model multiplies by them."""

    def probes(self, state: Any) -> Any:
        """Returns zeros whose gradients are the scores of growth; None where gradients are those.

        They go into `bind`.
        """

    def update(
        self, tx: Any, grads: PyTree, scores: Any, state: Any, *, rewires: bool
    ) -> tuple[PyTree, PyTree]:
        """Returns new parameters and optimizer state.

        Args:
          tx: The optimizer.
          grads: Gradients of the parameters.
          scores: Gradients of the probes, or None.
          state: The state before the step.
          rewires: Whether the program is that of rewirings, if they have their own.
        """

    def grows_unseeing(
        self, grads: PyTree, scores: Any, state: Any, is_growing: Predicate
    ) -> jax.Array:
        """Counts this step, 1 or 0, if it grows weights and sees no gradient outside the masks.

        Args:
          grads: Gradients of the parameters.
          scores: Gradients of the probes, or None.
          state: The state before the step.
          is_growing: Tells of a step (int32 scalar) whether it grows weights by their gradient.
        """

    def kernels(self, state: Any) -> PyTree:
        """Returns the parameters of a state as the model multiplies by them."""

    def dense(self, state: Any) -> PyTree:
        """Returns the parameters as dense arrays, for files."""

    def masks(self, state: Any) -> PyTree:
        """Returns a bool tree like params: active weights, or blocks of kernels held as blocks."""

    def entries(self, state: Any) -> dict[str, Entries]:
        """Returns how much each entry of each of the `masks` stands for, by path."""

    def groups(self, state: Any, padded: PaddedBlocks) -> dict[str, int]:
        """Counts the active groups of each leaf, by path: a rewiring keeps their number.

        Args:
          state: The state.
          padded: Returns the layers whose blocks differ in size: `{path: (block, is stacked)}`.
        """

    def weight_masks(self, state: Any) -> PyTree:
        """Returns a bool tree like the dense parameters, for pictures and files."""

    def sizes(self, state: Any) -> dict[str, int]:
        """Returns the number of weights of each leaf of the dense network, by path."""

    def stray(self, state: Any) -> int:
        """Counts the inactive weights that are not zero."""

    def placement_of_weights(self, state: Any) -> dict[str, jax.Array]:
        """Returns arrays that say which weights are active, by a name for each."""

    def storage(self, state: Any) -> list[str]:
        """Returns a line of text for each layer of which less than all is stored.

        It says how fast the layer is by the table of measured ratios (`condensed.choose`).
        """

    def delay(self, state: Any) -> int:
        """Counts the steps by which the optimizer's schedule is late: steps it has not seen.

        Waits for the state where that can be more than 0.
        """


class Masked:
    """Dense arrays, exactly zero where a mask says so; or without masks, a dense network."""

    has_rewiring_program = False

    def __init__(self, *, has_masks: bool, rescale: Rescale | None = None) -> None:
        """Makes the representation.

        Args:
          has_masks: Whether the optimizer holds masks.
          rescale: `rescale(params, masks)` masks initial weights and scales them to the inputs that
            are left; None to mask them only.
        """
        self.has_masks, self._rescale = has_masks, rescale

    def start(self, tx: optax.GradientTransformation, params: PyTree) -> tuple[PyTree, PyTree]:
        """See `Representation`."""
        opt_state = tx.init(params)
        if not self.has_masks:
            return params, opt_state
        if self._rescale is None:
            return rigl_optax.apply_masks(params, opt_state), opt_state
        if jax.tree.leaves(optax.tree.get(opt_state, "shadow", ())):
            raise ValueError(
                "config.method.sparse_aware_init: must be 'none' for this method, whose inactive "
                "weights go on learning"
            )
        return self._rescale(params, rigl_optax.get_masks(opt_state)), opt_state

    def bind(self, params: PyTree, state: Any, probes: Any = None) -> PyTree:
        """See `Representation`."""
        del state, probes
        return params

    def probes(self, state: Any) -> None:
        """See `Representation`."""

    def update(
        self, tx: Any, grads: PyTree, scores: Any, state: Any, *, rewires: bool
    ) -> tuple[PyTree, PyTree]:
        """See `Representation`."""
        del scores, rewires  # the transformation rewires by itself, when it is time
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        return optax.apply_updates(state.params, updates), opt_state

    def grows_unseeing(
        self, grads: PyTree, scores: Any, state: Any, is_growing: Predicate
    ) -> jax.Array:
        """See `Representation`."""
        del scores
        return jax.lax.cond(
            is_growing(state.step),
            lambda: no_gradient_outside(self.masks(state), grads),
            lambda: jnp.zeros((), jnp.int32),
        )

    def kernels(self, state: Any) -> PyTree:
        """See `Representation`."""
        return state.params

    def dense(self, state: Any) -> PyTree:
        """See `Representation`."""
        return state.params

    def masks(self, state: Any) -> PyTree:
        """See `Representation`."""
        return rigl_optax.get_masks(state.opt_state)

    def entries(self, state: Any) -> dict[str, Entries]:
        """See `Representation`."""
        one = np.ones((), np.int32)
        named = _paths.flatten_with_paths(state.params)
        return {path: Entries(one, one, one) for path, _ in named}

    def groups(self, state: Any, padded: PaddedBlocks) -> dict[str, int]:
        """See `Representation`."""
        return _groups(self.masks(state), padded())

    def weight_masks(self, state: Any) -> PyTree:
        """See `Representation`."""
        return self.masks(state)

    def sizes(self, state: Any) -> dict[str, int]:
        """See `Representation`."""
        named = _paths.flatten_with_paths(state.params)
        return {path: math.prod(leaf.shape) for path, leaf in named}

    def stray(self, state: Any) -> int:
        """See `Representation`."""
        if not self.has_masks:
            return 0
        pairs = zip(jax.tree.leaves(state.params), jax.tree.leaves(self.masks(state)), strict=True)
        return int(_stray(list(pairs)))

    def placement_of_weights(self, state: Any) -> dict[str, jax.Array]:
        """See `Representation`."""
        return dict(_paths.flatten_with_paths(self.masks(state))) if self.has_masks else {}

    def storage(self, state: Any) -> list[str]:
        """See `Representation`."""
        del state
        return []

    def delay(self, state: Any) -> int:
        """See `Representation`."""
        del state
        return 0  # the transformation keeps to its schedule itself


class Condensed:
    """Sparse kernels as their active blocks and where these are; all else as dense arrays."""

    has_rewiring_program = True

    def __init__(self, choose: ChooseTopologies) -> None:
        """Takes the function from dense parameters to where their first blocks are."""
        self._choose = choose

    def start(self, tx: condensed.CondensedTransformation, params: PyTree) -> tuple[PyTree, PyTree]:
        """See `Representation`."""
        found = self._choose(params)
        stored = condensed.extract(params, found)
        return stored, tx.init(stored, found)

    def bind(self, params: PyTree, state: Any, probes: Any = None) -> PyTree:
        """See `Representation`."""
        return condensed.bind(params, state.opt_state.topologies, probes)

    def probes(self, state: Any) -> Any:
        """See `Representation`."""
        return condensed.probes(state.opt_state.topologies)

    def update(
        self, tx: Any, grads: PyTree, scores: Any, state: Any, *, rewires: bool
    ) -> tuple[PyTree, PyTree]:
        """See `Representation`."""
        if rewires:
            # What grows at random has no use for scores, and takes zeros.
            scores = self.probes(state) if scores is None else scores
            params, opt_state = tx.rewire(grads, scores, state.opt_state, state.params)
            return params, opt_state
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        return optax.apply_updates(state.params, updates), opt_state

    def grows_unseeing(
        self, grads: PyTree, scores: Any, state: Any, is_growing: Predicate
    ) -> jax.Array:
        """See `Representation`."""
        del grads, is_growing  # there are scores in the program of rewirings, and nowhere else
        if scores is None:
            return jnp.zeros((), jnp.int32)
        grids = {path: found.grid_mask() for path, found in state.opt_state.topologies.items()}
        return no_gradient_outside(grids, scores)

    def kernels(self, state: Any) -> PyTree:
        """See `Representation`."""
        return self.bind(state.params, state)

    def dense(self, state: Any) -> PyTree:
        """See `Representation`."""
        return condensed.densify(state.params, state.opt_state.topologies)

    def masks(self, state: Any) -> PyTree:
        """See `Representation`."""
        found = state.opt_state.topologies
        named = _paths.flatten_with_paths(state.params)
        leaves = [found[p].grid_mask() if p in found else jnp.ones(x.shape, bool) for p, x in named]
        return jax.tree.unflatten(jax.tree.structure(state.params), leaves)

    def entries(self, state: Any) -> dict[str, Entries]:
        """See `Representation`."""
        one = np.ones((), np.int32)
        named = _paths.flatten_with_paths(state.params)
        found = {path: Entries(one, one, one) for path, _ in named}
        for path, topology in state.opt_state.topologies.items():
            sizes, (inputs, outputs) = topology.block.group_sizes, topology.shape[-2:]
            # Blocks at the edges may be smaller ones.
            each = sizes(topology.shape), sizes((inputs, 1))[:, 0], sizes((1, outputs))[0]
            found[path] = Entries(*(x.astype(np.int32) for x in each))
        return found

    def groups(self, state: Any, padded: PaddedBlocks) -> dict[str, int]:
        """See `Representation`."""
        del padded  # an entry of a mask is a block
        return _groups(self.masks(state), {})

    def weight_masks(self, state: Any) -> PyTree:
        """See `Representation`."""
        return condensed.masks_of(state.params, state.opt_state.topologies)

    def sizes(self, state: Any) -> dict[str, int]:
        """See `Representation`."""
        found = state.opt_state.topologies
        named = _paths.flatten_with_paths(state.params)
        return {p: math.prod(found[p].shape if p in found else leaf.shape) for p, leaf in named}

    def stray(self, state: Any) -> int:
        """See `Representation`."""
        del state
        return 0  # they are not there

    def placement_of_weights(self, state: Any) -> dict[str, jax.Array]:
        """See `Representation`."""
        found: dict[str, jax.Array] = {}
        for path, topology in state.opt_state.topologies.items():
            found |= {f"{path}/rows": topology.rows, f"{path}/cols": topology.cols}
        return found

    def storage(self, state: Any) -> list[str]:
        """See `Representation`."""
        lines = []
        for path, stored in state.opt_state.topologies.items():
            block, groups = stored.block, math.prod(stored.grid)
            size = f"{block.rows}x{block.cols}"
            ratio = condensed.measured_ratio(stored.shape, 1 - stored.density, block)
            gain = "not measured" if ratio is None else f"about {ratio:.1f} times as fast as dense"
            lines.append(f"{path}: {stored.number:,} of {groups:,} blocks of {size} stored; {gain}")
        return lines

    def delay(self, state: Any) -> int:
        """See `Representation`."""
        return int(state.step) - int(state.opt_state.count)


def no_gradient_outside(masks: PyTree, grads: PyTree) -> jax.Array:
    """Returns 1 if the gradient is zero at every inactive weight, or block, of the network, else 0.

    Growth by gradient would then take the lowest indices. It happens when the forward pass
    multiplies by the masks itself, which makes the gradients as sparse as the weights. In one
    layer alone it is no sign of that: where few weights are inactive, they may all have
    gathered at units that are dead.
    """
    pairs = list(zip(jax.tree.leaves(masks), jax.tree.leaves(grads), strict=True))
    has_inactive = jnp.stack([jnp.any(~mask) for mask, _ in pairs])
    is_seen = jnp.stack([jnp.any(jnp.where(mask, 0, grad) != 0) for mask, grad in pairs])
    return (jnp.any(has_inactive) & ~jnp.any(is_seen)).astype(jnp.int32)


def _groups(masks: PyTree, padded: Mapping[str, tuple[Block, bool]]) -> dict[str, int]:
    named = dict(_paths.flatten_with_paths(masks))
    counts = jax.device_get(_count_groups(named, tuple(padded.items())))
    return {path: int(counts[path]) for path in named}


@functools.partial(jax.jit, static_argnums=1)
def _count_groups(
    named: dict[str, jax.Array], padded: tuple[tuple[str, tuple[Block, bool]], ...]
) -> dict[str, jax.Array]:
    found = dict(named)
    for path, (block, is_stacked) in padded:
        groups = jax.vmap(block.groups) if is_stacked else block.groups
        found[path] = groups(named[path])
    return {path: jnp.sum(mask, dtype=jnp.int32) for path, mask in found.items()}


@jax.jit
def _stray(pairs: list[tuple[jax.Array, jax.Array]]) -> jax.Array:
    return jnp.stack([jnp.sum((x != 0) & ~mask, dtype=jnp.int32) for x, mask in pairs]).sum()
