"""From FLOPs of a forward pass to FLOPs of training, sparse against dense."""

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

        Raises:
          ValueError: If the method needs `f_wider` and it is not given.
        """
        weights = f_dense if self.weights else f_sparse
        if self.is_wider:
            if f_wider is None:
                raise ValueError(
                    "f_wider=None: gradients are those of a wider set of weights here, neither "
                    "dense nor sparse; give the FLOPs of a forward pass with that set"
                )
            weights = f_wider
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
    """Training FLOPs after any number of steps: the one sum that everything told is taken from.

    A step is a forward pass, a gradient by activations and one by weights, each as costly as the
    forward pass (paper, appendix H). What a forward pass costs is noted as it changes.
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
    ) -> None:
        """Starts before the first step.

        Args:
          method: What the steps cost.
          plan: When it rewires, and how many dense gradients decide on growth; None for never.
          f_dense: FLOPs of a dense forward pass, per example.
          f_sparse: FLOPs of a sparse one, at first.
          batch_size: Examples per step.
          f_wider: As in `cumulative_cost`.
        """
        self._method, self._batch_size = method, batch_size
        self._f_dense, self._f_wider = f_dense, f_wider
        # Where such a step costs as much as any other, nobody need count them.
        has_own_cost = method.rewiring not in (None, method.ordinary)
        self._plan = plan if has_own_cost else None
        self._noted = [(0, f_sparse)]
        self._spent = [0.0]  # when each entry of `_noted` was made
        if method.initial is not None:
            first = method.initial.flops(f_dense, f_sparse, f_wider)
            self._spent = [method.initial_times * first * batch_size]

    @property
    def f_sparse(self) -> float:
        """FLOPs of a sparse forward pass, as last noted."""
        return self._noted[-1][1]

    def note(self, done: int, f_sparse: float) -> None:
        """Notes what a forward pass costs after `done` steps, no fewer than at the last note."""
        if done < self._noted[-1][0]:
            raise ValueError(f"done={done}: less than {self._noted[-1][0]}, noted before")
        spent = self.spent(done)
        self._noted.append((done, f_sparse))
        self._spent.append(spent)

    def spent(self, steps: int) -> float:
        """FLOPs after so many steps, from the beginning.

        Raises:
          ValueError: If `steps` is negative.
        """
        if steps < 0:
            raise ValueError(f"steps={steps}: the number of steps done is 0 or more")
        index = bisect.bisect_right(self._noted, steps, key=lambda note: note[0]) - 1
        start, f_sparse = self._noted[index]
        dense = 0
        if self._plan is not None:
            before = self._plan.dense_gradients_before
            dense = before(steps) - before(start)
        rewiring, ordinary = (
            each.flops(self._f_dense, f_sparse, self._f_wider)
            for each in (self._method.rewiring or self._method.ordinary, self._method.ordinary)
        )
        each_example = dense * rewiring + (steps - start - dense) * ordinary
        return self._spent[index] + self._batch_size * each_example


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
    accumulate: int = 1,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    f_wider: float | None = None,
) -> Callable[[Any], Any]:
    """Training FLOPs spent after any number of steps, for curves against FLOPs.

    Sums what this library's steps do. A step is a forward pass, a gradient by activations and one
    by weights, each as costly as the forward pass (paper, appendix H); loss, normalisation, the
    optimizer and the selection of weights are not counted.

    - dense `3 f_D`; static, SNIP and SET `3 f_S`; SNFS and DNW `2 f_S + f_D`;
    - RigL `3 f_S`, and `2 f_S + f_D` where `begin <= t < end` and `(t - begin) % every == 0`:
      there the gradient by weights is dense. That step replaces a gradient step. With
      `accumulate=n` the gradients of the last n steps up to it are dense;
    - a SET rewiring replaces a step too. It could do without a gradient, but the training loop has
      taken the sparse one before the transformation knows: `3 f_S` are spent;
    - SNIP scores one batch of the dense network before the first step: `3 f_D` once;
    - pruning `3 f_S(t)`, with `f_sparse` a function of the step;
    - Top-KAST `2 f_S + f_B`, with the forward FLOPs `f_B` of its backward set in `f_wider`.

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
      accumulate: As in `rigl`.
      overrides: As in `rigl`.
      f_wider: FLOPs of a forward pass with the weights that have a gradient, where these are more
        than the active ones.

    Returns:
      A function of the number of steps done (scalar or array) to FLOPs (float or array).

    Raises:
      ValueError: If the method is not known, `end` or `f_wider` is missing, or the schedule is
        malformed.

    Example:
      >>> spent = cumulative_cost("rigl", 100.0, 10.0, end=1000, every=100)
      >>> spent(1), spent(100), spent(1000), spent(2000)
      (120.0, 3090.0, 30900.0, 60900.0)
    """
    kind = _method(method)
    plan, changes = None, [0]
    if callable(f_sparse) or kind.rewiring not in (None, kind.ordinary):
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
    counter = FlopsCounter(kind, plan, f_dense, f_at(0), batch_size=batch_size, f_wider=f_wider)
    for t in changes[1:]:
        counter.note(t, f_at(t))
    counter.spent(1)  # raises what is missing now, not at the first use

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
    """FLOPs of a whole training run of `steps` steps; other arguments as in `cumulative_cost`."""
    return float(cumulative_cost(method, f_dense, f_sparse, **arguments)(steps))


def published_cost(
    method: str,
    f_dense: float,
    f_sparse: float | Sequence[float],
    *,
    every: int = 100,
    f_wider: float | None = None,
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
      f_wider: As in `cumulative_cost`.

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
