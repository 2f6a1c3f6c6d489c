"""Ablation of units (SRigL): a restatement in NumPy, exact counts, and what it refuses."""

import fractions
import functools
import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st

import rigl_optax
from rigl_optax import NM, ConstantFanIn
from rigl_optax.methods import _ablation
from tests.core import reference as core
from tests.methods import reference
from tests.methods.test_properties import numbers
from tests.methods.test_structures import place
from tests.methods.test_trajectories import growth_scores

# ------------------------------------------------------------------------- unit by unit, in NumPy


def enough(salient, share, fan_in):
    """Whether so many salient weights are enough; `share` as it is written, 0.3 is 3/10."""
    return salient >= max(1, fractions.Fraction(str(share)) * fan_in)


def ablated(mask, weight, scores, fraction, share):
    """The next mask of one layer; all arrays are [units, inputs]."""
    units, inputs = mask.shape
    total = int(mask.sum())
    kept = core.kept_mask(mask, weight, fraction)
    if not scores[~kept].any():  # nothing says where to grow
        return mask
    salient = reference.grow_largest(kept, scores, total - int(kept.sum())).sum(1)
    order = sorted(range(units), key=lambda unit: (-salient[unit], unit))
    good = [unit for unit in order if enough(salient[unit], share, total // units)]
    stay = order[: max(len(good), math.ceil(total / inputs))]
    new = np.zeros_like(mask)
    for rank, unit in enumerate(stay):
        fan_in = total // len(stay) + (rank < total % len(stay))
        held = reference.keep_largest(kept[unit], weight[unit], min(kept[unit].sum(), fan_in))
        new[unit] = reference.grow_largest(held, scores[unit], fan_in - int(held.sum()))
    return new


def by_unit(x):
    return x.reshape(-1, x.shape[-1]).T


def check_layer(mask, total):
    """What is promised of every layer, whatever the numbers are."""
    fan_in = by_unit(mask).sum(1)
    assert fan_in.sum() == total
    left = fan_in[fan_in > 0]
    assert left.size and left.max() - left.min() <= 1
    assert ConstantFanIn(min_salient=0.5).misfit(mask) == ""


# -------------------------------------------------------------------------------- trajectories

SHAPES = {"conv": (3, 3, 2, 5), "fc": (12, 7), "stack": (3, 8, 6), "whole": (6, 4), "bias": (5,)}
SHARES = {"conv": 0.6, "fc": 0.75, "stack": 1}
STRUCTURE = {name: ConstantFanIn(share) for name, share in SHARES.items()}
HALF = rigl_optax.uniform(0.5, stacked=("stack",), overrides={"fc": 0.7})
FRACTION = 0.4
PLAN = {"begin": 1, "end": 14, "every": 2, "seed": 3}
DROP = {"drop_fraction": rigl_optax.constant_drop_fraction(FRACTION)}
STEPS = 15
METHODS = {
    "rigl": rigl_optax.rigl,
    "set": rigl_optax.sparse_evolutionary_training,
    "snfs": rigl_optax.sparse_momentum,
}


def sgd():
    return optax.sgd(0.05, momentum=0.9)


def uneven(seed, shapes=SHAPES):
    """Units of very different sizes, so that some are ablated; others at other seeds."""
    rng = np.random.default_rng(seed)
    tree = {n: rng.standard_normal(s) * rng.lognormal(0, 1.5, s[-1]) for n, s in shapes.items()}
    return {n: x.astype(np.float32) for n, x in tree.items()}


def run(tx, shapes=SHAPES, steps=STEPS, put=lambda tree: tree):
    """Params and state before the first step and after each."""
    params = uneven(0, shapes)
    state = jax.jit(tx.init)(params)
    params, state = put((rigl_optax.apply_masks(params, state), state))
    step = jax.jit(tx.update)
    history = [jax.device_get((params, state))]
    for t in range(steps):
        updates, state = step(uneven(100 + t, shapes), state, params)
        params = optax.apply_updates(params, updates)
        history.append(jax.device_get((params, state)))
    return history


@pytest.mark.parametrize("name", METHODS)
def test_equals_the_restatement_over_a_trajectory(name):
    structure = STRUCTURE | {"whole": NM(1, 2)}
    history = run(METHODS[name](sgd(), HALF, structure=structure, **PLAN, **DROP))
    grids = {n: by_unit(np.zeros(s)).shape for n, s in SHAPES.items()}
    drawn = growth_scores(3, grids | {"stack": (18, 8), "whole": (12, 2)})
    gone, back = set(), set()
    for t in range(STEPS):
        (params, before), (_, after) = history[t : t + 2]
        scores = uneven(100 + t) if name == "rigl" else after.memory.gradients
        for n, share in SHARES.items():
            old, new = before.masks[n], after.masks[n]
            if t % 2 == 0 or t >= PLAN["end"]:
                np.testing.assert_array_equal(old, new)
                continue
            layers = range(len(old)) if n == "stack" else [...]
            for i in layers:
                if name == "set":
                    of_layer = drawn(t, n).reshape(-1, *by_unit(old[i]).shape)[0 if i is ... else i]
                else:
                    of_layer = np.abs(by_unit(scores[n][i]))
                wanted = ablated(by_unit(old[i]), by_unit(params[n][i]), of_layer, FRACTION, share)
                np.testing.assert_array_equal(by_unit(new[i]), wanted, err_msg=f"{t} {n} {i}")
                check_layer(new[i], old[i].sum())
                was, now = by_unit(old[i]).any(1), by_unit(new[i]).any(1)
                gone |= {(n, t)} if (was & ~now).any() else set()
                back |= {(n, t)} if (now & ~was).any() else set()
        assert (after.masks["whole"].reshape(3, 2, 4).sum(1) == 1).all()
    assert {n for n, _ in gone} == {n for n, _ in back} == set(SHARES)
    for params, state in history:
        assert all(not params[n][~state.masks[n]].any() for n in SHAPES)


def test_the_same_on_eight_devices_and_packed(monkeypatch):
    tx = rigl_optax.rigl(sgd(), HALF, structure=STRUCTURE, **PLAN, **DROP)
    one = run(tx, steps=6)
    eight = run(tx, steps=6, put=lambda tree: place(tree, 8))
    with monkeypatch.context() as patch:
        patch.setattr(jax, "device_count", lambda *_: 1)
        packed = run(rigl_optax.rigl(sgd(), HALF, structure=STRUCTURE, **PLAN, **DROP), steps=6)
    for (_, a), (_, b), (_, c) in zip(one, eight, packed, strict=True):
        for n in SHAPES:
            np.testing.assert_array_equal(a.masks[n], b.masks[n])
            np.testing.assert_array_equal(a.masks[n], c.masks[n])


def test_without_a_unit_to_ablate_it_is_a_constant_fan_in():
    shapes = {"a": (40, 6)}
    tree = lambda seed: {"a": np.random.default_rng(seed).standard_normal((40, 6), np.float32)}
    methods = [
        rigl_optax.rigl(sgd(), 0.5, structure=ConstantFanIn(share), end=9, every=1, **DROP)
        for share in (0.0, 0.1)
    ]
    params = tree(0)
    state = methods[0].init(params)
    params = rigl_optax.apply_masks(params, state)
    for t in range(4):
        (updates, after), (_, same) = (
            jax.jit(tx.update)(tree(t + 1), state, params) for tx in methods
        )
        np.testing.assert_array_equal(after.masks["a"], same.masks["a"])
        assert not np.array_equal(after.masks["a"], state.masks["a"])
        params, state = optax.apply_updates(params, updates), after
    assert set(shapes) == set(params)


# ------------------------------------------------------------------------------------ one rewiring


@functools.cache
def one_layer(share, units):
    """A method whose drop fraction is its count in parts of 128; initial masks decide the rest."""
    tx = rigl_optax.rigl(
        sgd(), rigl_optax.uniform(0.5), structure=ConstantFanIn(share), end=200, every=1,
        drop_fraction=lambda count: count / 128,
    )  # fmt: skip
    return tx, jax.jit(tx.update)


def rewire(weight, gradient, mask, share, parts=64):
    """One rewiring of one layer, [inputs, units], that drops `parts` of 128 of its weights."""
    tx, update = one_layer(share, mask.shape)
    params = {"a": np.where(mask, weight, 0).astype(np.float32)}
    state = tx.init(params)._replace(masks={"a": jnp.asarray(mask)}, count=jnp.int32(parts))
    return np.asarray(update({"a": gradient}, state, params)[1].masks["a"])


def first_inputs(fan_ins, inputs):
    return np.arange(inputs)[:, None] < np.asarray(fan_ins)


def test_as_many_units_stay_as_the_weights_need():
    """Two units have enough salient weights, but it takes three of 5 inputs to hold 12 or 13."""
    weight, gradient = np.ones((5, 4), np.float32), np.zeros((5, 4), np.float32)
    gradient[:, 2], gradient[:, 3], gradient[:2, 1] = 3, 2, 1
    after = rewire(weight, gradient, first_inputs([3, 3, 3, 3], 5), 1.0, parts=128)
    np.testing.assert_array_equal(after.sum(0), [0, 4, 4, 4])
    # One more is for the unit with most; of units 2 and 3, that have as many, for the first.
    after = rewire(weight, gradient, first_inputs([4, 3, 3, 3], 5), 1.0, parts=128)
    np.testing.assert_array_equal(after.sum(0), [0, 4, 5, 4])


def test_the_threshold_is_exact():
    """Of a fan-in of 10, 0.3 is 3 and no rounding of 0.3 makes it 4."""
    for share, least in [(0.3, 3), (0.25, 3), (1, 10)]:
        for salient in (least, least - 1):
            mask = first_inputs([10] * 4, 30)
            weight = np.ones((30, 4), np.float32)
            weight[:, 0] = np.where(np.arange(30) < salient, 1, 0.1)
            gradient = np.zeros((30, 4), np.float32)
            gradient[20:, 1:] = 1  # what is dropped in unit 0 grows elsewhere
            parts = -(-128 * (10 - salient) // 40)  # so many of the 40 are dropped
            after = rewire(weight, gradient, mask, share, parts)
            assert bool(after[:, 0].any()) == (salient == least), (share, salient)
            assert after.sum() == 40


def test_a_unit_comes_back_when_its_gradients_are_the_largest():
    mask = first_inputs([4, 4, 0, 4], 8)
    weight, gradient = np.ones((8, 4), np.float32), np.zeros((8, 4), np.float32)
    weight[:, 1], gradient[2:8, 2] = 0.1, 1
    after = rewire(weight, gradient, mask, 0.5)
    np.testing.assert_array_equal(after.sum(0), [4, 0, 4, 4])
    np.testing.assert_array_equal(np.flatnonzero(after[:, 2]), [2, 3, 4, 5])


def test_a_unit_that_kept_more_than_it_is_to_have_keeps_its_largest():
    mask = first_inputs([6, 6, 0], 8)
    weight, gradient = np.ones((8, 3), np.float32), np.zeros((8, 3), np.float32)
    weight[:, 0], weight[:, 1] = np.arange(10, 18), 0.1
    gradient[:, 2], gradient[:2, 1] = 2, 1
    after = rewire(weight, gradient, mask, 0.25)
    np.testing.assert_array_equal(after.sum(0), [6, 0, 6])
    # Of 8 that are kept 6 are of unit 0, but with 4 salient weights in unit 2 all units stay.
    after = rewire(weight, gradient, mask, 0.25, parts=52)
    np.testing.assert_array_equal(after.sum(0), [4, 4, 4])
    np.testing.assert_array_equal(np.flatnonzero(after[:, 0]), [2, 3, 4, 5])


def test_a_gradient_that_is_not_finite_leaves_units_as_they_are():
    mask = first_inputs([4, 4, 0, 4], 8)
    gradient = np.full((8, 4), np.nan, np.float32)
    after = rewire(np.ones((8, 4), np.float32), gradient, mask, 0.5)
    np.testing.assert_array_equal(after, mask)


def test_a_layer_that_is_not_due_stays_as_it_is():
    tx = rigl_optax.rigl(
        sgd(),
        rigl_optax.uniform(0.7),
        structure=ConstantFanIn(0.9),
        overrides={"later": {"every": 4}},
        **(PLAN | {"begin": 0}),
    )
    shapes = {"later": (8, 6), "often": (8, 6)}
    history = run(tx, shapes, 6)
    masks = [state.masks for _, state in history]
    assert (masks[1]["later"].sum(0) == 0).any()
    np.testing.assert_array_equal(masks[1]["later"], masks[4]["later"])
    assert not np.array_equal(masks[2]["often"], masks[3]["often"])
    assert not np.array_equal(masks[4]["later"], masks[5]["later"])


# ------------------------------------------------------------------------------------- properties


TREE = {"a": (17, 12), "b": (3, 3, 4, 6), "c": (12, 5), "d": (2, 1)}


@functools.cache
def compiled(share):
    """A method whose drop fraction is its count in parts of 128, compiled once for all examples."""
    tx = rigl_optax.rigl(
        sgd(), rigl_optax.uniform(0.6), structure=ConstantFanIn(share), end=200, every=1,
        drop_fraction=lambda count: count / 128,
    )  # fmt: skip
    return jax.jit(tx.update), jax.jit(tx.init)


@pytest.mark.parametrize("share", [1e-6, 0.3, 1.0])
@hypothesis.settings(max_examples=12)
@hypothesis.given(weights=numbers(), gradients=numbers(), count=st.integers(0, 125))
def test_counts_are_constant_and_fan_ins_are_equal_up_to_one(share, weights, gradients, count):
    update, init = compiled(share)
    params = {n: weights(s) for n, s in TREE.items()}
    state = init(params)._replace(count=jnp.int32(count))
    params = jax.device_get(rigl_optax.apply_masks(params, state))
    for t in range(4):
        grads = {n: gradients(s) for n, s in TREE.items()}
        updates, after = update(grads, state, params)
        moved = jax.device_get(optax.apply_updates(params, updates))
        for n in TREE:
            old, new = np.asarray(state.masks[n]), np.asarray(after.masks[n])
            check_layer(new, old.sum())
            assert not moved[n][~new].any()
            fraction = (count + t) / 128
            wanted = ablated(
                *(by_unit(x) for x in (old, params[n], np.abs(grads[n]))), fraction, share
            )
            np.testing.assert_array_equal(by_unit(new), wanted)
        params, state = moved, after


@hypothesis.given(
    number=st.integers(0, 2**31 - 1), share=st.fractions(0, 1, max_denominator=10_000)
)
def test_a_share_is_rounded_up_in_integers(number, share):
    found = int(_ablation._times(jnp.int32(number), share))
    assert found == math.ceil(number * share)


# ---------------------------------------------------------------------------- masks, and what errs


def test_masks_with_ablated_units_are_taken_up_again():
    tx = rigl_optax.rigl(sgd(), HALF, structure=STRUCTURE, **PLAN, **DROP)
    masks = run(tx, steps=4)[-1][1].masks
    assert any((by_unit(masks[n]).sum(1) == 0).any() for n in ("conv", "fc"))
    again = rigl_optax.rigl(sgd(), HALF, initial_masks=masks, structure=STRUCTURE, **PLAN, **DROP)
    state = again.init(uneven(0))
    for n in SHAPES:
        np.testing.assert_array_equal(state.masks[n], masks[n])
    static = rigl_optax.static_sparse(sgd(), None, initial_masks=masks)
    np.testing.assert_array_equal(static.init(uneven(0)).masks["fc"], masks["fc"])


def test_masks_of_saliency_fit():
    masks = rigl_optax.magnitude_masks(uneven(0), HALF, structure=STRUCTURE)
    rigl_optax.rigl(sgd(), HALF, initial_masks=masks, structure=STRUCTURE, **PLAN).init(uneven(0))


LAYER = {"a": np.ones((6, 3), np.float32)}


def start(structure, fan_ins):
    tx = rigl_optax.rigl(
        sgd(), None, end=9, initial_masks={"a": first_inputs(fan_ins, 6)}, structure=structure
    )
    return tx.init(LAYER)


def other(make, **keys):
    return lambda: make(sgd(), 0.5, structure={"a": ConstantFanIn(0.3)}, **keys)


@pytest.mark.parametrize(
    "act, message",
    [
        (lambda: ConstantFanIn(1.5), r"min_salient=1.5: must be a number from 0"),
        (lambda: ConstantFanIn(-0.1), r"min_salient=-0.1"),
        (lambda: ConstantFanIn(float("nan")), r"min_salient=nan"),
        (lambda: ConstantFanIn(True), r"min_salient=True"),
        (lambda: ConstantFanIn("0.3"), r"min_salient='0.3'"),
        (lambda: start(ConstantFanIn(), [3, 0, 3]), r"units differ in their fan-in$"),
        (lambda: start(ConstantFanIn(0.3), [3, 0, 5]), r"differ in their fan-in by more than 1"),
        (other(rigl_optax.static_sparse), r"min_salient=0.3\): this method ablates no"),
        (other(rigl_optax.granet, end=9, scope="layer"), "ablates no units; rigl, sparse_evol"),
        (other(rigl_optax.gradual_magnitude_pruning, end=9), "ablates no units"),
        (other(rigl_optax.dnw), "ablates no units"),
        (other(rigl_optax.top_kast, backward_sparsity=0.2), "ablates no units"),
    ],
)  # fmt: skip
def test_errors(act, message):
    with pytest.raises(ValueError, match=message):
        act()


def test_masks_of_units_that_differ_by_one_fit():
    assert start(ConstantFanIn(0.3), [3, 0, 4]).masks["a"].sum() == 7
