"""The parts of `benchmarks/accelerator.py`, which starts each in a process of its own.

python benchmarks/accelerator_parts.py PART ROWS.jsonl --seconds=60 [--tiny]

A part writes a row as soon as it has it. Where something fails, the row has `error` in place of its
figures, and the part goes on. What would not fit into its seconds any more is left out, and a row
says so. Times are medians over rounds in which all that is compared takes its turn; a column
`..._x` is a ratio of two of them.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib.metadata
import itertools
import json
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

PyTree = Any
ROOT = pathlib.Path(__file__).resolve().parents[1]
GB = 1e9


@dataclasses.dataclass
class Run:
    """Where a part writes its rows, how long it may take, and at which sizes it runs."""

    path: pathlib.Path
    seconds: float
    is_tiny: bool
    start: float = dataclasses.field(default_factory=time.monotonic)

    def left(self) -> float:
        """Returns the seconds that are left."""
        return self.seconds - (time.monotonic() - self.start)

    def write(self, name: str, **values: Any) -> None:
        """Appends a row."""
        row = json.dumps({"name": name, **values})
        with self.path.open("a") as file:
            file.write(row + "\n")
        print(row, flush=True)

    def attempt(self, name: str, needed: float, measure: Callable[[], dict[str, Any]]) -> None:
        """Writes the row that `measure` returns, or why there is none.

        Args:
          name: Of the row.
          needed: Seconds without which it is not tried.
          measure: Returns the figures.
        """
        if not self.is_tiny and self.left() < needed:
            self.write(name, left_out=f"{self.left():.0f} s left")
            return
        try:
            values = measure()
        except Exception as error:  # whatever a backend raises: the next row is tried all the same
            words = f"{type(error).__name__}: {error}".splitlines()[0]
            self.write(name, error=words[:300])
            return
        self.write(name, **values)


def devices(run: Run) -> None:
    """Versions, the devices, and how fast they copy and multiply."""
    import jax
    import jax.numpy as jnp

    def version(name: str) -> str:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return "none"

    names = ("jax", "jaxlib", "optax", "flax", "numpy")
    run.write("versions", python=platform.python_version(), **{n: version(n) for n in names})
    for device in jax.devices():
        limit = (device.memory_stats() or {}).get("bytes_limit", 0)
        kind = device.device_kind
        run.write("device", id=device.id, platform=device.platform, kind=kind, gb=limit / GB)

    size = 256 if run.is_tiny else 8192

    def multiply() -> dict[str, Any]:
        def chain(x: Any, w: Any) -> Any:
            return jax.lax.fori_loop(0, 10, lambda _, x: jnp.dot(x, w), x)

        x, w = normal(0, (size, size), jnp.bfloat16), normal(1, (size, size), jnp.bfloat16)
        w = w / size**0.5
        seconds = median_seconds({"dot": repeated(jax.jit(chain), x, w)}, run)["dot"] / 10
        return {"ms": 1e3 * seconds, "tflops": 2 * size**3 / seconds / 1e12}

    def copy() -> dict[str, Any]:
        x = jnp.zeros(size * size * 8, jnp.float32)
        seconds = median_seconds({"copy": repeated(jax.jit(lambda x: x + 1), x)}, run)["copy"]
        return {"ms": 1e3 * seconds, "gb_per_s": 2 * x.nbytes / seconds / GB}

    run.attempt(f"bf16 product of {size}x{size}", 1, multiply)
    run.attempt("float32 addition, read and written", 1, copy)


def core(run: Run) -> None:
    """Masks on the device against the CPU's, every method once, and products against NumPy."""
    import jax
    import numpy as np
    import optax

    import rigl_optax
    from tests.methods import combinations

    device, cpu = jax.devices()[0], jax.devices("cpu")[0]
    shapes = {"a": (64, 48), "b": (48, 40), "c": (40, 10), "bias": (40,)}
    if not run.is_tiny:
        shapes |= {"a": (784, 1024), "b": (1024, 1024), "d": (3, 3, 64, 128)}

    def tree(seed: int) -> PyTree:
        rng = np.random.default_rng(seed)
        return {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}

    def masks(tx: Any, on: Any, steps: int) -> tuple[PyTree, int]:
        with jax.default_device(on):
            params = jax.device_put(tree(0), on)
            state = jax.device_put(tx.init(params), on)
            params = jax.device_put(rigl_optax.apply_masks(params, state), on)

            @jax.jit
            def step(params: PyTree, state: PyTree, grads: PyTree) -> PyTree:
                updates, state = tx.update(grads, state, params)
                return optax.apply_updates(params, updates), state

            for t in range(steps):
                params, state = step(params, state, jax.device_put(tree(1 + t), on))
            return jax.device_get(state.masks), int(state.rewirings)

    # Factors that are powers of two: each value is rounded once on every device, whether it
    # contracts products and sums or not. So weights, and then masks, must be the same bits.
    inner = optax.sgd(2.0**-4, momentum=0.5)

    def compare(tx: Any, steps: int) -> dict[str, Any]:
        (here, rewirings), (there, _) = (masks(tx, on, steps) for on in (device, cpu))
        differing = sum(int((here[n] != there[n]).sum()) for n in shapes)
        entries = sum(x.size for x in here.values())
        return {
            "rewirings": rewirings,
            "entries": entries,
            "differing": differing,
            "as_promised": differing == 0,
        }

    rewirings = 4 if run.is_tiny else 20
    for structure in (rigl_optax.Unstructured(), rigl_optax.Block(8, 8, pad=True)):
        tx = rigl_optax.rigl(inner, rigl_optax.erk(0.9), end=10**4, every=2, structure=structure)
        name = f"rigl, {type(structure).__name__}, {device.platform} against cpu"
        run.attempt(name, 10, lambda tx=tx: compare(tx, 2 * rewirings))

    block_products(run)
    shapes = {"a": (64, 48), "b": (48, 40), "bias": (40,)}
    methods = list(combinations.METHODS.items())
    for name, make in methods[:4] if run.is_tiny else methods:
        tx = make(inner, rigl_optax.uniform(0.5))
        run.attempt(name, 3, lambda tx=tx: compare(tx, 3))


def block_products(run: Run) -> None:
    """Writes how far products of stored blocks on the device are from NumPy's in float64."""
    import jax.numpy as jnp

    size = 16 if run.is_tiny else 128
    for dtype in (jnp.float32, jnp.bfloat16):
        for form in forms():
            name = f"blocks of {size}, {jnp.dtype(dtype).name}, {form}"
            run.attempt(name, 5, lambda d=dtype, f=form: product_errors(run, size, d, f))


def mosaic_gpu(run: Run) -> None:
    """Kernels for GPUs that no device has run: against NumPy, then timed against `batched`.

    A part of its own, since a fault within a kernel ends the process. Other parts leave them out.
    """
    import jax.numpy as jnp

    if "mosaic_gpu" not in forms(is_untried=True):
        run.write("mosaic_gpu", left_out="not on this device")
        return
    sizes = (128, 64, 256)
    for size in sizes:
        run.attempt(
            f"blocks of {size}, bfloat16",
            5,
            lambda size=size: product_errors(run, size, jnp.bfloat16, "mosaic_gpu"),
        )
    tokens, width = 8192, 4096
    x = normal(0, (tokens, width), jnp.bfloat16)
    dense = product_steps(run, x, normal(1, (width, width), jnp.bfloat16), None)
    for size in sizes:
        for form in ("batched", "mosaic_gpu"):
            run.attempt(
                f"{width} wide, blocks of {size}, 0.9, {form}",
                6,
                lambda size=size, form=form: against_dense(run, dense, x, 0.9, size, form),
            )


def product_errors(run: Run, size: int, dtype: Any, form: str) -> dict[str, Any]:
    """Returns how far a product and its gradients are from NumPy's in float64."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from rigl_optax import Block
    from rigl_optax.condensed import (
        BlockSparse,
        products,
        random_topology,
        random_values,
    )

    width, tokens = (64, 24) if run.is_tiny else (1024, 512)
    topology = random_topology((width, width), 0.8, Block(size, size))

    @jax.jit
    def all_three(values: Any, x: Any, dy: Any) -> Any:
        def product(values: Any, x: Any) -> Any:
            return x @ BlockSparse(values, topology)

        y, pull = jax.vjp(product, values, x)
        return (y, *pull(dy))

    values = random_values(jax.random.key(0), topology).astype(dtype)
    x, dy = (normal(seed, (tokens, width), dtype) for seed in (1, 2))
    with products(forms(is_untried=True)[form]):
        y, dvalues, dx = jax.device_get(all_three(values, x, dy))
    w = np.asarray(topology.bind(values).dense(), np.float64)
    x64, dy64 = np.asarray(x, np.float64), np.asarray(dy, np.float64)
    stored = topology.extract(jnp.asarray(x64.T @ dy64, jnp.float32))
    exact = {"forward": x64 @ w, "dx": dy64 @ w.T, "dvalues": np.asarray(stored)}
    found = {"forward": y, "dx": dx, "dvalues": dvalues}
    worst = {
        name: float(np.abs(np.asarray(found[name], np.float64) - e).max() / e.std())
        for name, e in exact.items()
    }
    # bfloat16 has 8 bits; GPUs multiply float32 in the 10 bits of TF32 unless told otherwise.
    return {**worst, "as_promised": max(worst.values()) < 0.05}


def optimizer(run: Run) -> None:
    """The optimizer's step, ordinary and rewiring, against plain Optax, with memory."""
    import jax
    import jax.numpy as jnp
    import optax
    import shapes
    import update_overhead

    import rigl_optax

    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", 0)

    def compare(tree: PyTree, tx: Any) -> dict[str, Any]:
        weights = sum(x.size for x in jax.tree.leaves(tree))
        sparse_tx = rigl_optax.rigl(tx, rigl_optax.erk(0.9), end=10**6, every=100)
        grads = random_tree(1, tree)
        states, programs, memory = {}, {}, {}
        for kind, each in (("plain", tx), ("sparse", sparse_tx)):
            params = random_tree(0, tree)
            opt_state = jax.jit(each.init)(params)
            if kind == "sparse":
                params = jax.jit(rigl_optax.apply_masks, donate_argnums=0)(params, opt_state)
            compiled = update_overhead.compile_step(each, params, opt_state)
            states[kind], programs[kind] = (params, opt_state), compiled.step
            kept = sum(x.nbytes for x in jax.tree.leaves(states[kind]))
            memory |= {f"{kind}_state": kept, f"{kind}_temporary": compiled.temporary_bytes}

        def step(kind: str, count: int) -> None:
            params, opt_state = states[kind]
            if kind == "sparse":
                opt_state = opt_state._replace(count=jnp.int32(count))
            states[kind] = jax.block_until_ready(programs[kind](params, opt_state, grads))

        turns = {
            "plain": lambda: step("plain", 0),
            "ordinary": lambda: step("sparse", 50),
            "rewiring": lambda: step("sparse", 100),
        }
        seconds = median_seconds(turns, run)
        return {
            "weights": weights,
            "plain_ms": 1e3 * seconds["plain"],
            "ordinary_x": seconds["ordinary"] / seconds["plain"],
            "rewiring_x": seconds["rewiring"] / seconds["plain"],
            **{f"{name}_b_per_weight": size / weights for name, size in memory.items()},
        }

    sgd = optax.sgd(0.1, momentum=0.9)
    resnet = shapes.mlp(64, 32, 10) if run.is_tiny else shapes.resnet50()
    run.attempt("resnet50, sgd momentum", 20, lambda: compare(resnet, sgd))
    width, depth, symbols = (32, 1, 64) if run.is_tiny else (2048, 24, 50_257)
    # Two states of Adam, gradients, masks and the scores of a rewiring take about 60 bytes a
    # weight: on a small device the network has fewer blocks.
    fits = int((limit / 60 - symbols * width) / (12 * width**2)) if limit else depth
    tree = transformer_shapes(width, max(1, min(depth, fits)), symbols)
    name = f"transformer of width {width}, {len(tree['blocks'])} blocks, adam"
    run.attempt(name, 25, lambda: compare(tree, optax.adam(1e-3)))


def resnet50(run: Run) -> None:
    """Whole training steps of ResNet-50 in bfloat16, masked against dense."""
    import jax.numpy as jnp
    import optax
    from flax import nnx

    import rigl_optax
    from rigl_optax.models import resnet

    size, width, depth = (32, 0.25, 18) if run.is_tiny else (224, 1.0, 50)
    inner = optax.sgd(0.01, momentum=0.9, nesterov=True)
    layers = rigl_optax.erk(0.9, dense=rigl_optax.DenseLayers(resnet.dense_layers("erk")))

    def make() -> nnx.Module:
        return resnet.ResNet(
            (size, size, 3), 1000, width, depth=depth, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)
        )

    for batch in (4,) if run.is_tiny else (256, 64):
        inputs = normal(0, (batch, size, size, 3), jnp.float32), integers(1, (batch,), 1000)
        name = f"resnet{depth}, {size}x{size}, batch {batch}"
        run.attempt(name, 35, lambda i=inputs: masked_against_dense(run, make, i, inner, layers))


def gpt(run: Run) -> None:
    """Whole training steps of a GPT of 124 M weights in bfloat16, masked against dense."""
    import optax

    import rigl_optax
    from rigl_optax.models import transformer

    make, inputs = small_gpt(run)
    dense = rigl_optax.DenseLayers(transformer.dense_layers("uniform"))
    layers, inner = rigl_optax.uniform(0.9, dense=dense), optax.adamw(1e-3)
    name = f"gpt, batch and context {inputs[0].shape}"
    run.attempt(name, 20, lambda: masked_against_dense(run, make, inputs, inner, layers))


def products(run: Run) -> None:
    """Products of stored blocks against dense `jax.dot` in bfloat16."""
    import jax.numpy as jnp

    tokens = 32 if run.is_tiny else 8192
    sizes = (16,) if run.is_tiny else (128, 64, 256)
    widths = (64,) if run.is_tiny else (4096, 2048, 8192, 1024)
    sparsities = (0.9,) if run.is_tiny else (0.9, 0.95, 0.8, 0.98, 0.5)
    # What matters most comes first, since not all may fit into the time.
    cases = sorted(
        itertools.product(enumerate(sparsities), enumerate(sizes), enumerate(widths)),
        key=lambda case: sum(rank for rank, _ in case),
    )

    @functools.cache
    def dense(width: int) -> tuple[Any, dict[str, Callable[[], None]]]:
        x = normal(0, (tokens, width), jnp.bfloat16)
        return x, product_steps(run, x, normal(1, (width, width), jnp.bfloat16), None)

    for (_, sparsity), (_, size), (_, width) in cases:
        for form in forms():
            name = f"{width} wide, blocks of {size}, {sparsity}, {form}"
            run.attempt(
                name,
                6,
                lambda w=width, s=sparsity, b=size, f=form: against_dense(
                    run, dense(w)[1], dense(w)[0], s, b, f
                ),
            )


def forms(is_untried: bool = False) -> dict[str, dict[Any, str]]:
    """Returns the products that this device has, and a table that chooses each.

    Args:
      is_untried: Whether with kernels that no device has run; `mosaic_gpu` tries these alone.
    """
    import jax

    from rigl_optax.condensed import PRODUCTS, products

    device, found = jax.devices()[0], {}
    is_rocm = "rocm" in device.client.platform_version.lower()
    platform = {"gpu": "rocm" if is_rocm else "cuda"}.get(device.platform, device.platform)
    for name in PRODUCTS:
        if name == "mosaic_gpu" and not is_untried:
            continue
        table = {(platform, None, None): name}
        with contextlib.suppress(ValueError), products(table):
            found[name] = table
    return found


def product_steps(run: Run, x: Any, weight: Any, topology: Any) -> dict[str, Callable[[], None]]:
    """Makes calls that run a product many times: forward, with both gradients, with Adam.

    Each result is the next input, so that nothing can be left out. Inputs of later rounds are
    results of earlier ones.
    """
    import jax
    import jax.numpy as jnp
    import optax

    from rigl_optax import condensed

    repeats = 1 if run.is_tiny else 20
    tx = optax.adam(1e-6)

    def product(weight: Any, x: Any) -> Any:
        if topology is None:
            return jnp.dot(x, weight)
        return x @ condensed.BlockSparse(weight, topology)

    def both(weight: Any, x: Any) -> Any:
        y, pull = jax.vjp(product, weight, x)
        return pull(y)

    def forward(carry: Any) -> Any:
        x, weight, state = carry
        return product(weight, x), weight, state

    def gradients(carry: Any) -> Any:
        x, weight, state = carry
        dweight, dx = both(weight, x)
        return dx, weight - (1e-6 * dweight).astype(weight.dtype), state

    def adam(carry: Any) -> Any:
        x, weight, state = carry
        dweight, dx = both(weight.astype(x.dtype), x)
        updates, state = tx.update(dweight.astype(jnp.float32), state)
        return dx, weight + updates, state

    scale = weight.shape[-1] ** -0.5 if topology is None else 1.0
    weight = (scale * weight).astype(x.dtype)
    start = {
        "forward": (x, weight, ()),
        "gradients": (x, weight, ()),
        "adam": (x, weight.astype(jnp.float32), tx.init(weight.astype(jnp.float32))),
    }

    def many(step: Callable[[Any], Any]) -> Any:
        return jax.jit(lambda carry: jax.lax.fori_loop(0, repeats, lambda _, c: step(c), carry))

    steps = {"forward": forward, "gradients": gradients, "adam": adam}
    return {name: repeated(many(step), start[name]) for name, step in steps.items()}


def against_dense(
    run: Run, dense: dict[str, Callable[[], None]], x: Any, sparsity: float, size: int, form: str
) -> dict[str, Any]:
    """Times products of stored blocks and dense ones in turn; returns dense / stored."""
    import jax

    from rigl_optax import Block, condensed

    topology = condensed.random_topology((x.shape[1],) * 2, sparsity, Block(size, size))
    values = condensed.random_values(jax.random.key(0), topology).astype(x.dtype)
    steps = product_steps(run, x, values, topology)
    found: dict[str, Any] = {"density": topology.density}
    for name, step in steps.items():
        with condensed.products(forms(is_untried=True)[form]):
            seconds = median_seconds({"dense": dense[name], "stored": step}, run)
        found[f"{name}_x"] = seconds["dense"] / seconds["stored"]
    return found


def condensed(run: Run) -> None:
    """A GPT's block, and a whole GPT's step, with stored blocks against dense."""
    import condensed_models
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx

    import rigl_optax
    from rigl_optax.models import transformer

    width, tokens, size = (64, 16, 16) if run.is_tiny else (2048, 1024, 128)

    class OneBlock(nnx.Module):
        def __init__(self) -> None:
            self.blocks = transformer.Block(
                width,
                width // (16 if run.is_tiny else 128),
                4 * width,
                "gelu",
                is_causal=True,
                rotary=True,
                depth=1,
                dtype=jnp.bfloat16,
                rngs=nnx.Rngs(0),
            )

        def __call__(self, x: Any) -> Any:
            return self.blocks(x).astype(jnp.float32)

    batch = 2 if run.is_tiny else 8
    block_inputs = normal(0, (batch, tokens, width), jnp.bfloat16), integers(1, (batch, tokens), 9)
    whole, whole_inputs = small_gpt(run)
    networks = {
        f"one block of width {width}": (OneBlock, block_inputs),
        "gpt": (whole, whole_inputs),
    }
    dense = rigl_optax.DenseLayers(transformer.dense_layers("uniform"))
    block = rigl_optax.Block(size, size)

    def compare(make: Any, inputs: Any, sparsity: float, form: str) -> dict[str, Any]:
        case = condensed_models.Case(
            make, lambda rng: inputs, rigl_optax.adamw(1e-3), dense, optax.adamw(1e-3)
        )
        graphdef, params, rest = nnx.split(make(), nnx.Param, ...)
        params, rest = nnx.to_pure_dict(params), nnx.to_pure_dict(rest)
        found = condensed_models.topologies(params, case, sparsity, block)
        weights = rigl_optax.condensed.extract(params, found)
        tx = rigl_optax.condensed.rigl(case.inner, end=10**6)
        states = {
            "dense": (params, rest, case.plain.init(params)),
            "stored": (weights, rest, tx.init(weights, found)),
        }
        states = {kind: condensed_models.copy(state) for kind, state in states.items()}
        ordinary, rewires = condensed_models.steps(graphdef, tx)
        steps = {
            "dense": ("dense", condensed_models.dense_step(graphdef, case.plain)),
            "stored": ("stored", ordinary),
            "rewiring": ("stored", rewires),
        }
        batch = ((inputs[0],), inputs[1])
        turns, megabytes = {}, {}
        for name, (kind, step) in steps.items():
            with rigl_optax.condensed.products(forms()[form]):
                program, megabytes[name] = condensed_models.compiled(step, states[kind], *batch)

            def turn(kind: str = kind, program: Any = program) -> None:
                states[kind] = jax.block_until_ready(program(states[kind], *batch))

            turns[name] = turn
        seconds = median_seconds(turns, run)
        sizes = [sum(x.size for x in jax.tree.leaves(tree)) for tree in (weights, params)]
        return {
            "density": sizes[0] / sizes[1],
            "dense_ms": 1e3 * seconds["dense"],
            "times_as_fast": seconds["dense"] / seconds["stored"],
            "rewiring_in_dense_steps": seconds["rewiring"] / seconds["dense"],
            "dense_gb": megabytes["dense"] / 1e3,
            "stored_gb": megabytes["stored"] / 1e3,
        }

    for name, (make, inputs) in networks.items():
        for form in list(forms())[: 1 if run.is_tiny else None]:
            label = f"{name}, blocks of {size}, 0.9, {form}"
            run.attempt(label, 15, lambda m=make, i=inputs, f=form: compare(m, i, 0.9, f))


def train(run: Run) -> None:
    """`make train` with one seed: training runs on real data. Needs the `train` extra."""
    with tempfile.TemporaryDirectory() as workdir:
        command = [
            *(sys.executable, "scripts/compare.py", "--config=configs/digits_lenet.py"),
            *(f"--workdir={workdir}", "--seeds=1", "--nocurves"),
        ]
        if run.is_tiny:
            command += ["--methods=dense,rigl", "--config.steps=100", "--config.eval.every=100"]
            command += ["--config.checkpoint.every=0"]
        start = time.monotonic()
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        print(found.stdout, found.stderr, flush=True)
        if found.returncode:
            lines = found.stderr.strip().splitlines() or ["no output"]
            run.write("make train, one seed", error=lines[-1][:300])
            return
        seconds = time.monotonic() - start
        for record in json.loads((pathlib.Path(workdir) / "summary.json").read_text()):
            scores = {key: value for key, value in record.items() if key.startswith("test_")}
            run.write(record["method"], sparsity=record["sparsity"], **scores)
        run.write("make train, one seed", seconds=seconds)


def masked_against_dense(
    run: Run, make: Callable[[], Any], inputs: tuple[Any, Any], inner: Any, layers: Any
) -> dict[str, Any]:
    """Times whole training steps of RigL and of the plain optimizer in turn."""
    import jax
    import jax.numpy as jnp
    import vision_step
    from flax import nnx

    import rigl_optax

    graphdef, params, rest = nnx.split(make(), nnx.Param, ...)
    params, rest = nnx.to_pure_dict(params), nnx.to_pure_dict(rest)
    sparse = rigl_optax.rigl(inner, layers, end=10**6, every=100)
    states, programs, temporary = {}, {}, {}
    for kind, tx in (("dense", inner), ("masked", sparse)):
        own, opt_state = jax.tree.map(jnp.copy, params), tx.init(params)
        if kind == "masked":
            own = rigl_optax.apply_masks(own, opt_state)
        states[kind] = vision_step.Trained(own, jax.tree.map(jnp.copy, rest), opt_state)
        lowered = vision_step.make_step(graphdef, tx).lower(states[kind], *inputs)
        programs[kind] = lowered.compile()
        temporary[kind] = programs[kind].memory_analysis().temp_size_in_bytes

    def step(kind: str, count: int) -> None:
        state = states[kind]
        if kind == "masked":
            state = state._replace(opt_state=state.opt_state._replace(count=jnp.int32(count)))
        states[kind] = jax.block_until_ready(programs[kind](state, *inputs))

    turns = {
        "dense": lambda: step("dense", 0),
        "ordinary": lambda: step("masked", 50),
        "rewiring": lambda: step("masked", 100),
    }
    seconds = median_seconds(turns, run)
    return {
        "weights": sum(x.size for x in jax.tree.leaves(params)),
        "dense_ms": 1e3 * seconds["dense"],
        "ordinary_x": seconds["ordinary"] / seconds["dense"],
        "rewiring_x": seconds["rewiring"] / seconds["dense"],
        "dense_temporary_gb": temporary["dense"] / GB,
        "masked_temporary_gb": temporary["masked"] / GB,
    }


def small_gpt(run: Run) -> tuple[Callable[[], Any], tuple[Any, Any]]:
    """Returns a maker of a GPT of 124 M weights in bfloat16, and tokens with their labels."""
    import jax.numpy as jnp
    from flax import nnx

    from rigl_optax.models import transformer

    embedding, depth, symbols = (64, 1, 64) if run.is_tiny else (768, 12, 50_304)
    batch, context = (2, 16) if run.is_tiny else (8, 1024)

    def make() -> nnx.Module:
        return transformer.GPT(
            embedding=embedding,
            depth=depth,
            heads=embedding // (16 if run.is_tiny else 64),
            vocabulary=symbols,
            context=context,
            tied=True,
            dtype=jnp.bfloat16,
            rngs=nnx.Rngs(0),
        )

    shape = (batch, context)
    return make, (integers(0, shape, symbols), integers(1, shape, symbols))


def transformer_shapes(width: int, depth: int, symbols: int) -> PyTree:
    """Returns the shapes of a GPT without biases: 1.3 billion weights at 2048, 24 and 50,257."""
    import jax
    import jax.numpy as jnp

    kernels = {
        "qkv": (width, 3 * width),
        "out": (width, width),
        "up": (width, 4 * width),
        "down": (4 * width, width),
    }

    def shaped(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    block = {name: {"kernel": shaped(shape)} for name, shape in kernels.items()}
    block |= {norm: {"scale": shaped((width,))} for norm in ("norm1", "norm2")}
    return {
        "embedding": {"embedding": shaped((symbols, width))},
        "blocks": {f"{i:02}": block for i in range(depth)},
    }


def normal(seed: int, shape: tuple[int, ...], dtype: Any) -> Any:
    """Draws a standard normal array on the device."""
    import jax

    return jax.random.normal(jax.random.key(seed), shape, "float32").astype(dtype)


def integers(seed: int, shape: tuple[int, ...], bound: int) -> Any:
    """Draws integers below a bound."""
    import jax

    return jax.random.randint(jax.random.key(seed), shape, 0, bound)


def random_tree(seed: int, tree: PyTree) -> PyTree:
    """Draws normal arrays of the shapes in `tree`, on the device."""
    import jax

    @jax.jit
    def draw() -> PyTree:
        leaves, structure = jax.tree.flatten(tree)
        keys = jax.random.split(jax.random.key(seed), len(leaves))
        drawn = [0.05 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
        return jax.tree.unflatten(structure, drawn)

    return draw()


def repeated(function: Callable[..., Any], *args: Any) -> Callable[[], None]:
    """Makes a call that waits for its result."""
    import jax

    def call() -> None:
        jax.block_until_ready(function(*args))

    return call


def median_seconds(turns: dict[str, Callable[[], None]], run: Run) -> dict[str, float]:
    """Lets all take turns, in alternating order, and returns the median seconds of each.

    The first call of each compiles, and is not counted, nor is the second.
    """
    found: dict[str, list[float]] = {name: [] for name in turns}
    for i in range(3 if run.is_tiny else 12):
        for name in sorted(turns, reverse=i % 2 == 1):
            start = time.perf_counter()
            turns[name]()
            if i >= (1 if run.is_tiny else 2):
                found[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in found.items()}


PARTS = {
    part.__name__: part
    for part in (devices, core, mosaic_gpu, optimizer, resnet50, gpt, products, condensed, train)
}


def main() -> None:
    """Runs one part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("rows", type=pathlib.Path)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    PARTS[options.part](Run(options.rows, options.seconds, options.tiny))


if __name__ == "__main__":
    main()
