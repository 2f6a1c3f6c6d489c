"""Trained weights by their names: taken, or all that is wrong with them said at once."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import rigl_optax
from rigl_optax import _paths

PARAMS = {
    "Dense_0": {"kernel": jnp.zeros((2, 3), jnp.bfloat16), "bias": jnp.zeros(3)},
    "Dense_1": {"kernel": jnp.zeros((3, 4)), "bias": jnp.zeros(4)},
}


def drawn(shapes=PARAMS, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), shapes)


@pytest.mark.parametrize("only_shapes", [False, True])
def test_values_come_by_name_in_the_dtypes_of_params(only_shapes):
    wanted = jax.eval_shape(lambda: PARAMS) if only_shapes else PARAMS
    weights = drawn()
    found = rigl_optax.start_from(wanted, {"step": 3, **weights})
    assert jax.tree.structure(found) == jax.tree.structure(PARAMS)
    for (path, x), (_, before), (_, like) in zip(
        *map(_paths.flatten_with_paths, (found, weights, PARAMS)), strict=True
    ):
        assert x.dtype == like.dtype, path
        np.testing.assert_array_equal(x, before.astype(like.dtype))


def test_names_are_mapped_and_arrays_converted():
    weights = drawn()
    torch = {
        f"net.{i}.{name}": np.asarray(x).T
        for i in range(2)
        for name, x in zip(("bias", "weight"), jax.tree.leaves(weights[f"Dense_{i}"]), strict=True)
    }
    names = {r"Dense_(\d)/kernel": r"net.\1.weight", r".*_(\d)/(.*)": r"net.\1.\2"}
    found = rigl_optax.start_from(PARAMS, torch, names=names, convert=lambda path, x: x.T)
    np.testing.assert_array_equal(found["Dense_1"]["kernel"], weights["Dense_1"]["kernel"])
    np.testing.assert_array_equal(found["Dense_0"]["bias"], weights["Dense_0"]["bias"])


def test_an_nnx_state_is_taken_as_it_is():
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    other = nnx.Linear(2, 3, rngs=nnx.Rngs(1))
    found = rigl_optax.start_from(nnx.state(model), nnx.state(other))
    nnx.update(model, found)
    np.testing.assert_array_equal(model.kernel[...], other.kernel[...])


def test_what_is_kept_stays():
    head = PARAMS | {"Dense_1": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}}
    found = rigl_optax.start_from(head, {"Dense_0": drawn()["Dense_0"]}, keep=("Dense_1",))
    assert bool((found["Dense_1"]["kernel"] == 1).all())
    shapes = jax.eval_shape(lambda: PARAMS)
    with pytest.raises(ValueError, match="'Dense_1/bias' is only a shape"):
        rigl_optax.start_from(shapes, drawn(), keep=("Dense_1",))


def test_all_that_is_wrong_is_listed_at_once():
    weights = {
        "Dense_0": {"kernel": np.ones((3, 2)), "bias": np.full(3, np.nan)},
        "Dense_1": {"kernel": np.array("abc"), "more": np.ones(4)},
    }
    with pytest.raises(ValueError) as error:
        rigl_optax.start_from(PARAMS, weights, names={"Dense_1/bias": "Dense_1/b"})
    message = str(error.value)
    assert message.startswith("4 of 4 parameters do not come from the weights: ")
    for problem in (
        "'Dense_0/kernel' has shape (3, 2), not (2, 3)",
        "'Dense_0/bias' is not finite",
        "'Dense_1/kernel' has shape (), not (3, 4)",
        "'Dense_1/bias' ('Dense_1/b') is not there",
        "no parameter asks for: 'Dense_1/more'",
    ):
        assert problem in message


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"names": {"Conv.*": "x"}}, "names: 'Conv.*' match no parameter; they are 'Dense_0/bias'"),
        ({"names": {r"(.*)": r"\2"}}, r"names: '\\\\2': invalid group reference"),
        ({"names": {"(": "x"}}, r"names: '\(' is not a regular expression"),
        ({"keep": ("head",)}, "keep: 'head' matches no parameter"),
    ],
)
def test_a_wrong_argument_is_refused(keys, problem):
    with pytest.raises(ValueError, match=problem):
        rigl_optax.start_from(PARAMS, drawn(), **keys)


def test_a_sparse_network_goes_on_with_its_masks():
    params = {"kernel": jnp.asarray(np.eye(8, 6), jnp.float32), "bias": jnp.zeros(6)}
    masks = rigl_optax.nonzero_masks(params)
    assert bool(masks["bias"].all()) and int(masks["kernel"].sum()) == 6
    for make in (rigl_optax.static_sparse, rigl_optax.rigl):
        keys = {} if make is rigl_optax.static_sparse else {"end": 3, "every": 1}
        tx = make(optax.adamw(0.1), None, initial_masks=masks, **keys)
        state = tx.init(params)
        grads = jax.tree.map(jnp.ones_like, params)
        now = params
        for _ in range(4):
            updates, state = tx.update(grads, state, now)
            now = optax.apply_updates(now, updates)
        rigl_optax.check(now, state)
        assert int(state.healed) == 0 and int(rigl_optax.get_masks(state)["kernel"].sum()) == 6
    with pytest.raises(ValueError, match="params: all weights of 'kernel' are zero"):
        rigl_optax.nonzero_masks({"kernel": jnp.zeros((3, 3))})
