"""Measures what Adam does to the weights that a rewiring grows, in a small GPT trained by RigL.

    python -m benchmarks.newborn_weights [--seeds 3] [--steps 2400] [--figure FILE.png]

90 % sparse, ERK, b2 = 0.999, the rate that is best by `transformer_rates`, a rewiring of 30 % every
50 steps until nine tenths of the run. After a rewiring it follows the loss on the same 8,192
validation bytes for some steps, over its value just before, and how far newborn and other weights
move in the first step, in learning rates. Only rewirings of the second half of the run count: by
then Adam's bias correction is nearly gone, as it is for most of a real run. Finished runs are kept
in a JSON file and not made again. About a minute a run on one quiet core.
"""

import argparse
import json
import pathlib
import statistics
from typing import Any

import jax
import matplotlib
import numpy as np
import optax
from matplotlib.figure import Figure

import rigl_optax
from benchmarks import small_gpt

PyTree = Any
EVERY, SPARSITY, RATE, B2 = 50, 0.9, 0.04, 0.999
BASE_WIDTH = 16
FOLLOWED = (1, 2, 3, 5, 8, 12, 20, 30, 45)
RESULTS = pathlib.Path(__file__).parents[1] / "results" / "newborn_weights.json"


def _adam(**arguments: Any) -> optax.GradientTransformation:
    return rigl_optax.scale_by_adam(b2=B2, **arguments)


# What new weights start from: the optimizer's core, the option of RigL, and how it is drawn.
STARTS = {
    "at rest": (optax.scale_by_adam(b2=B2), "rest", "#D55E00", "o"),
    "mean second moment": (optax.scale_by_adam(b2=B2), "mean_second_moment", "#0072B2", "^"),
    "count per weight": (_adam(warmup=0), "rest", "#E69F00", "D"),
    "count per weight, warm-up of 20": (_adam(warmup=20), "rest", "#009E73", "s"),
}


def run(start: str, seed: int, steps: int) -> dict[str, Any]:
    """Trains, and returns the spikes by steps since a rewiring, the moves and the final loss."""
    core, option, _, _ = STARTS[start]
    params, loss = small_gpt.initial(seed)
    layers, end = rigl_optax.erk(SPARSITY, dense=small_gpt.DENSE), steps * 9 // 10
    factors = rigl_optax.mupar_factors(params, layers, small_gpt.WIDTH / BASE_WIDTH)

    def schedule(t: Any) -> jax.Array:
        return RATE * small_gpt.rate(t + 1, steps)

    inner = optax.chain(
        optax.clip_by_global_norm(1.0),
        core,
        optax.add_decayed_weights(0.1, mask=lambda p: jax.tree.map(lambda w: w.ndim >= 2, p)),
        optax.scale_by_learning_rate(schedule),
        rigl_optax.scale_by_factors(factors),
    )
    params = jax.tree.map(lambda w, f: w * f**0.5, params, factors)
    tx = rigl_optax.rigl(
        inner,
        layers,
        end=end,
        every=EVERY,
        grown=rigl_optax.Grown(optimizer_state=option),
        seed=seed,
    )
    state = tx.init(params)
    params = rigl_optax.apply_masks(params, state)

    @jax.jit
    def step(params: PyTree, state: PyTree, tokens: jax.Array) -> tuple[PyTree, PyTree]:
        updates, state = tx.update(jax.grad(loss)(params, tokens), state, params)
        return optax.apply_updates(params, updates), state

    judge = jax.jit(loss)
    fixed = small_gpt.validation(64)
    rng = np.random.default_rng(seed)
    spikes: dict[int, list[float]] = {after: [] for after in FOLLOWED}
    moves: dict[str, list[float]] = {"new": [], "others": []}
    before, old_masks = None, None
    for t in range(steps):
        since = t % EVERY
        watched = steps // 2 <= t - since < end
        if watched and since == 0:
            before = float(judge(params, fixed))
            old_masks = jax.device_get(state.masks)
        old = params
        tokens = small_gpt.windows(small_gpt.data().train.tokens, rng, small_gpt.BATCH)
        params, state = step(params, state, tokens)
        if watched and since in FOLLOWED:
            spikes[since].append(float(judge(params, fixed)) - before)
        if watched and since == 1:
            rates = jax.tree.map(lambda f: f * float(schedule(t)), factors)  # noqa: B023
            moved = _moves(old, params, old_masks, state.masks, rates)
            for kind, size in moved.items():
                moves[kind].append(size)
    return {
        "spikes": {after: statistics.mean(found) for after, found in spikes.items()},
        "moves": {kind: statistics.mean(found) for kind, found in moves.items()},
        "loss": float(judge(params, small_gpt.validation(512))),
    }


def _moves(
    old: PyTree, new: PyTree, before: PyTree, after: PyTree, rates: PyTree
) -> dict[str, float]:
    """Returns the mean absolute moves of newborn and of other weights, in learning rates.

    None of newborn ones where none grew: the last rewirings drop next to nothing.
    """
    totals = np.zeros((2, 2))
    trees = (old, new, before, after, rates)
    for w, v, m, n, rate in zip(*(map(np.asarray, jax.tree.leaves(x)) for x in trees), strict=True):
        if n.all():
            continue  # a dense layer
        for row, where in enumerate((n & ~m, n & m)):
            totals[row] += np.abs(v - w)[where].sum() / rate, where.sum()
    kinds = zip(("new", "others"), totals, strict=True)
    return {kind: float(moved / weights) for kind, (moved, weights) in kinds if weights}


def figure(results: dict[str, list[dict[str, Any]]], path: pathlib.Path) -> None:
    """Draws the loss over that before a rewiring against the steps since: means and ranges."""
    drawn = Figure(figsize=(7, 4.2), layout="constrained")
    axis = drawn.subplots()
    for start, runs in results.items():
        _, _, colour, marker = STARTS[start]
        lines = np.array([[r["spikes"][str(after)] for after in FOLLOWED] for r in runs])
        axis.plot(FOLLOWED, lines.mean(0), color=colour, marker=marker, ms=4, label=start)
        axis.fill_between(FOLLOWED, lines.min(0), lines.max(0), color=colour, alpha=0.15, lw=0)
    axis.axhline(0, color="#888888", lw=0.8)
    axis.set_xlabel("steps after a rewiring")
    axis.set_ylabel("bits per byte, minus those just before it")
    axis.set_title(f"What newborn weights start from: GPT, RigL {SPARSITY:.0%}, Adam b2 = {B2}")
    axis.grid(alpha=0.3)
    axis.legend(frameon=True)
    drawn.savefig(path, dpi=150, metadata={"Software": f"matplotlib {matplotlib.__version__}"})


def main() -> None:
    """Makes the runs that are missing, prints the table and draws the figure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2_400)
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--figure", type=pathlib.Path)
    options = parser.parse_args()
    results: dict[str, list[dict[str, Any]]] = {start: [] for start in STARTS}
    if options.results.exists():
        results |= json.loads(options.results.read_text())
    for seed in range(options.seeds):
        for start in STARTS:
            if len(results[start]) <= seed:
                results[start].append(run(start, seed, options.steps))
                options.results.write_text(json.dumps(results, indent=1) + "\n")
                results = json.loads(options.results.read_text())
            print(f"seed {seed}, {start}: {results[start][seed]['loss']:.3f}", flush=True)
    print("| new weights start | spike at +1 | at +20 | move at +1: new | others | final loss |")
    for start, runs in results.items():
        columns = [
            [r["spikes"]["1"] for r in runs],
            [r["spikes"]["20"] for r in runs],
            [r["moves"]["new"] for r in runs],
            [r["moves"]["others"] for r in runs],
            [r["loss"] for r in runs],
        ]
        signs = ("+.3f", "+.3f", ".2f", ".2f", ".3f")
        cells = [
            f"{statistics.mean(c):{s}} ± {_spread(c):.3f}"
            for c, s in zip(columns, signs, strict=True)
        ]
        print(f"| {start} | " + " | ".join(cells) + " |")
    if options.figure is not None:
        figure(results, options.figure)
        print(f"wrote {options.figure}")


def _spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


if __name__ == "__main__":
    main()
