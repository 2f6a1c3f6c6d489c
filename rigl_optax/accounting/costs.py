"""Computes FLOPs of training from FLOPs of a forward pass, for every method.

FLOPs are multiplies plus adds. A training step is a forward pass, a gradient with respect to the
activations and one with respect to the weights, each as costly as the forward pass (paper,
appendix H); loss, normalisation, the optimizer and the selection of weights are not counted.
"""

import bisect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from rigl_optax import _masks, _paths, _plan
from rigl_optax._plan import RewiringPlan
from rigl_optax._types import PyTree
from rigl_optax.accounting.flops import Cost
from rigl_optax.methods import _facts
from rigl_optax.methods._facts import Facts


class StepCost(NamedTuple):
    """States which of the three passes of a training step are dense.

    Attributes:
      forward: Whether the forward pass is dense.
      activations: Whether the gradient with respect to the activations is dense.
      weights: Whether the gradient with respect to the weights is dense.
      is_wider: Whether that gradient covers more weights than the forward pass, but not all (the
        backward set of Top-KAST).
    """

    forward: bool
    activations: bool
    weights: bool
    is_wider: bool = False

    def flops(self, f_dense: float, f_sparse: float, f_wider: float | None = None) -> float:
        """Computes the FLOPs of the step per example.

        Args:
          f_dense: FLOPs of a dense forward pass.
          f_sparse: FLOPs of a sparse forward pass.
          f_wider: FLOPs of a forward pass with all weights that have a gradient, if `is_wider`.

        Raises:
          ValueError: If the method needs `f_wider` and it is not given.
        """
        weights = f_dense if self.weights else f_sparse
        if self.is_wider:
            if f_wider is None:
                raise ValueError(
                    "f_wider=None: this method computes gradients of more weights than are active; "
                    "give the FLOPs of a forward pass with those weights"
                )
            weights = f_wider
        return sum(f_dense if dense else f_sparse for dense in self[:2]) + weights


class MethodCost(NamedTuple):
    """Costs of the kinds of steps of a method.

    Attributes:
      ordinary: A step that trains.
      rewiring: A step that changes the topology; None if it costs the same.
      initial: A gradient taken before the first step; None if there is none.
      initial_times: Number of such gradients.
    """

    ordinary: StepCost
    rewiring: StepCost | None = None
    initial: StepCost | None = None
    initial_times: float = 1.0


_DENSE = StepCost(True, True, True)
_SPARSE = StepCost(False, False, False)
_DENSE_GRADIENT = StepCost(False, False, True)


def _cost(facts: Facts) -> MethodCost:
    """Returns what the steps of a method cost: at the density of the moment, where it changes."""
    initial = _DENSE if facts.initial_gradients else None
    times = facts.initial_gradients or 1.0
    if facts.transform is None:
        return MethodCost(_DENSE)
    if facts.dense_gradients == "rewirings":
        return MethodCost(_SPARSE, _DENSE_GRADIENT, initial, times)
    ordinary = {
        "never": _SPARSE,  # a rewiring needs no gradient; the loop has taken one
        "every step": _DENSE_GRADIENT,
        "wider set": StepCost(False, False, False, is_wider=True),
    }[facts.dense_gradients]
    return MethodCost(ordinary, None, initial, times)


METHODS: dict[str, MethodCost] = {
    **{name: _cost(facts) for name, facts in _facts.METHODS.items()},
    "pruning": MethodCost(_SPARSE),  # the paper's name of `gmp`
}


class FlopsCounter:
    """Sums training FLOPs; every number of spent FLOPs that is reported comes from here.

    The FLOPs of a sparse forward pass may change in training; `record` tells the counter.
    """

    def __init__(
        self,
        method: MethodCost,
        plan: RewiringPlan | None,
        f_dense: float,
        f_sparse: float,
        *,
        batch_size: int = 1,
        f_wider: float | None = None,
        per_rewiring: float = 0.0,
    ) -> None:
        """Starts before the first step.

        Args:
          method: Costs of the steps.
          plan: When the method rewires, and how many dense gradients decide on growth; None for
            never.
          f_dense: FLOPs of a dense forward pass, per example.
          f_sparse: FLOPs of a sparse forward pass, per example, at the start.
          batch_size: Examples per step.
          f_wider: As in `cumulative_cost`.
          per_rewiring: FLOPs of a rewiring whatever the batch, beside those of its passes.
        """
        self._rewirings = plan if per_rewiring else None
        self._per_rewiring = per_rewiring
        self._method, self._batch_size = method, batch_size
        self._f_dense, self._f_wider = f_dense, f_wider
        # Rewirings that cost as much as any other step need not be counted.
        has_own_cost = method.rewiring not in (None, method.ordinary)
        self._plan = plan if has_own_cost else None
        self._recorded = [(0, f_sparse)]
        self._spent = [0.0]  # FLOPs spent at each entry of `_recorded`
        if method.initial is not None:
            first = method.initial.flops(f_dense, f_sparse, f_wider)
            self._spent = [method.initial_times * first * batch_size]

    @property
    def f_sparse(self) -> float:
        """FLOPs of a sparse forward pass per example, as last recorded."""
        return self._recorded[-1][1]

    @property
    def recorded(self) -> int:
        """Number of steps done when FLOPs were last recorded."""
        return self._recorded[-1][0]

    def record(self, done: int, f_sparse: float) -> None:
        """Records that a sparse forward pass costs `f_sparse` from now on.

        Args:
          done: Number of steps done; no fewer than at the last record.
          f_sparse: FLOPs of a sparse forward pass per example, from here on.

        Raises:
          ValueError: If `done` is less than at the last record.
        """
        if done < self._recorded[-1][0]:
            raise ValueError(f"done={done}: less than {self._recorded[-1][0]}, recorded before")
        spent = self.spent(done)
        self._recorded.append((done, f_sparse))
        self._spent.append(spent)

    def spent(self, steps: int) -> float:
        """Computes the FLOPs of the first `steps` steps, over whole batches.

        Raises:
          ValueError: If `steps` is negative.
        """
        if steps < 0:
            raise ValueError(f"steps={steps}: the number of steps done is 0 or more")
        index = bisect.bisect_right(self._recorded, steps, key=lambda entry: entry[0]) - 1
        start, f_sparse = self._recorded[index]
        dense = 0
        if self._plan is not None:
            before = self._plan.dense_gradients_before
            dense = before(steps) - before(start)
        rewiring, ordinary = (
            each.flops(self._f_dense, f_sparse, self._f_wider)
            for each in (self._method.rewiring or self._method.ordinary, self._method.ordinary)
        )
        per_example = dense * rewiring + (steps - start - dense) * ordinary
        own = 0.0
        if self._rewirings is not None:
            number = self._rewirings.rewirings_before
            own = (number(steps) - number(start)) * self._per_rewiring
        return self._spent[index] + self._batch_size * per_example + own


def flops_at_sparsity(cost: Cost, sparsity: Mapping[str, float]) -> float:
    """Computes FLOPs of a forward pass from the sparsity of each layer.

    Args:
      cost: From `count_flops`.
      sparsity: `{path: sparsity}` as `uniform`, `erk`, ... return it; layers that are not in it
        are dense, and so are unattributed FLOPs.

    Returns:
      The sparse cost `f_S`, with every layer at exactly `1 - sparsity`, unrounded.

    Raises:
      ValueError: If `sparsity` names a path that `cost` does not have.

    Examples:
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
    """Computes FLOPs of a forward pass from masks.

    Args:
      cost: From `count_flops`.
      masks: Bool arrays in the tree structure of the parameters, as `get_masks` returns them.

    Returns:
      The sparse cost `f_S`, from the number of active weights in each leaf.

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
    accumulate: int = 1,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    f_wider: float | None = None,
    per_rewiring: float = 0.0,
) -> Callable[[Any], Any]:
    """Returns a function that computes the training FLOPs spent after any number of steps.

    It counts this library's steps, for plots against FLOPs; `published_cost` has the paper's
    formulas. With `f_D` and `f_S` the FLOPs of a dense and a sparse forward pass, a step costs

    - dense `3 f_D`; static, SNIP and SET `3 f_S`; SNFS and DNW `2 f_S + f_D`;
    - RigL `3 f_S`, and `2 f_S + f_D` where `begin <= t < end` and `(t - begin) % every == 0`: such
      a step replaces a gradient step and computes the dense gradient of the weights. With
      `accumulate=n` so do the n - 1 steps before it;
    - SET `3 f_S` at a rewiring too. It needs no gradient there, but the training loop computes the
      sparse one before the transformation can tell;
    - SNIP `3 f_D` once, to score one batch of the dense network before the first step;
    - pruning `3 f_S(t)`, with `f_sparse` a function of the step;
    - CHT `3 f_S`, and `per_rewiring` once for each rewiring: for a layer of i inputs and o outputs
      `4 i o (i + o)`, of the dense matrices that link prediction multiplies;
    - Top-KAST `2 f_S + f_B`, with the forward FLOPs `f_B` of its backward set in `f_wider`.

    Args:
      method: A key of `METHODS`, or a `MethodCost` of your own.
      f_dense: FLOPs of a dense forward pass per example.
      f_sparse: FLOPs of a sparse forward pass per example; or a function of the step, whose value
        may change only at and just after rewiring steps and `end`.
      batch_size: Examples per step.
      begin: First rewiring step.
      end: No rewiring at or after it; must be given if the method's rewiring steps cost
        differently or `f_sparse` is a function.
      every: Steps between rewirings.
      accumulate: Number of steps whose dense gradients decide on growth, as in `rigl`.
      overrides: Schedules of single layers, as in `rigl`.
      f_wider: FLOPs of a forward pass with all weights that have a gradient, if these are more
        than the active ones.
      per_rewiring: FLOPs of a rewiring whatever the batch, beside those of its passes.

    Returns:
      `spent(steps)`, from a number of steps done (scalar or array) to FLOPs (float or array).

    Raises:
      ValueError: If the method is not known, `end` or `f_wider` is missing, or the schedule is
        malformed.

    Examples:
      >>> spent = cumulative_cost("rigl", 100.0, 10.0, end=1000, every=100)
      >>> spent(1), spent(100), spent(1000), spent(2000)
      (120.0, 3090.0, 30900.0, 60900.0)
    """
    kind = _method(method)
    plan, changes = None, [0]
    if callable(f_sparse) or per_rewiring or kind.rewiring not in (None, kind.ordinary):
        if end is None:
            raise ValueError(f"method {method!r} needs `end`, the step at which rewiring stops")
        plan = _plan.rewiring_plan(begin=begin, end=end, every=every, overrides=overrides)
        if not 1 <= accumulate <= every:
            raise ValueError(f"accumulate={accumulate!r}: must be an integer in [1, every={every}]")
        plan = plan._replace(window=accumulate)
    f_at = f_sparse if callable(f_sparse) else lambda _: f_sparse
    if callable(f_sparse) and plan is not None and end is not None:
        steps = {t for schedule in plan.schedules for t in schedule.steps()}
        changes = sorted({0, *steps, *(t + 1 for t in steps), end, end + 1})
    counter = FlopsCounter(
        kind,
        plan,
        f_dense,
        f_at(0),
        batch_size=batch_size,
        f_wider=f_wider,
        per_rewiring=per_rewiring,
    )
    for t in changes[1:]:
        counter.record(t, f_at(t))
    counter.spent(1)  # raises now if `f_wider` is missing, not at the first use

    def cumulative(steps: Any) -> Any:
        if np.ndim(steps) == 0:
            return float(counter.spent(int(steps)))
        spent = [counter.spent(int(n)) for n in np.ravel(steps)]
        return np.reshape(np.asarray(spent, np.float64), np.shape(steps))

    return cumulative


def training_cost(
    method: str | MethodCost,
    f_dense: float,
    f_sparse: float | Callable[[int], float],
    *,
    steps: int,
    **arguments: Any,
) -> float:
    """Computes FLOPs of a training run of `steps` steps; see `cumulative_cost` for the rest."""
    return float(cumulative_cost(method, f_dense, f_sparse, **arguments)(steps))


def published_cost(
    method: str,
    f_dense: float,
    f_sparse: float | Sequence[float],
    *,
    every: int = 100,
    f_wider: float | None = None,
) -> float:
    """Computes FLOPs per example and step by the paper's formulas (appendix H).

    They differ from `training_cost` for two methods. RigL costs `(3 f_S Delta T + 2 f_S + f_D) /
    (Delta T + 1)`: each rewiring comes after `Delta T` gradient steps instead of replacing one, and
    rewirings go on to the end of training, whatever T_end. SNIP's dense gradient is not counted.

    Args:
      method: A key of `METHODS`.
      f_dense: FLOPs of a dense forward pass.
      f_sparse: FLOPs of a sparse forward pass; for pruning, samples over the whole of training,
        which are averaged.
      every: The paper's Delta T.
      f_wider: As in `cumulative_cost`.

    Returns:
      FLOPs per example and step.

    Raises:
      ValueError: If the method is not known or `every < 1`.

    Examples:
      >>> round(published_cost("rigl", 1.0, 0.4153) / published_cost("dense", 1.0, 0.4153), 3)
      0.417
    """
    if every < 1:
        raise ValueError(f"every={every}: steps between rewirings must be 1 or more")
    kind = _method(method)
    mean = float(np.mean(f_sparse))
    ordinary = kind.ordinary.flops(f_dense, mean, f_wider)
    if kind.rewiring is None:
        return ordinary
    return (ordinary * every + kind.rewiring.flops(f_dense, mean, f_wider)) / (every + 1)


def _method(method: str | MethodCost) -> MethodCost:
    if isinstance(method, MethodCost):
        return method
    if method not in METHODS:
        raise ValueError(f"method {method!r} is not known; known are {', '.join(METHODS)}")
    return METHODS[method]
