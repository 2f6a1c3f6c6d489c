"""Bad input raises one clear error, which names the value and, where it helps, the paths."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rigl_optax
from rigl_optax import erdos_renyi, erk, rigl, sparse_evolutionary_training, static_sparse, uniform

SGD = optax.sgd(0.1)
PARAMS = {
    "fc1": {"kernel": jnp.ones((8, 8)), "bias": jnp.zeros((8,))},
    "fc2": {"kernel": jnp.ones((8, 4)), "bias": jnp.zeros((4,))},
}
MASKS = jax.tree.map(lambda p: np.ones(p.shape, bool), PARAMS)
MASKS["fc1"]["kernel"][:4] = False


def says(*parts):
    """A pattern for `match=`: all parts, in any order."""
    import re

    return "(?s)" + "".join(f"(?=.*{re.escape(str(p))})" for p in parts)


@pytest.mark.parametrize("value", [1.0, 1.5, -0.1, float("nan"), float("inf"), 100])
@pytest.mark.parametrize("make", [uniform, erk, erdos_renyi, "rigl", "static", "set"])
def test_sparsity_outside_zero_and_one(make, value):
    makers = {
        "rigl": lambda s: rigl(SGD, s, end=100),
        "static": lambda s: static_sparse(SGD, s),
        "set": lambda s: sparse_evolutionary_training(SGD, s, end=100),
    }
    with pytest.raises(ValueError, match=says(value if value == value else "nan")):
        makers.get(make, make)(value)


@pytest.mark.parametrize("value", ["0.9", [0.9], object(), 0.5j])
def test_sparsity_of_a_wrong_type(value):
    with pytest.raises(TypeError):
        rigl(SGD, value, end=100)


@pytest.mark.parametrize("value", [1.0, -0.1, float("nan")])
def test_override_outside_zero_and_one(value):
    with pytest.raises(ValueError, match=says("nan" if value != value else value)):
        uniform(0.9, overrides={"fc1/kernel": value})(PARAMS)


@pytest.mark.parametrize("method", [rigl, sparse_evolutionary_training])
@pytest.mark.parametrize(
    "arguments",
    [
        {"end": 0},
        {"end": -1},
        {"end": 10, "begin": 10},
        {"end": 10, "begin": 11},
        {"end": 10, "begin": -1},
        {"end": 10, "every": 0},
        {"end": 10, "every": -5},
        {"end": 10, "drop_fraction": 1.1},
        {"end": 10, "drop_fraction": -0.1},
        {"end": 10, "drop_fraction": float("nan")},
    ],
    ids=str,
)
def test_schedules_that_make_no_sense(method, arguments):
    """`end <= begin` is also the only schedule under which no rewiring would ever happen."""
    culprit = [v for k, v in arguments.items() if k != "end"] or [arguments["end"]]
    with pytest.raises(ValueError, match=says(*culprit)):
        method(SGD, 0.9, **arguments)


@pytest.mark.parametrize("method", [rigl, sparse_evolutionary_training])
def test_end_is_required(method):
    with pytest.raises(TypeError, match="end"):
        method(SGD, 0.9)


@pytest.mark.parametrize(
    "arguments",
    [
        {"end": 10.5},
        {"end": "10"},
        {"end": 10, "every": 1.5},
        {"end": 10, "begin": 0.5},
        {"end": 10, "drop_fraction": "0.3"},
        {"end": None},
    ],
    ids=str,
)
def test_schedules_of_a_wrong_type(arguments):
    with pytest.raises((TypeError, ValueError)):
        rigl(SGD, 0.9, **arguments)


@pytest.mark.parametrize(
    ("make", "value"),
    [
        (rigl_optax.constant_drop_fraction, -0.1),
        (rigl_optax.constant_drop_fraction, 1.1),
        (rigl_optax.constant_drop_fraction, float("nan")),
        (lambda a: rigl_optax.cosine_drop_fraction(a, 100), 1.1),
        (lambda a: rigl_optax.linear_drop_fraction(a, 100), -0.1),
        (lambda a: rigl_optax.inverse_power_drop_fraction(a, 100), 1.1),
        (lambda e: rigl_optax.cosine_drop_fraction(0.3, e), 0),
        (lambda e: rigl_optax.linear_drop_fraction(0.3, e, 5), 5),
        (lambda e: rigl_optax.inverse_power_drop_fraction(0.3, e, 3.0, 5), 4),
    ],
)
def test_drop_fraction_schedules(make, value):
    with pytest.raises(ValueError, match=says("nan" if value != value else value)):
        make(value)


def test_an_inner_that_is_no_transformation():
    with pytest.raises(TypeError):
        rigl(0.1, 0.9, end=100)
    with pytest.raises(TypeError):
        rigl(optax.sgd, 0.9, end=100)


@pytest.mark.parametrize("rule", [uniform, erk, erdos_renyi])
def test_an_override_that_matches_nothing(rule):
    with pytest.raises(ValueError, match=says("fc3/kernel", "fc1/kernel", "fc2/kernel")):
        rule(0.5, overrides={"fc3/kernel": 0.0})(PARAMS)


def test_an_override_that_matches_dense_leaves_only():
    with pytest.raises(ValueError, match=says("bias", "fc1/kernel")):
        uniform(0.5, overrides={"bias": 0.5})(PARAMS)


def test_two_overrides_that_match_one_leaf():
    with pytest.raises(ValueError, match=says("fc1/kernel", "fc1", "fc.*kernel")):
        uniform(0.5, overrides={"^fc1": 0.0, "fc.*kernel": 0.1})(PARAMS)


def test_a_stacked_pattern_that_matches_nothing():
    with pytest.raises(ValueError, match=says("scan", "fc1/kernel")):
        uniform(0.5, stacked=("scan",))(PARAMS)


def test_a_pattern_that_is_no_regular_expression():
    with pytest.raises(ValueError, match=says("fc1(")):
        uniform(0.5, overrides={"fc1(": 0.0})(PARAMS)


def test_stacked_is_a_sequence_of_patterns_not_a_string():
    with pytest.raises(TypeError):
        uniform(0.5, stacked="fc1")(PARAMS)


def test_errors_of_a_distribution_reach_init():
    tx = rigl(SGD, uniform(0.5, overrides={"nowhere": 0.0}), end=10)
    with pytest.raises(ValueError, match=says("nowhere", "fc1/kernel")):
        tx.init(PARAMS)


@pytest.mark.parametrize("rule", [uniform, erk, erdos_renyi])
def test_nothing_left_to_sparsify(rule):
    with pytest.raises(ValueError, match=says("nothing", "a/bias", "b")):
        rule(0.5)({"a": {"bias": jnp.ones((5,))}, "b": jnp.ones((7,))})
    with pytest.raises(ValueError, match=says("nothing")):
        rigl(SGD, rule(0.5), end=10).init({"b": jnp.ones((7,))})


@pytest.mark.parametrize("rule", [erk, erdos_renyi])
@pytest.mark.parametrize("shapes", [[(2, 2), (2, 3)], [(2, 2)], [(3, 3), (3, 3)]], ids=str)
def test_a_target_that_erk_cannot_reach(rule, shapes):
    """Flooring leaves no zeros at all: every layer is dense, and the target is missed."""
    params = {str(i): jnp.ones(s) for i, s in enumerate(shapes)}
    with pytest.raises(ValueError, match=says("0.1")):
        rule(0.1)(params)


def test_duplicate_paths():
    params = {"a": {"b": jnp.ones((4, 4))}, "a/b": jnp.ones((4, 4))}
    with pytest.raises(ValueError, match=says("a/b")):
        uniform(0.5)(params)
    with pytest.raises(ValueError, match=says("a/b")):
        static_sparse(SGD, 0.5).init(params)


def test_a_leaf_of_two_to_the_31():
    shape = jax.ShapeDtypeStruct((2**16, 2**15), jnp.float32)
    for tx in (static_sparse(SGD, uniform(0.5)), rigl(SGD, uniform(0.5), end=10)):
        with pytest.raises(ValueError, match=says("big", 2**31)):
            jax.eval_shape(tx.init, {"big": shape})
    jax.eval_shape(tx.init, {"big": jax.ShapeDtypeStruct((1, 2**31 - 1), jnp.float32)})


@pytest.mark.parametrize("method", ["rigl", "static_sparse", "sparse_evolutionary_training"])
def test_update_without_params(method):
    options = {} if method == "static_sparse" else {"end": 10}
    tx = getattr(rigl_optax, method)(SGD, 0.5, **options)
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match="params"):
        tx.update(PARAMS, state)
    with pytest.raises(ValueError, match="params"):
        tx.update(PARAMS, state, None)


@pytest.mark.parametrize("sparsity", [None, 0.5, uniform(0.5)], ids=["none", "float", "uniform"])
class TestInitialMasks:
    def init(self, sparsity, masks):
        return rigl(SGD, sparsity, end=10, initial_masks=masks).init(PARAMS)

    def test_of_the_wrong_shape(self, sparsity):
        masks = jax.tree.map(lambda m: m, MASKS)
        masks["fc1"]["kernel"] = np.arange(32).reshape(8, 4) < 9
        with pytest.raises(ValueError, match=says("fc1/kernel", "(8, 4)", "(8, 8)")):
            self.init(sparsity, masks)

    @pytest.mark.parametrize("dtype", [np.float32, np.int32])
    def test_of_the_wrong_dtype(self, sparsity, dtype):
        masks = jax.tree.map(lambda m: m, MASKS)
        masks["fc1"]["kernel"] = masks["fc1"]["kernel"].astype(dtype)
        with pytest.raises((ValueError, TypeError), match=says("fc1/kernel", np.dtype(dtype))):
            self.init(sparsity, masks)

    def test_of_another_structure(self, sparsity):
        with pytest.raises(ValueError, match=says("fc2/kernel")):
            self.init(sparsity, {"fc1": MASKS["fc1"]})
        with pytest.raises(ValueError, match=says("fc3")):
            self.init(sparsity, {**MASKS, "fc3": np.zeros((2, 2), bool)})


def test_initial_masks_that_open_a_dense_leaf():
    masks = jax.tree.map(lambda m: m, MASKS)
    masks["fc1"]["bias"] = np.zeros(8, bool)
    with pytest.raises(ValueError, match=says("fc1/bias")):
        rigl(SGD, 0.5, end=10, initial_masks=masks).init(PARAMS)


def test_no_sparsity_and_no_masks():
    with pytest.raises(ValueError, match="initial_masks"):
        rigl(SGD, None, end=10)


def test_get_masks_where_there_are_none():
    state = optax.adam(0.1).init(PARAMS)
    with pytest.raises(ValueError, match="ScaleByAdamState|tuple"):
        rigl_optax.get_masks(state)
    with pytest.raises(ValueError):
        rigl_optax.get_masks(())
    with pytest.raises(ValueError):
        rigl_optax.apply_masks(PARAMS, state)


def test_apply_masks_to_other_params():
    state = static_sparse(SGD, 0.5).init(PARAMS)
    with pytest.raises(ValueError):
        rigl_optax.apply_masks({"other": {"kernel": jnp.ones((8, 8))}}, state)
    with pytest.raises(ValueError, match="fc1/kernel"):
        rigl_optax.apply_masks(
            {**PARAMS, "fc1": {"kernel": jnp.ones((8, 9)), "bias": jnp.ones((8,))}}, state
        )


def test_an_error_is_one_line_of_sense():
    """No traceback through JAX, nothing about tracers: the message alone tells what to do."""
    with pytest.raises(ValueError) as info:
        rigl(SGD, 1.0, end=10)
    assert "Tracer" not in str(info.value)
    assert len(str(info.value)) < 300


# --------------------------------------------------------------------- trees that do not belong


@pytest.mark.parametrize(
    ("gradients", "parts"),
    [
        ({"fc1": PARAMS["fc1"]}, ["missing 'fc2/bias', 'fc2/kernel'", "unknown none"]),
        (PARAMS | {"fc3": jnp.ones(2)}, ["missing none", "unknown 'fc3'"]),
        (tuple(PARAMS.values()), ["'fc1/kernel'", "'0/kernel'"]),
        (PARAMS | {"fc2": PARAMS["fc1"]}, ["'fc2/bias'", "(8,)", "(4,)"]),
        (PARAMS | {"fc2": {"kernel": jnp.ones((1, 4)), "bias": jnp.ones(4)}}, ["(1, 4)"]),
        (PARAMS | {"fc2": {"kernel": None, "bias": jnp.ones(4)}}, ["None for 'fc2/kernel'"]),
        (PARAMS | {"fc2": {"kernel": (jnp.ones(4),), "bias": jnp.ones(4)}}, ["in place of 'fc2/k"]),
        (list(jax.tree.leaves(PARAMS)), ["'0'"]),
    ],
    ids=range(8),
)
def test_gradients_of_other_parameters(gradients, parts):
    tx = rigl(SGD, 0.5, end=10)
    state = jax.eval_shape(tx.init, PARAMS)
    with pytest.raises(ValueError, match=says("gradients do not fit params", *parts)):
        jax.eval_shape(lambda g, s: tx.update(g, s, PARAMS), gradients, state)


def test_gradients_in_another_container():
    tx = rigl(SGD, 0.5, end=10, drop_fraction=0.5)
    params = [jnp.ones((4, 4))]
    state = tx.init(params)
    with pytest.raises(ValueError, match="another kind of tree"):
        tx.update(tuple(params), state, params)


def test_a_state_in_place_of_params():
    state = rigl(optax.adam(0.1), 0.5, end=10).init(PARAMS)
    for wrong in (
        state,
        (state,),
        optax.adam(0.1).init(PARAMS),
        optax.MultiSteps(SGD, 2).init(PARAMS),
    ):
        with pytest.raises(ValueError, match="optimizer's state"):
            rigl_optax.explain(wrong, 0.5, end=10)
        with pytest.raises(ValueError, match="optimizer's state"):
            rigl(SGD, 0.5, end=10).init(wrong)


def test_a_sparse_method_inside_another():
    inner = rigl(SGD, 0.5, end=10)
    for wrong in (inner, optax.chain(optax.clip(1.0), inner), optax.apply_if_finite(inner, 3)):
        with pytest.raises(ValueError, match="inner: is sparse already"):
            static_sparse(wrong, 0.5).init(PARAMS)


def test_leaves_that_are_no_arrays():
    """Python's numbers are parameters to Optax, too; functions of a whole model are not."""
    params = PARAMS | {"temperature": 0.5, "steps": 3}
    tx = rigl(SGD, 0.5, end=10, every=1)
    state = tx.init(params)
    assert state.masks["temperature"].shape == ()
    params = rigl_optax.apply_masks(params, state)
    grads = jax.tree.map(lambda p: jnp.ones_like(p, jnp.float32), params)
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    updates, state = tx.update(grads, state, params)
    assert rigl_optax.uniform(0.5)(params) == {"fc1/kernel": 0.5, "fc2/kernel": 0.5}
    for wrong in (jax.nn.relu, "relu", object()):
        for take in (tx.init, rigl_optax.uniform(0.5), lambda p: rigl_optax.explain(p, 0.5, end=9)):
            with pytest.raises(ValueError, match=says("'act/0' is no array", "eqx.filter")):
                take(PARAMS | {"act": [wrong]})
