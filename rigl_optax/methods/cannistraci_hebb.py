"""Implements Cannistraci-Hebb training, which grows by link prediction, without gradients."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rigl_optax import _layout, _numbers, _plan
from rigl_optax._layout import Layout
from rigl_optax._ranking import _random, _scores, _top_k
from rigl_optax._structures import UNSTRUCTURED, Structures
from rigl_optax._types import Arrays, Overrides, PyTree, Seed, Sparsity
from rigl_optax._wrapper import _transform
from rigl_optax._wrapper._method import Decision, Method, RewiringInputs
from rigl_optax._wrapper._newborn import AT_REST, Grown
from rigl_optax._xla import _sharding
from rigl_optax.methods import _drop_and_grow, _falling, _link_prediction, _min_fan_in

Removal = Literal["magnitude", "relative_importance"]

_STEEPNESS = 6.0  # of the fall of the density, in all experiments of the paper
_LINK = 1 << 30  # before every score of a position that no path leads to
_NOISE_BITS = 10  # behind the point, of what noise is multiplied by
_MOST_NOISE = 16  # so that noise fits into int32
_OFFSET = 5 * _MOST_NOISE << _scores.LOG_BITS  # no noise is below it
_GROWTH, _REMOVAL = _random.Purpose.GROWTH, _random.Purpose.REMOVAL


def cht(
    inner: optax.GradientTransformation,
    sparsity: Sparsity | None,
    *,
    end: int,
    every: int = 100,
    begin: int = 0,
    drop_fraction: float | optax.Schedule = 0.3,
    removal: Removal = "magnitude",
    soft: bool = False,
    delta: tuple[float, float] | None = None,
    initial_sparsity: Sparsity | None = None,
    overrides: Overrides | None = None,
    gradient_step: bool = False,
    min_fan_in: int = 0,
    grown: Grown = AT_REST,
    structure: Structures = UNSTRUCTURED,
    initial_masks: PyTree | None = None,
    seed: Seed = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Cannistraci-Hebb training (CHT, CHTs, CHTss): grows where the graph of a layer says.

    A layer is a bipartite graph of inputs and outputs, its active weights are the links, and links
    grow where a link predictor of network science expects them: between nodes that many paths of
    three links join, by nodes with few links elsewhere. No step needs a gradient of an inactive
    weight.

    $$
    \begin{aligned}
    k &= \mathrm{int32}(n \cdot f(t)) \\
    K &= \text{the } n - k \text{ active weights of largest } r \\
    G &= \text{the } k \text{ positions outside } K \text{ of largest } s(K)
    \end{aligned}
    $$

    where r is $|\theta|$, or its relative importance
    $|\theta_{ij}| / \sum_j |\theta_{ij}| + |\theta_{ij}| / \sum_i |\theta_{ij}|$, and s is the
    score CH2-L3n. With the links A that are kept, their degrees k, and the numbers of common
    neighbours $C = A^T A$ of outputs and $D = A A^T$ of inputs,

    $$
    s_{uv} = \sum_z A_{uz} [C_{zv} > 0] \frac{1 + C_{zv}}{k_z - C_{zv}}
           + \sum_z [D_{uz} > 0] \frac{1 + D_{uz}}{k_z - D_{uz}} A_{zv}
    $$

    With `soft` (CHTs) both sets are samples without replacement, in proportion to
    $r^{\delta / (1 - \delta)}$ and to s, where $\delta$ rises linearly: what is removed is almost
    random at first, and topologies do not get stuck in what is removed and grows again.

    With `initial_sparsity` (CHTss) training starts denser. Each rewiring first prunes the weights
    of smallest relative importance, to a number that falls along a sigmoid,
    $\sigma(6 (x - 1/2))$ of the share x of the rewirings, stretched to reach both ends.

    Use it at 95 to 99 % sparsity in linear layers where dense gradients cannot be had. A rewiring
    multiplies dense matrices, 4 i o (i + o) FLOPs in a layer of i inputs and o outputs: more than a
    training step of a small batch, so keep `every` large; training FLOPs count them.
    Condensed weights have no form of it.

    What the papers leave open, or do otherwise, is decided so here: the first paper's predictor,
    CH3-L3, sums over all paths, and the second replaced it by CH2-L3n, which is used with and
    without `soft`. Where no path leads, links grow at random after all others; of equal scores,
    random ones grow. Removal by `soft` draws what is kept. Neurons without inputs or outputs keep
    their links, since a transformation does not know which layers follow each other. Links that
    grow again start as `grown` says, at 0 by default, not at the value they last had. There is
    no early stop. Initial masks are random; give `initial_masks` for those of a network model.

    Args:
      inner: As in `rigl`.
      sparsity: As in `rigl`; the papers use the same sparsity in all layers (`uniform`).
      end: As in `rigl`; the density falls until then, too.
      every: As in `rigl`.
      begin: As in `rigl`.
      drop_fraction: As in `rigl`. The papers keep it constant: `constant_drop_fraction(0.3)`, and
        0.1 for language models.
      removal: What decides on drops: `magnitude`, or `relative_importance`, which drops fewer
        links of nodes that have few.
      soft: Whether to sample.
      delta: With `soft`, $\delta$ at the first and the last rewiring, above 1 / 17 and at most 1,
        where 1 is no noise; None for the paper's (0.5, 0.9).
      initial_sparsity: Sparsity at the start, as in `gradual_magnitude_pruning`; the paper's is
        0.5. None for the final one.
      overrides: As in `rigl`; not with `initial_sparsity`.
      gradient_step: As in `rigl`.
      min_fan_in: As in `rigl`.
      grown: As in `rigl`.
      structure: As in `rigl`. Under `Block` groups of inputs and of outputs are the nodes.
      initial_masks: As in `rigl`.
      seed: Seeds the initial masks, and what is drawn at rewirings, in separate streams.

    Returns:
      A transformation whose state is a `SparseState`.

    Raises:
      ValueError: As `rigl` does; if `removal` or `delta` is not as described, or is given without
        effect; at `init`, of convolutions with a window without a `Block`, and of leaves without
        inputs.

    Examples:
      >>> import jax.numpy as jnp, optax, rigl_optax
      >>> tx = rigl_optax.cht(optax.sgd(0.1, momentum=0.9), 0.9, soft=True, end=1_000)
      >>> int(rigl_optax.get_masks(tx.init({"kernel": jnp.ones((10, 10))}))["kernel"].sum())
      10

    References:
      Zhang et al., [Epitopological learning and Cannistraci-Hebb network shape intelligence
      brain-inspired theory for ultra-sparse advantage in deep
      learning](https://openreview.net/forum?id=iayEcORsGd), 2024; `soft` and `initial_sparsity`:
      Zhang et al., [Brain network science modelling of sparse neural networks enables Transformers
      and LLMs to perform as fully connected](https://arxiv.org/abs/2501.19107), 2025.
    """
    if removal not in get_args(Removal):
        raise ValueError(f"removal={removal!r}: must be one of {', '.join(get_args(Removal))}")
    if delta is not None and not soft:
        raise ValueError(f"delta={delta!r}: only with soft=True, which it is the noise of")
    if initial_sparsity is not None and overrides:
        raise ValueError("initial_sparsity: needs one schedule for all layers, without overrides")
    steps = _plan.rewiring_plan(begin=begin, end=end, every=every).default.schedule.steps()
    keep_scores = _keep_scores(removal, _noise_of(delta, steps) if soft else None, steps, seed)

    def grow_scores(inputs: RewiringInputs) -> Arrays:
        pairs = zip(_link_prediction.scores(inputs), _drawn(inputs, seed, _GROWTH), strict=True)
        return [_growth(score, random, soft) for score, random in pairs]

    method = _drop_and_grow.drop_and_grow_method(
        grow_scores,
        keep_scores=keep_scores,
        end=end,
        every=every,
        begin=begin,
        drop_fraction=drop_fraction,
        overrides=overrides,
        gradient_step=gradient_step,
        min_fan_in=min_fan_in,
        grown=grown,
        seed=seed,
        needs_signal=False,
        after_drops=True,
    )
    check_numbers = method.check
    assert check_numbers is not None

    def check(layout: Layout, start: Layout) -> None:
        _link_prediction.check(layout)
        check_numbers(layout, start)

    method = method._replace(check=check, rewiring_flops=_link_prediction.flops)
    first = None
    if initial_sparsity is not None:
        final = _falling.needed(sparsity)
        first = _layout.at_start(initial_sparsity, final, "initial_sparsity")
        method = _with_falling_density(method, steps, min_fan_in, initial_masks)
    return _transform.sparse_transform(
        inner,
        sparsity,
        method,
        initial_masks=initial_masks,
        seed=seed,
        structure=structure,
        initial_sparsity=first,
    )


def _noise_of(delta: tuple[float, float] | None, steps: range) -> np.ndarray:
    """Returns what the noise is multiplied by at each rewiring, (1 - delta) / delta, in integers.

    Raises:
      ValueError: If delta is not two numbers in that range.
    """
    given = (0.5, 0.9) if delta is None else delta
    if not isinstance(given, tuple | list) or len(given) != 2:
        raise ValueError(f"delta={delta!r}: must be two numbers, at the first and last rewiring")
    first, last = (_numbers.real("delta", x) for x in given)
    least = 1 / (1 + _MOST_NOISE)
    if not (least < first <= 1 and least < last <= 1):
        raise ValueError(
            f"delta={delta!r}: must be above {least:.3f}, below which all is noise, and at most 1"
        )
    found = np.linspace(first, last, len(steps))
    return np.rint((1 - found) / found * (1 << _NOISE_BITS)).astype(np.int32)


def _keep_scores(
    removal: Removal, noise: np.ndarray | None, steps: range, seed: Seed
) -> _drop_and_grow.Scores:
    """Makes the scores of what is kept; noisy ones if there is noise for each rewiring."""

    def keep_scores(inputs: RewiringInputs) -> Arrays:
        if removal == "relative_importance":
            found = _relative_importance(inputs)
        elif noise is None:
            return _drop_and_grow.keep_by_magnitude(inputs)
        else:
            scores = _drop_and_grow.keep_by_magnitude(inputs)
            found = [_scores.log2_of_magnitude(s) for s in scores]
        if noise is None:
            return found
        index = jnp.clip((inputs.count - steps.start) // steps.step, 0, len(steps) - 1)
        factor = jnp.asarray(noise)[index]
        pairs = zip(found, _drawn(inputs, seed, _REMOVAL), strict=True)
        return [_noisy(log, random, factor) for log, random in pairs]

    return keep_scores


def _relative_importance(inputs: RewiringInputs) -> Arrays:
    """Scores what is active by its relative importance."""
    weights = [jnp.where(m, w, 0) for m, w in zip(inputs.masks, inputs.weights, strict=True)]
    return _link_prediction.by_graph(inputs, _link_prediction.relative_importance, weights)


def _drawn(inputs: RewiringInputs, seed: Seed, purpose: _random.Purpose) -> Arrays:
    positions = [leaf.position for leaf in inputs.leaves]
    drawn = _random.random_scores(seed, purpose, positions, inputs.packing, inputs.count)
    return [_sharding.like(x, mask) for x, mask in zip(drawn, inputs.masks, strict=True)]


def _noisy(log: jax.Array, random: jax.Array, factor: jax.Array) -> jax.Array:
    """Adds noise to logarithms of scores."""
    noise = _random.gumbel(random) * factor >> _NOISE_BITS
    return jnp.maximum(log + noise + _OFFSET, 0)


def _growth(score: jax.Array, random: jax.Array, soft: bool) -> jax.Array:
    """Returns scores of growth: where there is no path, random ones, below all others.

    Args:
      score: int32 of the link prediction, below 2**24; -1 for padding.
      random: int32 in [0, 2**31), which decides between equal scores.
      soft: Whether it also is the noise of a sample.
    """
    if soft:
        log = _scores.log2(jnp.maximum(score, 1)) + _random.gumbel(random) + _OFFSET
        found = (log << 8) | (random & 255)
    else:
        found = (score << 6) | (random & 63)
    found = jnp.where(score > 0, found + _LINK, random >> 1)
    return jnp.where(score < 0, jnp.int32(_top_k.EXCLUDED), found)


def _with_falling_density(
    method: Method, steps: range, min_fan_in: int, initial_masks: PyTree | None
) -> Method:
    """Returns the method that first prunes, to numbers that fall along a sigmoid."""
    active_at = _falling.sigmoid_active_counts(steps, _STEEPNESS)
    check_start, check_layers = _falling.check_start("layer", initial_masks), method.check

    def check(layout: Layout, start: Layout) -> None:
        check_start(layout, start)
        # The fewest weights are there in the end.
        if check_layers is not None:
            check_layers(layout, layout)

    def rule(inputs: RewiringInputs) -> Decision:
        pairs = zip(inputs.masks, _relative_importance(inputs), strict=True)
        scores = [jnp.where(m, s, jnp.int32(_top_k.EXCLUDED)) for m, s in pairs]
        if min_fan_in:
            scores = _min_fan_in.protected(scores, inputs.leaves, inputs.packing, min_fan_in)
        left = _falling.largest(inputs, scores, active_at(inputs), "layer")
        return method.rule(inputs._replace(masks=left))

    return method._replace(
        rule=rule,
        start=_falling.active_at_start,
        check=check,
        progress=_falling.sigmoid_progress(steps, _STEEPNESS),
        ablates=False,
    )
