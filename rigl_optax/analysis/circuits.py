"""Finds circuits by ablation: which parts of a network a behaviour needs, and which it does not.

It needs Flax NNX, and is imported as `from rigl_optax.analysis import circuits`. Units are named by
the layer that reads them: of a transformer of this library the hidden units of an MLP are what
`blocks/0/mlp/down` reads, the heads what `blocks/0/attention/out` reads, some features each.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rigl_optax import _paths


def mean_inputs(model: nnx.Module, layers: Sequence[str], *inputs: Any) -> dict[str, jax.Array]:
    """Returns the mean of what layers read: with it `ablated` replaces units that are left out.

    The means should be those of text or images as they usually are, not of the behaviour alone.

    Args:
      model: Any NNX model; it is not changed. It may be called under `jax.jit`.
      layers: Paths of layers whose first argument is an array (..., features), as
        `blocks/0/mlp/down`. Each is called once, and not inside of a loop (`nnx.scan`).
      *inputs: The arguments of the model.

    Returns:
      Arrays (features,) by path, of all leading axes.

    Raises:
      ValueError: If there is no layer of this name, or it was not called just once.

    Examples:
      >>> from flax import nnx
      >>> import jax.numpy as jnp
      >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
      >>> mean_inputs(model, ["layers/0"], jnp.array([[1.0, 2.0], [3.0, 6.0]]))["layers/0"].tolist()
      [2.0, 4.0]
    """
    found: dict[str, list[jax.Array]] = {path: [] for path in layers}

    def watched(path: str, x: jax.Array) -> jax.Array:
        found[path].append(x.mean(axis=tuple(range(x.ndim - 1))))
        return x

    _with_inputs(model, layers, watched)(*inputs)
    for path, means in found.items():
        if len(means) != 1:
            raise ValueError(f"layer {path!r} was called {len(means)} times, must be called once")
    return {path: means[0] for path, means in found.items()}


def ablated(
    model: nnx.Module, keep: Mapping[str, jax.typing.ArrayLike], means: Mapping[str, jax.Array]
) -> nnx.Module:
    r"""Returns a copy of a model in which some units are always at their mean (mean ablation).

    What a layer reads, $x$, becomes $x + (1 - k)(\bar x - x)$. With k = 1 that is x, to the last
    bit. The derivative by k at 1 says, to first order, what a unit is worth.

    Args:
      model: Any NNX model; it is not changed, and shares its parameters with the copy.
      keep: By the path of the layer that reads them, which units stay: (units,), booleans or
        floats from 0 to 1. The features of the layer are split evenly between them: 8 values for
        a layer of 128 features keep or ablate 16 features each, as a head.
      means: As from `mean_inputs`.

    Raises:
      ValueError: If there is no layer of this name, no mean for it, or its features cannot be
        split into so many units.

    Examples:
      >>> from flax import nnx
      >>> import jax.numpy as jnp
      >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
      >>> x = jnp.array([[1.0, 2.0]])
      >>> without = ablated(model, {"layers/0": [True, False]}, {"layers/0": jnp.array([0.0, 5.0])})
      >>> bool((without(x) == model(jnp.array([[1.0, 5.0]]))).all())
      True
    """
    spread = {}
    for path, units in keep.items():
        if path not in means:
            raise ValueError(f"layer {path!r}: no mean; there are {_paths.listing(list(means))}")
        kept, features = jnp.asarray(units, jnp.float32), len(means[path])
        if kept.ndim != 1 or not len(kept) or features % len(kept):
            raise ValueError(
                f"layer {path!r}: keep of shape {kept.shape} must be of one axis whose length "
                f"divides the {features} features"
            )
        spread[path] = jnp.repeat(1 - kept, features // len(kept))

    def replaced(path: str, x: jax.Array) -> jax.Array:
        return x + (spread[path] * (means[path] - x)).astype(x.dtype)

    return _with_inputs(model, list(keep), replaced)


def smallest(
    loss: Callable[[np.ndarray], float], order: Sequence[int] | np.ndarray, limit: float
) -> np.ndarray:
    """Leaves out parts, those that matter least first, as long as a loss stays within a limit.

    It tries large sets before single parts. In the end none of the parts that stay can be left
    out alone: without any of them the loss is above the limit. Another order may end in another
    set, and a smaller one may exist.

    Args:
      loss: `loss(keep) -> float`, where the parts whose entry of the bool array is False are
        ablated: units by `ablated`, or single weights by setting them to 0.
      order: All parts, 0 to n - 1, those first that are tried first.
      limit: The highest loss that is accepted.

    Returns:
      Bool array (n,): which parts stay.

    Raises:
      ValueError: If the loss of everything is above the limit, or `order` does not list all parts
        once.

    Examples:
      >>> import numpy as np
      >>> needed = np.array([False, True, False, True])
      >>> smallest(lambda keep: float((needed & ~keep).sum()), range(4), 0.5).tolist()
      [False, True, False, True]
    """
    order = np.asarray(order, dtype=np.int64)
    if sorted(order.tolist()) != list(range(len(order))):
        raise ValueError(f"order={order}: must list 0 to {len(order) - 1}, each once")
    keep = np.ones(len(order), bool)
    if not (whole := float(loss(keep))) <= limit:
        raise ValueError(f"the loss with everything is {whole:g}, above limit={limit:g}")
    size = len(order)
    while size:
        dropped = False
        kept = order[keep[order]]
        for part in (kept[at : at + size] for at in range(0, len(kept), size)):
            without = keep.copy()
            without[part] = False
            if float(loss(without)) <= limit:
                keep, dropped = without, True
        # Single parts are tried until none of them can go.
        size = size if size == 1 and dropped else size // 2
    return keep


class _Reader(nnx.Module):
    """A layer in whose way stands a function of what it reads."""

    def __init__(
        self, layer: nnx.Module, path: str, change: Callable[[str, jax.Array], jax.Array]
    ) -> None:
        self.layer, self.path, self.change = layer, path, change

    def __call__(self, x: jax.Array, *others: Any, **keys: Any) -> Any:
        return self.layer(self.change(self.path, x), *others, **keys)


def _with_inputs(
    model: nnx.Module, paths: Sequence[str], change: Callable[[str, jax.Array], jax.Array]
) -> nnx.Module:
    """Copies a model, with `change(path, x)` in front of some of its layers."""
    # A new graph of the same variables: the given model stays as it is.
    copy = nnx.merge(*nnx.split(model))
    for path in paths:
        *above, last = path.split("/")
        owner: Any = copy
        try:
            for name in above:
                owner = _child(owner, name)
            layer = _child(owner, last)
        except (AttributeError, IndexError, KeyError, TypeError):
            layer = None
        if not isinstance(layer, nnx.Module) or not callable(layer):
            raise ValueError(f"layer {path!r}: the model has no such layer")
        reader = _Reader(layer, path, change)
        if last.isdecimal():
            owner[int(last)] = reader
        else:
            setattr(owner, last, reader)
    return copy


def _child(owner: Any, name: str) -> Any:
    return owner[int(name)] if name.isdecimal() else getattr(owner, name)
