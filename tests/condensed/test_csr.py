"""Single weights in CSR against the dense kernel that they stand for, masked."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import rigl_optax
from rigl_optax import condensed
from rigl_optax.condensed import CSR, csr_topology
from rigl_optax.condensed.single import _csr, _csr_topology
from tests.core.test_no_gather import collectives

P = PartitionSpec
KERNEL = "cpu_csr_sparse_dense"
# Below .03 entries of the gradient are computed one by one, above it in chunks.
DENSITIES = {"chunks": 0.3, "one by one": 0.02, "full": 1.0, "empty": 0.0}


def random(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def mask_of(density, shape=(40, 23)):
    return np.random.default_rng(5).random(shape) < density


def loss(values, topology, x):
    y = x @ CSR(values, topology)
    return jnp.sum(jnp.sin(y).astype(jnp.float32) if y.dtype == jnp.bfloat16 else jnp.sin(y))


def dense_loss(kernel, x):
    return jnp.sum(jnp.sin(x @ kernel))


step = jax.jit(jax.value_and_grad(loss, (0, 2)))


def check(mask, x, tolerance=1e-12, dtype=np.float64):
    topology = csr_topology(mask)
    kernel = jnp.asarray(random(1, *mask.shape) * mask)
    values = topology.extract(kernel)
    np.testing.assert_array_equal(CSR(values, topology).dense(), kernel)
    np.testing.assert_array_equal(topology.dense_mask(), mask)
    fresh = jax.jit(jax.value_and_grad(lambda *args: loss(*args), (0, 2)))
    got, (dvalues, dx) = fresh(values.astype(dtype), topology, x.astype(dtype))
    wanted, (dense, dx_dense) = jax.jit(jax.value_and_grad(dense_loss, (0, 1)))(kernel, x)
    assert dvalues.dtype == dx.dtype == dtype
    for a, b in ((got, wanted), (dvalues, topology.extract(dense)), (dx, dx_dense)):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", DENSITIES)
def test_value_and_gradients_are_those_of_the_masked_kernel(name, monkeypatch):
    with jax.enable_x64(True):
        check(mask_of(DENSITIES[name]), jnp.asarray(random(2, 3, 5, 40)))
        # Several chunks, the last of them narrower; several lots of single entries.
        monkeypatch.setattr(_csr, "_AT_ONCE", 200)
        monkeypatch.setattr(_csr_topology, "_PIECE", 50)
        check(mask_of(DENSITIES[name]), jnp.asarray(random(2, 15, 40)))


def test_bfloat16_adds_up_in_float32():
    x = jnp.asarray(random(2, 5, 40), jnp.float32)
    check(mask_of(0.3), x, tolerance=0.1, dtype=jnp.bfloat16)


def setting(density=0.3):
    topology = csr_topology(mask_of(density))
    values = jnp.asarray(random(1, *topology.values_shape), jnp.float32)
    return values, topology, jnp.asarray(random(2, 16, 40), jnp.float32)


def test_vmap_checkpoint_and_numpy():
    values, topology, x = setting()
    wanted = step(values, topology, x)
    again = jax.jit(jax.value_and_grad(jax.checkpoint(loss), (0, 2)))(values, topology, x)
    many = jnp.stack([values, -values]), jnp.stack([2 * x, x])
    found = jax.jit(jax.vmap(jax.value_and_grad(loss, (0, 2)), (0, None, 0)))(
        many[0], topology, many[1]
    )
    pairs = [(again, wanted)] + [
        (jax.tree.map(lambda a, i=i: a[i], found), step(many[0][i], topology, many[1][i]))
        for i in range(2)
    ]
    for got, expected in pairs:
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(np.asarray(x) @ CSR(values, topology), x @ CSR(values, topology))


def test_on_the_cpu_products_are_jax_s_kernel():
    """If this fails, JAX has changed: `_csr` would gather, or make kernels dense."""
    values, topology, x = setting()
    assert jax.jit(loss).lower(values, topology, x).as_text().count(KERNEL) == 1
    both = step.lower(values, topology, x).compile().as_text()
    assert both.count(f'custom_call_target="{KERNEL}') == 2  # forward, and of the inputs
    batched = jax.jit(jax.vmap(loss, (None, None, 0)))
    assert KERNEL in batched.lower(values, topology, x[None]).as_text()


def test_without_the_kernel_all_is_the_same(monkeypatch):
    values, topology, x = setting()
    wanted = step(values, topology, x)
    monkeypatch.setattr(_csr, "_upstream", lambda: None)
    fallback = jax.jit(jax.value_and_grad(lambda *args: loss(*args), (0, 2)))
    assert KERNEL not in fallback.lower(values, topology, x).as_text()
    found = fallback(values, topology, x)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_lowers_for_accelerators(platform):
    """Lowered, not run. There the kernel is made dense for a product."""
    exported = jax.export.export(step, platforms=[platform])
    text = exported(*setting()).mlir_module()
    assert KERNEL not in text and "stablehlo.scatter" in text


# ------------------------------------------------------------------------------ whole models


def network(kernels, x):
    x = jnp.tanh(x @ kernels["a"]["kernel"] + kernels["a"]["bias"])
    return x @ kernels["b"]["kernel"]


def model_loss(kernels, x, y):
    return jnp.mean((network(kernels, x) - y) ** 2)


def test_static_training_is_that_of_the_masked_form():
    with jax.enable_x64(True):
        params = {
            "a": {"kernel": jnp.asarray(random(0, 40, 24)), "bias": jnp.zeros(24)},
            "b": {"kernel": jnp.asarray(random(1, 24, 3))},
        }
        inner = optax.adamw(0.01)
        layers = rigl_optax.uniform(0.8, overrides={"b/": 0.0})
        tx = rigl_optax.static_sparse(inner, layers)
        state = tx.init(params)
        params = rigl_optax.apply_masks(params, state)
        weights, topologies = condensed.condense_csr(params, state.masks)
        assert list(topologies) == ["a/kernel"] and weights["a"]["kernel"].shape == (192,)
        inner_state = inner.init(weights)
        masked_grad = jax.jit(jax.grad(model_loss))
        condensed_grad = jax.jit(condensed.value_and_grad(model_loss))
        for t in range(30):
            x, y = jnp.asarray(random(10 + t, 8, 40)), jnp.asarray(random(50 + t, 8, 3))
            updates, state = tx.update(masked_grad(params, x, y), state, params)
            params = optax.apply_updates(params, updates)
            _, grads = condensed_grad(weights, topologies, x, y)
            updates, inner_state = inner.update(grads, inner_state, weights)
            weights = optax.apply_updates(weights, updates)

        def same(found, wanted):
            for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)

        same(condensed.densify(weights, topologies), params)
        same(condensed.masks_of(weights, topologies), state.masks)
        same(inner_state, condensed.condense_state(state.inner_state, params, topologies))
        back = condensed.densify_state(inner_state, weights, topologies, inner)
        same(back, state.inner_state)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
@pytest.mark.parametrize("way", ["auto", "explicit", "shard_map"])
def test_a_batch_over_eight_devices(way):
    values, topology, x = setting()
    kind = AxisType.Explicit if way == "explicit" else AxisType.Auto
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    function = lambda values, x: loss(values, topology, x)
    if way == "shard_map":
        function = jax.shard_map(
            lambda values, x: jax.lax.psum(loss(values, topology, x), "data"),
            mesh=mesh,
            in_specs=(P(), P("data")),
            out_specs=P(),
        )
    with jax.set_mesh(mesh):
        placed = (
            jax.device_put(values, NamedSharding(mesh, P())),
            jax.device_put(x, NamedSharding(mesh, P("data"))),
        )
        compiled = jax.jit(jax.grad(function, (0, 1))).lower(*placed).compile()
        found = jax.device_get(compiled(*placed))
    for a, b in zip(found, step(values, topology, x)[1], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    if way != "auto":  # there the kernel is not partitioned: activations are gathered
        assert collectives(compiled.as_text()) == [("all-reduce", values.nbytes, 1)]


@pytest.mark.parametrize(
    ("act", "told"),
    [
        (lambda v, t: CSR(v, t) @ jnp.ones((3, 2)), r"\(40, 23\) does not fit .* \(3, 2\)"),
        (lambda v, t: CSR(v, t, _csr.probe(t)).T, "a transposed CSR kernel gives no scores"),
        (lambda v, t: jnp.ones((2, 3)) @ CSR(v, t), r"\(2, 3\) do not fit a kernel of \(40, 23\)"),
        (lambda v, t: csr_topology(np.ones(3, bool)), r"shape \(3,\): CSR is for kernels of two"),
        (
            lambda v, t: condensed.condense_csr(
                {"w": np.ones((1, 2, 2))}, {"w": np.zeros((1, 2, 2), bool)}
            ),
            r"'w' has shape \(1, 2, 2\): single weights need two axes",
        ),
        (
            lambda v, t: condensed.bind({"w": v[1:]}, {"w": t}),
            "its topology is for values of",
        ),
    ],
)
def test_errors(act, told):
    values, topology, _ = setting()
    with pytest.raises(ValueError, match=told):
        act(values, topology)


def test_16_bits_run_where_their_operands_are_transposed():
    """XLA on the CPU has no product of two bfloat16 in some layouts: rewirings came upon one."""
    topology = csr_topology(mask_of(0.5, (16, 12)))
    values, x = jnp.ones(topology.values_shape, jnp.bfloat16), jnp.ones((8, 16), jnp.bfloat16)

    def rewiring_loss(values, x, probe):
        return jnp.sum((x @ CSR(values, topology, probe)).astype(jnp.float32) ** 2)

    dvalues, dx, found = jax.jit(jax.grad(rewiring_loss, (0, 1, 2)))(
        values, x, _csr.probe(topology)
    )
    assert dvalues.dtype == dx.dtype == jnp.bfloat16 and found.scores.all()


def test_hessian_vector_products():
    """Forward mode goes through gradients; not through a product that is not differentiated."""
    values, topology, x = setting()
    tangent = jnp.cos(values)
    dense = lambda values: jnp.sum(jnp.sin(x @ CSR(values, topology).dense()))
    ours = lambda values: loss(values, topology, x)
    found, wanted = (
        jax.jit(lambda v, f=f: jax.jvp(jax.grad(f), (v,), (tangent,))[1])(values)
        for f in (ours, dense)
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_an_empty_batch_and_the_transpose():
    values, topology, x = setting()
    kernel = CSR(values, topology)
    dvalues, dx = jax.grad(lambda v, x: (x @ CSR(v, topology)).sum(), (0, 1))(values, x[:0])
    assert (x[:0] @ kernel).shape == (0, 23) and dx.shape == (0, 40) and not dvalues.any()
    dense, z = kernel.dense(), jnp.asarray(random(3, 23, 5), jnp.float32)
    np.testing.assert_array_equal(kernel.T.dense(), dense.T)
    for found, wanted in zip(jax.tree.leaves(kernel.T.T), jax.tree.leaves(kernel), strict=True):
        np.testing.assert_array_equal(found, wanted)
    for part in (z, z[:, 0], z[None]):
        np.testing.assert_allclose(kernel @ part, dense @ part, rtol=1e-5, atol=1e-5)


def test_portable_products_can_be_exported():
    """The kernel of the CPU has no name that `jax.export` vouches for."""
    values, topology, x = setting()
    (batch,) = jax.export.symbolic_shape("batch")
    any_batch = jax.ShapeDtypeStruct((batch, 40), jnp.float32)
    function = jax.jit(lambda x: x @ CSR(values, topology).portable())
    exported = jax.export.export(function)(any_batch)
    np.testing.assert_allclose(exported.call(x), x @ CSR(values, topology), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="custom calls"):
        jax.export.export(jax.jit(lambda x: x @ CSR(values, topology)))(x)
