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


def random_order(keys, size, number):
    """The first positions of a random order: a Feistel network on a grid, of eight rounds."""
    width = int(np.ceil(np.sqrt(np.float32(size))))
    height = -(-size // width)
    word = 2**32 - 1

    def mixed(x, key):
        h = (x * 0x9E3779B1 & word) ^ key
        h = (h ^ h >> 16) * 0x85EBCA6B & word
        h = (h ^ h >> 13) * 0xC2B2AE35 & word
        return h ^ h >> 16

    def permuted(x):
        i, j = divmod(x, width)
        for r, key in enumerate(keys):
            if r % 2:
                i = (i + mixed(j, key) % height) % height
            else:
                j = (j + mixed(i, key) % width) % width
        return i * width + j

    found = []
    for rank in range(number):
        place = permuted(rank)
        while place >= size:
            place = permuted(place)
        found.append(place)
    return found


@dataclass
class Gse(Set):
    """The largest gradients grow of those inactive positions that are in a random sample."""

    ratio: float = 1.0

    def rewire(self, t, state, params, grads):
        fraction = self.fraction(t) if callable(self.fraction) else self.fraction
        new = {}
        for n in self.sparse:
            mask = state.masks[n]
            active = int(mask.sum())
            number = min(mask.size, int(np.float32(active) * np.float32(self.ratio)))
            sample = np.zeros(mask.size, bool)
            sample[random_order(self.scores(t, n), mask.size, number)] = True
            sample = sample.reshape(mask.shape) & ~mask
            drop = min(number_to_drop(active, fraction), int(sample.sum()))
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


def log2_units(x):
    """Logarithms of positive integers in units of 1 / 4,096: a bit from each of 12 squarings."""
    exponent = int(x).bit_length() - 1
    mantissa = (int(x) << 16) >> (exponent + 1)
    fraction = 0
    for _ in range(12):
        mantissa = mantissa * mantissa >> 15
        fraction = 2 * fraction + (mantissa >= 2**16)
        mantissa >>= mantissa >= 2**16
    return exponent * 4096 + fraction


def gumbel_units(drawn):
    """-log2 of an exponential number, -ln(1 - v) with v = drawn / 2**31."""
    drawn = max(int(drawn), 1)
    if drawn >= 2**30:
        of_rest = 31 * 4096 - log2_units(2**31 - drawn)
        return 12 * 4096 + 2166 - log2_units(max(of_rest, 1))
    v = drawn >> 18
    bend = v * (2984 + (v * (908 + (v * 1671 >> 13)) >> 13)) >> 13
    return 31 * 4096 - log2_units(drawn) - bend


def float_units(x):
    """`log2_units` of a float32 times 2**149."""
    return log2_units(max(int(np.float64(x) * 2.0**149), 1))


def bits(x):
    return int(x).bit_length()


def link_scores(links):
    """CH2-L3n from sets of neighbours, in units of a power of two."""
    inputs, outputs = links.shape
    of_input = [set(np.flatnonzero(links[u])) for u in range(inputs)]
    of_output = [set(np.flatnonzero(links[:, v])) for v in range(outputs)]
    contributions = {}
    largest = [[0, 0], [0, 0]]  # of fractions, and of their numerators; through outputs, inputs

    def contribution(side, neighbours, z, end):
        """From a node z whose links are shared with those of an end."""
        inside = len(neighbours[z] & neighbours[end])
        elsewhere = len(neighbours[z]) - inside - 1
        return (1 + inside, 1 + elsewhere) if inside and elsewhere >= 0 else (0, 1)

    for side, neighbours in enumerate((of_output, of_input)):
        for z in range(len(neighbours)):
            for end in range(len(neighbours)):
                n, d = contribution(side, neighbours, z, end)
                contributions[side, z, end] = n, d
                largest[side][0] = max(largest[side][0], n * 256 // d + 1)
                largest[side][1] = max(largest[side][1], n)
    degrees = [max(map(len, of_input)), max(map(len, of_output))]
    most = max(bits(k) + bits(m) for k, (m, _) in zip(degrees, largest, strict=True))
    shift = 31 - most
    up = min(max(shift, 0), 31 - max(bits(n) for _, n in largest))
    down = max(-shift, 0)

    def units(side, z, end):
        n, d = contributions[side, z, end]
        return ((n << up) // d) >> down

    scores = np.zeros(links.shape, np.int64)
    for u in range(inputs):
        for v in range(outputs):
            scores[u, v] = sum(units(0, z, v) for z in of_input[u])
            scores[u, v] += sum(units(1, z, u) for z in of_output[v])
    return scores


def relative_importance(weights):
    """Its logarithm, 0 where there is no weight; sums are of integers."""
    largest = magnitude(weights).max()
    if not largest:
        return np.zeros(weights.shape, np.int64)
    unit = 2.0 ** (exponent(largest) + 1 - min(24, 30 - bits(max(weights.shape))))
    quanta = (magnitude(weights).astype(np.float64) / unit).astype(np.int64)
    found = np.zeros(weights.shape, np.int64)
    for i, j in zip(*np.nonzero(weights), strict=True):
        a, b = max(quanta[i].sum(), 1), max(quanta[:, j].sum(), 1)
        log = float_units(magnitude(weights[i, j])) + log2_units(a + b)
        found[i, j] = log - log2_units(a) - log2_units(b) + 62 * 4096
    return found


@dataclass
class Cht(Set):
    """Grows where links are predicted, of the graph that is kept."""

    removed: object = None  # draws, as `scores`, for the noise of removal
    soft: bool = False
    by_importance: bool = False
    delta: tuple = (0.5, 0.9)
    zeros: dict = field(default_factory=dict)  # in the end, if the density falls
    start: dict = field(default_factory=dict)

    def rewire(self, t, state, params, grads):
        fraction = self.fraction(t) if callable(self.fraction) else self.fraction
        steps = range(self.begin, self.end, self.every)
        new = {}
        for n in self.sparse:
            mask = state.masks[n]
            if self.zeros:
                mask = self.pruned(t, steps, n, mask, params[n])
            drop = number_to_drop(int(mask.sum()), fraction)
            kept = keep_scored(mask, self.importance(t, steps, n, mask, params[n]), drop)
            new[n] = grow_largest(kept, self.growth(t, n, kept), drop)
        return new

    def pruned(self, t, steps, n, mask, weights):
        x = (t - steps[0]) / (steps[-1] - steps[0])
        ends = [1 / (1 + np.exp(-6 * (s - 0.5))) for s in (0, x, 1)]
        gone = round((ends[1] - ends[0]) / (ends[2] - ends[0]) * 2**15)
        zeros = self.start[n] + (self.zeros[n] - self.start[n]) * gone // 2**15
        drop = int(mask.sum()) - (mask.size - zeros)
        return keep_scored(mask, relative_importance(np.where(mask, weights, 0)), drop)

    def importance(self, t, steps, n, mask, weights):
        if self.by_importance:
            scores = relative_importance(np.where(mask, weights, 0))
        elif not self.soft:
            return magnitude(weights)
        else:
            scores = np.vectorize(float_units)(magnitude(weights))
        if not self.soft:
            return scores
        first, last = self.delta
        delta = np.linspace(first, last, len(steps))[(t - steps[0]) // self.every]
        factor = round((1 - delta) / delta * 1024)
        return scores + (np.vectorize(gumbel_units)(self.removed(t, n)) * factor >> 10)

    def growth(self, t, n, kept):
        found, drawn = link_scores(kept), self.scores(t, n)
        if self.soft:
            sampled = np.vectorize(log2_units)(np.maximum(found, 1))
            sampled = sampled + np.vectorize(gumbel_units)(drawn) + 80 * 4096
            linked = 2**30 + (sampled << 8) + (drawn & 255)
        else:
            linked = 2**30 + (found << 6) + (drawn & 63)
        return np.where(found > 0, linked, drawn >> 1)


def keep_scored(mask, scores, drop):
    """Without the `drop` active weights of smallest score."""
    active = np.flatnonzero(mask)
    order = active[np.argsort(-scores.reshape(-1)[active], kind="stable")]
    kept = np.zeros(mask.size, bool)
    kept[order[: active.size - drop]] = True
    return kept.reshape(mask.shape)
