"""What every method promises, whatever the numbers are: exact zeros, exact counts."""

import functools

import hypothesis
import jax
import numpy as np
import optax
import pytest
from hypothesis import strategies as st

import rigl_optax

TREES = {
    "layers": {"a": (17, 12), "b": (3, 3, 4, 6), "c": (12, 5), "bias": (5,)},
    "odd": {"a": (1, 7), "b": (31, 3), "c": (2, 2, 1, 9)},
}
STEPS = 8
PLAN = {"end": 7, "every": 2, "begin": 1}
ERK = rigl_optax.erk(0.6)
MATRICES = rigl_optax.erk(0.6, dense=lambda path, leaf: len(leaf.shape) != 2)


def sgd():
    return optax.sgd(0.05, momentum=0.9)


CASES = {
    "static": lambda: rigl_optax.static_sparse(sgd(), ERK),
    "set": lambda: rigl_optax.sparse_evolutionary_training(sgd(), ERK, **PLAN),
    "mest": lambda: rigl_optax.mest(sgd(), ERK, gradient_weight=0.3, **PLAN),
    "mest_soft": lambda: rigl_optax.mest(sgd(), ERK, soft=True, **PLAN),
    "cht": lambda: rigl_optax.cht(sgd(), MATRICES, removal="relative_importance", **PLAN),
    "cht_soft": lambda: rigl_optax.cht(sgd(), MATRICES, soft=True, **PLAN),
    "snfs": lambda: rigl_optax.sparse_momentum(sgd(), ERK, **PLAN),
    "snfs_redistribute": lambda: rigl_optax.sparse_momentum(sgd(), ERK, redistribute=True, **PLAN),
    "dsr": lambda: rigl_optax.dynamic_sparse_reparameterization(sgd(), ERK, **PLAN),
    "rigl": lambda: rigl_optax.rigl(sgd(), ERK, **PLAN),
    "rigl_accumulate": lambda: rigl_optax.rigl(sgd(), ERK, accumulate=2, **PLAN),
    "rigl_candidates": lambda: rigl_optax.rigl(sgd(), ERK, candidates=0.2, **PLAN),
    "gmp": lambda: rigl_optax.gradual_magnitude_pruning(sgd(), ERK, **PLAN),
    "gmp_global": lambda: rigl_optax.gradual_magnitude_pruning(sgd(), ERK, scope="global", **PLAN),
    "spdf": lambda: rigl_optax.spdf(sgd(), ERK, dense_from=3),
    "acdc": lambda: rigl_optax.acdc(sgd(), ERK, keep_dense=True, **PLAN),
    "iht": lambda: rigl_optax.iterative_hard_thresholding(sgd(), ERK, end=5, begin=1),
    "granet": lambda: rigl_optax.granet(sgd(), ERK, **PLAN),
    "top_kast": lambda: rigl_optax.top_kast(sgd(), ERK, backward_sparsity=0.3, every=2),
    "dnw": lambda: rigl_optax.dnw(sgd(), ERK),
    "deepr": lambda: rigl_optax.deep_rewiring(sgd(), ERK, learning_rate=0.05),
    "str": lambda: rigl_optax.soft_thresholding(sgd(), threshold_decay=0.1),
}
IN_TOTAL = {"snfs_redistribute", "dsr"}
FALLING = {"gmp", "gmp_global", "granet", "iht", "acdc", "mest_soft"}
LEARNED = {"str"}


@functools.cache
def compiled(name, tree):
    """The method, and its update compiled once for all examples."""
    tx = CASES[name]()
    return tx, jax.jit(tx.update), jax.jit(tx.init)


@st.composite
def numbers(draw):
    """A function from a shape to float32 values: ordinary, equal, none, tiny, huge, denormal."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["normal", "ties", "zeros", "tiny", "huge", "denormal", "few"]))
    scale = {"tiny": 1e-30, "huge": 1e25, "denormal": 1e-41}.get(kind, 1.0)

    def values(shape):
        x = rng.standard_normal(shape)
        if kind == "ties":
            x = np.round(x)
        if kind == "few":
            x = x * (rng.random(shape) < 0.05)
        return (x * (kind != "zeros") * scale).astype(np.float32)

    return values


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("name", CASES)
@hypothesis.settings(max_examples=8)
@hypothesis.given(weights=numbers(), gradients=numbers())
def test_zeros_and_counts_are_exact(name, tree, weights, gradients):
    shapes = TREES[tree]
    tx, update, init = compiled(name, tree)
    params = {n: weights(s) for n, s in shapes.items()}
    state = init(params)
    params = rigl_optax.apply_masks(params, state)
    counts = []
    for _ in range(STEPS):
        updates, state = update({n: gradients(s) for n, s in shapes.items()}, state, params)
        params = jax.device_get(optax.apply_updates(params, updates))
        masks = jax.device_get(state.masks)
        for n, shape in shapes.items():
            assert masks[n].dtype == bool and masks[n].shape == shape
            assert np.isfinite(params[n]).all()
            assert (params[n][~masks[n]] == 0).all()
        assert "bias" not in shapes or masks["bias"].all()
        counts.append([int(m.sum()) for m in masks.values()])
    totals = [sum(c) for c in counts]
    if name == "spdf":
        assert len(set(totals[:3])) == 1
        assert set(totals[3:]) == {sum(int(np.prod(s)) for s in shapes.values())}
    elif name in FALLING:
        if name not in ("acdc", "mest_soft"):  # more in between
            assert totals == sorted(totals, reverse=True)
        target = {n: int(s * np.prod(shapes[n])) for n, s in ERK(params).items()}
        wanted = sum(int(np.prod(s)) - target.get(n, 0) for n, s in shapes.items())
        assert totals[-1] == wanted
    elif name in IN_TOTAL:
        assert len(set(totals)) == 1
    elif name not in LEARNED:
        assert len(set(map(tuple, counts))) == 1
