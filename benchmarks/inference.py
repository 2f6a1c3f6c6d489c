"""Times a forward pass of a sparse MLP in all its forms, beside dense in XLA and in PyTorch.

    python benchmarks/inference.py            # --widths=1024,1024,1024,1024 --batch=128

One network at a time, with single weights or blocks of 32x32 active at random, or with whole units
gone so that as many weights are left (`export.compact`). All forms take turns; medians are printed,
and how many times as fast as dense in XLA and in PyTorch each is. PyTorch is left out where it is
not installed; it uses as many threads as XLA.
"""

import argparse
import itertools
import math
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import rigl_optax
from rigl_optax import Block, condensed, export

BLOCK = Block(32, 32)


def dense_layers(widths: list[int], seed: int) -> list[dict[str, Any]]:
    """Draws kernels and biases."""
    rng = np.random.default_rng(seed)
    layers = []
    for n_in, n_out in itertools.pairwise(widths):
        kernel = rng.standard_normal((n_in, n_out)) / math.sqrt(n_in)
        layers.append({"kernel": kernel.astype(np.float32), "bias": np.ones(n_out, np.float32)})
    return layers


def forward(layers: list[dict[str, Any]], x_BxD: jax.Array) -> jax.Array:
    """Computes the MLP with kernels of any kind."""
    for i, layer in enumerate(layers):
        x_BxD = (jax.nn.relu(x_BxD) if i else x_BxD) @ layer["kernel"] + layer["bias"]
    return x_BxD


def masked(layers: list[dict[str, Any]], masks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sets inactive weights to zero."""
    return [
        layer | {"kernel": layer["kernel"] * np.asarray(mask["kernel"])}
        for layer, mask in zip(layers, masks, strict=True)
    ]


def random_masks(layers: list[dict[str, Any]], sparsity: float, structure: Any) -> Any:
    """Draws masks of a structure, of one sparsity in all layers."""
    distribution = rigl_optax.uniform(sparsity)
    tx = rigl_optax.static_sparse(optax.identity(), distribution, structure=structure, seed=1)
    return rigl_optax.get_masks(tx.init(layers))


def without_units(layers: list[dict[str, Any]], sparsity: float) -> list[dict[str, Any]]:
    """Cuts off hidden units until about as many weights are left, and removes them."""
    kept = math.sqrt(1 - sparsity)
    cut = [{name: x.copy() for name, x in layer.items()} for layer in layers]
    for below, above in itertools.pairwise(cut):
        below["kernel"][:, round(kept * below["kernel"].shape[1]) :] = 0
        below["bias"][round(kept * len(below["bias"])) :] = 0
        above["kernel"][round(kept * above["kernel"].shape[0]) :] = 0

    def describe(units: export.Units) -> None:
        x = units.inputs(len(layers[0]["kernel"]))
        for i in range(len(layers)):
            x = units.layer(units.relu(x) if i else x, str(i))
        units.outputs(x)

    return export.compact(cut, describe).params


def forms(layers: list[dict[str, Any]], sparsity: float) -> dict[str, Any]:
    """Makes the forms of the network, each for `forward`."""
    single = random_masks(layers, sparsity, rigl_optax.Unstructured())
    blocks = random_masks(layers, sparsity, BLOCK)
    found = {
        "CSR": condensed.bind(*condensed.condense_csr(masked(layers, single), single)),
        "blocks 32x32": condensed.bind(*condensed.condense(masked(layers, blocks), blocks, BLOCK)),
        "compacted": without_units(layers, sparsity),
    }
    return {"XLA dense": layers} | found


def in_pytorch(layers: list[dict[str, Any]], x: np.ndarray) -> Callable[[], Any] | None:
    """Returns the dense forward pass in PyTorch; None where it is not installed."""
    try:
        import torch
    except ImportError:
        return None
    torch.set_num_threads(os.cpu_count() or 1)
    parts: list[Any] = []
    for i, layer in enumerate(layers):
        linear = torch.nn.Linear(*layer["kernel"].shape)
        linear.weight.data = torch.from_numpy(layer["kernel"].T.copy())
        linear.bias.data = torch.from_numpy(layer["bias"].copy())
        parts += [torch.nn.ReLU(), linear] if i else [linear]
    network, batch = torch.nn.Sequential(*parts).eval(), torch.from_numpy(x)

    def call() -> Any:
        with torch.inference_mode():
            return network(batch)

    np.testing.assert_allclose(call().numpy(), forward(layers, jnp.asarray(x)), atol=1e-3)
    return call


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", default="1024,1024,1024,1024")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--sparsities", default="0.9,0.95,0.98")
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    widths = [int(n) for n in options.widths.split(",")]
    layers = dense_layers(widths, seed=0)
    x = np.random.default_rng(2).standard_normal((options.batch, widths[0])).astype(np.float32)
    print(f"MLP {options.widths}, batch {options.batch}, {os.cpu_count()} CPUs")
    print("| sparsity | form | ms | x dense XLA | x dense PyTorch |\n|---|---|---|---|---|")
    torch = in_pytorch(layers, x)
    for sparsity in map(float, options.sparsities.split(",")):
        calls: dict[str, Callable[[], Any]] = {} if torch is None else {"PyTorch dense": torch}
        for name, network in forms(layers, sparsity).items():
            compiled = jax.jit(forward)
            jax.block_until_ready(compiled(network, x))
            calls[name] = lambda f=compiled, n=network: jax.block_until_ready(f(n, x))
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(options.rounds):
            for name, call in calls.items():
                began = time.perf_counter()
                call()
                seconds[name].append(time.perf_counter() - began)
        median = {name: statistics.median(several) for name, several in seconds.items()}
        for name, spent in median.items():
            other = f"{median['PyTorch dense'] / spent:.1f}" if torch else ""
            ratio = median["XLA dense"] / spent
            print(f"| {100 * sparsity:g} % | {name} | {1e3 * spent:.3f} | {ratio:.1f} | {other} |")


if __name__ == "__main__":
    main()
