import functools
import inspect
import itertools
import json
import re
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rigl_optax
from rigl_optax.accounting import explain, explanation


def shape(*dims):
    return jax.ShapeDtypeStruct(dims, jnp.float32)


def mlp(*widths):
    return {
        f"Dense_{i}": {"kernel": shape(a, b), "bias": shape(b)}
        for i, (a, b) in enumerate(itertools.pairwise(widths))
    }


def forward(params, x):
    *hidden, last = params.values()
    for layer in hidden:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    return x @ last["kernel"] + last["bias"]


LENET = mlp(784, 300, 100, 10)
GOOD = {"end": 30_000, "steps": 40_000, "model": forward, "inputs": [shape(1, 784)]}


def real(params):
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), params)


def test_a_good_run_has_no_warnings_and_the_right_totals():
    report = explain(LENET, 0.9, **GOOD)
    assert report.warnings == () and report.notes == ()
    assert report.rewirings == 300
    assert report.flops_dense == 2 * (784 * 300 + 300 * 100 + 100 * 10)
    assert report.inference_ratio == pytest.approx(0.1, abs=1e-5)  # every weight is used once
    expected = (39_700 * 3 * report.flops_sparse) + 300 * (
        2 * report.flops_sparse + report.flops_dense
    )
    assert report.training_ratio == pytest.approx(expected / (40_000 * 3 * report.flops_dense))
    assert sum(x.flops_share for x in report.layers) == pytest.approx(1)


@pytest.mark.parametrize(
    "sparsity",
    [
        0.9,
        rigl_optax.erk(0.77, overrides={"Dense_1": 0.0}),
        lambda params: {"Dense_1/kernel": 0.7},
    ],
)
def test_counts_are_those_of_the_transformation(sparsity):
    params = mlp(37, 29, 11)
    report = explain(params, sparsity, end=10_000)
    tx = rigl_optax.static_sparse(optax.sgd(0.1), sparsity)
    masks = rigl_optax.get_masks(tx.init(real(params)))
    active = {
        jax.tree_util.keystr(path, simple=True, separator="/"): int(mask.sum())
        for path, mask in jax.tree_util.tree_leaves_with_path(masks)
    }
    assert {x.path: x.active for x in report.layers} == active


STRUCTURES = {
    "single weights": rigl_optax.Unstructured(),
    "blocks": rigl_optax.Block(4, 2),
    "ragged blocks": rigl_optax.Block(5, 3, pad=True),
    "2:4": rigl_optax.NM(2, 4),
    "fan-in": rigl_optax.ConstantFanIn(),
    "of one layer": {"Dense_1": rigl_optax.Block(4, 4)},
}
OPTIONS = {
    "spdf": {"dense_from": 50},
    "top_kast": {"backward_sparsity": rigl_optax.uniform(0.5)},
    "deepr": {"learning_rate": 0.1},
    "str": {"threshold_decay": 0.1},
}
# One method of each function, and what its options make of it.
EXPLAINED = [
    name
    for name in explanation.TRANSFORMATIONS
    if name not in ("snip", "grasp", "synflow", "lottery", "rigl_itop", "lottery_rigl", "gmp_25_75")
]


@pytest.mark.parametrize("method", EXPLAINED)
def test_active_is_what_init_makes_of_every_method_and_structure(method):
    params, half = mlp(16, 12, 8), rigl_optax.uniform(0.5)
    make = explanation.TRANSFORMATIONS[method]
    if make is None:
        assert explain(params, half, end=90, method=method).weights == 0
        return
    has = inspect.signature(make).parameters
    for name, structure in STRUCTURES.items():
        options = OPTIONS.get(method, {}) | {"seed": 3}
        if name != "single weights":
            options["structure"] = structure
        schedule = {key: n for key, n in (("end", 90), ("every", 30)) if key in has}
        layers = {"layers" if method == "str" else "sparsity": half}
        explained = functools.partial(explain, params, half, end=90, method=method, **options)
        try:
            state = make(optax.sgd(0.1), **layers, **schedule, **options).init(real(params))
        except (TypeError, ValueError) as error:
            # What the transformation refuses is refused, in its own words or as unknown to it.
            expected = str(error) if "structure" in has else "has no 'structure'"
            with pytest.raises(ValueError, match=re.escape(expected)):
                explained(every=schedule.get("every"))
            continue
        report = explained(every=schedule.get("every"))
        active = {
            jax.tree_util.keystr(path, simple=True, separator="/"): int(mask.sum())
            for path, mask in jax.tree_util.tree_leaves_with_path(state.masks)
        }
        assert {x.path: x.active for x in report.layers} == active, name
        sparse = [x.path for x in report.layers if x.is_sparse]
        assert report.to_dict()["active"] == sum(active[path] for path in sparse)


def test_schedules_and_options_are_those_of_the_transformation():
    overrides = {"Dense_0": {"every": 10, "drop_fraction": 0.1}}
    report = explain(mlp(40, 30, 20), 0.5, end=40, every=20, overrides=overrides)
    assert report.rewirings == 4
    expected = 0
    for layer, alpha, every in zip(report.layers[1::2], (0.1, 0.3), (10, 20), strict=True):
        for t in range(0, 40, every):
            share = float(rigl_optax.cosine_drop_fraction(alpha, 40)(t))
            expected += int(np.float32(layer.active) * np.float32(share))
    assert report.replaced == expected

    accumulated = explain(LENET, 0.9, **GOOD, accumulate=5)
    sparse, dense = accumulated.flops_sparse, accumulated.flops_dense
    gradients = 1 + 5 * 299  # of the first rewiring's window only one call is there
    spent = 3 * sparse * 40_000 + gradients * (dense - sparse)
    assert accumulated.training_ratio == pytest.approx(spent / (3 * dense * 40_000))

    pruned = explain(LENET, 0.9, **GOOD, method="gradual_magnitude_pruning")
    static = explain(LENET, 0.9, **GOOD, method="static")
    assert pruned.active == pruned.weights and pruned.active_at_end == static.active
    assert pruned.inference_ratio == static.inference_ratio
    assert pruned.replaced == 0 and pruned.warnings == ()
    assert "when training ends" in str(pruned) and "at end" in str(pruned)

    kast = explain(LENET, 0.9, **GOOD, method="top_kast", backward_sparsity=0.8)
    assert kast.training_ratio == pytest.approx((0.1 + 0.1 + 0.2) / 3, abs=1e-4)
    assert kast.replaced is None and "nan" not in str(kast)

    for given, message in (
        ({"method": "static", "overrides": overrides}, "'static' has no 'overrides'; it has 'str"),
        ({"method": "deepr"}, "method 'deepr' needs 'learning_rate'"),
        ({"method": "granet", "accumulate": 3}, "'granet' has no 'accumulate'"),
        ({"structure": rigl_optax.Block(7, 7)}, "does not divide"),
        ({"end": None, "steps": None}, "give the number of training steps"),
        ({"end": None, "steps": 100}, "method 'rigl' needs 'end'"),
    ):
        with pytest.raises(ValueError, match=message):
            explain(LENET, 0.9, **({"end": 50} | given))


def test_replaced_weights_are_those_that_rewirings_may_replace():
    params = {"kernel": shape(40, 30)}
    report = explain(params, 0.5, end=40, every=10, drop_fraction=0.3)
    fractions = [float(rigl_optax.cosine_drop_fraction(0.3, 40)(t)) for t in (0, 10, 20, 30)]
    assert report.replaced == sum(int(np.float32(600) * np.float32(f)) for f in fractions)
    assert report.turnover == report.replaced / 600
    assert report.reach == (600 + report.replaced) / 1200


def test_stacked_layers_and_initial_masks():
    params = {"layers": {"kernel": shape(3, 20, 10)}}
    stacked = rigl_optax.uniform(0.75, stacked=("layers",))
    assert explain(params, stacked, end=1000).active == 3 * 50
    masks = {"layers": {"kernel": np.arange(600).reshape(3, 20, 10) % 3 == 0}}
    report = explain(params, None, end=1000, initial_masks=masks)
    assert report.active == 200
    assert explain(params, stacked, end=1000, initial_masks=masks).active == 200


def test_dense_because():
    params = {
        "conv": {"kernel": shape(3, 3, 8, 16), "bias": shape(16)},
        "depthwise": {"kernel": shape(3, 3, 1, 16)},
        "embed": {"embedding": shape(100, 16)},
        "small": {"kernel": shape(2, 2)},
        "head": {"kernel": shape(300, 100)},
        "steps": jax.ShapeDtypeStruct((2, 2), jnp.int32),
    }
    sparsity = rigl_optax.erk(0.5, overrides={"head": 0.0, "small": 0.1})
    reasons = {x.path: x.dense_because for x in explain(params, sparsity, end=9, every=1).layers}
    assert reasons == {
        "conv/kernel": None,
        "conv/bias": "fewer than two dimensions",
        "depthwise/kernel": "depthwise, or a stem with one input channel",
        "embed/embedding": "an embedding",
        "small/kernel": "override of 0.1",
        "head/kernel": "override of 0",
        "steps": "not floating point (int32)",
    }
    capped = explain(mlp(784, 300, 10), 0.5, end=900).layers
    assert [x.dense_because for x in capped if x.path == "Dense_1/kernel"] == [
        "erk would make it denser than dense"
    ]

    def own(path, leaf):
        return "Dense_0" in path

    report = explain(
        LENET,
        rigl_optax.uniform(0.5, dense=lambda p, x: "_0" in p or own(p, x) or x.ndim < 2),
        end=900,
    )
    assert {x.dense_because for x in report.layers} == {None, "`dense` says so"}
    report = explain(LENET, lambda p: {"Dense_1/kernel": 0.5, "Dense_2/kernel": 1e-5}, end=900)
    assert {x.dense_because for x in report.layers} == {
        None,
        "not in the distribution",
        "too small: 1e-05 of 1000 weights is less than one",
    }


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"sparsity": 0.999}, "fewer than 2 inputs per unit on average in Dense_0/kernel (0.61)"),
        ({"end": 100}, "the schedule ends before it matters"),
        ({"end": 5000}, "rewiring ends after 12% of 40000 steps"),
        ({"end": 50_000}, "lies beyond the last of 40000 steps"),
        ({"every": 5}, "every=5 is less than 1 / density"),
        ({"drop_fraction": 0.00001}, "too few active weights for the drop fraction"),
        ({"model": lambda p, x: forward({"a": p["Dense_0"]}, x)}, "no product uses"),
        ({"model": lambda p, x: (forward(p, x), x.T @ x)}, "of the FLOPs belong to no single"),
    ],
)
def test_warnings(arguments, expected):
    arguments = {**GOOD, "sparsity": 0.9, **arguments}
    report = explain(LENET, **arguments)
    assert any(expected in warning for warning in report.warnings), report.warnings


def test_warns_of_masked_embeddings_and_depthwise_kernels():
    params = {"embed": shape(100, 64), "depthwise": {"kernel": shape(3, 3, 1, 64)}}
    sparsity = rigl_optax.uniform(0.5, dense=lambda path, leaf: False)
    warnings = explain(params, sparsity, end=10_000).warnings
    assert "embed is masked, but is usually left dense (an embedding)" in warnings
    assert any("depthwise/kernel is masked" in w for w in warnings)


def test_warns_of_random_masks_on_trained_weights():
    params = real(LENET)
    params["Dense_0"]["bias"] = jnp.linspace(-1.0, 1.0, 300)
    (warning,) = explain(params, 0.9, **GOOD).warnings
    assert "'Dense_0/bias' hold different values" in warning and "initial_masks" in warning
    masks = jax.tree.map(lambda x: np.arange(x.size).reshape(x.shape) % 9 == 0, LENET)
    for layer in masks.values():
        layer["bias"] = np.ones_like(layer["bias"])
    assert not explain(params, 0.9, **GOOD, initial_masks=masks).warnings
    assert not explain(real(LENET), 0.9, **GOOD).warnings


def test_controls():
    dense = explain(LENET, 0.9, **GOOD, method="dense")
    assert dense.inference_ratio == dense.training_ratio == 1 and dense.rewirings == 0
    static = explain(LENET, 0.9, **GOOD, method="static")
    assert static.training_ratio == pytest.approx(static.inference_ratio)
    assert static.rewirings == static.replaced == 0 and static.warnings == ()
    with pytest.raises(ValueError, match="method 'pruning' cannot be explained"):
        explain(LENET, 0.9, end=100, method="pruning")


def test_bad_arguments_raise_as_rigl_does():
    with pytest.raises(ValueError, match="end=0"):
        explain(LENET, 0.9, end=0)
    with pytest.raises(ValueError, match="matches no sparse leaf"):
        explain(LENET, rigl_optax.erk(0.9, overrides={"conv": 0.0}), end=10)


def test_the_average_number_of_parameters():
    params = {"Dense_0": {"kernel": jnp.zeros((100, 10)), "bias": jnp.zeros(10)}}
    keys = {"end": 9, "steps": 20}
    assert explain(params, 0.9, **keys, every=1).average_parameters == 110
    pruned = explain(params, 0.9, method="gmp", begin=5, every=3, **keys)
    # Dense until the pruning at 8, which is the last.
    assert pruned.average_parameters == (9 * 1010 + 11 * 110) / 20
    assert "560 active on average" not in str(explain(params, 0.9, **keys, every=1))
    assert f"{pruned.average_parameters:,.0f} active on average" in str(pruned)
    soft = explain(params, 0.9, method="mest", soft=True, every=4, drop_fraction=0.5, **keys)
    f = [float(rigl_optax.cosine_drop_fraction(0.5, end=9)(t)) for t in (0, 4)]
    assert soft.average_parameters == pytest.approx(110 + 100 * 4 * sum(f) / 20)
    assert "up to 50.0% more weights" in str(soft)
    opened = explain(params, 0.9, method="spdf", dense_from=9, steps=20)
    assert opened.average_parameters == (10 * 110 + 10 * 1010) / 20
    assert (opened.active, opened.active_at_end) == (100, 1000)
    model = lambda p, x: x @ p["Dense_0"]["kernel"]
    costs = explain(
        params, 0.9, method="mest", soft=True, every=4, drop_fraction=0.5, model=model,
        inputs=[jax.ShapeDtypeStruct((1, 100), "float32")], **keys,
    )  # fmt: skip
    assert costs.training_ratio == pytest.approx(0.1 * (1 + 4 * sum(f) / 20))


def test_json_and_text():
    report = explain(LENET, 0.9, **GOOD)
    again = json.loads(json.dumps(report.to_dict()))
    assert again["layers"][1]["shape"] == [784, 300]
    assert again["inference_ratio"] == report.inference_ratio
    assert again["storage"]["dense"] == report.storage.dense
    text = report.to_text(rich=False)
    assert str(report) == text
    assert "\x1b" not in text and text.isascii()
    assert "Dense_0/kernel  784x300" in text and "0.1000 of dense" in text
    assert "FLOPs" not in explain(LENET, 0.9, end=30_000).to_text(rich=False)
    rich = pytest.importorskip("rich")
    assert rich and "\x1b" in report.to_text(rich=True)


def test_plain_in_a_pipe_and_without_rich():
    code = """
import sys
sys.modules["rich"] = None
import jax, jax.numpy as jnp
from rigl_optax.accounting import explain, explanation
print(explain({"kernel": jax.ShapeDtypeStruct((64, 32), jnp.float32)}, .75, end=1000).to_text())
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.startswith("layer") and "\x1b" not in out.stdout


def test_biases_drawn_at_random_are_no_sign_of_training():
    key = jax.random.key(0)
    layers = [eqx.nn.Linear(40, 30, key=key), eqx.nn.GRUCell(40, 30, key=key)]
    params = eqx.filter(layers, eqx.is_inexact_array)
    assert explain(params, 0.5, end=30_000, steps=40_000).warnings == ()
    params.append({"norm": {"scale": jnp.linspace(0.5, 1.0, 30)}})
    (warning,) = explain(params, 0.5, end=30_000, steps=40_000).warnings
    assert "'2/norm/scale' hold different values" in warning
