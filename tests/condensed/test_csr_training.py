"""Condensed training of single weights is masked unstructured training: same masks and weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rigl_optax
from rigl_optax import Block, condensed
from rigl_optax.condensed import _csr_topology

STEPS = 300
PLAN = {"end": 200, "every": 20, "begin": 3, "seed": 4}
DROP = {"drop_fraction": rigl_optax.constant_drop_fraction(0.3)}
# Above and below the density at which gradients are computed one by one; a dense layer.
SPARSITY = rigl_optax.uniform(
    0.8, dense=lambda path, leaf: leaf.ndim < 2 or "head" in path, overrides={"b/": 0.98}
)
SHAPES = {"a": (22, 32), "b": (32, 40), "c": (40, 16), "head": (16, 4)}
METHODS = {
    "rigl": (rigl_optax.rigl, condensed.rigl),
    "set": (rigl_optax.sparse_evolutionary_training, condensed.sparse_evolutionary_training),
}
INNER = {
    "momentum": lambda: optax.chain(
        optax.add_decayed_weights(1e-3),
        optax.sgd(optax.cosine_decay_schedule(0.05, STEPS), momentum=0.9, nesterov=True),
    ),
    "adam": lambda: optax.adam(optax.cosine_decay_schedule(5e-3, STEPS)),
}
SINGLE = rigl_optax.Unstructured()
# "c" of blocks in one tree with single weights.
MIXED = {"c/": Block(2, 4)}


def random(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def first_params():
    params = {n: {"kernel": random(i, *s) / s[0] ** 0.5} for i, (n, s) in enumerate(SHAPES.items())}
    for name, shape in SHAPES.items():
        params[name]["bias"] = np.zeros(shape[1])
    return params


def network(params, x):
    # Units that are dead have gradients of exactly 0, among which only the index decides.
    for name in ("a", "b", "c"):
        x = jax.nn.relu(x @ params[name]["kernel"] + params[name]["bias"])
    return x @ params["head"]["kernel"] + params["head"]["bias"]


def loss(params, x, y):
    return jnp.mean((network(params, x) - y) ** 2)


def steps_of(tx, loss):
    """An ordinary and a rewiring step of a condensed transformation."""

    def ordinary(weights, state, *batch):
        _, grads = condensed.value_and_grad(loss)(weights, state.topologies, *batch)
        updates, state = tx.update(grads, state, weights)
        return optax.apply_updates(weights, updates), state

    def rewiring(weights, state, *batch):
        found = condensed.value_grad_and_scores(loss)(weights, state.topologies, *batch)
        return tx.rewire(*found[1:], state, weights)

    return ordinary, rewiring


@functools.cache
def both(optimizer, growth, structure_name):
    """Params and state of the masked run, weights and state of the condensed one, each step.

    In float64, or rounding would part them at near-ties; the inputs are those of both. Scores are
    looked at in several chunks.
    """
    structure = {"single": SINGLE, "mixed": MIXED}[structure_name]
    masked_of, condensed_of = METHODS[growth]
    with pytest.MonkeyPatch.context() as patch, jax.enable_x64(True):
        patch.setattr(_csr_topology, "AT_ONCE", 200)
        patch.setattr(_csr_topology, "_PIECE", 8)
        params = jax.tree.map(jnp.asarray, first_params())
        tx = masked_of(INNER[optimizer](), SPARSITY, structure=structure, **PLAN, **DROP)
        state = tx.init(params)
        params = rigl_optax.apply_masks(params, state)
        weights, topologies = condensed.condense(params, state.masks, structure)
        ctx = condensed_of(INNER[optimizer](), **PLAN, **DROP)
        cstate = ctx.init(weights, topologies)

        @jax.jit
        def step(params, state, x, y):
            updates, state = tx.update(jax.grad(loss)(params, x, y), state, params)
            return optax.apply_updates(params, updates), state

        ordinary, rewiring = map(jax.jit, steps_of(ctx, loss))
        teacher = jax.tree.map(lambda p: np.flip(p) * 1.5, first_params())
        answer = jax.jit(functools.partial(network, teacher))
        history = [jax.device_get((params, state, weights, cstate))]
        for t in range(STEPS):
            x = jnp.asarray(random(100 + t, 8, 22))
            y = answer(x)
            params, state = step(params, state, x, y)
            take = rewiring if ctx.is_rewiring_step(t) else ordinary
            weights, cstate = take(weights, cstate, x, y)
            history.append(jax.device_get((params, state, weights, cstate)))
        return history, float(loss(params, x, y)), float(loss(first_params(), x, y))


CASES = [
    ("momentum", "rigl", "single"),
    ("adam", "rigl", "single"),
    ("adam", "rigl", "mixed"),
    ("adam", "set", "mixed"),
]


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_equals_masked_training(case):
    history, after, before = both(*case)
    masks_of, densify = jax.jit(condensed.masks_of), jax.jit(condensed.densify)
    moved = dict.fromkeys("abc", 0)
    with jax.enable_x64(True):
        for t, (params, state, weights, cstate) in enumerate(history):
            if t % 20 not in (3, 4) and t < STEPS:  # before and after rewirings
                continue
            masks = masks_of(weights, cstate.topologies)
            jax.tree.map(np.testing.assert_array_equal, masks, state.masks)
            dense = densify(weights, cstate.topologies)
            for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(dense), strict=True):
                assert a.dtype == np.float64
                np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)
            assert int(state.rewirings) == int(cstate.rewirings)
            for name in moved:
                was = history[t - 1][1].masks[name]["kernel"] if t else state.masks[name]["kernel"]
                moved[name] += int((was & ~state.masks[name]["kernel"]).sum())
    assert int(cstate.rewirings) == 10 and int(cstate.count) == STEPS
    assert min(moved.values()) >= 10, moved
    assert after < 0.7 * before  # it learns
