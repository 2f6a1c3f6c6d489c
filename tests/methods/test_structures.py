"""Structures under every method: whole groups, exact counts, and a restatement in NumPy."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rigl_optax
from rigl_optax import NM, Block, ConstantFanIn, Grown, Unstructured
from tests.core import reference as core
from tests.methods import reference
from tests.methods.test_trajectories import growth_scores

SHAPES = {"a": (16, 12), "b": (3, 3, 4, 8), "c": (10, 7), "d": (5,), "e": (6, 5)}
STRUCTURE = {"a|b": Block(4, 2), "c": Block(3, 2, pool_by="l2", pad=True)}
# Where connections move between layers, all groups have as many weights.
EQUAL = {"a": (16, 12), "b": (2, 2, 8, 2), "d": (5,)}
EQUAL_STRUCTURE = {"a": Block(8, 4, pool_by="max"), "b": Block(4, 2)}
ERK = rigl_optax.erk(0.6)
PLAN = {"end": 12, "every": 3, "begin": 2, "seed": 3}
FRACTION = 0.4
DROP = {"drop_fraction": rigl_optax.constant_drop_fraction(FRACTION)}
STEPS = 14


def some_tree(shapes, seed):
    rng = np.random.default_rng(seed)
    return {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}


# ------------------------------------------------------------------ groups, one after the other


def slices_of(structure, shape):
    """The grid's shape, and for each of its positions the part of a layer that is its group."""
    if structure is None or isinstance(structure, Unstructured):
        return shape, {i: i for i in np.ndindex(shape)}
    grid = (math.ceil(shape[-2] / structure.rows), math.ceil(shape[-1] / structure.cols))
    part = lambda i, step: slice(i * step, (i + 1) * step)
    return grid, {
        (i, j): (..., part(i, structure.rows), part(j, structure.cols)) for i, j in np.ndindex(grid)
    }


def pooled(structure, x):
    grid, parts = slices_of(structure, x.shape)
    norm = {
        "l1": lambda g: np.mean(np.abs(g)),
        "l2": lambda g: np.sqrt(np.mean(g * g)),
        "max": lambda g: np.max(np.abs(g)),
    }[structure.pool_by if isinstance(structure, Block) else "max"]
    result = np.zeros(grid, np.float32)
    for i, part in parts.items():
        result[i] = norm(np.atleast_1d(x[part]).astype(np.float64))
    return result


def groups(structure, mask):
    grid, parts = slices_of(structure, mask.shape)
    result = np.zeros(grid, bool)
    for i, part in parts.items():
        assert mask[part].all() or not mask[part].any(), "a group is active in part"
        result[i] = np.all(mask[part])
    return result


def expanded(structure, mask, shape):
    result = np.zeros(shape, bool)
    for i, part in slices_of(structure, shape)[1].items():
        result[part] = mask[i]
    return result


def on_groups(ref, structures, shapes):
    """The restatement of a method, in which groups take the place of weights."""
    plain = ref.rewire

    def rewire(t, state, params, grads):
        pool = lambda tree: {
            n: pooled(structures.get(n), tree[n]) if n in ref.sparse else tree[n] for n in tree
        }
        masks = {
            n: groups(structures.get(n), m) if n in ref.sparse else m
            for n, m in state.masks.items()
        }
        if isinstance(ref, reference.Snfs):
            elements, ref.average = ref.average, pool(ref.average)
        new = plain(t, core.State(masks, {}), pool(params), pool(grads))
        if isinstance(ref, reference.Snfs):
            ref.average = elements
        return {n: expanded(structures.get(n), m, shapes[n]) for n, m in new.items()}

    ref.rewire = rewire
    return ref


# ---------------------------------------------------------------------------------- the methods

GRIDS = {"a": (4, 6), "b": (1, 4), "c": (4, 4), "d": (5,), "e": (6, 5)}
EQUAL_GRIDS = {"a": (2, 3), "b": (2, 1), "d": (5,)}


def sgd():
    return optax.sgd(0.05, momentum=0.9)


OWN, ALL = (SHAPES, STRUCTURE), (EQUAL, EQUAL_STRUCTURE)
CASES = {
    "rigl": (rigl_optax.rigl, PLAN | DROP, OWN, core.Reference, {}),
    "set": (
        rigl_optax.sparse_evolutionary_training,
        PLAN | DROP,
        OWN,
        reference.Set,
        {"scores": growth_scores(3, GRIDS)},
    ),
    "snfs": (rigl_optax.sparse_momentum, PLAN | DROP, OWN, reference.Snfs, {}),
    "snfs, redistributed": (
        rigl_optax.sparse_momentum,
        PLAN | DROP | {"redistribute": True},
        ALL,
        reference.Snfs,
        {"redistribute": True},
    ),
    "dsr": (
        rigl_optax.dynamic_sparse_reparameterization,
        PLAN | DROP | {"initial_threshold": 0.5},
        ALL,
        reference.Dsr,
        {"scores": growth_scores(3, EQUAL_GRIDS), "threshold": 0.5},
    ),
    "pruning": (rigl_optax.gradual_magnitude_pruning, PLAN, OWN, reference.Pruning, {}),
    "granet": (
        rigl_optax.granet,
        PLAN | DROP,
        ALL,
        reference.Pruning,
        {"whole": True, "regrow": True},
    ),
}


def sparse_of(shapes):
    return [n for n in shapes if n != "d"]


def structures_of(shapes):
    if shapes is EQUAL:
        return EQUAL_STRUCTURE
    return {"a": STRUCTURE["a|b"], "b": STRUCTURE["a|b"], "c": STRUCTURE["c"]}


def make(name):
    transform, keys, (_, structure), _, _ = CASES[name]
    return transform(sgd(), ERK, structure=structure, **keys)


def place(tree, devices):
    mesh = jax.make_mesh((devices,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    def put(x):
        spec = [None] * x.ndim
        for axis in [i for i, n in enumerate(x.shape) if n % devices == 0][:1]:
            spec[axis] = "x"
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        return jax.device_put(x, sharding)

    return jax.tree.map(put, tree)


@functools.cache
def run(name, devices=1):
    """Params and state before the first step and after each."""
    shapes, tx = CASES[name][2][0], make(name)
    params = some_tree(shapes, 0)
    state = jax.jit(tx.init)(params)
    params = rigl_optax.apply_masks(params, state)
    if devices > 1:
        params, state = place((params, state), devices)
    step = jax.jit(tx.update)
    history = [jax.device_get((params, state))]
    for t in range(STEPS):
        updates, state = step(some_tree(shapes, 100 + t), state, params)
        params = optax.apply_updates(params, updates)
        history.append(jax.device_get((params, state)))
    return history


def wanted_groups(name):
    """Of each sparse layer `floor(s * groups)` are inactive in the end."""
    shapes = CASES[name][2][0]
    final = ERK({n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in shapes.items()})
    grids = {n: slices_of(structures_of(shapes).get(n), shapes[n])[0] for n in sparse_of(shapes)}
    return {n: math.prod(g) - math.floor(final[n] * math.prod(g)) for n, g in grids.items()}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_restatement_over_a_trajectory(name):
    _, keys, (shapes, _), restate, more = CASES[name]
    sparse, structures = sparse_of(shapes), structures_of(shapes)
    params, state = run(name)[0]
    masks = {n: np.asarray(state.masks[n]) for n in sparse}
    if restate is reference.Pruning:
        start = {n: int((~groups(structures.get(n), m)).sum()) for n, m in masks.items()}
        grids = {n: slices_of(structures.get(n), shapes[n])[0] for n in sparse}
        wanted = wanted_groups(name)
        zeros = {n: math.prod(grids[n]) - wanted[n] for n in sparse}
        more = more | {"start": start, "zeros": zeros}
    plan = {k: keys[k] for k in ("begin", "end", "every")}
    ref = restate(
        inner=core.Momentum(0.05, 0.9),
        sparse=frozenset(sparse),
        fraction=FRACTION,
        **plan,
        **more,
    )
    ref = on_groups(ref, structures, shapes)
    expected = ref.init(params, masks)
    weights = {n: np.asarray(p) for n, p in params.items()}
    for t, (params, state) in enumerate(run(name)[1:]):
        updates, expected = ref.update(some_tree(shapes, 100 + t), expected, weights)
        weights = core.apply_updates(weights, updates)
        for n in shapes:
            np.testing.assert_array_equal(state.masks[n], expected.masks[n], err_msg=f"{t} {n}")
            np.testing.assert_allclose(params[n], weights[n], rtol=1e-5, atol=1e-6)
        weights = {n: np.asarray(p) for n, p in params.items()}  # no drift of rounding
        expected.slots = {n: {"trace": state.inner_state[0].trace[n]} for n in shapes}
    assert int(state.rewirings) == expected.rewirings == 4


@pytest.mark.parametrize("name", CASES)
def test_zeros_and_counts_of_groups_are_exact(name):
    shapes = CASES[name][2][0]
    structures, wanted = structures_of(shapes), wanted_groups(name)
    totals, moved = [], False
    for params, state in run(name):
        counts = {n: int(groups(structures.get(n), state.masks[n]).sum()) for n in wanted}
        for n in shapes:
            assert not params[n][~state.masks[n]].any()
        assert state.masks["d"].all()
        if name in ("rigl", "set", "snfs"):
            assert counts == wanted
        totals.append(sum(counts.values()))
        moved |= any((state.masks[n] != run(name)[0][1].masks[n]).any() for n in wanted)
    assert moved
    assert totals == sorted(totals, reverse=True)
    assert totals[-1] == sum(wanted.values())


def test_the_same_on_eight_devices_and_packed(monkeypatch):
    """The leaves lie side by side with one device alone; the tests have eight."""
    name = "rigl"
    one, eight = run(name), run(name, devices=8)
    with monkeypatch.context() as patch:
        patch.setattr(jax, "device_count", lambda *_: 1)
        packed = run.__wrapped__(name)
    for (_, a), (_, b), (_, c) in zip(one, eight, packed, strict=True):
        for n in a.masks:
            np.testing.assert_array_equal(a.masks[n], b.masks[n])
            np.testing.assert_array_equal(a.masks[n], c.masks[n])


def test_a_stack_of_layers_is_so_many_layers():
    layers = rigl_optax.uniform(0.5, stacked=("x",))
    tx = rigl_optax.rigl(sgd(), layers, structure=Block(4, 2), **PLAN, **DROP)
    single = rigl_optax.uniform(0.5)
    one = rigl_optax.rigl(sgd(), single, structure=Block(4, 2), **PLAN, **DROP)
    tree = lambda seed: np.random.default_rng(seed).standard_normal((3, 8, 6)).astype(np.float32)
    params, state = {"x": tree(0)}, tx.init({"x": tree(0)})
    masks = np.asarray(state.masks["x"])
    assert [int(groups(Block(4, 2), m).sum()) for m in masks] == [3, 3, 3]
    params = rigl_optax.apply_masks(params, state)
    alone = one.init({"x": params["x"][1]})._replace(masks={"x": state.masks["x"][1]})
    weights = {"x": params["x"][1]}
    update, update_one = jax.jit(tx.update), jax.jit(one.update)
    for t in range(6):
        updates, state = update({"x": tree(t)}, state, params)
        params = optax.apply_updates(params, updates)
        updates, alone = update_one({"x": tree(t)[1]}, alone, weights)
        weights = optax.apply_updates(weights, updates)
        np.testing.assert_array_equal(state.masks["x"][1], alone.masks["x"])
    assert not np.array_equal(state.masks["x"], masks)


@pytest.mark.parametrize(
    "transform",
    [
        rigl_optax.dnw,
        functools.partial(rigl_optax.top_kast, backward_sparsity=rigl_optax.uniform(0.25)),
    ],
)
def test_weights_that_live_on_unseen_show_in_whole_groups(transform):
    shapes = {"a": (16, 12), "d": (5,)}
    block = Block(4, 2)
    tx = transform(sgd(), rigl_optax.uniform(0.5), every=2, structure=block, seed=1)
    params = some_tree(shapes, 0)
    state = tx.init(params)
    params = rigl_optax.apply_masks(params, state)
    update = jax.jit(tx.update)
    seen = []
    for t in range(5):
        updates, state = update(some_tree(shapes, t), state, params)
        params = optax.apply_updates(params, updates)
        mask = np.asarray(state.masks["a"])
        shown = groups(block, mask)
        assert shown.sum() == 12
        assert not np.asarray(params["a"])[~mask].any()
        if t % 2 == 0:  # a renewal: the largest of what has just been moved
            scores = pooled(block, np.asarray(state.shadow["a"]))
            np.testing.assert_array_equal(shown, core.top_k_mask(scores.view(np.int32), 12))
        seen.append(shown)
    assert not np.array_equal(seen[0], seen[-1])
    if jax.tree.leaves(state.memory.second_masks):
        assert groups(block, np.asarray(state.memory.second_masks["a"])).sum() == 18


def test_new_weights_of_a_group_may_start_each_at_its_own_value():
    tx = rigl_optax.rigl(
        sgd(), 0.5, structure=Block(4, 2), grown=Grown(value="gradient"), end=10, every=5, **DROP
    )
    shapes = {"a": (16, 12)}
    params = some_tree(shapes, 0)
    state = tx.init(params)
    params = rigl_optax.apply_masks(params, state)
    grads = some_tree(shapes, 1)
    updates, after = tx.update(grads, state, params)
    new = np.asarray(after.masks["a"] & ~state.masks["a"])
    params = optax.apply_updates(params, updates)
    assert new.any()
    np.testing.assert_allclose(np.asarray(params["a"])[new], grads["a"][new], rtol=1e-6)


def test_a_least_fan_in_counts_groups():
    shapes = {"a": (16, 12)}
    tx = rigl_optax.rigl(
        sgd(), 0.7, structure=Block(4, 2), min_fan_in=1, end=10, every=2, begin=0, **DROP
    )
    params = some_tree(shapes, 0)
    state = tx.init(params)
    params = rigl_optax.apply_masks(params, state)
    update = jax.jit(tx.update)
    for t in range(5):
        updates, state = update(some_tree(shapes, t), state, params)
        params = optax.apply_updates(params, updates)
        assert (groups(Block(4, 2), np.asarray(state.masks["a"])).sum(0) >= 1).all()


def test_init_of_shapes_and_float16():
    tx = rigl_optax.rigl(sgd(), 0.5, structure=Block(4, 2, pool_by="l2"), end=10)
    state = jax.eval_shape(tx.init, {"a": jax.ShapeDtypeStruct((8, 8), jnp.bfloat16)})
    assert state.masks["a"].shape == (8, 8)
    params = {"a": jnp.ones((8, 8), jnp.bfloat16)}
    updates, _ = tx.update(params, tx.init(params), params)
    assert updates["a"].dtype == jnp.bfloat16


def quadratic(params, x):
    """Its gradient by `w` is `w * x` : scores are known."""
    return jnp.sum(params["w"] ** 2 * x) / 2


SALIENCY = {
    "magnitude": lambda p, x, **k: rigl_optax.magnitude_masks(p, 0.5, **k),
    "snip": lambda p, x, **k: rigl_optax.snip_masks(p, 0.5, quadratic, [x], **k),
    "grasp": lambda p, x, **k: rigl_optax.grasp_masks(p, 0.5, quadratic, [x], **k),
    "synflow": lambda p, x, **k: rigl_optax.synflow_masks(
        p, 0.5, lambda q, ones: q["w"].sum() * ones.sum(), (1,), iterations=1, **k
    ),
}


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("name", SALIENCY)
def test_saliency_of_groups(name, scope):
    block = Block(4, 2, pool_by="l2")
    rng = np.random.default_rng(0)
    w, x = rng.standard_normal((2, 16, 12)).astype(np.float32)
    masks = SALIENCY[name]({"w": jnp.asarray(w)}, jnp.asarray(x), scope=scope, structure=block)
    scores = {"magnitude": w, "snip": w * w * x, "grasp": (w * x) ** 2, "synflow": w}[name]
    if name == "grasp":  # w * H g = w * x * (w * x); the mean, all above 0 here
        pooled_scores = scores.reshape(4, 4, 6, 2).mean((1, 3))
    else:
        pooled_scores = pooled(block, scores)
    wanted = core.top_k_mask(pooled_scores.astype(np.float32).view(np.int32), 12)
    np.testing.assert_array_equal(groups(block, np.asarray(masks["w"])), wanted)
    tx = rigl_optax.static_sparse(sgd(), 0.5, structure=block, initial_masks=masks)
    np.testing.assert_array_equal(tx.init({"w": w}).masks["w"], masks["w"])


@pytest.mark.parametrize("structure", [Block(2, 2), NM(1, 2), ConstantFanIn()])
def test_masks_that_are_given_are_checked_when_init_is_traced_too(structure):
    w = jnp.asarray(np.random.default_rng(0).standard_normal((4, 4)), jnp.float32)
    masks = rigl_optax.magnitude_masks({"w": w}, 0.5, structure=structure)
    static = functools.partial(rigl_optax.static_sparse, sgd(), 0.5, structure=structure)
    found = jax.jit(static(initial_masks=masks).init)({"w": w}).masks["w"]
    np.testing.assert_array_equal(found, masks["w"])
    with pytest.raises(ValueError, match="does not fit"):
        jax.jit(static(initial_masks={"w": np.tri(4, dtype=bool)}).init)({"w": w})


def test_saliency_with_a_constant_fan_in():
    w = np.random.default_rng(0).standard_normal((8, 5)).astype(np.float32)
    mask = rigl_optax.magnitude_masks({"w": w}, 0.5, structure=ConstantFanIn())["w"]
    for unit in range(5):
        kept = np.sort(np.argsort(-np.abs(w[:, unit]))[:4])
        np.testing.assert_array_equal(np.flatnonzero(mask[:, unit]), kept)


# --------------------------------------------------------- parts with as many weights each: N:M

PARTS = {"a": NM(2, 4), "b": ConstantFanIn(), "c": ConstantFanIn()}
PART_SHAPES = {"a": (2, 8, 3), "b": (3, 3, 2, 5), "c": (12, 7), "d": (5,)}
HALF = rigl_optax.uniform(0.5, overrides={"c": 0.7})


def in_parts(structure, x):
    """Unit by unit, along the inputs; [parts, weights]."""
    units = x.reshape(-1, x.shape[-1]).T
    return units.reshape(-1, structure.m) if isinstance(structure, NM) else units


def run_parts(tx, steps=STEPS):
    params = some_tree(PART_SHAPES, 0)
    state = jax.jit(tx.init)(params)
    params = rigl_optax.apply_masks(params, state)
    step = jax.jit(tx.update)
    history = [jax.device_get((params, state))]
    for t in range(steps):
        updates, state = step(some_tree(PART_SHAPES, 100 + t), state, params)
        params = optax.apply_updates(params, updates)
        history.append(jax.device_get((params, state)))
    return history


def part_scores(name):
    """Growth of SET, drawn on the grid."""
    grids = {n: in_parts(PARTS[n], np.zeros(s)).shape for n, s in PART_SHAPES.items() if n in PARTS}
    return growth_scores(3, grids | {"d": (5,)})


@pytest.mark.parametrize("name", ["rigl", "set"])
def test_parts_drop_in_the_layer_and_regrow_each_for_itself(name):
    transform = CASES[name][0]
    history = run_parts(transform(sgd(), HALF, structure=PARTS, **PLAN, **DROP))
    drawn = part_scores(name)
    for t in range(STEPS):
        (params, before), (after_params, after) = history[t : t + 2]
        rewires = PLAN["begin"] <= t < PLAN["end"] and (t - PLAN["begin"]) % PLAN["every"] == 0
        for n, structure in PARTS.items():
            mask, new = in_parts(structure, before.masks[n]), in_parts(structure, after.masks[n])
            if not rewires:
                np.testing.assert_array_equal(mask, new)
                continue
            kept = core.kept_mask(mask, in_parts(structure, params[n]), FRACTION)
            gradient = np.abs(in_parts(structure, some_tree(PART_SHAPES, 100 + t)[n]))
            scores = gradient if name == "rigl" else drawn(t, n)
            for i, (m, k) in enumerate(zip(mask, kept, strict=True)):
                grown = reference.grow_largest(k, scores[i], int(m.sum() - k.sum()))
                np.testing.assert_array_equal(new[i], grown)
            assert (mask != new).any()
            assert not after_params[n][~after.masks[n]].any()


@pytest.mark.parametrize(
    "make",
    [
        lambda **k: rigl_optax.static_sparse(sgd(), HALF, **k),
        lambda **k: rigl_optax.rigl(sgd(), HALF, **PLAN, **k),
        lambda **k: rigl_optax.sparse_momentum(sgd(), HALF, **PLAN, **k),
        lambda **k: rigl_optax.gradual_magnitude_pruning(sgd(), HALF, **PLAN, **k),
        lambda **k: rigl_optax.granet(sgd(), HALF, scope="layer", **PLAN, **k),
        lambda **k: rigl_optax.dnw(sgd(), HALF, **k),
    ],
    ids=["static", "rigl", "snfs", "gmp", "granet", "dnw"],
)
def test_every_part_has_its_number(make):
    history = run_parts(make(structure=PARTS))
    for params, state in history[::3]:
        for n, one in PARTS.items():
            assert len(set(in_parts(one, state.masks[n]).sum(1).tolist())) == 1
            assert not params[n][~state.masks[n]].any()
    masks = history[-1][1].masks
    assert set(in_parts(PARTS["a"], masks["a"]).sum(1)) == {2}
    assert set(in_parts(PARTS["b"], masks["b"]).sum(1)) == {9}
    assert set(in_parts(PARTS["c"], masks["c"]).sum(1)) == {12 - 8}


def test_top_kast_with_a_constant_fan_in():
    layers = rigl_optax.uniform(0.5)
    tx = rigl_optax.top_kast(
        sgd(), layers, backward_sparsity=rigl_optax.uniform(0.25), every=2,
        structure=ConstantFanIn(),
    )  # fmt: skip
    _, state = run_parts(tx, 3)[-1]
    assert set(state.masks["c"].sum(0)) == {6} and set(state.memory.second_masks["c"].sum(0)) == {9}


def test_a_stack_of_layers_with_a_constant_fan_in():
    tx = rigl_optax.rigl(
        sgd(), rigl_optax.uniform(0.5, stacked=("x",)), structure=ConstantFanIn(), **PLAN, **DROP
    )
    tree = lambda t: {"x": np.random.default_rng(t).standard_normal((3, 8, 5)).astype(np.float32)}
    params, state = tree(0), tx.init(tree(0))
    params = rigl_optax.apply_masks(params, state)
    before = np.asarray(state.masks["x"])
    update = jax.jit(tx.update)
    for t in range(3):
        weights = np.asarray(params["x"])
        updates, state = update(tree(t), state, params)
        params = optax.apply_updates(params, updates)
    after = np.asarray(state.masks["x"])
    assert (after.sum(1) == 4).all() and (after != before).any()
    for layer in range(3):  # each drops by itself: int(20 * .4)
        kept = core.kept_mask(before[layer].T, weights[layer].T, FRACTION)
        assert (after[layer].T[kept]).all()


# -------------------------------------------------------------------------------------- pooling


@pytest.mark.parametrize("pool_by", ["l1", "l2", "max"])
@pytest.mark.parametrize("shape, block", [((8, 6), (4, 2)), ((3, 2, 4, 6), (2, 3))])
def test_pools(pool_by, shape, block):
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    structure = Block(*block, pool_by=pool_by)
    np.testing.assert_allclose(structure.pool(jnp.asarray(x)), pooled(structure, x), rtol=1e-6)


def test_masks_and_groups_are_inverse_to_each_other():
    for block, shape in itertools.product(
        [Block(2, 3), Block(4, 4, pad=True)], [(6, 9), (2, 4, 3)]
    ):
        grid = block.grid(shape, "x")
        mask = np.random.default_rng(1).random(grid) < 0.5
        wide = np.asarray(block.expand(jnp.asarray(mask), shape))
        np.testing.assert_array_equal(wide, expanded(block, mask, shape))
        np.testing.assert_array_equal(block.groups(jnp.asarray(wide)), mask)


# --------------------------------------------------------------------------------------- errors


def rigl(structure, **keys):
    return rigl_optax.rigl(sgd(), 0.5, structure=structure, **({"end": 10} | keys))


@pytest.mark.parametrize(
    "act, error, message",
    [
        (lambda: Block(0, 4), ValueError, r"rows=0: must be an integer of at least 1"),
        (lambda: Block(4, 4, pool_by="l3"), ValueError, r"pool_by='l3'.* l1, l2, max"),
        (lambda: rigl("block"), TypeError, r"structure='block'.*Block\(rows, cols\)"),
        (lambda: rigl({"a": 4}), TypeError, r"structure\['a'\]=4"),
        (lambda: rigl({"(": Block(4, 4)}), ValueError, r"structure: '\(' is not a regular"),
        (
            lambda: rigl({"f": Block(4, 2)}).init(some_tree(SHAPES, 0)),
            ValueError,
            r"'f' matches no sparse leaf; sparse leaves are 'a', 'b'",
        ),
        (
            lambda: rigl({"a": Block(4, 2), "a|b": Block(2, 2)}).init(some_tree(SHAPES, 0)),
            ValueError,
            r"'a' is matched by 'a' and 'a\|b'",
        ),
        (
            lambda: rigl(Block(4, 2)).init(some_tree({**SHAPES, "c": (50, 35)}, 0)),
            ValueError,
            r"does not divide 'c' of 50 inputs x 35 outputs.*pad=True",
        ),
        (
            lambda: rigl(
                Block(2, 2), initial_masks={"a": np.eye(4, dtype=bool)}
            ).init({"a": np.ones((4, 4), np.float32)}),
            ValueError,
            r"'a' does not fit Block\(.*groups are active in part",
        ),
        (
            lambda: rigl_optax.granet(sgd(), 0.5, end=10, structure={"a": Block(4, 2)}).init(
                some_tree(SHAPES, 0)
            ),
            ValueError,
            r"groups of as many weights in all of them.*a: 8.*b: 1",
        ),
        (lambda: NM(5, 4), ValueError, r"NM\(5, 4\): must be integers, 1 <= n <= m"),
        (
            lambda: rigl(NM(2, 4)).init({"c": np.ones((10, 8), np.float32)}),
            ValueError,
            r"4 does not divide the 10 inputs of 'c'",
        ),
        (
            lambda: rigl(NM(1, 4)).init({"a": np.ones((8, 8), np.float32)}),
            ValueError,
            r"sparsity of 'a' is 0.5, must be 0.75: uniform\(0.75\)",
        ),
        (
            lambda: rigl(ConstantFanIn(), min_fan_in=1).init({"a": np.ones((8, 8), np.float32)}),
            ValueError,
            r"min_fan_in=1: 'a' has ConstantFanIn\(min_salient=0.0\)",
        ),
        (
            lambda: rigl_optax.granet(sgd(), 0.5, end=10, structure=ConstantFanIn()).init(
                {"a": np.ones((8, 8), np.float32)}
            ),
            ValueError,
            r"ConstantFanIn\(min_salient=0.0\), which fixes how many",
        ),
        (
            lambda: rigl(
                ConstantFanIn(), initial_masks={"a": np.tri(4, dtype=bool)}
            ).init({"a": np.ones((4, 4), np.float32)}),
            ValueError,
            r"units differ in their fan-in",
        ),
        (
            lambda: rigl(
                NM(1, 2), initial_masks={"a": np.tri(4, dtype=bool)}
            ).init({"a": np.ones((4, 4), np.float32)}),
            ValueError,
            r"groups of 2 have not 1 each",
        ),
    ],
)  # fmt: skip
def test_errors(act, error, message):
    with pytest.raises(error, match=message):
        act()
