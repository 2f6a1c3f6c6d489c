"""Arguments that are numbers: scalars of NumPy are as good as Python's, in every argument."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rigl_optax

SGD = optax.sgd(0.1)
PARAMS = {"kernel": jnp.arange(1.0, 65).reshape(8, 8), "bias": jnp.ones(8)}
PLAN = {"end": 9, "every": 2, "begin": 1, "seed": 3}
I, F, A = np.int64, np.float64, np.array

METHODS = {
    "rigl": ({"sparsity": 0.5, "drop_fraction": 0.25, "accumulate": 2, "min_fan_in": 1}, PLAN),
    "sparse_evolutionary_training": ({"sparsity": 0.5, "drop_fraction": 0.25}, PLAN),
    "mest": ({"sparsity": 0.5, "drop_fraction": 0.25, "gradient_weight": 0.5}, PLAN),
    "cht": ({"sparsity": 0.75, "drop_fraction": 0.25, "initial_sparsity": 0.5}, PLAN),
    "sparse_momentum": ({"sparsity": 0.5, "momentum": 0.5}, PLAN),
    "gradual_magnitude_pruning": ({"sparsity": 0.5, "power": 3.0, "initial_sparsity": 0.25}, PLAN),
    "granet": ({"sparsity": 0.75, "power": 3.0, "initial_sparsity": 0.25}, PLAN),
    "dynamic_sparse_reparameterization": (
        {"sparsity": 0.5, "initial_threshold": 0.25, "tolerance": 0.5},
        PLAN,
    ),
    "acdc": ({"sparsity": 0.5}, PLAN),
    "iterative_hard_thresholding": (
        {"sparsity": 0.5, "min_fan_in": 1, "initial_sparsity": 0.25},
        PLAN,
    ),
    "top_kast": ({"sparsity": 0.5, "backward_sparsity": 0.25, "exploration": 0.5}, PLAN),
    "dnw": ({"sparsity": 0.5}, PLAN),
    "deep_rewiring": (
        {"sparsity": 0.5, "learning_rate": 0.125, "l1": 0.25, "temperature": 0.5},
        {"seed": 3},
    ),
    "spdf": ({"sparsity": 0.5, "dense_from": 4}, {"seed": 3}),
    "static_sparse": ({"sparsity": 0.5}, {"seed": 3}),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", ["scalars", "arrays"])
def test_numbers_of_numpy(name, kind):
    """The same masks and the same types, also in 64 bits, where NumPy's numbers are no weaker."""
    reals, plan = METHODS[name]
    convert = {"scalars": (F, I), "arrays": (A, A)}[kind]
    given = {k: (convert[1] if isinstance(v, int) else convert[0])(v) for k, v in reals.items()}
    given |= {k: convert[1](v) for k, v in plan.items()}

    def run(options):
        tx = getattr(rigl_optax, name)(SGD, **options)
        state = tx.init(PARAMS)
        shapes = jax.eval_shape(tx.update, PARAMS, state, PARAMS)
        assert jax.tree.map(lambda x: x.dtype, shapes[1]) == jax.tree.map(lambda x: x.dtype, state)
        return state.masks, jax.make_jaxpr(tx.update)(PARAMS, state, PARAMS).pretty_print()

    masks, program = run(reals | plan)
    others, again = run(given)
    np.testing.assert_array_equal(masks["kernel"], others["kernel"])
    assert program == again


def test_numbers_of_numpy_in_structures_and_distributions():
    assert rigl_optax.Block(I(2), A(4)) == rigl_optax.Block(2, 4)
    assert type(rigl_optax.Block(I(2), A(4)).rows) is int
    assert rigl_optax.NM(I(2), np.int32(4)) == rigl_optax.NM(2, 4)
    assert rigl_optax.ConstantFanIn(F(0.5)) == rigl_optax.ConstantFanIn(0.5)
    assert rigl_optax.erk(F(0.5), A(1.0))(PARAMS) == rigl_optax.erk(0.5)(PARAMS)
    assert rigl_optax.uniform(0.5, overrides={"k": A(0.25)})(PARAMS) == {"kernel": 0.25}
    overrides = {"kernel": {"every": I(3), "drop_fraction": A(0.5)}}
    rigl_optax.rigl(SGD, 0.5, end=I(9), overrides=overrides).init(PARAMS)
    rigl_optax.synflow_masks(
        PARAMS, F(0.5), lambda p, x: x @ p["kernel"], (I(1), I(8)), iterations=I(1)
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda x: rigl_optax.rigl(SGD, 0.5, end=x),
        lambda x: rigl_optax.rigl(SGD, 0.5, end=9, accumulate=x),
        lambda x: rigl_optax.rigl(SGD, 0.5, end=9, min_fan_in=x),
        lambda x: rigl_optax.rigl(SGD, 0.5, end=9, seed=x),
        lambda x: rigl_optax.Block(x, 2),
        lambda x: rigl_optax.NM(1, x),
    ],
)
@pytest.mark.parametrize("value", [True, np.True_, 1.5, F(2.0), "2", None, A([2])], ids=repr)
def test_what_is_no_integer(make, value):
    with pytest.raises(TypeError, match="must be an integer"):
        make(value)


# ---------------------------------------------------------------------------- hyperparameters


def test_inject_hyperparams_names_what_must_be_static():
    options = {"sparsity": 0.5, "end": 9, "every": 2}
    with pytest.raises(TypeError, match=r"must be a number .* static_args"):
        optax.inject_hyperparams(rigl_optax.rigl)(SGD, **options).init(PARAMS)
    with pytest.raises(ValueError, match="static_args"):
        options |= {"sparsity": rigl_optax.uniform(0.5)}
        optax.inject_hyperparams(rigl_optax.rigl)(SGD, **options).init(PARAMS)
    static = ("sparsity", "end", "every", "begin", "drop_fraction", "accumulate", "min_fan_in")
    tx = optax.inject_hyperparams(rigl_optax.rigl, static_args=static)(SGD, **options)
    state = tx.init(PARAMS)
    _, state = jax.jit(tx.update)(PARAMS, state, PARAMS)
    assert state.inner_state.rewirings == 1


def test_an_error_names_the_argument_that_was_given():
    with pytest.raises(ValueError, match="^every=0"):
        rigl_optax.rigl(optax.adamw(1e-3), 0.9, end=100, every=0)
    with pytest.raises(ValueError, match=r"^sparsity=0.3, initial_sparsity=0.5 \(given, or by def"):
        rigl_optax.granet(SGD, 0.3, end=100)


# --------------------------------------------------------------------------------- pruning, pickle


@pytest.mark.parametrize("method", ["gradual_magnitude_pruning", "granet"])
@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("structure", [rigl_optax.Unstructured(), rigl_optax.Block(2, 2)], ids=str)
def test_initial_masks_sparser_than_the_end(method, scope, structure):
    masks = rigl_optax.magnitude_masks(PARAMS, 0.5, structure=structure)

    def init(sparsity):
        initial = {"initial_sparsity": 0.0}
        tx = getattr(rigl_optax, method)(
            SGD, sparsity, end=9, scope=scope, structure=structure, initial_masks=masks, **initial
        )
        return jax.eval_shape(tx.init, PARAMS)

    with pytest.raises(ValueError, match=r"initial_masks: .* would start with \d+ zeros and end"):
        init(rigl_optax.uniform(0.25))
    init(rigl_optax.uniform(0.5))


@pytest.mark.parametrize("make", [rigl_optax.erk, rigl_optax.erdos_renyi, rigl_optax.uniform])
def test_distributions_can_be_pickled(make):
    """For Ray, joblib and multiprocessing."""
    distribution = make(0.5, overrides={"kernel": 0.25})
    again = pickle.loads(pickle.dumps(distribution))
    assert again(PARAMS) == distribution(PARAMS)
    assert pickle.loads(pickle.dumps(make(0.5)))(PARAMS) == make(0.5)(PARAMS)
