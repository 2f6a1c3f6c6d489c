"""Decides how sparse each layer is: shapes in, `{path: sparsity}` out."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from rigl_optax import _axes, _numbers, _paths
from rigl_optax._types import PyTree

DensePredicate = Callable[[str, jax.ShapeDtypeStruct], bool]

MAX_LEAF_SIZE = 2**31 - 1


_KERNELS = ("kernel", "w", "weight")  # the names of Flax, Haiku and Equinox
_EMBEDDING = re.compile(r"embed|^wte$|^wpe$", re.IGNORECASE)  # the last two are GPT-2's
_POSITIONS = re.compile(r"pos(ition)?s?_?emb|^pos(ition)?s?$", re.IGNORECASE)
_ATTENTION_BIAS = re.compile(r"pos(ition)?s?_?bias|relative_attention_bias", re.IGNORECASE)
_TOKEN = re.compile(r"cls|\w+_tokens?")
_LAYER_SCALE = re.compile(r"layer_?scale", re.IGNORECASE)
_NORM = re.compile(r"norm|^ln(\d|_|$)", re.IGNORECASE)


def dense_reason(path: str, leaf: Any, axes: _axes.Axes = _axes.default_axes) -> str | None:
    """Says why `default_dense` keeps a leaf dense; None if it does not."""
    if reason := _no_kernel(path, leaf):
        return reason
    if path.split("/")[-1] in _KERNELS and len(leaf.shape) == 4:
        *window, inputs, _ = _axes.kernel_shape(leaf.shape, _axes.find(axes, path, leaf))
        if inputs == 1 and math.prod(window) > 1:
            return "depthwise, or a stem with one input channel"
    return None


def _no_kernel(path: str, leaf: Any) -> str | None:
    """Says why a leaf cannot be a kernel, by its name, dtype and number of axes; else None."""
    components = path.split("/")
    name = components[-1]
    # In a sequence of modules, as `norm/0/weight`, the number is not the name of the module.
    parent = next((c for c in reversed(components[:-1]) if not c.isdigit()), "")
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return f"not floating point ({leaf.dtype})"
    if len(leaf.shape) < 2:
        return "fewer than two dimensions"
    if name in ("bias", "scale", "offset") or name.endswith(("_bias", "_scale")):
        return f"named {name}"
    if name == "b" and sum(size > 1 for size in leaf.shape) < 2:
        return "a bias, named b"  # Haiku's may have axes of length 1 to broadcast
    if any(_EMBEDDING.search(component) for component in components):
        return "an embedding"
    if any(_POSITIONS.search(component) for component in components):
        return "a position embedding"
    if any(_ATTENTION_BIAS.search(component) for component in components):
        return "a bias of positions"
    if any(_LAYER_SCALE.search(component) for component in components):
        return "a scale of layers"
    if _TOKEN.fullmatch(name):
        return "a learned token"
    if name in ("gamma", "beta") or (name == "weight" and _NORM.search(parent)):
        return "of a normalisation"
    return None


def default_dense(path: str, leaf: Any) -> bool:
    """Returns whether a leaf stays dense: the default of `dense=` in distributions.

    A leaf stays dense if it is not floating or has fewer than two dimensions (a stacked axis does
    not count). By its name, whatever its shape, it stays dense if

    - it is named `bias`, `scale` or `offset`, or its name ends in `_bias` or `_scale`; or it is
      Haiku's `b` and has only one axis longer than 1;
    - a part of its path contains `embed`, `pos_emb`, `pos_bias`, `relative_attention_bias` or
      `layer_scale`, or is `positions`, `wte` or `wpe`;
    - it is a learned token: `cls`, or its name ends in `_token` or `_tokens`;
    - it is named `gamma` or `beta`, or it is the `weight` of a module whose name contains `norm` or
      begins with `ln`.

    A depthwise kernel stays dense too: a leaf named `kernel`, `w` or `weight` with four axes, a
    window larger than 1x1 and one input channel. The stem of a network for grey images looks the
    same and stays dense. The `axes` of the distribution say which axis is the input.

    Args:
      path: The leaf's name, such as `Dense_0/kernel`.
      leaf: Anything with `shape` and `dtype`; for a stacked leaf, one slice.

    Returns:
      True if the leaf is left out of sparse training altogether.
    """
    return dense_reason(path, leaf) is not None


@dataclasses.dataclass(frozen=True)
class DenseLayers:
    """Names all layers that stay dense, with a reason for each; for `dense=` of a distribution.

    Use it if you know the model and want to name its dense layers, rather than have
    `default_dense` guess depthwise kernels from their shapes. It also keeps dense what cannot be a
    kernel: leaves that are not floating or have fewer than two dimensions, and leaves that
    `default_dense` knows by name alone (biases, scales, embeddings, learned tokens). To add layers
    to those of `default_dense`, give `dense=` the mapping alone.

    Args:
      because: `{pattern: reason}`; patterns are regular expressions searched in the path.
      by_default: Whether what `default_dense` keeps dense stays so besides.

    Raises:
      TypeError: If `because` is no mapping.

    Examples:
      >>> import jax.numpy as jnp
      >>> dense = DenseLayers({"^stem/": "the first convolution"})
      >>> params = {"stem": {"kernel": jnp.ones((3, 3, 3, 8))}, "fc": {"kernel": jnp.ones((8, 10))}}
      >>> uniform(0.9, dense=dense)(params)
      {'fc/kernel': 0.9}
      >>> dense.reason("stem/kernel", params["stem"]["kernel"])
      'the first convolution'
    """

    because: Mapping[str, str]
    by_default: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.because, Mapping):
            raise TypeError(f"{self.because!r}: dense layers are given as {{pattern: reason}}")
        for pattern in self.because:
            _paths.compile_pattern(pattern, "dense layers")

    def reason(self, path: str, leaf: Any, axes: _axes.Axes = _axes.default_axes) -> str | None:
        """Says why a leaf stays dense; None if it does not."""
        known = dense_reason(path, leaf, axes) if self.by_default else _no_kernel(path, leaf)
        if known:
            return known
        return next((why for p, why in self.because.items() if re.search(p, path)), None)

    def __call__(self, path: str, leaf: Any) -> bool:
        """Returns whether a leaf stays dense."""
        return self.reason(path, leaf) is not None


def nothing_dense(path: str, leaf: Any) -> bool:
    """Keeps nothing dense: biases, scales and embeddings are sparse too; for `dense=`.

    Use it with `uniform` where every array of a network is to be sparse, as in weight-sparse
    transformers that people read.

    Examples:
      >>> import jax.numpy as jnp
      >>> params = {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)}
      >>> uniform(0.5, dense=nothing_dense)(params)
      {'bias': 0.5, 'kernel': 0.5}
    """
    del path, leaf
    return False


@dataclasses.dataclass(frozen=True)
class Layer:
    """A sparse leaf, or a stack of `slices` layers; `shape` and `kernel` are those of one slice."""

    path: str
    shape: tuple[int, ...]
    slices: int
    sparsity: float | None  # from `overrides`, outside the budget
    kernel: tuple[int, ...]  # the shape as [*window, in, out]

    @property
    def size(self) -> int:
        """Returns the number of weights of one slice."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Distribution:
    """Splits an overall `sparsity` between layers; made by `uniform`, `erk`, `erdos_renyi`.

    Call it on parameters, or on their shapes: it returns `{path: sparsity}` in tree order.
    """

    sparsity: float
    # `density_scale(layer)` is proportional to the layer's density; None for the same density.
    density_scale: Callable[[Layer], float] | None
    name: str
    dense: DensePredicate = default_dense
    overrides: Mapping[str, float] = dataclasses.field(default_factory=dict)
    stacked: Sequence[str] = ()
    axes: _axes.Axes = _axes.default_axes

    def __post_init__(self) -> None:
        object.__setattr__(self, "sparsity", check_sparsity("sparsity", self.sparsity))
        for pattern, sparsity in self.overrides.items():
            _paths.compile_pattern(pattern, "overrides")
            check_sparsity(f"overrides[{pattern!r}]", sparsity)
        if isinstance(self.stacked, str):
            raise TypeError(f"stacked={self.stacked!r}: must be a sequence of patterns")
        for pattern in self.stacked:
            _paths.compile_pattern(pattern, "stacked")
        if not callable(self.axes):
            raise TypeError(
                f"axes={self.axes!r}: must be a function of path and leaf that returns KernelAxes"
            )

    def __call__(self, params: PyTree) -> dict[str, float]:
        """Returns the sparsity of every sparse leaf.

        Args:
          params: Arrays or `jax.ShapeDtypeStruct`s in any pytree.

        Returns:
          `{path: sparsity}`, in tree order, without the leaves that stay dense. A layer has
          `floor(sparsity * size)` zeros.

        Raises:
          ValueError: If a pattern matches nothing, two overrides match one leaf, all
            leaves are dense, a leaf is too large, or the target cannot be reached.
        """
        layers = self.layers(params)
        budgeted = [x for x in layers if x.sparsity is None]
        if self.density_scale is None:
            shared = dict.fromkeys((x.path for x in budgeted), float(self.sparsity))
        else:
            shared = _scaled_sparsities(budgeted, self.sparsity, self.density_scale, self.name)
        return {x.path: float(shared[x.path] if x.sparsity is None else x.sparsity) for x in layers}

    def layers(self, params: PyTree) -> list[Layer]:
        """Returns the sparse leaves, in tree order; raises as a call does."""
        named = _paths.named_arrays(params)
        stacked = self.stacked_paths(params)
        if isinstance(self.dense, DenseLayers) and self.dense.by_default:
            _find_all(self.dense.because, [path for path, _ in named])
        layers: list[Layer] = []
        used: set[str] = set()
        for path, leaf in named:
            shape = tuple(leaf.shape)
            slices, shape = (shape[0], shape[1:]) if path in stacked else (1, shape)
            one = jax.ShapeDtypeStruct(shape, leaf.dtype)
            if self._is_dense(path, one):
                continue
            if math.prod(leaf.shape) > MAX_LEAF_SIZE:
                raise ValueError(
                    f"{path!r} has {math.prod(leaf.shape)} weights; a leaf may have at most "
                    f"{MAX_LEAF_SIZE} (2**31 - 1), since weights are counted in int32"
                )
            if math.prod(leaf.shape) == 0:
                continue
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                raise ValueError(
                    f"{path!r} has dtype {leaf.dtype}: only real floating-point leaves can be "
                    "sparse; let `dense` return True for this leaf"
                )
            matches = [p for p in self.overrides if _paths.compile_pattern(p, "").search(path)]
            if len(matches) > 1:
                raise ValueError(f"overrides {_paths.listing(matches)} all match {path!r}")
            used.update(matches)
            own = float(self.overrides[matches[0]]) if matches else None
            kernel = _axes.kernel_shape(shape, _axes.find(self.axes, path, one))
            layers.append(Layer(path, shape, slices, own, kernel))
        paths = [x.path for x in layers]
        for pattern in self.overrides:
            if pattern not in used:
                raise ValueError(
                    f"overrides: {pattern!r} matches no sparse leaf; sparse leaves are "
                    f"{_paths.listing(paths)}; all leaves are "
                    f"{_paths.listing([path for path, _ in named])}"
                )
        if [path for path, _ in named] == [""] and not named[0][1].shape:
            raise ValueError(
                "a distribution was called on a number instead of params: "
                "optax.inject_hyperparams takes it for a schedule; name it in "
                "static_args=('sparsity', ...)"
            )
        if named and not layers:
            raise ValueError(
                "nothing left to sparsify: `dense` keeps every leaf dense; leaves are "
                + _paths.listing([path for path, _ in named])
            )
        return layers

    def _is_dense(self, path: str, leaf: jax.ShapeDtypeStruct) -> bool:
        if self.dense is default_dense:
            return dense_reason(path, leaf, self.axes) is not None
        if isinstance(self.dense, DenseLayers):
            return self.dense.reason(path, leaf, self.axes) is not None
        return self.dense(path, leaf)

    def stacked_paths(self, params: PyTree) -> set[str]:
        """Returns the paths of the leaves whose first axis counts layers."""
        return stacked_paths(params, self.stacked)


def stacked_paths(params: PyTree, stacked: Sequence[str]) -> set[str]:
    """Returns the paths of the leaves that these patterns match: their first axis counts layers.

    Raises:
      TypeError: If `stacked` is a string instead of a sequence of patterns.
      ValueError: If a pattern matches no leaf, or a leaf without axes.
    """
    if isinstance(stacked, str):
        raise TypeError(f"stacked={stacked!r}: must be a sequence of patterns")
    named = _paths.named_arrays(params)
    paths: set[str] = set()
    for pattern in stacked:
        regex = _paths.compile_pattern(pattern, "stacked")
        matches = {path for path, _ in named if regex.search(path)}
        if not matches:
            raise ValueError(
                f"stacked: {pattern!r} matches no leaf; leaves are "
                f"{_paths.listing([path for path, _ in named])}"
            )
        paths |= matches
    for path, leaf in named:
        if path in paths and len(leaf.shape) < 1:
            raise ValueError(f"stacked: {path!r} is a scalar and has no leading axis")
    return paths


def _find_all(patterns: Iterable[str], paths: list[str]) -> None:
    for pattern in patterns:
        if not any(re.search(pattern, path) for path in paths):
            raise ValueError(
                f"dense: {pattern!r} matches no leaf; leaves are {_paths.listing(paths)}"
            )


def _predicate(dense: DensePredicate | Mapping[str, str]) -> DensePredicate:
    """Returns the predicate that a distribution is given, or that of layers to be added."""
    if isinstance(dense, Mapping):
        return DenseLayers(dense, by_default=True)
    if not callable(dense):
        raise TypeError(
            f"dense={dense!r}: must be {{pattern: reason}}, or a function of path and leaf"
        )
    return dense


def uniform(
    sparsity: float,
    *,
    dense: DensePredicate | Mapping[str, str] = default_dense,
    overrides: Mapping[str, float] | None = None,
    stacked: Sequence[str] = (),
    axes: _axes.Axes = _axes.default_axes,
) -> Distribution:
    """Gives every layer the same sparsity (paper, section 3, "Uniform").

    Use it for gradual pruning, as its published runs do; for `NM`, which fixes the sparsity of a
    layer; and if FLOPs have to fall by the same factor in each layer. In the paper `erk` is more
    accurate at the same number of weights. The paper also keeps the first layer dense: name it in
    `overrides`.

    Args:
      sparsity: Fraction of zeros, in [0, 1).
      dense: `{pattern: reason}`: layers that stay dense besides those of `default_dense`. Or
        `dense(path, leaf) -> bool`, as `DenseLayers`, which replaces `default_dense`; leaves for
        which it is True stay dense.
      overrides: `{pattern: sparsity}`; leaves whose path contains a match of the regular
        expression get that sparsity and do not count in the overall one.
      stacked: Patterns of leaves whose first axis counts layers (a scan over layers).
      axes: `axes(path, leaf) -> KernelAxes`: which axes are inputs, for structures and for all
        that counts inputs of units. The default chooses by the leaf's name.

    Returns:
      `distribution(params) -> {path: sparsity}`.

    Raises:
      ValueError: If a sparsity is outside [0, 1) or a pattern is malformed.

    Examples:
      >>> import jax.numpy as jnp
      >>> conv, fc = jnp.ones((3, 3, 4, 8)), jnp.ones((8, 10))
      >>> params = {"conv1": {"kernel": conv}, "fc": {"kernel": fc}}
      >>> uniform(0.8, overrides={"conv1": 0.0})(params)
      {'conv1/kernel': 0.0, 'fc/kernel': 0.8}
      >>> uniform(0.8, dense={"^fc/": "few classes"})(params)
      {'conv1/kernel': 0.8}
    """
    return Distribution(
        sparsity, None, "uniform", _predicate(dense), dict(overrides or {}), stacked, axes
    )


def erdos_renyi(
    sparsity: float,
    *,
    dense: DensePredicate | Mapping[str, str] = default_dense,
    overrides: Mapping[str, float] | None = None,
    stacked: Sequence[str] = (),
    axes: _axes.Axes = _axes.default_axes,
) -> Distribution:
    """Gives a layer a density proportional to `(n_in + n_out) / (n_in * n_out)`: Erdos-Renyi.

    Use it to compare with SET, whose distribution it is; `erk` is better for convolutions. Only the
    inputs and outputs of a kernel count, not its window (paper, section 3). Layers whose density
    would exceed 1 are dense, and the others get so much sparser.

    Args:
      sparsity: Overall fraction of zeros in the sparse leaves, in [0, 1).
      dense: As in `uniform`.
      overrides: As in `uniform`.
      stacked: As in `uniform`; each slice is a layer of its own.
      axes: As in `uniform`.

    Returns:
      `distribution(params) -> {path: sparsity}`.

    Raises:
      ValueError: If a sparsity is outside [0, 1) or a pattern is malformed; when called,
        if the target cannot be reached.
    """
    scale = _erdos_renyi_scale
    return Distribution(
        sparsity, scale, "erdos_renyi", _predicate(dense), dict(overrides or {}), stacked, axes
    )


def erk(
    sparsity: float,
    power: float = 1.0,
    *,
    dense: DensePredicate | Mapping[str, str] = default_dense,
    overrides: Mapping[str, float] | None = None,
    stacked: Sequence[str] = (),
    axes: _axes.Axes = _axes.default_axes,
) -> Distribution:
    """Gives a layer a density that falls with its size: Erdos-Renyi-Kernel, the paper's best.

    Use it for dynamic sparse training; methods use it if `sparsity` is a number. The density is
    proportional to `(sum(shape) / prod(shape)) ** power` (paper, section 3; the power is the
    reference code's `erk_power_scale`), so large layers become sparser than small ones. A network
    needs more FLOPs than under `uniform` at the same number of weights. Layers whose density would
    exceed 1 are dense, and the others get so much sparser, as in the reference.

    Args:
      sparsity: Overall fraction of zeros in the sparse leaves, in [0, 1).
      power: Exponent of the density; 0 gives all layers the same.
      dense: As in `uniform`.
      overrides: As in `uniform`.
      stacked: As in `uniform`; each slice is a layer of its own.
      axes: As in `uniform`.

    Returns:
      `distribution(params) -> {path: sparsity}`.

    Raises:
      ValueError: If a sparsity is outside [0, 1) or a pattern is malformed; when called,
        if the target cannot be reached.

    Examples:
      >>> import jax.numpy as jnp
      >>> params = {"a": {"kernel": jnp.ones((64, 32))}, "b": {"kernel": jnp.ones((32, 8))}}
      >>> {path: round(s, 3) for path, s in erk(0.8)(params).items()}
      {'a/kernel': 0.841, 'b/kernel': 0.469}
    """
    power = _numbers.real("power", power, "a finite number")
    if not math.isfinite(power):
        raise ValueError(f"power={power}: must be a finite number")
    scale = functools.partial(_erk_scale, power=power)
    return Distribution(
        sparsity, scale, "erk", _predicate(dense), dict(overrides or {}), stacked, axes
    )


# On the module's level, not closures, so that a distribution can be pickled.
def _erdos_renyi_scale(layer: Layer) -> float:
    return sum(layer.kernel[-2:]) / math.prod(layer.kernel[-2:])


def _erk_scale(layer: Layer, power: float) -> float:
    return (sum(layer.shape) / math.prod(layer.shape)) ** power


def zeros_in(sparsity: float, size: int) -> int:
    """Returns the number of zeros in a layer, `floor(sparsity * size)` as in the reference."""
    return math.floor(sparsity * size)


def check_sparsity(name: str, sparsity: float) -> float:
    """Returns `sparsity` as a Python float; raises unless it is a number in [0, 1)."""
    number = _numbers.real(name, sparsity, "a number in [0, 1)")
    if not 0 <= number < 1:
        raise ValueError(f"{name}={sparsity}: must be in [0, 1)")
    return number


def _scaled_sparsities(
    layers: Sequence[Layer],
    sparsity: float,
    scale: Callable[[Layer], float],
    name: str,
) -> dict[str, float]:
    """Solves for epsilon in `density = epsilon * scale`, capping at dense as the reference does.

    Layers whose density would exceed 1 are made dense, those of the largest scale first, and the
    others get the zeros that these lack (reference code `sparse_utils.py`, `get_mask_random` and
    its callers).

    Args:
      layers: Layers without a sparsity of their own.
      sparsity: Of all these layers together.
      scale: `scale(layer)`, to which the density is proportional.
      name: Name of the distribution, for errors.

    Returns:
      `{path: sparsity}`.

    Raises:
      ValueError: If every layer would be dense.
    """
    if not layers:  # all of them are in `overrides`
        return {}
    scales = {x.path: scale(x) for x in layers}
    zeros = {x.path: x.slices * zeros_in(sparsity, x.size) for x in layers}
    sizes = {x.path: x.slices * x.size for x in layers}
    dense: set[str] = set()
    while rest := [x.path for x in layers if x.path not in dense]:
        budget = sum(sizes[p] - zeros[p] for p in rest) - sum(zeros[p] for p in dense)
        epsilon = budget / sum(scales[p] * sizes[p] for p in rest)
        largest = max(scales[p] for p in rest)
        if budget <= 0:
            break
        if largest * epsilon <= 1:
            solved = {p: 0.0 if p in dense else 1 - epsilon * scales[p] for p in sizes}
            if sparsity > 0 and max(solved.values()) < 1e-9:
                break  # so small that `floor` leaves no zeros at all
            return solved
        dense |= {p for p in rest if scales[p] == largest}
    if sparsity == 0:  # rounding may have made every layer dense, as it should be
        return dict.fromkeys(sizes, 0.0)
    raise ValueError(
        f"{name}({sparsity}) cannot be reached in layers as small as "
        f"{_paths.listing([x.path for x in layers])}: every one would be dense; use a higher "
        f"sparsity, uniform, or overrides"
    )
