"""Times the rewiring of a sharded weight: threshold search on the shards, or gather and sort.

Run with `python benchmarks/sharded_update.py [--log2-weights 26] [--rounds 1]`. Eight CPU devices
in one process; a round of the default takes minutes of sorting.

Both sides take turns and the medians are divided. Ours is the whole optimizer update of a rewiring
step. Theirs only finds the new mask: it gathers magnitudes and gradients and sorts each once, by
value alone, so that it does not even break ties. Eight devices that share the cores of one machine
have the same ratio as eight real ones: there all devices do the same sort at the same time, and the
search takes the time of an eighth of the weight. The second line is the fingerprint that is
compared before a checkpoint (docs/scale.md).
"""

import argparse
import os
import statistics
import time
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import rigl_optax
from rigl_optax.training import fingerprint
from rigl_optax.training.mesh import DATA, PARAMS, Placement

DEVICES = 8
SPARSITY, FRACTION = 0.9, 0.3
jax.config.update("jax_num_cpu_devices", DEVICES)


def timed(function: Any, *args: Any) -> tuple[float, Any]:
    """Calls a function; returns the seconds it took and its result."""
    start = time.perf_counter()
    result = jax.block_until_ready(function(*args))
    return time.perf_counter() - start, result


def gather_and_sort(
    weight: jax.Array, mask: jax.Array, gradient: jax.Array, active: int, whole: NamedSharding
) -> jax.Array:
    """Finds the new mask as other implementations do, by gathering and sorting all scores."""

    def threshold(scores: jax.Array, k: int) -> jax.Array:
        gathered = jax.lax.with_sharding_constraint(scores.reshape(-1), whole)
        return jnp.sort(gathered)[scores.size - k]

    dropped = int(active * FRACTION)
    magnitude = jnp.where(mask, jnp.abs(weight), -1)
    kept = magnitude >= threshold(magnitude, active - dropped)
    growth = jnp.where(kept, -1, jnp.abs(gradient))
    return kept | (growth >= threshold(growth, dropped))


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--log2-weights", type=int, default=26)
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args()
    shape = (2 ** (args.log2_weights // 2), 2 ** (args.log2_weights - args.log2_weights // 2))
    mesh = jax.make_mesh((1, DEVICES), (DATA, PARAMS), axis_types=(AxisType.Auto,) * 2)
    placement = Placement(mesh)
    cut = placement.of(jax.ShapeDtypeStruct(shape, jnp.float32))
    whole = NamedSharding(mesh, PartitionSpec())

    def draw(seed: int) -> jax.Array:
        normal = jax.jit(lambda: jax.random.normal(jax.random.key(seed), shape), out_shardings=cut)
        return normal()

    tx = rigl_optax.rigl(
        optax.sgd(0.1),
        rigl_optax.uniform(SPARSITY),
        end=2**30,
        every=1,
        drop_fraction=rigl_optax.constant_drop_fraction(FRACTION),
    )
    params, grads = {"kernel": draw(0)}, {"kernel": draw(1)}
    state = tx.init(params)
    params = rigl_optax.apply_masks(params, state)
    mask = state.masks["kernel"]
    active = int(mask.sum())
    ours = jax.jit(tx.update).lower(grads, state, params).compile()
    theirs = (
        jax.jit(gather_and_sort, static_argnums=(3, 4), out_shardings=cut)
        .lower(params["kernel"], mask, grads["kernel"], active, whole)
        .compile()
    )

    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(args.rounds):
        elapsed, (_, new_state) = timed(ours, grads, state, params)
        times["ours"].append(elapsed)
        elapsed, new_mask = timed(theirs, params["kernel"], mask, grads["kernel"])
        times["theirs"].append(elapsed)
    fingerprints = jax.jit(lambda mask: fingerprint.table([mask], placement)).lower(mask).compile()
    hashing = statistics.median(timed(fingerprints, mask)[0] for _ in range(5))
    differing = int(jnp.sum(new_mask != new_state.masks["kernel"]))
    median = {name: statistics.median(found) for name, found in times.items()}
    print(
        f"{shape[0] * shape[1]:,} weights in {DEVICES} parts, {active:,} active: gather-and-sort / "
        f"search = {median['theirs'] / median['ours']:.1f} "
        f"(search {median['ours']:.2f} s, gather-and-sort {median['theirs']:.2f} s, median of "
        f"{args.rounds}; masks differ in {differing} entries, ties)"
    )
    print(f"fingerprint of the mask: {hashing / median['ours']:.3f} of the search")


if __name__ == "__main__":
    main()
