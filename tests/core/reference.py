"""The contracts of `docs/design.md`, restated in NumPy and read by the tests only.

Written from the contracts alone, before the implementation was read. Loops and sorts where the
library has reductions, one leaf at a time where it has one loop for all, Python integers where it
counts on the device: whatever they agree on, they agree on for different reasons.

Trees are flat dictionaries from a name to an array here; a sparse leaf is one whose name is in
`sparse`, and `stacked` names those whose first axis counts layers.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

# --------------------------------------------------------------------------------------------
# Selection


def top_k_mask(scores: np.ndarray, k: int) -> np.ndarray:
    """True at the `k` largest scores; of equal scores the lower flat index is larger."""
    flat = np.asarray(scores).reshape(-1).astype(np.int64)
    assert 0 <= k <= flat.size
    chosen = np.zeros(flat.size, bool)
    chosen[np.argsort(-flat, kind="stable")[:k]] = True
    return chosen.reshape(np.shape(scores))


# --------------------------------------------------------------------------------------------
# One leaf of one rewiring


def number_to_drop(active: int, fraction: float) -> int:
    """`min(n, int32(float32(n) * clip(float32(fraction), 0, 1)))`."""
    clipped = np.clip(np.float32(fraction), np.float32(0), np.float32(1))
    return min(active, int(np.int64(np.float32(active) * clipped)))


def kept_mask(mask: np.ndarray, weight: np.ndarray, fraction: float) -> np.ndarray:
    """The `n - k` active weights of largest magnitude."""
    flat_mask = np.asarray(mask).reshape(-1)
    magnitude = np.abs(np.asarray(weight).astype(np.float32)).reshape(-1)
    active = np.flatnonzero(flat_mask)
    keep = active.size - number_to_drop(active.size, fraction)
    order = active[np.argsort(-magnitude[active], kind="stable")]
    kept = np.zeros(flat_mask.size, bool)
    kept[order[:keep]] = True
    return kept.reshape(np.shape(mask))


def rewired_mask(mask, weight, gradient, fraction) -> np.ndarray:
    """Keep the largest active weights, then grow the largest gradients among all the rest.

    Where all those gradients are 0, nothing says where to grow: the mask stays.
    """
    kept = kept_mask(mask, weight, fraction).reshape(-1)
    grow = int(np.count_nonzero(mask)) - int(np.count_nonzero(kept))
    magnitude = np.abs(np.asarray(gradient).astype(np.float32)).reshape(-1)
    free = np.flatnonzero(~kept)
    if not np.any(magnitude[free]):
        return np.array(mask)
    order = free[np.argsort(-magnitude[free], kind="stable")]
    new = kept.copy()
    new[order[:grow]] = True
    return new.reshape(np.shape(mask))


# --------------------------------------------------------------------------------------------
# Inner optimizers, for one leaf. `slots` are per-weight, `count` is shared by the leaves.


@dataclass(frozen=True)
class Momentum:
    """`optax.sgd(learning_rate, momentum, nesterov)`, with a rate that may depend on the step."""

    learning_rate: object
    momentum: float
    nesterov: bool = False

    def init(self, weight):
        return {"trace": np.zeros_like(weight)}

    def update(self, gradient, slots, count):
        decay = np.asarray(self.momentum, gradient.dtype)
        trace = gradient + decay * slots["trace"]
        direction = gradient + decay * trace if self.nesterov else trace
        rate = self.learning_rate(count) if callable(self.learning_rate) else self.learning_rate
        return np.asarray(-rate, gradient.dtype) * direction, {"trace": trace}


@dataclass(frozen=True)
class Adam:
    """`optax.adam(learning_rate)`."""

    learning_rate: float
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8

    def init(self, weight):
        return {"mu": np.zeros_like(weight), "nu": np.zeros_like(weight)}

    def update(self, gradient, slots, count):
        f = np.float32
        mu = f(1 - self.b1) * gradient + f(self.b1) * slots["mu"]
        nu = f(1 - self.b2) * (gradient * gradient) + f(self.b2) * slots["nu"]
        steps = f(count + 1)
        mu_hat = mu / (f(1) - f(self.b1) ** steps)
        nu_hat = nu / (f(1) - f(self.b2) ** steps)
        return f(-self.learning_rate) * (mu_hat / (np.sqrt(nu_hat) + f(self.eps))), {
            "mu": mu,
            "nu": nu,
        }


# --------------------------------------------------------------------------------------------
# One call of `update`


@dataclass
class State:
    masks: dict[str, np.ndarray]
    slots: dict[str, dict[str, np.ndarray]]
    count: int = 0
    rewirings: int = 0
    healed: int = 0


@dataclass
class Reference:
    """What `rigl_optax.rigl` promises, one leaf and one weight at a time."""

    inner: object
    sparse: frozenset[str]
    end: int
    every: int = 100
    begin: int = 0
    fraction: object = 0.3
    stacked: frozenset[str] = field(default_factory=frozenset)

    def init(self, params: Mapping[str, np.ndarray], masks: Mapping[str, np.ndarray]) -> State:
        full = {n: np.ones(np.shape(p), bool) for n, p in params.items()}
        full.update({n: np.array(m) for n, m in masks.items()})
        return State(full, {n: self.inner.init(p) for n, p in params.items()})

    def is_rewiring(self, t: int) -> bool:
        return self.begin <= t < self.end and (t - self.begin) % self.every == 0

    def rewire(self, t, state, params, grads):
        """The new masks of the sparse leaves."""
        fraction = self.fraction(t) if callable(self.fraction) else self.fraction
        return {
            n: self.rewire_leaf(n, state.masks[n], params[n], grads[n], fraction)
            for n in self.sparse
        }

    def rewire_leaf(self, name, mask, weight, gradient, fraction):
        if name in self.stacked:
            slices = zip(mask, weight, gradient, strict=True)
            return np.stack([rewired_mask(m, w, g, fraction) for m, w, g in slices])
        return rewired_mask(mask, weight, gradient, fraction)

    def update(self, grads, state: State, params):
        """Returns the updates and the new state."""
        t = state.count
        rewiring = self.is_rewiring(t)
        finite = all(np.isfinite(grads[n].astype(np.float32)).all() for n in self.sparse)
        gated = rewiring and not finite

        new = State(dict(state.masks), {}, t + 1, state.rewirings, state.healed)
        if rewiring and not gated:
            new.masks.update(self.rewire(t, state, params, grads))
            new.rewirings += 1
        if rewiring:
            for n in self.sparse:
                outside = ~state.masks[n] & (params[n] != 0)
                new.healed += int(np.count_nonzero(outside))

        updates = {}
        for n, weight in params.items():
            was, now = state.masks[n], new.masks[n]
            lives = was & now
            zero = np.zeros_like(grads[n])
            seen = zero if gated else np.where(was, grads[n], zero)
            step, slots = self.inner.update(seen, state.slots[n], t)
            if rewiring:  # it replaces the gradient step
                step = np.zeros_like(step)
                rest = self.inner.init(np.where(now, weight, np.zeros_like(weight)))
                old = state.slots[n]
                slots = {s: np.where(lives, old[s], rest[s]) for s in slots}
            updates[n] = np.where(lives, step, -weight)
            new.slots[n] = slots
        return updates, new


def apply_updates(params, updates):
    return {n: (p + updates[n]).astype(p.dtype) for n, p in params.items()}


# --------------------------------------------------------------------------------------------
# Distributions. Shapes in, sparsities out; `custom` layers are outside the budget.


def zeros_in(sparsity: float, shape) -> int:
    return math.floor(sparsity * math.prod(shape))


def uniform(shapes: Mapping[str, tuple], sparsity: float, custom: Mapping[str, float] = {}):
    return {n: custom.get(n, sparsity) for n in shapes}


def erk(
    shapes: Mapping[str, tuple],
    sparsity: float,
    custom: Mapping[str, float] = {},
    power: float = 1.0,
    kernel: bool = True,
    copies: Mapping[str, int] = {},
):
    """Erdos-Renyi(-Kernel) with capping as in the reference code's `sparse_utils.py`.

    `kernel=False` looks at the last two dimensions only. `copies[n]` layers share name `n` (a
    stack of layers: `shapes[n]` is one layer's shape).
    """
    count = {n: copies.get(n, 1) for n in shapes}
    size = {n: math.prod(s) for n, s in shapes.items()}
    raw = {}
    for n, shape in shapes.items():
        dims = shape if kernel else shape[-2:]
        raw[n] = (sum(dims) / math.prod(dims)) ** power
    dense: set[str] = set()
    while True:
        free = [n for n in shapes if n not in dense and n not in custom]
        if not free:
            raise ValueError("every layer would be dense")
        budget = 0
        for n in shapes:
            zeros = math.floor(sparsity * size[n])
            if n in custom:
                continue
            budget += count[n] * (-zeros if n in dense else size[n] - zeros)
        epsilon = budget / sum(count[n] * raw[n] * size[n] for n in free)
        largest = max(raw[n] for n in free)
        if largest * epsilon > 1:
            dense |= {n for n in free if raw[n] == largest}
            continue
        return {
            n: custom[n] if n in custom else 0.0 if n in dense else 1 - epsilon * raw[n]
            for n in shapes
        }
