"""Whatever gives masks fits whatever takes them: the same weights are inactive in the end."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rigl_optax
from rigl_optax import accounting, analysis, condensed

PARAMS = {
    "gen": {"kernel": jnp.arange(1.0, 25).reshape(6, 4), "bias": jnp.ones(4)},
    "disc": {
        "in": {"kernel": jnp.arange(1.0, 33).reshape(4, 8)},
        "out": {"kernel": jnp.arange(1.0, 25).reshape(8, 3)},
    },
}
UNIFORM = rigl_optax.uniform(0.5)
SGD = optax.sgd(0.1)
TX = rigl_optax.static_sparse(SGD, UNIFORM)
LABELS = {"gen": "a", "disc": {"in": "b", "out": "c"}}
PARTITION = optax.partition({"a": TX, "b": TX, "c": SGD}, LABELS)
NESTED = optax.partition({"a": PARTITION, "b": SGD}, {"gen": "a", "disc": {"in": "a", "out": "b"}})


def exported():
    """By path, as arrays of NumPy, without those of dense leaves."""
    masks = {"gen/kernel": np.arange(24).reshape(6, 4) % 2 > 0, "disc": True, "gen/bias": None}
    return masks


GIVERS = {
    "a state": lambda: rigl_optax.get_masks(TX.init(PARAMS)),
    "a partition": lambda: rigl_optax.get_masks(PARTITION.init(PARAMS)),
    "a partition, with params": lambda: rigl_optax.get_masks(PARTITION.init(PARAMS), PARAMS),
    "a nested partition": lambda: rigl_optax.get_masks(NESTED.init(PARAMS)),
    "labels of subtrees": lambda: rigl_optax.get_masks(
        optax.partition({"a": TX, "b": TX}, {"gen": "a", "disc": "b"}).init(PARAMS)
    ),
    "masked": lambda: rigl_optax.get_masks(
        optax.masked(TX, {"gen": True, "disc": False}).init(PARAMS)
    ),
    "the masks of a state": lambda: (
        optax.masked(TX, {"gen": True, "disc": False}).init(PARAMS).inner_state.masks
    ),
    "saliency": lambda: rigl_optax.magnitude_masks(PARAMS, UNIFORM),
    "paths": exported,
}


def init_with(masks):
    tx = rigl_optax.rigl(SGD, None, end=10, initial_masks=masks)
    return rigl_optax.apply_masks(PARAMS, tx.init(PARAMS))


def condense_with(masks, condense):
    return condensed.densify(*condense(PARAMS, masks))


TAKERS = {
    "apply_masks": lambda masks: rigl_optax.apply_masks(PARAMS, masks),
    "initial_masks": init_with,
    "sparse_aware_init": lambda masks: rigl_optax.sparse_aware_init(PARAMS, masks),
    "lottery_ticket": lambda masks: rigl_optax.lottery_ticket(PARAMS, masks),
    "condense_csr": lambda masks: condense_with(masks, condensed.condense_csr),
    "condense": lambda masks: condense_with(
        masks, lambda p, m: condensed.condense(p, m, rigl_optax.Unstructured())
    ),
}


def named(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


@pytest.mark.parametrize("giver", GIVERS)
def test_masks_go_round(giver):
    masks = GIVERS[giver]()
    dense = {path: np.ones(x.shape, bool) for path, x in named(PARAMS).items()}
    expected = dense | {path: x for path, x in named(masks).items() if x.ndim}
    assert set(expected) == set(dense)
    assert not expected["gen/kernel"].all()
    for taker, take in TAKERS.items():
        result = named(take(masks))
        for path, mask in expected.items():
            np.testing.assert_array_equal(result[path] != 0, mask, err_msg=f"{taker}: {path}")
    sparse = rigl_optax.apply_masks(PARAMS, masks)
    rigl_optax.check(sparse, masks)
    with pytest.raises(ValueError, match="'gen/kernel' .12 of 12"):
        rigl_optax.check(PARAMS, masks)
    full = rigl_optax.get_masks(PARTITION.init(PARAMS), PARAMS)
    first, now = named(full)["disc/out/kernel"], expected["disc/out/kernel"]
    overlap = analysis.overlap(masks, full).layers["disc/out/kernel"]
    assert float(overlap) == pytest.approx((first & now).sum() / first.sum())
    again = analysis.explore(full, masks)
    np.testing.assert_array_equal(
        again["gen"]["kernel"], full["gen"]["kernel"] | expected["gen/kernel"]
    )
    new = named(analysis.grown(masks, full))
    np.testing.assert_array_equal(
        new["gen/kernel"], named(full)["gen/kernel"] & ~expected["gen/kernel"]
    )
    dead = analysis.dead_units(masks)["gen/kernel"]
    alive = expected["gen/kernel"]
    assert dead == ((~alive.any(1)).sum(), (~alive.any(0)).sum())
    cost = accounting.Cost({path: x.size for path, x in named(PARAMS).items()}, (), 0, ())
    active = sum(int(x.sum()) for x in expected.values())
    assert accounting.flops_of_masks(cost, masks) == pytest.approx(active)


def test_with_params_the_tree_is_theirs():
    for tx in (PARTITION, NESTED, optax.masked(TX, {"gen": True, "disc": False})):
        masks = rigl_optax.get_masks(tx.init(PARAMS), jax.eval_shape(lambda: PARAMS))
        assert jax.tree.structure(masks) == jax.tree.structure(PARAMS)
        for mask, param in zip(jax.tree.leaves(masks), jax.tree.leaves(PARAMS), strict=True):
            assert isinstance(mask, jax.Array) and mask.shape == param.shape and mask.dtype == bool
        assert bool(masks["disc"]["out"]["kernel"].all())


def test_masks_of_other_params():
    masks = GIVERS["labels of subtrees"]()
    for take in (rigl_optax.apply_masks, rigl_optax.check, rigl_optax.sparse_aware_init):
        with pytest.raises(ValueError, match="'disc/in/kernel', 'disc/out/kernel' have no param"):
            take({"gen": PARAMS["gen"]}, masks)
    with pytest.raises(ValueError, match="'gen/bias' has no mask"):
        rigl_optax.lottery_ticket(PARAMS, masks | {"gen": {"kernel": masks["gen"]["kernel"]}})
    with pytest.raises(ValueError, match="'gen' is False"):
        rigl_optax.apply_masks(PARAMS, {"gen": False, "disc": masks["disc"]})
    with pytest.raises(ValueError, match="two SparseStates cover 'disc/in/kernel'"):
        rigl_optax.get_masks((TX.init(PARAMS), TX.init(PARAMS)))


@pytest.mark.parametrize(
    "state",
    [
        lambda state: state._asdict(),
        lambda state: {"opt_state": [{}, state._asdict() | {"masks": {"0": jnp.ones((2, 2))}}]},
    ],
)
def test_a_state_that_was_restored_without_a_target(state):
    with pytest.raises(ValueError, match="restore it into tx.init"):
        rigl_optax.get_masks(state(TX.init(PARAMS)))


# ------------------------------------------------------------------------------------- the check


@pytest.mark.parametrize(
    "after",
    [optax.scale(0.5), optax.contrib.reduce_on_plateau(factor=0.5, patience=1)],
    ids=["scale", "reduce_on_plateau"],
)
def test_check_finds_what_comes_after(after):
    params = PARAMS["gen"]
    tx = optax.chain(rigl_optax.rigl(SGD, UNIFORM, end=30, drop_fraction=0.9, every=2), after)
    tx = optax.with_extra_args_support(tx)
    state = tx.init(params)
    params = rigl_optax.apply_masks(params, state)
    rigl_optax.check(params, state)
    update = jax.jit(tx.update)
    for i in range(9):
        grads = jax.tree.map(lambda p, i=i: jnp.cos(p + i), params)
        updates, state = update(grads, state, params, value=1.0)
        params = optax.apply_updates(params, updates)
    with pytest.raises(ValueError, match=r"'kernel' \(\d+ of 12\).*after the sparse one"):
        rigl_optax.check(params, state)
    rigl_optax.check(rigl_optax.apply_masks(params, state), state)


def test_check_counts_nan_and_is_not_for_jit():
    masks = {"kernel": jnp.eye(3, dtype=bool)}
    with pytest.raises(ValueError, match="6 of 6"):
        rigl_optax.check({"kernel": jnp.full((3, 3), jnp.nan)}, masks)
    with pytest.raises(TypeError, match="outside of jit"):
        jax.jit(lambda params: rigl_optax.check(params, masks))({"kernel": jnp.ones((3, 3))})
