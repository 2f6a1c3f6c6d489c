"""Makes training records, and warns of what can go silently wrong with sparse training."""

from collections.abc import Collection, Mapping
from typing import NamedTuple

import jax
import numpy as np
import optax

from rigl_optax import Block, Unstructured, _axes, _paths, analysis
from rigl_optax._structures import by_path
from rigl_optax.training import optimizers, sparsity
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
    """

    groups: dict[str, int]
    dead: dict[str, int]
    units: dict[str, int]


def start_of(run: Run, initial: TrainState) -> Start:
    """Counts what a run is compared with, in its initial state."""
    dead = dead_units(run, initial)
    return Start(active_groups(run, initial), dead, _units(run, initial, dead))


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
    masks = run.representation.masks(state)
    named = {path: m for path, m in _paths.flatten_with_paths(masks) if m.ndim >= 2}
    counts = jax.device_get(_dead_outputs(named, run.representation.entries(state)))
    return {path: int(counts[path]) for path in named}


def _units(run: Run, state: TrainState, paths: Collection[str]) -> dict[str, int]:
    """Counts the output units of layers, dead or not."""
    if not paths:
        return {}
    named = dict(_paths.flatten_with_paths(run.representation.masks(state)))
    of, found = run.representation.entries(state), {}
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


@jax.jit
def _dead_outputs(named: dict[str, jax.Array], of: dict[str, Entries]) -> dict[str, jax.Array]:
    return {
        path: count(analysis.fan_in(mask, _axes.default_axes(path, mask)) == 0, of[path].outputs)
        for path, mask in named.items()
    }
