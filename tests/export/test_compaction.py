"""Compaction by a description: liveness, constants, and the reference's own rule for an MLP."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rigl_optax import export


def mlp(widths, density, seed=0, bias=True):
    """Layers `0`, `1`, ... of an MLP with few weights."""
    rng = np.random.default_rng(seed)
    params = {}
    for i, shape in enumerate(itertools.pairwise(widths)):
        kernel = rng.standard_normal(shape) * (rng.random(shape) < density)
        params[str(i)] = {"kernel": kernel} | (
            {"bias": rng.standard_normal(shape[1])} if bias else {}
        )
    return params


def describe(units, layers=3):
    x = units.inputs(units.leaves["0/kernel"].shape[0])
    for i in range(layers):
        x = units.layer(units.relu(x) if i else x, str(i))
    units.outputs(x)


def forward(params, x):
    for i in range(len(params)):
        layer = params[str(i)]
        x = np.maximum(x, 0) if i else x
        x = x @ layer["kernel"] + layer.get("bias", 0)
    return x


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("bias", [True, False])
def test_an_mlp_is_cut_down_to_the_units_on_a_path(seed, bias):
    """Restated with powers of the matrix of connections between all units."""
    params = mlp((9, 12, 8, 4), 0.12, seed, bias)
    small = export.compact(params, describe)
    x = np.random.default_rng(1).standard_normal((5, 9))
    np.testing.assert_allclose(forward(small.params, x), forward(params, x), atol=1e-12)
    size = sum((9, 12, 8, 4))
    edges, at = np.zeros((size, size), bool), 0
    for i in range(3):
        rows, cols = params[str(i)]["kernel"].shape
        edges[at : at + rows, at + rows : at + rows + cols] = params[str(i)]["kernel"] != 0
        at += rows
    reach = np.linalg.matrix_power(np.eye(size) + edges, 4) > 0
    used = reach[:9].any(0) & reach[:, -4:].any(1)
    expected = [int(used[9:21].sum()), int(used[21:29].sum())]
    assert [now for _, now in small.units.values()] == [max(1, n) for n in expected]


def test_constants_move_through_a_chain_of_layers():
    """Nothing of the input arrives: all that is left is one number in the last bias."""
    params = mlp((3, 4, 4, 2), 1.0)
    params["0"]["kernel"][:] = 0
    small = export.compact(params, describe)
    assert small.units == {"0": (4, 1), "1": (4, 1)}
    np.testing.assert_allclose(small.params["2"]["bias"], forward(params, np.ones((1, 3)))[0])
    assert not small.params["2"]["kernel"].any()


def test_units_that_only_read_each_other_go():
    rng = np.random.default_rng(0)
    kernel, back = rng.standard_normal((3, 12)), np.zeros((4, 12))
    back[2:, 2::4] = back[2:, 3::4] = 1.0  # units 2 and 3, of all gates
    params = {
        "input": {"kernel": kernel, "bias": np.zeros(12)},
        "recurrent": {"kernel": back},
    }
    last = {"kernel": np.array([[1.0], [2], [0], [0]]), "bias": np.zeros(1)}

    def walk(units):
        x = units.recurrent(units.inputs(3), "gru", ("reset", "update", "candidate"), "candidate")
        units.outputs(units.layer(x, "last"))

    assert export.compact({"gru": params, "last": last}, walk).units == {"gru": (4, 2)}
    params["input"]["kernel"][:, 8] = 0  # the candidate of unit 0: it stays 0
    assert export.compact({"gru": params, "last": last}, walk).units == {"gru": (4, 1)}
    params["input"]["bias"][8] = 1.0  # it moves, though it reads nothing
    assert export.compact({"gru": params, "last": last}, walk).units == {"gru": (4, 2)}


@pytest.mark.parametrize("window", [1, 3])
def test_a_constant_before_padding_stays(window):
    """A window of 3 sees zeros at the border, where a window of 1 sees the constant everywhere."""
    rng = np.random.default_rng(0)
    params = {
        "a": {"kernel": rng.standard_normal((1, 1, 2, 3)), "bias": np.array([1.0, 2.0, 0.0])},
        "b": {"kernel": rng.standard_normal((window, window, 3, 2)), "bias": np.zeros(2)},
    }
    params["a"]["kernel"][..., 1:] = 0  # unit 1 is 2 everywhere, unit 2 is 0

    def walk(units):
        units.outputs(units.layer(units.relu(units.layer(units.inputs(2), "a")), "b"))

    small = export.compact(params, walk)
    assert small.units == {"a": (3, 1 if window == 1 else 2)}
    expected = 2 * params["b"]["kernel"][0, 0, 1] if window == 1 else np.zeros(2)
    np.testing.assert_allclose(small.params["b"]["bias"], expected)


def test_a_sum_keeps_what_either_side_needs():
    eye = np.eye(3)
    params = {
        "a": {"kernel": eye * [1, 0, 0]},
        "b": {"kernel": eye * [0, 1, 0]},
        "c": {"kernel": eye},
    }

    def walk(units):
        x = units.inputs(3)
        units.outputs(units.layer(units.add(units.layer(x, "a"), units.layer(x, "b")), "c"))

    small = export.compact(params, walk)
    assert small.units == {"a": (3, 2)} and small.params["c"]["kernel"].shape == (2, 3)
    np.testing.assert_array_equal(small.kept["b/kernel", 1], [0, 1])
    masks = {name: {"kernel": layer["kernel"] != 0} for name, layer in params.items()}
    assert small.cut(masks)["c"]["kernel"].tolist() == [[True, False, False], [False, True, False]]


def test_an_equinox_model_describes_itself_from_outside():
    model = eqx.nn.MLP(4, 2, 8, 2, key=jax.random.key(0))
    where = lambda m: m.layers[1].weight
    model = eqx.tree_at(where, model, where(model) * (jnp.arange(8) < 3)[:, None])
    arrays, static = eqx.partition(model, eqx.is_inexact_array)

    def walk(units):
        x = units.inputs(4)
        for i in range(2):
            x = units.relu(units.layer(x, f"layers/{i}"))
        units.outputs(units.layer(x, "layers/2"))

    small = export.compact(arrays, walk)
    smaller = eqx.combine(jax.tree.map(jnp.asarray, small.params), static)
    x = jnp.arange(4.0)
    np.testing.assert_allclose(smaller(x), model(x), rtol=1e-5)
    assert small.units["layers/1"] == (8, 3) and smaller.layers[1].weight.shape == (3, 8)


WRONG = {
    r"no kernel below 'x'; arrays are '0/bias', '0/kernel'": lambda u: u.layer(u.inputs(9), "x"),
    r"'0/kernel' has 9 entries along axis 0, not the 5 of 5": lambda u: u.layer(u.inputs(5), "0"),
    r"'inputs' has 9 units, '0' 12; they cannot": lambda u: u.add(
        u.inputs(9), u.layer(u.inputs(9), "0")
    ),
    r"'0/kernel' is shared out differently along axis 0": lambda u: [
        u.layer(u.inputs(9), "0"),
        u.layer(u.inputs(3)._replace(width=3), "0"),
    ],
    r"there is no 'n/scale'": lambda u: u.norm(u.inputs(9), "n", 1e-5),
}


@pytest.mark.parametrize(("problem", "walk"), WRONG.items())
def test_a_wrong_description_is_refused(problem, walk):
    with pytest.raises(ValueError, match=problem):
        export.compact(mlp((9, 12), 1.0), walk)
