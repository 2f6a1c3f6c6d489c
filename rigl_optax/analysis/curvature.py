"""Measures the loss around weights: its gradient, its largest curvatures, and what is stable.

The gradient and the curvatures are those along the active weights, along which training moves. A
loss is any function `loss(params)` or `loss(params, batch)`. It is compiled once: give the same
function object each time, and what changes as `batch`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rigl_optax import _masks, _numbers, _paths
from rigl_optax._types import PyTree

Loss = Callable[..., jax.Array]

# A direction that is left of a vector after all others are taken out of it counts as rounding
# below this fraction of its length: float32 has 6e-8.
_ROUNDING = 1e-5


class HessianEigenvalues(NamedTuple):
    """The largest eigenvalues of a Hessian, and how exact they are.

    Attributes:
      values: float32 (k,), descending.
      residuals: float32 (k,): there is an eigenvalue within this distance of each value, but for
        rounding.
    """

    values: jax.Array
    residuals: jax.Array


def gradient_norm(
    loss: Loss, params: PyTree, batch: PyTree | None = None, *, masks: PyTree | None = None
) -> jax.Array:
    """Computes the norm of the gradient by the active weights.

    To first order its square, times the learning rate, is what a step of gradient descent takes
    off the loss. Use it to compare initial weights, or to see what a rewiring changes: measure with
    the masks before it and the params before it, and with those after it. Growth by the gradient
    raises the norm; growth at random does little.

    Args:
      loss: `loss(params)`, or `loss(params, batch)` if a batch is given; a scalar.
      params: Parameters.
      batch: Any pytree of arrays.
      masks: Masks as from `get_masks`; all parameters if not given.

    Returns:
      The Euclidean norm over all leaves, float32 scalar.

    Raises:
      ValueError: If the masks do not fit the parameters.

    Examples:
      >>> params, masks = {"w": jnp.array([3.0, 4.0])}, {"w": jnp.array([True, False])}
      >>> half_square = lambda p: jnp.sum(p["w"] ** 2) / 2
      >>> float(gradient_norm(half_square, params)), float(
      ...     gradient_norm(half_square, params, masks=masks)
      ... )
      (5.0, 3.0)

    References:
      Evci et al., [Gradient Flow in Sparse Neural Networks and How Lottery Tickets
      Win](https://arxiv.org/abs/2010.03533), 2022.
    """
    return _gradient_norm(loss, params, active(masks, params), arguments(batch))


@functools.partial(jax.jit, static_argnames="loss")
def _gradient_norm(
    loss: Loss, params: PyTree, masks: PyTree, batch: tuple[PyTree, ...]
) -> jax.Array:
    gradient = masked(jax.grad(loss)(params, *batch), masks)
    return jnp.sqrt(_dot(gradient, gradient))


def hessian_eigenvalues(
    loss: Loss,
    params: PyTree,
    batch: PyTree | None = None,
    *,
    k: int = 1,
    masks: PyTree | None = None,
    iterations: int = 30,
    seed: int = 0,
) -> HessianEigenvalues:
    """Computes the largest eigenvalues of the Hessian of the loss over the active weights.

    The largest one is the sharpness: `largest_stable_curvature` says which an optimizer bears. Each
    iteration takes one product of the Hessian with a vector, about two gradients' work; the Hessian
    itself is never made.

    This is Lanczos' method, from a random vector and with full reorthogonalisation. JAX's
    `lobpcg_standard` takes four products for each eigenvalue and iteration, needs `5 * k < n`, and
    by default stops at a residual that grows with the number of weights.

    Args:
      loss: `loss(params)`, or `loss(params, batch)` if a batch is given; a scalar. The Hessian is
        of this batch.
      params: Parameters.
      batch: Any pytree of arrays.
      k: How many eigenvalues. Small ones need more iterations.
      masks: Masks as from `get_masks`; all parameters if not given.
      iterations: Number of products, at least k. As many vectors of the size of params are stored.
        The residuals say whether it was enough.
      seed: Of the random vector.

    Returns:
      The k algebraically largest eigenvalues; NaN beyond the number of active weights.

    Raises:
      ValueError: If the masks do not fit the parameters, or a number is out of range.

    Examples:
      >>> loss = lambda p: (3 * p["w"][0] ** 2 + 2 * p["w"][1] ** 2 - p["w"][2] ** 2) / 2
      >>> found = hessian_eigenvalues(loss, {"w": jnp.ones(3)}, k=3, iterations=3)
      >>> [round(float(value), 4) for value in found.values]
      [3.0, 2.0, -1.0]
    """
    k = _numbers.integer("k", k, least=1)
    iterations = _numbers.integer("iterations", iterations, least=k)
    seed = _numbers.integer("seed", seed, least=0)
    key = jax.random.key(seed, impl="threefry2x32")
    mask = active(masks, params)
    return _hessian_eigenvalues(loss, params, mask, arguments(batch), key, k, iterations)


@functools.partial(jax.jit, static_argnames=("loss", "k", "iterations"))
def _hessian_eigenvalues(
    loss: Loss,
    params: PyTree,
    masks: PyTree,
    batch: tuple[PyTree, ...],
    key: jax.Array,
    k: int,
    iterations: int,
) -> HessianEigenvalues:
    gradient = jax.grad(lambda at: loss(at, *batch))

    def product(vector: PyTree) -> PyTree:
        tangent = jax.tree.map(lambda v, w: v.astype(w.dtype), vector, params)
        curved = jax.jvp(gradient, (params,), (tangent,))[1]
        return masked(jax.tree.map(lambda x: x.astype(jnp.float32), curved), masks)

    diagonal, beside, is_vector = _lanczos(product, params, masks, key, iterations)
    # Rows without a vector of their own are put below all eigenvalues, apart from the others.
    lowest = -1 - jnp.max(jnp.abs(diagonal)) - 2 * jnp.max(jnp.abs(beside))
    between = jnp.where(is_vector[1:], beside[:-1], 0)
    matrix = jnp.diag(jnp.where(is_vector, diagonal, lowest))
    values, vectors = jnp.linalg.eigh(matrix + jnp.diag(between, 1) + jnp.diag(between, -1))
    values, vectors = values[::-1][:k], vectors[:, ::-1][:, :k]
    exists = jnp.arange(k) < jnp.sum(is_vector)
    # Of what does not fit into the vectors only that of the last one is left out of the matrix.
    residuals = jnp.abs(beside[-1] * vectors[-1])
    return HessianEigenvalues(*(jnp.where(exists, x, jnp.nan) for x in (values, residuals)))


def _lanczos(
    product: Callable[[PyTree], PyTree],
    params: PyTree,
    masks: PyTree,
    key: jax.Array,
    iterations: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the diagonal of the tridiagonal matrix, the one beside it, and which rows exist.

    Where the vectors already span all that the product reaches, a new random direction follows:
    so eigenvalues of several directions are found as often as they are there. Where no direction
    is left, the rows that follow do not exist.
    """

    def random(key: jax.Array) -> PyTree:
        tree: Any = jax.tree.structure(params)
        keys = tree.unflatten(list(jax.random.split(key, tree.num_leaves)))
        return masked(
            jax.tree.map(lambda w, k: jax.random.normal(k, w.shape, jnp.float32), params, keys),
            masks,
        )

    def orthogonal(vector: PyTree, basis: PyTree) -> PyTree:
        for _ in range(2):  # the first leaves errors of rounding
            parts = jax.tree.map(lambda b, v: _product(b, v, v.ndim), basis, vector)
            total = sum(jax.tree.leaves(parts), start=jnp.zeros(iterations, jnp.float32))
            along = jax.tree.map(lambda b: _product(total, b, 1), basis)  # noqa: B023
            vector = jax.tree.map(jnp.subtract, vector, along)
        return vector

    def body(i: jax.Array, carry: tuple) -> tuple:
        basis, diagonal, beside, is_vector, vector, exists = carry
        basis = jax.tree.map(lambda b, v: b.at[i].set(v), basis, vector)
        image = product(vector)
        here, size = _dot(vector, image), jnp.sqrt(_dot(image, image))
        rest = orthogonal(image, basis)
        norm = jnp.sqrt(_dot(rest, rest))
        goes_on = norm > _ROUNDING * size

        def new_direction() -> tuple[PyTree, jax.Array]:
            drawn = random(jax.random.fold_in(key, i))
            rest = orthogonal(drawn, basis)
            left = jnp.sqrt(_dot(rest, rest))
            some = left > _ROUNDING * jnp.sqrt(_dot(drawn, drawn))
            return _scaled(rest, some / jnp.where(some, left, 1)), some & exists

        def same_direction() -> tuple[PyTree, jax.Array]:
            return _scaled(rest, 1 / jnp.where(goes_on, norm, 1)), exists

        following, more = jax.lax.cond(goes_on, same_direction, new_direction)
        return (
            basis,
            diagonal.at[i].set(here),
            beside.at[i].set(jnp.where(goes_on, norm, 0)),
            is_vector.at[i].set(exists),
            following,
            more,
        )

    first = random(jax.random.fold_in(key, iterations))
    length = jnp.sqrt(_dot(first, first))
    basis = jax.tree.map(lambda v: jnp.zeros((iterations, *v.shape), jnp.float32), first)
    zeros = jnp.zeros(iterations, jnp.float32)
    first = _scaled(first, 1 / jnp.where(length > 0, length, 1))
    start = (basis, zeros, zeros, jnp.zeros(iterations, bool), first, length > 0)
    return jax.lax.fori_loop(0, iterations, body, start)[1:4]


def largest_stable_curvature(
    learning_rate: float, *, momentum: float = 0.0, nesterov: bool = False
) -> float:
    r"""Returns the largest curvature at which `optax.sgd` is stable: compare the sharpness with it.

    On a quadratic of curvature $\lambda$ the steps of gradient descent shrink if $\lambda$ is
    below, and grow without bound if it is above,

    $$\frac{2}{\eta}, \qquad \frac{2 (1 + \beta)}{\eta}, \qquad
    \frac{2 (1 + \beta)}{(1 + 2 \beta)\, \eta},$$

    without momentum, with heavy-ball and with Nesterov momentum $\beta$. With Nesterov momentum the
    distance from the minimum satisfies $z^2 - (1 + \beta) q z + \beta q = 0$, $q = 1 - \eta
    \lambda$: both roots are inside the unit circle as long as $q > -1 / (1 + 2 \beta)$. Batches
    make noise, with which training can already be unstable below.

    Args:
      learning_rate: $\eta$.
      momentum: $\beta$.
      nesterov: As in `optax.sgd`.

    Raises:
      ValueError: If a number is out of range.

    Examples:
      >>> round(largest_stable_curvature(0.2, momentum=0.9, nesterov=True), 2)
      6.79

    References:
      Cohen et al., [Gradient Descent on Neural Networks Typically Occurs at the Edge of
      Stability](https://arxiv.org/abs/2103.00065), 2021.
    """
    rate = _numbers.real("learning_rate", learning_rate)
    beta = _numbers.real("momentum", momentum)
    if not 0 < rate < float("inf"):
        raise ValueError(f"learning_rate={learning_rate}: must be a positive number")
    if not 0 <= beta < 1:
        raise ValueError(f"momentum={momentum}: must be in [0, 1)")
    return 2 * (1 + beta) / (rate * (1 + 2 * beta if nesterov else 1))


def active(masks: PyTree | None, params: PyTree) -> PyTree:
    """Returns a mask for each leaf, or None where all of it is active.

    Raises:
      ValueError: If the masks do not fit the parameters.
    """
    if masks is None:
        return jax.tree.map(lambda _: None, params)
    named = _paths.flatten_with_paths(params)
    found = _masks.of_params(masks, [path for path, _ in named], [leaf for _, leaf in named])
    return jax.tree.unflatten(jax.tree.structure(params), [found[path] for path, _ in named])


def masked(tree: PyTree, masks: PyTree) -> PyTree:
    """Sets a tree to 0 where the masks from `active` are False."""

    def one(x: jax.Array, mask: jax.Array | np.ndarray | None) -> jax.Array:
        return x if mask is None else jnp.where(mask, x, jnp.zeros_like(x))

    structure: Any = jax.tree.structure(tree)
    of = structure.flatten_up_to(masks)
    return structure.unflatten(
        [one(x, mask) for x, mask in zip(jax.tree.leaves(tree), of, strict=True)]
    )


def arguments(batch: PyTree | None) -> tuple[PyTree, ...]:
    """Returns the arguments of a loss after the parameters."""
    return () if batch is None else (batch,)


def _product(a: jax.Array, b: jax.Array, axes: int) -> jax.Array:
    """Contracts the last `axes` of `a` with the first of `b`; exact products on every device."""
    return jnp.tensordot(a, b, axes=axes, precision=jax.lax.Precision.HIGHEST)


def _dot(a: PyTree, b: PyTree) -> jax.Array:
    """Sums the products of all entries, in float32."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return sum(
        (jnp.sum(x.astype(jnp.float32) * y.astype(jnp.float32)) for x, y in pairs),
        start=jnp.zeros((), jnp.float32),
    )


def _scaled(tree: PyTree, by: jax.Array) -> PyTree:
    return jax.tree.map(lambda x: x * by, tree)
