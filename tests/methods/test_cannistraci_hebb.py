"""Cannistraci-Hebb training against its NumPy restatement, and what it refuses and costs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import rigl_optax
from rigl_optax import _layout, accounting
from rigl_optax._ranking import _random, _scores
from rigl_optax._wrapper._method import RewiringInputs
from rigl_optax.methods import _link_prediction
from tests.core import reference as core
from tests.methods import reference
from tests.methods.test_trajectories import growth_scores

SHAPES = {"a": (16, 24), "b": (24, 8), "bias": (8,)}
SPARSE = ("a", "b")
PLAN = {"end": 28, "every": 3, "begin": 2}
FRACTION = 0.4
STEPS = 30
LAYERS = rigl_optax.erk(0.7)
CASES = {
    "hard": {},
    "relative importance": {"removal": "relative_importance"},
    "soft": {"soft": True},
    "falling density": {
        "soft": True,
        "removal": "relative_importance",
        "delta": (0.2, 1.0),
        "initial_sparsity": 0.4,
    },
}


def sgd():
    return optax.sgd(0.05, momentum=0.9)


def cht(sparsity=LAYERS, **options):
    keys = {"drop_fraction": rigl_optax.constant_drop_fraction(FRACTION), "seed": 3} | PLAN
    return rigl_optax.cht(sgd(), sparsity, **keys, **options)


def some_tree(seed):
    rng = np.random.default_rng(seed)
    return {n: rng.standard_normal(s).astype(np.float32) for n, s in SHAPES.items()}


def run(name, mesh=None):
    """Params and state at the start and after every step."""
    tx = cht(**CASES[name])
    params = some_tree(0)
    if mesh is not None:
        specs = {"a": ("x", "y"), "b": ("y", "x"), "bias": ("y",)}
        params = {
            n: jax.device_put(p, NamedSharding(mesh, PartitionSpec(*specs[n])))
            for n, p in params.items()
        }
    state = jax.jit(tx.init)(params)
    params = rigl_optax.apply_masks(params, state)
    step = jax.jit(tx.update)
    history = [jax.device_get((params, state))]
    for t in range(STEPS):
        grads = some_tree(100 + t)
        if mesh is not None:
            grads = {n: jax.device_put(g, params[n].sharding) for n, g in grads.items()}
        updates, state = step(grads, state, params)
        params = optax.apply_updates(params, updates)
        history.append(jax.device_get((params, state)))
    return history


@functools.cache
def on_one_device(name):
    return run(name)


@pytest.mark.parametrize("name", CASES)
def test_equals_the_restatement_over_a_trajectory(name):
    (params, state), *later = on_one_device(name)
    options = CASES[name]
    specs = {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in SHAPES.items()}
    falls = "initial_sparsity" in options
    final = {n: core.zeros_in(LAYERS(specs)[n], SHAPES[n]) for n in SPARSE}
    ref = reference.Cht(
        inner=core.Momentum(0.05, 0.9),
        sparse=frozenset(SPARSE),
        fraction=FRACTION,
        scores=growth_scores(3, SHAPES),
        removed=growth_scores(3, SHAPES, _random.Purpose.REMOVAL),
        soft=options.get("soft", False),
        by_importance="removal" in options,
        delta=options.get("delta", (0.5, 0.9)),
        zeros=final if falls else {},
        start={n: int((~state.masks[n]).sum()) for n in SPARSE},
        **PLAN,
    )
    expected = ref.init(params, {n: state.masks[n] for n in SPARSE})
    weights, grown = params, 0
    for t, (params, state) in enumerate(later):
        before = expected.masks
        updates, expected = ref.update(some_tree(100 + t), expected, weights)
        weights = core.apply_updates(weights, updates)
        for n in SHAPES:
            np.testing.assert_array_equal(state.masks[n], expected.masks[n], err_msg=f"{t} {n}")
            np.testing.assert_allclose(params[n], weights[n], rtol=1e-5, atol=1e-6)
            grown += int((state.masks[n] & ~before[n]).sum())
        weights = {n: np.asarray(p) for n, p in params.items()}
        expected.slots = {n: {"trace": state.inner_state[0].trace[n]} for n in SHAPES}
    assert int(state.rewirings) == expected.rewirings == 9
    assert grown > 50
    assert {n: int((~state.masks[n]).sum()) for n in SPARSE} == final


@pytest.mark.parametrize("axes", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("name", ["relative importance", "falling density"])
def test_the_same_on_eight_devices(name, axes):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axes,) * 2)
    with jax.set_mesh(mesh):
        eight = run(name, mesh)
    for (_, one), (_, other) in zip(on_one_device(name), eight, strict=True):
        for n in SPARSE:
            np.testing.assert_array_equal(one.masks[n], other.masks[n])


@pytest.mark.parametrize("density", [0.05, 0.3, 0.9])
def test_scores_are_those_of_neighbourhoods(density):
    links = np.random.default_rng(0).random((19, 13)) < density
    found = np.asarray(_link_prediction.ch2_l3n(jnp.asarray(links)))
    expected = reference.link_scores(links)
    assert 0 < expected[~links].max() < 2**24
    np.testing.assert_array_equal(found[~links], expected[~links])
    # From the definition, in floats: up to a scale.
    u, v = np.argwhere(~links & (found > 0))[0]
    exact = 0.0
    through = {z for z in np.flatnonzero(links[u]) if (links[:, z] & links[:, v]).any()}
    back = {z for z in np.flatnonzero(links[:, v]) if (links[z] & links[u]).any()}
    for z in through:
        inside = sum(links[b, z] for b in back)
        exact += (1 + inside) / (1 + links[:, z].sum() - inside - 1)
    for z in back:
        inside = sum(links[z, a] for a in through)
        exact += (1 + inside) / (1 + links[z].sum() - inside - 1)
    scale = np.log2(found[u, v] / exact)
    np.testing.assert_allclose(scale, round(scale), atol=1e-3)


def test_sums_stay_exact_where_fractions_are_large():
    """Two dense blocks with a single link between them: nearly all neighbours are common."""
    links = np.zeros((600, 500), bool)
    links[:300, :250] = links[300:, 250:] = True
    links[5, 400] = True
    links[0, 0] = links[400, 260] = False
    found = np.asarray(_link_prediction.ch2_l3n(jnp.asarray(links)))
    assert found.max() < 2**24 and found.min() >= 0
    assert found[0, 0] > 100 * found[~links & (found > 0)].min()


def inputs_of(params, layers):
    leaves = _layout.layout(params, layers, masked=False).sparse
    packing = _layout.packing(leaves)
    arrays = [params[leaf.path] for leaf in leaves]
    return RewiringInputs(
        jnp.int32(0), arrays, arrays, [x > 0 for x in arrays], [], (), packing, leaves
    )


def test_layers_of_a_stack_and_attention_kernels_are_graphs_of_their_own():
    rng = np.random.default_rng(0)
    stack = jnp.asarray(rng.standard_normal((3, 8, 12)), jnp.float32) - 0.5
    (scores,) = _link_prediction.scores(
        inputs_of({"layers": stack}, rigl_optax.uniform(0.5, stacked=("layers",)))
    )
    for i in range(3):
        np.testing.assert_array_equal(scores[i], _link_prediction.ch2_l3n(stack[i] > 0))
    heads = {
        "att/query/kernel": stack[0].reshape(8, 3, 4),
        "att/out/kernel": stack[1].T.reshape(3, 4, 8),
    }
    out, query = _link_prediction.scores(inputs_of(heads, rigl_optax.uniform(0.5)))
    wanted = _link_prediction.ch2_l3n(stack[0] > 0)
    np.testing.assert_array_equal(query.reshape(8, 12), wanted)
    np.testing.assert_array_equal(out.reshape(12, 8), _link_prediction.ch2_l3n(stack[1].T > 0))


def test_noise_samples_in_proportion():
    weights = np.array([1, 2, 5, 8])
    drawn = np.random.default_rng(0).integers(0, 2**31, (100_000, 4)).astype(np.int32)
    log = _scores.log2(jnp.asarray(weights * 1000, jnp.int32))
    keys = np.asarray(log + jax.jit(_random.gumbel)(jnp.asarray(drawn)))
    share = np.bincount(keys.argmax(1), minlength=4) / len(keys)
    np.testing.assert_allclose(share, weights / 16, atol=0.005)
    # The two that are left out: those of smallest score of a sample without replacement.
    second = np.bincount(np.argsort(-keys, 1)[:, 1], minlength=4) / len(keys)
    w = weights / 16
    expected = [sum(w[i] * w[j] / (1 - w[i]) for i in range(4) if i != j) for j in range(4)]
    np.testing.assert_allclose(second, expected, atol=0.006)


def test_logarithms_and_noise_are_near_the_exact_ones():
    x = np.concatenate([np.arange(1, 300), np.random.default_rng(0).integers(1, 2**31, 10_000)])
    found = np.asarray(_scores.log2(jnp.asarray(x, jnp.int32))) / 4096
    assert (found - np.log2(x)).min() > -2 / 4096 and (found <= np.log2(x)).all()
    v = (x[299:] + 0.5) / 2**31
    noise = np.asarray(_random.gumbel(jnp.asarray(x[299:], jnp.int32))) / 4096
    np.testing.assert_allclose(noise, -np.log2(-np.log1p(-v)), atol=0.002)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"removal": "gradient"}, "removal='gradient': must be one of magnitude, relative_imp"),
        ({"delta": (0.5, 0.9)}, "delta=.*: only with soft=True"),
        ({"soft": True, "delta": (0.5, 1.1)}, "delta=.*at most 1"),
        ({"soft": True, "delta": (0.01, 0.9)}, r"delta=.*above 0\.059"),
        ({"soft": True, "delta": 0.5}, "delta=0.5: must be two numbers"),
        (
            {"initial_sparsity": 0.5, "overrides": {"a": {"every": 2}}},
            "initial_sparsity: needs one schedule",
        ),
    ],
)
def test_options_without_a_meaning_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        cht(**options)


def test_what_is_no_graph_is_refused():
    conv = {"conv/kernel": jnp.ones((3, 3, 8, 8))}
    with pytest.raises(
        ValueError, match=r"'conv/kernel' is a convolution with a window of \(3, 3\)"
    ):
        cht(0.5).init(conv)
    cht(0.5, structure=rigl_optax.Block(2, 2)).init(conv)
    cht(0.5).init({"conv/kernel": jnp.ones((1, 1, 8, 8))})
    everything = rigl_optax.uniform(0.5, dense=rigl_optax.nothing_dense)
    with pytest.raises(ValueError, match="'bias' has shape.*between inputs and outputs"):
        cht(everything).init({"bias": jnp.ones(8)})


def test_link_prediction_is_counted():
    """A few products of dense matrices at each rewiring, whatever the batch."""
    params = {"w": jax.ShapeDtypeStruct((20, 30), jnp.float32)}
    own = 4 * 20 * 30 * (20 + 30)
    report = rigl_optax.explain(
        params, 0.5, method="cht", end=10, every=5,
        model=lambda p, x: x @ p["w"], inputs=[jax.ShapeDtypeStruct((1, 20), jnp.float32)],
    )  # fmt: skip
    assert f"each rewiring also costs {float(own):.3g} FLOPs" in " ".join(report.notes)
    keys = {"end": 10, "every": 5, "batch_size": 2}
    spent = accounting.cumulative_cost("cht", 1200.0, 600.0, per_rewiring=own, **keys)
    assert spent(1) == 2 * 3 * 600 + own
    assert spent(20) == 20 * 2 * 3 * 600 + 2 * own
