"""Exact top-k masks: the k largest, ties to the lower flat index, with and without a layer axis.

-1 excludes: at least k scores must be 0 or above, as they are in the drop (k active weights are
kept) and in the grow (k of those not kept).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rigl_optax._ranking import _packing, _top_k
from tests.core.reference import top_k_mask

LARGEST = 2**31 - 1
SHAPES = [(1,), (2,), (7,), (33,), (4, 5), (3, 3, 2, 5)]


def top_k_masks(scores, ks):
    """Masks of the k largest of each array; a vector of ks ranks each slice of an array apart."""
    packing = _packing.packing([s.shape for s in scores], [k.ndim == 1 for k in ks])
    packed = packing.pack(scores, _top_k.EXCLUDED)
    k = jnp.concatenate([x.reshape(-1) for x in ks])
    return packing.unpack(_top_k.top_k(packed, packing.ranking_ids, k))


@functools.cache
def compiled(_structure):
    return jax.jit(top_k_masks)


def select(scores, ks):
    structure = tuple((s.shape, np.shape(k)) for s, k in zip(scores, ks, strict=True))
    masks = compiled(structure)(
        [jnp.asarray(s, jnp.int32) for s in scores], [jnp.asarray(k, jnp.int32) for k in ks]
    )
    return [np.asarray(m) for m in masks]


def eligible(scores):
    return int(np.count_nonzero(scores >= 0))


@st.composite
def leaf(draw):
    shape = draw(st.sampled_from(SHAPES))
    elements = draw(
        st.sampled_from(
            [
                st.integers(-1, LARGEST),
                st.integers(-1, 1),
                st.just(0),
                st.just(-1),
                st.sampled_from([-1, 0, LARGEST - 1, LARGEST]),
                st.integers(0x3F800000, 0x3F800003),  # neighbours of 1.0
            ]
        )
    )
    scores = draw(hnp.arrays(np.int32, shape, elements=elements))
    return scores, draw(st.integers(0, eligible(scores)))


@given(leaf())
@example((np.full((33,), LARGEST, np.int32), 33))
@example((np.full((33,), -1, np.int32), 0))
@example((np.array([LARGEST], np.int32), 1))
@example((np.array([-1], np.int32), 0))
def test_one_leaf_is_the_k_largest(case):
    scores, k = case
    (mask,) = select([scores], [k])
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask, top_k_mask(scores, k))
    assert np.count_nonzero(mask) == k


@given(st.data())
def test_many_leaves_share_one_search_and_stay_apart(data):
    shapes = [(1,), (33,), (4, 5), (3, 3, 2, 5), (2,)]
    spread = st.sampled_from([st.integers(-1, LARGEST), st.integers(-1, 2), st.just(LARGEST)])
    scores = [
        data.draw(hnp.arrays(np.int32, shape, elements=data.draw(spread))) for shape in shapes
    ]
    ks = [data.draw(st.integers(0, eligible(s))) for s in scores]
    for mask, s, k in zip(select(scores, ks), scores, ks, strict=True):
        np.testing.assert_array_equal(mask, top_k_mask(s, k))


@given(st.data())
def test_a_layer_axis_ranks_each_slice_apart(data):
    scores = data.draw(hnp.arrays(np.int32, (3, 4, 5), elements=st.integers(-1, 3)))
    ks = np.array([data.draw(st.integers(0, eligible(s))) for s in scores], np.int32)
    other = data.draw(hnp.arrays(np.int32, (7,), elements=st.integers(0, 3)))
    stacked, single = select([scores, other], [ks, 4])
    for i in range(3):
        np.testing.assert_array_equal(stacked[i], top_k_mask(scores[i], int(ks[i])))
    np.testing.assert_array_equal(single, top_k_mask(other, 4))


def test_equal_scores_go_to_the_lower_flat_index():
    (mask,) = select([np.full((2, 3), 5, np.int32)], [4])
    np.testing.assert_array_equal(mask, [[True, True, True], [True, False, False]])


@pytest.mark.parametrize("columns", [2**15 - 2, 2**15 - 1, 2**15, 2**15 + 1, 2**16 + 3])
def test_rows_longer_than_a_short_integer(columns):
    scores = np.full((3, columns), 7, np.int32)
    for k in (0, columns - 1, columns, 2 * columns + 5, 3 * columns):
        (mask,) = select([scores], [k])
        np.testing.assert_array_equal(mask, top_k_mask(scores, k))


def test_eager_is_jitted():
    rng = np.random.default_rng(0)
    scores = [jnp.asarray(rng.integers(-1, 9, s), jnp.int32) for s in SHAPES]
    ks = [jnp.asarray(s.size // 2, jnp.int32) for s in scores]
    for a, b in zip(top_k_masks(scores, ks), jax.jit(top_k_masks)(scores, ks), strict=True):
        np.testing.assert_array_equal(a, b)


def test_under_vmap():
    rng = np.random.default_rng(0)
    scores = jnp.asarray(rng.integers(0, 9, (5, 4, 6)), jnp.int32)
    ks = jnp.asarray([0, 1, 10, 23, 24], jnp.int32)
    masks = jax.vmap(lambda s, k: top_k_masks([s], [k])[0])(scores, ks)
    for s, k, m in zip(np.asarray(scores), np.asarray(ks), np.asarray(masks), strict=True):
        np.testing.assert_array_equal(m, top_k_mask(s, int(k)))


@pytest.mark.slow
def test_more_than_two_to_the_24_scores():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 1000, 2**24 + 77, dtype=np.int32)  # ties everywhere
    order = np.argsort(-scores.astype(np.int16), kind="stable")
    # So many scores are worth optimizing for.
    fast = jax.jit(top_k_masks, compiler_options={"xla_backend_optimization_level": 1})
    for k in (0, 1, 2**24 + 1, 2**24 + 76, 2**24 + 77):
        (mask,) = fast([jnp.asarray(scores)], [jnp.int32(k)])
        expected = np.zeros(len(scores), bool)
        expected[order[:k]] = True
        np.testing.assert_array_equal(mask, expected)


def test_nothing_is_sorted_or_gathered():
    scores = [jax.ShapeDtypeStruct((64, 32), jnp.int32)]
    ks = [jax.ShapeDtypeStruct((), jnp.int32)]
    program = str(jax.make_jaxpr(top_k_masks)(scores, ks))
    assert not any(f"{op}[" in program for op in ("sort", "top_k", "approx_top_k", "gather"))
