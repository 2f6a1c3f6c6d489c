"""From FLOPs of a forward pass to FLOPs of training, sparse against dense."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from rigl_optax import _masks, _paths, _schedules
from rigl_optax.accounting.flops import Cost

PyTree = Any


class StepCost(NamedTuple):
    """Which of the three passes of a training step run at the dense cost.

    Attributes:
      forward: Whether the forward pass is dense.
      activations: Whether the gradient with respect to the activations is.
      weights: Whether the gradient with respect to the weights is.
      is_wider: Whether that gradient is of more weights than the forward pass has, if not of
        all (the backward set of Top-KAST).
    """

    forward: bool
    activations: bool
    weights: bool
    is_wider: bool = False

    def flops(self, f_dense: float, f_sparse: float, f_wider: float | None = None) -> float:
        """FLOPs per example: each pass costs one forward pass (paper, appendix H).

        Args:
          f_dense: Of a dense forward pass.
          f_sparse: Of a sparse one.
          f_wider: Of one with the weights that have a gradient, where these are more.
        """
        weights = f_dense if self.weights else f_sparse
        if self.is_wider:
            weights = f_dense if f_wider is None else f_wider
        return sum(f_dense if dense else f_sparse for dense in self[:2]) + weights


class MethodCost(NamedTuple):
    """What the steps of a method cost.

    Attributes:
      ordinary: A step that trains.
      rewiring: A step that changes the topology instead; None where it costs the same.
      initial: A gradient taken before the first step.
      initial_times: How often.
    """

    ordinary: StepCost
    rewiring: StepCost | None = None
    initial: StepCost | None = None
    initial_times: float = 1.0


_DENSE = StepCost(True, True, True)
_SPARSE = StepCost(False, False, False)
_DENSE_GRADIENT = StepCost(False, False, True)

METHODS: dict[str, MethodCost] = {
    "dense": MethodCost(_DENSE),
    "static": MethodCost(_SPARSE),
    "snip": MethodCost(_SPARSE, initial=_DENSE),
    # Growth is random: no dense gradient. The loop has taken a sparse gradient all the same.
    "set": MethodCost(_SPARSE),
    "rigl": MethodCost(_SPARSE, rewiring=_DENSE_GRADIENT),
    "snfs": MethodCost(_DENSE_GRADIENT),  # its average sees a dense gradient at every step
    # These at the density of the moment, where it changes.
    "pruning": MethodCost(_SPARSE),
    "granet": MethodCost(_SPARSE, rewiring=_DENSE_GRADIENT),
    "dsr": MethodCost(_SPARSE),
    "str": MethodCost(_SPARSE),
    "deepr": MethodCost(_SPARSE),
    "dnw": MethodCost(_DENSE_GRADIENT),  # all shadow weights learn
    "top_kast": MethodCost(StepCost(False, False, False, is_wider=True)),
    # A gradient, and its derivative along it: two more.
    "grasp": MethodCost(_SPARSE, initial=_DENSE, initial_times=3.0),
    # A hundred gradients of one example each: about a batch.
    "synflow": MethodCost(_SPARSE, initial=_DENSE),
}


def flops_at_sparsity(cost: Cost, sparsity: Mapping[str, float]) -> float:
    """FLOPs of a forward pass, given the sparsity of each layer.

    Args:
      cost: From `count_flops`.
      sparsity: `{path: sparsity}` as `uniform`, `erk`, ... return it; layers it leaves out are
        dense, and so is all that is unattributed.

    Returns:
      The sparse cost `f_S`; every layer at exactly `1 - sparsity`, unrounded.

    Raises:
      ValueError: If `sparsity` names a path that `cost` does not have.

    Example:
      >>> cost = Cost({"a/kernel": 200, "b/kernel": 100}, (), 0, ())
      >>> flops_at_sparsity(cost, {"a/kernel": 0.75})
      150.0
    """
    unknown = [path for path in sparsity if path not in cost.by_parameter]
    if unknown:
        raise ValueError(
            f"sparsity has {_paths.listing(unknown)}, which no parameter is called; parameters "
            f"are {_paths.listing(list(cost.by_parameter))}"
        )
    saved = sum(cost.by_parameter[path] * s for path, s in sparsity.items())
    return float(cost.total - saved)


def flops_of_masks(cost: Cost, masks: PyTree) -> float:
    """FLOPs of a forward pass under real masks.

    Args:
      cost: From `count_flops`.
      masks: Bool arrays in the tree structure of the parameters, as `get_masks` returns them.

    Returns:
      The sparse cost `f_S`, by the number of active weights in each leaf.

    Raises:
      ValueError: If the paths of `masks` are not those of `cost`.
    """
    found = _masks.over_paths(masks, list(cost.by_parameter))
    named = [(path, mask) for path, mask in found.items() if mask is not None]
    counts = jax.device_get([jax.numpy.count_nonzero(mask) for _, mask in named])
    sparsity = {
        path: 1 - int(active) / mask.size
        for (path, mask), active in zip(named, counts, strict=True)
        if mask.size
    }
    return flops_at_sparsity(cost, sparsity)


def cumulative_cost(
    method: str | MethodCost,
    f_dense: float,
    f_sparse: float | Callable[[int], float],
    *,
    batch_size: int = 1,
    begin: int = 0,
    end: int | None = None,
    every: int = 100,
) -> Callable[[Any], Any]:
    """Training FLOPs spent after any number of steps, for curves against FLOPs.

    Sums what this library's steps do. A step is a forward pass, a gradient by activations and one
    by weights, each as costly as the forward pass (paper, appendix H); loss, normalisation, the
    optimizer and the selection of weights are not counted.

    - dense `3 f_D`; static, SNIP and SET `3 f_S`; SNFS `2 f_S + f_D`;
    - RigL `3 f_S`, and `2 f_S + f_D` where `begin <= t < end` and `(t - begin) % every == 0`:
      there the gradient by weights is dense. That step replaces a gradient step;
    - a SET rewiring replaces a step too. It could do without a gradient, but the training loop has
      taken the sparse one before the transformation knows: `3 f_S` are spent;
    - SNIP scores one batch of the dense network before the first step: `3 f_D` once;
    - pruning `3 f_S(t)`, with `f_sparse` a function of the step.

    Args:
      method: A key of `METHODS`, or a `MethodCost` of your own.
      f_dense: FLOPs of a dense forward pass per example.
      f_sparse: FLOPs of a sparse one; or a function of the step, if they change over time, which
        may change at and just after rewiring steps and `end`.
      batch_size: Examples per step.
      begin: First rewiring step.
      end: No rewiring at or after it; must be given if the method's rewiring steps cost
        differently or `f_sparse` is a function.
      every: Steps between rewirings.

    Returns:
      A function of the number of steps done (scalar or array) to FLOPs (float or array).

    Raises:
      ValueError: If the method is not known, or `end` is missing, or the schedule is malformed.

    Example:
      >>> spent = cumulative_cost("rigl", 100.0, 10.0, end=1000, every=100)
      >>> spent(1), spent(100), spent(1000), spent(2000)
      (120.0, 3090.0, 30900.0, 60900.0)
    """
    kind = _method(method)
    if not callable(f_sparse) and kind.rewiring in (None, kind.ordinary):
        rewirings = range(0)
    elif end is None:
        raise ValueError(f"method {method!r} needs `end`, the step at which rewiring stops")
    else:
        rewirings = _schedules.rewiring_schedule(begin=begin, end=end, every=every).steps()
    f_at = f_sparse if callable(f_sparse) else lambda _: f_sparse
    points = sorted(
        {0, *rewirings, *(t + 1 for t in rewirings), *((end, end + 1) if end and rewirings else ())}
    )
    rates = [
        ((kind.rewiring or kind.ordinary) if t in rewirings else kind.ordinary).flops(
            f_dense, f_at(t)
        )
        * batch_size
        for t in points
    ]
    initial = 0.0
    if kind.initial:
        initial = kind.initial_times * kind.initial.flops(f_dense, f_at(0)) * batch_size
    starts, slopes = np.asarray(points), np.asarray(rates, np.float64)
    spent = initial + np.concatenate([[0.0], np.cumsum(slopes[:-1] * np.diff(starts))])

    def cumulative(steps: Any) -> Any:
        at = np.searchsorted(starts, steps, side="right") - 1
        if np.min(at) < 0:
            raise ValueError(f"steps={steps}: the number of steps done is 0 or more")
        total = spent[at] + (np.asarray(steps) - starts[at]) * slopes[at]
        return float(total) if np.ndim(total) == 0 else total

    return cumulative


def training_cost(
    method: str | MethodCost,
    f_dense: float,
    f_sparse: float | Callable[[int], float],
    *,
    steps: int,
    batch_size: int = 1,
    begin: int = 0,
    end: int | None = None,
    every: int = 100,
) -> float:
    """FLOPs of a whole training run of `steps` steps; arguments as in `cumulative_cost`."""
    spent = cumulative_cost(
        method, f_dense, f_sparse, batch_size=batch_size, begin=begin, end=end, every=every
    )
    return float(spent(steps))


def published_cost(
    method: str, f_dense: float, f_sparse: float | Sequence[float], *, every: int = 100
) -> float:
    """FLOPs per example and step by the paper's formulas (appendix H).

    They differ from `training_cost` for RigL, `(3 f_S Delta T + 2 f_S + f_D) / (Delta T + 1)`: a
    rewiring comes on top of `Delta T` gradient steps, and goes on to the end of training, whatever
    T_end; and for SNIP, whose dense gradient is left out.

    Args:
      method: A key of `METHODS`.
      f_dense: FLOPs of a dense forward pass.
      f_sparse: FLOPs of a sparse one; for pruning, samples of it over the whole of training, to be
        averaged.
      every: The paper's Delta T.

    Returns:
      FLOPs per example and step.

    Raises:
      ValueError: If the method is not known or `every < 1`.

    Example:
      >>> round(published_cost("rigl", 1.0, 0.4153) / published_cost("dense", 1.0, 0.4153), 3)
      0.417
    """
    if every < 1:
        raise ValueError(f"every={every}: steps between rewirings must be 1 or more")
    kind = _method(method)
    mean = float(np.mean(f_sparse))
    ordinary = kind.ordinary.flops(f_dense, mean)
    if kind.rewiring is None:
        return ordinary
    return (ordinary * every + kind.rewiring.flops(f_dense, mean)) / (every + 1)


def _method(method: str | MethodCost) -> MethodCost:
    if isinstance(method, MethodCost):
        return method
    if method not in METHODS:
        raise ValueError(f"method {method!r} is not known; known are {', '.join(METHODS)}")
    return METHODS[method]
