"""Implements AC/DC, whose phases are dense and sparse in turns, and finds its dense model."""

import jax
import jax.numpy as jnp
import optax

from rigl_optax import _layout, _plan
from rigl_optax._ranking import _top_k
from rigl_optax._state import SparseState
from rigl_optax._structures import UNSTRUCTURED, Structures
from rigl_optax._types import PyTree, Seed, Sparsity
from rigl_optax._wrapper import _transform
from rigl_optax._wrapper._method import Decision, Method, RewiringInputs
from rigl_optax.methods import _drop_and_grow, _falling


def acdc(
    inner: optax.GradientTransformation,
    sparsity: Sparsity,
    *,
    end: int,
    every: int = 100,
    begin: int = 0,
    scope: _falling.Scope = "layer",
    keep_dense: bool = False,
    gradient_step: bool = False,
    structure: Structures = UNSTRUCTURED,
    seed: Seed = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""AC/DC: alternates between sparse and dense phases, and ends sparse.

    Use it if training may be dense half of the time, and a dense model is wanted too: the network
    of the last dense phase is one, and belongs to the sparse one. `gradual_magnitude_pruning`
    spends FLOPs alike and is never dense again; `rigl` is sparse throughout.

    Changes of phase are at $t_i = begin + i \cdot every$ while $t_i < end$, for $i = 0, 1, ...$.
    If their number is even the last is left out, so that training ends sparse. In each layer with
    N weights, of which n are to be active in the end,

    $$
    \begin{aligned}
    \text{i even (compression): } & \text{active} \leftarrow
        \text{the } n \text{ weights of largest } |\theta| \\
    \text{i odd (decompression): } & \text{active} \leftarrow \text{all } N,
        \text{ those that were inactive start at } 0
    \end{aligned}
    $$

    At a decompression the optimizer state of all weights starts anew, since momentum of the sparse
    phase is stale in the dense network; counters and with them schedules go on. At a compression
    weights that stay keep their state. In a sparse phase masks are fixed and gradients sparse.

    Args:
      inner: As in `rigl`.
      sparsity: Sparsity of the sparse phases, as in `rigl`.
      end: No change of phase at `count >= end`: leave time for a longer sparse phase at the end.
      every: Length of a phase in steps; some epochs.
      begin: Count of the first compression, and so the length of the dense warm-up in steps.
      scope: `layer` prunes each layer to its sparsity in the distribution; `global` ranks all
        layers together, and the distribution decides on the total only.
      keep_dense: Whether the state keeps the weights as they were before the last compression: the
        dense model, as `dense_model(opt_state)`. It takes the memory of one more copy of
        the parameters.
      gradient_step: As in `rigl`: whether a change of phase takes a gradient step too.
      structure: As in `rigl`.
      seed: As in `rigl`; nothing is drawn.

    Returns:
      A transformation whose state is a `SparseState`; at first all its masks are True.

    Raises:
      ValueError: As `rigl` does; if the scope is unknown.

    Examples:
      >>> import jax.numpy as jnp, optax, rigl_optax
      >>> params = {"kernel": jnp.arange(1.0, 9.0).reshape(4, 2)}
      >>> tx = rigl_optax.acdc(optax.sgd(0.1), 0.75, end=3, every=1, keep_dense=True)
      >>> state, active = tx.init(params), []
      >>> for _ in range(3):
      ...     updates, state = tx.update({"kernel": jnp.ones((4, 2))}, state, params)
      ...     params = optax.apply_updates(params, updates)
      ...     active.append(int(state.masks["kernel"].sum()))
      >>> active, rigl_optax.dense_model(state)["kernel"].shape
      ([2, 8, 2], (4, 2))

    References:
      Peste et al., [AC/DC: Alternating compressed/decompressed training of deep neural
      networks](https://arxiv.org/abs/2106.12379), 2021.
    """
    steps = _plan.rewiring_plan(begin=begin, end=end, every=every).default.schedule.steps()
    steps = steps[: len(steps) - 1 + len(steps) % 2]
    plan = _plan.rewiring_plan(begin=steps[0], end=steps[-1] + 1, every=every)
    _falling.check_scope(scope)

    def compresses(count: jax.Array) -> jax.Array:
        return (count - steps.start) // steps.step % 2 == 0

    def rule(inputs: RewiringInputs) -> Decision:
        scores = [_top_k.magnitude_scores(w) for w in inputs.weights]
        scores = _drop_and_grow.without_padding(scores, inputs.packing)
        sizes = jnp.asarray(inputs.packing.sizes())
        zeros = jnp.where(compresses(inputs.count), _falling.final_zeros(inputs), 0)
        return Decision(_falling.largest(inputs, scores, sizes - zeros, scope))

    def progress(count: int) -> float:
        changes = len(range(steps.start, min(count + 1, steps.stop), steps.step))
        return float(changes % 2)

    method = Method(
        plan,
        rule,
        replaces_step=not gradient_step,
        resets_state=lambda count: ~compresses(count),
        snapshot=(lambda count: count == steps[-1]) if keep_dense else None,
        check=_falling.check_start(scope, None),
        progress=progress,
        moves_between_layers=scope == "global",
    )
    return _transform.sparse_transform(
        inner,
        _falling.needed(sparsity),
        method,
        seed=seed,
        structure=structure,
        initial_sparsity=_layout.at_start(0.0, sparsity, "initial_sparsity"),
    )


def dense_model(opt_state: PyTree) -> PyTree:
    """Returns the weights of the last dense phase, which `acdc(keep_dense=True)` keeps.

    Until the last compression they are the weights at `init`. Statistics that are not parameters,
    as those of batch normalisation, are not among them: compute them anew, by forward passes.

    Args:
      opt_state: An optimizer state with a `SparseState` somewhere in it.

    Returns:
      A tree of the structure of params.

    Raises:
      ValueError: If not exactly one state in it keeps a dense model.
    """

    def is_state(node: object) -> bool:
        return isinstance(node, SparseState)

    states = [s for s in jax.tree.leaves(opt_state, is_leaf=is_state) if is_state(s)]
    kept = [s.memory.snapshot for s in states if jax.tree.leaves(s.memory.snapshot)]
    if len(kept) != 1:
        raise ValueError(
            f"opt_state: {len(kept)} of {len(states)} sparse states keep a dense model, must be "
            "one; acdc(keep_dense=True) makes such a state"
        )
    return kept[0]
