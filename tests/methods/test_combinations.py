"""Every cell of the table of options: each is done, with its numbers, or refused in a sentence."""

import functools
import importlib.util
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rigl_optax
from rigl_optax import NM, ConstantFanIn
from tests.methods import combinations
from tests.methods.combinations import (
    ABLATED,
    ACCUMULATE,
    ALTERNATING,
    BLOCK,
    FALLING,
    GRADIENT_STEP,
    GROWN,
    IN_TOTAL,
    LEARNED,
    MASKS,
    METHODS,
    MIN_FAN_IN,
    NONE,
    OVER_LAYERS,
    OVERRIDES,
    REDISTRIBUTED,
    SINGLE,
    SOFT,
    SPARSER,
    STACKED,
    STRUCTURES,
    build,
    does,
    takes,
)

SHAPE = (16, 12)
STEPS = 9


def some_tree(shapes, seed):
    rng = np.random.default_rng(seed)
    return {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}


def shapes_of(names, is_stacked):
    """Two layers, or a stack of two, of each structure."""
    if is_stacked:
        return {f"{number}1": (2, *SHAPE) for number in names}
    return {f"{number}{i}": SHAPE for number in names for i in (1, 2)}


def first_masks(structures, shapes, is_stacked):
    """Other masks than those that a method would draw, that fit."""
    structures = {
        p: ConstantFanIn() if isinstance(s, ConstantFanIn) else s for p, s in structures.items()
    }
    layers = rigl_optax.uniform(0.5, stacked=(".",) if is_stacked else ())
    tx = rigl_optax.static_sparse(optax.sgd(0.1), layers, structure=structures, seed=7)
    return tx.init(some_tree(shapes, 0)).masks


# ---------------------------------------------------------------------------- done or refused

CELLS = [(method, option) for method in METHODS for option in takes(method)]


@pytest.mark.parametrize(("method", "option"), CELLS)
def test_each_structure_is_taken_or_refused(method, option):
    for name, structure in STRUCTURES.items():
        if method in combinations.SINGLES and name != SINGLE:
            continue
        is_stacked = option == STACKED
        shapes = shapes_of("x", is_stacked)
        masks = None
        if option == MASKS:
            masks = first_masks({".": structure}, shapes, False)
        specs = {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in shapes.items()}

        def init(structure=structure, masks=masks, specs=specs, is_stacked=is_stacked):
            tx = build(method, [option], structure, masks, is_stacked)
            return jax.eval_shape(tx.init, specs)

        if name in does(method, option):
            assert init().masks["x1"].shape == shapes["x1"]
        else:
            said = r"'?x1'?(:| has)"
            can_ablate = method in (*combinations.DROP_AND_GROW, REDISTRIBUTED)
            if name == ABLATED and (option == SPARSER or not can_ablate):
                said = "ablates no units"
            elif name == combinations.N_M and option == SPARSER:
                said = "sparsity of 'x1' is 0.25, must be 0.5"
            with pytest.raises(ValueError, match=said):
                init()


def test_the_page_has_the_table():
    path = pathlib.Path(__file__).parents[2] / "docs" / "combinations.py"
    spec = importlib.util.spec_from_file_location("docs_combinations", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.page() == module.PAGE.read_text(), "run python docs/combinations.py"


# ------------------------------------------------------------------------------ with its numbers

# What goes together at once, so that every cell that is done is run.
TOGETHER = [
    (method, options)
    for method in METHODS
    for options in (
        [o for o in takes(method) if o not in (NONE, MIN_FAN_IN, ACCUMULATE, SPARSER)],
        *([o for o in (MIN_FAN_IN, OVERRIDES, GROWN) if o in takes(method)],)
        * (MIN_FAN_IN in takes(method)),
        *([ACCUMULATE, GRADIENT_STEP, STACKED],) * (ACCUMULATE in takes(method)),
        *([SPARSER],) * (SPARSER in takes(method)),
    )
]


def ids(value):
    return value if isinstance(value, str) else " ".join(value).replace("`", "")


@pytest.mark.parametrize(("method", "options"), TOGETHER, ids=ids)
def test_numbers_are_kept(method, options):
    names = set(STRUCTURES).intersection(*(does(method, option) for option in options))
    if method in OVER_LAYERS:
        names = {SINGLE} if MIN_FAN_IN in options else {BLOCK}
    number = {str(i): name for i, name in enumerate(STRUCTURES) if name in names}
    structures = {f"^{i}": STRUCTURES[name] for i, name in number.items()}
    is_stacked = STACKED in options
    shapes = shapes_of(number, is_stacked)
    masks = first_masks(structures, shapes, is_stacked) if MASKS in options else None
    tx = build(method, options, structures, masks, is_stacked)
    params = some_tree(shapes, 0)
    state = jax.jit(tx.init)(params)
    params = rigl_optax.apply_masks(params, state)
    update = jax.jit(tx.update)
    history = [jax.device_get(state.masks)]
    for t in range(STEPS):
        # Uneven layers: what moves between them moves.
        scale = {n: np.float32(100.0 if n.endswith("2") else 1.0) for n in shapes}
        grads = {n: g * scale[n] for n, g in some_tree(shapes, 100 + t).items()}
        updates, state = update(grads, state, params)
        params = jax.device_get(optax.apply_updates(params, updates))
        masks = jax.device_get(state.masks)
        assert all(not params[n][~masks[n]].any() for n in shapes)
        history.append(masks)
    # They have the final numbers; the largest stay.
    is_done = MASKS in options and method.startswith(("gradual", "iter"))
    if method != "static_sparse" and not is_done:
        for i in number:
            pair = [n for n in shapes if n.startswith(i)]
            assert any((history[0][n] != masks[n]).any() for n in pair), f"{number[i]} never moved"
    sequence = [
        {n: groups_of(STRUCTURES[number[n[0]]], m, is_stacked) for n, m in masks.items()}
        for masks in history
    ]
    check_counts(method, options, number, sequence)
    for t, (before, after) in enumerate(itertools.pairwise(sequence)):
        for n in shapes:
            if OVERRIDES in options and n.endswith("1") and t % 4:
                np.testing.assert_array_equal(before[n], after[n])
            if MIN_FAN_IN in options:
                fan_in = after[n].sum(-2)
                assert (fan_in >= np.minimum(before[n].sum(-2), 2)).all()
                assert (after[n].sum((-2, -1)) >= 2 * after[n].shape[-1]).all()


def groups_of(structure, mask, is_stacked):
    """The mask's groups, of single weights itself; what does not fit its structure fails."""
    layers = mask if is_stacked else mask[None]
    if not isinstance(structure, NM):  # of which pruning may leave more, on its way
        assert {structure.misfit(layer) for layer in layers} == {""}
    if isinstance(structure, rigl_optax.Block):
        return np.stack([np.asarray(structure.groups(jnp.asarray(layer))) for layer in layers])
    return layers


def check_counts(method, options, number, sequence):
    each = [{n: m.sum((-2, -1)) for n, m in masks.items()} for masks in sequence]
    totals = [sum(int(count.sum()) for count in counts.values()) for counts in each]
    half = {n: np.full_like(c, sequence[0][n][0].size - sequence[0][n][0].size // 2)
            for n, c in each[0].items()}  # fmt: skip
    assert all((count >= 1).all() for counts in each for count in counts.values())
    if method in LEARNED:
        return
    if method == "spdf":
        size = sum(mask.size for mask in sequence[0].values())
        assert len(set(totals[:5])) == 1 and set(totals[5:]) == {size}
        assert totals[0] < size
        return
    assert totals[-1] == sum(int(count.sum()) for count in half.values())
    if method == SOFT:
        assert totals[0] == min(totals) < max(totals)
    elif method in ALTERNATING:
        assert len(set(totals)) == 2 and totals[0] == max(totals)
    elif method in FALLING or SPARSER in options:
        assert totals == sorted(totals, reverse=True)
        assert SPARSER not in options or totals[0] > totals[-1]
    else:
        assert len(set(totals)) == 1
    changes = method in (*FALLING, *ALTERNATING, SOFT) or SPARSER in options
    kept = each[-1:] if changes else each
    if method not in OVER_LAYERS:
        for counts in kept:
            for n in counts:
                np.testing.assert_array_equal(counts[n], half[n])
    elif method in IN_TOTAL:
        assert len({tuple(np.concatenate(list(c.values())).tolist()) for c in each}) > 1
    for i, name in number.items():
        if isinstance(STRUCTURES[name], NM):
            for masks in [m for n, m in sequence[-1].items() if n.startswith(i)]:
                parts = np.swapaxes(masks, -1, -2).reshape(-1, 4)
                assert (parts.sum(1) == 2).all()


# ------------------------------------------------------------------ a layer is never emptied


@functools.cache
def lopsided():
    """Weights of which one layer is far smaller than the other, and gradients likewise."""
    shapes = {"a": (40, 30), "b": (40, 30)}
    params = some_tree(shapes, 0)
    return {"a": params["a"] * np.float32(1e-6), "b": params["b"]}


def last_masks(tx, steps=9):
    params = lopsided()
    state = tx.init(params)
    params = rigl_optax.apply_masks(params, state)
    update = jax.jit(tx.update)
    for t in range(steps):
        grads = {n: g * np.float32(1e-6 if n == "a" else 1) for n, g in lopsided().items()}
        grads = {n: g + some_tree({n: g.shape}, t)[n] * g.std() for n, g in grads.items()}
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return jax.device_get(state.masks)


@pytest.mark.parametrize("drop", [0.5, 1.0])
def test_what_moves_between_layers_leaves_each_what_its_units_need(drop):
    tx = rigl_optax.sparse_momentum(
        optax.sgd(0.01), rigl_optax.uniform(0.8), end=9, every=1, redistribute=True, min_fan_in=6,
        drop_fraction=rigl_optax.constant_drop_fraction(drop),
    )  # fmt: skip
    masks = last_masks(tx)
    assert sum(m.sum() for m in masks.values()) == 480
    assert all((m.sum(0) >= 6).all() for m in masks.values())


@pytest.mark.parametrize(
    "make",
    [
        functools.partial(
            rigl_optax.sparse_momentum,
            redistribute=True,
            drop_fraction=rigl_optax.constant_drop_fraction(1.0),
        ),
        functools.partial(rigl_optax.gradual_magnitude_pruning, scope="global"),
        functools.partial(rigl_optax.granet, drop_fraction=rigl_optax.constant_drop_fraction(0.0)),
    ],
    ids=["snfs", "gmp", "granet"],
)
def test_no_layer_is_emptied(make):
    masks = last_masks(make(optax.sgd(0.01), rigl_optax.uniform(0.8), end=9, every=1))
    assert sum(m.sum() for m in masks.values()) == 480
    assert 1 <= masks["a"].sum() < masks["b"].sum()


def test_pruning_refuses_masks_with_more_zeros_than_it_is_to_end_with():
    masks = first_masks({".": STRUCTURES[SINGLE]}, {"x1": SHAPE, "x2": SHAPE}, False)
    for method in (m for m in FALLING if m != "granet"):
        tx = METHODS[method](
            optax.sgd(0.1), rigl_optax.uniform(0.3), initial_masks=masks, initial_sparsity=0.0
        )
        with pytest.raises(
            ValueError, match=r"initial_masks: .* start with \d+ zeros and end with \d+"
        ):
            tx.init(some_tree({"x1": SHAPE, "x2": SHAPE}, 0))


def test_a_least_fan_in_counts_the_weights_of_masks_that_are_given():
    params = some_tree({"x1": SHAPE}, 0)
    masks = first_masks({".": STRUCTURES[SINGLE]}, {"x1": SHAPE}, False)
    make = functools.partial(rigl_optax.rigl, optax.sgd(0.1), end=9, initial_masks=masks)
    make(0.99, min_fan_in=8).init(params)
    with pytest.raises(ValueError, match="96 active weights for 12 units; at most 8"):
        make(None, min_fan_in=9).init(params)
