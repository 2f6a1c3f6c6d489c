"""Layouts: what counts the inputs of a unit finds them along whatever axes they lie."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import rigl_optax
import rigl_optax.analysis
from rigl_optax import NM, Block, ConstantFanIn, KernelAxes, _layout, uniform
from rigl_optax.condensed import condense, condense_csr

PLAN = {"begin": 0, "end": 12, "every": 2}
# As the layout (*window, in, out) has it.
SHAPES = {"dense": (8, 6), "conv": (3, 2, 4, 8), "stack": (2, 12, 4)}


def sgd():
    return optax.sgd(0.1, momentum=0.9)


def turned(tree):
    """From Flax's layout to Equinox's: the same layers, (out, in, *window)."""

    def turn(path, x):
        first = int("stack" in jax.tree_util.keystr(path))
        return np.moveaxis(np.asarray(x), (-1, -2), (first, first + 1))

    layers = jax.tree_util.tree_map_with_path(turn, tree)
    return jax.tree.map(lambda x: {"weight": x["kernel"]}, layers, is_leaf=lambda x: "kernel" in x)


def both(tree):
    return {"flax": tree, "equinox": turned(tree)}


def trajectory(structures, distribution, **options):
    """Masks of the same layers in both layouts, trained side by side."""

    def some_tree(seed):
        rng = np.random.default_rng(seed)
        draw = lambda shape: {"kernel": rng.standard_normal(shape).astype(np.float32)}
        return {kind: {n: draw(s) for n, s in SHAPES.items()} for kind in structures}

    params = both(some_tree(0))
    options = {"structure": structures, **options}
    drawn = rigl_optax.rigl(sgd(), distribution, **PLAN, **options).init(params["flax"])
    masks = both(drawn.masks)
    tx = rigl_optax.rigl(sgd(), distribution, initial_masks=masks, **PLAN, **options)
    state, found = tx.init(params), []
    update = jax.jit(tx.update)
    for step in range(1, 6):
        updates, state = update(both(some_tree(step)), state, params)
        params = optax.apply_updates(params, updates)
        found.append((state.masks, params))
    for trees in found:
        for tree in trees:
            jax.tree.map(np.testing.assert_array_equal, turned(tree["flax"]), tree["equinox"])
    for path, mask in jax.tree_util.tree_leaves_with_path(state.masks):
        first = jax.tree_util.tree_leaves_with_path(masks)
        assert (np.asarray(mask) != np.asarray(dict(first)[path])).any(), path
    return state.masks["equinox"]


def test_a_layer_in_the_layout_of_equinox_is_trained_as_in_that_of_flax():
    structures = {
        "blocks": Block(2, 2),
        "fan_in": ConstantFanIn(),
        "ablation": ConstantFanIn(0.9),
        "n_of_m": NM(2, 4),
    }
    masks = trajectory(structures, uniform(0.5, stacked=("stack",)), drop_fraction=lambda t: 0.4)
    fan_in = masks["fan_in"]["conv"]["weight"].sum((1, 2, 3))
    assert set(fan_in.tolist()) == {12}
    assert set(masks["fan_in"]["stack"]["weight"].sum(2).ravel().tolist()) == {6}
    n_of_m = np.moveaxis(np.asarray(masks["n_of_m"]["dense"]["weight"]), 0, 1)
    assert set(n_of_m.reshape(2, 4, 6).sum(1).ravel().tolist()) == {2}


def test_min_fan_in_counts_the_inputs_of_each_unit():
    # Few enough are dropped that all that is protected is kept: no ties, which go by index.
    masks = trajectory(
        {"single": rigl_optax.Unstructured(), "blocks": Block(1, 2)},
        uniform(0.5, stacked=("stack",)),
        drop_fraction=lambda t: 0.15,
        min_fan_in=1,
    )
    single = masks["single"]
    assert single["dense"]["weight"].sum(1).min() >= 1
    assert single["stack"]["weight"].sum(2).min() >= 1
    assert single["conv"]["weight"].sum((1, 2, 3)).min() >= 1


def test_random_layouts_go_there_and_back():
    rng = np.random.default_rng(0)
    for _ in range(10):
        sizes = tuple(map(int, rng.choice([1, 2, 3], rng.integers(2, 6))))
        ends = sorted(rng.integers(0, len(sizes) + 1, 2))
        window, *rest = np.split(rng.permutation(len(sizes)), ends)
        axes = KernelAxes(*(tuple(map(int, part)) for part in rest))
        window = sorted(map(int, window))
        mask = rng.random(sizes) < 0.5
        kernel = mask.transpose(*window, *axes.inputs, *axes.outputs)
        n = [int(np.prod([sizes[a] for a in part])) for part in axes]
        kernel = kernel.reshape(*(sizes[a] for a in window), *n)
        leaf = _layout.layout(
            {"x": of_shape(2, *sizes)},
            uniform(0.0, axes=lambda *_, a=axes: a, dense=lambda *_: False, stacked=("x",)),
            masked=False,
            structure=ConstantFanIn(),
        ).sparse[0]
        assert leaf.kernel == kernel.shape
        groups = leaf.groups(jnp.stack([mask, ~mask]))
        np.testing.assert_array_equal(groups[0], np.moveaxis(kernel, -1, 0))
        np.testing.assert_array_equal(leaf.expand(groups)[1], ~mask)
        assert leaf.misfit(np.stack([mask, mask])) == ConstantFanIn().misfit(kernel)


def attention(x):
    shapes = {"query": (16, 4, 8), "out": (4, 8, 16)}
    return {"attn": {name: {"kernel": x.reshape(shape)} for name, shape in shapes.items()}}


@pytest.mark.parametrize("structure", [Block(4, 2), ConstantFanIn()], ids=["block", "fan_in"])
def test_attention_kernels_have_groups_of_all_their_inputs(structure):
    """As kernels of two axes, and wherever they are."""
    x = np.random.default_rng(0).standard_normal(512).astype(np.float32)
    flat = {"attn": {"query": {"kernel": x.reshape(16, 32)}, "out": {"kernel": x.reshape(32, 16)}}}
    tx = rigl_optax.rigl(sgd(), uniform(0.5), structure=structure, **PLAN)
    update = jax.jit(tx.update)
    _, expected = update(flat, tx.init(flat), flat)
    trees = [attention(x)]
    if jax.device_count() >= 8:
        mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
        for spec in (("x", "y", None), (None, "x", "y"), ("y", None, "x")):
            place = functools.partial(jax.device_put, device=NamedSharding(mesh, P(*spec)))
            trees.append(jax.tree.map(place, attention(x)))
    for tree in trees:
        _, state = update(tree, tx.init(tree), tree)
        for one, other in zip(
            jax.tree.leaves(state.masks), jax.tree.leaves(expected.masks), strict=True
        ):
            np.testing.assert_array_equal(np.asarray(one).reshape(other.shape), other)


# ------------------------------------------------------------------------------- by name


def of_shape(*shape):
    return jax.ShapeDtypeStruct(shape, np.float32)


@pytest.mark.parametrize(
    ("path", "shape", "inputs", "outputs"),
    [
        ("Dense_0/kernel", (8, 4), (0,), (1,)),
        ("Conv_0/kernel", (3, 3, 8, 4), (2,), (3,)),
        ("out/kernel", (3, 8, 4), (1,), (2,)),
        ("attn/query/kernel", (16, 2, 8), (0,), (1, 2)),
        ("MultiHeadDotProductAttention_0/out/kernel", (2, 8, 16), (0, 1), (2,)),
        ("attn/query/kernel", (16, 8), (0,), (1,)),
        ("linear/w", (8, 4), (0,), (1,)),
        ("layers/0/weight", (4, 8), (1,), (0,)),
        ("conv/weight", (4, 8, 3, 3), (1,), (0,)),
        ("cell/weight_hh", (12, 4), (1,), (0,)),
        ("norm/weight", (4,), (), (0,)),
        ("scalar", (), (), ()),
    ],
)
def test_axes_by_name(path, shape, inputs, outputs):
    assert rigl_optax.default_axes(path, of_shape(*shape)) == (inputs, outputs)


@pytest.mark.parametrize(
    ("axes", "error", "message"),
    [
        (KernelAxes((0,), (2,)), ValueError, r"\(0,\).*'a' of shape \(4, 6\).*one of its 2 axes"),
        (KernelAxes((0,), (-2,)), ValueError, "a different one"),
        ((0, 1), TypeError, r"must be KernelAxes\(inputs, outputs\)"),
    ],
)
def test_wrong_axes_are_told_by_name(axes, error, message):
    with pytest.raises(error, match=message):
        uniform(0.5, axes=lambda path, leaf: axes)({"a": np.ones((4, 6))})
    with pytest.raises(TypeError, match="axes='weight'.*function"):
        uniform(0.5, axes="weight")


def test_layers_of_equinox_are_counted_as_those_of_flax():
    """Accounting, dead units, initialisation and distributions: one question, one answer."""
    rng = np.random.default_rng(0)
    shapes = {"a": (30, 4), "conv": (3, 3, 5, 6), "stack": (2, 9, 4)}
    flax = {k: {"kernel": rng.random(s) < 0.15} for k, s in shapes.items()}
    weights = jax.tree.map(lambda m: rng.standard_normal(m.shape).astype(np.float32), flax)
    stacked = ("stack",)
    one = dict(rigl_optax.analysis.dead_units(flax, stacked=stacked))
    other = rigl_optax.analysis.dead_units(turned(flax), stacked=stacked)
    assert {k.replace("weight", "kernel"): v for k, v in other.items()} == one
    assert int(one["stack/kernel"].inputs) == int((~flax["stack"]["kernel"]).all(2).sum()) > 0
    for mode in ("unit", "layer"):
        init = rigl_optax.sparse_aware_init(weights, flax, mode=mode, stacked=stacked)
        again = rigl_optax.sparse_aware_init(
            turned(weights), turned(flax), mode=mode, stacked=stacked
        )
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-6), turned(init), again)
    active = flax["stack"]["kernel"][1, :, 2].sum()
    init = rigl_optax.sparse_aware_init(weights, flax, stacked=stacked)["stack"]["kernel"]
    expected = (weights["stack"]["kernel"] * flax["stack"]["kernel"])[1, :, 2] * (9 / active) ** 0.5
    np.testing.assert_allclose(init[1, :, 2], expected, 1e-6)
    for rule in (uniform, rigl_optax.erk, rigl_optax.erdos_renyi):
        distribution = rule(0.6, stacked=stacked)
        reports = [
            rigl_optax.explain(tree, distribution, end=9_000) for tree in (weights, turned(weights))
        ]
        assert reports[0].storage == reports[1].storage
        assert [x.active for x in reports[0].layers] == [x.active for x in reports[1].layers]
        assert [w.replace("kernel", "weight") for w in reports[0].warnings] == [
            *reports[1].warnings
        ]
    attention = {"attn": {"query": {"kernel": of_shape(16, 2, 8)}, "out": of_shape(16, 10)}}
    plain = {"attn": {"query": {"kernel": of_shape(16, 16)}, "out": of_shape(16, 10)}}
    assert rigl_optax.erdos_renyi(0.5)(attention) == rigl_optax.erdos_renyi(0.5)(plain)


def test_what_is_stored_is_of_the_layout_in_out():
    masks = {"weight": np.arange(24).reshape(6, 4) % 4 < 2}
    params = {"weight": np.ones((6, 4), np.float32)}
    for convert in (
        lambda **options: condense(params, masks, Block(2, 2), **options),
        lambda **options: condense_csr(params, masks, **options),
    ):
        with pytest.raises(ValueError, match=r"'weight'.*\(6, 4\).*\(1,\).*\(0,\).*transpose"):
            convert()
        _, topologies = convert(axes=rigl_optax.flax_axes)
        assert topologies["weight"].shape == (6, 4)


# --------------------------------------------------------------------------- stacked layers


def test_stacks_of_blocks_are_told_from_blocks_that_are_active_in_part():
    masks = {"kernel": np.zeros((3, 4, 4), bool)}
    masks["kernel"][0, :2, :2] = masks["kernel"][1, 2:, :2] = masks["kernel"][2, :2, 2:] = True
    params = {"kernel": np.ones((3, 4, 4), np.float32)}
    with pytest.raises(
        ValueError, match="each of the 3 slices .* blocks of its own.*a leaf of its"
    ):
        condense(params, masks, Block(2, 2))
    tx = rigl_optax.static_sparse(sgd(), None, structure=Block(2, 2), initial_masks=masks)
    with pytest.raises(ValueError, match="active in part; each slice .* stacked="):
        tx.init(params)
    masks["kernel"][0, 3, 3] = True
    with pytest.raises(ValueError, match="blocks are active in part; condense what"):
        condense(params, masks, Block(2, 2))


def test_masks_of_stacked_layers_without_a_distribution_ask_for_one():
    rng = np.random.default_rng(0)
    params = {"blocks": rng.standard_normal((3, 8, 4)).astype(np.float32)}
    params["blocks"][2] *= 9
    stacked = uniform(0.5, stacked=("blocks",))
    masks = rigl_optax.static_sparse(sgd(), stacked).init(params).masks
    make = functools.partial(rigl_optax.rigl, sgd(), initial_masks=masks, **PLAN)
    with pytest.warns(UserWarning, match=r"blocks \(3 of 16\).*stacked=\(pattern,\)"):
        make(None).init(params)
    tx = make(stacked)
    _, state = tx.update(params, tx.init(params), params)
    assert state.masks["blocks"].sum((1, 2)).tolist() == [16, 16, 16]
    assert (state.masks["blocks"] != masks["blocks"]).any()


def test_a_layer_whose_sparsity_is_0_needs_no_grid():
    head = uniform(0.5, overrides={"head": 0.0})
    params = {"a": np.ones((32, 32), np.float32), "head": np.ones((64, 10), np.float32)}
    for structure in (Block(16, 16), ConstantFanIn(), NM(6, 12)):
        only = {"head": structure}
        state = rigl_optax.rigl(sgd(), head, structure=only, **PLAN).init(params)
        assert state.masks["head"].all()
    with pytest.raises(ValueError, match="does not divide 'head'"):
        rigl_optax.rigl(sgd(), 0.5, structure=Block(16, 16), **PLAN).init(params)
