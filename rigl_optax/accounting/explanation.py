"""Explains a sparse run before its first step: active weights, rewirings and FLOPs by layer."""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rigl_optax import _layout, _masks, _paths, _structures
from rigl_optax._distributions import nothing_dense
from rigl_optax._types import Overrides, PyTree, Sparsity
from rigl_optax._wrapper import _refusals
from rigl_optax._wrapper._design import Design, design_of
from rigl_optax.accounting import _reasons, _warnings, costs, storage
from rigl_optax.accounting.flops import Cost, count_flops
from rigl_optax.accounting.report import Explanation, LayerReport
from rigl_optax.methods import _facts

# Number of active weights of each sparse leaf: int64, one entry per layer stacked in the leaf.
Counts = Mapping[str, np.ndarray]

# The transformation of each method that can be explained; None where nothing is sparse.
TRANSFORMATIONS: dict[str, Callable[..., optax.GradientTransformation] | None] = {
    name: facts.transform
    for name, facts in _facts.METHODS.items()
    if name != "small_dense"  # a network of another size
}


class _ActiveCounts(NamedTuple):
    """Numbers of active weights, and of active groups, of each sparse leaf; see `Counts`."""

    weights: dict[str, np.ndarray]
    groups: dict[str, np.ndarray]


def explain(
    params: PyTree,
    sparsity: Sparsity | None,
    *,
    end: int | None = None,
    every: int | None = None,
    begin: int = 0,
    drop_fraction: float | optax.Schedule = 0.3,
    accumulate: int = 1,
    overrides: Overrides | None = None,
    structure: _structures.Structures = _structures.UNSTRUCTURED,
    initial_masks: PyTree | None = None,
    method: str = "rigl",
    steps: int | None = None,
    model: Callable[..., Any] | None = None,
    inputs: Sequence[PyTree] = (),
    **options: Any,
) -> Explanation:
    """Explains what `rigl` (or another method) will do and cost, given its arguments.

    Builds the transformation and asks it, so the numbers are those that its `init` makes.

    Args:
      params: Parameters, or their shapes: nothing is computed with them.
      sparsity: As in `rigl`; for `str` its `layers`.
      end: As in `rigl`. Ignored if the method has no such argument, like the next three.
      every: As in `rigl`; None: the method's own default.
      begin: As in `rigl`.
      drop_fraction: As in `rigl`.
      accumulate: As in `rigl`.
      overrides: As in `rigl`.
      structure: As in `rigl`.
      initial_masks: As in `rigl`.
      method: `rigl`, `set`, `mest`, `cht`, `snfs`, `dsr`, `deepr`, `gmp`, `granet`, `acdc`,
        `spdf`, `iht`, `top_kast`, `dnw`, `str`, `static`, `dense`; `snip`, `grasp`, `synflow` and
        `lottery`, which train as `static` does; or the name of the function, as `sparse_momentum`.
      steps: Number of training steps, for the cost of training; None: `end`.
      model: Forward pass, `model(params, *inputs)`; None: FLOPs are not counted.
      inputs: Further arguments of `model`, or their shapes: a batch of one example.
      **options: More arguments of the method, as `redistribute=True` or `backward_sparsity=0.8`.

    Returns:
      The explanation: print it for a table, or call `to_dict()`.

    Raises:
      ValueError: As the method does, on a bad schedule, distribution or structure; if the method
        has no such argument, or needs one that is not given.

    Examples:
      >>> params = {"Dense_0": {"kernel": jnp.ones((64, 32)), "bias": jnp.zeros(32)}}
      >>> forward = lambda p, x: x @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"]
      >>> example = jax.ShapeDtypeStruct((1, 64), "float32")
      >>> report = explain(params, 0.75, end=1_000, model=forward, inputs=[example])
      >>> report.inference_ratio, report.rewirings, report.layers[0].dense_because
      (0.25, 10, 'fewer than two dimensions')
    """
    _refusals.check_params(params)
    steps = end if steps is None else steps
    if steps is None:
        raise ValueError("end=None, steps=None: give the number of training steps")
    name = _name(method)
    make = TRANSFORMATIONS[name]
    optional = {"end": end, "every": every, "begin": begin, "drop_fraction": drop_fraction}
    required = dict(options)
    for key, value, default in (
        ("accumulate", accumulate, 1),
        ("overrides", overrides, None),
        ("structure", structure, _structures.UNSTRUCTURED),
        ("initial_masks", initial_masks, None),
    ):
        if value is not default and value != default:
            required[key] = value
    if make is None:
        if required:
            raise ValueError(f"method {method!r} has no {_paths.listing(list(required))}")
        return _explain_dense(params, name, steps, model, inputs)
    tx = make(optax.identity(), **_arguments(make, name, sparsity, optional, required))
    design = design_of(tx)
    assert design is not None
    return explain_design(design, params, method=name, steps=steps, model=model, inputs=inputs)


def explain_design(
    design: Design,
    params: PyTree,
    *,
    method: str,
    steps: int,
    model: Callable[..., Any] | None = None,
    inputs: Sequence[PyTree] = (),
    spent_before: float = 0.0,
    batch_size: int | None = None,
) -> Explanation:
    """Explains a transformation that has been built already, as `explain` does.

    Args:
      design: Design of the transformation, from `design_of`.
      params: As in `explain`.
      method: A key of `costs.METHODS`.
      steps: As in `explain`, but must be given.
      model: As in `explain`.
      inputs: As in `explain`.
      spent_before: FLOPs of finding the initial masks, per example of a batch.
      batch_size: Examples per step, over which what a rewiring costs whatever the batch is shared
        out; None leaves that out of the FLOPs of training, and a note says what it is.

    Returns:
      The explanation.
    """
    first, final = design.layouts(params)
    named = _paths.flatten_with_paths(params)
    start = _active_counts(first, design)
    end = start
    if design.method.progress is not None:
        end = _active_counts(final, design._replace(initial_masks=None))
    cost = None if model is None else count_flops(model, params, *inputs)
    fewest = {path: np.minimum(n, end.weights[path]) for path, n in start.weights.items()}
    reasons = _reasons.find(final, design.distribution, fewest)
    layers = tuple(
        _layer(path, leaf, start.weights.get(path), end.weights.get(path), reasons.get(path), cost)
        for path, leaf in named
    )
    fractions = _drop_fractions(design, first, steps)
    f_dense = f_sparse = training = None
    if cost is not None:
        f_dense = float(cost.total)
        f_sparse = costs.flops_at_sparsity(cost, _sparsities(final, end.weights))
        spent = spent_before + _spent(design, method, cost, first, start, end, steps)
        if batch_size is not None and design.plan is not None:
            rewirings = design.plan.rewirings_before(steps)
            spent += rewirings * rewiring_flops(design, final) / batch_size
        training = spent / (3 * f_dense * steps) if f_dense else None
    size = sum(x.size for x in layers)
    average = _average(
        design,
        sum(x.active for x in layers),
        sum(x.active_at_end for x in layers),
        size - sum(x.size for x in layers if x.is_sparse),
        steps,
    )
    report = Explanation(
        method=method,
        layers=layers,
        average_parameters=average,
        rewirings=design.plan.rewirings_before(steps) if design.plan and first.sparse else 0,
        replaced=_replaced(design, first, start, end, fractions),
        steps=steps,
        flops_dense=f_dense,
        flops_sparse=f_sparse,
        training_ratio=training,
        storage=_bytes_at_end(design, params, layers),
        notes=(
            *([] if cost is None else _notes(cost)),
            *_decided_in_training(method, design, steps),
            *(_not_per_example(rewiring_flops(design, final)) if batch_size is None else []),
        ),
        warnings=(),
    )
    is_random = design.initial_masks is None
    all_sparse = getattr(design.distribution, "dense", None) is nothing_dense
    found = _warnings.find(
        report, named, final, fewest, design.plan, fractions, is_random, all_sparse
    )
    return report._replace(warnings=tuple(found))


def _bytes_at_end(
    design: Design, params: PyTree, layers: Sequence[LayerReport]
) -> storage.StorageBytes:
    """Counts bytes of the weights when training ends."""
    return storage.storage_at(
        params,
        {x.path: x.active_at_end for x in layers if x.is_sparse},
        axes=_layout.axes_rule(design.distribution),
        stacked=getattr(design.distribution, "stacked", ()),
    )


def _name(method: str) -> str:
    """Returns the short name of a method, from that name or the name of its function."""
    if method in TRANSFORMATIONS:
        return method
    for name, make in TRANSFORMATIONS.items():
        if getattr(make, "__name__", None) == method:
            return name
    raise ValueError(f"method {method!r} cannot be explained; {', '.join(TRANSFORMATIONS)} can")


def _arguments(
    make: Callable[..., Any],
    name: str,
    sparsity: Sparsity | None,
    optional: Mapping[str, Any],
    required: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns the arguments for a method: those of `optional` that it has, and all of `required`.

    Raises:
      ValueError: If it has not all of `required`, or needs others.
    """
    has = {p.name: p for p in inspect.signature(make).parameters.values()}
    unknown = [key for key in required if key not in has]
    if unknown:
        listed = [key for key in has if key not in ("inner", "sparsity", "layers")]
        raise ValueError(
            f"method {name!r} has no {_paths.listing(unknown)}; it has {_paths.listing(listed)}"
        )
    found = {key: value for key, value in optional.items() if key in has and value is not None}
    found |= required
    if "sparsity" in has:
        found["sparsity"] = sparsity
    elif sparsity is not None:
        found["layers"] = _layout.as_distribution(sparsity, None)
    missing = [
        p.name for p in has.values() if p.default is p.empty and p.name not in (*found, "inner")
    ]
    if missing:
        raise ValueError(f"method {name!r} needs {_paths.listing(missing)}")
    return found


def _explain_dense(
    params: PyTree,
    method: str,
    steps: int,
    model: Callable[..., Any] | None,
    inputs: Sequence[PyTree],
) -> Explanation:
    """Explains the dense network."""
    cost = None if model is None else count_flops(model, params, *inputs)
    f_dense = None if cost is None else float(cost.total)
    layers = tuple(
        _layer(path, leaf, None, None, None, cost)
        for path, leaf in _paths.flatten_with_paths(params)
    )
    return Explanation(
        method=method,
        layers=layers,
        average_parameters=float(sum(x.size for x in layers)),
        rewirings=0,
        replaced=0,
        steps=steps,
        flops_dense=f_dense,
        flops_sparse=f_dense,
        training_ratio=1.0 if f_dense else None,
        storage=storage.storage_at(params, {}),
        notes=() if cost is None else _notes(cost),
        warnings=(),
    )


def _active_counts(layout: _layout.Layout, design: Design) -> _ActiveCounts:
    """Counts the weights and groups that are active in the masks that `init` makes of a layout."""
    given = dict(_paths.flatten_with_paths(design.initial_masks))
    weights, groups = {}, {}
    ragged = []
    for leaf in layout.sparse:
        sizes = np.unique(leaf.structure.group_sizes(leaf.shape[leaf.stacked :]))
        in_layer = math.prod(leaf.grid[leaf.stacked :])
        if design.initial_masks is not None:
            weights[leaf.path] = _counted(given[leaf.path], leaf)
            # Exact for groups of one size, and an estimate where those at the edges are smaller.
            groups[leaf.path] = np.rint(
                weights[leaf.path] * in_layer / max(1, math.prod(leaf.shape[leaf.stacked :]))
            ).astype(np.int64)
            continue
        assert leaf.zeros is not None
        active = in_layer - leaf.zeros * (leaf.rankings // leaf.layers)
        groups[leaf.path] = np.full(leaf.layers, active, np.int64)
        if len(sizes) == 1:
            weights[leaf.path] = groups[leaf.path] * int(sizes[0])
        else:
            weights[leaf.path] = groups[leaf.path]  # keeps the order; replaced below
            ragged.append(leaf)
    if ragged:
        # Groups at the edges are smaller, so the count depends on the masks that are drawn.
        drawn = _masks.random_masks(layout._replace(sparse=ragged), design.seed)
        for leaf in ragged:
            weights[leaf.path] = _counted(drawn[leaf.position], leaf)
    return _ActiveCounts(weights, groups)


def _counted(mask: Any, leaf: _layout.SparseLeaf) -> np.ndarray:
    return np.asarray(mask).reshape(leaf.layers, -1).sum(axis=1, dtype=np.int64)


def _sparsities(layout: _layout.Layout, active: Counts) -> dict[str, float]:
    sizes = {leaf.path: math.prod(leaf.shape) for leaf in layout.sparse}
    return {p: 1 - int(active[p].sum()) / size for p, size in sizes.items() if size}


def _layer(
    path: str,
    leaf: Any,
    start: np.ndarray | None,
    end: np.ndarray | None,
    reason: str | None,
    cost: Cost | None,
) -> LayerReport:
    size = math.prod(leaf.shape)
    active, at_end = (size if n is None else int(n.sum()) for n in (start, end))
    flops = None if cost is None else cost.by_parameter[path]
    share = None if flops is None or cost is None else flops / cost.total if cost.total else 0.0
    return LayerReport(
        path=path,
        shape=tuple(leaf.shape),
        is_sparse=start is not None,
        sparsity=1 - active / size if size else 0.0,
        active=active,
        active_at_end=at_end,
        flops=flops,
        flops_share=share,
        dense_because=reason,
    )


def _drop_fractions(design: Design, layout: _layout.Layout, steps: int) -> dict[str, np.ndarray]:
    """Computes the drop fraction of each leaf at each of its rewirings, float32 in [0, 1].

    Returns:
      `{path: float32 (rewirings,)}`; empty for a method that has no drop fraction, as its weights
      decide how many are replaced.
    """
    if design.plan is None or design.method.shadow is not None:
        return {}
    found, computed = {}, {}
    for leaf in layout.sparse:
        own = design.plan.of(leaf.path)
        if own not in computed:
            schedule = own.schedule
            counts = jnp.arange(schedule.begin, min(schedule.end, steps), schedule.every)
            fraction = lambda t, own=own: jnp.asarray(own.drop_fraction(t), jnp.float32)  # noqa: E731
            computed[own] = np.clip(jax.vmap(fraction)(counts.astype(jnp.int32)), 0, 1)
        found[leaf.path] = computed[own]
    if design.method.progress is not None and not any(np.any(f) for f in found.values()):
        return {}  # it only prunes, and replaces nothing
    return found


def _replaced(
    design: Design,
    layout: _layout.Layout,
    start: _ActiveCounts,
    end: _ActiveCounts,
    fractions: Mapping[str, np.ndarray],
) -> int | None:
    """Counts the weights that all rewirings replace, rounded as the transformation rounds.

    None if the weights decide how many are replaced.
    """
    if design.plan is not None and design.method.shadow is not None:
        return None
    if not fractions:
        return 0
    assert design.plan is not None
    total = 0
    in_layer = {leaf.path: math.prod(leaf.grid[leaf.stacked :]) for leaf in layout.sparse}
    for path, groups in start.groups.items():
        progress = np.zeros(len(fractions[path]))
        if design.method.progress is not None:
            steps = design.plan.of(path).schedule.steps()[: len(progress)]
            progress = np.asarray([design.method.progress(t) for t in steps])
        change = (end.groups[path] - groups)[:, None] * progress[None, :]
        active = groups[:, None] + np.floor(change)  # (stacked layers, rewirings)
        counts = active.astype(np.float32) * fractions[path][None, :].astype(np.float32)
        # In a layer that is full, or almost, what is dropped grows again.
        most = np.minimum(active, in_layer[path] - active).astype(np.int64)
        moved = np.minimum(counts.astype(np.int64), most).sum(1)
        group_size = start.weights[path] / np.maximum(groups, 1)  # mean
        total += int((moved * group_size).sum())
    return total


def _spent(
    design: Design,
    method: str,
    cost: Cost,
    layout: _layout.Layout,
    start: _ActiveCounts,
    end: _ActiveCounts,
    steps: int,
) -> float:
    """Computes the FLOPs of `steps` training steps per example."""
    wider = None
    if design.method.wider is not None:
        backward = design.method.wider(layout)
        own = _active_counts(backward, design._replace(initial_masks=None)).weights
        counts = {p: np.maximum(n, start.weights[p]) for p, n in own.items()}
        wider = costs.flops_at_sparsity(cost, _sparsities(layout, counts))
    none = {path: np.zeros_like(n) for path, n in start.weights.items()}
    at_start, at_end, without = (
        costs.flops_at_sparsity(cost, _sparsities(layout, n))
        for n in (start.weights, end.weights, none)
    )
    counter = costs.FlopsCounter(
        costs.METHODS[method], design.plan, float(cost.total), at_start, f_wider=wider
    )
    for done, value in _course(design, at_start, at_end, without, steps):
        counter.record(done, value)
    return counter.spent(steps)


def _course(
    design: Design, first: float, last: float, without: float, steps: int
) -> Iterator[tuple[int, float]]:
    """Follows what grows with the number of active weights, as FLOPs do.

    Args:
      design: Of the transformation.
      first: Its value with the first masks.
      last: With the final ones.
      without: With no active weight in any sparse layer.
      steps: Of training.

    Yields:
      Steps done and the value from then on, after each rewiring that changes it.
    """
    method = design.method
    if design.plan is None or (method.progress is None and method.excess is None):
        return
    before = first
    for t in design.plan.steps_before(steps):
        value = first
        if method.progress is not None:
            value = first + method.progress(t) * (last - first)
        elif method.excess is not None:
            value = first + method.excess(t) * (first - without)
        if value != before:
            yield t + 1, value
        before = value


def _average(design: Design, first: float, last: float, without: float, steps: int) -> float:
    """Returns the mean over the steps of what `_course` follows."""
    total, at, value = 0.0, 0, first
    for done, new in _course(design, first, last, without, steps):
        total += (done - at) * value
        at, value = done, new
    return (total + (steps - at) * value) / steps if steps else first


def rewiring_flops(design: Design, layout: _layout.Layout) -> float:
    """Returns the FLOPs of a rewiring whatever the batch, beside those of its passes."""
    own = design.method.rewiring_flops
    return 0.0 if own is None else own(layout)


def _not_per_example(flops: float) -> list[str]:
    if not flops:
        return []
    return [
        f"each rewiring also costs {flops:.3g} FLOPs whatever the batch, which the FLOPs of "
        "training here, per example, leave out"
    ]


def _notes(cost: Cost) -> tuple[str, ...]:
    notes = [*cost.notes]
    for item in cost.unattributed:
        notes.append(f"{item.flops:.3g} FLOPs of {item.primitive} at {item.where}: {item.why}")
    return tuple(notes)


def _decided_in_training(method: str, design: Design, steps: int) -> list[str]:
    """Says which numbers only training decides, and what the explanation shows instead."""
    if method == "str":
        return [
            "the sparsity is learned: the numbers of active weights and FLOPs are those of the "
            "start, which are upper bounds"
        ]
    if design.method.excess is not None and design.plan is not None:
        most = max(map(design.method.excess, design.plan.steps_before(steps)), default=0.0)
        return [
            f"up to {most:.1%} more weights than these are active between rewirings; FLOPs of "
            "training, and the average number of parameters, count them"
        ]
    if design.method.moves_between_layers:
        return [
            "weights move between layers: numbers of single layers, and FLOPs, are those of the "
            "distribution at the start"
        ]
    return []
