"""What a training record says, and what can go silently wrong with sparse training."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

import rigl_optax
from rigl_optax import _paths
from rigl_optax.training import methods
from rigl_optax.training.config import Config
from rigl_optax.training.state import TrainState

PyTree = Any


def training_record(
    config: Config, state: TrainState, expected: dict[str, int]
) -> tuple[dict[str, float], dict[str, str]]:
    """What to log about the steps since the last record, and what is wrong.

    Args:
      config: The run's.
      state: As it is now.
      expected: `{path: active weights}` at the start of the run.

    Returns:
      Values: mean `loss` and `accuracy` over the training batches since the last record, the
      `learning_rate` of the last step; and of a masked method `density` (of all parameters),
      `rewirings` so far, and `drop_fraction` at this step. Then `{kind: warning in words}`.
    """
    step, sums = jax.device_get((state.step, state.sums))
    values = {
        "loss": float(sums.loss / sums.examples),
        "accuracy": float(sums.correct / sums.examples),
        "learning_rate": float(methods.learning_rate(config)(step - 1)),
    }
    if not methods.find(config).masked:
        return values, {}
    active = active_weights(config, state)
    rewirings, healed = counters(state)
    values["density"] = sum(active.values()) / sum(x.size for x in jax.tree.leaves(state.params))
    values["rewirings"] = float(rewirings)
    if methods.find(config).rewires:
        values["drop_fraction"] = float(methods.drop_fraction(config)(step))
    return values, _warnings(
        config, int(step), rewirings, healed, int(sums.blind), active, expected
    )


def active_weights(config: Config, state: TrainState) -> dict[str, int]:
    """`{path: active weights}` for all leaves, dense ones in full; exact integers."""
    if not methods.find(config).masked:
        return {path: leaf.size for path, leaf in _paths.flatten_with_paths(state.params)}
    counts = jax.device_get(_count(rigl_optax.get_masks(state.opt_state)))
    return {path: int(count) for path, count in _paths.flatten_with_paths(counts)}


def counters(state: TrainState) -> tuple[int, int]:
    """`(rewirings, healed)` from the optimizer's state, wherever it holds them."""
    found = [optax.tree.get(state.opt_state, name) for name in ("rewirings", "healed")]
    rewirings, healed = jax.device_get(found)
    return int(rewirings), int(healed)


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
    if active != expected:
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
def _count(masks: PyTree) -> PyTree:
    return jax.tree.map(lambda mask: jnp.sum(mask, dtype=jnp.int32), masks)
