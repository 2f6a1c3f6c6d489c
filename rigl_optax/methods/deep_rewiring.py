"""Implements DeepR: a weight that would change its sign is dropped, a random one grows."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rigl_optax import _layout, _numbers, _plan
from rigl_optax._ranking import _keep_and_grow, _packing, _random, _top_k
from rigl_optax._ranking._packing import Packing
from rigl_optax._structures import UNSTRUCTURED, Block, Structures
from rigl_optax._types import Arrays, PyTree, Seed, Sparsity
from rigl_optax._wrapper import _transform
from rigl_optax._wrapper._method import Decision, InitialMemory, Method, RewiringInputs, Shadow
from rigl_optax._xla import _blend, _sharding
from rigl_optax.methods import _drop_and_grow


def deep_rewiring(
    inner: optax.GradientTransformation,
    sparsity: Sparsity | None,
    *,
    learning_rate: float | optax.Schedule,
    l1: float = 1e-4,
    temperature: float = 0.0,
    end: int | None = None,
    every: int = 1,
    begin: int = 0,
    structure: Structures = UNSTRUCTURED,
    initial_masks: PyTree | None = None,
    seed: Seed = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Deep rewiring (DeepR): a random walk under a fixed number of connections.

    Use it if dense gradients cannot be had and masks should change at every step; at very high
    sparsity it was ahead of `sparse_evolutionary_training` here (docs/results.md).

    Every connection has a sign s that never changes, $\theta = s w$ with
    $w \ge 0$. For active connections, with learning rate $\eta$,

    $$
    \begin{aligned}
    w &\leftarrow s \, (\theta + \mathrm{inner}(\nabla_\theta L)) - \eta \alpha
        + \sqrt{2 \eta T} \, \nu, \qquad \nu \sim N(0, 1) \\
    w \le 0 &\Rightarrow \text{dormant; as many dormant ones, uniformly at random,
        become active at } 0
    \end{aligned}
    $$

    The number of active connections of a layer never changes. A connection that becomes active
    starts with an optimizer state at rest.

    Args:
      inner: As in `rigl`; the paper's is plain SGD.
      sparsity: As in `rigl`.
      learning_rate: $\eta$ of the penalty and the noise; give the learning rate of `inner`.
      l1: $\alpha$, the weight of the L1 penalty.
      temperature: T, the temperature of the noise; 0 for no noise.
      end: No rewiring at `count >= end`; None to rewire until training stops. After `end`,
        connections that reach 0 stay at 0 until their gradient brings them back.
      every: Steps between rewirings; 1 in the paper.
      begin: Count of the first rewiring.
      structure: `NM` or `ConstantFanIn()`, whose parts each grow as many as they lost; dynamic 2:4
        with `NM(2, 4)`. A block has no sign, and is refused.
      initial_masks: As in `rigl`.
      seed: Seeds the initial masks, the growth and the noise, in separate streams.

    Returns:
      A transformation whose state is a `SparseState` with `shadow`; `memory.second_masks` is True
      where the sign is positive: the sign of the weight at init.

    Raises:
      ValueError: As `rigl` does; if `l1` or `temperature` is below 0; if a layer is in blocks.

    Examples:
      >>> import jax.numpy as jnp, optax, rigl_optax
      >>> tx = rigl_optax.deep_rewiring(optax.sgd(0.1), 0.9, learning_rate=0.1, temperature=1e-5)
      >>> int(rigl_optax.get_masks(tx.init({"kernel": jnp.ones((10, 10))}))["kernel"].sum())
      10

    References:
      Bellec et al., [Deep rewiring: training very sparse deep
      networks](https://arxiv.org/abs/1711.05136), 2018, algorithm 1.
    """
    l1, temperature = _numbers.real("l1", l1), _numbers.real("temperature", temperature)
    for name, value in (("l1", l1), ("temperature", temperature)):
        if not value >= 0:
            raise ValueError(f"{name}={value}: must be at least 0")
    rate = learning_rate if callable(learning_rate) else optax.constant_schedule(learning_rate)
    random_scores = _drop_and_grow.grow_at_random(seed)

    def start(layout: _layout.Layout, packing: Packing, masks: Arrays) -> InitialMemory:
        positions = [leaf.position for leaf in layout.sparse]
        drawn = _random.random_scores(seed, _random.Purpose.SIGN, positions, packing)
        # The lowest bit of a random score.
        signs = [s & 1 == 1 for s in packing.unpack(drawn)]
        # Weights that are 0 get a random sign; so do shapes, which have no values.
        for i, leaf in enumerate(layout.sparse):
            if not isinstance(value := layout.leaves[leaf.position], jax.ShapeDtypeStruct):
                weight = jnp.asarray(value)
                is_zero, is_positive = leaf.groups(weight == 0), leaf.groups(weight > 0)
                signs[i] = jnp.where(is_zero, _sharding.like(signs[i], is_zero), is_positive)
        return InitialMemory(signs, ())

    def backward(inputs: RewiringInputs) -> Arrays:
        return [_blend.masked(m, g) for m, g in zip(inputs.masks, inputs.gradients, strict=True)]

    def settle(inputs: RewiringInputs, moved: Arrays) -> tuple[Arrays, PyTree]:
        eta = jnp.asarray(rate(inputs.count), jnp.float32)
        noise: list[jax.Array | float] = [0.0] * len(moved)
        if temperature:  # a number of Python: without noise nothing is drawn
            packing = _packing.packing([x.shape for x in moved], [x.stacked for x in inputs.leaves])
            positions = [leaf.position for leaf in inputs.leaves]
            purpose = _random.Purpose.NOISE
            scores = _random.random_scores(seed, purpose, positions, packing, inputs.count)
            scale = jnp.sqrt(2 * eta * jnp.float32(temperature))
            drawn = zip(packing.unpack(scores), moved, strict=True)
            noise = [scale * _random.normal(_sharding.like(s, x)) for s, x in drawn]
        settled = []
        for weight, mask, sign, nu in zip(
            moved, inputs.masks, inputs.second_masks, noise, strict=True
        ):
            # In float32 whatever the weights are: rounded once, at the end.
            direction = jnp.where(sign, jnp.float32(1), jnp.float32(-1))
            size = direction * weight.astype(jnp.float32) - eta * jnp.float32(l1) + nu
            shown = direction * jnp.maximum(size, 0)
            settled.append(_blend.masked(mask, shown.astype(weight.dtype)))
        return settled, inputs.numbers

    def forward(shadow: Arrays, masks: Arrays, numbers: PyTree) -> Arrays:
        del numbers
        return [_blend.masked(m, w) for m, w in zip(masks, shadow, strict=True)]

    def rule(inputs: RewiringInputs) -> Decision:
        ranking_ids = inputs.packing.ranking_ids
        excluded = jnp.int32(_top_k.EXCLUDED)
        # `settle` sets a weight to 0 if it would change its sign.
        stays = [m & (w != 0) for m, w in zip(inputs.masks, inputs.weights, strict=True)]
        keep, active = (_top_k.counts_for(inputs.packing, m) for m in (stays, inputs.masks))
        grow = jax.tree.map(jnp.subtract, active, keep)
        scores = [jnp.where(s, jnp.int32(0), excluded) for s in stays]
        return Decision(
            _keep_and_grow.keep_and_grow(scores, random_scores(inputs), ranking_ids, keep, grow)
        )

    def check(layout: _layout.Layout, start: _layout.Layout) -> None:
        del start
        for leaf in layout.sparse:
            if isinstance(leaf.structure, Block):
                raise ValueError(
                    f"structure: {leaf.path!r} has {leaf.structure}, which has no sign that could "
                    "change; give NM(n, m), ConstantFanIn() or no structure"
                )

    last = int(np.iinfo(np.int32).max) if end is None else end
    method = Method(
        _plan.rewiring_plan(begin=begin, end=last, every=every),
        rule,
        start=start,
        shadow=Shadow(backward, settle, forward, resets=True),
        check=check,
    )
    return _transform.sparse_transform(
        inner, sparsity, method, initial_masks=initial_masks, seed=seed, structure=structure
    )
