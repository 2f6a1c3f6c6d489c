"""What a training record says, and what can go silently wrong with sparse training."""

import functools
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rigl_optax import Block, Unstructured, _axes, _paths, analysis
from rigl_optax._structures import by_path
from rigl_optax.training import methods, optimizers, sparsity
from rigl_optax.training.config import Config
from rigl_optax.training.state import (
    Entries,
    TrainState,
    count,
    entries,
    masks,
    sizes,
    topologies,
)

PyTree = Any


DEAD_SHARE = 0.1  # of the units of a layer: fewer are lost in most runs at 95 %


class Start(NamedTuple):
    """What a run is compared with.

    Attributes:
      groups: `{path: active groups}`: weights, or blocks.
      dead: `{path: output units that read nothing}` of layers with units.
      units: `{path: output units}` of these layers.
    """

    groups: dict[str, int]
    dead: dict[str, int]
    units: dict[str, int]


def start_of(config: Config, initial: TrainState) -> Start:
    """What a run is compared with, from its initial state."""
    dead = dead_units(config, initial)
    return Start(active_groups(config, initial), dead, _units(initial, dead))


def training_record(
    config: Config, state: TrainState, start: Start
) -> tuple[dict[str, float], dict[str, str]]:
    """What to log about the steps since the last record, and what is wrong.

    Args:
      config: The run's.
      state: As it is now.
      start: From `start_of`.

    Returns:
      Values: mean `loss` and `accuracy` over the training batches since the last record, unless
      all were skipped; how many were `skipped`, if any; the `learning_rate` of the last step; and
      of a masked method `density` (of all parameters), `rewirings` so far, and `drop_fraction` at
      this step if it has one, with `drop_fraction/path` of layers that have another. Then
      `{kind: warning in words}`.
    """
    step, sums = jax.device_get((state.step, state.sums))
    values = {}
    if sums.examples:
        values["loss"] = float(sums.loss / sums.examples)
        values["accuracy"] = float(sums.correct / sums.examples)
    values["learning_rate"] = float(optimizers.learning_rate(config)(step - 1))
    warnings = {}
    if sums.skipped:
        values["skipped"] = float(sums.skipped)
        warnings["skipped"] = skipped({int(step): float(sums.skipped)})
    if not methods.find(config).masked:
        return values, warnings
    active = active_weights(config, state)
    rewirings, healed = counters(state)
    # The schedule goes by the steps that the optimizer has seen, which skipped ones are not.
    seen = int(jax.device_get(state.opt_state.count))
    values["density"] = sum(active.values()) / sum(sizes(state).values())
    values["rewirings"] = float(rewirings)
    values |= methods.drop_fractions(config, int(step), list(active))
    if methods.rewires(config):
        warnings |= _dead(config, start, dead_units(config, state))
    groups = active_groups(config, state)
    return values, warnings | _warnings(
        config, int(step), seen, rewirings, healed, int(sums.blind), groups, start.groups
    )


def skipped(left: Mapping[int, float]) -> str:
    """What is said of steps left out.

    Args:
      left: How many, by the step of the record that counts them.
    """
    return (
        f"{int(sum(left.values()))} steps up to step {max(left)} were skipped: their loss or "
        "gradients were not finite"
    )


def active_weights(config: Config, state: TrainState) -> dict[str, int]:
    """`{path: active weights}` for all leaves, dense ones in full; exact integers."""
    if not methods.find(config).masked:
        return sizes(state)
    named = dict(_paths.flatten_with_paths(masks(state)))
    counts = jax.device_get(_active(named, entries(state)))
    return {path: int(counts[path]) for path in named}


def active_groups(config: Config, state: TrainState) -> dict[str, int]:
    """`{path: active groups}`: as many as weights, but of layers whose blocks differ in size.

    Of those the number of blocks is what a rewiring keeps.
    """
    if not methods.find(config).masked:
        return sizes(state)
    named = dict(_paths.flatten_with_paths(masks(state)))
    padded: dict[str, tuple[Block, bool]] = {}
    if not topologies(state):
        layers = sparsity.distribution(config)
        paths, stacked = list(layers(state.params)), layers.stacked_paths(state.params)
        for path, one in by_path(sparsity.structures(config), paths).items():
            if isinstance(one, Block) and one.pad:
                padded[path] = one, path in stacked
    counts = jax.device_get(_groups(named, tuple(padded.items())))
    return {path: int(counts[path]) for path in named}


def counters(state: TrainState) -> tuple[int, int]:
    """`(rewirings, healed)` from the optimizer's state, wherever it holds them.

    Of stored blocks nothing can be written elsewhere, and nothing healed.
    """
    found = [optax.tree.get(state.opt_state, name, 0) for name in ("rewirings", "healed")]
    rewirings, healed = jax.device_get(found)
    return int(rewirings), int(healed)


def stray(config: Config, state: TrainState) -> dict[str, str]:
    """A warning if inactive weights are not zero, as when something writes them past the mask."""
    if not methods.find(config).masked or topologies(state):
        return {}
    pairs = zip(jax.tree.leaves(state.params), jax.tree.leaves(masks(state)), strict=True)
    found = int(_stray(list(pairs)))
    if not found:
        return {}
    return {
        "stray": f"{found} inactive weights are not zero at the end: something other than the "
        "optimizer writes into the parameters"
    }


def dead_units(config: Config, state: TrainState) -> dict[str, int]:
    """`{path: output units that no active weight leads to}` of layers with units."""
    if not methods.find(config).masked:
        return {}
    named = {path: m for path, m in _paths.flatten_with_paths(masks(state)) if m.ndim >= 2}
    counts = jax.device_get(_dead_outputs(named, entries(state)))
    return {path: int(counts[path]) for path in named}


def _units(state: TrainState, paths: Collection[str]) -> dict[str, int]:
    """Counts the output units of layers, dead or not."""
    if not paths:
        return {}
    named, of = dict(_paths.flatten_with_paths(masks(state))), entries(state)
    found = {}
    for path in paths:
        shape = named[path].shape
        entries_of_units = [shape[a] for a in _axes.default_axes(path, named[path]).outputs]
        found[path] = int(np.broadcast_to(of[path].outputs, entries_of_units).sum())
    return found


def _dead(config: Config, start: Start, now: dict[str, int]) -> dict[str, str]:
    warnings: dict[str, str] = {}
    died: list[str] = []
    ablated: list[str] = []
    for path in now:
        lost = now[path] - start.dead[path]
        if lost > 0 and sparsity.ablates(config, path):
            ablated.append(f"{path} {start.dead[path]} -> {now[path]}")
        elif lost > 0 and lost >= DEAD_SHARE * start.units[path]:
            died.append(f"{path} {start.dead[path]} -> {now[path]} of {start.units[path]}")
    if died:
        warnings["dead"] = (
            f"units have lost all their inputs and are constants: {', '.join(died)}; a lower "
            "learning rate, inputs of mean 0 or a lower sparsity of these layers keep more of them"
        )
    if ablated:
        warnings["ablated"] = (
            f"units are ablated, as config.method.structure asks: {', '.join(ablated)}; if these "
            "are outputs of the network, give that layer another structure by its pattern"
        )
    return warnings


def _warnings(
    config: Config,
    step: int,
    count: int,
    rewirings: int,
    healed: int,
    blind: int,
    groups: dict[str, int],
    expected: dict[str, int],
) -> dict[str, str]:
    warnings = {}
    scheduled = methods.rewirings_before(config, count)
    if rewirings != scheduled:
        warnings["rewirings"] = (
            f"{rewirings} rewirings by step {step}, where {scheduled} were scheduled: gradients "
            "that are not finite leave the topology as it is"
        )
    if healed:
        warnings["healed"] = (
            f"{healed} inactive weights were not zero at rewirings: something other than the "
            "optimizer writes into the parameters"
        )
    if groups != expected and methods.find(config).keeps_counts:
        changed = [
            f"{p} {expected[p]} -> {groups[p]}" for p in expected if groups[p] != expected[p]
        ]
        is_single = sparsity.structures(config) == Unstructured()
        what = "active weights" if is_single else "active groups, weights or blocks,"
        warnings["active"] = f"the number of {what} changed: {', '.join(changed)}"
    if blind:
        warnings["blind"] = (
            f"{blind} rewirings saw no gradient outside the masks and grew blindly: does the model "
            "multiply by the masks itself?"
        )
    return warnings


@jax.jit
def _active(named: dict[str, jax.Array], of: dict[str, Entries]) -> dict[str, jax.Array]:
    return {path: count(mask, of[path].weights) for path, mask in named.items()}


@functools.partial(jax.jit, static_argnums=1)
def _groups(
    named: dict[str, jax.Array], padded: tuple[tuple[str, tuple[Block, bool]], ...]
) -> dict[str, jax.Array]:
    found = dict(named)
    for path, (block, is_stacked) in padded:
        groups = jax.vmap(block.groups) if is_stacked else block.groups
        found[path] = groups(named[path])
    return {path: count(mask, 1) for path, mask in found.items()}


@jax.jit
def _stray(pairs: list[tuple[jax.Array, jax.Array]]) -> jax.Array:
    return jnp.stack([jnp.sum((x != 0) & ~mask, dtype=jnp.int32) for x, mask in pairs]).sum()


@jax.jit
def _dead_outputs(named: dict[str, jax.Array], of: dict[str, Entries]) -> dict[str, jax.Array]:
    return {
        path: count(analysis.fan_in(mask, _axes.default_axes(path, mask)) == 0, of[path].outputs)
        for path, mask in named.items()
    }
