"""Finds the best Adam rate of a small GPT at several sparsities, standard and scaled (muPar).

    python -m benchmarks.transformer_rates [--seeds 1] [--steps 600] [--figure FILE.png]

Scaled: the rate of each sparse layer times f = 16 / (width * density), its initial values times
sqrt(f). Static masks, ERK, AdamW with a warm-up and a cosine. A run is in bits per byte of the same
65,536 validation bytes. Each run's result is kept in a JSON file as soon as it is there, and not
made again. About 15 seconds a run on one quiet core.
"""

import argparse
import itertools
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
BASE_WIDTH = 16
SPARSITIES = (0.0, 0.8, 0.9, 0.95)
RATES = (0.0025, 0.005, 0.01, 0.02, 0.04, 0.08)
KINDS = ("standard", "scaled")
RESULTS = pathlib.Path(__file__).parents[1] / "results" / "gpt_rates.json"
COLOURS = ("#000000", "#E69F00", "#0072B2", "#009E73")
MARKERS = "so^D"


def run(kind: str, sparsity: float, rates: list[float], seed: int, steps: int) -> list[float]:
    """Trains with each rate, and returns validation losses in bits per byte."""
    fresh, loss = small_gpt.initial(seed)
    layers = rigl_optax.erk(sparsity, dense=small_gpt.DENSE)
    factors = jax.tree.map(lambda leaf: 1.0, fresh)
    if kind == "scaled":
        factors = rigl_optax.mupar_factors(fresh, layers, small_gpt.WIDTH / BASE_WIDTH)
    inner = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(1.0, b2=0.95, weight_decay=0.1, mask=lambda p: jax.tree.map(_is_kernel, p)),
        rigl_optax.scale_by_factors(factors),
    )
    tx = rigl_optax.static_sparse(inner, layers, seed=seed)

    @jax.jit
    def step(params: PyTree, state: PyTree, tokens: jax.Array, rate: jax.Array) -> Any:
        grads = jax.grad(loss)(params, tokens)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, jax.tree.map(lambda u: rate * u, updates)), state

    found = []
    for rate in rates:
        params = jax.tree.map(lambda w, f: w * f**0.5, fresh, factors)
        state = tx.init(params)
        params = rigl_optax.apply_masks(params, state)
        rng = np.random.default_rng(seed)
        for t in range(steps):
            tokens = small_gpt.windows(small_gpt.data().train.tokens, rng, small_gpt.BATCH)
            params, state = step(params, state, tokens, rate * small_gpt.rate(t + 1, steps))
        found.append(float(jax.jit(loss)(params, small_gpt.validation(512))))
    return found


def _is_kernel(leaf: jax.Array) -> bool:
    return leaf.ndim >= 2


def figure(results: dict[str, list[float]], path: pathlib.Path, steps: int) -> None:
    """Draws loss against rate: a panel for each kind, a line for each sparsity."""
    drawn = Figure(figsize=(9, 4.2), layout="constrained")
    axes = drawn.subplots(1, len(KINDS), sharey=True)
    means = {key: statistics.mean(values) for key, values in results.items()}
    top = min(means.values()) + 1.0
    for axis, kind in zip(axes, KINDS, strict=True):
        for sparsity, colour, marker in zip(SPARSITIES, COLOURS, MARKERS, strict=True):
            losses = [means[_key(kind, sparsity, rate)] for rate in RATES]
            at = int(np.argmin(losses))
            shown = [x if x < top else np.nan for x in losses]
            label = "dense" if not sparsity else f"{sparsity:.0%} sparse"
            axis.plot(RATES, shown, color=colour, marker=marker, ms=4, label=label)
            axis.plot(RATES[at], losses[at], marker="*", ms=14, color=colour)
        axis.set_xscale("log")
        axis.set_xticks(RATES, [f"{rate:g}" for rate in RATES])
        axis.minorticks_off()
        axis.set_title("one rate for all layers" if kind == "standard" else "by width and density")
        axis.set_xlabel("learning rate")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("validation bits per byte")
    axes[0].legend(frameon=True)
    drawn.suptitle(f"GPT of width {small_gpt.WIDTH}, static masks, {steps} steps; stars: the best")
    drawn.savefig(path, dpi=150, metadata={"Software": f"matplotlib {matplotlib.__version__}"})


def _key(kind: str, sparsity: float, rate: float) -> str:
    return f"{kind} {sparsity:g} {rate:g}"


def main() -> None:
    """Makes the runs that are missing, prints the table and draws the figure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--figure", type=pathlib.Path)
    options = parser.parse_args()
    results: dict[str, list[float]] = {}
    if options.results.exists():
        results = json.loads(options.results.read_text())
    for seed, sparsity, kind in itertools.product(range(options.seeds), SPARSITIES, KINDS):
        keys = {rate: _key(kind, sparsity, rate) for rate in RATES}
        missing = [rate for rate, key in keys.items() if len(results.get(key, [])) <= seed]
        for rate, loss in zip(
            missing,
            run(kind, sparsity, missing, seed, options.steps) if missing else [],
            strict=True,
        ):
            results.setdefault(keys[rate], []).append(round(loss, 4))
        options.results.write_text(json.dumps(results, indent=1) + "\n")
        row = " ".join(f"{results[key][seed]:.3f}" for key in keys.values())
        print(f"seed {seed}, {kind:>8} {sparsity:4.0%}: {row}", flush=True)
    print("| | " + " | ".join(f"{rate:g}" for rate in RATES) + " |")
    for kind, sparsity in itertools.product(KINDS, SPARSITIES):
        means = [statistics.mean(results[_key(kind, sparsity, rate)]) for rate in RATES]
        cells = [f"**{x:.3f}**" if x == min(means) else f"{x:.3f}" for x in means]
        print(f"| {kind}, {sparsity:.0%} | " + " | ".join(cells) + " |")
    if options.figure is not None:
        figure(results, options.figure, options.steps)
        print(f"wrote {options.figure}")


if __name__ == "__main__":
    main()
