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
    assert int(dead["layer/kernel"].inputs) == (table.sum(axis=1) == 0).sum()
    assert int(dead["layer/kernel"].outputs) == (table.sum(axis=0) == 0).sum()
