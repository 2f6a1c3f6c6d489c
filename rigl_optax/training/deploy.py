"""Makes the forms in which a trained network can run, and measures them on this machine.

Everything is for inference on one device. Nothing here changes a run.
"""

import dataclasses
import functools
import json
import pathlib
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rigl_optax import _paths, condensed
from rigl_optax._structures import Block
from rigl_optax.export import _file
from rigl_optax.models import compaction, layers, recurrent
from rigl_optax.training import evaluation, export, files, sparsity, tasks
from rigl_optax.training.representation import Masked
from rigl_optax.training.setup import Run
from rigl_optax.training.state import TrainState

PyTree = Any
PLATFORMS = ("cpu", "cuda", "tpu")
BATCHES = (1, 8, 64, 256)
ARTIFACT = ".jaxexport"
_TURN, _ROUNDS = 0.02, 5  # seconds of one measurement at least; of all forms in turn


class Form(NamedTuple):
    """A network in one of its forms.

    Attributes:
      model: An NNX model in evaluation.
      file: Name of the file that holds its weights.
      kept_dense: Paths of sparse kernels that stay dense arrays in this form.
    """

    model: nnx.Module
    file: str
    kept_dense: tuple[str, ...] = ()


class Measured(NamedTuple):
    """What a form costs on this machine.

    Attributes:
      disk: Bytes of its file.
      memory: Bytes of its arrays.
      accuracy: Fraction of the labels of a split; None if there was none.
      difference: The largest difference of its outputs from those of the dense form, on one batch
        of random inputs, as a part of the largest of those outputs.
      latency: Seconds of a batch of 1.
      throughput: `{batch: examples per second}`.
    """

    disk: int
    memory: int
    accuracy: float | None
    difference: float
    latency: float
    throughput: dict[int, float]


def hand_over(
    run: Run, state: TrainState, folder: pathlib.Path, *, measures: bool, split: Any = None
) -> str:
    """Writes a trained network in all its forms, and measures them if that is asked for.

    Args:
      run: The run.
      state: Its state.
      folder: For the files; made if it is not there.
      measures: Whether all forms are timed on this machine, which is also kept in `forms.json`.
      split: On which accuracy is measured; None for none.

    Returns:
      The files and their bytes, and the table of what was measured, as text.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found, missing = forms(run, state)
    lines = [
        f"wrote {path} ({path.stat().st_size / 1e3:,.1f} kB)"
        for path in write(folder, run, state, found)
    ]
    if measures:
        measured = measure(folder, run, state, found, split)
        record(folder, measured)
        lines += ["", table(measured)]
    lines += [
        f"{name}: these sparse kernels stay dense arrays: {', '.join(form.kept_dense)}"
        for name, form in found.items()
        if form.kept_dense
    ]
    lines += [f"no {name}: {reason}" for name, reason in missing.items()]
    return "\n".join(lines)


def forms(run: Run, state: TrainState) -> tuple[dict[str, Form], dict[str, str]]:
    """Makes the forms that a network has.

    Args:
      run: The run.
      state: Its state.

    Returns:
      `{name: form}`: `dense`; `compacted`, without the units that do nothing; `blocks`, of layers
      that were trained with blocks; `csr`, the compacted network with single weights in its linear
      and recurrent layers. And `{name: reason}` of those that it does not have.
    """
    params, masks, model_state = _whole(run, state)
    found, missing = {"dense": Form(_model(run.graphdef, params, model_state), "dense")}, {}
    dense = found["dense"].model
    smallest, file = (dense, params, masks), "sparse"
    try:
        small, about = compaction.compact(dense)
    except ValueError as error:  # stacks of layers keep one width
        missing["compacted"] = str(error)
    else:
        found["compacted"] = Form(small, "compacted")
        smallest, file = (small, about.params, about.cut(masks)), "compacted"
    kernels, reason = _blocks(run, dense, params, masks)
    if reason:
        missing["blocks"] = reason
    else:
        found["blocks"] = Form(_model(run.graphdef, kernels, model_state), "sparse")
    single, kept_dense = _single(*smallest)
    if single is None:
        missing["csr"] = "no linear or recurrent layer is sparse"
    else:
        found["csr"] = Form(single, file, kept_dense)
    for form in found.values():
        form.model.eval()
    return found, missing


def write(
    folder: pathlib.Path, run: Run, state: TrainState, found: Mapping[str, Form]
) -> list[pathlib.Path]:
    """Writes the files of all forms: weights as safetensors, and artifacts of `jax.export`.

    `sparse` holds active weights and masks, `dense` plain arrays, `compacted` what is left of both;
    `dense.jaxexport` and `compacted.jaxexport` are programs with their weights (`artifact`).

    Returns:
      The files.
    """
    params, masks, model_state = _whole(run, state)
    paths = [folder / f"{name}{export.SUFFIX}" for name in ("sparse", "dense")]
    export.write(paths[0], run, state)
    _write(paths[1], _file.serialized(params, {}, model_state))
    if "compacted" in found:
        about = compaction.compact(found["dense"].model)[1]
        small = _file.serialized(about.params, about.cut(masks), about.model_state)
        paths.append(folder / f"compacted{export.SUFFIX}")
        _write(paths[-1], small)
    for name in ("dense", "compacted"):
        if name in found:
            paths.append(folder / f"{name}{ARTIFACT}")
            _write(paths[-1], artifact(run, found[name].model))
    return paths


def artifact(run: Run, model: nnx.Module, platforms: Sequence[str] = PLATFORMS) -> bytes:
    """Exports a model with its weights as one program that needs nothing but JAX to run.

    Args:
      run: Says what an example is.
      model: A model of arrays, in evaluation.
      platforms: On which it can run.

    Returns:
      Bytes for `jax.export.deserialize(...).call(*inputs)`, for batches of any size. Images are as
      `run.task.inputs` makes them. A recurrent model first takes a list of the states of its
      layers, zeros in the beginning, and returns logits and the next states.

    Raises:
      ImportError: If `flatbuffers`, which JAX needs for it, is not installed.
    """
    (batch,) = jax.export.symbolic_shape("batch")

    def any_batch(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype)

    graphdef, params, rest = _split(model)
    inputs: tuple[Any, ...] = tuple(any_batch(x) for x in run.task.example(run.config))
    if not _has_lanes(run):
        call: Callable[..., Any] = lambda *x: nnx.merge(graphdef, params, rest)(*x)  # noqa: E731
    else:
        carry, treedef = jax.tree.flatten(rest)
        inputs = (list(map(any_batch, carry)), *inputs)

        def call(carry: list[jax.Array], *x: Any) -> tuple[jax.Array, list[jax.Array]]:
            streaming = nnx.merge(graphdef, params, jax.tree.unflatten(treedef, carry))
            logits = streaming(*x)
            after = nnx.to_pure_dict(nnx.state(streaming, nnx.Not(nnx.Param)))
            return logits, jax.tree.leaves(after)

    return bytes(jax.export.export(jax.jit(call), platforms=platforms)(*inputs).serialize())


def measure(
    folder: pathlib.Path, run: Run, state: TrainState, found: Mapping[str, Form], split: Any = None
) -> dict[str, Measured]:
    """Measures all forms in turn, so that other work on the machine slows down all alike.

    Args:
      folder: With the files of `write`.
      run: The run.
      state: Its state.
      found: From `forms`.
      split: On which accuracy is measured; None for none.

    Returns:
      `{name: what was measured}`: medians of five rounds.
    """
    calls = {(n, b): _call(run, form.model, b) for n, form in found.items() for b in BATCHES}
    outputs = {n: np.asarray(calls[n, BATCHES[1]]()) for n in found}
    seconds: dict[tuple[str, int], list[float]] = {key: [] for key in calls}
    for _ in range(_ROUNDS):
        for key, call in calls.items():
            seconds[key].append(_seconds(call))
    median = {key: statistics.median(several) for key, several in seconds.items()}
    return {
        name: Measured(
            disk=(folder / f"{form.file}{export.SUFFIX}").stat().st_size,
            memory=sum(x.nbytes for x in jax.tree.leaves(nnx.state(form.model))),
            accuracy=None if split is None else _accuracy(run, state, form.model, split),
            difference=_difference(outputs[name], outputs["dense"]),
            latency=median[name, 1],
            throughput={b: b / median[name, b] for b in BATCHES[1:]},
        )
        for name, form in found.items()
    }


def fastest(measured: Mapping[str, Measured]) -> dict[int, str]:
    """Returns the fastest form at each batch; of those with the accuracy of the dense one."""
    same = [n for n, m in measured.items() if m.accuracy == measured["dense"].accuracy]
    speed = {(n, b): m.throughput[b] for n, m in measured.items() for b in BATCHES[1:]}
    speed |= {(n, 1): 1 / m.latency for n, m in measured.items()}
    return {b: max(same, key=lambda name: speed[name, b]) for b in BATCHES}


def table(measured: Mapping[str, Measured]) -> str:
    """Writes what was measured as a table, and says where dense wins.

    Accuracies are compared as they are: the same number of right answers on the whole split.
    """
    heads = "".join(f" {b}: examples/s |" for b in BATCHES[1:])
    lines = [
        f"| form | on disk | in memory | accuracy | outputs differ by | 1: ms |{heads}",
        "|---" * (6 + len(BATCHES[1:])) + "|",
    ]
    for name, m in measured.items():
        accuracy = "" if m.accuracy is None else f"{100 * m.accuracy:.2f} %"
        cells = [f"{m.disk / 1e3:,.1f} kB", f"{m.memory / 1e3:,.1f} kB", accuracy]
        cells += [
            f"{m.difference:.1g}",
            f"{1e3 * m.latency:.3f}",
            *(f"{n:,.0f}" for n in m.throughput.values()),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    best = fastest(measured)
    lines += ["", "fastest: " + ", ".join(f"{name} at {batch}" for batch, name in best.items())]
    if "dense" in best.values():
        won = ", ".join(str(batch) for batch, name in best.items() if name == "dense")
        lines.append(
            f"dense is the fastest at batches of {won}: there sparsity saves bytes, not time"
        )
    differing = [n for n, m in measured.items() if m.accuracy != measured["dense"].accuracy]
    if differing:
        lines.append(f"NOT the accuracy of dense: {', '.join(differing)}")
    return "\n".join(lines)


def record(folder: pathlib.Path, measured: Mapping[str, Measured]) -> None:
    """Writes what was measured, and the fastest form at each batch, into `forms.json`."""
    named = {name: json.loads(json.dumps(m._asdict())) for name, m in measured.items()}
    best = {str(batch): name for batch, name in fastest(measured).items()}
    files.write(folder / "forms.json", {"forms": named, "fastest": best})


def _whole(run: Run, state: TrainState) -> tuple[PyTree, PyTree, PyTree]:
    """Returns dense parameters, masks and the rest of the model, whole, on the host."""
    whole = run.placement.compile(run.placement.gather)
    masks = run.representation.weight_masks(state) if run.method.masked else {}
    return jax.device_get(whole((run.representation.dense(state), masks, state.model_state)))


def _model(graphdef: Any, params: PyTree, model_state: PyTree) -> nnx.Module:
    return nnx.merge(graphdef, *jax.tree.map(jnp.asarray, (params, model_state)))


def _split(model: nnx.Module) -> tuple[Any, PyTree, PyTree]:
    parts: Any = nnx.split(model, nnx.Param, ...)
    return parts[0], nnx.to_pure_dict(parts[1]), nnx.to_pure_dict(parts[2])


def _partial(masks: PyTree) -> dict[str, np.ndarray]:
    return {path: m for path, m in _paths.flatten_with_paths(masks) if not m.all()}


def _blocks(run: Run, model: nnx.Module, params: PyTree, masks: PyTree) -> tuple[PyTree, str]:
    """Returns parameters with blocks in place of kernels, or why there are none."""
    if not _partial(masks):
        return None, "no layer is sparse"
    if run.config.method.structure.name == sparsity.MEASURED:
        shapes = {path: leaf.shape for path, leaf in _paths.flatten_with_paths(run.shapes)}
        chosen = sparsity.structure_of_layers(
            run.config, shapes, sparsity.distribution(run.config)(run.shapes)
        )
    else:
        sparse = _partial(masks)
        chosen = sparsity.structure_of_layers(
            run.config, {p: m.shape for p, m in sparse.items()}, dict.fromkeys(sparse, 0.0)
        )
    own = {path: m for path, m in _partial(masks).items() if isinstance(chosen[path], Block)}
    if not own:
        return None, "it was not trained with blocks"
    if reasons := layers.refused(model, own):
        return None, "; ".join(f"{path}: {why}" for path, why in reasons.items())
    weights, topologies = condensed.condense(
        params, own, {f"^{re.escape(p)}$": chosen[p] for p in own}
    )
    return condensed.bind(weights, topologies), ""


def _single(
    model: nnx.Module, params: PyTree, masks: PyTree
) -> tuple[nnx.Module | None, tuple[str, ...]]:
    """Returns the model with single weights where its layers take them, and what stays dense."""
    sparse = _partial(masks)
    able = set()
    for at, module in nnx.iter_modules(model):
        is_able = isinstance(module, layers.Linear) or (
            isinstance(module, recurrent.Gates) and module.fused
        )
        if is_able:
            able.add("/".join(map(str, (*at, "kernel"))))
    own = {path: m for path, m in sparse.items() if path in able and m.ndim == 2}
    if not own:
        return None, ()
    graphdef, _, rest = _split(model)
    kernels = condensed.bind(*condensed.condense_csr(params, own))
    return _model(graphdef, kernels, rest), tuple(path for path in sparse if path not in own)


def _has_lanes(run: Run) -> bool:
    """Tells whether the model keeps a state for each sequence of a batch."""
    return isinstance(run.task, tasks.Bytes) and not isinstance(run.task, tasks.Windows)


def _call(run: Run, model: nnx.Module, batch: int) -> Callable[[], Any]:
    """Compiles a forward pass of one batch, and returns what runs it."""
    graphdef, params, rest = _split(model)
    if _has_lanes(run):
        rest = run.task.at_rest(rest, batch)
    generator = np.random.default_rng(0)

    def drawn(x: Any) -> jax.Array:
        shape = (batch, *x.shape[1:])
        if jnp.issubdtype(x.dtype, jnp.floating):
            return jnp.asarray(generator.random(shape), x.dtype)
        # Tokens; and that no text begins.
        values = np.zeros(shape) if x.dtype == bool else generator.integers(0, 100, shape)
        return jnp.asarray(values, x.dtype)

    inputs = tuple(map(drawn, run.task.example(run.config)))
    compiled = jax.jit(lambda params, rest, *x: nnx.merge(graphdef, params, rest)(*x))
    call = functools.partial(compiled, params, rest, *inputs)
    jax.block_until_ready(call())
    return call


def _difference(outputs: np.ndarray, dense: np.ndarray) -> float:
    largest = float(np.max(np.abs(dense)))
    return float(np.max(np.abs(outputs - dense))) / largest if largest else 0.0


def _seconds(call: Callable[[], Any]) -> float:
    """Measures one call, repeated for as long as a turn."""
    done, began = 0, time.perf_counter()
    while (passed := time.perf_counter() - began) < _TURN or not done:
        jax.block_until_ready(call())
        done += 1
    return passed / done


def _accuracy(run: Run, state: TrainState, model: nnx.Module, split: Any) -> float:
    graphdef, params, rest = _split(model)
    same = dataclasses.replace(run, graphdef=graphdef, representation=Masked(has_masks=False))
    held = state._replace(params=params, model_state=rest)
    return evaluation.evaluator(same)(held, split)["accuracy"]


def _write(path: pathlib.Path, data: bytes) -> None:
    with files.replacing(path) as file:
        file.write(data)
