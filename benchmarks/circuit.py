"""Trains weight-sparse GPTs, and finds the circuit of one behaviour in one of them by ablation.

python -m benchmarks.circuit --workdir=runs/circuit --figure=docs/images/circuit.png
python -m benchmarks.circuit --quick --workdir=/tmp/quick --results=/tmp/quick.json
"""

import argparse
import functools
import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

import rigl_optax
from benchmarks import small_gpt
from rigl_optax import _paths, export
from rigl_optax.analysis import circuits
from rigl_optax.models import transformer

PyTree = Any
RESULTS = pathlib.Path(__file__).parents[1] / "results" / "circuit.json"
SPARSITIES = (0.0, 0.9, 0.99, 0.995, 0.999)
RATE = 0.01
LENGTH = 16  # bytes that the network sees of an example
ALLOWED = 0.1  # part of what the whole network gains over chance that the circuit may lose
READ = 0.99  # sparsity of the network whose circuit is looked for

BLUE, ORANGE = "#0072B2", "#D55E00"
DASHES = {"query": (0, (1, 1.2)), "key": (0, (4, 1.5))}


class Size(NamedTuple):
    """The network, and how much is done with it."""

    width: int = 128
    depth: int = 2
    heads: int = 8
    steps: int = 800
    sparsities: tuple[float, ...] = SPARSITIES
    judged: int = 256
    learned: float = 0.9


QUICK = Size(16, 1, 2, steps=5, sparsities=(READ,), judged=16, learned=2.0)


def initial(size: Size, seed: int) -> tuple[nnx.GraphDef, PyTree]:
    """Returns a GPT in two parts, its structure and its fresh parameters."""
    model = transformer.GPT(
        embedding=size.width,
        depth=size.depth,
        heads=size.heads,
        context=small_gpt.CONTEXT,
        rngs=nnx.Rngs(seed),
    )
    graphdef, params = nnx.split(model)
    return graphdef, nnx.to_pure_dict(params)


def loss(graphdef: nnx.GraphDef, params: PyTree, tokens_BxT: jax.Array) -> jax.Array:
    """Returns the bits per byte of windows."""
    logits = nnx.merge(graphdef, params)(tokens_BxT[:, :-1])
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, tokens_BxT[:, 1:])
    return nats.mean() / jnp.log(2.0)


def transformation(sparsity: float, steps: int) -> optax.GradientTransformationExtraArgs:
    """Returns AdamW; with a sparsity only the largest weights stay after each of its steps."""
    inner = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            lambda t: RATE * small_gpt.rate(t + 1, steps),
            b2=0.95,
            weight_decay=0.1,
            mask=lambda p: jax.tree.map(lambda w: w.ndim > 1, p),
        ),
    )
    if not sparsity:
        return inner
    layers = rigl_optax.uniform(sparsity, dense=small_gpt.DENSE)
    return rigl_optax.iterative_hard_thresholding(inner, layers, end=steps // 2)


def train(size: Size, sparsity: float, seed: int = 0) -> PyTree:
    """Trains a network, and returns its parameters."""
    graphdef, params = initial(size, seed)
    tx = transformation(sparsity, size.steps)
    state = tx.init(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: PyTree, state: PyTree, tokens: jax.Array) -> Any:
        grads = jax.grad(functools.partial(loss, graphdef))(params, tokens)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    rng = np.random.default_rng(seed)
    for _ in range(size.steps):
        tokens = small_gpt.windows(small_gpt.data().train.tokens, rng, small_gpt.BATCH)
        params, state = step(params, state, tokens)
    return params


def nodes(size: Size) -> dict[str, int]:
    """Returns the number of units by the layer that reads them: heads and hidden units."""
    number = {"attention/out": size.heads, "mlp/down": 4 * size.width}
    return {f"blocks/{i}/{name}": n for i in range(size.depth) for name, n in number.items()}


class Examples(NamedTuple):
    """Windows that end in a space, half of them after a full stop, and half after a letter.

    Attributes:
      tokens: int32 (examples, LENGTH).
      is_capital: bool (examples,): the next byte, after a full stop always a capital letter,
        after a letter always a small one.
    """

    tokens: jax.Array
    is_capital: jax.Array


def examples(tokens: np.ndarray, number: int) -> Examples:
    """Draws examples from a split, the same ones at each call."""
    letters = np.zeros((2, 256), bool)
    letters[0, ord("a") : ord("z") + 1] = letters[1, ord("A") : ord("Z") + 1] = True
    before, space, after = tokens[LENGTH - 2 : -2], tokens[LENGTH - 1 : -1], tokens[LENGTH:]
    rng, windows = np.random.default_rng(0), []
    for capital, begins in enumerate((letters[0][before], before == ord("."))):
        starts = np.flatnonzero(begins & (space == ord(" ")) & letters[capital][after])
        starts = rng.choice(starts, number // 2, replace=False)
        windows.append(tokens[starts[:, None] + np.arange(LENGTH)])
    found = jnp.asarray(np.concatenate(windows), jnp.int32)
    return Examples(found, jnp.arange(len(found)) >= number // 2)


def behaviour(model: nnx.Module, found: Examples) -> tuple[jax.Array, jax.Array]:
    """Returns the loss in bits of whether a capital letter comes next, and the share of hits.

    Only capital and small letters are compared. One bit is chance, which is all that can be had
    without attention: the byte at which the network answers is a space in all examples.
    """
    logits = model(found.tokens)[:, -1]
    capital = jax.nn.logsumexp(logits[:, ord("A") : ord("Z") + 1], axis=-1)
    small = jax.nn.logsumexp(logits[:, ord("a") : ord("z") + 1], axis=-1)
    margin = jnp.where(found.is_capital, capital - small, small - capital)
    return jax.nn.softplus(-margin).mean() / jnp.log(2.0), (margin > 0).mean()


class Circuit:
    """A trained network, whose units and weights can be left out.

    Args:
      size: Of the network.
      params: Its parameters.
    """

    def __init__(self, size: Size, params: PyTree) -> None:
        self.nodes = nodes(size)
        self.graphdef, _ = initial(size, 0)
        self.params = params
        text = small_gpt.data()
        self.found = examples(text.validation.tokens, size.judged)
        self.held_out = examples(text.test.tokens, 4 * size.judged)
        windows = small_gpt.windows(text.validation.tokens, np.random.default_rng(1), size.judged)
        layers = list(self.nodes)
        mean_inputs = jax.jit(
            lambda params, x: circuits.mean_inputs(nnx.merge(self.graphdef, params), layers, x)
        )
        self.means = mean_inputs(params, windows[:, :LENGTH])
        self.judge = jax.jit(self._judge)
        self.slopes = jax.jit(jax.grad(lambda *given: self._judge(*given)[0], argnums=(0, 1)))

    def _judge(self, keep: jax.Array, params: PyTree, found: Examples) -> Any:
        cuts = np.cumsum(list(self.nodes.values()))[:-1]
        parts = dict(zip(self.nodes, jnp.split(keep, cuts), strict=True))
        return behaviour(
            circuits.ablated(nnx.merge(self.graphdef, params), parts, self.means), found
        )

    def units(self, limit: float) -> np.ndarray:
        """Finds units without any of which the loss is above the limit: bool (all units,)."""
        everything = jnp.ones(sum(self.nodes.values()))
        worth = -np.asarray(self.slopes(everything, self.params, self.found)[0])
        return circuits.smallest(
            lambda keep: float(self.judge(jnp.float32(keep), self.params, self.found)[0]),
            np.argsort(np.abs(worth), kind="stable"),
            limit,
        )

    def weights(self, keep: np.ndarray, limit: float) -> PyTree:
        """Finds weights of the kept units, without any of which the loss is above the limit.

        Returns arrays like the parameters: 0, and the weights that stay. Embedding, head and norms
        are not touched.
        """
        flat, rebuild = jax.flatten_util.ravel_pytree(self.params)
        owned = np.concatenate([np.ravel(x) for x in jax.tree.leaves(self.owned(keep))])
        kernels = np.concatenate(
            [
                np.full(leaf.size, path.startswith("blocks/") and leaf.ndim > 1)
                for path, leaf in _paths.flatten_with_paths(self.params)
            ]
        )
        # Units that are ablated go on writing their mean: their weights stay.
        units = jnp.float32(keep)
        slope, _ = jax.flatten_util.ravel_pytree(self.slopes(units, self.params, self.found)[1])
        at = np.flatnonzero(np.asarray(flat != 0) & owned & kernels)
        order = np.argsort(np.abs(np.asarray(flat * slope))[at], kind="stable")

        def left(stay: np.ndarray) -> PyTree:
            fewer = np.array(flat)  # in NumPy: JAX would compile for each number of weights
            fewer[at[~stay]] = 0
            return rebuild(jnp.asarray(fewer))

        def loss(stay: np.ndarray) -> float:
            return float(self.judge(units, left(stay), self.found)[0])

        return left(circuits.smallest(loss, order, limit))

    def owned(self, keep: np.ndarray) -> PyTree:
        """Returns which weights kept units read or write with: bool arrays like the parameters.

        Embedding, head and norms belong to all units.
        """
        cuts = np.cumsum(list(self.nodes.values()))[:-1]
        owned = jax.tree.map(lambda w: np.ones(w.shape, bool), self.params)
        for path, units in zip(self.nodes, np.split(keep, cuts), strict=True):
            _, block, part, name = path.split("/")
            layer = owned["blocks"][int(block)][part]
            writes = layer[name]["kernel"]
            features = np.repeat(units, len(writes) // len(units))
            layer[name]["kernel"] = writes & features[:, None]
            reads = layer["qkv" if part == "attention" else "up"]
            reads["kernel"] = reads["kernel"] & np.tile(
                features, reads["kernel"].shape[1] // len(features)
            )
        return owned


def study(size: Size, params: PyTree, with_weights: bool) -> dict[str, Any]:
    """Finds the circuit of a network on validation text, and judges it on test text."""
    circuit = Circuit(size, params)
    number = sum(circuit.nodes.values())

    def judged(keep: np.ndarray, params: PyTree, found: Examples) -> list[float]:
        return [float(x) for x in circuit.judge(jnp.float32(keep), params, found)]

    everything = np.ones(number, bool)
    whole = judged(everything, params, circuit.found)[0]
    limit = whole + ALLOWED * max(0.0, 1 - whole)
    record: dict[str, Any] = {
        "weights": sum(int(np.count_nonzero(w)) for w in jax.tree.leaves(params)),
        "whole": judged(everything, params, circuit.held_out),
        "limit": limit,
    }
    if whole >= size.learned:  # there is no behaviour that could have a circuit
        return record
    keep = circuit.units(limit)
    cuts = np.cumsum(list(circuit.nodes.values()))[:-1]
    kernels = dict(_paths.flatten_with_paths(params))
    owned = dict(_paths.flatten_with_paths(circuit.owned(keep)))
    record |= {
        "units": {
            path: np.flatnonzero(part).tolist()
            for path, part in zip(circuit.nodes, np.split(keep, cuts), strict=True)
        },
        "owned": sum(
            int(np.count_nonzero(np.asarray(kernels[path]) * owned[path]))
            for path in kernels
            if path.startswith("blocks/") and path.endswith("kernel")
        ),
        "only": judged(keep, params, circuit.held_out),
        "without": judged(~keep, params, circuit.held_out),
    }
    if with_weights:
        left = circuit.weights(keep, limit)
        record["edges"] = [
            [path, *map(int, at), float(leaf[tuple(at)])]
            for path, leaf in _paths.flatten_with_paths(left)
            if path.startswith("blocks/") and leaf.ndim == 2
            for at in np.argwhere(np.asarray(leaf) * owned[path])
        ]
        record["only edges"] = judged(keep, left, circuit.held_out)
    return record


def bits_per_byte(size: Size, params: PyTree) -> float:
    """Returns the loss on 65,536 bytes of the test split."""
    graphdef, _ = initial(size, 0)
    tokens = small_gpt.windows(small_gpt.data().test.tokens, np.random.default_rng(0), 512)
    return float(jax.jit(functools.partial(loss, graphdef))(params, tokens))


def read(file: pathlib.Path, size: Size) -> PyTree:
    """Reads the parameters of a network."""
    arrays = dict(_paths.flatten_with_paths(export.read(file).params))
    paths = [path for path, _ in _paths.flatten_with_paths(initial(size, 0)[1])]
    treedef = jax.tree.structure(initial(size, 0)[1])
    return jax.tree.unflatten(treedef, [jnp.asarray(arrays[path]) for path in paths])


def tables(records: dict[str, Any]) -> list[str]:
    """Returns two tables: how good the networks are, and their circuits."""
    good = ["| sparsity | weights that are not 0 | bits per byte | capital or small letter |"]
    good += ["|---|---|---|---|"]
    found = [
        "| sparsity | heads | MLP units | weights in them | loss of all | of the circuit alone |"
    ]
    found[0] += " without the circuit |"
    found += ["|---|---|---|---|---|---|---|"]
    for name, record in records.items():
        title = "dense" if name == "0" else f"{100 * float(name):.4g} %"
        hits, bits = record["whole"][1], record["bits_per_byte"]
        good.append(f"| {title} | {record['weights']:,} | {bits:.3f} | {100 * hits:.1f} % |")
        if "units" not in record:
            found.append(f"| {title} | | | | {record['whole'][0]:.3f} | | |")
            continue
        number = dict.fromkeys(("attention", "mlp"), 0)
        for path, units in record["units"].items():
            number[path.split("/")[2]] += len(units)
        losses = [record[key][0] for key in ("whole", "only", "without")]
        found.append(
            f"| {title} | {number['attention']} | {number['mlp']} | {record['owned']:,} | "
            + " | ".join(f"{x:.3f}" for x in losses)
            + " |"
        )
    return ["\n".join(good), "\n".join(found)]


class Line(NamedTuple):
    """A line of the figure: weights between a unit and a channel of the residual stream.

    Attributes:
      column: Of the unit: attention and MLP of each block in turn.
      unit: Its name.
      channel: Of the residual stream.
      writes: Whether the unit writes to the channel; else it reads it.
      part: `query` or `key` for what decides where a head looks; else empty.
      weight: Their sum.
    """

    column: int
    unit: str
    channel: int
    writes: bool
    part: str
    weight: float


def lines(edges: Sequence[Sequence[Any]], size: Size) -> list[Line]:
    """Returns the lines of a circuit; the features of a head are drawn as one."""
    head_width = size.width // size.heads
    sums: dict[tuple[int, str, int, bool, str], float] = {}
    for path, i, j, weight in edges:
        parts = path.split("/")
        column = 2 * int(parts[1])
        if parts[3] == "qkv":
            part = ("query", "key", "")[j // size.width]
            head = j % size.width // head_width
            line = (column, f"head {head}", i, False, part)
        elif parts[3] == "out":
            line = (column, f"head {i // head_width}", j, True, "")
        elif parts[3] == "up":
            line = (column + 1, f"unit {j}", i, False, "")
        else:
            line = (column + 1, f"unit {i}", j, True, "")
        sums[line] = sums.get(line, 0.0) + weight
    return [Line(*line, weight) for line, weight in sums.items()]


def draw(record: dict[str, Any], size: Size, path: pathlib.Path) -> None:
    """Draws the weights that the circuit needs: channels run from left to right, units read them.

    Blue weights are positive, orange ones negative; where a head has several between the same two
    ends, the line shows their sum.
    """
    found = lines(record["edges"], size)
    order = _order(found)
    height = {channel: i for i, channel in enumerate(order)}
    columns = 2 * size.depth
    figure = Figure(figsize=(11, 1.5 + 0.3 * max(len(order), 12)), layout="constrained")
    axis = figure.subplots()
    for y in height.values():
        axis.plot([-0.7, columns - 0.3], [y, y], color="#CCCCCC", lw=0.8, zorder=1)
    for column in range(columns):
        here = [line for line in found if line.column == column]
        middle = {
            unit: float(np.mean([height[line.channel] for line in here if line.unit == unit]))
            for unit in {line.unit for line in here}
        }
        names = sorted(middle, key=lambda unit: (middle[unit], unit))
        for unit, y in zip(
            names, _apart([middle[unit] for unit in names], len(order)), strict=True
        ):
            axis.text(
                *(column, y, unit),
                ha="center",
                va="center",
                fontsize=9,
                zorder=4,
                bbox={"boxstyle": "round", "fc": "white", "ec": "#444444", "lw": 0.8},
            )
            for line in (line for line in here if line.unit == unit):
                x = column + (0.42 if line.writes else -0.42)
                axis.plot(
                    [column, x],
                    [y, height[line.channel]],
                    color=BLUE if line.weight > 0 else ORANGE,
                    lw=0.6 + 1.2 * min(2.0, abs(line.weight)),
                    ls=DASHES.get(line.part, "-"),
                    zorder=2,
                )
                axis.plot(x, height[line.channel], ".", ms=4, color="#444444", zorder=3)
    titles = [f"{part}, block {i}" for i in range(size.depth) for part in ("attention", "MLP")]
    axis.set_xticks([-0.7, *range(columns), columns - 0.3], ["embedding", *titles, "logits"])
    axis.set_yticks(list(height.values()), [str(channel) for channel in height])
    axis.set_ylabel("channel of the residual stream")
    axis.set_ylim(len(order), -1)
    axis.set_xlim(-0.8, columns - 0.2)
    axis.legend(
        handles=[
            Line2D([], [], color=BLUE, label="positive"),
            Line2D([], [], color=ORANGE, label="negative"),
            *(Line2D([], [], color="#444444", ls=dash, label=n) for n, dash in DASHES.items()),
            Line2D([], [], color="#444444", label="value, or any other weight"),
        ],
        loc="upper center",
        bbox_to_anchor=(0.5, -0.06),
        ncols=5,
        frameon=False,
    )
    for side in ("top", "right", "bottom", "left"):
        axis.spines[side].set_visible(False)
    axis.tick_params(length=0)
    metadata = {"Software": f"matplotlib {matplotlib.__version__}"}
    figure.savefig(path, dpi=150, metadata=metadata)


def _order(found: list[Line]) -> list[int]:
    """Sorts channels so that those of the same units are near each other."""
    units: dict[tuple[int, str], list[int]] = {}
    for line in found:
        units.setdefault((line.column, line.unit), []).append(line.channel)
    position = {channel: float(i) for i, channel in enumerate(sorted({x.channel for x in found}))}
    for _ in range(20):
        middle = {unit: np.mean([position[c] for c in at]) for unit, at in units.items()}
        pulled = {
            channel: np.mean([middle[unit] for unit, at in units.items() if channel in at])
            for channel in position
        }
        position = {c: float(i) for i, c in enumerate(sorted(pulled, key=lambda c: (pulled[c], c)))}
    return sorted(position, key=lambda channel: position[channel])


def _apart(heights: list[float], number: int) -> list[float]:
    """Moves ascending heights apart, so that names are readable."""
    gap = min(1.0, number / max(len(heights), 1))
    moved: list[float] = []
    for y in heights:
        moved.append(max(y, moved[-1] + gap) if moved else y)
    over = max(0.0, moved[-1] - (number - 1)) if moved else 0.0
    return [y - over for y in moved]


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains what is missing, finds the circuits, prints the tables and draws the figure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workdir", type=pathlib.Path, required=True, help="keeps the networks")
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--figure", type=pathlib.Path, help="file to draw the circuit into")
    parser.add_argument("--quick", action="store_true", help="a tiny network, a few steps")
    options = parser.parse_args(arguments)
    if options.quick and options.results == RESULTS:
        parser.error("--quick needs --results of its own")
    size = QUICK if options.quick else Size()
    options.workdir.mkdir(parents=True, exist_ok=True)
    records: dict[str, Any] = {}
    for sparsity in size.sparsities:
        name = f"{sparsity:g}"
        file = options.workdir / f"{name}.safetensors"
        if not file.exists():
            params = train(size, sparsity)
            export.write(file, params, jax.tree.map(lambda w: w != 0, params))
        params = read(file, size)
        records[name] = {"bits_per_byte": bits_per_byte(size, params)}
        records[name] |= study(size, params, sparsity == READ)
        options.results.write_text(json.dumps(records, indent=1) + "\n")
        print(f"{name}: {records[name]['bits_per_byte']:.3f} bits per byte", flush=True)
    for table in tables(records):
        print(table, end="\n\n")
    if options.figure is not None:
        draw(records[f"{READ:g}"], size, options.figure)


if __name__ == "__main__":
    main()
