"""What a training record says, and what can go silently wrong with sparse training."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rigl_optax import _paths, analysis
from rigl_optax.training import methods, structures
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


class Start(NamedTuple):
    """What a run is compared with.

    Attributes:
      active: `{path: active weights}`.
      dead: `{path: output units that read nothing}` of layers with units.
    """

    active: dict[str, int]
    dead: dict[str, int]


def start_of(config: Config, initial: TrainState) -> Start:
    """What a run is compared with, from its initial state."""
    return Start(active_weights(config, initial), dead_units(config, initial))


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
      this step if it has one. Then
      `{kind: warning in words}`.
    """
    step, sums = jax.device_get((state.step, state.sums))
    values = {}
    if sums.examples:
        values["loss"] = float(sums.loss / sums.examples)
        values["accuracy"] = float(sums.correct / sums.examples)
    values["learning_rate"] = float(methods.learning_rate(config)(step - 1))
    warnings = {}
    if sums.skipped:
        values["skipped"] = float(sums.skipped)
        warnings["skipped"] = skipped({int(step): float(sums.skipped)})
    if not methods.find(config).masked:
        return values, warnings
    active = active_weights(config, state)
    rewirings, healed = counters(state)
    values["density"] = sum(active.values()) / sum(sizes(state).values())
    values["rewirings"] = float(rewirings)
    if "drop_fraction" in methods.find(config).arguments(config):
        values["drop_fraction"] = float(methods.drop_fraction(config)(step))
    if methods.find(config).rewires:
        warnings |= _dead(config, start.dead, dead_units(config, state))
    return values, warnings | _warnings(
        config, int(step), rewirings, healed, int(sums.blind), active, start.active
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


def _dead(config: Config, start: dict[str, int], now: dict[str, int]) -> dict[str, str]:
    warnings: dict[str, str] = {}
    died: list[str] = []
    ablated: list[str] = []
    for path in now:
        if now[path] > start[path]:
            meant = structures.ablates(config.structure, path)
            (ablated if meant else died).append(f"{path} {start[path]} -> {now[path]}")
    if died:
        warnings["dead"] = (
            f"units have lost all their inputs: {', '.join(died)}; the option min_fan_in, of "
            "methods that have it, keeps some"
        )
    if ablated:
        warnings["ablated"] = (
            f"units are ablated, as config.structure asks: {', '.join(ablated)}; if these are "
            "outputs of the network, give that layer another structure by its pattern"
        )
    return warnings


def _warnings(
    config: Config,
    step: int,
    rewirings: int,
    healed: int,
    blind: int,
    active: dict[str, int],
    expected: dict[str, int],
) -> dict[str, str]:
    warnings = {}
    scheduled = methods.rewirings_before(config, step)
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
    if active != expected and methods.find(config).keeps_counts:
        changed = [
            f"{p} {expected[p]} -> {active[p]}" for p in expected if active[p] != expected[p]
        ]
        warnings["active"] = f"the number of active weights changed: {', '.join(changed)}"
    if blind:
        warnings["blind"] = (
            f"{blind} rewirings saw no gradient outside the masks and grew blindly: does the model "
            "multiply by the masks itself?"
        )
    return warnings


@jax.jit
def _active(named: dict[str, jax.Array], of: dict[str, Entries]) -> dict[str, jax.Array]:
    return {path: count(mask, of[path].weights) for path, mask in named.items()}


@jax.jit
def _stray(pairs: list[tuple[jax.Array, jax.Array]]) -> jax.Array:
    return jnp.stack([jnp.sum((x != 0) & ~mask, dtype=jnp.int32) for x, mask in pairs]).sum()


@jax.jit
def _dead_outputs(named: dict[str, jax.Array], of: dict[str, Entries]) -> dict[str, jax.Array]:
    return {
        path: count(analysis.fan_in(mask) == 0, of[path].outputs) for path, mask in named.items()
    }
