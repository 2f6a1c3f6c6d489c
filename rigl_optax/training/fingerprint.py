"""Compares what all devices hold, before checkpoints, by a few integers per leaf.

Every entry of a leaf gives a 32-bit word, hashed from its place in the leaf and its value, and the
words are added modulo 2**32. A sum of integers is the same in any order: so is the fingerprint,
however the leaf is cut up. Each device adds up what it holds itself. Parts that are repeated on
several devices or hosts must agree, in masks and in weights.

Before anything is computed, all processes compare their configs.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from rigl_optax import _paths
from rigl_optax.training import hosts
from rigl_optax.training.config import Config, flat, to_json
from rigl_optax.training.mesh import DATA, PARAMS, Placement
from rigl_optax.training.setup import Run
from rigl_optax.training.state import TrainState

PyTree = Any
Fingerprints = dict[str, int]
Compare = Callable[[TrainState], Fingerprints]

STEP = "step"
_WEIGHTS = "weights "  # in front of the path of a parameter
_OWN = ("data.dir", "data.threads")  # keys that may differ from process to process


class DivergenceError(RuntimeError):
    """Devices that should hold the same do not."""


def compare_configs(config: Config) -> None:
    """Checks that all processes have been given the same config; all of them call it.

    Raises:
      ValueError: On every process, if not: it names the keys and the values.
    """
    mine = {key: value for key, value in flat(to_json(config)).items() if key not in _OWN}
    first, *others = (json.loads(text) for text in hosts.all_say(json.dumps(mine)))
    for number, other in enumerate(others, start=1):
        changed = [
            f"config.{key} is {first.get(key)!r} on process 0 and {other.get(key)!r} on {number}"
            for key in sorted(set(first) | set(other))
            if first.get(key) != other.get(key)
        ]
        if changed:
            raise ValueError(f"{'; '.join(changed)}: all processes must have the same config")


def comparer(run: Run) -> Compare:
    """Makes a function that compares step, masks and weights across devices and hosts.

    All processes call it. It returns `{"step": ..., path of a mask: ...}`, integers from 0 to
    2**32 - 1 that do not depend on the mesh; of condensed kernels it compares the indices of
    their blocks, `path/rows` and `path/cols`, in place of masks. Weights are compared where there
    are several devices, and not returned: rounding depends on the mesh.

    Raises:
      DivergenceError: From that function, on every process, if devices disagree.
    """
    placement = run.placement
    compiled = placement.compile(lambda leaves: table(leaves, placement))

    def compare(state: TrainState) -> Fingerprints:
        leaves = {STEP: state.step, **run.representation.placement_of_weights(state)}
        if placement.mesh.size > 1:
            named = _paths.flatten_with_paths(state.params)
            leaves |= {_WEIGHTS + path: leaf for path, leaf in named}
        cut = {path: axis_of(placement, leaf) is not None for path, leaf in leaves.items()}
        found = agreed(np.asarray(compiled(list(leaves.values()))), cut, placement)
        return {path: word for path, word in found.items() if not path.startswith(_WEIGHTS)}

    return compare


def table(leaves: Sequence[jax.Array], placement: Placement) -> jax.Array:
    """Computes the fingerprint of what each device holds of each leaf; in a compiled function.

    Args:
      leaves: Bool arrays, or of 8, 16 or 32 bits, placed by the rule.
      placement: Where they are.

    Returns:
      uint32 (data, params, leaves), whole on every device.
    """
    axes = [axis_of(placement, leaf) for leaf in leaves]

    def own(parts: Sequence[jax.Array]) -> jax.Array:
        words = []
        for part, leaf, axis in zip(parts, leaves, axes, strict=True):
            start = jnp.uint32(0) if axis is None else lax.axis_index(PARAMS).astype(jnp.uint32)
            words.append(fingerprint(part, leaf.shape, axis, start))
        return jnp.stack(words)[None, None]

    specs = [sharding.spec for sharding in placement.of(list(leaves))]
    found = jax.shard_map(
        own, mesh=placement.mesh, in_specs=(specs,), out_specs=PartitionSpec(DATA, PARAMS)
    )(list(leaves))
    return placement.gather(found)


def fingerprint(
    part: jax.Array, shape: Sequence[int], axis: int | None = None, number: Any = 0
) -> jax.Array:
    """Sums the hashes of a part's entries: uint32 scalar.

    Args:
      part: Bool array, or of 8, 16 or 32 bits: the whole leaf, or one of equal parts of it.
      shape: Of the whole leaf.
      axis: Along which it is cut; None if it is whole.
      number: Of the part along that axis, uint32 scalar.
    """
    index = jnp.zeros(part.shape, jnp.uint32)
    for dimension, size in enumerate(part.shape):
        place = lax.broadcasted_iota(jnp.uint32, part.shape, dimension)
        if dimension == axis:
            place = place + jnp.asarray(number, jnp.uint32) * jnp.uint32(size)
        stride = math.prod(shape[dimension + 1 :]) % 2**32
        index = index + place * jnp.uint32(stride)
    return jnp.sum(_mixed(_mixed(index) + _words(part)), dtype=jnp.uint32)


def agreed(found: np.ndarray, cut: Mapping[str, bool], placement: Placement) -> Fingerprints:
    """Returns the fingerprint of each leaf, if all that hold a part of it agree on it.

    Args:
      found: From `table`.
      cut: Of each leaf whether it is cut along `params`; if not, it is whole on every device.
      placement: Where the leaves are.

    Raises:
      DivergenceError: It names the first leaf that differs, and who holds what.
    """
    fingerprints = {}
    for number, (path, is_cut) in enumerate(cut.items()):
        parts = found[:, :, number] if is_cut else found[:, :, number].reshape(-1, 1)
        devices = placement.mesh.devices.reshape(parts.shape)
        for part, holders in zip(parts.T, devices.T, strict=True):
            if len(set(part.tolist())) > 1:
                raise DivergenceError(_difference(path, part, holders))
        fingerprints[path] = int(parts[0].sum(dtype=np.uint64) % 2**32)
    return fingerprints


def axis_of(placement: Placement, leaf: jax.Array) -> int | None:
    """Returns the axis along which a leaf is cut; None if it is whole."""
    spec = placement.of(leaf).spec
    return spec.index(PARAMS) if PARAMS in spec else None


def _words(part: jax.Array) -> jax.Array:
    """Returns the bits of each entry as uint32: floats are compared bit for bit."""
    if jnp.issubdtype(part.dtype, jnp.inexact):
        unsigned = {16: jnp.uint16, 32: jnp.uint32}[jnp.finfo(part.dtype).bits]
        part = lax.bitcast_convert_type(part, unsigned)
    return part.astype(jnp.uint32)


def _mixed(x: jax.Array) -> jax.Array:
    """Mixes 32-bit words so that every bit depends on all: MurmurHash3's finalizer, a bijection."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _difference(path: str, part: np.ndarray, holders: np.ndarray) -> str:
    what = "the step" if path == STEP else f"the mask of {path!r}"
    if path.startswith(_WEIGHTS):
        what = f"the weights of {path.removeprefix(_WEIGHTS)!r}"
    are = "are" if path.startswith(_WEIGHTS) else "is"
    holders_of: dict[int, list[str]] = {}
    for word, device in zip(part.tolist(), holders, strict=True):
        holders_of.setdefault(word, []).append(f"{device.id} (process {device.process_index})")
    groups = [
        f"{word:#010x} on device {', '.join(names[:8])}{' and others' * (len(names) > 8)}"
        for word, names in sorted(holders_of.items(), key=lambda item: -len(item[1]))
    ]
    return (
        f"{what} {are} not the same everywhere: {'; '.join(groups)}. Nothing is saved; started "
        "again, the run goes on from the last checkpoint"
    )
