"""The methods of one engine, restated in NumPy one leaf at a time; read by the tests only.

Written from the formulas in the docstrings: loops, sorts and Python integers.
"""

from dataclasses import dataclass, field

import numpy as np

from tests.core.reference import Reference, State, kept_mask, number_to_drop


def magnitude(x):
    return np.abs(np.asarray(x).astype(np.float32))


def keep_largest(mask, weight, keep):
    """The `keep` active weights of largest magnitude."""
    scores = np.where(mask, magnitude(weight), -1)
    order = np.argsort(-scores.reshape(-1), kind="stable")[:keep]
    kept = np.zeros(mask.size, bool)
    kept[order] = True
    return kept.reshape(mask.shape)


def grow_largest(kept, scores, grow):
    free = np.flatnonzero(~kept.reshape(-1))
    order = free[np.argsort(-scores.reshape(-1)[free], kind="stable")][:grow]
    new = kept.reshape(-1).copy()
    new[order] = True
    return new.reshape(kept.shape)


def apportion(total, shares, room):
    """Shares to 15 bits, rounded cumulatively, again and again while there is room."""
    parts = [0] * len(room)
    total = min(total, sum(room))
    while sum(parts) < total:
        left = total - sum(parts)
        free = [r - p for r, p in zip(room, parts, strict=True)]
        weights = [np.float32(s) if f else np.float32(0) for s, f in zip(shares, free, strict=True)]
        if not max(weights):
            weights = [np.float32(f) for f in free]
        scale = 2.0 ** (14 - exponent(max(weights)))
        quanta = [int(np.float64(w) * scale) for w in weights]
        cumulative = [sum(quanta[: i + 1]) for i in range(len(quanta))]
        before = 0
        for i, c in enumerate(cumulative):
            bound = left * c // cumulative[-1]
            parts[i] += min(bound - before, free[i])
            before = bound
    return parts


def exponent(x):
    return int(np.frexp(np.float64(x))[1]) - 1


def mean_magnitude(values, mask):
    """To 16 bits of the layer's largest."""
    active = magnitude(values)[mask]
    if not active.size or not active.max():
        return np.float32(0)
    shift = 15 - exponent(active.max())
    quanta = (active.astype(np.float64) * 2.0**shift).astype(np.int64)
    total = np.float32(0)
    for bit in range(16):
        total = total + np.float32(((quanta >> bit) & 1).sum()) * np.float32(1 << bit)
    return total / np.float32(active.size) * np.float32(2.0**-shift)


@dataclass
class Set(Reference):
    """Growth by scores that are handed in: `scores(t, name) -> array`."""

    scores: object = None

    def rewire(self, t, state, params, grads):
        fraction = self.fraction(t) if callable(self.fraction) else self.fraction
        new = {}
        for n in self.sparse:
            kept = kept_mask(state.masks[n], params[n], fraction)
            grow = state.masks[n].sum() - kept.sum()
            new[n] = grow_largest(kept, self.scores(t, n), int(grow))
        return new


def sum_toward_zero(x, y):
    """Of two float32, in float32."""
    exact = x.astype(np.float64) + y.astype(np.float64)
    nearest = exact.astype(np.float32)
    return np.where(nearest > exact, np.nextafter(nearest, np.float32(0)), nearest)


@dataclass
class Gse(Set):
    """The largest gradients grow of a random sample of what is inactive."""

    ratio: float = 1.0

    def rewire(self, t, state, params, grads):
        fraction = self.fraction(t) if callable(self.fraction) else self.fraction
        new = {}
        for n in self.sparse:
            mask = state.masks[n]
            active = int(mask.sum())
            number = min(mask.size - active, int(np.float32(active) * np.float32(self.ratio)))
            sample = grow_largest(mask, self.scores(t, n), number) & ~mask
            drop = min(number_to_drop(active, fraction), number)
            kept = keep_largest(mask, params[n], active - drop)
            grown = grow_largest(~sample, magnitude(grads[n]), drop) & sample
            new[n] = kept | grown
        return new


@dataclass
class Mest(Set):
    """Drops by magnitude and gradient together."""

    weight: float = 1.0

    def rewire(self, t, state, params, grads):
        fraction = self.fraction(t) if callable(self.fraction) else self.fraction
        new = {}
        for n in self.sparse:
            mask = state.masks[n]
            pull = magnitude(np.float32(self.weight) * grads[n])
            drop = number_to_drop(int(mask.sum()), fraction)
            both = sum_toward_zero(magnitude(params[n]), pull)
            kept = keep_largest(mask, both, int(mask.sum()) - drop)
            new[n] = grow_largest(kept, self.scores(t, n), drop)
        return new


@dataclass
class SoftMest(Set):
    """Drops what was grown beyond the numbers at the start, then grows."""

    weight: float = 1.0
    numbers: dict = field(default_factory=dict)

    def rewire(self, t, state, params, grads):
        fraction = self.fraction(t) if callable(self.fraction) else self.fraction
        last = range(self.begin, self.end, self.every)[-1]
        new = {}
        for n in self.sparse:
            number = self.numbers.setdefault(n, int(state.masks[n].sum()))
            pull = magnitude(np.float32(self.weight) * grads[n])
            both = sum_toward_zero(magnitude(params[n]), pull)
            kept = keep_largest(state.masks[n], both, number)
            grow = 0 if t == last else min(number_to_drop(number, fraction), kept.size - number)
            new[n] = grow_largest(kept, self.scores(t, n), grow)
        return new


@dataclass
class Snfs(Reference):
    momentum: float = 0.9
    redistribute: bool = False
    average: dict = field(default_factory=dict)

    def update(self, grads, state, params):
        f = np.float32
        for n in self.sparse:
            old = self.average.get(n, np.zeros_like(params[n]))
            finite = np.where(np.isfinite(grads[n]), grads[n], 0)
            self.average[n] = f(self.momentum) * old + f(1 - self.momentum) * finite
        return super().update(grads, state, params)

    def rewire(self, t, state, params, grads):
        fraction = self.fraction(t) if callable(self.fraction) else self.fraction
        names = [n for n in params if n in self.sparse]
        kept = {n: kept_mask(state.masks[n], params[n], fraction) for n in names}
        dropped = [int(state.masks[n].sum() - kept[n].sum()) for n in names]
        grow = dropped
        if self.redistribute:
            means = [mean_magnitude(self.average[n], state.masks[n]) for n in names]
            room = [int((~kept[n]).sum()) for n in names]
            grow = apportion(sum(dropped), means, room)
        return {
            n: grow_largest(kept[n], magnitude(self.average[n]), g)
            for n, g in zip(names, grow, strict=True)
        }


@dataclass
class Dsr(Reference):
    scores: object = None
    threshold: float = 1e-3
    tolerance: float = 0.1

    def rewire(self, t, state, params, grads):
        fraction = self.fraction(t) if callable(self.fraction) else self.fraction
        names = [n for n in params if n in self.sparse]
        active = [int(state.masks[n].sum()) for n in names]
        kept = {}
        for n in names:
            above = state.masks[n] & (magnitude(params[n]) >= np.float32(self.threshold))
            kept[n] = above if above.any() else keep_largest(state.masks[n], params[n], 1)
        keep = [int(kept[n].sum()) for n in names]
        dropped = sum(active) - sum(keep)
        target = number_to_drop(sum(active), fraction)
        room = [kept[n].size - k for n, k in zip(names, keep, strict=True)]
        grow = apportion(dropped, keep, room)
        if np.float32(dropped) < np.float32(1 - self.tolerance) * np.float32(target):
            self.threshold = self.threshold * 2
        elif np.float32(dropped) > np.float32(1 + self.tolerance) * np.float32(target):
            self.threshold = self.threshold / 2
        return {
            n: grow_largest(kept[n], self.scores(t, n), g) for n, g in zip(names, grow, strict=True)
        }


@dataclass
class Falling(Reference):
    zeros: dict = field(default_factory=dict)  # in the end
    start: dict = field(default_factory=dict)
    power: int = 3

    def numbers(self, t, params):
        """How many weights of each sparse leaf are active after the rewiring at t."""
        steps = range(self.begin, self.end, self.every)
        first, last = steps[0], steps[-1]
        left = np.float32(last - t) / np.float32(max(last - first, 1))
        gone = np.float32(1) - left**self.power
        keep = []
        for n in (n for n in params if n in self.sparse):
            to_go = self.zeros[n] - self.start[n]
            zeros = self.start[n] + int(np.floor(np.float32(to_go) * gone))
            zeros = self.zeros[n] if t >= last else min(zeros, self.zeros[n])
            keep.append(params[n].size - zeros)
        return keep


@dataclass
class Acdc(Reference):
    """Sparse and dense phases in turns; momentum starts anew where a dense one begins."""

    zeros: dict = field(default_factory=dict)
    start: dict = field(default_factory=dict)

    def compresses(self, t):
        return (t - self.begin) // self.every % 2 == 0

    def rewire(self, t, state, params, grads):
        new = {}
        for n in self.sparse:
            new[n] = np.ones_like(state.masks[n])
            if self.compresses(t):
                new[n] = keep_largest(new[n], params[n], params[n].size - self.zeros[n])
        return new

    def update(self, grads, state, params):
        updates, new = super().update(grads, state, params)
        if self.is_rewiring(state.count) and not self.compresses(state.count):
            new.slots = {n: self.inner.init(p) for n, p in params.items()}
        return updates, new


@dataclass
class HardThresholding(Falling):
    """All weights take each step; then only the largest stay."""

    def numbers(self, t, params):
        """In integers: the share of the way is rounded down to 15 bits."""
        steps = range(self.begin, self.end, self.every)
        share = min(t - steps[0], steps[-1] - steps[0]) * 2**15 // (steps[-1] - steps[0])
        return {
            n: params[n].size - self.start[n] - (self.zeros[n] - self.start[n]) * share // 2**15
            for n in self.sparse
        }

    def update(self, grads, state, params):
        t = state.count
        renews = t >= self.begin and (t - self.begin) % self.every == 0
        new = State(dict(state.masks), {}, t + 1, state.rewirings + renews, state.healed)
        updates = {}
        for n, weight in params.items():
            step, new.slots[n] = self.inner.update(grads[n], state.slots[n], t)
            moved = weight + step
            if n in self.sparse and renews:
                new.masks[n] = keep_largest(
                    np.ones_like(state.masks[n]), moved, self.numbers(t, params)[n]
                )
            updates[n] = np.where(new.masks[n], moved, 0) - weight
        return updates, new


@dataclass
class Pruning(Falling):
    whole: bool = False  # one ranking of all layers
    regrow: bool = False

    def rewire(self, t, state, params, grads):
        names = [n for n in params if n in self.sparse]
        keep = self.numbers(t, params)
        if self.whole:
            flat = np.concatenate([magnitude(params[n]).reshape(-1) for n in names])
            active = np.concatenate([state.masks[n].reshape(-1) for n in names])
            chosen = keep_largest(active, flat, min(sum(keep), active.sum()))
            bounds = np.cumsum([params[n].size for n in names])[:-1]
            parts = np.split(chosen, bounds)
            masks = {n: p.reshape(params[n].shape) for n, p in zip(names, parts, strict=True)}
        else:
            masks = {
                n: keep_largest(state.masks[n], params[n], min(k, state.masks[n].sum()))
                for n, k in zip(names, keep, strict=True)
            }
        if self.regrow:
            fraction = self.fraction(t) if callable(self.fraction) else self.fraction
            for n in names:
                kept = kept_mask(masks[n], params[n], fraction)
                grow = int(masks[n].sum() - kept.sum())
                masks[n] = grow_largest(kept, magnitude(grads[n]), grow)
        return masks
