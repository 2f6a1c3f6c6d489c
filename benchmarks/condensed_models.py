"""Times training steps of MobileNet-v1, wide ResNets, GRUs and GPTs, condensed against dense.

    python benchmarks/condensed_models.py [--only gru512] [--sparsities .9,.95] [--blocks 32x32]

Forward, backward and update, with the recipe's optimizer; the dense side is the same model without
sparsity. Kernels that the paper keeps dense are dense in both. Both take turns; medians, the
median of the ratios, the time of a rewiring and the megabytes that XLA plans for an ordinary step
are printed. Densities are of all parameters: a layer of few blocks cannot have exactly the
sparsity that was asked for. Set
`GLIBC_TUNABLES=glibc.malloc.hugetlb=1` to allocate memory as `rigl-optax train` does.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import rigl_optax
from rigl_optax import _paths, condensed
from rigl_optax.models import mobilenet_v1, recurrent, transformer, wide_resnet

PyTree = Any


class Case(NamedTuple):
    """Makers of a model and of its batch, the optimizer, and a predicate of dense kernels.

    `plain` is the optimizer of the dense side, where it is another one.
    """

    make: Callable[[], nnx.Module]
    batch: Callable[[np.random.Generator], tuple[jax.Array, ...]]
    inner: optax.GradientTransformation
    dense: Any
    plain: optax.GradientTransformation | None = None


def _images(size: int, batch: int, classes: int) -> Any:
    return lambda rng: (
        jnp.asarray(rng.random((batch, size, size, 3), np.float32)),
        jnp.asarray(rng.integers(0, classes, batch)),
    )


def _text(lanes: int, length: int) -> Any:
    return lambda rng: (
        jnp.asarray(rng.integers(0, 256, (lanes, length)), jnp.uint8),
        jnp.asarray(rng.integers(0, 256, (lanes, length))),
    )


def _gru(units: int) -> Case:
    def make() -> nnx.Module:
        return recurrent.StreamingLM("gru", (units,), fused=False, lanes=32, rngs=nnx.Rngs(0))

    return Case(make, _text(32, 64), optax.adam(7e-4), rigl_optax.default_dense)


def _gpt(width: int) -> Case:
    def make() -> nnx.Module:
        return transformer.GPT(
            embedding=width, depth=4, heads=width // 64, context=256, parts=8, rngs=nnx.Rngs(0)
        )

    def optimizer(adamw: Any) -> optax.GradientTransformation:
        def kernels(params: PyTree) -> PyTree:
            return jax.tree.map(lambda x: x.ndim >= 2, params)

        decaying = adamw(1e-3, b2=0.95, weight_decay=0.1, mask=kernels)
        return optax.chain(optax.clip_by_global_norm(1.0), decaying)

    return Case(
        make,
        _text(16, 256),
        optimizer(rigl_optax.adamw),
        rigl_optax.DenseLayers(transformer.dense_layers("uniform")),
        optimizer(optax.adamw),
    )


def _mobilenet(width: float) -> Case:
    return Case(
        lambda: mobilenet_v1.MobileNetV1((96, 96, 3), 1000, width, rngs=nnx.Rngs(0)),
        _images(96, 16, 1000),
        _SGD,
        rigl_optax.DenseLayers(mobilenet_v1.dense_layers("uniform")),
    )


def _wide_resnet(k: int) -> Case:
    return Case(
        lambda: wide_resnet.WideResNet((32, 32, 3), 10, k=k, rngs=nnx.Rngs(0)),
        _images(32, 32, 10),
        _SGD,
        rigl_optax.DenseLayers(wide_resnet.dense_layers("uniform")),
    )


_SGD = optax.sgd(0.1, momentum=0.9, nesterov=True)
CASES = {
    **{f"mobilenet_v1{label}": _mobilenet(width) for label, width in (("", 1.0), ("_x2", 2.0))},
    **{f"wrn22_{k}": _wide_resnet(k) for k in (2, 4)},
    **{f"gru{units}": _gru(units) for units in (512, 1024, 2048)},
    **{f"gpt{width}": _gpt(width) for width in (256, 512, 768, 1024)},
}


def topologies(
    params: PyTree, case: Case, sparsity: float, block: rigl_optax.Block
) -> dict[str, condensed.BlockTopology]:
    """Draws topologies of all sparse kernels that are larger than a block."""
    sparsities = rigl_optax.uniform(sparsity, dense=case.dense)(params)
    found = {}
    for position, (path, leaf) in enumerate(_paths.flatten_with_paths(params)):
        if sparsities.get(path) and np.prod(block.grid(leaf.shape, path)) > 1:
            found[path] = condensed.random_topology(leaf.shape, sparsity, block, position=position)
    return found


def steps(graphdef: nnx.GraphDef, tx: condensed.CondensedTransformation) -> list[Any]:
    """Makes an ordinary step and a rewiring step."""

    def loss(kernels: PyTree, rest: PyTree, inputs: Any, labels: jax.Array) -> Any:
        model = nnx.merge(graphdef, kernels, rest)
        model.train()
        logits = model(*inputs)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.Param)))

    def step(rewires: bool, state: Any, inputs: Any, labels: jax.Array) -> Any:
        weights, rest, opt_state = state
        probes = condensed.probes(opt_state.topologies) if rewires else None

        def of_both(weights: PyTree, probes: PyTree) -> Any:
            kernels = condensed.bind(weights, opt_state.topologies, probes)
            return loss(kernels, rest, inputs, labels)

        (grads, scores), rest = jax.grad(of_both, (0, 1), has_aux=True)(weights, probes)
        if rewires:
            weights, opt_state = tx.rewire(grads, scores, opt_state, weights)
        else:
            updates, opt_state = tx.update(grads, opt_state, weights)
            weights = optax.apply_updates(weights, updates)
        return weights, rest, opt_state

    return [functools.partial(step, rewires) for rewires in (False, True)]


def dense_step(graphdef: nnx.GraphDef, inner: optax.GradientTransformation) -> Any:
    """Makes a step of the dense model."""

    def step(state: Any, inputs: Any, labels: jax.Array) -> Any:
        params, rest, opt_state = state

        def loss(params: PyTree) -> Any:
            model = nnx.merge(graphdef, params, rest)
            model.train()
            logits = model(*inputs)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.Param)))

        grads, new_rest = jax.grad(loss, has_aux=True)(params)
        updates, opt_state = inner.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), new_rest, opt_state

    return step


def compiled(step: Any, *arguments: Any) -> tuple[Any, float]:
    """Compiles a step with its state donated; also returns the megabytes that XLA plans for it."""
    program = jax.jit(step, donate_argnums=0).lower(*arguments).compile()
    memory = program.memory_analysis()
    return program, (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 1e6


def copy(tree: PyTree) -> PyTree:
    """Copies all arrays, so that they can be donated."""
    return jax.tree.map(jnp.copy, tree)


def compare(name: str, sparsity: float, block: rigl_optax.Block, rounds: int) -> None:
    """Times one model at one sparsity and block shape, and prints a line."""
    case = CASES[name]
    graphdef, params, rest = nnx.split(case.make(), nnx.Param, ...)
    params, rest = nnx.to_pure_dict(params), nnx.to_pure_dict(rest)
    *inputs, labels = case.batch(np.random.default_rng(0))
    if name.startswith("gru"):
        inputs.append(jnp.zeros(labels.shape, bool))
    found = topologies(params, case, sparsity, block)
    weights = condensed.extract(params, found)
    tx = condensed.rigl(case.inner, end=10**6)
    plain = case.plain or case.inner
    states = {
        "dense": (copy(params), copy(rest), plain.init(params)),
        "condensed": (copy(weights), copy(rest), tx.init(weights, found)),
    }
    ordinary, rewires = steps(graphdef, tx)
    batch = (tuple(inputs), labels)
    programs, megabytes = {}, {}
    for kind, step in (("dense", dense_step(graphdef, plain)), ("condensed", ordinary)):
        programs[kind], megabytes[kind] = compiled(step, states[kind], *batch)
    rewiring, _ = compiled(rewires, states["condensed"], *batch)

    def take(kind: str, program: Any = None) -> float:
        start = time.perf_counter()
        state = (program or programs[kind])(states[kind], *batch)
        states[kind] = jax.block_until_ready(state)
        return 1e3 * (time.perf_counter() - start)

    for kind in states:
        take(kind)
    take("condensed", rewiring)
    times: dict[str, list[float]] = {"dense": [], "condensed": [], "rewiring": []}
    for i in range(rounds):
        for kind in sorted(states, reverse=i % 2 == 1):
            times[kind].append(take(kind))
        if i % 4 == 0:
            times["rewiring"].append(take("condensed", rewiring))
    ratio = statistics.median(
        d / c for d, c in zip(times["dense"], times["condensed"], strict=True)
    )
    sizes = [sum(x.size for x in jax.tree.leaves(tree)) for tree in (weights, params)]
    d, c, r = (statistics.median(x) for x in times.values())
    label = f"{block.rows}x{block.cols}"
    print(
        f"{name:16}{label:>8}{sparsity:9.2f}{sizes[0] / sizes[1]:9.3f}"
        f"{d:9.1f}{c:14.1f}{ratio:8.2f}{r:13.1f}"
        f"{megabytes['dense']:10.0f}{megabytes['condensed']:14.0f}",
        flush=True,
    )


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=list(CASES), action="append")
    parser.add_argument("--sparsities", default=".9,.95")
    parser.add_argument("--blocks", default="32x32")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    print(
        "model             blocks sparsity  density dense ms  condensed ms   ratio  rewiring ms"
        "  dense MB  condensed MB"
    )
    for name in options.only or CASES:
        for words in options.blocks.split(","):
            block = rigl_optax.Block(*map(int, words.split("x")), pad=True)
            for sparsity in map(float, options.sparsities.split(",")):
                compare(name, sparsity, block, options.rounds)


if __name__ == "__main__":
    main()
