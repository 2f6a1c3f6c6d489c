"""A random order of positions, the same for those who list it and those who ask for a rank."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rigl_optax._ranking import _order, _packing, _random

KEY = (3, _random.Purpose.CANDIDATE)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 204, 1023])
def test_each_position_comes_once_and_has_its_rank(size):
    listed = np.asarray(_order.first(*KEY, 1, 5, size, size))
    assert sorted(listed) == list(range(size))
    packing = _packing.packing([(2, 3), (size,)], [False] * 2)
    ranks = _order.ranks(*KEY, [0, 1], packing, packing.sizes(), 5)
    own = np.asarray(packing.unpack(ranks)[1])
    np.testing.assert_array_equal(own[listed], np.arange(size))
    some = [packing.pack([jnp.zeros((2, 3), jnp.int32), jnp.full(size, size - 1)], 0)][0]
    of_last = packing.unpack(_order.ranks(*KEY, [0, 1], packing, packing.sizes(), 5, some))[1]
    assert set(np.asarray(of_last)) == {int(own[size - 1])}


def test_layers_of_a_stack_have_orders_of_their_own():
    packing = _packing.packing([(2, 5, 40)], [True])
    ranks = np.asarray(_order.ranks(*KEY, [0], packing, packing.sizes(), 5)[0]).reshape(2, 200)
    assert all(sorted(layer) == list(range(200)) for layer in ranks)
    assert (ranks[0] != ranks[1]).mean() > 0.9


def test_any_two_positions_are_as_likely_to_come_first():
    size, draws = 31, 20_000
    of_count = jax.jit(jax.vmap(lambda count: _order.first(*KEY, 1, count, size, 2)))
    first, second = np.asarray(of_count(jnp.arange(draws))).T
    pairs = np.zeros((size, size))
    np.add.at(pairs, (first, second), 1)
    assert not pairs[np.eye(size, dtype=bool)].any()
    freedom = size * (size - 1) - 1
    expected = draws / (freedom + 1)
    chi = ((pairs[~np.eye(size, dtype=bool)] - expected) ** 2 / expected).sum()
    assert abs(chi - freedom) < 4 * (2 * freedom) ** 0.5
