import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rigl_optax
from rigl_optax.training import config as config_lib
from rigl_optax.training import health, loop, metrics, setup

SPARSE = ("layers/0/kernel", "layers/1/kernel", "layers/2/kernel")


def kernels(masks):
    return {path: np.asarray(masks["layers"][i]["kernel"]) for i, path in enumerate(SPARSE)}


def state_with(state, masks):
    return state._replace(opt_state=state.opt_state._replace(masks=masks))


def redrawn(small, seed):
    """Other masks with as many active weights."""
    return rigl_optax.get_masks(
        setup.prepare(config_lib.changed(small, {"seed": seed})).initial.opt_state
    )


def fraction(part, whole):
    return sum(m.sum() for m in part.values()) / sum(m.sum() for m in whole.values())


def test_what_is_measured_is_what_numpy_counts(small):
    run = setup.prepare(small)
    state = run.initial
    observe = health.observer(run, state)
    seen = [health.masks_before(run, state)]
    first = kernels(seen[0])
    explored, grown = dict(first), None
    for seed in (1, 2, 3):
        state = state_with(state, redrawn(small, seed))
        state, values = observe(seen[-1], state)
        seen.append(health.masks_before(run, state))
        old, new = kernels(seen[-2]), kernels(seen[-1])
        explored = {p: explored[p] | new[p] for p in SPARSE}
        everything = {p: np.ones_like(m) for p, m in new.items()}
        expected = {
            "churn": fraction({p: old[p] & ~new[p] for p in SPARSE}, old),
            "overlap": fraction({p: new[p] & first[p] for p in SPARSE}, first),
            "coverage": fraction(explored, everything),
        }
        for path in SPARSE:
            expected[f"churn/{path}"] = (old[path] & ~new[path]).sum() / old[path].sum()
            expected[f"overlap/{path}"] = (new[path] & first[path]).sum() / first[path].sum()
            expected[f"coverage/{path}"] = explored[path].mean()
            expected[f"dead_inputs/{path}"] = (~new[path].any(1)).sum()
            expected[f"dead_outputs/{path}"] = (~new[path].any(0)).sum()
            into = new[path].sum(0)
            expected[f"effective_outputs/{path}"] = into.sum() ** 2 / (into**2).sum()
        if grown is not None:
            kept = {p: grown[p] & new[p] for p in SPARSE}
            expected["survival"] = fraction(kept, grown)
            for path in SPARSE:
                expected[f"survival/{path}"] = kept[path].sum() / grown[path].sum()
        grown = {p: new[p] & ~old[p] for p in SPARSE}
        assert values == pytest.approx(expected, rel=1e-6)  # dense layers are not in it
    at_end = {path: values[f"effective_outputs/{path}"] for path in SPARSE}
    assert health.effective_units(run, state) == pytest.approx(at_end)
    for i, path in enumerate(SPARSE):
        np.testing.assert_array_equal(state.history.explored["layers"][i]["kernel"], explored[path])


def test_a_rewiring_that_changes_nothing_has_no_churn_and_the_next_one_no_survival(small):
    run = setup.prepare(small)
    state = run.initial
    observe = health.observer(run, state)
    masks = health.masks_before(run, state)
    state, values = observe(masks, state)
    assert values["churn"] == 0 and values["overlap"] == 1
    assert values["coverage"] == pytest.approx(0.2, abs=0.01)
    _, values = observe(masks, state)
    assert not any(name.startswith("survival") for name in values)


def test_measuring_compiles_once(small):
    run = setup.prepare(small)
    state = jax.tree.map(jnp.copy, run.initial)
    observe = health.observer(run, state)
    before = health._measure._cache_size()
    for _ in range(3):
        state, _ = observe(health.masks_before(run, state), state)
    assert health._measure._cache_size() <= before + 3  # shapes of the three kernels


@pytest.mark.parametrize("method", ["dense", "static", "set"])
def test_health_is_recorded_at_every_rewiring_and_nowhere_else(small, tmp_path, method, capsys):
    config = config_lib.changed(small, {"method.name": method, "steps": 40})
    run = setup.prepare(config)
    assert (run.initial.history is None) == (method != "set")
    loop.train(config, tmp_path)
    steps = [r["step"] for r in metrics.read(tmp_path / metrics.FILE) if r["kind"] == "rewiring"]
    assert steps == ([1, 11, 21] if method == "set" else [])
    assert [t + 1 for t in range(40) if run.rewirings.happen_at(t)] == steps
