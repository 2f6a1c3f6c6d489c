import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rigl_optax
from rigl_optax import analysis


def masks_of(seed, density=0.3):
    random = np.random.default_rng(seed)
    return {
        "a": {"kernel": random.random((12, 7)) < density, "bias": np.ones(7, bool)},
        "b": {"kernel": random.random((3, 3, 4, 5)) < density},
    }


@settings(max_examples=25)
@given(seed=st.integers(0, 1000), density=st.floats(0, 0.9))
def test_fractions_against_numpy(seed, density):
    before, after = masks_of(seed, density), masks_of(seed + 1, density)
    old = np.concatenate([before["a"]["kernel"].ravel(), before["b"]["kernel"].ravel()])
    new = np.concatenate([after["a"]["kernel"].ravel(), after["b"]["kernel"].ravel()])
    kept = (old & new).sum() / old.sum() if old.sum() else 1.0
    assert float(analysis.overlap(after, before).total) == pytest.approx(kept, abs=1e-6)
    assert float(analysis.churn(before, after).total) == pytest.approx(1 - kept, abs=1e-6)
    layer = analysis.churn(before, after).layers
    a_old, a_new = before["a"]["kernel"], after["a"]["kernel"]
    if a_old.sum():
        assert float(layer["a/kernel"]) == pytest.approx((a_old & ~a_new).sum() / a_old.sum())
    assert float(layer["a/bias"]) == 0
    grown = analysis.grown(before, after)
    np.testing.assert_array_equal(
        grown["b"]["kernel"], after["b"]["kernel"] & ~before["b"]["kernel"]
    )
    later = masks_of(seed + 2, density)
    last = np.concatenate([later["a"]["kernel"].ravel(), later["b"]["kernel"].ravel()])
    born = new & ~old
    expected = (born & last).sum() / born.sum() if born.sum() else 1.0
    assert float(analysis.survival(grown, later).total) == pytest.approx(expected, abs=1e-6)


def test_coverage_is_what_was_ever_active():
    explored = masks_of(0)
    union = masks_of(0)["a"]["kernel"]
    for seed in range(1, 4):
        explored = analysis.explore(explored, masks_of(seed))
        union = union | masks_of(seed)["a"]["kernel"]
    got = analysis.coverage(explored, masks_of(0))
    assert float(got.layers["a/kernel"]) == pytest.approx(union.mean())
    leaves = [np.asarray(explored["a"]["kernel"]), np.asarray(explored["b"]["kernel"])]
    assert float(got.total) == pytest.approx(
        sum(x.sum() for x in leaves) / sum(x.size for x in leaves)
    )


def test_trees_must_fit():
    with pytest.raises(ValueError, match="do not fit"):
        analysis.overlap(masks_of(0), {"a": np.ones(3, bool)})


def test_a_rigl_run():
    params = {"kernel": jnp.arange(200.0).reshape(20, 10) - 100}
    tx = rigl_optax.rigl(optax.sgd(0.1), 0.8, end=4, every=2, drop_fraction=lambda t: 0.5)
    state = tx.init(params)
    first = rigl_optax.get_masks(state)
    grads = {"kernel": jax.random.normal(jax.random.key(0), (20, 10))}
    _, state = tx.update(grads, state, rigl_optax.apply_masks(params, state))
    second = rigl_optax.get_masks(state)
    moved = int((first["kernel"] & ~second["kernel"]).sum())
    assert 0 < moved <= 20
    assert float(analysis.churn(first, second).total) == pytest.approx(moved / 40)
    explored = analysis.explore(first, second)
    assert float(analysis.coverage(explored, second).total) == pytest.approx((40 + moved) / 200)


def test_sharded_masks_are_not_gathered():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
    mask = {"kernel": jax.device_put(np.arange(128).reshape(16, 8) % 3 == 0, sharding)}
    text = analysis.churn.lower(mask, mask).compile().as_text()
    assert "all-gather" not in text
