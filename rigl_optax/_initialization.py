"""Scales initial weights of sparse networks: each unit by the number of its active inputs."""

from collections.abc import Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from rigl_optax import _axes, _distributions, _masks, _paths
from rigl_optax._types import PyTree
from rigl_optax._xla import _blend

Mode = Literal["unit", "layer"]


def sparse_aware_init(
    params: PyTree,
    masks: PyTree,
    *,
    mode: Mode = "unit",
    axes: _axes.Axes = _axes.default_axes,
    stacked: Sequence[str] = (),
) -> PyTree:
    r"""Rescales freshly initialised weights to the fan-in that the masks leave.

    Use it once, before training, if the network has no normalisation layers: a plain initialiser
    gives weights of variance $c / n$ for n inputs, and the outputs of a sparse unit with
    only $n_i$ inputs come out too small. Here

    $$
    \begin{aligned}
    \theta_{ji} &\leftarrow m_{ji} \theta_{ji} \sqrt{n / n_i} && \text{(unit)} \\
    \theta &\leftarrow m \odot \theta / \sqrt{\text{density of the layer}}
        && \text{(layer)}
    \end{aligned}
    $$

    which has the variance $c / n_i$ that the model's own initialiser would give to a unit
    with $n_i$ inputs.

    Args:
      params: Weights as the model initialises them, not yet masked.
      masks: Bool tree like params, from `get_masks(opt_state)`; leaves are matched by path.
      mode: `unit` scales each unit by its own fan-in, `layer` all units of a layer alike.
      axes: As in `uniform`: which axes of a leaf count its units.
      stacked: As in `uniform`: patterns of leaves whose first axis counts layers; each layer has
        units of its own.

    Returns:
      A tree like params, masked. Leaves without inactive weights stay as they are, and units
      without active weights are 0.

    Raises:
      ValueError: If a leaf has no mask of its shape, or the mode is unknown.

    Examples:
      >>> import jax.numpy as jnp, rigl_optax
      >>> masks = {"kernel": jnp.array([[True, True], [False, True]])}
      >>> init = sparse_aware_init({"kernel": jnp.ones((2, 2))}, masks)["kernel"]
      >>> [[round(float(x), 3) for x in row] for row in init]
      [[1.414, 1.0], [0.0, 1.0]]

    References:
      Evci et al., [Gradient flow in sparse neural networks and how lottery tickets
      win](https://arxiv.org/abs/2010.03533), 2022.
    """
    if mode not in get_args(Mode):
        raise ValueError(f"mode={mode!r}: must be one of {', '.join(get_args(Mode))}")
    named = _paths.flatten_with_paths(params)
    mask_of = _masks.of_params(masks, [p for p, _ in named], [x for _, x in named])
    stacks = _distributions.stacked_paths(params, stacked)

    def scale(name: str, leaf: jax.Array) -> jax.Array:
        mask = jnp.asarray(mask_of[name])
        first = int(name in stacks)
        if leaf.ndim - first < 2 or not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        units = _axes.of_leaf(axes, name, leaf, name in stacks).outputs
        into = tuple(a for a in range(first, leaf.ndim) if a not in units)
        inputs = _axes.size(leaf.shape, into)
        active = jnp.sum(mask, into, jnp.int32, keepdims=True).astype(jnp.float32)
        if mode == "layer":
            of_layer = tuple(range(first, leaf.ndim))
            active = jnp.broadcast_to(jnp.mean(active, of_layer, keepdims=True), active.shape)
        # Units without active inputs are masked anyway: no division by 0.
        factor = jnp.sqrt(inputs / jnp.where(active > 0, active, inputs))
        return _blend.masked(mask, (leaf * factor).astype(leaf.dtype))

    return _paths.map_with_names(scale, params)
