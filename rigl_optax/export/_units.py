"""Follows the units of a network from layer to layer: who makes, reads and scales each of them.

A model describes itself by a walk that follows its forward pass (`Units`). From that, and from
which weights are zero, `compact` finds the units that nobody reads and those that never change.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rigl_optax import _axes, _paths

_KERNELS = ("kernel", "weight", "w")


class Wires(NamedTuple):
    """Units at one place of the forward pass; made and taken by the methods of `Units`.

    Attributes:
      group: Number of the group that they belong to.
      values: float64 (units,): what a unit gives for every input and at every pixel or time; NaN
        where that is not always the same number.
      width: Number of features of a unit: 1, or those of a head of attention.
    """

    group: int
    values: np.ndarray
    width: int = 1


class Shift(NamedTuple):
    """A vector that can take up a constant: `path[start:] += sign * constant`."""

    path: str
    sign: int
    start: int = 0


class Read(NamedTuple):
    """A kernel that reads units of one group and makes those of another.

    Attributes:
      path: Of the kernel.
      source: The group that it reads.
      inputs: Axis of the kernel, and which places along it belong to each unit: (units, width).
      target: The group that it makes.
      outputs: Likewise for its outputs.
      values: What it reads from each unit, as in `Wires`.
      shift: Takes up constants that are read; None if nothing can.
      is_padded: Whether it has a window, which at borders reads zeros in place of units.
    """

    path: str
    source: int
    inputs: tuple[int, np.ndarray]
    target: int
    outputs: tuple[int, np.ndarray]
    values: np.ndarray
    shift: Shift | None
    is_padded: bool

    def matrix(self, kernel: np.ndarray) -> np.ndarray:
        """Returns the kernel as float64 (inputs, outputs), summed over its window."""
        rows = np.moveaxis(kernel, (self.inputs[0], self.outputs[0]), (-2, -1))
        return rows.astype(np.float64).sum(axis=tuple(range(rows.ndim - 2)))

    def links(self, kernel: np.ndarray) -> np.ndarray:
        """Returns bool (units read, units made): whether any weight between them is not zero."""
        rows = np.moveaxis(kernel, (self.inputs[0], self.outputs[0]), (-2, -1)) != 0
        joined = rows.any(axis=tuple(range(rows.ndim - 2)))
        return joined[self.inputs[1]].any(1)[:, self.outputs[1]].any(2)

    def absorbs(self) -> np.ndarray:
        """Returns bool (units,): whether the network can do without reading them."""
        movable = self.shift is not None and not self.is_padded
        return (self.values == 0) | (~np.isnan(self.values) & movable)


class Units:
    """Walks through a network and notes which axes of which arrays belong to one unit.

    A description follows the forward pass in evaluation: it calls a method for each layer with the
    wires that the layer reads, and gets those that it makes. Poolings and reshapes of pixels change
    no wires.

    Args:
      leaves: All arrays of the model by their paths: parameters, and statistics.

    Examples:
      >>> leaves = {"a/kernel": np.ones((3, 4)), "a/bias": np.ones(4), "b/kernel": np.ones((4, 2))}
      >>> units = Units(leaves)
      >>> hidden = units.relu(units.layer(units.inputs(3), "a"))
      >>> units.outputs(units.layer(hidden, "b"))
      >>> units.sizes()
      [3, 4, 2]
    """

    def __init__(self, leaves: Mapping[str, np.ndarray]) -> None:
        self.leaves = leaves
        self.reads: list[Read] = []
        self.fixed: set[int] = set()
        # (path, axis) -> the group along it, and the places of each unit.
        self.places: dict[tuple[str, int], tuple[int, np.ndarray]] = {}
        self._sizes: list[int] = []
        self._names: list[str] = []
        self._same: list[int] = []  # of each group, another that it has been joined with, or itself
        self._prefix = ""

    def inside(self, *names: Any) -> "Units":
        """Returns the same walk with paths that begin below these names."""
        deeper = copy.copy(self)  # its lists are the same ones
        deeper._prefix = self._prefix + "".join(f"{name}/" for name in names)
        return deeper

    # ------------------------------------------------------------------------ the forward pass

    def inputs(self, number: int) -> Wires:
        """Begins with units that all stay: inputs, or units that are normalised together."""
        wires = self._new("inputs", number)
        self.fixed.add(wires.group)
        return wires

    def embedding(self, path: str) -> Wires:
        """Begins with the features of an embedding (vocabulary, features)."""
        wires = self._new(path, self._leaf(path).shape[1])
        self._claim(path, 1, wires.group, _each(len(wires.values)))
        return wires

    def layer(self, x: Wires, path: str, *, norm: str | None = None) -> Wires:
        """Follows a linear layer or a convolution, with or without `bias`.

        Args:
          x: What it reads.
          path: Of the layer; its kernel is `kernel`, `weight` or `w`.
          norm: The path of a batch normalisation that alone reads the result, if there is one: its
            mean can take up constants where there is no bias.
        """
        names = [f"{path}/{name}" for name in _KERNELS if self._has(f"{path}/{name}")]
        if not names:
            raise ValueError(f"units: no kernel below {self._prefix + path!r}; {self._known()}")
        kernel = self._leaf(names[0])
        axes = _axes.default_axes(names[0], kernel)
        made = self._new(path, kernel.shape[axes.outputs[0]])
        bias, shift = f"{path}/bias", None
        if self._has(bias):
            self._claim(bias, 0, made.group, _each(len(made.values)))
            shift = Shift(self._prefix + bias, 1)
        elif norm is not None:
            shift = Shift(self._prefix + f"{norm}/mean", -1)
        read = self._read(
            x, names[0], axes.inputs[0], made, axes.outputs[0], _each(len(made.values)), shift
        )
        offset = self._leaf(bias).reshape(-1) if self._has(bias) else 0.0
        return made._replace(values=_sum(read, kernel) + offset)

    def attend(self, x: Wires, path: str, bias: str | None = None) -> Wires:
        """Follows a product with an embedding (vocabulary, features): tied logits."""
        made = self._new(path, self._leaf(path).shape[0])
        shift = None
        if bias is not None:
            self._claim(bias, 0, made.group, _each(len(made.values)))
            shift = Shift(self._prefix + bias, 1)
        self._read(x, path, 1, made, 0, _each(len(made.values)), shift)
        return made

    def depthwise(self, x: Wires, path: str) -> Wires:
        """Follows a depthwise convolution without bias: a window for each unit."""
        kernel = self._leaf(f"{path}/kernel")
        self._claim(f"{path}/kernel", kernel.ndim - 1, x.group, _each(len(x.values)))
        is_zero = (x.values == 0) | ~np.any(kernel, axis=tuple(range(kernel.ndim - 1)))
        return x._replace(values=np.where(is_zero, 0.0, np.nan))

    def norm(self, x: Wires, path: str, epsilon: float) -> Wires:
        """Follows a batch normalisation with running statistics: `scale`, `bias`, `mean`, `var`."""
        for name in ("scale", "bias", "mean", "var"):
            self._claim(f"{path}/{name}", 0, x.group, _each(len(x.values)))
        scale, bias, mean, var = (
            self._leaf(f"{path}/{name}").astype(np.float64)
            for name in ("scale", "bias", "mean", "var")
        )
        # Not `(x - mean) * factor + bias`, so that a scale of 0 gives the bias whatever x is.
        constant = np.where(scale == 0, 0.0, x.values - mean)
        return x._replace(values=constant * (scale / np.sqrt(var + epsilon)) + bias)

    def map(self, x: Wires, function: Callable[[Any], Any]) -> Wires:
        """Follows a function of each unit alone, which is given `Wires.values`."""
        return x._replace(values=np.asarray(function(x.values), np.float64))

    def relu(self, x: Wires) -> Wires:
        """Follows a ReLU."""
        return self.map(x, lambda values: np.maximum(values, 0))

    def add(self, x: Wires, y: Wires) -> Wires:
        """Follows a sum of units, one by one: a residual connection."""
        return x._replace(group=self._join(x.group, y.group), values=x.values + y.values)

    def multiply(self, x: Wires, y: Wires) -> Wires:
        """Follows a product of units, one by one: a gate."""
        is_zero = (x.values == 0) | (y.values == 0)
        values = np.where(is_zero, 0.0, x.values * y.values)
        return x._replace(group=self._join(x.group, y.group), values=values)

    def heads(self, x: Wires, path: str, number: int) -> Wires:
        """Follows self-attention whose fused kernel makes queries, keys and values, head by head.

        A unit is a head. Without values it gives zeros; its queries and keys alone do not matter.
        """
        kernel = self._leaf(f"{path}/kernel")
        width = kernel.shape[1] // (3 * number)
        places = np.arange(3 * number * width).reshape(3, number, width).swapaxes(0, 1)
        made = self._new(path, number)._replace(width=width)
        self._read(x, f"{path}/kernel", 0, made, 1, places.reshape(number, -1), None)
        has_values = kernel[:, places[:, 2]].any(axis=(0, 2))
        return made._replace(values=np.where(has_values, np.nan, 0.0))

    def recurrent(
        self, x: Wires, path: str, gates: Sequence[str], candidate: str, carry: str | None = None
    ) -> Wires:
        """Follows a GRU or LSTM of `models.recurrent`.

        A unit whose candidate gate reads nothing and has no bias stays 0 for ever.

        Args:
          x: What it reads.
          path: Of the layer, with `input` and `recurrent` kernels, fused or one for each gate.
          gates: Names of the gates, in the order of a fused kernel.
          candidate: The gate whose output is written into the state.
          carry: Path of the state (lanes, states * units), if the model keeps it.
        """
        bias = self._leaf(f"{path}/input/bias")
        units = len(bias) // len(gates)
        made = self._new(path, units)
        fused = np.arange(len(bias)).reshape(len(gates), units).T
        self._claim(f"{path}/input/bias", 0, made.group, fused)
        is_fused = self._has(f"{path}/input/kernel")
        chosen = list(gates).index(candidate)
        inputs: list[np.ndarray] = []
        back: list[np.ndarray] = []
        for part, found in (("input", inputs), ("recurrent", back)):
            source = x if part == "input" else made._replace(values=np.zeros(units))
            for i, gate in enumerate(["kernel"] if is_fused else gates):
                name = f"{path}/{part}/{gate}" + ("" if is_fused else "/kernel")
                start = 0 if is_fused else i * units
                shift = Shift(f"{self._prefix}{path}/input/bias", 1, start)
                places = fused if is_fused else _each(units)
                self._read(source, name, 0, made, 1, places, shift if part == "input" else None)
                if is_fused:
                    found.append(self._leaf(name)[:, fused[:, chosen]])
                elif i == chosen:
                    found.append(self._leaf(name))
        moves = bias[fused[:, chosen]] != 0
        moves = moves | ((inputs[0] != 0) & (x.values != 0)[:, None]).any(0)
        if carry is not None:
            states = self._leaf(carry).shape[1] // units
            places = np.arange(states * units).reshape(states, units).T
            self._claim(carry, 1, made.group, places)
            moves = moves | self._leaf(carry)[:, places].any(axis=(0, 2))
        for _ in range(units):  # what moves moves those that read it
            spread = moves | ((back[0] != 0) & moves[:, None]).any(0)
            if (spread == moves).all():
                break
            moves = spread
        values = np.where(moves, np.nan, 0.0)
        # Reads of the state by itself were noted before it was known what it gives.
        for i, read in enumerate(self.reads):
            if read.source == read.target == made.group:
                self.reads[i] = read._replace(values=values)
        return made._replace(values=values)

    def outputs(self, x: Wires) -> None:
        """Ends with units that all stay."""
        self.fixed.add(x.group)

    # ------------------------------------------------------------------------------ what was found

    def group(self, number: int) -> int:
        """Returns the number of the group that a group has been joined with."""
        while self._same[number] != number:
            number = self._same[number]
        return number

    def groups(self) -> list[int]:
        """Returns the numbers of all groups."""
        return [i for i, other in enumerate(self._same) if i == other]

    def sizes(self) -> list[int]:
        """Returns the number of units of each group."""
        return [self._sizes[i] for i in self.groups()]

    def name(self, number: int) -> str:
        """Returns the path of the layer that makes a group first."""
        return self._names[number]

    # ---------------------------------------------------------------------------------- inside

    def _has(self, path: str) -> bool:
        return self._prefix + path in self.leaves

    def _leaf(self, path: str) -> np.ndarray:
        if not self._has(path):
            raise ValueError(f"units: there is no {self._prefix + path!r}; {self._known()}")
        return np.asarray(self.leaves[self._prefix + path])

    def _known(self) -> str:
        return f"arrays are {_paths.listing(sorted(self.leaves))}"

    def _new(self, path: str, number: int) -> Wires:
        self._same.append(len(self._same))
        self._sizes.append(number)
        self._names.append(self._prefix + path)
        return Wires(len(self._same) - 1, np.full(number, np.nan))

    def _join(self, a: int, b: int) -> int:
        a, b = sorted((self.group(a), self.group(b)))
        if self._sizes[a] != self._sizes[b]:
            raise ValueError(
                f"units: {self._names[a]!r} has {self._sizes[a]} units, {self._names[b]!r} "
                f"{self._sizes[b]}; they cannot be added or shared"
            )
        self._same[b] = a
        return a

    def _claim(self, path: str, axis: int, group: int, places: np.ndarray) -> None:
        """Notes that the units of a group are along an axis; one array can serve two layers."""
        full, size = self._prefix + path, self._leaf(path).shape[axis]
        if places.size != size:
            raise ValueError(
                f"units: {full!r} has {size} entries along axis {axis}, not the {places.size} of "
                f"{len(places)} units"
            )
        before = self.places.get((full, axis))
        if before is not None:
            if not np.array_equal(before[1], places):
                raise ValueError(f"units: {full!r} is shared out differently along axis {axis}")
            self._join(before[0], group)
        self.places[full, axis] = group, places

    def _read(
        self,
        x: Wires,
        path: str,
        input_axis: int,
        made: Wires,
        output_axis: int,
        places: np.ndarray,
        shift: Shift | None,
    ) -> Read:
        inputs = np.arange(len(x.values) * x.width).reshape(-1, x.width)
        self._claim(path, input_axis, x.group, inputs)
        self._claim(path, output_axis, made.group, places)
        kernel = self._leaf(path)
        is_padded = kernel.size > kernel.shape[input_axis] * kernel.shape[output_axis]
        read = Read(
            self._prefix + path,
            x.group,
            (input_axis, inputs),
            made.group,
            (output_axis, places),
            x.values,
            shift,
            is_padded,
        )
        self.reads.append(read)
        return read


def _each(number: int) -> np.ndarray:
    """Returns the places of units that have one each."""
    return np.arange(number)[:, None]


def _sum(read: Read, kernel: np.ndarray) -> np.ndarray:
    """Returns what a layer makes without its bias, as `Wires.values`."""
    values = np.where(read.is_padded & (read.values != 0), np.nan, read.values)
    varies = np.isnan(values)
    is_open = (read.links(kernel) & varies[:, None]).any(0)
    wide = np.repeat(np.where(varies, 0.0, values), read.inputs[1].shape[1])
    return np.where(is_open, np.nan, wide @ read.matrix(kernel))
