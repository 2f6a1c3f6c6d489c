"""Times an ordinary optimizer step whose masks are one bit a weight in the state, or one byte.

    python benchmarks/mask_bits.py [--rounds 15]

A prototype of what is not in the library: `inner` sees masked gradients, its updates are masked,
and both masks are unpacked from bits within the step. The three ways take turns in one process on
the shapes of ResNet-50, with donated buffers; their medians are divided by plain Optax's.
`docs/accelerators.md` says what follows.
"""

import argparse
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import optax
import shapes
from update_overhead import compile_step, random_like, timed

from rigl_optax._xla import _bits, _blend

OPTIMIZERS = {
    "sgd momentum": lambda: optax.sgd(0.1, momentum=0.9),
    "adam": lambda: optax.adam(1e-3),
}


def masked(inner: optax.GradientTransformation, is_packed: bool) -> optax.GradientTransformation:
    """Masks gradients and updates of an optimizer; its masks are in the state, packed or not."""

    def init(params):
        rng = np.random.default_rng(2)
        masks = jax.tree.map(lambda x: jnp.asarray(rng.random(x.shape) < 0.1), params)
        stored = jax.tree.map(_bits.pack, masks) if is_packed else masks
        return stored, inner.init(params)

    def update(grads, state, params):
        stored, inner_state = state
        masks = stored
        if is_packed:
            masks = jax.tree.map(lambda s, g: _bits.unpack(s, g.shape), stored, grads)
        grads = jax.tree.map(_blend.masked, masks, grads)
        updates, inner_state = inner.update(grads, inner_state, params)
        # An inactive weight is led back to 0, as in the library.
        updates = jax.tree.map(lambda m, u, p: _blend.select(m, u, -p), masks, updates, params)
        return updates, (stored, inner_state)

    return optax.GradientTransformation(init, update)


def main() -> None:
    """Prints a line for each optimizer."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    print("   optimizer | masks | step x | bytes of masks | temporary bytes a weight")
    for name, optimizer in OPTIMIZERS.items():
        ways = {
            "none": optimizer(),
            "bytes": masked(optimizer(), is_packed=False),
            "bits": masked(optimizer(), is_packed=True),
        }
        grads = random_like(shapes.resnet50(), 1)
        weights = sum(x.size for x in jax.tree.leaves(grads))
        params = {way: random_like(shapes.resnet50(), 0) for way in ways}
        states = {way: tx.init(params[way]) for way, tx in ways.items()}
        steps = {way: compile_step(tx, params[way], states[way]) for way, tx in ways.items()}
        stored = {
            way: sum(x.nbytes for x in jax.tree.leaves(states[way][0])) if way != "none" else 0
            for way in ways
        }
        times: dict[str, list[float]] = {way: [] for way in ways}
        for number in range(rounds + 2):
            # The order alternates.
            for way in sorted(ways, reverse=number % 2 == 1):
                elapsed, (params[way], states[way]) = timed(
                    steps[way].step, params[way], states[way], grads
                )
                times[way].append(elapsed)
        median = {way: statistics.median(seconds[2:]) for way, seconds in times.items()}
        for way in ways:
            print(
                f"{name:>12} | {way:>5} | {median[way] / median['none']:>6.2f} | "
                f"{stored[way]:>14,} | {steps[way].temporary_bytes / weights:>6.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
