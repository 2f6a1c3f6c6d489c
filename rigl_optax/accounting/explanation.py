"""What a sparse run will be, before its first step: layer by layer, and in all."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rigl_optax import _layout, _paths, _refusals, _schedules
from rigl_optax.accounting import _reasons, _warnings, bytes, costs
from rigl_optax.accounting.flops import Cost, count_flops
from rigl_optax.accounting.report import Explanation, LayerReport

PyTree = Any

REWIRES = {"dense": False, "static": False, "snip": False, "set": True, "snfs": True, "rigl": True}


def explain(
    params: PyTree,
    sparsity: float | _layout.Distribution | None,
    *,
    end: int,
    every: int = 100,
    begin: int = 0,
    drop_fraction: float | optax.Schedule = 0.3,
    initial_masks: PyTree | None = None,
    method: str = "rigl",
    steps: int | None = None,
    model: Callable[..., Any] | None = None,
    inputs: Sequence[PyTree] = (),
) -> Explanation:
    """Explains what `rigl` (or another method), given these arguments, will do and cost.

    Args:
      params: Parameters, or their shapes: nothing is computed with them.
      sparsity: As in `rigl`.
      end: As in `rigl`.
      every: As in `rigl`.
      begin: As in `rigl`.
      drop_fraction: As in `rigl`.
      initial_masks: As in `rigl`.
      method: `dense`, `static`, `snip` (for which the schedule is idle), `set`, `snfs` or `rigl`:
        those whose number of active weights never changes.
      steps: Training steps in all, for the cost of training; `end` if not given.
      model: Forward pass, `model(params, *inputs)`; without it nothing is said about FLOPs.
      inputs: Its further arguments, or their shapes: one example.

    Returns:
      An `Explanation`: print it for a table, or take `to_dict()`.

    Raises:
      ValueError: As `rigl` does on a bad schedule or distribution.

    Example:
      >>> params = {"Dense_0": {"kernel": jnp.ones((64, 32)), "bias": jnp.zeros(32)}}
      >>> forward = lambda p, x: x @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"]
      >>> example = jax.ShapeDtypeStruct((1, 64), "float32")
      >>> report = explain(params, 0.75, end=1_000, model=forward, inputs=[example])
      >>> report.inference_ratio, report.rewirings, report.layers[0].dense_because
      (0.25, 10, 'fewer than two dimensions')
    """
    if method not in REWIRES:
        raise ValueError(f"method {method!r} cannot be explained; {', '.join(REWIRES)} can")
    _refusals.check_params(params)
    schedule = _schedules.rewiring_schedule(begin=begin, end=end, every=every)
    distribution = _layout.as_distribution(sparsity, initial_masks)
    layout = _layout.layout(params, distribution, masked=initial_masks is not None)
    named = _paths.flatten_with_paths(params)
    active = _active_counts(named, layout, initial_masks)
    is_sparse = method != "dense"
    cost = None if model is None else count_flops(model, params, *inputs)
    reasons = _reasons.find(layout, distribution, active) if is_sparse else {}
    layers = tuple(
        _layer(path, leaf, active.get(path) if is_sparse else None, reasons.get(path), cost)
        for path, leaf in named
    )
    fractions = _fractions(drop_fraction, schedule) if REWIRES[method] else np.zeros(0)
    replaced = sum(_replaced(active[s.path], fractions) for s in layout.sparse if is_sparse)
    steps = end if steps is None else steps
    sparsities = {x.path: x.sparsity for x in layers if x.is_sparse}
    f_dense = f_sparse = training = None
    if cost is not None:
        f_dense, f_sparse = float(cost.total), costs.flops_at_sparsity(cost, sparsities)
        spent = costs.training_cost(
            method, f_dense, f_sparse, steps=steps, begin=begin, end=end, every=every
        )
        training = spent / (3 * f_dense * steps) if f_dense else None
    report = Explanation(
        method=method,
        layers=layers,
        rewirings=len(fractions),
        replaced=replaced,
        steps=steps,
        flops_dense=f_dense,
        flops_sparse=f_sparse,
        training_ratio=training,
        storage=bytes.storage_at(
            params,
            {x.path: x.active for x in layers if x.is_sparse},
            axes=_layout.axes_rule(distribution),
            stacked=getattr(distribution, "stacked", ()),
        ),
        notes=() if cost is None else _notes(cost),
        warnings=(),
    )
    warnings = _warnings.find(
        report, named, layout, active, schedule, fractions, random=initial_masks is None
    )
    return report._replace(warnings=tuple(warnings))


def _active_counts(
    named: list[tuple[str, Any]], layout: _layout.Layout, initial_masks: PyTree | None
) -> dict[str, np.ndarray]:
    """Active weights of each sparse leaf: int64, one entry per layer stacked in it."""
    masks = dict(_paths.flatten_with_paths(initial_masks))
    shapes = {path: tuple(leaf.shape) for path, leaf in named}
    counts = {}
    for leaf in layout.sparse:
        shape = shapes[leaf.path]
        slices = shape[0] if leaf.stacked else 1
        if leaf.zeros is None:
            mask = np.asarray(masks[leaf.path]).reshape(slices, -1)
            counts[leaf.path] = mask.sum(axis=1, dtype=np.int64)
        else:
            counts[leaf.path] = np.full(slices, math.prod(shape) // slices - leaf.zeros, np.int64)
    return counts


def _layer(
    path: str, leaf: Any, active: np.ndarray | None, reason: str | None, cost: Cost | None
) -> LayerReport:
    size = math.prod(leaf.shape)
    total = size if active is None else int(active.sum())
    flops = None if cost is None else cost.by_parameter[path]
    share = None if flops is None or cost is None else flops / cost.total if cost.total else 0.0
    return LayerReport(
        path=path,
        shape=tuple(leaf.shape),
        is_sparse=active is not None,
        sparsity=1 - total / size if size else 0.0,
        active=total,
        flops=flops,
        flops_share=share,
        dense_because=reason,
    )


def _fractions(
    drop_fraction: float | optax.Schedule, schedule: _schedules.RewiringSchedule
) -> np.ndarray:
    """Drop fraction at every rewiring, float32 in [0, 1]."""
    fraction = _schedules.as_drop_fraction(drop_fraction, schedule)
    counts = jnp.asarray(schedule.steps(), jnp.int32)
    return np.clip(jax.vmap(lambda t: jnp.asarray(fraction(t), jnp.float32))(counts), 0, 1)


def _replaced(active: np.ndarray, fractions: np.ndarray) -> int:
    """Weights that all rewirings together replace: the transformation's own rounding."""
    counts = active[:, None].astype(np.float32) * fractions[None, :].astype(np.float32)
    return int(np.minimum(counts.astype(np.int64), active[:, None]).sum())


def _notes(cost: Cost) -> tuple[str, ...]:
    notes = [*cost.notes]
    for item in cost.unattributed:
        notes.append(f"{item.flops:.3g} FLOPs of {item.primitive} at {item.where}: {item.why}")
    return tuple(notes)
