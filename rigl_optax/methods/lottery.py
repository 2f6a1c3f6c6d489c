"""Makes lottery tickets: the masks of a finished run on weights from its beginning."""

import jax
import jax.numpy as jnp

from rigl_optax import _masks, _paths
from rigl_optax._types import PyTree
from rigl_optax._xla import _blend


def lottery_ticket(params: PyTree, masks: PyTree) -> PyTree:
    r"""Applies the masks from the end of a run to weights from its beginning.

    $$
    \theta \leftarrow m_T \odot \theta_k
    $$

    Use it to test whether the masks alone explain a result. Training twice as long is better than
    a second run from the masks of the first (RigL paper, appendix E).

    Train the result with `static_sparse(inner, sparsity, initial_masks=masks)`, or go on rewiring
    with `rigl(inner, sparsity, initial_masks=masks, ...)`. If leaves are stacks of layers, pass the
    distribution of the run as `sparsity`, since masks do not say so; else pass None.

    Args:
      params: Weights at initialisation (k = 0), or rewound to a later step k.
      masks: Bool tree like params, from the finished run (`get_masks`); leaves are matched by
        path.

    Returns:
      A tree like params, in which inactive weights are 0.

    Raises:
      ValueError: If paths or shapes differ.

    Examples:
      >>> import jax.numpy as jnp, rigl_optax
      >>> masks = {"kernel": jnp.array([True, False])}
      >>> lottery_ticket({"kernel": jnp.array([3.0, 4.0])}, masks)["kernel"].tolist()
      [3.0, 0.0]

    References:
      Frankle and Carbin, [The lottery ticket hypothesis](https://arxiv.org/abs/1803.03635), 2019;
      Evci et al. 2020, appendix E.
    """
    named = _paths.flatten_with_paths(params)
    mask_of = _masks.of_params(masks, [path for path, _ in named], [leaf for _, leaf in named])
    leaves = [_blend.masked(jnp.asarray(mask_of[path]), leaf) for path, leaf in named]
    return jax.tree.unflatten(jax.tree.structure(params), leaves)
