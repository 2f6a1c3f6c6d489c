"""Optax's own generic suites, shipped in its wheel, on optimizers wrapped in RigL.

The suites find an optimizer by name; these hand them factories that wrap it. Their targets are
small and must be reached exactly, so the wrapped network is dense (sparsity 0): what is tested is
that the wrapper keeps every promise a transformation makes to Optax. Where nothing needs to
converge, half of the weights are masked.
"""

import functools
import os
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized

import rigl_optax

_flags = os.environ.get("XLA_FLAGS")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it builds an optimizer in a deprecated way
    from optax._src import sharding_test
    from optax.contrib import _common_test

# `sharding_test` sets XLA_FLAGS on import; `conftest.py` has made the devices already.
if _flags is None:
    os.environ.pop("XLA_FLAGS", None)
else:
    os.environ["XLA_FLAGS"] = _flags


def everything_sparse(path, leaf):
    return False


def wrap(inner, sparsity=0.5):
    return rigl_optax.rigl(
        inner,
        rigl_optax.uniform(sparsity, dense=everything_sparse),
        end=1000,
        every=100,
        drop_fraction=0.3,
    )


# ------------------------------------------------------------------------- sharding_test.py

SHARDED = ["adam", "sgd", "adamw", "adafactor", "adafactor2", "lamb", "lion", "novograd", "rmsprop"]
SHARDED += ["sm3", "yogi", "adagrad", "noisy_sgd"]  # lbfgs flattens, which explicit axes refuse


class OptaxShardingTest(parameterized.TestCase):
    """The bodies of `optax._src.sharding_test.ShardingTest`, for wrapped optimizers."""

    @parameterized.parameters(*SHARDED)
    def test_init_with_abstract_input(self, name):
        optimizer = wrap(sharding_test.OPTIMIZERS[name])
        state = optimizer.init(jax.ShapeDtypeStruct(shape=(2, 4, 8), dtype=jnp.float32))
        self.assertIsNotNone(state)

    def params(self):
        mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
        return mesh, jax.sharding.NamedSharding(mesh, jax.P(None, "x"))

    @parameterized.parameters(*SHARDED)
    def test_state_sharding_type_is_kept_by_update_and_by_jit(self, name):
        """Two of the bodies in one: what both of them initialize and update is compiled once."""
        optimizer = wrap(sharding_test.OPTIMIZERS[name])
        mesh, sharding = self.params()
        with jax.set_mesh(mesh):
            params = jnp.zeros((2, 8, 4), dtype=jnp.float16, out_sharding=sharding)
            state0 = optimizer.init(params)
            state1 = jax.jit(optimizer.init)(params)
            self.assertEqual(*(jax.tree.map(jax.typeof, s) for s in (state0, state1)))
            _, state2 = optimizer.update(params, state0, params)
            _, state3 = jax.jit(optimizer.update)(params, state0, params)
            self.assertEqual(*(jax.tree.map(jax.typeof, s) for s in (state2, state3)))
            self.assertEqual(*(jax.tree.map(jax.typeof, s) for s in (state0, state2)))


# --------------------------------------------------------------------------- _common_test.py

EXTRA = {"momo", "momo_adam", "sophia", "polyak_sgd"}
OPTIMIZERS = [
    case
    for case in _common_test._MAIN_OPTIMIZERS_UNDER_TEST
    if case["opt_name"] != "acprop"  # see catalogue.py
]
CASES = [pytest.param(c, id=f"{c['wrapper_name'] or ''}-{c['opt_name']}") for c in OPTIMIZERS]


def body(name):
    """A generic test's function, out of the list of cases it was parametrised into."""
    # `parameterized` keeps the original under the names it generates, as a closure.
    for key, value in vars(_common_test.ContribTest).items():
        if re.fullmatch(rf"{name}_?\d+", key):
            return next(
                cell.cell_contents
                for cell in value.__closure__
                if callable(cell.cell_contents) and not isinstance(cell.cell_contents, type)
            )
    raise AssertionError(f"optax's suite has no {name} any more")


def wrapped_optimizers(monkeypatch, sparsity):
    """Makes the suite build `rigl(optimizer)` wherever it builds `optimizer`."""
    plain_factory, plain_wrap = _common_test._get_opt_factory, _common_test._wrap_opt
    made_last = []

    def factory(name):
        make = plain_factory(name)

        @functools.wraps(make)  # the suite reads the signature
        def made(*args, **kwargs):
            made_last[:] = [make(*args, **kwargs)]
            return wrap(made_last[0], sparsity)

        return made

    monkeypatch.setattr(_common_test, "_get_opt_factory", factory)
    # A wrapper of theirs goes inside ours: `rigl(mechanize(sgd))`.
    monkeypatch.setattr(
        _common_test,
        "_wrap_opt",
        lambda opt, name, kwargs: wrap(plain_wrap(made_last[0], name, kwargs), sparsity),
    )


def call(name, case, **arguments):
    instance = _common_test.ContribTest()
    instance._testMethodName = name
    body(name)(instance, **case, **arguments)


@pytest.mark.parametrize("case", CASES)
def test_extra_args(case, monkeypatch):
    wrapped_optimizers(monkeypatch, 0.5)
    call("test_optimizers_accept_extra_args", case, wrap=True)


@pytest.mark.parametrize("dtype", ["bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_preserve_dtype(case, dtype, monkeypatch):
    wrapped_optimizers(monkeypatch, 0.5)
    call("test_preserve_dtype", case, dtype=dtype)


@pytest.mark.parametrize("dtype", ["float32"])
@pytest.mark.parametrize("case", CASES)
def test_gradient_accumulation(case, dtype, monkeypatch):
    wrapped_optimizers(monkeypatch, 0.5)
    call("test_gradient_accumulation", case, dtype=dtype)


@pytest.mark.parametrize("dtype", ["float16"])
@pytest.mark.parametrize("case", CASES)
def test_state_stability(case, dtype, monkeypatch):
    wrapped_optimizers(monkeypatch, 0.5)
    call("test_state_shape_dtype_shard_stability", case, dtype=getattr(jnp, dtype))


TARGETS = ["_setup_rosenbrock", "_setup_mixed_tensor_target"]


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", CASES)
def test_convergence(case, target, monkeypatch):
    """30,000 steps, ten of them rewirings, end within the 3 % that Optax asks of itself."""
    wrapped_optimizers(monkeypatch, 0.0)
    plain = _common_test.contrib.schedule_free_eval_params
    monkeypatch.setattr(
        _common_test.contrib,
        "schedule_free_eval_params",
        lambda state, params: plain(state.inner_state, params),
    )
    setup = getattr(_common_test, target)
    call("test_optimizers", case, target=setup, dtype="float32")


def test_tree_map_params_reaches_state_and_masks():
    params = {"kernel": jnp.ones((4, 4)), "bias": jnp.ones((4,))}
    tx = wrap(optax.adam(0.1))
    state = tx.init(params)
    seen = []
    optax.tree.map_params(tx, lambda v: seen.append(np.shape(v)) or v, state)
    assert len(seen) >= 4
