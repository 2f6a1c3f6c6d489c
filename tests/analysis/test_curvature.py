import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rigl_optax import analysis

SIZES = (4, 6, 3)


def network(seed=0):
    """A small network with a smooth loss of its batch, and masks of two thirds of its kernels."""
    rng = np.random.default_rng(seed)
    params, masks = {}, {}
    for i, shape in enumerate(itertools.pairwise(SIZES)):
        mask = rng.random(shape) < 0.67
        params[f"layer{i}"] = {
            "kernel": np.float32(rng.standard_normal(shape) * mask),
            "bias": np.float32(rng.standard_normal(shape[1])),
        }
        masks[f"layer{i}"] = {"kernel": mask, "bias": np.ones(shape[1], bool)}
    batch = {
        "x": np.float32(rng.standard_normal((20, SIZES[0]))),
        "y": rng.integers(0, SIZES[-1], 20),
    }
    return params, masks, batch


def loss(params, batch):
    x = batch["x"]
    for i in range(len(SIZES) - 1):
        layer = params[f"layer{i}"]
        x = x @ layer["kernel"] + layer["bias"]
        x = jnp.tanh(x) if i < len(SIZES) - 2 else x
    return optax.softmax_cross_entropy_with_integer_labels(x, batch["y"]).mean()


def flat(params, masks):
    """The active weights as a vector, and the loss as a function of it."""
    leaves, tree = jax.tree.flatten(params)
    where = [np.flatnonzero(m) for m in jax.tree.leaves(masks)]
    vector = np.concatenate([w.ravel()[i] for w, i in zip(leaves, where, strict=True)])

    def of(vector, batch):
        parts = np.split(np.arange(vector.size), np.cumsum([i.size for i in where])[:-1])
        new = [
            jnp.zeros(w.size).at[i].set(vector[part]).reshape(w.shape)
            for w, i, part in zip(leaves, where, parts, strict=True)
        ]
        return loss(tree.unflatten(new), batch)

    return vector, of


@pytest.fixture(scope="module")
def exact():
    params, masks, batch = network()
    vector, of = flat(params, masks)
    hessian, gradient = jax.jit(lambda v: (jax.hessian(of)(v, batch), jax.grad(of)(v, batch)))(
        vector
    )
    return np.linalg.eigvalsh(np.float64(hessian))[::-1], np.float64(gradient)


def test_largest_eigenvalues_over_active_weights(exact):
    params, masks, batch = network()
    values, residuals = analysis.hessian_eigenvalues(loss, params, batch, k=3, masks=masks)
    np.testing.assert_allclose(values, exact[0][:3], rtol=1e-4)
    assert (np.asarray(residuals) < 1e-4 * exact[0][0]).all()


def test_with_all_iterations_the_whole_spectrum_is_found(exact):
    params, masks, batch = network()
    n = exact[0].size
    found = analysis.hessian_eigenvalues(loss, params, batch, k=n, masks=masks, iterations=n)
    np.testing.assert_allclose(found.values, exact[0], atol=1e-5)


def test_residuals_bound_the_error_of_few_iterations(exact):
    params, masks, batch = network()
    for iterations in (3, 6):
        found = analysis.hessian_eigenvalues(
            loss, params, batch, k=2, masks=masks, iterations=iterations
        )
        values, residuals = np.asarray(found.values), np.asarray(found.residuals)
        nearest = np.abs(exact[0][:, None] - values).min(0)
        assert (nearest <= residuals + 1e-5).all()
        assert (residuals > 1e-3).any()


def test_iterations_beyond_the_number_of_weights_change_nothing(exact):
    params, masks, batch = network()
    n = exact[0].size
    found = analysis.hessian_eigenvalues(
        loss, params, batch, k=n + 2, masks=masks, iterations=n + 5
    )
    np.testing.assert_allclose(found.values[:n], exact[0], atol=1e-5)
    assert np.isnan(found.values[n:]).all() and np.isnan(found.residuals[n:]).all()


def test_eigenvalues_that_occur_several_times_and_negative_ones():
    curvatures = np.float32([-2, -2, -1, -3, -1, -1])
    quadratic = lambda p: jnp.sum(curvatures * p**2) / 2
    params = np.ones(6, np.float32)
    found = analysis.hessian_eigenvalues(quadratic, params, k=6, iterations=6)
    np.testing.assert_allclose(found.values, [-1, -1, -1, -2, -2, -3], atol=1e-5)
    none = analysis.hessian_eigenvalues(lambda p: jnp.sum(p), params, k=2, iterations=4)
    np.testing.assert_array_equal(none.values, [0, 0])
    nothing = analysis.hessian_eigenvalues(quadratic, params, masks=np.zeros(6, bool))
    assert np.isnan(nothing.values).all()


def test_curvatures_of_very_different_size():
    curvatures = np.float32(10.0 ** -np.arange(6))
    quadratic = lambda p: jnp.sum(curvatures * p["w"] ** 2) / 2
    found = analysis.hessian_eigenvalues(quadratic, {"w": np.ones(6, np.float32)}, k=6)
    np.testing.assert_allclose(found.values, curvatures, atol=2e-6)


def test_under_jit_with_traced_masks(exact):
    params, masks, batch = network()

    @jax.jit
    def both(params, masks):
        found = analysis.hessian_eigenvalues(loss, params, batch, masks=masks)
        return found.values[0], analysis.gradient_norm(loss, params, batch, masks=masks)

    sharpness, norm = both(params, masks)
    np.testing.assert_allclose(sharpness, exact[0][0], rtol=1e-4)
    np.testing.assert_allclose(norm, np.linalg.norm(exact[1]), rtol=1e-5)


def test_one_program_for_all_params_masks_and_batches():
    traces = []

    def counted(params, batch):
        traces.append(1)
        return loss(params, batch)

    for seed in range(3):
        params, masks, batch = network(seed)
        analysis.hessian_eigenvalues(counted, params, batch, masks=masks, iterations=5)
    first = len(traces)
    analysis.hessian_eigenvalues(counted, params, batch, masks=masks, iterations=5, seed=1)
    assert first == len(traces) <= 3


def test_gradient_norm_of_all_params():
    params, _, batch = network()
    grads = jax.tree.leaves(jax.grad(loss)(params, batch))
    expected = np.linalg.norm(np.concatenate([np.ravel(g) for g in grads]))
    np.testing.assert_allclose(analysis.gradient_norm(loss, params, batch), expected, rtol=1e-6)


@pytest.mark.parametrize(("momentum", "nesterov"), [(0, False), (0.9, False), (0.9, True)])
def test_largest_stable_curvature_is_where_sgd_of_optax_starts_to_diverge(momentum, nesterov):
    limit = analysis.largest_stable_curvature(0.1, momentum=momentum, nesterov=nesterov)
    tx = optax.sgd(0.1, momentum=momentum or None, nesterov=nesterov)

    @jax.jit
    def distance(curvature):
        def step(_, carry):
            x, state = carry
            updates, state = tx.update(curvature * x, state)
            return x + updates, state

        return jnp.abs(jax.lax.fori_loop(0, 400, step, (jnp.ones(()), tx.init(jnp.ones(()))))[0])

    assert distance(0.99 * limit) < 1e-3
    assert not distance(1.01 * limit) < 1e3  # it may be NaN by now


def test_what_is_refused():
    params, masks, batch = network()
    with pytest.raises(ValueError, match="k=0: must be an integer of at least 1"):
        analysis.hessian_eigenvalues(loss, params, batch, k=0)
    with pytest.raises(ValueError, match="iterations=3: must be an integer of at least 5"):
        analysis.hessian_eigenvalues(loss, params, batch, k=5, iterations=3)
    wrong = masks | {"layer0": {"kernel": np.ones((2, 2), bool), "bias": True}}
    for measure in (analysis.hessian_eigenvalues, analysis.gradient_norm):
        with pytest.raises(ValueError, match="layer0/kernel"):
            measure(loss, params, batch, masks=wrong)
    with pytest.raises(ValueError, match="momentum=1.0: must be in"):
        analysis.largest_stable_curvature(0.1, momentum=1.0)
    with pytest.raises(ValueError, match="learning_rate=0: must be a positive number"):
        analysis.largest_stable_curvature(0)
