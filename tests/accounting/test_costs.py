import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rigl_optax.accounting as accounting
from rigl_optax.accounting import Cost, StepCost, Unattributed

COST = Cost({"a": 200, "b": 100, "bias": 0}, (Unattributed("dot_general", 40, "", ""),), 7, ())


def test_sparse_cost_of_a_distribution():
    assert accounting.flops_at_sparsity(COST, {}) == COST.total == 340
    assert accounting.flops_at_sparsity(COST, {"a": 0.75, "b": 0.5}) == 50 + 50 + 40
    with pytest.raises(ValueError, match="'c', which no parameter"):
        accounting.flops_at_sparsity(COST, {"c": 0.5})


def test_sparse_cost_of_masks():
    masks = {"a": jnp.arange(10) < 3, "b": jnp.ones((5, 5), bool), "bias": jnp.ones(3, bool)}
    assert accounting.flops_of_masks(COST, masks) == pytest.approx(60 + 100 + 40)
    with pytest.raises(ValueError, match="masks do not fit params: 'b', 'bias' have no mask"):
        accounting.flops_of_masks(COST, {"a": masks["a"]})


WIDER = 30.0


def simulate(method, f_dense, f_sparse, steps, begin, end, every, batch_size):
    """Step by step, from the contract of the transformation."""
    initial = {"snip": 3, "grasp": 9, "synflow": 3}.get(method, 0)  # dense passes, forward is 1
    total = [initial * f_dense * batch_size]
    for t in range(steps):
        rewires = begin <= t < end and (t - begin) % every == 0
        sparse = f_sparse(t) if callable(f_sparse) else f_sparse
        dense_gradients = {"dnw", "snfs", "snfs_redistribute", "iht"}
        if rewires:
            dense_gradients |= {"rigl", "rigl_itop", "lottery_rigl", "granet"}
        step = 3 * sparse
        if method in ("dense", "small_dense"):
            step = 3 * f_dense
        elif method in dense_gradients:
            step = 2 * sparse + f_dense
        elif method == "top_kast":
            step = 2 * sparse + WIDER
        total.append(total[-1] + step * batch_size)
    return total


@settings(max_examples=150, deadline=None)
@given(
    method=st.sampled_from(sorted(accounting.METHODS)),
    begin=st.integers(0, 12),
    length=st.integers(1, 40),
    every=st.integers(1, 15),
    batch_size=st.integers(1, 4),
)
def test_cumulative_cost_is_the_sum_over_the_steps(method, begin, length, every, batch_size):
    end = begin + length

    def density(t):
        return 10.0 - sum(s < t for s in range(begin, end, every)) / 4  # changes after rewirings

    f_sparse = (
        density if method in ("pruning", "gmp", "gmp_global", "acdc", "spdf", "iht") else 10.0
    )
    wider = {"f_wider": WIDER} if method == "top_kast" else {}
    expected = simulate(method, 100.0, f_sparse, 70, begin, end, every, batch_size)
    spent = accounting.cumulative_cost(
        method, 100.0, f_sparse, batch_size=batch_size, begin=begin, end=end, every=every, **wider
    )
    np.testing.assert_allclose(spent(np.arange(71)), expected, rtol=1e-12)
    assert [spent(t) for t in range(71)] == pytest.approx(expected)
    assert isinstance(spent(3), float)
    schedule = {"begin": begin, "end": end, "every": every}
    assert accounting.training_cost(
        method, 100.0, f_sparse, steps=70, batch_size=batch_size, **schedule, **wider
    ) == pytest.approx(expected[-1])


def test_methods_that_never_change_cost_need_no_schedule():
    for method in ("dense", "static", "snip", "set", "snfs"):
        assert accounting.cumulative_cost(method, 10.0, 2.0)(0) in (0.0, 30.0)
    for method in ("rigl",):
        with pytest.raises(ValueError, match="needs `end`"):
            accounting.cumulative_cost(method, 10.0, 2.0)
    with pytest.raises(ValueError, match="needs `end`"):
        accounting.cumulative_cost("pruning", 10.0, lambda t: 2.0)


def test_bad_input():
    with pytest.raises(ValueError, match="method 'lotto' is not known; known are dense"):
        accounting.cumulative_cost("lotto", 1.0, 1.0)
    with pytest.raises(ValueError, match="f_wider=None"):
        accounting.cumulative_cost("top_kast", 1.0, 1.0)
    with pytest.raises(ValueError, match=r"accumulate=6: must be an integer in \[1, every=5\]"):
        accounting.cumulative_cost("rigl", 1.0, 1.0, end=10, every=5, accumulate=6)
    with pytest.raises(ValueError, match="begin=5"):
        accounting.cumulative_cost("rigl", 1.0, 1.0, begin=5, end=5)
    with pytest.raises(ValueError, match="0 or more"):
        accounting.cumulative_cost("dense", 1.0, 1.0)(-1)
    with pytest.raises(ValueError, match="every=0"):
        accounting.published_cost("rigl", 1.0, 0.1, every=0)


def test_a_method_of_ones_own():
    method = accounting.MethodCost(
        StepCost(False, False, True), rewiring=StepCost(True, True, True)
    )
    spent = accounting.cumulative_cost(method, 10.0, 1.0, end=10, every=5)
    assert spent(10) == 8 * 12 + 2 * 30


def test_published_formulas():
    f_dense, f_sparse = 100.0, 20.0
    assert accounting.published_cost("dense", f_dense, f_sparse) == 300
    assert accounting.published_cost("static", f_dense, f_sparse) == 60
    assert accounting.published_cost("snip", f_dense, f_sparse) == 60
    assert accounting.published_cost("set", f_dense, f_sparse) == 60
    assert accounting.published_cost("snfs", f_dense, f_sparse) == 140
    assert accounting.published_cost("pruning", f_dense, [100.0, 60.0, 20.0]) == 180
    r = f_sparse / f_dense
    assert accounting.published_cost("rigl", f_dense, f_sparse) / 300 == pytest.approx(
        (302 * r + 1) / 303
    )


def test_published_and_own_count_of_rigl_differ_by_the_schedule_only():
    own = accounting.training_cost("rigl", 1.0, 0.2, steps=32_000, end=25_000)
    published = accounting.published_cost("rigl", 1.0, 0.2) * 32_000
    assert own == pytest.approx(32_000 * 0.6 + 250 * 0.8)
    assert published == pytest.approx(32_000 * (0.6 + 0.8 / 101))
    assert own < published < 1.004 * own


def test_accumulation_takes_dense_gradients_up_to_each_rewiring():
    spent = accounting.cumulative_cost("rigl", 10.0, 1.0, begin=2, end=13, every=5, accumulate=4)
    # Rewirings at 2, 7 and 12; the window of the first begins with the run.
    dense = {0, 1, 2, 4, 5, 6, 7, 9, 10, 11, 12}
    steps = [12.0 if t in dense else 3.0 for t in range(20)]
    np.testing.assert_array_equal(spent(np.arange(21)), np.cumsum([0.0, *steps]))


def test_a_call_that_several_layers_rewire_at_counts_once():
    overrides = {"a": {"every": 4}, "b": {"begin": 3, "every": 6}}
    spent = accounting.cumulative_cost("rigl", 10.0, 1.0, end=20, every=8, overrides=overrides)
    rewirings = {*range(0, 20, 8), *range(0, 20, 4), *range(3, 20, 6)}
    steps = [12.0 if t in rewirings else 3.0 for t in range(25)]
    np.testing.assert_array_equal(spent(np.arange(26)), np.cumsum([0.0, *steps]))
