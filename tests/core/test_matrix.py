"""Every method and every condensed form, in every number format and layout of devices.

Programs are traced, not run. `docs/methods.md` says what all of them promise.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import rigl_optax
from rigl_optax import condensed

HALF = rigl_optax.uniform(0.5, stacked=("stack",))
PLAN = {"end": 10, "every": 2}
METHODS = {
    "static": lambda inner: rigl_optax.static_sparse(inner, HALF),
    "rigl": lambda inner: rigl_optax.rigl(inner, HALF, **PLAN),
    "rigl, with options": lambda inner: rigl_optax.rigl(
        inner, HALF, accumulate=2, min_fan_in=1, grown=rigl_optax.Grown("initial"), **PLAN
    ),
    "rigl, blocks": lambda inner: rigl_optax.rigl(
        inner, HALF, structure=rigl_optax.Block(2, 2), **PLAN
    ),
    "rigl, units": lambda inner: rigl_optax.rigl(
        inner, HALF, structure=rigl_optax.ConstantFanIn(0.3), **PLAN
    ),
    "set": lambda inner: rigl_optax.sparse_evolutionary_training(inner, HALF, **PLAN),
    "mest": lambda inner: rigl_optax.mest(inner, HALF, **PLAN),
    "mest, soft": lambda inner: rigl_optax.mest(inner, HALF, soft=True, min_fan_in=1, **PLAN),
    "cht": lambda inner: rigl_optax.cht(inner, HALF, soft=True, **PLAN),
    "snfs": lambda inner: rigl_optax.sparse_momentum(inner, HALF, redistribute=True, **PLAN),
    "dsr": lambda inner: rigl_optax.dynamic_sparse_reparameterization(inner, HALF, **PLAN),
    "pruning": lambda inner: rigl_optax.gradual_magnitude_pruning(
        inner, HALF, power=2.5, scope="global", **PLAN
    ),
    "granet": lambda inner: rigl_optax.granet(
        inner, rigl_optax.uniform(0.7, stacked=("stack",)), **PLAN
    ),
    "acdc": lambda inner: rigl_optax.acdc(inner, HALF, keep_dense=True, **PLAN),
    "iht": lambda inner: rigl_optax.iterative_hard_thresholding(
        inner, HALF, end=10, every=2, min_fan_in=1
    ),
    "dnw": lambda inner: rigl_optax.dnw(inner, HALF, every=2),
    "top_kast": lambda inner: rigl_optax.top_kast(inner, HALF, backward_sparsity=0.3, every=2),
    "str": lambda inner: rigl_optax.soft_thresholding(
        inner, rigl_optax.uniform(0.0, stacked=("stack",)), threshold_decay=1e-3
    ),
    "deepr": lambda inner: rigl_optax.deep_rewiring(
        inner, HALF, learning_rate=0.1, temperature=1e-5
    ),
}
FORMS = {"blocks": rigl_optax.Block(2, 2), "single weights": rigl_optax.Unstructured()}
CONDENSED = {
    "static": condensed.static_sparse,
    "rigl": lambda inner: condensed.rigl(inner, **PLAN),
    "set": lambda inner: condensed.sparse_evolutionary_training(inner, **PLAN),
}
SHAPES = {"fc": (8, 16), "stack": (8, 8, 8), "bias": (16,)}
# Dtypes of weights and of gradients; x64 is a flag besides.
FORMATS = {
    "float32": ("float32", "float32"),
    "float64": ("float64", "float64"),
    "float32 under x64": ("float32", "float32"),
    "bfloat16": ("bfloat16", "bfloat16"),
    "float16": ("float16", "float16"),
    "bfloat16 gradients": ("float32", "bfloat16"),
    "float32 gradients": ("bfloat16", "float32"),
}


def inner():
    return optax.adamw(1e-2, mu_dtype=jnp.float32)


def types(tree):
    return jax.tree.map(lambda x: (x.dtype, x.weak_type), tree)


@pytest.mark.parametrize("number", FORMATS)
@pytest.mark.parametrize("name", METHODS)
def test_updates_and_states_keep_their_types(name, number):
    """As a loop under `lax.scan` or `lax.cond` needs it."""
    of_weights, of_gradients = FORMATS[number]
    with jax.enable_x64("64" in number):
        shapes = lambda dtype: {n: jax.ShapeDtypeStruct(s, dtype) for n, s in SHAPES.items()}
        params, grads = shapes(of_weights), shapes(of_gradients)
        tx = METHODS[name](optax.sgd(0.1))
        state = jax.eval_shape(tx.init, params)
        updates, after = jax.eval_shape(tx.update, grads, state, params)
    assert types(after) == types(state)
    assert {x.dtype for x in jax.tree.leaves(updates)} == {
        jnp.promote_types(of_weights, of_gradients)
    }
    for field in ("count", "rewirings", "healed", "uninformed"):
        assert getattr(after, field).dtype == jnp.int32


@pytest.mark.parametrize("axis", ["uncommitted", "auto", "explicit"])
@pytest.mark.parametrize("name", METHODS)
def test_eight_devices(name, axis):
    """Weights that are cut; or that nobody has placed: a batch that is cut takes them along."""
    kind = AxisType.Explicit if axis == "explicit" else AxisType.Auto
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    place = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
    rng = np.random.default_rng(0)
    params = {n: jnp.asarray(rng.standard_normal(s), jnp.float32) for n, s in SHAPES.items()}
    tx = METHODS[name](optax.sgd(0.1))
    if axis != "uncommitted":
        params = {n: place(x, "x") for n, x in params.items()}
        grads = jax.tree.map(jnp.ones_like, params)
        with jax.set_mesh(mesh):
            state = tx.init(params)
            after = jax.eval_shape(tx.update, grads, state, params)[1]
        for n, mask in after.masks.items():
            assert mask.shape == SHAPES[n]
            assert state.masks[n].sharding.is_equivalent_to(params[n].sharding, mask.ndim)
        return
    placed = [x.shape for x in jax.tree.leaves(tx.init(params)) if x.committed]
    assert not placed


# Gradients of stored weights have the dtype of these.
@pytest.mark.parametrize("number", [n for n, (w, g) in FORMATS.items() if w == g])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CONDENSED)
def test_condensed_forms_keep_their_types(name, form, number):
    of_weights = FORMATS[number][0]
    with jax.enable_x64("64" in number):
        mask = np.kron(np.eye(4, dtype=bool), np.ones((2, 2), bool))
        params = {"w": jnp.asarray(mask, of_weights)}
        weights, topologies = condensed.condense(params, {"w": mask}, FORMS[form])
        tx = CONDENSED[name](inner())
        state = tx.init(weights, topologies)
        x = jnp.ones((3, 8), of_weights)
        loss = condensed.value_grad_and_scores(lambda kernels: jnp.sum(x @ kernels["w"]))

        def step(weights, state):
            _, grads, scores = loss(weights, state.topologies)
            updates, ordinary = tx.update(grads, state, weights)
            if name == "static":
                return (optax.apply_updates(weights, updates), ordinary), None
            return (optax.apply_updates(weights, updates), ordinary), tx.rewire(
                grads, scores, state, weights
            )

        ordinary, rewired = jax.eval_shape(step, weights, state)
        before = types((weights, state))
    assert types(ordinary) == before
    if rewired is not None:
        assert types(rewired) == before
