"""Scales learning rates and initial values by width and density (sparse muPar)."""

import math
from typing import Any

import jax
import optax

from rigl_optax import _layout, _numbers, _paths
from rigl_optax._types import PyTree, Sparsity


def mupar_factors(params: PyTree, sparsity: Sparsity, width: float = 1.0) -> PyTree:
    r"""Computes by how much width and density scale the Adam rate of each weight.

    The best learning rate of Adam falls with the number of inputs of a unit: a sparse network has
    a higher one than a dense network, and a wide network a lower one than a narrow network. With
    the factor

    $$ f = \frac{1}{m \rho} $$

    of a layer of density $\rho$ in a network m times as wide as the one whose learning rate
    $\eta$ and initial standard deviation $\sigma$ are known, take $f \eta$ for its rate and
    $\sqrt{f} \sigma$ for its initial values. Then one $\eta$ serves all widths and sparsities.
    Use it to compare sparsities, or to try a rate on a small network.

    Args:
      params: Parameters, or their shapes.
      sparsity: As in `rigl`: a number or a distribution. Leaves that it gives no sparsity
        (embedding, head, normalisation) keep a factor of 1; leaves of sparsity 0 do not.
      width: Width m of the network, relative to that for which the rate was chosen.

    Returns:
      A tree like params of floats.

    Raises:
      ValueError: If `width` is not positive, or the sparsity does not fit.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, rigl_optax
      >>> layers = rigl_optax.uniform(0.9)
      >>> params = {"hidden": jnp.ones((64, 64)), "head": {"bias": jnp.ones(10)}}
      >>> factors = rigl_optax.mupar_factors(params, layers, width=2.0)
      >>> {name: round(f, 3) for name, f in factors.items() if name == "hidden"}
      {'hidden': 5.0}
      >>> params = jax.tree.map(lambda w, f: w * f**0.5, params, factors)
      >>> inner = optax.chain(optax.adamw(1e-3), rigl_optax.scale_by_factors(factors))
      >>> tx = rigl_optax.rigl(inner, layers, end=1_000)

    References:
      Dey et al., [Sparse maximal update parameterization](https://arxiv.org/abs/2405.15743), 2024.
    """
    width = _numbers.real("width", width)
    if not 0 < width < math.inf:
        raise ValueError(f"width={width}: must be positive")
    sparsities = _layout.as_distribution(sparsity, None)(params)
    factors = [
        1 / (width * (1 - sparsities[path])) if path in sparsities else 1.0
        for path, _ in _paths.flatten_with_paths(params)
    ]
    return jax.tree.unflatten(jax.tree.structure(params), factors)


def scale_by_factors(factors: PyTree) -> optax.GradientTransformation:
    """Builds a transformation that multiplies the updates of each leaf by a number of its own.

    After an optimizer it gives each leaf a learning rate of its own, decoupled weight decay
    included. It goes inside a sparse transformation, which then resets no state of it.

    Args:
      factors: A tree like params of floats, as from `mupar_factors`.

    Returns:
      A transformation without state.

    Examples:
      >>> import optax, rigl_optax
      >>> tx = optax.chain(optax.sgd(1.0), rigl_optax.scale_by_factors({"a": 2.0, "b": 0.5}))
      >>> updates, _ = tx.update({"a": 1.0, "b": 1.0}, tx.init({"a": 0.0, "b": 0.0}))
      >>> updates
      {'a': -2.0, 'b': -0.5}
    """

    def scaled(updates: PyTree, params: PyTree | None) -> Any:
        del params
        return jax.tree.map(lambda update, factor: update * factor, updates, factors)

    return optax.stateless(scaled)
