"""Implements DNW and Top-KAST, whose inactive weights go on learning as shadow weights."""

import jax.numpy as jnp
import numpy as np
import optax

from rigl_optax import _layout, _numbers, _plan
from rigl_optax._ranking import _random, _top_k
from rigl_optax._ranking._packing import Packing
from rigl_optax._structures import UNSTRUCTURED, Structures
from rigl_optax._types import Arrays, PyTree, Seed, Sparsity
from rigl_optax._wrapper import _transform
from rigl_optax._wrapper._method import Decision, InitialMemory, Method, RewiringInputs, Shadow
from rigl_optax._xla import _blend


def dnw(
    inner: optax.GradientTransformation,
    sparsity: Sparsity | None,
    *,
    decay: float = 0.0,
    end: int | None = None,
    every: int = 1,
    begin: int = 0,
    structure: Structures = UNSTRUCTURED,
    initial_masks: PyTree | None = None,
    seed: Seed = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Discovering neural wirings (DNW): all weights learn, the largest of each layer are active.

    Use it if only the forward pass has to be sparse: it is among the most accurate methods here
    (docs/results.md), at the memory and the backward pass of a dense network. `top_kast` needs
    fewer gradients.

    With shadow weights $w$ and the weights $\theta$ of the forward pass,

    $$
    \begin{aligned}
    g_i &= \nabla_{\theta_i} L(\theta_t) + \lambda w_{t,i} \, [\theta_{t,i} \text{ inactive}] \\
    w_{t+1} &= w_t + \mathrm{inner}(g) \\
    \theta_{t+1} &= w_{t+1} \odot [\,|w_{t+1}| \text{ among the } n_l
        \text{ largest of its layer}\,]
    \end{aligned}
    $$

    The gradient with respect to $\theta$ moves all shadow weights, so gradient, optimizer
    state and shadow are dense at every step. The masks before the first step are random, or given.

    With `structure=NM(2, 4)` this is training by a straight-through estimator; with a `decay` it is
    SR-STE, which pulls the weights that do not show towards 0, so that masks settle. With
    `NM(2, 4, transposable=True)` the masks are valid for the transposed kernel too, so that both
    passes can be accelerated (Hubara et al., [Accelerated sparse neural
    training](https://arxiv.org/abs/2102.08124), 2021).

    Args:
      inner: As in `rigl`; it moves the shadow weights, and its weight decay acts on them.
      sparsity: As in `rigl`.
      decay: $\lambda$, at least 0: of a penalty $\lambda w^2 / 2$ of inactive weights. It is
        added to the gradient, so adaptive optimizers rescale it. SR-STE's is 2e-4, with SGD.
      end: The masks stay as they are at `count >= end`; None to renew them until training stops.
      every: Steps between renewals; 1 in the paper.
      begin: Count of the first renewal.
      structure: As in `rigl`.
      initial_masks: As in `rigl`; `magnitude_masks(params, s)` gives those of the largest weights.
      seed: As in `rigl`.

    Returns:
      A transformation whose state is a `SparseState` with `shadow`. A renewal does not
      replace the gradient step: it follows it.

    Raises:
      ValueError: As `rigl` does; if `decay` is below 0 or not finite.

    Examples:
      >>> import jax.numpy as jnp, optax, rigl_optax
      >>> params = {"kernel": jnp.arange(1.0, 9.0).reshape(4, 2)}
      >>> tx = rigl_optax.dnw(optax.sgd(0.1), 0.5)
      >>> updates, _ = tx.update({"kernel": jnp.ones((4, 2))}, tx.init(params), params)
      >>> (optax.apply_updates(params, updates)["kernel"] != 0).sum(1).tolist()
      [0, 0, 2, 2]

    References:
      Wortsman, Farhadi and Rastegari, [Discovering neural
      wirings](https://arxiv.org/abs/1906.00586), 2019; `decay`: Zhou et al., [Learning N:M
      fine-grained structured sparse neural networks from
      scratch](https://arxiv.org/abs/2102.04010), 2021.
    """
    decay = _numbers.real("decay", decay)
    if not 0 <= decay < float("inf"):
        raise ValueError(f"decay={decay}: must be a finite number of at least 0")

    def backward(inputs: RewiringInputs) -> Arrays:
        if not decay:
            return inputs.gradients
        decayed = []
        for gradient, w, mask in zip(inputs.gradients, inputs.weights, inputs.masks, strict=True):
            # The penalty is float32 whatever the weights are; the sum has the gradient's dtype.
            pull = _blend.masked(~mask, jnp.float32(decay) * w.astype(jnp.float32))
            decayed.append(gradient + pull.astype(gradient.dtype))
        return decayed

    def rule(inputs: RewiringInputs) -> Decision:
        scores = [_top_k.magnitude_scores(w) for w in inputs.weights]
        is_square = [leaf.structure.transposable and leaf.zeros != 0 for leaf in inputs.leaves]
        masks = scores
        if not all(is_square):
            number = _top_k.counts_for(inputs.packing, inputs.masks)
            masks = _top_k.top_k(scores, inputs.packing.ranking_ids, number)
        if any(is_square):  # then leaves are not packed
            each = zip(inputs.leaves, is_square, masks, scores, strict=True)
            masks = [leaf.choose(s) if square else m for leaf, square, m, s in each]
        return Decision(masks)

    method = Method(
        _plan.rewiring_plan(begin=begin, end=_last(end), every=every),
        rule,
        shadow=Shadow(backward, settled, shown),
        transposes=True,
    )
    return _transform.sparse_transform(
        inner, sparsity, method, initial_masks=initial_masks, seed=seed, structure=structure
    )


def top_kast(
    inner: optax.GradientTransformation,
    sparsity: Sparsity,
    *,
    backward_sparsity: Sparsity,
    end: int | None = None,
    every: int = 100,
    begin: int = 0,
    exploration: float = 1e-4,
    structure: Structures = UNSTRUCTURED,
    initial_masks: PyTree | None = None,
    seed: Seed = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Top-KAST: a sparse forward pass, and a larger but sparse set of weights that learn.

    Use it if neither the forward nor the backward pass may be dense: gradients are needed in the
    backward set only. It is less accurate than `dnw`, which needs all gradients.

    With shadow weights w, the $n_l$ largest of each layer form the forward set A, and the
    $m_l \ge n_l$ largest the backward set B; D is the density of A in the layer.

    $$
    \begin{aligned}
    g_i &= \begin{cases}
        \nabla_{\theta_i} L + \lambda w_i & i \in A \\
        \nabla_{\theta_i} L + \lambda w_i / D & i \in B \setminus A \\
        0 & \text{else} \end{cases} \\
    w_{t+1} &= w_t + \mathrm{inner}(g), \qquad \theta = w \odot [i \in A]
    \end{aligned}
    $$

    Both sets are renewed every `every` steps, after the gradient step. Weights in B but not in A
    decay faster.

    Args:
      inner: As in `rigl`; it moves the shadow weights.
      sparsity: Sparsity of the forward set, as in `rigl`.
      backward_sparsity: Sparsity of the backward set, at most `sparsity`: a number, laid out as
        `sparsity` is, or a distribution.
      end: The sets stay as they are at `count >= end`; None to renew them until training stops.
      every: Steps between renewals; the paper sees no loss at 100.
      begin: Count of the first renewal.
      exploration: $\lambda$, of a penalty $\lambda w^2 / 2$ in the loss.
      structure: As in `rigl`.
      initial_masks: The forward set at the start, as in `rigl`.
      seed: As in `rigl`.

    Returns:
      A transformation whose state is a `SparseState` with `shadow`; `memory.second_masks` is B.

    Raises:
      ValueError: As `rigl` does; if `backward_sparsity` is above `sparsity`, or
        `exploration` below 0.

    Examples:
      >>> import jax.numpy as jnp, optax, rigl_optax
      >>> tx = rigl_optax.top_kast(optax.sgd(0.1), 0.9, backward_sparsity=0.5)
      >>> state = tx.init({"kernel": jnp.ones((10, 10))})
      >>> int(state.masks["kernel"].sum()), int(state.memory.second_masks["kernel"].sum())
      (10, 50)

    References:
      Jayakumar et al., [Top-KAST: Top-K always sparse training](https://arxiv.org/abs/2106.03517),
      2020.
    """
    exploration = _numbers.real("exploration", exploration)
    if not exploration >= 0:
        raise ValueError(f"exploration={exploration}: must be at least 0")
    if sparsity is None:
        raise ValueError("sparsity=None: top_kast needs a number in [0, 1) or a distribution")
    wider = _layout.at_start(backward_sparsity, sparsity, "backward_sparsity")

    def backward_layout(layout: _layout.Layout) -> _layout.Layout:
        params = layout.treedef.unflatten(layout.leaves)
        wider_layout = _layout.layout(params, wider, masked=False, structure=structure)
        _layout.check_same_leaves(layout, wider_layout)
        return wider_layout

    def start(layout: _layout.Layout, packing: Packing, masks: Arrays) -> InitialMemory:
        backward = backward_layout(layout)
        zeros = np.repeat([leaf.zeros for leaf in backward.sparse], packing.rankings_per_leaf)
        scores = _random.random_scores(
            seed,
            _random.Purpose.INITIAL_MASK,
            [leaf.position for leaf in layout.sparse],
            packing,
        )
        active = packing.pack(masks, False)
        # The forward set comes first, so that the backward set contains it.
        first = jnp.int32(np.iinfo(np.int32).max)
        scores = [jnp.where(m, first, s) for m, s in zip(active, scores, strict=True)]
        k = jnp.asarray(packing.sizes() - zeros.astype(np.int32))
        k = jnp.maximum(k, _top_k.counts(active, packing.ranking_ids))
        marks = packing.unpack(_top_k.top_k(scores, packing.ranking_ids, packing.per_row(k)))
        sizes = jnp.asarray(packing.sizes(), jnp.float32)
        return InitialMemory(marks, _top_k.counts(active, packing.ranking_ids) / sizes)

    def backward(inputs: RewiringInputs) -> Arrays:
        numbers = [leaf.rankings for leaf in inputs.leaves]
        # The density of A at the start: the number of active weights never changes.
        densities = jnp.split(inputs.numbers, np.cumsum(numbers)[:-1])
        gradients = []
        for i, gradient in enumerate(inputs.gradients):
            shadow, mask, mark = inputs.weights[i], inputs.masks[i], inputs.second_masks[i]
            # Parts of a layer have densities of their own; D is that of the whole layer.
            of_layers = densities[i].reshape(inputs.leaves[i].layers, -1).mean(1)
            density = of_layers.reshape(-1, *(1,) * (gradient.ndim - 1))
            if gradient.ndim == 0 or not inputs.leaves[i].stacked:
                density = of_layers.reshape((1,) * gradient.ndim)
            penalty = jnp.float32(exploration) * jnp.where(mask, 1, 1 / density)
            # The penalty is float32 whatever the weights are; the sum has the gradient's dtype.
            total = gradient + (penalty * shadow.astype(jnp.float32)).astype(gradient.dtype)
            gradients.append(_blend.masked(mark, total))
        return gradients

    def rule(inputs: RewiringInputs) -> Decision:
        packing = inputs.packing
        scores = [_top_k.magnitude_scores(w) for w in inputs.weights]
        # Both searches rank the same scores, so the backward set contains the forward set.
        masks, marks = (
            _top_k.top_k(scores, packing.ranking_ids, _top_k.counts_for(packing, current))
            for current in (inputs.masks, inputs.second_masks)
        )
        return Decision(masks, marks)

    method = Method(
        _plan.rewiring_plan(begin=begin, end=_last(end), every=every),
        rule,
        start=start,
        shadow=Shadow(backward, settled, shown),
        wider=backward_layout,
    )
    return _transform.sparse_transform(
        inner, sparsity, method, initial_masks=initial_masks, seed=seed, structure=structure
    )


def settled(inputs: RewiringInputs, moved: Arrays) -> tuple[Arrays, PyTree]:
    """Stores the shadow as it was moved; for `Shadow.settle`."""
    return moved, inputs.numbers


def shown(shadow: Arrays, masks: Arrays, numbers: PyTree) -> Arrays:
    """Shows the active weights as they are; for `Shadow.forward`."""
    del numbers
    return [_blend.masked(m, w) for m, w in zip(masks, shadow, strict=True)]


def _last(end: int | None) -> int:
    return int(np.iinfo(np.int32).max) if end is None else end
