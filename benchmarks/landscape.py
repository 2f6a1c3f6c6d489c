"""Looks at the loss that sparse training sees: barriers, sharpness at rewirings, what diverges.

    python -m benchmarks.landscape [--seeds=3] [--figures=docs/images]
    python -m benchmarks.landscape --quick --results=runs/quick.json

LeNet-300-100 on scikit-learn's digits, 98 % sparse, ERK, 2,000 steps of 100 images, SGD with
Nesterov momentum 0.9, a cosine from the rate to 0, a rewiring of 30 % every 50 steps until three
quarters. Four studies, each of runs that are kept in a JSON file and not made again:

- `paths`: the training loss between a pruning and a static solution of the same initial weights,
  along the line and along Bezier curves (RigL paper, Fig. 6 left), and what goes on from the static
  one (Fig. 6 right);
- `rewirings`: the sharpness, the gradient norm and the loss just before and after rewirings;
- `rates`: what trains at which learning rate, with inputs of one sign, standardised ones, and with
  batch normalisation;
- `pixels`: connections of each pixel over time, and the network without dead units (Table 2, Fig.
  7).

About eight minutes of CPU time for three seeds. It prints the tables of docs/landscape.md.
"""

import argparse
import functools
import json
import pathlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure

import rigl_optax
from rigl_optax import analysis, export
from rigl_optax.data import batches, digits
from rigl_optax.models import lenet
from rigl_optax.reports import styles

PyTree = Any
RESULTS = pathlib.Path(__file__).parents[1] / "results" / "landscape.json"
SPARSITY, BATCH, EVERY, DROP, MOMENTUM, DECAY = 0.98, 100, 50, 0.3, 0.9, 1e-4
INPUTS = ("[0, 1]", "standardised", "batch norm")
METHODS = ("static", "set", "rigl", "rigl_path")
CURVES = ("line", "quadratic, masked", "cubic, masked", "quadratic, free", "cubic, free")
ORANGE, BLUE, GREEN, SKY, GREY = "#D55E00", "#0072B2", "#009E73", "#56B4E9", "#888888"
COLOURS = {"static": "#E69F00", "set": GREEN, "rigl": BLUE, "rigl_path": ORANGE, "gmp": "#CC79A7"}
NAMES = {"rigl_path": "RigL, average gradient", "gmp": "pruning"}


class Size(NamedTuple):
    """How much each study does."""

    steps: int = 2_000
    curve_steps: int = 3_000
    points: int = 41
    watched: tuple[int, ...] = (50, 100, 200, 400, 600, 800, 1_000, 1_200, 1_400)
    after: int = 10
    rates: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4, 0.8)
    snapshots: tuple[int, ...] = (0, 100, 500, 2_000)
    inputs: tuple[str, ...] = INPUTS
    methods: tuple[str, ...] = (*METHODS, "gmp")

    def those_of(self, names: Sequence[str]) -> list[str]:
        """Returns those of the names that are among the methods."""
        return [name for name in names if name in self.methods]


QUICK = Size(200, 50, 5, (50, 100), 3, (0.1,), (0, 200), INPUTS[:1], ("static", "rigl"))


class Data(NamedTuple):
    """Images (n, 64) as the network sees them, and labels, of training and test."""

    train: tuple[jax.Array, jax.Array]
    test: tuple[jax.Array, jax.Array]


@functools.cache
def data(inputs: str) -> Data:
    """Loads the digits, in [0, 1] or with the mean and deviation of all training pixels out."""
    found = digits.load()
    train, test = (
        np.float32(split.images.reshape(len(split.images), -1) / found.maximum)
        for split in (found.train, found.test)
    )
    shift, scale = (train.mean(), train.std()) if inputs == "standardised" else (0.0, 1.0)
    pairs = zip((train, test), (found.train, found.test), strict=True)
    return Data(*((jnp.asarray((x - shift) / scale), jnp.asarray(s.labels)) for x, s in pairs))


def initial(seed: int) -> PyTree:
    """Draws the weights of LeNet-300-100."""
    model = lenet.LeNet((8, 8), rngs=nnx.Rngs(seed))
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def logits(params: PyTree, x: jax.Array, normalises: bool, seen: int | None = None) -> jax.Array:
    """Applies the network, with batch normalisation by the first `seen` examples if asked for."""
    for i in range(3):
        layer = params["layers"][i]
        x = x @ layer["kernel"]
        if normalises and i < 2:
            x = (x - x[:seen].mean(0)) * jax.lax.rsqrt(x[:seen].var(0) + 1e-5)
        x = x + layer["bias"]
        x = jax.nn.relu(x) if i < 2 else x
    return x


def _loss(normalises: bool, params: PyTree, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    out = logits(params, batch[0], normalises)
    return optax.softmax_cross_entropy_with_integer_labels(out, batch[1]).mean()


PLAIN = functools.partial(_loss, False)
NORMALISED = functools.partial(_loss, True)


def loss_of(inputs: str) -> Callable[..., jax.Array]:
    """Returns the loss; the same object each time, so that programs are compiled once."""
    return NORMALISED if inputs == "batch norm" else PLAIN


def transformation(
    method: str, steps: int, rate: Any, seed: Any, masks: PyTree | None = None
) -> optax.GradientTransformationExtraArgs:
    """Returns the optimizer; the rate and the seed may be traced."""
    decays = functools.partial(jax.tree.map, lambda w: w.ndim > 1)
    schedule = optax.cosine_decay_schedule(1.0, steps)
    inner = optax.chain(
        optax.add_decayed_weights(DECAY, mask=decays),
        optax.sgd(lambda t: rate * schedule(t), momentum=MOMENTUM, nesterov=True),
    )
    layers = rigl_optax.erk(SPARSITY)
    keys: dict[str, Any] = {"seed": seed, "initial_masks": masks}
    if method == "static":
        return rigl_optax.static_sparse(inner, layers, **keys)
    keys |= {"end": steps * 3 // 4, "every": EVERY}
    if method == "gmp":
        return rigl_optax.gradual_magnitude_pruning(inner, layers, begin=steps // 5, **keys)
    keys["drop_fraction"] = DROP
    if method == "set":
        return rigl_optax.sparse_evolutionary_training(inner, layers, **keys)
    return rigl_optax.rigl(inner, layers, accumulate=EVERY if method == "rigl_path" else 1, **keys)


@functools.partial(jax.jit, static_argnames=("loss", "method", "steps"))
def _advance(
    loss: Callable[..., jax.Array],
    method: str,
    steps: int,
    state: tuple[PyTree, PyTree],
    rate: jax.Array,
    seed: jax.Array,
    masks: PyTree | None,
    order: jax.Array,
    examples: tuple[jax.Array, jax.Array],
    first: jax.Array,
    last: jax.Array,
) -> tuple[PyTree, PyTree]:
    tx = transformation(method, steps, rate, seed, masks)

    def step(t: jax.Array, state: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
        params, opt_state = state
        batch = jax.tree.map(lambda x: x[order[t]], examples)
        updates, opt_state = tx.update(jax.grad(loss)(params, batch), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return jax.lax.fori_loop(first, last, step, state)


class Snapshot(NamedTuple):
    """A moment of a run."""

    step: int
    params: PyTree
    masks: PyTree


def train(
    method: str,
    seed: int,
    *,
    rate: float = 0.1,
    inputs: str = INPUTS[0],
    steps: int = 2_000,
    at: Sequence[int] = (),
    start: Snapshot | None = None,
) -> Iterator[Snapshot]:
    """Trains, and yields the run at these steps and at its end.

    Args:
      method: One of `METHODS` or `gmp`.
      seed: Of initial weights, masks and batches.
      rate: The highest learning rate.
      inputs: One of `INPUTS`.
      steps: Number of steps.
      at: Steps to stop at, ascending.
      start: Weights and masks to start from.
    """
    masks = None if start is None else start.masks
    tx = transformation(method, steps, rate, seed, masks)
    params = initial(seed) if start is None else start.params
    opt_state = tx.init(params)
    params = rigl_optax.apply_masks(params, opt_state)
    examples, state = data(inputs).train, (params, opt_state)
    order = np.stack(
        [batches.batch_indices(len(examples[1]), BATCH, seed=seed, step=t) for t in range(steps)]
    )
    done, numbers = 0, (jnp.float32(rate), jnp.uint32(seed))
    for stop in (*at, *([] if steps in at else [steps])):
        state = _advance(
            loss_of(inputs), method, steps, state, *numbers, masks, order, examples, done, stop
        )
        done = stop
        yield Snapshot(done, state[0], rigl_optax.get_masks(state[1]))


@functools.partial(jax.jit, static_argnames="normalises")
def _accuracy(params: PyTree, normalises: bool, examples: Any, judged: Any) -> jax.Array:
    # Test images are normalised by the statistics of all training images.
    seen = len(examples[1])
    out = logits(params, jnp.concatenate([examples[0], judged[0]]), normalises, seen)[seen:]
    return jnp.mean(out.argmax(-1) == judged[1])


def judged(found: Snapshot, inputs: str) -> dict[str, float]:
    """Measures the end of a run: the loss of all training images, test accuracy, units."""
    train, test = data(inputs)
    accuracy = _accuracy(found.params, inputs == "batch norm", train, test)
    fan_in = analysis.fan_in(found.masks["layers"][0]["kernel"])
    return {
        "loss": float(_value(loss_of(inputs), found.params, train)),
        "accuracy": round(100 * float(accuracy), 4),
        "units": float(analysis.effective_units(fan_in)),
    }


@functools.partial(jax.jit, static_argnums=0)
def _value(loss: Callable[..., jax.Array], params: PyTree, batch: Any) -> jax.Array:
    return loss(params, batch)


def paths(seed: int, size: Size) -> dict[str, Any]:
    """The loss from a pruning solution (t = 0) to a static one (t = 1), and on from there."""
    (pruned,) = train("gmp", seed, steps=size.steps)
    (static,) = train("static", seed, steps=size.steps)
    examples, ts = data(INPUTS[0]).train, np.linspace(0, 1, size.points)
    union = jax.tree.map(jnp.logical_or, pruned.masks, static.masks)
    along = {"line": analysis.interpolate(PLAIN, pruned.params, static.params, ts, examples)}
    for curve in CURVES[1:]:
        fitted = analysis.fit_bezier(
            PLAIN,
            pruned.params,
            static.params,
            CURVE_OPTIMIZER,
            degree=3 if curve.startswith("cubic") else 2,
            steps=size.curve_steps,
            masks=union if curve.endswith("masked") else None,
            batches=_drawn(examples, seed),
            seed=seed,
        )
        along[curve] = fitted.losses(PLAIN, ts, examples)
    went_on = {}
    for method in size.those_of(("static", "set", "rigl")):
        (end,) = train(method, seed, steps=size.steps, start=static)
        went_on[method] = judged(end, INPUTS[0])
    return {
        "along": {curve: np.asarray(losses).tolist() for curve, losses in along.items()},
        "ends": {"gmp": judged(pruned, INPUTS[0]), "static": judged(static, INPUTS[0])},
        "from static": went_on,
    }


CURVE_OPTIMIZER = optax.adam(3e-3)


def _drawn(examples: PyTree, seed: int) -> Iterator[PyTree]:
    """Yields batches of training images without end."""
    rng = np.random.default_rng(seed)
    while True:
        chosen = rng.integers(0, len(examples[1]), BATCH)
        yield tuple(x[chosen] for x in examples)


def rewirings(method: str, inputs: str, seed: int, rate: float, size: Size) -> dict[str, Any]:
    """The loss around the weights just before and just after rewirings, and over the next steps."""
    at = [t + more for t in size.watched for more in range(size.after + 1)]
    loss, examples = loss_of(inputs), data(inputs).train
    found: dict[str, list[Any]] = {
        "step": list(size.watched),
        "limit": [_limit(rate, step, size.steps) for step in size.watched],
    }
    for snapshot in train(
        method, seed, rate=rate, inputs=inputs, steps=size.steps, at=sorted({*at, size.steps})
    ):
        since = next((snapshot.step - t for t in size.watched[::-1] if t <= snapshot.step), -1)
        now = float(_value(loss, snapshot.params, examples))
        if since in (0, 1):
            when = ("before", "after")[since]
            keys = {"masks": snapshot.masks}
            sharpest = analysis.hessian_eigenvalues(
                loss, snapshot.params, examples, iterations=15, **keys
            )
            norm = analysis.gradient_norm(loss, snapshot.params, examples, **keys)
            fan_in = analysis.fan_in(snapshot.masks["layers"][0]["kernel"])
            for name, number in (
                ("sharpness", sharpest.values[0]),
                ("residual", sharpest.residuals[0]),
                ("gradient", norm),
                ("units", analysis.effective_units(fan_in)),
                ("loss", now),
            ):
                found.setdefault(f"{name} {when}", []).append(float(number))
        if since == 0:
            old = snapshot.masks
        if since == 1:
            found.setdefault("peak", []).append(now)
            found.setdefault("into empty units", []).append(_into_empty(old, snapshot.masks))
        elif 1 < since <= size.after:
            found["peak"][-1] = max(found["peak"][-1], now)
    return found | {"end": judged(snapshot, inputs)}


def _limit(rate: float, step: int, steps: int) -> float:
    """Returns the largest stable curvature at a step."""
    now = rate * float(optax.cosine_decay_schedule(1.0, steps)(step))
    return analysis.largest_stable_curvature(now, momentum=MOMENTUM, nesterov=True)


def _into_empty(before: PyTree, after: PyTree) -> float:
    """Returns the part of newborn weights whose hidden unit has no other input; 0 if none grew."""
    empty = newborn = 0
    for i in range(2):
        old, new = (np.asarray(masks["layers"][i]["kernel"]) for masks in (before, after))
        grown, kept = new & ~old, new & old
        empty += grown[:, ~kept.any(0)].sum()
        newborn += grown.sum()
    return float(empty / newborn) if newborn else 0.0


def rates(method: str, inputs: str, seed: int, rate: float, size: Size) -> dict[str, float]:
    """Trains at a rate."""
    (end,) = train(method, seed, rate=rate, inputs=inputs, steps=size.steps)
    return judged(end, inputs)


def pixels(method: str, seed: int, size: Size) -> dict[str, Any]:
    """Connections of each pixel over time, and the sizes of the network without dead units."""
    counts = {}
    for snapshot in train(method, seed, steps=size.steps, at=size.snapshots):
        fan_out = analysis.fan_out(snapshot.masks["layers"][0]["kernel"])
        counts[snapshot.step] = np.asarray(fan_out).tolist()
    model = nnx.eval_shape(lambda: lenet.LeNet((8, 8), rngs=nnx.Rngs(0)))
    small = export.compact(jax.device_get(snapshot.params), model.units)
    kernels = [np.asarray(small.params["layers"][i]["kernel"]) for i in range(3)]
    live = int((kernels[0] != 0).any(1).sum())
    return {
        "counts": counts,
        "sizes": [live, *(k.shape[0] for k in kernels[1:])],
        "weights": int(sum((k != 0).sum() for k in kernels)),
        "error": 100 - judged(snapshot, INPUTS[0])["accuracy"],
    }


REWIRED_RATE = 0.2
PIXEL_METHODS = ("static", "set", "rigl", "gmp")


def work(seeds: int, size: Size) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    """Yields the study, the name and the maker of each record; first seeds of all come first."""
    for seed in range(seeds):
        yield "paths", f"{seed}", functools.partial(paths, seed, size)
        for inputs in size.inputs:
            for method in size.those_of(("set", "rigl")):
                make = functools.partial(rewirings, method, inputs, seed, REWIRED_RATE, size)
                yield "rewirings", f"{method} {inputs} {seed}", make
        for method in size.those_of(PIXEL_METHODS):
            yield "pixels", f"{method} {seed}", functools.partial(pixels, method, seed, size)
        for inputs in size.inputs:
            for method in size.those_of(METHODS):
                for rate in size.rates:
                    make = functools.partial(rates, method, inputs, seed, rate, size)
                    yield "rates", f"{method} {inputs} {rate} {seed}", make


FAILED = 2.0  # nats: a run that ends above has learnt next to nothing; chance is 2.3


def _mean(values: Sequence[float], sign: str = ".2f") -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):{sign}} ± {spread:{sign}}"


def tables(records: dict[str, dict[str, Any]]) -> list[str]:
    """Returns the tables of docs/landscape.md."""
    return [
        "\n".join(table)
        for table in (
            _table_of_paths(records["paths"]),
            _table_of_escapes(records["paths"]),
            _table_of_rewirings(records["rewirings"]),
            _table_of_spikes(records["rewirings"]),
            _table_of_rates(records["rates"], "accuracy"),
            _table_of_rates(records["rates"], "units"),
            _table_of_pixels(records["pixels"]),
        )
    ]


def _table_of_paths(records: dict[str, Any]) -> Iterator[str]:
    yield "| from pruning to static | highest loss | over the higher end | over the line |"
    yield "|---|---|---|---|"
    for curve in CURVES:
        along = [r["along"][curve] for r in records.values()]
        found = [analysis.barrier(losses) for losses in along]
        cells = (
            [max(losses) for losses in along],
            [float(b.above_ends) for b in found],
            [float(b.above_line) for b in found],
        )
        yield f"| {curve} | " + " | ".join(_mean(c, ".3f") for c in cells) + " |"


def _table_of_escapes(records: dict[str, Any]) -> Iterator[str]:
    yield "| | training loss | test accuracy % |"
    yield "|---|---|---|"
    for name, _, ends in _ends(records):
        loss, accuracy = ([e[key] for e in ends] for key in ("loss", "accuracy"))
        yield f"| {name} | {_mean(loss, '.4f')} | {_mean(accuracy)} |"


def _ends(records: dict[str, Any]) -> Iterator[tuple[str, str, list[dict[str, float]]]]:
    """Yields the name, the method and the ends of the runs of the study of paths."""
    runs = list(records.values())
    yield "static solution", "static", [r["ends"]["static"] for r in runs]
    for method in runs[0]["from static"]:
        yield f"+ {_name(method)}", method, [r["from static"][method] for r in runs]
    yield "pruning solution", "gmp", [r["ends"]["gmp"] for r in runs]


def _of(records: dict[str, Any], *start: Any) -> list[Any]:
    """Returns the records of a study whose names begin so: one for each seed."""
    head = " ".join(str(part) for part in start) + " "
    return [record for name, record in records.items() if name.startswith(head)]


def _table_of_rewirings(records: dict[str, Any]) -> Iterator[str]:
    steps = next(iter(records.values()))["step"]
    yield "| rewiring at step | " + " | ".join(str(t) for t in steps) + " |"
    yield "|---|" + "---|" * len(steps)
    limits = [f"{limit:.1f}" for limit in next(iter(records.values()))["limit"]]
    yield "| stable below | " + " | ".join(limits) + " |"
    for inputs in INPUTS:
        for method in ("set", "rigl"):
            runs = _of(records, method, inputs)
            if not runs:
                continue
            pairs = [
                [
                    statistics.median(r[f"sharpness {when}"][i] for r in runs)
                    for i in range(len(steps))
                ]
                for when in ("before", "after")
            ]
            cells = [f"{_short(a)} → {_short(b)}" for a, b in zip(*pairs, strict=True)]
            yield f"| {styles.of(method).name}, {inputs} | " + " | ".join(cells) + " |"


def _table_of_spikes(records: dict[str, Any]) -> Iterator[str]:
    yield (
        "| inputs | method | gradient norm after / before | highest rise of the loss "
        "| effective units | newborn weights into units without other inputs | test accuracy % |"
    )
    yield "|---|---|---|---|---|---|---|"
    for inputs in INPUTS:
        for method in ("set", "rigl"):
            runs = _of(records, method, inputs)
            if not runs:
                continue
            early = range(sum(t <= 400 for t in runs[0]["step"]))
            growth = [_growth(r, early) for r in runs]
            cells = (
                _mean(growth, ".2f" if max(growth) < 100 else ",.0f"),
                _mean([_rise(r) for r in runs], ".1f"),
                _mean([r["end"]["units"] for r in runs], ".0f"),
                f"{statistics.mean(r['into empty units'][i] for r in runs for i in early):.0%}",
                _mean([r["end"]["accuracy"] for r in runs], ".1f"),
            )
            yield f"| {inputs} | {_name(method)} | " + " | ".join(cells) + " |"


def _growth(run: dict[str, Any], rewirings: Sequence[int]) -> float:
    """Returns the geometric mean of what rewirings multiply the gradient norm by."""
    ratios = [run["gradient after"][i] / run["gradient before"][i] for i in rewirings]
    return statistics.geometric_mean(ratios)


def _rise(run: dict[str, Any]) -> float:
    """Returns the most that the loss rose by within some steps after a rewiring, in nats."""
    return max(peak - loss for peak, loss in zip(run["peak"], run["loss before"], strict=True))


def _short(x: float) -> str:
    return (
        f"{x:.1f}"
        if x < 100
        else f"{x:.0f}"
        if x < 1e4
        else f"{x:.0e}".replace("e+0", "e").replace("e+", "e")
    )


def _table_of_rates(records: dict[str, Any], key: str) -> Iterator[str]:
    found = sorted({float(name.split()[-2]) for name in records})
    unit = {"accuracy": "test accuracy %", "units": "effective hidden units of 300"}[key]
    yield (
        f"| inputs | method | {unit} at rate {found[0]:g} | "
        + " | ".join(f"{rate:g}" for rate in found[1:])
        + " |"
    )
    yield "|---|---|" + "---|" * len(found)
    for inputs in INPUTS:
        for method in METHODS:
            cells = []
            for rate in found if _of(records, method, inputs) else ():
                ends = _of(records, method, inputs, rate)
                failed = sum(not end["loss"] < FAILED for end in ends)
                mark = f" ({failed} of {len(ends)} failed)" if failed and key == "accuracy" else ""
                sign = ".1f" if key == "accuracy" else ".0f"
                cells.append(_mean([end[key] for end in ends], sign) + mark)
            if cells:
                yield f"| {inputs} | {_name(method)} | " + " | ".join(cells) + " |"


def _table_of_pixels(records: dict[str, Any]) -> Iterator[str]:
    yield "| method | pixels read of 64 | hidden units | weights | test error % |"
    yield "|---|---|---|---|---|"
    for method in [m for m in PIXEL_METHODS if _of(records, m)]:
        runs = _of(records, method)
        sizes = [_mean([r["sizes"][i] for r in runs], ".0f") for i in range(3)]
        weights, errors = (
            _mean([r[key] for r in runs], sign)
            for key, sign in (("weights", ".0f"), ("error", ".1f"))
        )
        yield f"| {_name(method)} | {sizes[0]} | {sizes[1]}; {sizes[2]} | {weights} | {errors} |"


def _name(method: str) -> str:
    return NAMES.get(method) or styles.of(method).name


SAVE: dict[str, Any] = {
    "dpi": 130,
    "metadata": {"Software": f"matplotlib {matplotlib.__version__}"},
}


def figure_of_paths(records: dict[str, Any], path: pathlib.Path) -> None:
    """Draws the training loss between the solutions, and what goes on from the static one."""
    figure = Figure(figsize=(9.6, 4.0), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    lines = zip(
        CURVES, (GREY, ORANGE, ORANGE, BLUE, BLUE), ("-", "--", ":", "--", ":"), strict=True
    )
    for curve, colour, line in lines:
        along = np.array([r["along"][curve] for r in records.values()])
        ts = np.linspace(0, 1, along.shape[1])
        left.plot(ts, along.mean(0), color=colour, ls=line, lw=2, label=curve)
        left.fill_between(ts, along.min(0), along.max(0), color=colour, alpha=0.12, lw=0)
    left.set_xlabel("t: 0 is the pruning solution, 1 the static one")
    left.set_ylabel("training loss, nats")
    left.set_yscale("log")
    left.set_ylim(bottom=5e-8)
    left.legend(fontsize=8, ncols=3, loc="lower center")
    left.grid(alpha=0.3)
    ends = list(_ends(records))
    for place, (_, method, found) in enumerate(ends):
        losses = [end["loss"] for end in found]
        right.plot([place] * len(losses), losses, "o", color=COLOURS[method], alpha=0.7)
        right.plot([place - 0.25, place + 0.25], [statistics.mean(losses)] * 2, color="black")
    right.set_xticks(range(len(ends)), [name for name, _, _ in ends], rotation=20, fontsize=9)
    right.set_yscale("log")
    right.set_ylabel("training loss, nats")
    right.set_title("2,000 more steps from the static solution", fontsize=10)
    right.grid(alpha=0.3, axis="y")
    left.set_title(
        f"digits, {SPARSITY:.0%} sparse: mean and range of {len(records)} pairs", fontsize=10
    )
    figure.savefig(path, **SAVE)


def figure_of_rewirings(records: dict[str, Any], path: pathlib.Path) -> None:
    """Draws the sharpness before and after rewirings against what the optimizer bears."""
    figure = Figure(figsize=(9.6, 4.0), layout="constrained")
    axes = figure.subplots(1, 3)
    for axis, inputs in zip(axes, INPUTS, strict=True):
        steps = next(iter(records.values()))["step"]
        for method, line, marker in (("set", "--", "s"), ("rigl", "-", "o")):
            runs = _of(records, method, inputs)
            for when, filled in (("before", False), ("after", True)):
                sharpness = np.array([r[f"sharpness {when}"] for r in runs])
                colour = COLOURS[method]
                axis.plot(
                    steps,
                    np.median(sharpness, 0),
                    color=colour,
                    ls=line if filled else ":",
                    marker=marker,
                    mfc=colour if filled else "white",
                    label=f"{_name(method)}, just {when}",
                )
                if filled:
                    low, high = sharpness.min(0), sharpness.max(0)
                    axis.fill_between(steps, low, high, color=colour, alpha=0.15, lw=0)
        limit = next(iter(records.values()))["limit"]
        axis.plot(steps, limit, "k-", lw=1, label="SGD is stable below")
        axis.set_title(f"inputs: {inputs}" if "norm" not in inputs else inputs, fontsize=10)
        axis.set_xlabel("step of the rewiring")
        axis.set_yscale("log")
        axis.set_xscale("log")
        axis.set_xticks(steps[:4] + steps[5:6] + steps[-1:], minor=False)
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[1].sharey(axes[0])
    axes[0].set_ylim(0.01, 50)
    axes[0].set_ylabel("largest eigenvalue of the Hessian")
    axes[0].legend(fontsize=8, loc="lower right")
    figure.savefig(path, **SAVE)


def figure_of_rates(records: dict[str, Any], path: pathlib.Path) -> None:
    """Draws accuracy and effective units against the learning rate."""
    figure = Figure(figsize=(9.6, 5.6), layout="constrained")
    axes = figure.subplots(2, 3, sharex=True, sharey="row")
    found = sorted({float(name.split()[-2]) for name in records})
    lines = {"static": "D--", "set": "s-.", "rigl": "o-", "rigl_path": "^:"}
    for column, inputs in zip(axes.T, INPUTS, strict=True):
        for method, line in lines.items():
            ends = [_of(records, method, inputs, rate) for rate in found]
            for axis, key in zip(column, ("accuracy", "units"), strict=True):
                values = [[end[key] for end in at] for at in ends]
                means = [statistics.mean(v) for v in values]
                axis.plot(found, means, line, ms=4, color=COLOURS[method], label=_name(method))
                low, high = [min(v) for v in values], [max(v) for v in values]
                axis.fill_between(found, low, high, color=COLOURS[method], alpha=0.12, lw=0)
        column[0].set_title(f"inputs: {inputs}" if "norm" not in inputs else inputs, fontsize=10)
        column[1].set_xlabel("learning rate")
        column[1].set_xscale("log")
        column[1].set_xticks(found, [f"{rate:g}" for rate in found])
        column[1].minorticks_off()
        for axis in column:
            axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("test accuracy, %")
    axes[1, 0].set_ylabel("effective hidden units of 300")
    axes[0, 0].legend(fontsize=8)
    figure.savefig(path, **SAVE)


def figure_of_pixels(records: dict[str, Any], path: pathlib.Path) -> None:
    """Draws the connections of each pixel over time, the mean of all seeds."""
    methods = PIXEL_METHODS[1:]
    steps = list(next(iter(records.values()))["counts"])
    figure = Figure(figsize=(8.4, 6.4), layout="constrained")
    axes = figure.subplots(len(methods), len(steps))
    for row, method in zip(axes, methods, strict=True):
        runs = _of(records, method)
        maps = {t: np.mean([r["counts"][t] for r in runs], 0).reshape(8, 8) for t in steps}
        sparse = [m for t, m in maps.items() if method != "gmp" or t == steps[-1]]
        highest = max(m.max() for m in sparse)
        for axis, t in zip(row, steps, strict=True):
            if method == "gmp" and t != steps[-1]:
                axis.set_axis_off()  # it is not sparse yet
                continue
            image = axis.imshow(maps[t], vmin=0, vmax=highest, cmap="cividis")
            axis.set_title(f"{_name(method)}, step {int(t):,}", fontsize=10)
            axis.set_xticks([])
            axis.set_yticks([])
        figure.colorbar(image, ax=list(row), label="connections of the pixel")
    figure.savefig(path, **SAVE)


FIGURES = {
    "paths": figure_of_paths,
    "rewirings": figure_of_rewirings,
    "rates": figure_of_rates,
    "pixels": figure_of_pixels,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Makes the records that are missing, prints the tables and draws the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--studies", default=",".join(FIGURES), help="some of " + ", ".join(FIGURES)
    )
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--figures", type=pathlib.Path, help="folder to draw into")
    parser.add_argument("--quick", action="store_true", help="one short run of each kind")
    options = parser.parse_args(arguments)
    for study in options.studies.split(","):
        if study not in FIGURES:
            parser.error(f"--studies: {study!r} must be one of {', '.join(FIGURES)}")
    if options.quick and (options.results == RESULTS or options.figures):
        parser.error("--quick needs --results of its own, and draws nothing")
    kept = json.loads(options.results.read_text()) if options.results.exists() else {}
    records: dict[str, dict[str, Any]] = {study: kept.get(study, {}) for study in FIGURES}
    size, seeds = (QUICK, 1) if options.quick else (Size(), options.seeds)
    jobs = [job for job in work(seeds, size) if job[0] in options.studies.split(",")]
    for number, (study, name, make) in enumerate(jobs, 1):
        if name not in records[study]:
            records[study][name] = _plain(make())
            text = json.dumps({"versions": _versions(), **records}, indent=None)
            options.results.write_text(text.replace("}, ", "},\n") + "\n")
            print(f"{number} of {len(jobs)}: {study} {name}", flush=True)
    for table in tables(records) if all(records.values()) else ():
        print(table, end="\n\n")
    for study, draw in FIGURES.items() if options.figures is not None else ():
        draw(records[study], options.figures / f"landscape_{study}.png")


def _plain(record: Any) -> Any:
    """Returns a record as it comes back from JSON, with six digits."""
    return json.loads(json.dumps(_rounded(record)))


def _rounded(x: Any) -> Any:
    if isinstance(x, dict):
        return {key: _rounded(value) for key, value in x.items()}
    if isinstance(x, list):
        return [_rounded(value) for value in x]
    return float(f"{x:.6g}") if isinstance(x, float) else x


def _versions() -> dict[str, str]:
    return {
        "rigl_optax": rigl_optax.__version__,
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
    }


if __name__ == "__main__":
    main()
