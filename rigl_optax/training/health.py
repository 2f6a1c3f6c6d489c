"""Measures the topology of a run when it has just been rewired, and at no other step."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rigl_optax import _paths, analysis
from rigl_optax._axes import KernelAxes
from rigl_optax.analysis import _counts
from rigl_optax.training import parts, sparsity, stacks
from rigl_optax.training.representation import Entries
from rigl_optax.training.setup import Run
from rigl_optax.training.state import History, TrainState, count

PyTree = Any
Observe = Callable[[PyTree, TrainState], tuple[TrainState, dict[str, float]]]


class _Layer(NamedTuple):
    """Counts of one layer: weights behind each fraction, dead units, and effective ones."""

    fractions: dict[str, _counts.Counts]
    dead_inputs: Any
    dead_outputs: Any
    effective_outputs: Any


def masks_before(run: Run, state: TrainState) -> PyTree:
    """Copies the masks: the step that rewires them donates its state."""
    return jax.tree.map(jnp.copy, run.representation.masks(state))


def observer(run: Run, initial: TrainState) -> Observe:
    """Makes a function to call after a rewiring with the masks before it and the state after it.

    That returns the state with its history brought up to date, and what to record. These are
    fractions of weights, over the sparse layers, and with `/path` at the end of
    the name for each of these layers alone:

    - `churn`: of those active before the rewiring, those that are not after it;
    - `overlap`: of those active at step 0, those that are now;
    - `coverage`: of all, those that have ever been active;
    - `survival`: of those grown by the rewiring before this one, those that this one kept; absent
      where that grew none.

    And per layer, in units, `dead_inputs/path` (no active weight out of them; in a layer after
    the first, these are hidden units), `dead_outputs/path` (no active weight into them) and
    `effective_outputs/path` (those among which the weights are spread). Of a transformer also, per
    attention, `dead_heads/path` and `averaging_heads/path`, and per MLP `dead_units/path`: see
    `parts.dead`. Of a leaf that is a stack of layers, `path/0` is the first.

    Args:
      run: The run.
      initial: The state at step 0.
    """
    masks, sparse = run.representation.masks, sparsity.distribution(run.config)(run.shapes)
    first = masks(initial)
    is_sparse = {path: path in sparse for path, _ in _paths.flatten_with_paths(first)}
    of, stacked, found = run.representation.entries(initial), stacks.paths(run), parts.find(run)

    def observe(before: PyTree, state: TrainState) -> tuple[TrainState, dict[str, float]]:
        after = masks(state)
        history = state.history
        assert history is not None
        trees = (first, before, after, history.explored, history.grown)
        layers, updated = {}, []
        for path, *each in zip(is_sparse, *map(jax.tree.leaves, trees), strict=True):
            if is_sparse[path]:
                is_stack = path in stacked
                axes = stacks.axes_of_layer(path, each[0], is_stack)
                layers[path], *new = _measure(axes, is_stack, of[path], *each)
                updated.append(new)
            else:
                updated.append(each[3:])
        structure: Any = jax.tree.structure(after)
        new_history = History(
            *(structure.unflatten(leaves) for leaves in zip(*updated, strict=True))
        )
        values = _values(stacks.by_layer(jax.device_get(layers)))
        for measure, numbers in parts.dead(run, found, state).items():
            values |= {f"{measure}/{path}": float(n) for path, n in numbers.items()}
        return state._replace(history=new_history), values

    return observe


def coverage(run: Run, state: TrainState) -> float | None:
    """Returns the fraction of the weights of all layers with a mask that were ever active.

    ITOP's exploration rate Rs, over the masks that were observed: where masks change at every
    step, those at the records of the training loss. None without a history.
    """
    if state.history is None:
        return None
    explored = dict(_paths.flatten_with_paths(state.history.explored))
    now = dict(_paths.flatten_with_paths(run.representation.masks(state)))
    counted = jax.device_get(_explored(explored, now, run.representation.entries(state)))
    pairs = [(int(n), int(of)) for is_dense, (n, of) in counted.values() if not is_dense]
    part, whole = (sum(column) for column in zip(*pairs, strict=True)) if pairs else (1, 1)
    return part / whole


def effective_units(run: Run, state: TrainState) -> dict[str, float]:
    """Counts the output units among which the active weights of each sparse layer are spread.

    Returns:
      `{path: units}`, a stack's layers as `path/0`, ...; empty for a method without masks.
    """
    if not run.method.masked:
        return {}
    of, stacked = run.representation.entries(state), stacks.paths(run)
    sparse, found = sparsity.distribution(run.config)(run.shapes), {}
    for path, mask in _paths.flatten_with_paths(run.representation.masks(state)):
        if sparse.get(path):
            axes = stacks.axes_of_layer(path, mask, path in stacked)
            found[path] = _effective(axes, path in stacked, of[path], mask)
    return {path: float(n) for path, n in stacks.by_layer(jax.device_get(found)).items()}


# One layer at a time: layers of one shape share a program. For ResNet-50 that takes half the time
# to compile that one program for all layers does.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _measure(
    axes: KernelAxes, is_stack: bool, of: Entries, *masks: jax.Array
) -> tuple[_Layer, jax.Array, jax.Array]:
    """Measures a layer, or each layer of a stack, as `_measure_layer` does."""
    return stacks.for_each_layer(functools.partial(_measure_layer, axes, of), is_stack)(*masks)


def _measure_layer(
    axes: KernelAxes,
    of: Entries,
    first: jax.Array,
    before: jax.Array,
    after: jax.Array,
    explored: jax.Array,
    grown: jax.Array,
) -> tuple[_Layer, jax.Array, jax.Array]:
    """Counts a layer; then returns masks of the weights ever active, and of those just grown."""
    explored = explored | after
    fractions = {
        "churn": _counts.churn(before, after, of.weights),
        "overlap": _counts.overlap(after, first, of.weights),
        "coverage": _counts.coverage(explored, of.weights),
        "survival": _counts.overlap(after, grown, of.weights),
    }
    dead = (
        count(analysis.fan_out(after, axes) == 0, of.inputs),
        count(analysis.fan_in(after, axes) == 0, of.outputs),
    )
    effective = _effective_outputs(after, axes, of)
    return _Layer(fractions, *dead, effective), explored, after & ~before


def _effective_outputs(mask: jax.Array, axes: KernelAxes, of: Entries) -> jax.Array:
    """Counts the output units among which the active weights are spread; entries may be blocks."""
    into = analysis.fan_in(jnp.where(mask, of.weights, 0), axes)
    return analysis.effective_units(into // of.outputs, of.outputs)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _effective(axes: KernelAxes, is_stack: bool, of: Entries, mask: jax.Array) -> jax.Array:
    def of_layer(layer: jax.Array) -> jax.Array:
        return _effective_outputs(layer, axes, of)

    return stacks.for_each_layer(of_layer, is_stack)(mask)


@jax.jit
def _explored(
    explored: dict[str, jax.Array], now: dict[str, jax.Array], of: dict[str, Entries]
) -> dict[str, tuple[jax.Array, _counts.Counts]]:
    """Tells for each layer whether it is dense, and how many weights have ever been active."""
    return {
        path: (jnp.all(mask), _counts.coverage(explored[path], of[path].weights))
        for path, mask in now.items()
    }


def _values(layers: Mapping[str, _Layer]) -> dict[str, float]:
    values = {}
    for name in ("churn", "overlap", "coverage", "survival"):
        pairs = {path: layer.fractions[name] for path, layer in layers.items()}
        part, whole = (sum(int(pair[i]) for pair in pairs.values()) for i in (0, 1))
        if whole:
            values[name] = part / whole
        values |= {f"{name}/{p}": int(n) / int(of) for p, (n, of) in pairs.items() if of}
    for path, layer in layers.items():
        values[f"dead_inputs/{path}"] = float(layer.dead_inputs)
        values[f"dead_outputs/{path}"] = float(layer.dead_outputs)
        values[f"effective_outputs/{path}"] = float(layer.effective_outputs)
    return values
