"""Times a forward pass of a sparse MLP in all its forms, beside dense in XLA and in PyTorch.

Run with `make bench-inference`, which puts PyTorch into a virtual environment of its own, or

    python benchmarks/inference.py --torch-python=.venv-torch/bin/python [--batch=128]

One network at a time, with single weights or blocks of 32x32 active at random, or with whole units
gone so that as many weights are left (`export.compact`). All forms take turns, PyTorch in a process
of its own, and the first call of a turn is not counted. Prints the median of each, and medians and
quartiles, over the rounds, of how many times as fast as dense in XLA and in PyTorch it is. Both use
as many threads as there are CPUs. Leave the machine alone meanwhile.
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import pathlib
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

import rigl_optax
from rigl_optax import Block, condensed, export

BLOCK = Block(32, 32)
CALLS = 5  # of a turn, besides the first
Turn: TypeAlias = Callable[[int], list[float]]  # from a number of calls to the seconds of each


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


@contextlib.contextmanager
def in_pytorch(
    python: str | None, layers: list[dict[str, Any]], x: np.ndarray
) -> Iterator[tuple[str, Turn] | None]:
    """Starts PyTorch, and checks that it computes the same; yields its version and its turns."""
    if python is None:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "network.npz"
        arrays = {f"{n}_{i}": value for i, each in enumerate(layers) for n, value in each.items()}
        np.savez(file, x=x, **arrays)
        script = pathlib.Path(__file__).with_name("inference_torch.py")
        with subprocess.Popen(
            [python, str(script), str(file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as child:
            assert child.stdin is not None and child.stdout is not None
            asked, answers = child.stdin, child.stdout
            version, outputs = json.loads(answers.readline())
            np.testing.assert_allclose(outputs, forward(layers, jnp.asarray(x)), atol=1e-3)

            def turn(calls: int) -> list[float]:
                asked.write(f"{calls}\n")
                asked.flush()
                return json.loads(answers.readline())

            yield version, turn
            asked.close()


def in_xla(network: Any, x: np.ndarray) -> Turn:
    """Compiles a form; returns its turns."""
    compiled = jax.jit(forward)
    jax.block_until_ready(compiled(network, x))

    def turn(calls: int) -> list[float]:
        seconds = []
        for _ in range(calls):
            began = time.perf_counter()
            jax.block_until_ready(compiled(network, x))
            seconds.append(time.perf_counter() - began)
        return seconds

    return turn


def spread(ratios: list[float]) -> str:
    """Writes median and quartiles."""
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.1f} ({low:.1f} to {high:.1f})"


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", default="1024,1024,1024,1024")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--sparsities", default="0.9,0.95,0.98")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--torch-python", help="a Python with PyTorch; left out if not given")
    options = parser.parse_args()
    widths = [int(n) for n in options.widths.split(",")]
    layers = dense_layers(widths, seed=0)
    x = np.random.default_rng(2).standard_normal((options.batch, widths[0])).astype(np.float32)
    load = os.getloadavg()[0]
    with in_pytorch(options.torch_python, layers, x) as torch:
        version = f", PyTorch {torch[0]}" if torch else ""
        print(f"MLP {options.widths}, batch {options.batch}, {os.cpu_count()} CPUs, load {load}")
        print(f"JAX {jax.__version__}{version}; medians, quartiles in brackets\n")
        heads = ["sparsity", "form", "ms", "x dense XLA", *(["x dense PyTorch"] if torch else [])]
        print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
        for sparsity in map(float, options.sparsities.split(",")):
            turns = {name: in_xla(form, x) for name, form in forms(layers, sparsity).items()}
            if torch:
                turns["PyTorch dense"] = torch[1]
            seconds: dict[str, list[float]] = {name: [] for name in turns}
            for _ in range(options.rounds):
                for name, turn in turns.items():
                    seconds[name].append(statistics.median(turn(1 + CALLS)[1:]))
            for name, spent in seconds.items():
                cells = [f"{100 * sparsity:g} %", name, f"{1e3 * statistics.median(spent):.3f}"]
                for dense in ("XLA dense", "PyTorch dense"):
                    if dense in seconds:
                        pairs = zip(seconds[dense], spent, strict=True)
                        cells.append(spread([of / own for of, own in pairs]))
                print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
