import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.polynomial import polynomial

from rigl_optax import analysis
from rigl_optax.analysis import landscape

TS = np.linspace(0, 1, 11, dtype=np.float32)


def ends(seed=0):
    rng = np.random.default_rng(seed)
    return [
        {"a": np.float32(rng.standard_normal((3, 2))), "b": {"c": np.float32(rng.random(4))}}
        for _ in range(2)
    ]


def loss(params):
    return jnp.sum(jnp.sin(params["a"])) + jnp.sum(params["b"]["c"] ** 2)


def mixed(t, a, b):
    return jax.tree.map(lambda x, y: (1 - t) * x + t * y, a, b)


def np_loss(params):
    return np.sin(params["a"]).sum() + (params["b"]["c"] ** 2).sum()


def test_interpolate_is_the_loss_on_the_line_also_beyond_its_ends():
    a, b = ends()
    ts = np.float32([-0.2, 0, 0.3, 1, 1.2])
    expected = [np_loss(mixed(t, a, b)) for t in ts]
    np.testing.assert_allclose(analysis.interpolate(loss, a, b, ts), expected, rtol=1e-5)


def test_the_ends_are_exact_and_points_share_one_program():
    a, b = ends()
    traces = []

    def counted(params, batch):
        traces.append(1)
        return batch * loss(params)

    for scale in (1.0, 2.0):
        along = analysis.interpolate(counted, a, b, TS, jnp.float32(scale))
        assert along.shape == TS.shape and along.dtype == jnp.float32
        assert float(along[0]) == scale * float(jax.jit(loss)(a))
        assert float(along[-1]) == scale * float(jax.jit(loss)(b))
    assert len(traces) == 1


@pytest.mark.parametrize("degree", [2, 3, 5])
def test_a_curve_is_bernsteins_polynomial(degree):
    rng = np.random.default_rng(degree)
    controls = np.float32(rng.standard_normal((degree + 1, 4)))
    curve = analysis.Bezier({"w": controls})
    for t in (0.0, 0.37, 1.0, 1.4):
        points = np.float64(controls)
        while len(points) > 1:  # de Casteljau
            points = (1 - t) * points[:-1] + t * points[1:]
        np.testing.assert_allclose(curve.at(t)["w"], points[0], rtol=2e-4, atol=2e-5)
    np.testing.assert_array_equal(curve.at(0)["w"], controls[0])
    np.testing.assert_array_equal(curve.at(1)["w"], controls[-1])


def test_untrained_curves_are_the_line():
    a, b = ends()
    frozen = analysis.fit_bezier(loss, a, b, optax.sgd(0.0), degree=4, steps=1)
    line = analysis.interpolate(loss, a, b, TS)
    np.testing.assert_allclose(frozen.losses(loss, TS), line, rtol=1e-5)


def test_one_step_follows_the_gradient_at_one_t():
    """With SGD the points move by Bernstein's weights at one t times one gradient."""
    a, b = ends()
    curve = analysis.fit_bezier(loss, a, b, optax.sgd(0.1), degree=3, steps=1)
    starts = [mixed(i / 3, a, b) for i in (1, 2)]
    moved = [{"a": curve.controls["a"][i], "b": {"c": curve.controls["b"]["c"][i]}} for i in (1, 2)]
    moves = [jax.tree.map(jnp.subtract, *pair) for pair in zip(moved, starts, strict=True)]
    # The ratio of the moves, t / (1 - t), says which t it was.
    ratio = float(moves[1]["a"][0, 0] / moves[0]["a"][0, 0])
    t = ratio / (1 + ratio)
    at = mixed(t, a, b)
    gradient = {"a": np.cos(at["a"]), "b": {"c": 2 * at["b"]["c"]}}
    parts = 3 * (1 - t) ** 2 * t, 3 * (1 - t) * t**2
    for move, part in zip(moves, parts, strict=True):
        expected = jax.tree.map(lambda g: -0.1 * part * g, gradient)  # noqa: B023
        for found, wanted in zip(*map(jax.tree.leaves, (move, expected)), strict=True):
            np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=1e-5)
    np.testing.assert_array_equal(curve.controls["a"][0], a["a"])
    np.testing.assert_array_equal(curve.controls["a"][-1], b["a"])


RING = [{"x": np.float32(x), "y": np.float32(0.01)} for x in (-1, 1)]


def ring(params, scale=1.0):
    return scale * (params["x"] ** 2 + params["y"] ** 2 - 1) ** 2


@pytest.mark.parametrize("degree", [2, 3])
def test_a_trained_curve_goes_round_a_barrier_unless_a_mask_forbids_it(degree):
    on_line = {"x": np.float32(-1), "y": np.float32(0)}, {"x": np.float32(1), "y": np.float32(0)}
    fit = {"degree": degree, "steps": 300}
    round_it = analysis.fit_bezier(ring, *RING, optax.adam(0.05), **fit)
    # A mask of Python's scalars would stand for a dense leaf.
    masks = {"x": np.array(True), "y": np.zeros((), bool)}
    with pytest.raises(ValueError, match="'y'"):
        analysis.fit_bezier(ring, *on_line, optax.adam(0.05), masks=masks, **fit)
    vectors = [{"w": np.float32([end["x"], end["y"]])} for end in on_line]
    masks = {"w": np.array([True, False])}
    along = lambda p: ring({"x": p["w"][0], "y": p["w"][1]})
    held = analysis.fit_bezier(
        along, *vectors, optax.adamw(0.05, weight_decay=0.1), masks=masks, **fit
    )
    assert float(analysis.barrier(analysis.interpolate(ring, *RING, TS)).above_ends) > 0.9
    assert float(analysis.barrier(round_it.losses(ring, TS)).above_ends) < 0.2
    assert float(analysis.barrier(held.losses(along, TS)).above_ends) > 0.9
    np.testing.assert_array_equal(held.controls["w"][:, 1], 0)


def test_masks_hold_against_updates_that_are_not_zero_there():
    a, b = ends()
    masks = {"a": np.eye(3, 2, dtype=bool), "b": True}
    a, b = ({**end, "a": end["a"] * masks["a"]} for end in (a, b))
    noisy = optax.noisy_sgd(0.1, eta=1.0, gamma=0.5, key=0)
    curve = analysis.fit_bezier(loss, a, b, noisy, steps=3, masks=masks)
    assert not np.any(np.asarray(curve.controls["a"])[:, ~masks["a"]])
    assert np.all(np.asarray(curve.controls["a"])[1][masks["a"]] != (a["a"] + b["a"])[masks["a"]])
    with pytest.raises(ValueError, match="masks: start has weights of 'a'"):
        analysis.fit_bezier(loss, *ends(), noisy, steps=3, masks=masks)


def test_batches_one_a_step():
    taken = []

    def batches():
        for step in range(8):
            taken.append(step)
            yield jnp.float32(step % 2 + 1)

    curve = analysis.fit_bezier(ring, *RING, optax.adam(0.05), steps=5, batches=batches(), seed=1)
    assert taken == [0, 1, 2, 3, 4]
    again = analysis.fit_bezier(ring, *RING, optax.adam(0.05), steps=5, seed=1)
    other = analysis.fit_bezier(ring, *RING, optax.adam(0.05), steps=5, seed=2)
    ones = analysis.fit_bezier(
        ring, *RING, optax.adam(0.05), steps=5, batches=[jnp.float32(1)] * 5, seed=1
    )
    np.testing.assert_allclose(ones.controls["y"], again.controls["y"], rtol=1e-6)
    assert float(curve.controls["y"][1]) != float(again.controls["y"][1])
    assert float(other.controls["y"][1]) != float(again.controls["y"][1])
    with pytest.raises(ValueError, match="batches: there are 2, must be one for each of steps=3"):
        analysis.fit_bezier(ring, *RING, optax.sgd(0.1), steps=3, batches=[1.0, 1.0])


def test_barrier_against_numpy():
    rng = np.random.default_rng(0)
    ts = np.float32([0, 0.1, 0.5, 0.8, 1])
    for _ in range(5):
        losses = np.float32(rng.random(5))
        found = analysis.barrier(losses, ts)
        line = (1 - ts) * losses[0] + ts * losses[-1]
        np.testing.assert_allclose(found.above_line, (losses - line).max(), atol=1e-6)
        np.testing.assert_allclose(
            found.above_ends, losses.max() - max(losses[0], losses[-1]), atol=1e-6
        )
        assert found.at == ts[losses.argmax()]


def test_barrier_without_one():
    convex = polynomial.polyval(TS - 0.3, [0, 0, 1])
    assert analysis.barrier(convex)[:2] == (0, 0)
    falling = 1 - TS**2  # above the line between its ends, below the higher one
    found = analysis.barrier(falling)
    assert found.above_ends == 0 and abs(float(found.above_line) - 0.25) < 1e-6
    assert np.isnan(analysis.barrier([0.0, np.nan, 0.0]).above_line)
    assert np.isinf(analysis.barrier([0.0, np.inf, 0.0]).above_ends)


def test_what_is_refused():
    a, b = ends()
    with pytest.raises(ValueError, match="'b/d' is in one of them only"):
        analysis.interpolate(loss, a, b | {"b": {"c": b["b"]["c"], "d": 1.0}}, TS)
    with pytest.raises(ValueError, match=r"'a' is float32\[3, 2\] at the start"):
        analysis.interpolate(loss, a, b | {"a": np.zeros((2, 2), np.float32)}, TS)
    with pytest.raises(ValueError, match="'a' is int32"):
        analysis.interpolate(loss, *[{"a": np.int32(1)}] * 2, TS)
    with pytest.raises(ValueError, match="ts has shape"):
        analysis.interpolate(loss, a, b, 0.5)
    with pytest.raises(ValueError, match="degree=1: must be an integer of at least 2"):
        analysis.fit_bezier(loss, a, b, optax.sgd(0.1), degree=1)
    for ts in ([0, 0.5], [0, 0.5, 0.9], [0, 0, 1]):
        with pytest.raises(ValueError, match="ts: must ascend from 0 to 1 in 3 points"):
            analysis.barrier([1, 2, 3], ts)
    with pytest.raises(ValueError, match="must be a vector of two or more"):
        analysis.barrier([1.0])


def test_narrow_params_are_interpolated_in_float32():
    a, b = ({"w": jnp.asarray(x, jnp.bfloat16)} for x in ([1.0, 3.0], [2.0, 5.0]))
    half = landscape.Bezier({"w": jnp.stack([a["w"], b["w"]])}).at(0.5)
    assert half["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(half["w"].astype(jnp.float32), [1.5, 4.0])
