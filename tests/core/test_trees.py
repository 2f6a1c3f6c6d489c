"""Any tree of parameters: the same masks and the same step, whatever holds the arrays."""

import collections
import typing

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict

import rigl_optax

Pair = collections.namedtuple("Pair", ["first", "second"])

as_pure = getattr(nnx, "as_pure", None) or nnx.pure  # as it is called in Flax 0.12.2


def everything_sparse(path, leaf):
    return False


def arrays():
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(s), jnp.float32) for s in [(6, 5), (6,), (5, 4)]]


A, B, C = arrays()

TREES = {
    "dict": ({"a": {"kernel": A, "bias": B}, "b": C}, ["a/bias", "a/kernel", "b"]),
    "frozen dict": (
        FrozenDict({"a": {"kernel": A, "bias": B}, "b": C}),
        ["a/bias", "a/kernel", "b"],
    ),
    "tuple": (((A, B), C), ["0/0", "0/1", "1"]),
    "list": ([[A, B], C], ["0/0", "0/1", "1"]),
    "namedtuple": (Pair(Pair(A, B), C), ["first/first", "first/second", "second"]),
    "bare array": (A, [""]),
    "none leaves": ({"a": None, "b": {"kernel": A, "bias": None}, "c": C}, ["b/kernel", "c"]),
    "integer keys": ({0: A, 1: {2: C}}, ["0", "1/2"]),
    "ordered dict": (
        collections.OrderedDict([("z", A), ("a", {"bias": B, "kernel": C})]),
        ["z", "a/bias", "a/kernel"],
    ),
}


def train(tx, params, steps=5, jit=True):
    state = tx.init(params)
    assert jax.tree.structure(state.masks) == jax.tree.structure(params)
    for m, p in zip(jax.tree.leaves(state.masks), jax.tree.leaves(params), strict=True):
        assert m.dtype == bool and m.shape == p.shape
    params = rigl_optax.apply_masks(params, state)
    counts = [int(m.sum()) for m in jax.tree.leaves(state.masks)]
    update = jax.jit(tx.update) if jit else tx.update
    for _ in range(steps):
        grads = jax.tree.map(
            lambda p: jnp.cos(jnp.arange(p.size, dtype=p.dtype) + p.ravel()).reshape(p.shape),
            params,
        )
        updates, state = update(grads, state, params)
        assert jax.tree.structure(updates) == jax.tree.structure(params)
        params = optax.apply_updates(params, updates)
        for m, p in zip(jax.tree.leaves(state.masks), jax.tree.leaves(params), strict=True):
            assert not np.asarray(p)[~np.asarray(m)].any()
    assert [int(m.sum()) for m in jax.tree.leaves(state.masks)] == counts
    return params, state


def method(inner=None, dense=everything_sparse, **options):
    inner = optax.adamw(1e-2, weight_decay=1e-2) if inner is None else inner
    return rigl_optax.rigl(
        inner, rigl_optax.uniform(0.5, dense=dense), end=4, every=2, drop_fraction=0.5, **options
    )


@pytest.mark.parametrize("name", TREES)
def test_trees(name):
    params, paths = TREES[name]
    assert list(rigl_optax.uniform(0.5, dense=everything_sparse)(params)) == paths
    params, state = train(method(), params)
    assert state.rewirings == 2
    masks = rigl_optax.get_masks(state)
    assert jax.tree.structure(masks) == jax.tree.structure(params)
    applied = rigl_optax.apply_masks(params, state)
    jax.tree.map(np.testing.assert_array_equal, applied, params)


def test_containers_do_not_change_what_happens():
    """The same leaves in the same order: the same masks and weights, bit for bit."""
    results = []
    for params in [((A, B), C), [[A, B], C], Pair(Pair(A, B), C), {"a": {"0": A, "1": B}, "b": C}]:
        params, state = train(method(), params)
        results.append([np.asarray(x) for x in jax.tree.leaves((params, state.masks))])
    for other in results[1:]:
        for x, y in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(x, y)


def test_adams_mu_of_a_weight_is_not_a_weight_called_mu():
    """Typed keys, not strings: a parameter may be called `mu`, `nu` or `trace`."""
    params = {"mu": {"kernel": A}, "kernel": A + 1, "nu": {"mu": {"kernel": A + 2}}}
    tx = method(optax.adam(1e-2), begin=1)
    state = tx.init(params)
    params = rigl_optax.apply_masks(params, state)
    grads = jax.tree.map(lambda p: jnp.cos(jnp.arange(30.0).reshape(p.shape) + p), params)
    updates, before = tx.update(grads, state, params)  # a gradient step: moments are not at rest
    params = optax.apply_updates(params, updates)
    updates, after = tx.update(grads, before, params)
    assert after.rewirings == 1
    old, new = before.inner_state[0], after.inner_state[0]
    for moment in ("mu", "nu"):
        for lives, x, y in zip(
            jax.tree.leaves(jax.tree.map(lambda a, b: a & b, before.masks, after.masks)),
            jax.tree.leaves(getattr(old, moment)),
            jax.tree.leaves(getattr(new, moment)),
            strict=True,
        ):
            np.testing.assert_array_equal(y, np.where(lives, x, 0))
    assert after.inner_state[0].count == 2


# ------------------------------------------------------------------------------------ libraries


def fits(loss, params, tx, steps=8):
    """Trains with plain `jax.jit`; inactive weights are 0 after every step."""
    state = tx.init(params)
    params = rigl_optax.apply_masks(params, state)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
        for m, p in zip(jax.tree.leaves(state.masks), jax.tree.leaves(params), strict=True):
            assert not np.asarray(p)[~np.asarray(m)].any()
    assert state.rewirings == 2
    assert state.healed == 0
    return params, state


X = jnp.asarray(np.random.default_rng(1).standard_normal((4, 6)), jnp.float32)


def by_default(inner=None):
    inner = optax.adam(1e-2) if inner is None else inner
    return rigl_optax.rigl(inner, rigl_optax.uniform(0.5), end=4, every=2)


def test_flax_linen():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.LayerNorm()(nn.relu(nn.Dense(16)(x)))
            return nn.Dense(3)(x)

    net = Net()
    variables = net.init(jax.random.key(0), X)
    loss = lambda params: jnp.mean(net.apply({"params": params}, X) ** 2)
    _, state = fits(loss, variables["params"], by_default())
    assert not bool(state.masks["Dense_0"]["kernel"].all())
    assert bool(state.masks["Dense_0"]["bias"].all())
    assert bool(state.masks["LayerNorm_0"]["scale"].all())


def test_haiku():
    net = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([16, 3])(x)))
    params = net.init(jax.random.key(0), X)
    assert list(rigl_optax.uniform(0.5)(params)) == ["mlp/~/linear_0/w", "mlp/~/linear_1/w"]
    loss = lambda p: jnp.mean(net.apply(p, X) ** 2)
    _, state = fits(loss, params, by_default())
    assert not bool(state.masks["mlp/~/linear_0"]["w"].all())
    assert bool(state.masks["mlp/~/linear_0"]["b"].all())


def test_equinox():
    """`eqx.filter` leaves None where there is no array; leaves are called `weight`."""
    model = eqx.nn.MLP(6, 3, 16, 2, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    assert all(p.endswith("weight") for p in rigl_optax.uniform(0.5)(params))

    def loss(params):
        return jnp.mean(jax.vmap(eqx.combine(params, static))(X) ** 2)

    params, state = fits(loss, params, by_default())
    assert isinstance(state.masks, eqx.nn.MLP)
    assert not bool(state.masks.layers[0].weight.all())
    assert bool(state.masks.layers[0].bias.all())
    assert eqx.combine(params, static)(X[0]).shape == (3,)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(6, 16, rngs=rngs)
        self.norm = nnx.LayerNorm(16, rngs=rngs)
        self.out = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x):
        return self.out(self.norm(nnx.relu(self.hidden(x))))


NNX_PATHS = ["hidden/kernel", "out/kernel"]


def nnx_variables():
    graph, state = nnx.split(Net(nnx.Rngs(0)))
    return graph, state


@pytest.mark.parametrize("form", ["variables", "pure", "pure dict"])
def test_nnx_state(form):
    graph, variables = nnx_variables()
    params = {
        "variables": lambda: variables,
        "pure": lambda: as_pure(variables),
        "pure dict": lambda: nnx.to_pure_dict(variables),
    }[form]()
    assert list(rigl_optax.uniform(0.5)(params)) == NNX_PATHS

    def loss(params):
        if form == "pure dict":
            filled = jax.tree.map(lambda x: x, variables)
            nnx.replace_by_pure_dict(filled, params)
            params = filled
        return jnp.mean(nnx.merge(graph, params)(X) ** 2)

    fits(loss, params, by_default())


def test_nnx_forms_agree():
    graph, variables = nnx_variables()
    results = []
    for params in (variables, as_pure(variables)):
        loss = lambda p: jnp.mean(nnx.merge(graph, p)(X) ** 2)
        params, state = fits(loss, params, by_default())
        results.append([np.asarray(x) for x in jax.tree.leaves((params, state.masks))])
    for x, y in zip(*results, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "nnx.jit"])
def test_nnx_optimizer(jit):
    model = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, by_default(optax.adamw(1e-2)), wrt=nnx.Param)
    nnx.update(model, rigl_optax.apply_masks(nnx.state(model, nnx.Param), optimizer.opt_state))

    def step(model, optimizer):
        grads = nnx.grad(lambda m: jnp.mean(m(X) ** 2))(model)
        optimizer.update(model, grads)

    step = nnx.jit(step) if jit else step
    for i in range(6):
        step(model, optimizer)
        masks = rigl_optax.get_masks(optimizer.opt_state)
        masks = dict(zip(["bias", "kernel"], jax.tree.leaves(masks)[:2], strict=True))
        kernel, mask = np.asarray(model.hidden.kernel[...]), np.asarray(masks["kernel"])
        assert mask.shape == kernel.shape and mask.sum() == 48
        assert not kernel[~mask].any(), i


def test_apply_masks_matches_pure_trees_and_variables():
    """Masks made for one form apply to the other."""
    graph, variables = nnx_variables()
    pure = as_pure(variables)
    for made_for, applied_to in [(pure, variables), (variables, pure)]:
        state = by_default().init(made_for)
        result = rigl_optax.apply_masks(applied_to, state)
        assert jax.tree.structure(result) == jax.tree.structure(applied_to)
        for m, p, q in zip(
            jax.tree.leaves(state.masks),
            jax.tree.leaves(applied_to),
            jax.tree.leaves(result),
            strict=True,
        ):
            np.testing.assert_array_equal(q, np.where(m, p, 0))


@pytest.mark.parametrize("name", ["tuple", "dict", "none leaves", "bare array", "namedtuple"])
def test_the_inner_state_is_reset_in_any_tree(name):
    params, _ = TREES[name]
    tx = method(optax.trace(0.9), begin=1)
    state = tx.init(params)
    params = rigl_optax.apply_masks(params, state)
    grads = jax.tree.map(jnp.cos, params)
    _, before = tx.update(grads, state, params)
    _, after = tx.update(grads, before, params)
    for m, n, x, y in zip(
        *(jax.tree.leaves(t) for t in (before.masks, after.masks)),
        *(jax.tree.leaves(s.inner_state) for s in (before, after)),
        strict=True,
    ):
        np.testing.assert_array_equal(y, np.where(m & n, x, 0))


def test_pytrees_that_optax_masks_make():
    """`optax.masked` hands down `MaskedNode`s, which have no leaves."""
    tx = optax.masked(by_default(), {"a": True, "b": False})
    params = {"a": {"kernel": A}, "b": {"kernel": C}}
    state = tx.init(params)
    masks = rigl_optax.get_masks(state)
    assert all(bool(jnp.all(m)) for m in jax.tree.leaves(masks["b"]))
    applied = rigl_optax.apply_masks(params, state)
    np.testing.assert_array_equal(applied["b"]["kernel"], C)
    assert np.count_nonzero(applied["a"]["kernel"]) == 15


# ---------------------------------------------------------------- which state is of which weight


class PolicyAndValue(typing.NamedTuple):
    policy: jax.Array
    value: jax.Array


def bare_counter():
    """Counts its updates; the state is a bare scalar."""

    def update(updates, count, params=None):
        return updates, count + 1

    return optax.GradientTransformation(lambda params: jnp.zeros((), jnp.int32), update)


def counters(state, steps):
    return [x for x in jax.tree.leaves(state) if x.shape == () and x == steps]


@pytest.mark.parametrize(
    ("params", "inner"),
    [
        (PolicyAndValue(A, jnp.float32(1)), optax.adam(1e-2)),
        ((A, jnp.float32(1)), optax.chain(optax.trace(0.9), bare_counter())),
        ({"kernel": A, "count": jnp.float32(1)}, optax.adam(1e-2)),
        ({"kernel": A, "b": {"count": jnp.float32(1)}}, optax.named_chain(("b", optax.adam(1e-2)))),
    ],
    ids=["field called value", "tuple", "dict", "named chain"],
)
def test_a_counter_is_no_weight_whatever_it_is_called(params, inner):
    """Else the optimizer's schedule would stand still at every rewiring."""
    tx = method(inner, dense=lambda path, leaf: not leaf.ndim)
    state = tx.init(params)
    for _ in range(5):
        _, state = tx.update(params, state, params)
    assert state.rewirings == 2
    assert len(counters(state.inner_state, 5)) == 1


def test_only_variables_lose_their_value():
    module = eqx.nn.MLP(2, 2, 2, 1, key=jax.random.key(0))
    heads = PolicyAndValue(module, {"value": A})
    paths = list(rigl_optax.uniform(0.5)(eqx.filter(heads, eqx.is_inexact_array)))
    assert paths[-1] == "value/value"
    assert list(rigl_optax.uniform(0.5, overrides={"^value$": 0.1})(PolicyAndValue(A, C))) == [
        "policy",
        "value",
    ]
    boxed = {"a": nn.Partitioned(A, ("in", "out")), "b": nnx.Param(PolicyAndValue(A, C))}
    assert list(rigl_optax.uniform(0.5)(boxed)) == ["a", "b/value/policy", "b/value/value"]


@pytest.mark.parametrize("hole", [optax.MaskedNode(), None, "left out"], ids=str)
def test_an_inner_state_of_some_of_the_weights_is_reset(hole):
    """What `optax.masked` makes, what filtering makes, and what an optimizer may leave out."""

    def some(tree):
        return {"a": tree["a"]} | ({} if hole == "left out" else {"b": hole})

    def update(updates, state, params=None):
        return updates, {"trace": some(updates), "count": state["count"] + 1}

    inner = optax.GradientTransformation(
        lambda p: {"trace": some(jax.tree.map(jnp.zeros_like, p)), "count": jnp.zeros((), int)},
        update,
    )
    params = {"a": {"kernel": A}, "b": {"kernel": A, "count": jnp.float32(1)}}
    tx = method(inner, dense=lambda path, leaf: not leaf.ndim, begin=1)
    grads = jax.tree.map(jnp.cos, params)
    _, before = tx.update(grads, tx.init(params), params)
    _, after = tx.update(grads, before, params)
    stays = before.masks["a"]["kernel"] & after.masks["a"]["kernel"]
    assert int(stays.sum()) < 15
    old, new = (s.inner_state["trace"]["a"]["kernel"] for s in (before, after))
    np.testing.assert_array_equal(new, np.where(stays, old, 0))
    assert after.inner_state["count"] == 2
