"""Follows the loss between two solutions: along the straight line, and along trained curves.

A loss is any function `loss(params)` or `loss(params, batch)`, with what changes as `batch`. It
should depend on the params alone: of a model with batch normalisation take the one that normalises
by the batch, for running averages belong to neither solution on the way.
"""

import functools
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rigl_optax import _numbers, _paths
from rigl_optax._types import PyTree
from rigl_optax.analysis.curvature import Loss, active, arguments, masked


class Barrier(NamedTuple):
    r"""How far the loss rises on a way between two solutions; all float32 scalars.

    Attributes:
      above_line: $\max_t\ L(t) - (1 - t) L(0) - t L(1)$, the height over the straight line between
        the losses of the ends. It is 0 if nothing on the way is above that.
      above_ends: $\max_t L(t) - \max(L(0), L(1))$, the height over the higher end; 0 if there is
        nothing above it.
      at: The t of the highest loss.
    """

    above_line: jax.Array
    above_ends: jax.Array
    at: jax.Array


class Bezier(NamedTuple):
    r"""A Bezier curve through a space of parameters.

    $$\theta(t) = \sum_{i=0}^{n} \binom{n}{i} (1 - t)^{n-i}\, t^i\, \theta_i$$

    from $\theta_0$ at 0 to $\theta_n$ at 1. It is a pytree, and can be passed through `jax.jit`.

    Attributes:
      controls: The $\theta_i$, a tree like params; the leaves have an axis in front, of n + 1.
    """

    controls: PyTree

    def at(self, t: jax.typing.ArrayLike) -> PyTree:
        """Returns the params at t; beyond 0 and 1 the polynomial goes on.

        Args:
          t: A scalar.
        """
        t = jnp.asarray(t, jnp.float32)

        def point(controls: jax.Array) -> jax.Array:
            n = controls.shape[0] - 1
            parts = [math.comb(n, i) * (1 - t) ** (n - i) * t**i for i in range(n + 1)]
            # Exactly an end where only its part is not 0.
            terms = [part * x.astype(jnp.float32) for part, x in zip(parts, controls, strict=True)]
            return sum(terms[1:], start=terms[0]).astype(controls.dtype)

        return jax.tree.map(point, self.controls)

    def losses(
        self, loss: Loss, ts: jax.typing.ArrayLike, batch: PyTree | None = None
    ) -> jax.Array:
        """Computes the loss along the curve, in one compiled program.

        Args:
          loss: `loss(params)`, or `loss(params, batch)` if a batch is given; a scalar.
          ts: Where: (points,).
          batch: Any pytree of arrays.

        Returns:
          float32 (points,).

        Raises:
          ValueError: If `ts` is not a vector.
        """
        ts = jnp.asarray(ts, jnp.float32)
        if ts.ndim != 1:
            raise ValueError(f"ts has shape {ts.shape}: must be a vector")
        return _losses(loss, self, ts, arguments(batch))


@functools.partial(jax.jit, static_argnames="loss")
def _losses(loss: Loss, curve: Bezier, ts: jax.Array, batch: tuple[PyTree, ...]) -> jax.Array:
    return jax.lax.map(lambda t: loss(curve.at(t), *batch).astype(jnp.float32), ts)


def interpolate(
    loss: Loss,
    start: PyTree,
    end: PyTree,
    ts: jax.typing.ArrayLike,
    batch: PyTree | None = None,
) -> jax.Array:
    r"""Computes the loss along the straight line $(1 - t)\, \theta_0 + t\, \theta_1$.

    Use it to see whether two solutions are in one basin: if the loss rises between them
    (`barrier`), they are not linearly connected. Between two masks the line is in their union.

    Args:
      loss: `loss(params)`, or `loss(params, batch)` if a batch is given; a scalar.
      start: Parameters at t = 0.
      end: Parameters at t = 1.
      ts: Where: (points,). Values beyond 0 and 1 follow the line further.
      batch: Any pytree of arrays.

    Returns:
      float32 (points,).

    Raises:
      ValueError: If the two trees differ in more than their values, or `ts` is not a vector.

    Examples:
      >>> loss = lambda p: (p["w"] ** 2 - 1) ** 2  # two minima, -1 and 1
      >>> line = interpolate(
      ...     loss, {"w": jnp.float32(-1)}, {"w": jnp.float32(1)}, jnp.linspace(0, 1, 5)
      ... )
      >>> [round(float(x), 4) for x in line]
      [0.0, 0.5625, 1.0, 0.5625, 0.0]

    References:
      Goodfellow et al., [Qualitatively characterizing neural network optimization
      problems](https://arxiv.org/abs/1412.6544), 2015.
    """
    return _line(start, end, degree=1).losses(loss, ts, batch)


def fit_bezier(
    loss: Loss,
    start: PyTree,
    end: PyTree,
    optimizer: optax.GradientTransformation,
    *,
    degree: int = 2,
    steps: int = 1_000,
    masks: PyTree | None = None,
    batches: Iterable[PyTree] | None = None,
    seed: int = 0,
) -> Bezier:
    """Trains the control points of a Bezier curve for the lowest mean loss along it.

    Both ends stay where they are; the points between them start on the straight line. Each step
    follows the gradient at one t, drawn uniformly from [0, 1]. Use it to see whether two solutions
    that a barrier separates on the line are connected all the same. With `masks` the curve stays
    within a sparse subspace: give the union of both solutions' masks,
    `jax.tree.map(jnp.logical_or, masks_a, masks_b)`; without, it may use all weights.

    Args:
      loss: `loss(params)`, or `loss(params, batch)` if there are batches; a scalar.
      start: Parameters at t = 0.
      end: Parameters at t = 1.
      optimizer: Of the control points between the ends.
      degree: Of the curve, which has `degree - 1` points to train: at least 2.
      steps: Number of steps.
      masks: Weights that may be other than 0; all if not given.
      batches: A batch for each step. Without, the loss is of the params alone, and all steps are
        one program.
      seed: Of the draws of t.

    Returns:
      The curve.

    Raises:
      ValueError: If the two trees differ in more than their values, the masks do not fit them, an
        end is not 0 outside the masks, a number is out of range, or there are too few batches.

    Examples:
      >>> import optax
      >>> def loss(p):  # a ring of minima
      ...     return (p["x"] ** 2 + p["y"] ** 2 - 1) ** 2
      >>> ends = [{"x": jnp.float32(x), "y": jnp.float32(0.01)} for x in (-1, 1)]
      >>> curve = fit_bezier(loss, *ends, optax.adam(0.05), degree=3, steps=300)
      >>> ts = jnp.linspace(0, 1, 11)
      >>> float(barrier(interpolate(loss, *ends, ts)).above_ends) > 0.9
      True
      >>> float(barrier(curve.losses(loss, ts)).above_ends) < 0.1
      True

    References:
      Garipov et al., [Loss Surfaces, Mode Connectivity, and Fast Ensembling of
      DNNs](https://arxiv.org/abs/1802.10026), 2018.
    """
    degree = _numbers.integer("degree", degree, least=2)
    steps = _numbers.integer("steps", steps, least=1)
    key = jax.random.key(_numbers.integer("seed", seed, least=0), impl="threefry2x32")
    curve, mask = _line(start, end, degree), active(masks, start)
    _check_inside(curve, mask)
    inner = jax.tree.map(lambda x: x[1:-1], curve.controls)
    state = inner, optimizer.init(inner)
    if batches is None:
        state = _train(loss, optimizer, curve, mask, state, key, 0, steps, ())
    else:
        given = iter(batches)
        for step in range(steps):
            batch = next(given, None)
            if batch is None:
                raise ValueError(f"batches: there are {step}, must be one for each of {steps=}")
            state = _train(loss, optimizer, curve, mask, state, key, step, step + 1, (batch,))
    return _with_inner(curve, state[0])


@functools.partial(jax.jit, static_argnames=("loss", "optimizer"))
def _train(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    curve: Bezier,
    masks: PyTree,
    state: tuple[PyTree, optax.OptState],
    key: jax.Array,
    first: jax.Array,
    last: jax.Array,
    batch: tuple[PyTree, ...],
) -> tuple[PyTree, optax.OptState]:
    def step(i: jax.Array, state: tuple[PyTree, optax.OptState]) -> tuple[PyTree, optax.OptState]:
        inner, opt_state = state
        t = jax.random.uniform(jax.random.fold_in(key, i), (), jnp.float32)
        grads = jax.grad(lambda inner: loss(_with_inner(curve, inner).at(t), *batch))(inner)
        updates, opt_state = optimizer.update(masked(grads, masks), opt_state, inner)
        return masked(optax.apply_updates(inner, updates), masks), opt_state

    return jax.lax.fori_loop(first, last, step, state)


def barrier(losses: jax.typing.ArrayLike, ts: jax.typing.ArrayLike | None = None) -> Barrier:
    """Measures how far the loss rises on the way between two solutions.

    Args:
      losses: Losses on the way, (points,), those of both ends included, as from `interpolate`.
      ts: Where they are: ascending, from 0 to 1; evenly spaced if not given.

    Returns:
      The heights over the ends. They are NaN if a loss is NaN.

    Raises:
      ValueError: If there are fewer than two losses, or `ts` are others than said.

    Examples:
      >>> found = barrier([1.0, 4.0, 3.0])
      >>> float(found.above_line), float(found.above_ends), float(found.at)
      (2.0, 1.0, 0.5)

    References:
      Frankle et al., [Linear Mode Connectivity and the Lottery Ticket
      Hypothesis](https://arxiv.org/abs/1912.05671), 2020, of the error over the mean of both ends.
    """
    heights = jnp.asarray(losses, jnp.float32)
    if heights.ndim != 1 or heights.size < 2:
        raise ValueError(f"losses have shape {heights.shape}: must be a vector of two or more")
    if ts is None:
        ts = np.linspace(0, 1, heights.size)
    ts = np.asarray(ts, np.float32)
    if ts.shape != heights.shape or ts[0] != 0 or ts[-1] != 1 or (np.diff(ts) <= 0).any():
        raise ValueError(
            f"ts: must ascend from 0 to 1 in {heights.size} points, as many as losses; they are "
            f"{ts.tolist()}"
        )
    first, last = heights[0], heights[-1]
    return Barrier(
        # At the ends rounding might leave more or less than nothing.
        jnp.maximum(0, jnp.max(heights - (1 - ts) * first - ts * last)),
        jnp.max(heights) - jnp.maximum(first, last),
        jnp.asarray(ts)[jnp.argmax(heights)],
    )


def _line(start: PyTree, end: PyTree, degree: int) -> Bezier:
    """Returns the straight line as a curve of any degree: control points at even distances.

    Raises:
      ValueError: If the two trees differ in more than their values.
    """
    ends = [_paths.flatten_with_paths(tree) for tree in (start, end)]
    structures: list[Any] = [jax.tree.structure(tree) for tree in (start, end)]
    if structures[0] != structures[1]:
        paths = [{path for path, _ in named} for named in ends]
        only = _paths.listing(sorted(paths[0] ^ paths[1])) or "no leaf"
        raise ValueError(f"start and end are different trees: {only} is in one of them only")
    for (path, a), (_, b) in zip(*ends, strict=True):
        a, b = jnp.asarray(a), jnp.asarray(b)
        if a.shape != b.shape or a.dtype != b.dtype or not jnp.issubdtype(a.dtype, jnp.floating):
            raise ValueError(
                f"{path!r} is {a.dtype}{list(a.shape)} at the start and {b.dtype}{list(b.shape)} "
                "at the end: must be floating point and alike"
            )

    def points(a: jax.Array, b: jax.Array) -> jax.Array:
        a, b = jnp.asarray(a), jnp.asarray(b)
        between = [(1 - i / degree) * a + i / degree * b for i in range(1, degree)]
        return jnp.stack([a, *between, b])

    return Bezier(jax.tree.map(points, start, end))


def _with_inner(curve: Bezier, inner: PyTree) -> Bezier:
    """Returns the curve with other control points between its ends."""
    return Bezier(
        jax.tree.map(lambda x, new: jnp.concatenate([x[:1], new, x[-1:]]), curve.controls, inner)
    )


def _check_inside(curve: Bezier, masks: PyTree) -> None:
    """Raises if an end has weights outside the masks: the curve could not be inside."""
    named = _paths.flatten_with_paths(curve.controls)
    structure: Any = jax.tree.structure(curve.controls)
    of = structure.flatten_up_to(masks)
    for (path, controls), mask in zip(named, of, strict=True):
        for name, at in (("start", 0), ("end", -1)):
            if mask is not None and np.any(np.asarray(controls[at])[~np.asarray(mask)]):
                raise ValueError(
                    f"masks: {name} has weights of {path!r} where the mask is False; give the "
                    "union of the masks of both ends"
                )
