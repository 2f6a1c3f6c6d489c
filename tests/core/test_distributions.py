"""Per-layer sparsities: published numbers, the restatement, and what is special about a leaf."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import rigl_optax
from rigl_optax import default_dense, erdos_renyi, erk, uniform
from tests.core import reference


def shaped(shapes):
    return {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in shapes.items()}


def everything_sparse(path, leaf):
    return False


# ------------------------------------------------------------------------------ golden numbers


def resnet50_shapes():
    shapes = {"conv1": (7, 7, 3, 64)}
    wide_in = 64
    for stage, (blocks, width) in enumerate([(3, 64), (4, 128), (6, 256), (3, 512)], start=2):
        for block in range(blocks):
            at = f"{stage}{'abcdef'[block]}"
            shapes[f"{at}_2a"] = (1, 1, wide_in, width)
            shapes[f"{at}_2b"] = (3, 3, width, width)
            shapes[f"{at}_2c"] = (1, 1, width, 4 * width)
            if block == 0:
                shapes[f"{at}_proj"] = (1, 1, wide_in, 4 * width)
            wide_in = 4 * width
    shapes["fc"] = (2048, 1000)
    return {f"{n}/kernel": s for n, s in shapes.items()}


# Computed from layer shapes by an independent implementation of the reference's `sparse_utils.py`.
RESNET50_DENSITIES = {  # at .8, .9, .95, .965, .99, and .99 with a dense stem
    "conv1": (0.8572, 0.4200, 0.2098, 0.1469, 0.0420, 1),
    "2a_2a": (1, 1, 0.7735, 0.5415, 0.1547, 0.1549),
    "2b_2b": (0.3619, 0.1773, 0.0886, 0.0620, 0.0177, 0.0177),
    "2a_proj": (1, 0.9588, 0.4790, 0.3353, 0.0958, 0.0959),
    "3a_2a": (1, 0.5747, 0.2871, 0.2010, 0.0574, 0.0575),
    "3b_2b": (0.1769, 0.0867, 0.0433, 0.0303, 0.0087, 0.0087),
    "3c_2c": (0.9753, 0.4779, 0.2388, 0.1671, 0.0478, 0.0478),
    "3a_proj": (0.5849, 0.2866, 0.1432, 0.1002, 0.0286, 0.0287),
    "4f_2b": (0.0874, 0.0428, 0.0214, 0.0150, 0.0043, 0.0043),
    "4b_2a": (0.4869, 0.2386, 0.1192, 0.0834, 0.0238, 0.0239),
    "5a_2a": (0.2921, 0.1431, 0.0715, 0.0500, 0.0143, 0.0143),
    "5b_2b": (0.0435, 0.0213, 0.0106, 0.0074, 0.0021, 0.0021),
    "5c_2a": (0.2433, 0.1192, 0.0595, 0.0417, 0.0119, 0.0119),
    "5a_proj": (0.1459, 0.0715, 0.0357, 0.0250, 0.0071, 0.0072),
    "fc": (0.1482, 0.0726, 0.0363, 0.0254, 0.0073, 0.0073),
}
RESNET50_NONZEROS = {0.8: 5_100_630, 0.9: 2_550_353, 0.95: 1_275_200, 0.965: 892_651, 0.99: 255_082}


def test_resnet50_has_the_published_shapes():
    shapes = resnet50_shapes()
    assert len(shapes) == 54
    assert sum(np.prod(s) for s in shapes.values()) == 25_502_912


@pytest.mark.parametrize(
    ("column", "sparsity"), list(enumerate([0.8, 0.9, 0.95, 0.965, 0.99, 0.99])), ids=str
)
def test_erk_densities_of_resnet50(column, sparsity):
    shapes = resnet50_shapes()
    overrides = {r"^conv1/": 0.0} if column == 5 else None
    got = erk(sparsity, overrides=overrides)(shaped(shapes))
    assert list(got) == list(jax.tree_util.tree_leaves({n: n for n in shapes}))
    for name, row in RESNET50_DENSITIES.items():
        assert 1 - got[f"{name}/kernel"] == pytest.approx(row[column], abs=5.1e-5), name
    if column < 5:
        nonzeros = sum(np.prod(s) - reference.zeros_in(got[n], s) for n, s in shapes.items())
        assert nonzeros == RESNET50_NONZEROS[sparsity]
    dense = {n.removesuffix("/kernel") for n, s in got.items() if s == 0}
    forced = {
        0: {"2a_2a", "2a_2c", "2a_proj", "2b_2a", "2b_2c", "2c_2a", "2c_2c", "3a_2a"},
        1: {"2a_2a"},
        5: {"conv1"},
    }
    assert dense == forced.get(column, set())


MOBILENET_V1 = {  # shapes; densities at .75, .85, .9, .95
    "pw1": ((32, 64), (1, 1, 1, 0.7684)),
    "pw2": ((64, 128), (1, 1, 0.7626, 0.3803)),
    "pw3": ((128, 128), (1, 0.7634, 0.5071, 0.2529)),
    "pw4": ((128, 256), (0.9625, 0.5711, 0.3793, 0.1892)),
    "pw5": ((256, 256), (0.6408, 0.3802, 0.2526, 0.1259)),
    "pw6": ((256, 512), (0.4800, 0.2848, 0.1892, 0.0943)),
    "pw7": ((512, 512), (0.3198, 0.1897, 0.1260, 0.0629)),
    "pw8": ((512, 512), (0.3198, 0.1897, 0.1260, 0.0629)),
    "pw9": ((512, 512), (0.3198, 0.1897, 0.1260, 0.0629)),
    "pw10": ((512, 512), (0.3198, 0.1897, 0.1260, 0.0629)),
    "pw11": ((512, 512), (0.3198, 0.1897, 0.1260, 0.0629)),
    "pw12": ((512, 1024), (0.2397, 0.1422, 0.0945, 0.0471)),
    "pw13": ((1024, 1024), (0.1597, 0.0948, 0.0630, 0.0314)),
    "logits": ((1024, 1000), (0.1617, 0.0959, 0.0637, 0.0318)),
}


@pytest.mark.parametrize(("column", "sparsity"), list(enumerate([0.75, 0.85, 0.9, 0.95])), ids=str)
def test_erk_densities_of_mobilenet(column, sparsity):
    """Depthwise kernels are dense by default, and out of the budget; the stem is told so."""
    shapes = {f"{n}/kernel": (1, 1, *s) for n, (s, _) in MOBILENET_V1.items()}
    shapes["stem/kernel"] = (3, 3, 3, 32)
    shapes |= {f"dw{i}/kernel": (3, 3, 1, 32 * i) for i in range(1, 14)}
    got = erk(sparsity, overrides={"stem": 0.0})(shaped(shapes))
    assert not any(n.startswith("dw") for n in got)
    for name, (_, row) in MOBILENET_V1.items():
        assert 1 - got[f"{name}/kernel"] == pytest.approx(row[column], abs=5.1e-5), name


WIDE_RESNET = {  # shapes; densities at .5, .8, .9, .95
    "skip1": ((1, 1, 16, 32), (1, 1, 1, 1)),
    "b1c1": ((3, 3, 16, 32), (1, 0.8875, 0.4227, 0.2049)),
    "b1c2": ((3, 3, 32, 32), (1, 0.5753, 0.2740, 0.1328)),
    "skip2": ((1, 1, 32, 64), (1, 1, 1, 0.8368)),
    "b2c1": ((3, 3, 32, 64), (1, 0.4191, 0.1996, 0.0968)),
    "b2c2": ((3, 3, 64, 64), (0.7629, 0.2753, 0.1311, 0.0636)),
    "skip3": ((1, 1, 64, 128), (1, 1, 0.8543, 0.4141)),
    "b3c1": ((3, 3, 64, 128), (0.5636, 0.2034, 0.0969, 0.0470)),
    "b3c2": ((3, 3, 128, 128), (0.3729, 0.1346, 0.0641, 0.0311)),
    "fc": ((128, 10), (1, 1, 1, 1)),
}


def wide_resnet_shapes():
    """WRN-22-2: three blocks of two 3x3 convolutions a stage, of which the first widens."""
    shapes = {n: s for n, (s, _) in WIDE_RESNET.items()}
    for stage, width in [(1, 32), (2, 64), (3, 128)]:
        for i in range(4):
            shapes[f"b{stage}x{i}"] = (3, 3, width, width)
    return {f"{n}/kernel": s for n, s in shapes.items()}


@pytest.mark.parametrize(("column", "sparsity"), list(enumerate([0.5, 0.8, 0.9, 0.95])), ids=str)
def test_erk_densities_of_wide_resnet(column, sparsity):
    got = erk(sparsity)(shaped(wide_resnet_shapes()))
    for name, (_, row) in WIDE_RESNET.items():
        assert 1 - got[f"{name}/kernel"] == pytest.approx(row[column], abs=5.1e-5), name


# -------------------------------------------------------------------------- the restatement

dimension = st.integers(1, 40)
some_shapes = st.lists(
    st.one_of(
        st.tuples(dimension, dimension),
        st.tuples(st.sampled_from([1, 3, 5]), st.sampled_from([1, 3, 5]), dimension, dimension),
        st.tuples(st.sampled_from([1, 3]), dimension, dimension),
    ),
    min_size=1,
    max_size=6,
)


def reaches(shapes, sparsities, target):
    """Whether the free layers have about as many zeros as the target says (within flooring)."""
    total = sum(int(np.prod(s)) for s in shapes.values())
    zeros = sum(sparsities[n] * np.prod(s) for n, s in shapes.items())
    return abs(zeros - target * total) <= len(shapes) + 1e-6


@pytest.mark.parametrize("rule", ["erk", "erk2", "erdos_renyi", "uniform"])
@settings(max_examples=80)
@given(shapes=some_shapes, sparsity=st.floats(0.05, 0.995), custom=st.none() | st.floats(0, 0.99))
def test_distributions_are_those_of_the_restatement(rule, shapes, sparsity, custom):
    named = {f"l{i}": s for i, s in enumerate(shapes)}
    overrides = {} if custom is None or len(named) < 2 else {"l0": custom}
    try:
        expected = {
            "erk": lambda: reference.erk(named, sparsity, overrides),
            "erk2": lambda: reference.erk(named, sparsity, overrides, power=0.5),
            "erdos_renyi": lambda: reference.erk(named, sparsity, overrides, kernel=False),
            "uniform": lambda: reference.uniform(named, sparsity, overrides),
        }[rule]()
    except ValueError:
        assume(False)
    free = {n: s for n, s in named.items() if n not in overrides}
    assume(rule == "uniform" or any(expected[n] > 1e-9 for n in free))  # else: infeasible
    options = {"dense": everything_sparse, "overrides": {f"^{n}$": s for n, s in overrides.items()}}
    make = {
        "erk": lambda: erk(sparsity, **options),
        "erk2": lambda: erk(sparsity, 0.5, **options),
        "erdos_renyi": lambda: erdos_renyi(sparsity, **options),
        "uniform": lambda: uniform(sparsity, **options),
    }[rule]
    got = make()(shaped(named))
    assert list(got) == list(expected)
    for n, s in expected.items():
        assert got[n] == pytest.approx(s, abs=1e-9)
        assert 0 <= got[n] < 1
    if rule != "uniform":
        assert reaches(free, {n: got[n] for n in free}, sparsity)


def test_uniform_is_uniform():
    params = shaped({"a/kernel": (10, 10), "b/kernel": (3, 3, 4, 4), "b/bias": (4,)})
    assert uniform(0.7)(params) == {"a/kernel": 0.7, "b/kernel": 0.7}


def test_power_zero_is_uniform():
    params = shaped({"a/kernel": (10, 10), "b/kernel": (20, 5)})
    got = erk(0.8, power=0.0)(params)
    assert got["a/kernel"] == pytest.approx(0.8)
    assert got["b/kernel"] == pytest.approx(0.8)


def test_erdos_renyi_ignores_the_window():
    params = shaped({"a/kernel": (3, 3, 30, 40), "b/kernel": (1, 1, 30, 40)})
    got = erdos_renyi(0.9)(params)
    assert got["a/kernel"] == pytest.approx(got["b/kernel"])
    got = erk(0.9)(params)
    assert got["a/kernel"] > got["b/kernel"]


@pytest.mark.parametrize("rule", [uniform, erk, erdos_renyi])
def test_sparsity_zero_is_all_active(rule):
    params = {"a": {"kernel": jnp.ones((7, 9))}, "b": {"kernel": jnp.ones((4, 4))}}
    assert rule(0.0)(params) == {"a/kernel": 0.0, "b/kernel": 0.0}
    state = rigl_optax.static_sparse(optax.sgd(0.1), rule(0.0)).init(params)
    assert all(bool(m.all()) for m in jax.tree.leaves(state.masks))


# ------------------------------------------------------------------- which leaves are sparse


@pytest.mark.parametrize(
    ("path", "shape", "dtype", "dense"),
    [
        ("kernel", (4, 4), jnp.float32, False),
        ("kernel", (4, 4), jnp.bfloat16, False),
        ("weight", (4, 4), jnp.float32, False),
        ("kernel", (4, 4), jnp.int32, True),
        ("kernel", (4, 4), jnp.bool_, True),
        ("kernel", (4,), jnp.float32, True),
        ("kernel", (), jnp.float32, True),
        ("layer/bias", (4, 4), jnp.float32, True),
        ("layer/scale", (4, 4), jnp.float32, True),
        ("embed/kernel", (100, 4), jnp.float32, True),
        ("token_embedding", (100, 4), jnp.float32, True),
        ("pos_embed/table", (100, 4), jnp.float32, True),
        ("block/bias_proj/kernel", (4, 4), jnp.float32, False),
        ("scale/kernel", (4, 4), jnp.float32, False),
        ("dw/kernel", (3, 3, 1, 32), jnp.float32, True),
        ("pw/kernel", (1, 1, 1, 32), jnp.float32, False),
        ("conv/kernel", (3, 3, 2, 32), jnp.float32, False),
        ("dw/weight", (3, 3, 1, 32), jnp.float32, False),
        ("dw/kernel", (3, 1, 32), jnp.float32, False),
        ("dw/kernel", (1, 3, 1, 32), jnp.float32, True),
        ("dw/w", (3, 3, 1, 32), jnp.float32, True),
        ("conv/w", (3, 3, 2, 32), jnp.float32, False),
        ("conv/weight", (32, 1, 3, 3), jnp.float32, True),
        ("conv/weight", (32, 2, 3, 3), jnp.float32, False),
        ("conv/weight", (32, 1, 1, 1), jnp.float32, False),
        ("cls", (1, 1, 32), jnp.float32, True),
        ("cls/kernel", (32, 10), jnp.float32, False),
        ("encoder/pos_emb", (1, 50, 32), jnp.float32, True),
        ("encoder/pos_embedding", (1, 50, 32), jnp.float32, True),
        ("encoder/positions", (50, 32), jnp.float32, True),
        ("positions_mlp/kernel", (50, 32), jnp.float32, False),
        ("wte/weight", (100, 32), jnp.float32, True),
        ("dist_token", (1, 1, 32), jnp.float32, True),
        ("register_tokens", (4, 32), jnp.float32, True),
        ("to_token/kernel", (32, 32), jnp.float32, False),
        ("attn/rel_pos_bias", (4, 50, 50), jnp.float32, True),
        ("attn/relative_attention_bias/weight", (32, 4), jnp.float32, True),
        ("stack/ls1/gamma", (12, 32), jnp.float32, True),
        ("attn/relative_position_bias_table", (63, 4), jnp.float32, True),
        ("block/layer_scale", (2, 32), jnp.float32, True),
        ("layer_scale/gamma", (2, 32), jnp.float32, True),
        ("LayerNorm_0/scale", (2, 32), jnp.float32, True),
        ("layer_norm/offset", (2, 32), jnp.float32, True),
        ("layers/norm1/weight", (2, 32), jnp.float32, True),
        ("ln_1/weight", (2, 32), jnp.float32, True),
        ("norms/0/weight", (2, 32), jnp.float32, True),
        ("norm/kernel", (2, 32), jnp.float32, False),
        ("attn/query/bias", (2, 4, 8), jnp.float32, True),
        ("attn/q_bias", (4, 8), jnp.float32, True),
        ("conv_2_d/b", (32, 1, 1), jnp.float32, True),
        ("b", (40, 30), jnp.float32, False),
        ("lin/weight", (40, 30), jnp.float32, False),
    ],
)
def test_default_dense(path, shape, dtype, dense):
    leaf = jax.ShapeDtypeStruct(shape, dtype)
    assert bool(default_dense(path, leaf)) is dense
    assert (path in uniform(0.5)({path: leaf, "other": shaped({"": (4, 4)})[""]})) is not dense


def test_in_a_stacked_transformer_only_kernels_are_sparse():
    """What a scan over layers makes of vectors has two axes, and of matrices three."""
    parts = {
        "attn/qkv/kernel": (12, 32, 96),
        "attn/query/kernel": (12, 32, 4, 8),
        "attn/query/bias": (12, 4, 8),
        "attn/rel_pos_bias": (12, 4, 50, 50),
        "norm1/scale": (12, 32),
        "norm1/weight": (12, 32),
        "ln_2/offset": (12, 32),
        "layer_scale": (12, 32),
        "layer_scale_1/gamma": (12, 32),
    }
    once = {"cls": (1, 1, 32), "pos_emb": (1, 50, 32), "positions": (50, 32)}
    params = shaped({f"blocks/{path}": shape for path, shape in parts.items()} | once)
    kernels = {"blocks/attn/qkv/kernel", "blocks/attn/query/kernel"}
    for dense in (default_dense, rigl_optax.DenseLayers({})):
        for stacked in ((), ("^blocks",)):
            assert set(uniform(0.5, dense=dense, stacked=stacked)(params)) == kernels


def test_a_layout_of_ones_own_finds_depthwise_kernels():
    params = shaped({"dw/kernel": (32, 1, 3, 3), "conv/kernel": (32, 4, 3, 3)})
    assert list(uniform(0.5)(params)) == ["conv/kernel", "dw/kernel"]
    assert list(uniform(0.5, axes=rigl_optax.equinox_axes)(params)) == ["conv/kernel"]


def test_a_leaf_is_dense_if_the_predicate_says_so():
    params = shaped({"a/kernel": (8, 8), "b/kernel": (8, 8), "b/bias": (8, 8)})
    assert list(uniform(0.5, dense=lambda p, x: p.startswith("a"))(params)) == [
        "b/bias",
        "b/kernel",
    ]


def test_the_predicate_replaces_the_default_and_sees_path_and_leaf():
    seen = {}
    params = {"a": {"bias": jnp.ones((3,)), "kernel": jnp.ones((3, 2))}}

    def dense(path, leaf):
        seen[path] = tuple(leaf.shape)
        return False

    assert uniform(0.5, dense=dense)(params) == {"a/bias": 0.5, "a/kernel": 0.5}
    assert seen == {"a/bias": (3,), "a/kernel": (3, 2)}


def test_overrides_are_searched_in_the_path():
    params = shaped({"conv1/kernel": (8, 8), "conv2/kernel": (8, 8), "fc/kernel": (8, 8)})
    got = uniform(0.9, overrides={"conv1/kernel": 0.0, "f.$|^fc": 0.5})(params)
    assert got == {"conv1/kernel": 0.0, "conv2/kernel": 0.9, "fc/kernel": 0.5}


def test_overrides_stand_outside_the_budget():
    shapes = {"a/kernel": (100, 10), "b/kernel": (50, 80), "c/kernel": (30, 60)}
    with_all = erk(0.9, overrides={"^a": 0.3})(shaped(shapes))
    without = erk(0.9)(shaped({n: s for n, s in shapes.items() if not n.startswith("a")}))
    assert with_all.pop("a/kernel") == 0.3
    assert with_all == pytest.approx(without)


def test_a_dense_override_is_still_a_sparse_leaf():
    """At sparsity 0 it is in the distribution, unlike a leaf that `dense=` keeps out."""
    params = {"a": jnp.ones((4, 4)), "b": jnp.ones((4, 4))}
    assert uniform(0.5, overrides={"a": 0.0})(params) == {"a": 0.0, "b": 0.5}


@pytest.mark.parametrize("rule", [uniform, erk, erdos_renyi])
def test_stacked_layers_are_layers_of_their_own(rule):
    """Each slice is one layer: the same budget as the layers laid out one by one."""
    slices = {f"scan{i}/kernel": (20, 30) for i in range(4)}
    other = {"out/kernel": (30, 7)}
    apart = rule(0.8)(shaped({**slices, **other}))
    together = rule(0.8, stacked=("^scan",))(shaped({"scan/kernel": (4, 20, 30), **other}))
    assert together["out/kernel"] == pytest.approx(apart["out/kernel"])
    assert together["scan/kernel"] == pytest.approx(apart["scan0/kernel"])


def test_the_stacked_axis_does_not_count_as_a_dimension():
    params = shaped({"scan/kernel": (4, 20), "scan/k2/kernel": (4, 3, 3, 1, 8), "out": (5, 5)})
    got = uniform(0.5, stacked=("^scan",))(params)
    assert set(got) == {"out"}
    assert set(uniform(0.5)(params)) == {"out", "scan/kernel", "scan/k2/kernel"}


def test_every_slice_of_a_stack_gets_its_own_zeros():
    params = {"scan": {"kernel": jnp.ones((5, 7, 9))}}
    tx = rigl_optax.static_sparse(optax.sgd(0.1), uniform(0.8, stacked=("scan",)))
    mask = np.asarray(tx.init(params).masks["scan"]["kernel"])
    assert (np.count_nonzero(mask, axis=(1, 2)) == 63 - reference.zeros_in(0.8, (7, 9))).all()
    assert len({m.tobytes() for m in mask}) == 5


def test_on_params_and_on_their_shapes():
    params = {"a": {"kernel": jnp.ones((7, 9))}, "b": {"kernel": jnp.ones((4, 4))}}
    assert erk(0.7)(params) == erk(0.7)(jax.eval_shape(lambda: params))


def test_a_float_means_erk():
    params = {"a": {"kernel": jnp.ones((70, 90))}, "b": {"kernel": jnp.ones((40, 40))}}
    one = rigl_optax.static_sparse(optax.sgd(0.1), 0.8).init(params)
    two = rigl_optax.static_sparse(optax.sgd(0.1), erk(0.8)).init(params)
    jax.tree.map(np.testing.assert_array_equal, one.masks, two.masks)


# ------------------------------------------------------------------------------ initial masks


def test_initial_masks_have_floor_of_s_times_n_zeros():
    sparsities = [0.0, 1e-9, 0.1, 0.3, 1 / 3, 0.5, 0.7, 0.9, 0.95, 0.99, 1 - 1e-9]
    shapes = {f"{i}-{j}": s for i in range(len(sparsities)) for j, s in enumerate(SOME_SHAPES)}
    overrides = {f"^{i}-": s for i, s in enumerate(sparsities)}
    rule = uniform(0.5, dense=everything_sparse, overrides=overrides)
    state = rigl_optax.static_sparse(optax.sgd(0.1), rule).init(
        {n: jnp.zeros(s) for n, s in shapes.items()}
    )
    for n, shape in shapes.items():
        mask = np.asarray(state.masks[n])
        zeros = reference.zeros_in(sparsities[int(n.split("-")[0])], shape)
        assert mask.size - np.count_nonzero(mask) == zeros, (n, shape)


SOME_SHAPES = [(1, 1), (7, 9), (3, 3, 4, 5), (10,), (1000,)]


@pytest.mark.parametrize(
    ("shape", "sparsity", "ones"), [((30, 4), 0.5, 60), ((1, 2, 1, 4), 0.8, 2), ((30,), 0.1, 27)]
)
def test_reference_examples(shape, sparsity, ones):
    tx = rigl_optax.static_sparse(optax.sgd(0.1), uniform(sparsity, dense=everything_sparse))
    assert np.count_nonzero(tx.init({"w": jnp.zeros(shape)}).masks["w"]) == ones


def test_initial_masks_are_uniform_over_positions():
    params = {"kernel": jnp.zeros((8, 8))}

    def draw(seed):
        return rigl_optax.static_sparse(optax.sgd(0.1), uniform(0.75), seed=seed).init(params).masks

    masks = np.asarray(jax.vmap(draw)(jnp.arange(1000))["kernel"])
    assert (masks.sum((1, 2)) == 16).all()
    deviation = np.sqrt(0.25 * 0.75 / 1000)
    assert np.abs(masks.mean(0) - 0.25).max() < 4.5 * deviation


def test_leaves_of_one_shape_get_different_masks():
    params = {"a": jnp.zeros((20, 20)), "b": jnp.zeros((20, 20))}
    masks = rigl_optax.static_sparse(optax.sgd(0.1), uniform(0.5)).init(params).masks
    assert (np.asarray(masks["a"]) != np.asarray(masks["b"])).any()


@pytest.mark.parametrize("seed", [0, 1, 42])
def test_masks_are_independent_of_weights_drawn_from_the_same_seed(seed):
    """The design's pitfall: one key for both selects only large positive weights."""
    params = {"kernel": jax.random.normal(jax.random.key(seed), (200, 200))}
    state = rigl_optax.static_sparse(optax.sgd(0.1), uniform(0.9), seed=seed).init(params)
    chosen = np.asarray(params["kernel"])[np.asarray(state.masks["kernel"])]
    assert abs(chosen.mean()) < 5 / np.sqrt(chosen.size)
    assert abs(chosen.std() - 1) < 5 / np.sqrt(chosen.size)
    for draw in (jax.random.uniform, jax.random.normal):
        raw = np.asarray(draw(jax.random.key(seed), (200, 200)))
        inside = raw[np.asarray(state.masks["kernel"])].mean()
        assert abs(inside - raw.mean()) < 5 * raw.std() / np.sqrt(chosen.size)


def test_layers_named_in_a_mapping_stay_dense_besides_the_default():
    params = {
        "stem": {"weight": jnp.ones((16, 1, 3, 3))},  # one input channel, as Equinox lays it out
        "body": {"weight": jnp.ones((32, 16))},
        "head": {"weight": jnp.ones((10, 32))},
    }
    named = {"^head/": "few classes"}
    besides = erk(0.9, dense=named, axes=rigl_optax.equinox_axes)
    assert list(besides(params)) == ["body/weight"]
    replaced = erk(0.9, dense=rigl_optax.DenseLayers(named), axes=rigl_optax.equinox_axes)
    assert list(replaced(params)) == ["body/weight", "stem/weight"]
    because = {x.path: x.dense_because for x in rigl_optax.explain(params, besides, end=9).layers}
    with pytest.raises(ValueError, match="dense: 'haed' matches no leaf; leaves are 'body/weight'"):
        erk(0.9, dense={"haed": "a typing mistake"})(params)
    assert because["head/weight"] == "few classes" and "one input channel" in because["stem/weight"]


@pytest.mark.parametrize("dense", [["head"], "head", None])
def test_dense_layers_of_another_type_are_refused(dense):
    with pytest.raises(TypeError, match=r"must be \{pattern: reason\}, or a function"):
        erk(0.9, dense=dense)
    with pytest.raises(TypeError, match=r"given as \{pattern: reason\}"):
        rigl_optax.DenseLayers(dense)
