import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.sparse
from hypothesis import given
from hypothesis import strategies as st

import rigl_optax
from rigl_optax.accounting import storage


@given(
    rows=st.integers(1, 20),
    columns=st.integers(1, 20),
    density=st.floats(0, 1),
    dtype=st.sampled_from([np.float32, np.float64]),
)
def test_formats_against_scipy_and_numpy(rows, columns, density, dtype):
    mask = np.random.default_rng(0).random((rows, columns)) < density
    got = storage.leaf_bytes((rows, columns), dtype, int(mask.sum()))
    csr = scipy.sparse.csr_array(mask.astype(dtype))
    assert got.dense == mask.astype(dtype).nbytes
    assert got.csr == csr.data.nbytes + csr.indices.nbytes + csr.indptr.nbytes
    assert got.masks == np.packbits(mask).nbytes
    assert got.values_and_bitmask == csr.data.nbytes + got.masks
    assert got.condensed >= csr.data.nbytes + csr.indices.nbytes


def test_condensed_holds_the_mean_fan_in():
    got = storage.leaf_bytes((3, 3, 16, 32), "bfloat16", 100)
    assert got.condensed == 32 * 4 * (2 + 4)  # 100 / 32, rounded up, values and indices


def test_kernels_are_matrices_by_their_last_axis():
    assert storage.leaf_bytes((3, 3, 16, 32), "float32", 0).csr == (9 * 16 + 1) * 4


def test_scalars_and_empty_leaves():
    assert storage.leaf_bytes((), "float32", 1).dense == 4
    assert storage.leaf_bytes((0, 4), "float32", 0).condensed == 0
    assert storage.leaf_bytes((4, 0), "float32", 0).csr == 4
    with pytest.raises(ValueError, match="has 12 weights"):
        storage.leaf_bytes((3, 4), "float32", 13)


PARAMS = {"kernel": jnp.ones((100, 50)), "bias": jnp.ones(50)}


def test_totals_keep_dense_leaves_as_they_are():
    got = storage.storage_bytes(PARAMS, {"kernel": 0.9})
    assert got.dense == 20_000 + 200
    assert got.values_and_bitmask == 2_000 + 625 + 200
    assert got.csr == 4_000 + 404 + 200
    assert got.condensed == 4_000 + 200
    assert got.masks == 625
    with pytest.raises(ValueError, match="no leaf 'karnel'"):
        storage.storage_bytes(PARAMS, {"karnel": 0.9})


@pytest.mark.parametrize(
    "tx",
    [optax.sgd(0.1, momentum=0.9), optax.adam(0.1), optax.noisy_sgd(0.1, key=jax.random.key(0))],
)
def test_optimizer_bytes_are_those_of_its_state(tx):
    state = tx.init(PARAMS)
    real = sum(
        (jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.extended) else x).nbytes
        for x in jax.tree.leaves(state)
    )
    assert storage.optimizer_bytes(tx, PARAMS) == real
    shapes = jax.eval_shape(lambda: PARAMS)
    assert storage.optimizer_bytes(tx, shapes) == real


def test_rewiring_bytes():
    got = storage.rewiring_bytes(PARAMS, optax.sgd(0.1, momentum=0.9), {"kernel": 0.9})
    assert got == (20_200, 20_200, 20_200, 2 * 5_050, 8 * 5_000)
    assert got.total == sum(got)


def test_compiled_update_of_a_plain_optimizer():
    shapes = jax.eval_shape(lambda: PARAMS)
    got = storage.compiled_update_bytes(optax.sgd(0.1, momentum=0.9), shapes)
    assert got.arguments == 3 * 20_200
    assert got.results < 1000  # donated: tables of pointers only
    assert got.total == sum(got)


def test_rewiring_bytes_are_a_lower_bound():
    inner = optax.sgd(0.1, momentum=0.9)
    tx = rigl_optax.rigl(inner, 0.9, end=100)
    compiled = storage.compiled_update_bytes(tx, PARAMS)
    bound = storage.rewiring_bytes(PARAMS, inner, {"kernel": 0.9})
    assert bound.total < compiled.total < 3 * bound.total
