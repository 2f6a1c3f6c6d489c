import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from rigl_optax import analysis


@settings(max_examples=25)
@given(
    shape=st.sampled_from([(9, 5), (3, 3, 6, 4), (2, 7, 3)]),
    seed=st.integers(0, 100),
    density=st.floats(0, 0.6),
)
def test_against_numpy(shape, seed, density):
    mask = np.random.default_rng(seed).random(shape) < density
    table = mask.reshape(-1, *shape[-2:]).sum(axis=0)
    np.testing.assert_array_equal(analysis.fan_in(mask), table.sum(axis=0))
    np.testing.assert_array_equal(analysis.fan_out(mask), table.sum(axis=1))
    dead = analysis.dead_units({"layer": {"kernel": mask, "bias": np.ones(3, bool)}})
    assert list(dead) == ["layer/kernel"]
    into = table.sum(axis=0)
    spread = into.sum() ** 2 / (into**2).sum() if into.any() else 0
    np.testing.assert_allclose(analysis.effective_units(analysis.fan_in(mask)), spread, rtol=1e-5)
    assert int(dead["layer/kernel"].inputs) == (table.sum(axis=1) == 0).sum()
    assert int(dead["layer/kernel"].outputs) == (table.sum(axis=0) == 0).sum()


def test_an_entry_may_stand_for_several_units():
    each = np.array([3, 3, 1, 1, 1, 0])
    found = analysis.effective_units(np.array([3, 1, 0]), np.array([2, 3, 1]))
    np.testing.assert_allclose(found, each.sum() ** 2 / (each**2).sum(), rtol=1e-6)


def test_large_counts_do_not_overflow():
    found = analysis.effective_units(np.full(10_000, 10**6, np.int32))
    np.testing.assert_allclose(found, 10_000, rtol=1e-5)
