"""Counts the heads of a transformer, and the hidden units of its MLPs, that masks have cut off."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rigl_optax import _paths, analysis
from rigl_optax._xla import _sharding
from rigl_optax.models import transformer
from rigl_optax.training import stacks
from rigl_optax.training.representation import Entries
from rigl_optax.training.setup import Run
from rigl_optax.training.state import TrainState

DEAD_HEADS = "dead_heads"


class Part(NamedTuple):
    """An attention or an MLP of a model, or a stack of them.

    Attributes:
      path: Of the module.
      heads: Number of heads; 0 for an MLP.
      rotary: Whether queries and keys are rotated.
      inputs: Paths of the kernels into queries, keys and values, or into hidden units.
      output: Path of the kernel out of them.
      units: Outputs of each kernel in `inputs`, and inputs of that in `output`.
      depth: Length of the first axis of the kernels if that counts layers; else 0.
    """

    path: str
    heads: int
    rotary: bool
    inputs: tuple[str, ...]
    output: str
    units: int
    depth: int


def find(run: Run) -> tuple[Part, ...]:
    """Finds the attentions and MLPs of the model; none where it is no transformer."""
    model = nnx.merge(run.graphdef, run.shapes, run.abstract.model_state)
    shapes, stacked = dict(_paths.flatten_with_paths(run.shapes)), stacks.paths(run)
    found = []
    for at, module in nnx.iter_modules(model):
        path = "/".join(map(str, at))
        if isinstance(module, transformer.Attention):
            inputs, output = [f"{path}/qkv/kernel"], f"{path}/out/kernel"
            heads, rotary = module.heads, module.rotary
        elif isinstance(module, transformer.FeedForward):
            names = ("up", "gate") if module.gate is not None else ("up",)
            inputs, output = [f"{path}/{x}/kernel" for x in names], f"{path}/down/kernel"
            heads, rotary = 0, False
        else:
            continue
        units = shapes[output].shape[-2]
        depth = shapes[output].shape[0] if output in stacked else 0
        found.append(Part(path, heads, rotary, tuple(inputs), output, units, depth))
    return tuple(found)


def heads(parts: tuple[Part, ...]) -> dict[str, int]:
    """Returns the number of heads of each attention, by path as `dead` names them."""
    depth = {part: part.depth or () for part in parts if part.heads}
    found = {part.path: np.full(shape, part.heads) for part, shape in depth.items()}
    return {path: int(n) for path, n in stacks.by_layer(found).items()}


def dead(run: Run, parts: tuple[Part, ...], state: TrainState) -> dict[str, dict[str, int]]:
    """Counts the dead heads and hidden units of each layer of a masked run.

    Args:
      run: The run.
      parts: From `find`.
      state: Its state.

    Returns:
      `{measure: {path: number}}`, for the measures `dead_heads`, `averaging_heads` (see
      `rigl_optax.analysis`) and `dead_units` of MLPs; without those that no part has.
    """
    paths = {path for part in parts for path in (*part.inputs, part.output)}
    masks = dict(_paths.flatten_with_paths(run.representation.masks(state)))
    of = run.representation.entries(state)
    counted = jax.device_get(_count(parts, {p: masks[p] for p in paths}, {p: of[p] for p in paths}))
    return {
        measure: {path: int(n) for path, n in stacks.by_layer(found).items()}
        for measure, found in counted.items()
    }


@functools.partial(jax.jit, static_argnums=0)
def _count(
    parts: tuple[Part, ...], masks: dict[str, jax.Array], of: dict[str, Entries]
) -> dict[str, dict[str, jax.Array]]:
    counted: dict[str, dict[str, jax.Array]] = {}
    for part in parts:
        one = functools.partial(_count_one, part, of)
        each = [masks[path] for path in (*part.inputs, part.output)]
        for measure, number in stacks.for_each_layer(one, part.depth > 0)(*each).items():
            counted.setdefault(measure, {})[part.path] = number
    return counted


def _count_one(part: Part, of: dict[str, Entries], *masks: jax.Array) -> dict[str, jax.Array]:
    """Counts in one layer; masks are those of the kernels `inputs` and `output`."""
    units = 3 * part.units if part.heads else part.units
    into = [
        _expanded(analysis.fan_in(mask), of[path].outputs, units)
        for path, mask in zip(part.inputs, masks[:-1], strict=True)
    ]
    out_of = _expanded(analysis.fan_out(masks[-1]), of[part.output].inputs, part.units)

    def number(of_them: jax.Array) -> jax.Array:
        return jnp.sum(of_them, dtype=jnp.int32)

    if not part.heads:
        return {"dead_units": number(analysis.dead_hidden_units(into, out_of))}
    queries, keys, values = jnp.split(into[0], 3)
    is_dead = analysis.dead_heads(values, out_of, heads=part.heads)
    only_averages = analysis.averaging_heads(queries, keys, heads=part.heads, rotary=part.rotary)
    return {DEAD_HEADS: number(is_dead), "averaging_heads": number(only_averages & ~is_dead)}


def _expanded(counts: jax.Array, sizes: Any, units: int) -> jax.Array:
    """Gives each unit the count of its entry: a mask of blocks has an entry for several units."""
    counts = _sharding.whole(counts)
    if jnp.ndim(sizes) == 0:
        return counts
    return jnp.repeat(counts, sizes, total_repeat_length=units)
