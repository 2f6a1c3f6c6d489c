"""Methods of a user's own, on the public extension point: what they may rely on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rigl_optax
from rigl_optax import NM, Block, ConstantFanIn, uniform
from tests.core.reference import number_to_drop

SHAPES = {"a": (17, 12), "b": (8, 24), "bias": (9,)}
SPARSE = ("a", "b")
PLAN = {"end": 12, "every": 3, "drop_fraction": rigl_optax.constant_drop_fraction(0.5)}
HALF = uniform(0.5)


def some_tree(seed):
    rng = np.random.default_rng(seed)
    return {n: rng.standard_normal(s).astype(np.float32) for n, s in SHAPES.items()}


def sgd():
    return optax.sgd(0.05, momentum=0.9)


def run(tx, steps=12, place=lambda tree: tree):
    """Parameters, masks before and masks after each step."""
    params = place(some_tree(0))
    state = tx.init(params)
    params = rigl_optax.apply_masks(params, state)
    update = jax.jit(tx.update)
    for t in range(steps):
        before = jax.device_get((params, state.masks))
        updates, state = update(place(some_tree(100 + t)), state, params)
        params = optax.apply_updates(params, updates)
        yield t, *before, jax.device_get(params), jax.device_get(state.masks)


def assert_same(one, other):
    for a, b in zip(run(one), run(other), strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)


STRUCTURES = {
    "single weights": rigl_optax.Unstructured(),
    "blocks": Block(2, 2, pad=True),
    "fan-in": ConstantFanIn(),
    "ablation": ConstantFanIn(min_salient=0.3),
    "n:m": {"^b": NM(2, 4)},
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_rigl_and_set_are_two_scores(name):
    keys = PLAN | {"structure": STRUCTURES[name], "seed": 3}
    assert_same(rigl_optax.drop_and_grow(sgd(), HALF, **keys), rigl_optax.rigl(sgd(), HALF, **keys))
    at_random = rigl_optax.drop_and_grow(
        sgd(), HALF, grow_scores=rigl_optax.grow_at_random(3), needs_signal=False, **keys
    )
    assert_same(at_random, rigl_optax.sparse_evolutionary_training(sgd(), HALF, **keys))


def test_a_memory_takes_the_place_of_gradients():
    def remember(count, memory, gradient):
        del count
        return 0.9 * memory + (1 - 0.9) * gradient

    own = rigl_optax.drop_and_grow(sgd(), HALF, remember=remember, **PLAN)
    assert_same(own, rigl_optax.sparse_momentum(sgd(), HALF, **PLAN))


def largest(magnitudes, allowed, number):
    places = np.flatnonzero(allowed)
    order = places[np.argsort(-magnitudes.reshape(-1)[places], kind="stable")][:number]
    chosen = np.zeros(magnitudes.size, bool)
    chosen[order] = True
    return chosen.reshape(magnitudes.shape)


def test_any_score_of_positions_grows_positions_alone():
    """The smallest gradients grow: padding, which has none, would come first."""

    def smallest_first(inputs):
        return [jnp.int32(2**31 - 1) - s for s in rigl_optax.grow_by_gradient(inputs)]

    tx = rigl_optax.drop_and_grow(sgd(), HALF, grow_scores=smallest_first, **PLAN)
    for t, params, masks, _, after in run(tx):
        if t % 3:
            continue
        grads = some_tree(100 + t)
        for n in SPARSE:
            drop = number_to_drop(int(masks[n].sum()), 0.5)
            kept = largest(np.abs(params[n]), masks[n], masks[n].sum() - drop)
            grown = largest(-np.abs(grads[n]), ~kept, drop)
            np.testing.assert_array_equal(after[n], kept | grown)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("score", [-1, -7])
def test_what_may_never_grow_does_not_and_numbers_stay(score, structure):
    """Only the first few positions may grow, fewer than are to be dropped."""

    def few(inputs):
        scores = rigl_optax.grow_by_gradient(inputs)
        return [jnp.where(s > np.int32(0x3FA00000), s, score) for s in scores]

    keys = PLAN | {"structure": STRUCTURES[structure]}
    tx = rigl_optax.drop_and_grow(sgd(), HALF, grow_scores=few, **keys)
    moved = 0
    for t, _, before, _, after in run(tx):
        for n in SPARSE:
            if structure == "blocks":
                count = [int(np.asarray(Block(2, 2, pad=True).groups(m[n])).sum())
                         for m in (before, after)]  # fmt: skip
                assert count[0] == count[1]
            else:
                assert before[n].sum() == after[n].sum()
            newborn = after[n] & ~before[n]
            moved += newborn.sum()
            if structure == "single weights":
                assert (np.abs(some_tree(100 + t)[n][newborn]) > 1.25).all()
    assert moved


@pytest.mark.parametrize("score", [-1, 0])
def test_what_may_never_stay_is_dropped_first(score):
    def of_some(inputs):
        return [
            jnp.where(w > 0, s, score)
            for w, s in zip(inputs.weights, rigl_optax.keep_by_magnitude(inputs), strict=True)
        ]

    tx = rigl_optax.drop_and_grow(sgd(), HALF, keep_scores=of_some, **PLAN)
    for t, params, before, _, after in run(tx, 1):
        assert t == 0
        for n in SPARSE:
            assert before[n].sum() == after[n].sum()
            kept = largest(
                np.where(params[n] > 0, params[n], 0),
                before[n],
                before[n].sum() - number_to_drop(int(before[n].sum()), 0.5),
            )
            assert (after[n] & kept).sum() == kept.sum()


@pytest.mark.parametrize("name", ["keep_scores", "grow_scores"])
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda inputs: inputs.weights, "returned .*float32"),
        (lambda inputs: [w.astype(jnp.int32)[..., :1] for w in inputs.weights], "int32"),
        (lambda inputs: inputs.weights[0].astype(jnp.int32), "must return int32 arrays"),
    ],
    ids=["floats", "another shape", "no list"],
)
def test_scores_that_cannot_be_ranked_are_refused(name, wrong, said):
    tx = rigl_optax.drop_and_grow(sgd(), HALF, **{name: wrong}, **PLAN)
    params = some_tree(0)
    with pytest.raises(TypeError, match=f"{name}: .*{said}"):
        tx.update(params, tx.init(params), params)


def test_a_rule_of_ones_own():
    """New random masks at every rewiring, and a number that counts them."""
    scores = rigl_optax.grow_at_random(seed=1)

    def rule(inputs):
        masks = inputs.top_k(scores(inputs), inputs.active())
        return rigl_optax.Decision(masks, numbers=inputs.numbers + 1)

    method = rigl_optax.Method(
        rigl_optax.rewiring_plan(begin=0, end=12, every=3),
        rule,
        start=lambda layout, packing, masks: rigl_optax.InitialMemory([], jnp.int32(0)),
    )
    tx = rigl_optax.sparse_transform(sgd(), HALF, method, structure={"^b": NM(2, 4)})
    for t, _, before, params, after in run(tx):
        for n in SPARSE:
            assert before[n].sum() == after[n].sum()
            assert (before[n] == after[n]).all() == (t % 3 > 0)
            assert not params[n][~after[n]].any()
        np.testing.assert_array_equal(after["b"].T.reshape(24, 2, 4).sum(-1), 2)
    state = tx.init(some_tree(0))
    for t in range(4):
        _, state = tx.update(some_tree(t), state, some_tree(0))
    assert int(state.memory.numbers) == 2


def mest(weight=1.0):
    return rigl_optax.mest(sgd(), HALF, gradient_weight=weight, **PLAN)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_sums_of_scores_are_the_same_on_eight_devices(weight):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    def place(tree):
        specs = {"a": (), "b": ("x",), "bias": ()}
        spec = {n: jax.sharding.PartitionSpec(*s) for n, s in specs.items()}
        shardings = {n: jax.sharding.NamedSharding(mesh, s) for n, s in spec.items()}
        return jax.device_put(tree, shardings)

    for one, eight in zip(run(mest(weight)), run(mest(weight), place=place), strict=True):
        jax.tree.map(np.testing.assert_array_equal, one[2::2], eight[2::2])


def test_without_gradients_mest_is_set():
    assert_same(mest(0.0), rigl_optax.sparse_evolutionary_training(sgd(), HALF, **PLAN))


def test_soft_memory_is_refused_where_numbers_are_fixed():
    with pytest.raises(ValueError, match="soft=True: needs one schedule"):
        rigl_optax.mest(sgd(), HALF, soft=True, overrides={"^b": {"every": 2}}, **PLAN)


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_a_weight_of_gradients_that_makes_no_sense_is_refused(weight):
    with pytest.raises(ValueError, match="gradient_weight="):
        mest(weight)


# ------------------------------------------------------------------------------ exact sums


def toward_zero(x, y):
    """The sum of two float32 as float32, rounded toward zero."""
    exact = x.astype(np.float64) + y.astype(np.float64)
    with np.errstate(over="ignore"):
        nearest = exact.astype(np.float32)
    return np.where(nearest > exact, np.nextafter(nearest, np.float32(0)), nearest)


def pairs():
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 0x7F000000, (2, 20_000)).astype(np.int32)
    near = bits[0] + rng.integers(-(2**26), 2**26, 20_000).astype(np.int32)  # of like size
    small = rng.integers(0, 2**25, (2, 20_000)).astype(np.int32)  # about the least normal one
    edges = np.array([0, 1, 0x7FFFFF, 0x800000, 0x800001, 0x3F800000, 0x3FFFFFFF, 0x7EFFFFFF])
    grid = np.stack(np.meshgrid(edges, edges)).reshape(2, -1).astype(np.int32)
    near = np.clip(near, 0, 0x7EFFFFFF)
    return np.concatenate([bits, [bits[0], near], small, grid], axis=1).astype(np.int32)


def test_sums_of_scores_are_exact():
    x, y = pairs()
    found = np.asarray(jax.jit(rigl_optax.add_scores)(x, y))
    expected = toward_zero(x.view(np.float32), y.view(np.float32)).view(np.int32)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(rigl_optax.add_scores(y, x), found)


def test_sums_of_scores_at_the_ends():
    never, zero, most, infinity = -1, 0, 0x7F7FFFFF, 0x7F800000
    add = functools.partial(rigl_optax.add_scores)
    of = lambda x, y: int(add(jnp.int32(x), jnp.int32(y)))
    assert of(never, 5) == of(5, never) == of(never, never) == -1
    assert of(zero, zero) == 0 and of(most, zero) == most
    assert of(most, most) >= infinity > 0  # beyond all floats: still the largest, and positive
    assert of(infinity, most) >= infinity and of(infinity, infinity) >= infinity
