"""Makes training records, and warns of what can go silently wrong with sparse training."""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np
import optax

from rigl_optax import Block, Unstructured, _paths, analysis
from rigl_optax._structures import by_path
from rigl_optax.training import optimizers, parts, sparsity, stacks
from rigl_optax.training.config import Config
from rigl_optax.training.representation import Entries
from rigl_optax.training.setup import Run
from rigl_optax.training.state import TrainState, count

DEAD_SHARE = 0.1  # of the units of a layer: fewer are lost in most runs at 95 %


class Start(NamedTuple):
    """Counts at the start of a run, which later ones are compared with.

    Attributes:
      groups: `{path: active groups}`: weights, or blocks.
      dead: `{path: output units that read nothing}` of layers with units.
      units: `{path: output units}` of these layers.
      dead_heads: `{path: dead heads}` of attentions.
      heads: `{path: heads}` of these attentions.
      parts: Attentions and MLPs of the model.
    """

    groups: dict[str, int]
    dead: dict[str, int]
    units: dict[str, int]
    dead_heads: dict[str, int]
    heads: dict[str, int]
    parts: tuple[parts.Part, ...]


def start_of(run: Run, initial: TrainState) -> Start:
    """Counts what a run is compared with, in its initial state."""
    groups, dead = active_groups(run, initial), dead_units(run, initial)
    found = parts.find(run) if run.rewirings.happen else ()
    return Start(
        groups,
        dead,
        _units(run, initial),
        dead_heads(run, found, initial),
        parts.heads(found),
        found,
    )


def training_record(
    run: Run, state: TrainState, start: Start
) -> tuple[dict[str, float], dict[str, str]]:
    """Returns what to log about the steps since the last record, and what is wrong.

    Args:
      run: The run.
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
    values["learning_rate"] = float(optimizers.learning_rate(run.config)(step - 1))
    warnings = {}
    if sums.skipped:
        values["skipped"] = float(sums.skipped)
        warnings["skipped"] = skipped({int(step): float(sums.skipped)})
    if not run.method.masked:
        return values, warnings
    active = active_weights(run, state)
    rewirings, healed = counters(state)
    # The schedule goes by the steps that the optimizer has seen, which skipped ones are not.
    seen = int(jax.device_get(state.opt_state.count))
    values["density"] = sum(active.values()) / sum(run.representation.sizes(state).values())
    values["rewirings"] = float(rewirings)
    values |= run.rewirings.drop_fractions(int(step), list(active))
    if run.rewirings.happen:
        warnings |= _dead(run.config, start, dead_units(run, state))
        warnings |= _lost_heads(start, dead_heads(run, start.parts, state))
    groups = active_groups(run, state)
    return values, warnings | _warnings(
        run, int(step), seen, rewirings, healed, int(sums.unseeing), groups, start.groups
    )


def skipped(counts: Mapping[int, float]) -> str:
    """Says how many steps were skipped.

    Args:
      counts: How many, by the step of the record that counts them.
    """
    return (
        f"{int(sum(counts.values()))} steps up to step {max(counts)} were skipped: their loss or "
        "gradients were not finite"
    )


def active_weights(run: Run, state: TrainState) -> dict[str, int]:
    """Counts the active weights of all leaves by path, dense ones in full: exact integers."""
    found = run.representation
    if not run.method.masked:
        return found.sizes(state)
    named = dict(_paths.flatten_with_paths(found.masks(state)))
    counts = jax.device_get(_active(named, found.entries(state)))
    return {path: int(counts[path]) for path in named}


def active_groups(run: Run, state: TrainState) -> dict[str, int]:
    """Counts the active groups of all leaves by path.

    A group is a weight, but in layers whose blocks differ in size a block: of those a rewiring
    keeps the number, and of weights it does not.
    """
    if not run.method.masked:
        return run.representation.sizes(state)

    def padded() -> dict[str, tuple[Block, bool]]:
        layers = sparsity.distribution(run.config)
        paths, stacked = list(layers(run.shapes)), layers.stacked_paths(run.shapes)
        each = by_path(sparsity.structures(run.config), paths)
        blocks = {path: one for path, one in each.items() if isinstance(one, Block) and one.pad}
        return {path: (block, path in stacked) for path, block in blocks.items()}

    return run.representation.groups(state, padded)


def counters(state: TrainState) -> tuple[int, int]:
    """Returns `(rewirings, healed)` from the optimizer's state, wherever it holds them.

    An optimizer of stored blocks has nothing to heal: then it is 0.
    """
    found = [optax.tree.get(state.opt_state, name, 0) for name in ("rewirings", "healed")]
    rewirings, healed = jax.device_get(found)
    return int(rewirings), int(healed)


def stray(run: Run, state: TrainState) -> dict[str, str]:
    """Warns if inactive weights are not zero, as when something writes them past the mask."""
    found = run.representation.stray(state)
    if not found:
        return {}
    return {
        "stray": f"{found} inactive weights are not zero at the end: something other than the "
        "optimizer writes into the parameters"
    }


def dead_units(run: Run, state: TrainState) -> dict[str, int]:
    """Counts the output units that no active weight leads to, by path of layers with units."""
    if not run.method.masked:
        return {}
    stacked = stacks.paths(run)
    named = _layers_with_units(run, state, stacked)
    counts = jax.device_get(_dead_outputs(stacked, named, run.representation.entries(state)))
    return {path: int(n) for path, n in stacks.by_layer(counts).items()}


def dead_heads(run: Run, found: tuple[parts.Part, ...], state: TrainState) -> dict[str, int]:
    """Counts the dead heads of attentions, by path."""
    return parts.dead(run, found, state).get(parts.DEAD_HEADS, {}) if found else {}


def _layers_with_units(
    run: Run, state: TrainState, stacked: frozenset[str]
) -> dict[str, jax.Array]:
    """Returns the masks of the leaves whose layers have inputs and outputs, by path."""
    masks = _paths.flatten_with_paths(run.representation.masks(state))
    return {path: mask for path, mask in masks if mask.ndim - (path in stacked) >= 2}


def _units(run: Run, state: TrainState) -> dict[str, int]:
    """Counts the output units of layers, dead or not."""
    if not run.method.masked:
        return {}
    of, found, stacked = run.representation.entries(state), {}, stacks.paths(run)
    for path, mask in _layers_with_units(run, state, stacked).items():
        is_stack = path in stacked
        axes = stacks.axes_of_layer(path, mask, is_stack)
        entries_of_units = [mask.shape[is_stack:][a] for a in axes.outputs]
        units = np.broadcast_to(of[path].outputs, entries_of_units).sum()
        found[path] = np.full(mask.shape[:is_stack], units)
    return {path: int(n) for path, n in stacks.by_layer(found).items()}


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
            "learning rate, inputs of mean 0 (config.data.standardise for images in [0, 1]) or a "
            "lower sparsity of these layers keep more of them"
        )
    if ablated:
        warnings["ablated"] = (
            f"units are ablated, as config.method.structure asks: {', '.join(ablated)}; if these "
            "are outputs of the network, give that layer another structure by its pattern"
        )
    return warnings


def _lost_heads(start: Start, now: dict[str, int]) -> dict[str, str]:
    lost = [
        f"{path} {start.dead_heads[path]} -> {now[path]} of {start.heads[path]}"
        for path in now
        if now[path] - start.dead_heads[path] >= max(1, DEAD_SHARE * start.heads[path])
    ]
    if not lost:
        return {}
    return {
        "dead_heads": "heads of attention pass nothing on any more, since no feature has active "
        f"weights both into its value and out of it: {', '.join(lost)}; a lower sparsity of these "
        "layers keeps more of them"
    }


def _warnings(
    run: Run,
    step: int,
    count: int,
    rewirings: int,
    healed: int,
    unseeing: int,
    groups: dict[str, int],
    expected: dict[str, int],
) -> dict[str, str]:
    warnings = {}
    scheduled = run.rewirings.before(count)
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
    if groups != expected and run.method.keeps_counts:
        changed = [
            f"{p} {expected[p]} -> {groups[p]}" for p in expected if groups[p] != expected[p]
        ]
        is_single = sparsity.structures(run.config) == Unstructured()
        what = "active weights" if is_single else "active groups, weights or blocks,"
        warnings["active"] = f"the number of {what} changed: {', '.join(changed)}"
    if unseeing:
        warnings["unseeing"] = (
            f"{unseeing} rewirings saw no gradient outside the masks and grew blindly: does the "
            "model multiply by the masks itself?"
        )
    return warnings


@jax.jit
def _active(named: dict[str, jax.Array], of: dict[str, Entries]) -> dict[str, jax.Array]:
    return {path: count(mask, of[path].weights) for path, mask in named.items()}


@functools.partial(jax.jit, static_argnums=0)
def _dead_outputs(
    stacked: frozenset[str], named: dict[str, jax.Array], of: dict[str, Entries]
) -> dict[str, jax.Array]:
    def dead(path: str, mask: jax.Array) -> jax.Array:
        axes = stacks.axes_of_layer(path, mask, path in stacked)

        def of_layer(layer: jax.Array) -> jax.Array:
            return count(analysis.fan_in(layer, axes) == 0, of[path].outputs)

        return stacks.for_each_layer(of_layer, path in stacked)(mask)

    return {path: dead(path, mask) for path, mask in named.items()}
