"""The one schedule, asked of a traced count and of a Python integer, and where it is found."""

import jax
import jax.numpy as jnp
import optax
import pytest

import rigl_optax
from rigl_optax import _plan, condensed
from rigl_optax._wrapper._design import design_of

OVERRIDES = {"a": {"every": 4}, "b": {"begin": 3, "every": 6, "end": 40}}


@pytest.mark.parametrize("overrides", [None, OVERRIDES])
@pytest.mark.parametrize("window", [1, 3])
def test_counts_are_those_of_the_traced_answer(overrides, window):
    plan = _plan.rewiring_plan(begin=2, end=30, every=7, overrides=overrides)
    plan = plan._replace(window=window)
    due = jax.vmap(plan.is_rewiring_step)(jnp.arange(50)).tolist()
    assert [plan.rewires_at(t) for t in range(50)] == due
    dense = [any(due[t : t + window]) for t in range(50)]
    for t in range(48):
        assert plan.rewirings_before(t) == sum(due[:t])
        assert plan.dense_gradients_before(t) == sum(dense[:t])


def test_a_transformation_tells_its_plan_and_is_one_of_optax():
    tx = rigl_optax.rigl(optax.sgd(0.1), 0.5, end=20, every=5, accumulate=2)
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    assert optax.with_extra_args_support(tx) is tx
    init, update = tx
    assert (init, update) == (tx.init, tx.update)
    plan = design_of(tx).plan
    assert plan.rewirings_before(100) == 4 and plan.dense_gradients_before(100) == 7
    assert design_of(rigl_optax.static_sparse(optax.sgd(0.1), 0.5)).plan is None
    assert design_of(optax.sgd(0.1)) is None
    assert condensed.rigl(optax.sgd(0.1), end=20, every=5).plan.rewirings_before(100) == 4
    assert condensed.static_sparse(optax.sgd(0.1)).plan is None
