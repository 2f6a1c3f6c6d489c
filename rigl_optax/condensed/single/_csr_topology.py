"""Where the single weights of a layer are: int32 indices, sorted both ways."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# Stored weights that a loop over those of a chunk takes at once.
_PIECE = 1 << 13
# int32 has to count the places of a layer, as in the masked form.
_MAX_PLACES = np.iinfo(np.int32).max
# Rows and columns of places go through float32 (`_csr.Probe`).
_MAX_SIDE = 1 << 24

Carry = TypeVar("Carry")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["rows", "cols", "starts", "order", "ordered_cols", "row_starts"],
    meta_fields=["shape", "replaceable"],
)
@dataclasses.dataclass(frozen=True)
class CSRTopology:
    """The weights that an unstructured layer has, sorted by output and then by input.

    Attributes:
      rows: int32 [n]: input of each weight.
      cols: int32 [n]: output of each, ascending.
      starts: int32 [out + 1]: where the weights of each output begin.
      order: int32 [n]: the same weights sorted by input, then by output.
      ordered_cols: int32 [n]: output of each, in that order.
      row_starts: int32 [in + 1]: where, in that order, the weights of each input begin.
      shape: Of the dense kernel, (in, out).
      replaceable: The most weights that a rewiring can put elsewhere, for static shapes: all, if
        there is room for them; in the state of a transformation, what its drop fraction allows.
    """

    rows: jax.Array
    cols: jax.Array
    starts: jax.Array
    order: jax.Array
    ordered_cols: jax.Array
    row_starts: jax.Array
    shape: tuple[int, ...]
    replaceable: int

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
        """Of groups: single weights."""
        return self.shape

    @property
    def density(self) -> float:
        """Stored weights of all."""
        return self.number / max(1, self.shape[0] * self.shape[1])

    def mask(self) -> jax.Array:
        """Bool, of the shape of the dense kernel."""
        return jnp.zeros(self.shape, bool).at[self.rows, self.cols].set(True)

    def transposed(self) -> "CSRTopology":
        """The topology of the transposed kernel, whose values are `values[order]`."""
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
        """The stored weights of a dense array, [n]."""
        return dense[self.rows, self.cols]

    def places(self) -> jax.Array:
        """int32 [n]: row-major index of each weight in the dense kernel, in that order."""
        return self.rows[self.order] * self.shape[1] + self.ordered_cols

    def by_pieces(
        self,
        start: jax.Array,
        stop: jax.Array,
        step: Callable[[Carry, jax.Array], Carry],
        carry: Carry,
    ) -> Carry:
        """A loop over the weights from `start` to `stop`, `piece` at a time.

        How many there are in a part of a layer differs from rewiring to rewiring; shapes must not.

        Args:
          start: int32: the first, in whichever order.
          stop: int32: behind the last; pieces may go beyond it.
          step: From what is carried, and the first weight of a piece, to what is carried.
          carry: At first.

        Returns:
          What is carried, in the end.
        """
        return lax.while_loop(
            lambda c: c[0] < stop,
            lambda c: (c[0] + self.piece, step(c[1], c[0])),
            (start, carry),
        )[1]

    @property
    def piece(self) -> int:
        """How many weights `by_pieces` takes at once."""
        return max(1, min(_PIECE, self.number))


def csr_topology(mask: Any) -> CSRTopology:
    """The topology of an unstructured mask, made on the host.

    Args:
      mask: Bool, (in, out).

    Returns:
      Where its True entries are.

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
    placed = {name: jnp.asarray(x, jnp.int32) for name, x in arrays.items()}
    shape = (inputs, outputs)
    return CSRTopology(**placed, shape=shape, replaceable=all_replaceable(rows.size, shape))


def all_replaceable(number: int, shape: tuple[int, ...]) -> int:
    """How many of so many weights a layer has other places for."""
    return min(number, shape[0] * shape[1] - number)


@functools.partial(jax.jit, static_argnums=(1, 2))
def from_places(places: jax.Array, shape: tuple[int, ...], replaceable: int) -> CSRTopology:
    """The topology of weights at these places: under `jit`, all shapes static.

    Args:
      places: int32 [n]: row-major indices in the dense kernel, ascending, none of them twice.
      shape: Of the dense kernel, (in, out).
      replaceable: As in `CSRTopology`.

    Returns:
      What `csr_topology` makes of their mask.
    """
    inputs, outputs = shape
    by_input, ordered_cols = jnp.divmod(places, outputs)
    # Sorting single integers, and looking up where each has come to, takes a third of what an
    # argsort takes.
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
    """Raises a ValueError unless the places of a layer can be counted, as rewiring has to."""
    if len(shape) != 2:
        raise ValueError(f"{path!r} has shape {shape}: single weights need two axes")
    if shape[0] * shape[1] > _MAX_PLACES or max(shape) > _MAX_SIDE:
        raise ValueError(
            f"{path!r} has shape {shape}: single weights are ranked in layers of at most "
            f"{_MAX_PLACES} places (2**31 - 1) and {_MAX_SIDE} inputs or outputs (2**24)"
        )
