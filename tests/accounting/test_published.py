"""The paper's FLOPs and model sizes, from this library's distributions and the paper's counting.

Expected numbers come from an independent implementation of the reference's `sparse_utils.py`. To
the digits given there they are those of the paper (figures 2 and 3, table 4), the README of
github.com/google-research/rigl and its notebook for MobileNet-v1.
"""

import jax
import numpy as np
import pytest

import rigl_optax
from rigl_optax.accounting import published_cost
from tests.accounting import published

RESNET, MOBILENET = published.resnet50(), published.mobilenet_v1()
MOBILENET_V2, WRN = published.mobilenet_v2(), published.wide_resnet()


def shapes(layers):
    return {x.name: jax.ShapeDtypeStruct(x.shape, np.float32) for x in layers}


def nothing(path, leaf):
    return False


def conv1(path, leaf):
    return path == "conv1"


def depthwise(path, leaf):
    return "dw" in path


def conv1_and_depthwise(path, leaf):
    return conv1(path, leaf) or depthwise(path, leaf)


def fraction_and_size(layers, distribution):
    sparsity = distribution(shapes(layers))
    return (
        published.published_flops(layers, sparsity) / published.published_flops(layers),
        published.published_megabytes(layers, sparsity),
    )


# MFLOPs, megabytes, weights, kernels.
@pytest.mark.parametrize(
    ("layers", "megaflops", "megabytes", "weights", "kernels"),
    [
        (RESNET, 8202.341, 102.122, 25_502_912, 54),
        (MOBILENET, 1141.544, 16.864, 4_209_088, 28),
        (MOBILENET_V2, 608.2, 13.95, 3_469_760, 53),
        (WRN, 315.9, 4.314, 1_076_912, 23),
    ],
    ids=["ResNet-50", "MobileNet-v1", "MobileNet-v2", "WRN-22-2"],
)
def test_dense_networks(layers, megaflops, megabytes, weights, kernels):
    assert published.published_flops(layers) / 1e6 == pytest.approx(megaflops, abs=0.06)
    assert published.published_megabytes(layers) == pytest.approx(megabytes, abs=0.002)
    assert sum(x.weights for x in layers) == weights
    assert len(layers) == kernels


def test_quirks_and_proper_counting():
    assert published.published_flops(RESNET) / 1e6 == pytest.approx(8202.341, abs=5e-4)
    assert published.published_flops(MOBILENET) / 1e6 == pytest.approx(1141.544, abs=5e-4)
    proper = [x._replace(size=224) if x.name == "conv1" else x for x in RESNET]
    assert published.published_flops(proper) / 1e6 == pytest.approx(8189.483, abs=5e-4)
    assert sum(x.shape[-1] for x in RESNET) == 27_560
    proper = [
        x._replace(
            size=x.size - x.size % 2 * (x.stride == 2),
            shape=(3, 3, 1, x.shape[2]) if "dw" in x.name else x.shape,
        )
        for x in MOBILENET
    ]
    assert published.published_flops(proper) / 1e6 == pytest.approx(1142.5, abs=0.05)
    assert published.published_megabytes(proper) == pytest.approx(16.884, abs=5e-4)


def test_training_flops_of_the_dense_networks():
    for layers, total in ((RESNET, 3.225e18), (MOBILENET, 4.489e17)):
        cost = published_cost("dense", published.published_flops(layers), 0.0) * 4096 * 32_000
        assert cost == pytest.approx(total, rel=2e-4)


# Inference FLOPs, training FLOPs of RigL, of RigL 5x and of SNFS, all of dense; megabytes.
ERK, ERK_CONV1 = "ERK all", "ERK, conv1 dense"
UNIFORM, UNIFORM_CONV1, ER = "uniform, nothing dense", "uniform, conv1 dense", "ER"
DISTRIBUTIONS = {
    ERK: lambda s: rigl_optax.erk(s, dense=nothing),
    ERK_CONV1: lambda s: rigl_optax.erk(s, dense=nothing, overrides={"conv1": 0.0}),
    UNIFORM: lambda s: rigl_optax.uniform(s, dense=nothing),
    UNIFORM_CONV1: lambda s: rigl_optax.uniform(s, dense=nothing, overrides={"conv1": 0.0}),
    ER: lambda s: rigl_optax.erdos_renyi(s, dense=nothing),
}


@pytest.mark.parametrize(
    ("s", "distribution", "test", "rigl", "rigl5", "snfs", "megabytes"),
    [
        (0.8, ERK, 0.4153, 0.417, 2.086, 0.610, 23.684),
        (0.8, ERK_CONV1, 0.4200, 0.422, 2.109, 0.613, 23.713),
        (0.8, UNIFORM_CONV1, 0.2254, 0.228, 1.140, 0.484, 23.729),
        (0.8, UNIFORM, 0.2011, 0.204, 1.019, 0.467, 23.700),
        (0.8, ER, 0.4546, 0.456, 2.282, 0.636, 23.685),
        (0.9, ERK, 0.2431, 0.246, 1.228, 0.495, 13.499),
        (0.9, UNIFORM_CONV1, 0.1285, 0.131, 0.657, 0.419, 13.532),
        (0.9, UNIFORM, 0.1012, 0.104, 0.521, 0.401, 13.499),
        (0.95, ERK, 0.1230, 0.126, 0.630, 0.415, 8.399),
        (0.95, UNIFORM_CONV1, 0.0801, 0.083, 0.416, 0.387, 8.433),
        (0.965, ERK, 0.0865, 0.090, 0.448, 0.391, 6.869),
        (0.965, ERK_CONV1, 0.1125, 0.115, 0.577, 0.408, 6.904),
        (0.965, UNIFORM_CONV1, 0.0656, 0.069, 0.343, 0.377, 6.904),
        (0.99, ERK, 0.0257, 0.029, 0.145, 0.350, 4.318),
        (0.99, ERK_CONV1, 0.0548, 0.058, 0.290, 0.370, 4.354),
        (0.99, UNIFORM_CONV1, 0.0414, 0.045, 0.223, 0.361, 4.354),
    ],
)
def test_resnet50_fractions_and_sizes(s, distribution, test, rigl, rigl5, snfs, megabytes):
    r, size = fraction_and_size(RESNET, DISTRIBUTIONS[distribution](s))
    assert r == pytest.approx(test, abs=5.1e-5)
    assert size == pytest.approx(megabytes, abs=5.1e-4)
    assert published_cost("rigl", 1.0, r) / 3 == pytest.approx(rigl, abs=5.1e-4)
    assert 5 * published_cost("rigl", 1.0, r) / 3 == pytest.approx(rigl5, abs=5.1e-4)
    assert published_cost("snfs", 1.0, r) / 3 == pytest.approx(snfs, abs=5.1e-4)


@pytest.mark.parametrize(("s", "average"), [(0.8, 0.5603), (0.9, 0.5053)])
def test_resnet50_pruning_average(s, average):
    # As in the reference's notebook for ResNet-50: 33 samples of a cubic from step 10,000 to
    # 25,000, the first convolution dense, the classifier at .8.
    def f(step):
        progress = np.clip((step - 10_000) / 15_000, 0, 1)
        now = s * (1 - (1 - progress) ** 3)
        sparsity = {x.name: now for x in RESNET if x.name != "conv1"}
        sparsity["classifier"] = min(0.8, now)
        return published.published_flops(RESNET, sparsity)

    dense = published.published_flops(RESNET)
    samples = [f(step) for step in range(0, 33_000, 1000)]
    assert published_cost("pruning", dense, samples) / (3 * dense) == pytest.approx(
        average, abs=5.1e-5
    )


# ERK with depthwise layers dense, its size, with conv1 dense too (as trained), with only conv1
# dense; uniform with conv1 and depthwise layers dense, its size, with only conv1 dense.
@pytest.mark.parametrize(
    ("s", "erk", "megabytes", "trained", "erk_conv1", "uniform", "uniform_mb", "uniform_conv1"),
    [
        (0.75, 0.5249, 4.888, 0.5250, 0.5154, 0.2898, 4.894, 0.2666),
        (0.85, 0.3847, 3.224, 0.3850, 0.3701, 0.1951, 3.229, 0.1688),
        (0.90, 0.2927, 2.392, 0.2931, 0.2742, 0.1477, 2.396, 0.1199),
        (0.95, 0.1798, 1.560, 0.1849, 0.1580, 0.1004, 1.563, 0.0710),
    ],
)
def test_mobilenet_v1(s, erk, megabytes, trained, erk_conv1, uniform, uniform_mb, uniform_conv1):
    def check(distribution, fraction, size=None):
        r, mb = fraction_and_size(MOBILENET, distribution)
        assert r == pytest.approx(fraction, abs=5.1e-5)
        assert size is None or mb == pytest.approx(size, abs=6e-4)

    check(rigl_optax.erk(s, dense=depthwise), erk, megabytes)
    check(rigl_optax.erk(s, dense=conv1_and_depthwise), trained)
    check(rigl_optax.erk(s, dense=conv1), erk_conv1)
    check(rigl_optax.uniform(s, dense=conv1_and_depthwise), uniform, uniform_mb)
    check(rigl_optax.uniform(s, dense=conv1), uniform_conv1)


@pytest.mark.parametrize(
    ("s", "erk", "uniform", "overall"),
    [
        (0.75, 0.684, 0.336, 0.736),
        (0.85, 0.566, 0.248, 0.834),
        (0.90, 0.462, 0.203, 0.883),
        (0.95, 0.301, 0.159, 0.932),
    ],
)
def test_mobilenet_v2(s, erk, uniform, overall):
    for make, fraction in ((rigl_optax.erk, erk), (rigl_optax.uniform, uniform)):
        distribution = make(s, dense=conv1_and_depthwise)
        assert fraction_and_size(MOBILENET_V2, distribution)[0] == pytest.approx(fraction, abs=6e-4)
        sparsity = distribution(shapes(MOBILENET_V2))
        zeros = sum(sparsity.get(x.name, 0.0) * x.weights for x in MOBILENET_V2)
        total = sum(x.weights for x in MOBILENET_V2)
        assert zeros / total == pytest.approx(overall, abs=6e-4)


@pytest.mark.parametrize(
    ("s", "erk", "uniform"),
    [(0.5, 0.729, 0.502), (0.8, 0.354, 0.203), (0.9, 0.175, 0.104), (0.95, 0.090, 0.054)],
)
def test_wide_resnet(s, erk, uniform):
    # .35345 is given as .354, rounded up from four digits.
    assert fraction_and_size(WRN, rigl_optax.erk(s, dense=conv1))[0] == pytest.approx(erk, abs=6e-4)
    assert fraction_and_size(WRN, rigl_optax.uniform(s, dense=conv1))[0] == pytest.approx(
        uniform, abs=6e-4
    )


@pytest.mark.parametrize(
    ("layers", "width", "fraction"),
    [
        (published.resnet50, 0.465, 0.222),
        (published.resnet50, 0.34, 0.121),
        (published.resnet50, 0.26, 0.072),
        (published.resnet50, 0.231, 0.058),
        (published.mobilenet_v1, 0.47, 0.2335),
        (published.mobilenet_v1, 0.285, 0.0910),
    ],
)
def test_small_dense(layers, width, fraction):
    r = published.published_flops(layers(width)) / published.published_flops(layers())
    assert r == pytest.approx(fraction, abs=5.1e-4)


# ERK densities of ResNet-50 at .8, .9, .95, .965, .99, and .99 with conv1 dense.
RESNET_DENSITIES = {
    "conv1": (0.8572, 0.4200, 0.2098, 0.1469, 0.0420, 1),
    "2a_2a": (1, 1, 0.7735, 0.5415, 0.1547, 0.1549),
    "2a_2b": (0.3619, 0.1773, 0.0886, 0.0620, 0.0177, 0.0177),
    "2a_projection": (1, 0.9588, 0.4790, 0.3353, 0.0958, 0.0959),
    "3a_2a": (1, 0.5747, 0.2871, 0.2010, 0.0574, 0.0575),
    "3b_2b": (0.1769, 0.0867, 0.0433, 0.0303, 0.0087, 0.0087),
    "3b_2a": (0.9753, 0.4779, 0.2388, 0.1671, 0.0478, 0.0478),
    "3a_projection": (0.5849, 0.2866, 0.1432, 0.1002, 0.0286, 0.0287),
    "4a_2a": (0.5849, 0.2866, 0.1432, 0.1002, 0.0286, 0.0287),
    "4f_2b": (0.0874, 0.0428, 0.0214, 0.0150, 0.0043, 0.0043),
    "4f_2c": (0.4869, 0.2386, 0.1192, 0.0834, 0.0238, 0.0239),
    "4a_projection": (0.2921, 0.1431, 0.0715, 0.0500, 0.0143, 0.0143),
    "5c_2b": (0.0435, 0.0213, 0.0106, 0.0074, 0.0021, 0.0021),
    "5b_2a": (0.2433, 0.1192, 0.0595, 0.0417, 0.0119, 0.0119),
    "5a_projection": (0.1459, 0.0715, 0.0357, 0.0250, 0.0071, 0.0072),
    "classifier": (0.1482, 0.0726, 0.0363, 0.0254, 0.0073, 0.0073),
}


@pytest.mark.parametrize("column", range(6))
def test_resnet50_erk_densities(column):
    s = (0.8, 0.9, 0.95, 0.965, 0.99, 0.99)[column]
    sparsity = DISTRIBUTIONS[ERK_CONV1 if column == 5 else ERK](s)(shapes(RESNET))
    for name, densities in RESNET_DENSITIES.items():
        assert 1 - sparsity[name] == pytest.approx(densities[column], abs=5.1e-5), name
    if column < 5:
        active = sum(x.weights - int(sparsity[x.name] * x.weights) for x in RESNET)
        assert active == (5_100_630, 2_550_353, 1_275_200, 892_651, 255_082)[column]
        assert sum(v == 0 for v in sparsity.values()) == (8, 1, 0, 0, 0)[column]


# MobileNet-v1 at .75, .85, .90, .95; WRN-22-2 at .5, .8, .9, .95.
MOBILENET_DENSITIES = {
    "1_pw": (1, 1, 1, 0.7684),
    "2_pw": (1, 1, 0.7626, 0.3803),
    "3_pw": (1, 0.7634, 0.5071, 0.2529),
    "4_pw": (0.9625, 0.5711, 0.3793, 0.1892),
    "5_pw": (0.6408, 0.3802, 0.2526, 0.1259),
    "6_pw": (0.4800, 0.2848, 0.1892, 0.0943),
    "7_pw": (0.3198, 0.1897, 0.1260, 0.0629),
    "11_pw": (0.3198, 0.1897, 0.1260, 0.0629),
    "12_pw": (0.2397, 0.1422, 0.0945, 0.0471),
    "13_pw": (0.1597, 0.0948, 0.0630, 0.0314),
    "classifier": (0.1617, 0.0959, 0.0637, 0.0318),
}
WRN_DENSITIES = {
    "1_1_skip": (1, 1, 1, 1),
    "1_1_conv1": (1, 0.8875, 0.4227, 0.2049),
    "1_3_conv2": (1, 0.5753, 0.2740, 0.1328),
    "2_1_skip": (1, 1, 1, 0.8368),
    "2_1_conv1": (1, 0.4191, 0.1996, 0.0968),
    "2_2_conv1": (0.7629, 0.2753, 0.1311, 0.0636),
    "3_1_skip": (1, 1, 0.8543, 0.4141),
    "3_1_conv1": (0.5636, 0.2034, 0.0969, 0.0470),
    "3_3_conv2": (0.3729, 0.1346, 0.0641, 0.0311),
    "classifier": (1, 1, 1, 1),
}


@pytest.mark.parametrize("column", range(4))
@pytest.mark.parametrize(
    ("layers", "expected", "sparsities"),
    [
        (MOBILENET, MOBILENET_DENSITIES, (0.75, 0.85, 0.9, 0.95)),
        (WRN, WRN_DENSITIES, (0.5, 0.8, 0.9, 0.95)),
    ],
    ids=["MobileNet-v1", "WRN-22-2"],
)
def test_erk_densities(layers, expected, sparsities, column):
    sparsity = rigl_optax.erk(sparsities[column], dense=conv1_and_depthwise)(shapes(layers))
    for name, densities in expected.items():
        assert 1 - sparsity[name] == pytest.approx(densities[column], abs=5.1e-5), name


def test_unknown_layer():
    with pytest.raises(ValueError, match="no layer \\['conv9'\\]"):
        published.published_flops(WRN, {"conv9": 0.5})
