"""n:m masks that are valid for the transposed kernel too: the best of all, and kept so."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import rigl_optax
from rigl_optax import NM
from rigl_optax._ranking import _top_k

BOTH = NM(2, 4, transposable=True)
HALF = rigl_optax.uniform(0.5)
SHAPES = {"a": (16, 24), "conv": (3, 1, 8, 12), "bias": (12,)}


def is_transposable(mask, n=2, m=4):
    inputs, outputs = mask.shape[-2:]
    squares = mask.reshape(*mask.shape[:-2], inputs // m, m, outputs // m, m)
    return (squares.sum(-3) == n).all() and (squares.sum(-1) == n).all()


def some_tree(seed, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    return {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}


@functools.cache
def all_masks(n, m):
    every = np.array(list(itertools.product([False, True], repeat=m * m))).reshape(-1, m, m)
    return every[(every.sum(1) == n).all(1) & (every.sum(2) == n).all(1)]


@pytest.mark.parametrize(
    ("n", "m", "number"), [(1, 4, 24), (2, 4, 90), (3, 4, 24), (1, 2, 2), (2, 3, 6)]
)
def test_the_best_of_all_masks_is_chosen(n, m, number):
    masks = all_masks(n, m)
    assert len(masks) == number
    structure = NM(n, m, transposable=True)
    x = np.random.default_rng(0).standard_normal((5 * m, 7 * m)).astype(np.float32)
    x[:m, :m] = 0  # all sums are equal: any mask
    choose = jax.jit(lambda x: structure.choose(_top_k.magnitude_scores(structure.pool(x))))
    chosen = np.asarray(structure.expand(choose(x), x.shape))
    assert is_transposable(chosen, n, m)
    for i, j in itertools.product(range(5), range(7)):
        square = np.abs(x[m * i : m * i + m, m * j : m * j + m].astype(np.float64))
        sums = (masks * square).sum((1, 2))
        own = square[chosen[m * i : m * i + m, m * j : m * j + m]].sum()
        assert own >= sums.max() - m * n * square.max() * 2.0**-19


@functools.cache
def run(distribution=HALF, mesh=None):
    tx = rigl_optax.dnw(optax.sgd(0.3), distribution, decay=2e-4, structure=BOTH)
    params = some_tree(0)
    if mesh is not None:
        specs = {"a": ("x", "y"), "conv": (None, None, "x", "y"), "bias": ("y",)}
        params = {
            n: jax.device_put(p, NamedSharding(mesh, PartitionSpec(*specs[n])))
            for n, p in params.items()
        }
    state = jax.jit(tx.init)(params)
    params = rigl_optax.apply_masks(params, state)
    update = jax.jit(tx.update)
    history = [jax.device_get((params, state))]
    for t in range(5):
        grads = some_tree(100 + t)
        if mesh is not None:
            grads = {n: jax.device_put(g, params[n].sharding) for n, g in grads.items()}
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        history.append(jax.device_get((params, state)))
    return history


def test_training_keeps_masks_transposable_and_of_largest_shadows():
    history = run()
    for t, (params, state) in enumerate(history):
        for n in ("a", "conv"):
            mask = state.masks[n]
            assert is_transposable(mask) and not params[n][~mask].any()
            if t:
                shadow = np.abs(state.shadow[n]).astype(np.float64)
                plane = shadow.reshape(-1, *shadow.shape[-2:])[0]
                own = mask.reshape(-1, *mask.shape[-2:])[0]
                best = (all_masks(2, 4) * plane[:4, :4]).sum((1, 2)).max()
                np.testing.assert_allclose(plane[:4, :4][own[:4, :4]].sum(), best, rtol=1e-4)
    first, last = history[0][1].masks, history[-1][1].masks
    assert all((first[n] != last[n]).any() for n in ("a", "conv"))


@pytest.mark.parametrize("axes", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_the_same_on_eight_devices(axes):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axes,) * 2)
    with jax.set_mesh(mesh):
        eight = run(mesh=mesh)
    for (_, one), (_, other) in zip(run(), eight, strict=True):
        jax.tree.map(np.testing.assert_array_equal, one.masks, other.masks)


def test_masks_are_drawn_and_given_so():
    tx = rigl_optax.static_sparse(optax.sgd(0.1), HALF, structure=BOTH)
    masks = tx.init(some_tree(0)).masks
    assert is_transposable(np.asarray(masks["a"])) and is_transposable(np.asarray(masks["conv"]))
    stacked = rigl_optax.uniform(0.5, stacked=("a",))
    stack = rigl_optax.dnw(optax.sgd(0.1), stacked, structure=BOTH).init({"a": jnp.ones((3, 8, 8))})
    assert is_transposable(np.asarray(stack.masks["a"]))
    assert (np.asarray(stack.masks["a"][0]) != np.asarray(stack.masks["a"][1])).any()
    keys = {"structure": BOTH, "initial_masks": masks}
    found = rigl_optax.dnw(optax.sgd(0.1), None, **keys).init(some_tree(0)).masks
    jax.tree.map(np.testing.assert_array_equal, found, masks)
    alone = rigl_optax.static_sparse(optax.sgd(0.1), HALF, structure=NM(2, 4)).init(some_tree(0))
    with pytest.raises(ValueError, match="'a' does not fit NM.*groups of 4 outputs have not 2"):
        rigl_optax.dnw(optax.sgd(0.1), HALF, structure=BOTH, initial_masks=alone.masks).init(
            some_tree(0)
        )


def test_what_cannot_be_so_is_refused():
    with pytest.raises(ValueError, match="m must be at most 4"):
        NM(4, 8, transposable=True)
    with pytest.raises(TypeError, match="transposable=1: must be True or False"):
        NM(2, 4, transposable=1)
    with pytest.raises(ValueError, match="4 does not divide the 6 outputs of 'a'"):
        rigl_optax.dnw(optax.sgd(0.1), HALF, structure=BOTH).init({"a": jnp.ones((8, 6))})
    for make in (rigl_optax.rigl, rigl_optax.sparse_evolutionary_training, rigl_optax.cht):
        with pytest.raises(ValueError, match="this method ranks each 4 inputs alone; dnw and"):
            make(optax.sgd(0.1), HALF, end=9, structure=BOTH)
