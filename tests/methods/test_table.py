"""The last columns of the table in docs/methods.md, measured."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rigl_optax
from rigl_optax.methods import _facts
from rigl_optax.training import config as config_lib
from rigl_optax.training import methods
from tests.training.conftest import SMALL

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "methods.md"
SHAPES = {"a": (17, 12), "b": (12, 9), "bias": (9,)}
SPARSE = ("a", "b")
STEPS = 30


def rows():
    found = {}
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 7 and (name := re.fullmatch(r"`(\w+)`", cells[0])):
            found[name[1]] = cells[-3:]
    return found


def some_tree(seed):
    rng = np.random.default_rng(seed)
    return {n: rng.standard_normal(s).astype(np.float32) for n, s in SHAPES.items()}


# So that in 30 steps of random gradients something falls below the thresholds.
OPTIONS = {
    "dsr": {"method.initial_threshold": 0.3},
    "str": {"method.threshold_decay": 0.5, "method.initial_threshold": -1.0},
}


def build(name):
    changes = {"method.sparsity": 0.7, "method.every": 5, "steps": STEPS}
    changes |= {"method.name": name, "optimizer.weight_decay": 0.0} | OPTIONS.get(name, {})
    config = config_lib.changed(SMALL, changes)
    return methods.build(config), config


def depends(update, params, state, t, where):
    """Whether what comes of a step depends on gradients there."""
    grads = some_tree(100 + t)
    other = {n: np.where(where[n], 3 * g + 1, g) if n in where else g for n, g in grads.items()}
    both = [jax.device_get(update(g, state, params)) for g in (grads, other)]
    pairs = zip(*map(jax.tree.leaves, both), strict=True)
    return any(not np.array_equal(a, b) for a, b in pairs)


def measure(name):
    tx, config = build(name)
    params = some_tree(0)
    state = tx.init(params)
    params = rigl_optax.apply_masks(params, state)
    update = jax.jit(tx.update)
    counts, gradients = set(), set()
    for t in range(STEPS):
        masks = jax.device_get(state.masks)
        marks = jax.device_get(state.memory.second_masks) if name == "top_kast" else masks
        outside = {n: ~masks[n] for n in SPARSE}
        if depends(update, params, state, t, outside):
            if not depends(update, params, state, t, {n: ~marks[n] for n in SPARSE}):
                gradients.add("wider set")
            elif (
                (plan := methods.plan_of(tx)) is not None
                and plan.default.schedule.every > 1
                and plan.rewires_at(t)
            ):
                gradients.add("rewirings")
            else:
                gradients.add("every step")
        updates, state = update(some_tree(100 + t), state, params)
        params = optax.apply_updates(params, updates)
        counts.add(tuple(int(state.masks[n].sum()) for n in SPARSE))
    kind = next((k for k in ("every step", "wider set", "rewirings") if k in gradients), "never")
    stored = False
    for n in SPARSE:
        outside = ~np.asarray(state.masks[n])
        # All that has the shape of the weight, but the masks themselves.
        values = (params, state.inner_state, state.shadow, state.memory.gradients)
        for leaf in jax.tree.leaves(values):
            if leaf.shape == SHAPES[n] and jnp.issubdtype(leaf.dtype, jnp.floating):
                stored |= bool((np.asarray(leaf)[outside] != 0).any())
    return ["yes" if len(counts) == 1 else "no", kind, "all" if stored else "active"]


def test_the_table_has_every_method_that_trains_with_masks():
    chosen_once = {name for name, m in methods.METHODS.items() if m.start or not m.masked}
    assert set(rows()) == set(methods.METHODS) - chosen_once - {"rigl_itop", "gmp_25_75"}
    for name in methods.METHODS:
        assert f"`{name}`" in PAGE.read_text()


@pytest.mark.parametrize("name", sorted(rows()))
def test_what_the_table_says_is_so(name):
    assert measure(name) == rows()[name]


@pytest.mark.parametrize("name", sorted(rows()))
def test_the_facts_of_a_method_are_those_of_the_table(name):
    facts = _facts.METHODS[name]
    layers, gradients, _ = rows()[name]
    assert facts.keeps_counts == (layers == "yes")
    assert facts.dense_gradients == gradients
