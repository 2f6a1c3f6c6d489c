"""Every method where weights are in parts on eight devices: as on one, and nothing is gathered."""

import functools

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import rigl_optax
from rigl_optax import NM, Block, ConstantFanIn, Grown
from tests.core.test_no_gather import collectives
from tests.methods.test_properties import CASES, ERK, PLAN, sgd

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")

SHAPES = {"a": (64, 48), "conv": (3, 3, 16, 16), "bias": (48,)}
SPECS = {
    "a": PartitionSpec("x", "y"),
    "conv": PartitionSpec(None, None, "y", "x"),
    "bias": PartitionSpec("y"),
}
ON_ONE = {name: PartitionSpec() for name in SPECS}
# The entries of the smallest part of a sparse leaf: what is weight-sized has a byte for each.
PART = 3 * 3 * 16 * 16 // 8
STEPS = 5  # rewirings at 1 and 3, or at each
HALF = rigl_optax.uniform(0.5)
STACKED = rigl_optax.uniform(0.5, stacked=("conv",))


def rigl(distribution, inner=None, **options):
    return rigl_optax.rigl(inner or sgd(), distribution, **PLAN, **options)


ALL = {name: make for name, make in CASES.items() if name != "static"} | {
    "top_kast": lambda: rigl_optax.top_kast(sgd(), STACKED, backward_sparsity=0.3, every=2),
    "deepr": lambda: rigl_optax.deep_rewiring(sgd(), ERK, learning_rate=0.05, temperature=1e-3),
    "min_fan_in": lambda: rigl(STACKED, min_fan_in=3),
    "grown normal": lambda: rigl(
        ERK, optax.adam(0.1), grown=Grown("normal", optimizer_state="mean_second_moment")
    ),
    "grown initial": lambda: rigl(ERK, grown=Grown("initial", gradient_scale=0.5)),
    "blocks": lambda: rigl(STACKED, structure=Block(4, 2)),
    "blocks over devices": lambda: rigl(HALF, structure=Block(16, 16)),
    "blocks at edges": lambda: rigl(HALF, structure=Block(5, 7, pool_by="max", pad=True)),
    "n:m": lambda: rigl(HALF, structure=NM(2, 4), grown=Grown("gradient")),
    "fan-in and n:m": lambda: rigl_optax.sparse_evolutionary_training(
        sgd(), HALF, structure={"a": ConstantFanIn(), "conv": NM(2, 4)}, **PLAN
    ),
    "ablation": lambda: rigl(STACKED, structure=ConstantFanIn(0.8)),
    "top_kast in parts": lambda: rigl_optax.top_kast(
        sgd(),
        HALF,
        backward_sparsity=rigl_optax.uniform(0.5, overrides={"conv": 0.25}),
        every=2,
        structure={"a": NM(2, 4), "conv": ConstantFanIn()},
    ),
    "granet in parts": lambda: rigl_optax.granet(
        sgd(), 0.7, scope="layer", structure=ConstantFanIn(), **PLAN
    ),
}
# Weights change places, groups lie on several devices, or paths lead through all of a layer:
# docs/scale.md says that these gather.
MIXES = {"grown initial", "blocks over devices", "blocks at edges", "cht", "cht_soft"}
SUMS_OF_FLOATS = {"grown normal", "str"}  # in another order on another number of devices
# One of each kind of score; the others are compiled the quick way.
EXACT = {"rigl", "set", "mest", "snfs_redistribute", "top_kast", "n:m"}
NAMES = [pytest.param(n, marks=pytest.mark.exact if n in EXACT else ()) for n in ALL]


def some_tree(seed):
    """Of few different numbers, so that ties decide; their sums are exact."""
    rng = np.random.default_rng(seed)
    return {n: (rng.integers(-8, 9, s) / 8).astype(np.float32) for n, s in SHAPES.items()}


def run(name, mesh, specs):
    """Params and state after some steps, the initial state, and what crosses devices in one."""

    def place(tree):
        return {n: jax.device_put(x, NamedSharding(mesh, specs[n])) for n, x in tree.items()}

    with jax.set_mesh(mesh):
        tx = ALL[name]()
        params = place(some_tree(0))
        initial = state = tx.init(params)
        params = rigl_optax.apply_masks(params, state)
        update = jax.jit(tx.update).lower(place(some_tree(1)), state, params).compile()
        for t in range(STEPS):
            updates, state = update(place(some_tree(100 + t)), state, params)
            params = optax.apply_updates(params, updates)
        return params, state, initial, update.as_text()


@functools.cache
def on_one_device(name):
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
    return jax.device_get(run(name, mesh, ON_ONE)[:2])


@pytest.mark.parametrize("axes", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("name", NAMES)
def test_as_on_one_device_and_no_weight_travels(name, axes):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axes,) * 2)
    params, state, initial, program = run(name, mesh, SPECS)
    assert state.rewirings >= (1 if name == "spdf" else 2)

    # All that has a weight's shape lies as the weight does, from the start.
    shapes = {shape: n for n, shape in SHAPES.items()}
    for leaf in jax.tree.leaves((initial, state)):
        if leaf.shape in shapes:
            wanted = params[shapes[leaf.shape]].sharding
            assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim), (leaf.sharding, wanted)

    found = jax.tree_util.tree_leaves_with_path(jax.device_get((params, state)))
    for (path, x), wanted in zip(found, jax.tree.leaves(on_one_device(name)), strict=True):
        if name in SUMS_OF_FLOATS and np.issubdtype(x.dtype, np.floating):
            np.testing.assert_allclose(x, wanted, rtol=1e-5, atol=1e-7, err_msg=str(path))
        else:
            np.testing.assert_array_equal(x, wanted, err_msg=str(path))

    travelling = collectives(program)
    assert travelling, "a sharded count needs some collective: does this test read the program?"
    summed = max(size for operation, size, _ in travelling if operation == "all-reduce")
    moved = [size for operation, size, _ in travelling if operation != "all-reduce"]
    gathered = max(moved, default=0)
    # Sums are of counts of rows, several at once; nothing else has as much as a byte an entry.
    if name in MIXES:
        assert max(summed, gathered) >= 4 * PART, "it gathers no more: correct docs/scale.md"
    else:
        assert summed < 4 * PART and gathered < PART, travelling


CHOSEN = {
    "magnitude": lambda p: rigl_optax.magnitude_masks(p, 0.5),
    "magnitude global": lambda p: rigl_optax.magnitude_masks(p, 0.5, scope="global"),
    "magnitude in parts": lambda p: rigl_optax.magnitude_masks(
        p, HALF, structure={"a": NM(2, 4), "conv": Block(4, 4)}
    ),
}


@pytest.mark.parametrize("axes", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("name", CHOSEN)
def test_masks_chosen_once_are_those_of_one_device(name, axes):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axes,) * 2)
    tree = some_tree(0)
    with jax.set_mesh(mesh):
        params = {n: jax.device_put(x, NamedSharding(mesh, SPECS[n])) for n, x in tree.items()}
        found = CHOSEN[name](params)
        tx = rigl_optax.static_sparse(sgd(), None, initial_masks=found)
        masks = tx.init(params).masks
    for n, wanted in CHOSEN[name](tree).items():
        np.testing.assert_array_equal(np.asarray(found[n]), np.asarray(wanted))
        assert masks[n].sharding.is_equivalent_to(params[n].sharding, wanted.ndim)
