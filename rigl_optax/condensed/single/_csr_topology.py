"""Where the single weights of a layer are: int32 indices, sorted both ways.

The products of a step need both orders: by output going forward, by input going back.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rigl_optax import _distributions, _structures
from rigl_optax._layout import SparseLeaf
from rigl_optax._ranking import _order, _random
from rigl_optax._structures import Unstructured
from rigl_optax._types import Seed
from rigl_optax.condensed._topology import RandomGrowth, Ranking
from rigl_optax.condensed.single import _candidates, _csr, _ranking
from rigl_optax.condensed.single._csr import CSR, Probe, SampleProbe
from rigl_optax.methods import _drop_and_grow

# Stored weights that one pass of `by_pieces` takes: a few tens of kB of indices.
_PIECE = 1 << 13
# Row-major indices are int32, as in the masked form.
_MAX_PLACES = np.iinfo(np.int32).max
# Rows and columns go through float32 (`_csr.Probe`), which holds integers up to this exactly.
_MAX_SIDE = 1 << 24

Carry = TypeVar("Carry")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["seed", "count"],
    meta_fields=["position", "number", "size"],
)
@dataclasses.dataclass(frozen=True)
class Sample:
    """Positions of a layer among which weights grow, other ones at each count.

    Attributes:
      seed: uint32 scalar.
      count: int32 scalar: of the step.
      position: Of the leaf, among all leaves of params.
      number: How many positions.
      size: Of how many.
    """

    seed: jax.Array
    count: jax.Array
    position: int
    number: int
    size: int

    def places(self) -> jax.Array:
        """Returns row-major indices, int32 [number], ascending."""
        purpose = _random.Purpose.CANDIDATE
        drawn = _order.first(self.seed, purpose, self.position, self.count, self.size, self.number)
        return lax.sort(drawn)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["rows", "cols", "starts", "order", "ordered_cols", "row_starts", "sample"],
    meta_fields=["shape", "replaceable"],
)
@dataclasses.dataclass(frozen=True)
class CSRTopology:
    """The weights that an unstructured layer stores, sorted by output and then by input.

    Attributes:
      rows: int32 [n]: input of each weight.
      cols: int32 [n]: output of each, ascending.
      starts: int32 [out + 1]: where the weights of each output begin.
      order: int32 [n]: the same weights sorted by input, then by output.
      ordered_cols: int32 [n]: output of each, in that order.
      row_starts: int32 [in + 1]: where, in that order, the weights of each input begin.
      shape: Shape of the dense kernel, (in, out).
      replaceable: The most weights that a rewiring can replace, a static number: all for which
        there is room; in the state of a transformation, as many as its drop fraction allows. With
        a sample, its size.
      sample: Positions among which weights grow; None for all.
    """

    rows: jax.Array
    cols: jax.Array
    starts: jax.Array
    order: jax.Array
    ordered_cols: jax.Array
    row_starts: jax.Array
    shape: tuple[int, ...]
    replaceable: int
    sample: Sample | None = None

    @classmethod
    def from_mask(cls, mask: Any, structure: Unstructured, path: str) -> "CSRTopology":
        """Makes the topology of a mask of weights, on the host.

        Raises:
          ValueError: If it has not two axes.
        """
        del structure
        shape = np.shape(mask)
        if len(shape) != 2:
            raise ValueError(
                f"{path!r} has shape {shape}: single weights need two axes; if its leading axis "
                "counts layers, give each layer a leaf of its own"
            )
        return csr_topology(mask)

    @classmethod
    def random(
        cls,
        shape: tuple[int, ...],
        sparsity: float,
        structure: Unstructured,
        seed: Seed,
        position: int,
    ) -> "CSRTopology":
        """Draws `floor(sparsity * weights)` absent weights."""
        del structure
        check_shape(shape, "a layer")
        number = math.prod(shape) - _distributions.zeros_in(sparsity, math.prod(shape))
        return _random_topology(shape, number, position, jnp.asarray(seed, jnp.uint32))

    @property
    def values_shape(self) -> tuple[int, ...]:
        """Shape of the stored values: (n,)."""
        return self.rows.shape

    @property
    def number(self) -> int:
        """Number of stored weights."""
        return self.rows.shape[0]

    @property
    def grid(self) -> tuple[int, ...]:
        """Shape of the groups, which are single weights: that of the dense kernel."""
        return self.shape

    @property
    def density(self) -> float:
        """Fraction of the weights that are stored."""
        return self.number / max(1, self.shape[0] * self.shape[1])

    def grid_mask(self) -> jax.Array:
        """Returns which weights are stored, as `dense_mask`: each is a group of its own."""
        return self.dense_mask()

    def dense_mask(self) -> jax.Array:
        """Returns which weights are stored: bool, of the shape of the dense kernel."""
        return jnp.zeros(self.shape, bool).at[self.rows, self.cols].set(True)

    def transposed(self) -> "CSRTopology":
        """Returns the topology of the transposed kernel, whose values are `values[order]`."""
        return CSRTopology(
            rows=self.ordered_cols,
            cols=self.rows[self.order],
            starts=self.row_starts,
            order=jnp.argsort(self.order).astype(jnp.int32),
            ordered_cols=self.rows,
            row_starts=self.starts,
            shape=(self.shape[1], self.shape[0]),
            replaceable=self.replaceable,
        )

    def extract(self, dense: jax.Array) -> jax.Array:
        """Returns the stored weights of a dense array, [n]."""
        return dense[self.rows, self.cols]

    def clear_padding(self, values: jax.Array) -> jax.Array:
        """Returns the values: single weights have no padding."""
        return values

    def bind(self, values: jax.Array, probe: Probe | SampleProbe | None = None) -> CSR:
        """Makes the kernel of these values."""
        return CSR(values, self, probe)

    def probe(self) -> Probe | SampleProbe:
        """Returns zeros whose gradients are places for new weights and their scores: see `CSR`."""
        return _csr.probe(self)

    def as_leaf(self, path: str, position: int) -> SparseLeaf:
        """Describes the layer as the masked form does, but ranks a list, not all weights."""
        grid, structure = (self.number + self.replaceable,), _structures.UNSTRUCTURED
        return SparseLeaf(path, position, False, self.replaceable, structure, self.shape, grid)

    def check_rewirable(self, path: str, min_fan_in: int) -> None:
        """Raises a ValueError if the layer cannot be rewired."""
        check_shape(self.shape, path)
        if not self.number:
            raise ValueError(f"{path!r}: its topology stores nothing")
        if min_fan_in:
            raise ValueError(
                f"min_fan_in={min_fan_in}: {path!r} is stored as single weights, which grow where "
                "their scores are largest; leave it 0"
            )

    def limited(self, fraction: float) -> "CSRTopology":
        """Prepares for rewirings that replace at most this fraction of the weights."""
        # Drops are counted in float32, which may round up.
        most = int(self.number * fraction * (1 + 1e-6)) + 1
        return dataclasses.replace(self, replaceable=min(self.replaceable, most))

    def with_sample(self, ratio: float, seed: Seed, position: int) -> "CSRTopology":
        """Prepares for growth among a random sample of positions, all of which are ranked.

        Raises:
          ValueError: If int32 cannot number them.
        """
        size = math.prod(self.shape)
        # The rule's own number; and one at least, so that no array is empty.
        number = max(1, _drop_and_grow.sample_size(self.number, ratio, size))
        if size + number > _MAX_PLACES:
            raise ValueError(
                f"candidates={ratio}: a layer of shape {self.shape} with {number} candidates has "
                f"more than {_MAX_PLACES} places (2**31 - 1)"
            )
        sample = Sample(
            jnp.asarray(seed, jnp.uint32), jnp.zeros((), jnp.int32), position, number, size
        )
        return dataclasses.replace(self, replaceable=number, sample=sample)

    def at_count(self, count: jax.Array) -> "CSRTopology":
        """Prepares for gradients of the step with this count."""
        if self.sample is None:
            return self
        return dataclasses.replace(self, sample=dataclasses.replace(self.sample, count=count))

    def rank(
        self,
        values: jax.Array,
        gradients: jax.Array,
        scores: Probe | SampleProbe,
        growth: RandomGrowth | None,
    ) -> Ranking:
        """Lists the stored weights and the best places for new ones."""
        return _ranking.rank(self, values, gradients, scores, growth)

    def with_places(self, places: jax.Array) -> "CSRTopology":
        """Returns the topology of as many weights at other row-major indices, ascending."""
        topology = from_places(places, self.shape, self.replaceable)
        return dataclasses.replace(topology, sample=self.sample)

    def places(self) -> jax.Array:
        """Returns the row-major indices of the stored weights, ascending: int32 [n]."""
        return self.rows[self.order] * self.shape[1] + self.ordered_cols

    def by_pieces(
        self,
        start: jax.Array,
        stop: jax.Array,
        step: Callable[[Carry, jax.Array], Carry],
        carry: Carry,
    ) -> Carry:
        """Loops over the weights from `start` to `stop`, `piece` of them at a time.

        A rewiring changes how many weights a part of a layer has; static shapes cannot follow, so
        pieces have a fixed size and their number varies.

        Args:
          start: int32: index of the first weight, in either order.
          stop: int32: index behind the last; the last piece may go beyond it.
          step: `step(carry, first index of the piece) -> carry`.
          carry: The first one.

        Returns:
          The last carry.
        """
        return lax.while_loop(
            lambda c: c[0] < stop,
            lambda c: (c[0] + self.piece, step(c[1], c[0])),
            (start, carry),
        )[1]

    @property
    def piece(self) -> int:
        """How many weights `by_pieces` takes at a time."""
        return max(1, min(_PIECE, self.number))


def csr_topology(mask: Any) -> CSRTopology:
    """Makes the topology of an unstructured mask, on the host.

    Args:
      mask: Bool, (in, out).

    Returns:
      The indices of its True entries.

    Raises:
      ValueError: If it has not two axes.
    """
    whole = np.asarray(mask)
    if whole.ndim != 2:
        raise ValueError(f"a mask of shape {whole.shape}: CSR is for kernels of two axes")
    inputs, outputs = whole.shape
    cols, rows = np.nonzero(whole.T)

    def starts(ascending: np.ndarray, bound: int) -> np.ndarray:
        return np.searchsorted(ascending, np.arange(bound + 1))

    order = np.lexsort((cols, rows))
    arrays = {
        "rows": rows,
        "cols": cols,
        "starts": starts(cols, outputs),
        "order": order,
        "ordered_cols": cols[order],
        "row_starts": starts(rows[order], inputs),
    }
    placed: dict[str, Any] = {name: jnp.asarray(x, jnp.int32) for name, x in arrays.items()}
    shape = (inputs, outputs)
    return CSRTopology(**placed, shape=shape, replaceable=all_replaceable(rows.size, shape))


def all_replaceable(number: int, shape: tuple[int, ...]) -> int:
    """Returns how many of `number` weights can move: no more than there are free places."""
    return min(number, shape[0] * shape[1] - number)


@functools.partial(jax.jit, static_argnums=(1, 2))
def from_places(places: jax.Array, shape: tuple[int, ...], replaceable: int) -> CSRTopology:
    """Makes the topology of weights at these row-major indices, under `jit`.

    Args:
      places: int32 [n]: indices in the dense kernel, ascending, none of them twice.
      shape: Shape of the dense kernel, (in, out).
      replaceable: As in `CSRTopology`.

    Returns:
      The same as `csr_topology` of their mask.
    """
    inputs, outputs = shape
    by_input, ordered_cols = jnp.divmod(places, outputs)
    # Sorting plain integers and looking up where each went takes a third of the time of an argsort.
    unsorted = ordered_cols * inputs + by_input
    flipped = lax.sort(unsorted)
    cols, rows = jnp.divmod(flipped, inputs)

    def starts(ascending: jax.Array, bound: int) -> jax.Array:
        return jnp.searchsorted(ascending, jnp.arange(bound + 1, dtype=jnp.int32)).astype(jnp.int32)

    return CSRTopology(
        rows=rows,
        cols=cols,
        starts=starts(cols, outputs),
        order=jnp.searchsorted(flipped, unsorted).astype(jnp.int32),
        ordered_cols=ordered_cols,
        row_starts=starts(by_input, inputs),
        shape=shape,
        replaceable=replaceable,
    )


def check_shape(shape: tuple[int, ...], path: str) -> None:
    """Raises a ValueError if int32 cannot count a layer's weights, or float32 its rows."""
    if len(shape) != 2:
        raise ValueError(f"{path!r} has shape {shape}: single weights need two axes")
    if shape[0] * shape[1] > _MAX_PLACES or max(shape) > _MAX_SIDE:
        raise ValueError(
            f"{path!r} has shape {shape}: single weights are ranked in layers of at most "
            f"{_MAX_PLACES} places (2**31 - 1) and {_MAX_SIDE} inputs or outputs (2**24)"
        )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _random_topology(
    shape: tuple[int, ...], number: int, position: int, seed: jax.Array
) -> CSRTopology:
    purpose = _random.Purpose.INITIAL_MASK
    found = _candidates.at_random(seed, purpose, position, 0, shape, number)
    return from_places(found.places, shape, all_replaceable(number, shape))
