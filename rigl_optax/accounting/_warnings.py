"""Looks for the usual mistakes of sparse training before the first step."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from rigl_optax import _axes, _distributions, _layout, _paths
from rigl_optax._plan import RewiringPlan
from rigl_optax.accounting.report import Explanation

FEW_INPUTS = 2  # active inputs of a unit, on average over its layer
LITTLE_TURNOVER = 0.5  # weights replaced by all rewirings / active weights
EARLY_END = 0.25  # fraction of training; the paper rewires for three quarters (section 4)
LARGE_SHARE = 0.1  # fraction of the FLOPs


def find(
    report: Explanation,
    named: list[tuple[str, Any]],
    layout: _layout.Layout,
    active: Mapping[str, np.ndarray],
    plan: RewiringPlan | None,
    fractions: Mapping[str, np.ndarray],
    is_random: bool,
    all_sparse: bool,
) -> list[str]:
    """Returns warnings, each a sentence that names the layers and says what to do.

    Args:
      report: The explanation, complete but for its warnings.
      named: Paths and leaves of params.
      layout: Which leaves are sparse.
      active: Number of active weights of each sparse leaf when it has fewest: int64, one entry
        per layer stacked in the leaf.
      plan: When to rewire; None for never.
      fractions: Drop fraction of each leaf at each of its rewirings, float32; empty for methods
        without one.
      is_random: Whether initial masks are drawn at random.
      all_sparse: Whether biases, embeddings and scales were asked to be sparse.
    """
    return [
        *_layers(dict(named), layout, active, fractions, all_sparse),
        *_flops(report),
        *_schedule(report, plan, fractions),
        *_pretrained(named, report, is_random),
    ]


def _layers(
    leaves: dict[str, Any],
    layout: _layout.Layout,
    active: Mapping[str, np.ndarray],
    fractions: Mapping[str, np.ndarray],
    all_sparse: bool,
) -> Iterator[str]:
    starving, unusual, frozen = [], {}, []
    for leaf in layout.sparse:
        shape = tuple(leaves[leaf.path].shape)[leaf.stacked :]
        counts, size = active[leaf.path], math.prod(shape)
        if np.all(counts == size):
            continue
        if len(shape) > 1 and counts.min() < FEW_INPUTS * leaf.kernel[-1]:
            starving.append(f"{leaf.path} ({counts.min() / leaf.kernel[-1]:.2g})")
        struct = jax.ShapeDtypeStruct(shape, leaves[leaf.path].dtype)
        axes = leaf.kernel_axes
        reason = _distributions.dense_reason(leaf.path, struct, lambda *_, axes=axes: axes)
        if reason is not None and not all_sparse:
            unusual[leaf.path] = reason
        own = fractions.get(leaf.path, np.zeros(0))
        if len(own) and np.all(counts * np.max(own) < 1):
            frozen.append(leaf.path)
    if starving:
        yield (
            f"fewer than {FEW_INPUTS} inputs per unit on average in {', '.join(starving)}: units "
            "will be dead; make these layers denser with `overrides`, or lower the sparsity"
        )
    for path, reason in unusual.items():
        yield f"{path} is masked, but is usually left dense ({reason})"
    if frozen:
        yield (
            f"too few active weights for the drop fraction to replace any in "
            f"{_paths.listing(frozen)}"
        )


def _flops(report: Explanation) -> Iterator[str]:
    if not report.flops_dense:
        return
    unused = [x.path for x in report.layers if x.dense_because is None and x.flops == 0]
    if unused:
        yield f"no product uses {_paths.listing(unused)}: masking it saves no FLOPs"
    attributed = sum(x.flops or 0 for x in report.layers)
    share = 1 - attributed / report.flops_dense
    if share > LARGE_SHARE:
        yield f"{share:.0%} of the FLOPs belong to no single parameter and stay dense (see notes)"


def _schedule(
    report: Explanation, plan: RewiringPlan | None, fractions: Mapping[str, np.ndarray]
) -> Iterator[str]:
    # Without drop fractions the weights decide how much is replaced, whatever the schedule.
    if plan is None or not report.rewirings or not fractions:
        return
    if not report.weights or report.active_at_end == report.weights:
        return
    schedule = plan.default.schedule
    if report.turnover is not None and report.turnover < LITTLE_TURNOVER:
        yield (
            f"the schedule ends before it matters: its {report.rewirings} rewirings replace "
            f"{report.turnover:.0%} of the active weights in all; the topology is nearly static"
        )
    if schedule.end > report.steps:
        yield (
            f"end={schedule.end} lies beyond the last of {report.steps} steps: weights are still "
            "replaced when training stops; the paper ends at three quarters"
        )
    elif schedule.end < EARLY_END * report.steps:
        yield (
            f"rewiring ends after {schedule.end / report.steps:.0%} of {report.steps} steps; the "
            "paper ends at three quarters"
        )
    if report.method == "rigl" and schedule.every * (1 - report.sparsity) < 1:
        yield (
            f"every={schedule.every} is less than 1 / density: dense gradients, not sparse steps, "
            "make up most of the weight gradients' cost (paper, section 3)"
        )


def _pretrained(
    named: list[tuple[str, Any]], report: Explanation, is_random: bool
) -> Iterator[str]:
    if not is_random or report.active == report.weights:
        return
    # In a new model biases and scales are constant. Not Equinox's: like PyTorch's, the biases of
    # its linear layers start at random.
    drawn = {_parent(path) for path, leaf in named if _is_equinox_kernel(path, leaf)}
    trained = [
        path
        for path, leaf in named
        if isinstance(leaf, jax.Array | np.ndarray)
        and not isinstance(leaf, jax.core.Tracer)
        and leaf.ndim == 1
        and leaf.size > 1
        and _parent(path) not in drawn
        and np.ptp(np.asarray(leaf, np.float64)) > 0
    ]
    if trained:
        yield (
            f"{_paths.listing(trained, limit=3)} hold different values, as after training: if "
            "these weights are pretrained, random masks destroy them; pass `initial_masks` that "
            "keep the largest weights"
        )


def _parent(path: str) -> str:
    return path.rpartition("/")[0]


def _is_equinox_kernel(path: str, leaf: Any) -> bool:
    if len(leaf.shape) < 2:
        return False
    axes = _axes.default_axes(path, leaf)
    return axes == _axes.equinox_axes(path, leaf)
