"""One-shot masks against closed forms and NumPy; initial weights for them; tickets."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rigl_optax
from rigl_optax import grasp_masks, magnitude_masks, snip_masks, synflow_masks
from rigl_optax.data import batches, digits
from rigl_optax.methods import saliency
from tests.core.reference import top_k_mask, zeros_in

SHAPES = {"a": {"kernel": (6, 10), "bias": (10,)}, "b": {"kernel": (10, 4)}}
UNIFORM = rigl_optax.uniform(0.7)


def some_params(seed=0):
    rng = np.random.default_rng(seed)
    leaf = lambda shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    return jax.tree.map(leaf, SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def some_batches(number=2):
    rng = np.random.default_rng(1)
    return [
        (
            jnp.asarray(rng.standard_normal((16, 6)), jnp.float32),
            jnp.asarray(rng.standard_normal((16, 4)), jnp.float32),
        )
        for _ in range(number)
    ]


def quadratic(params, batch):
    """Of a linear network of one layer: gradient and Hessian are known."""
    x, y = batch
    return 0.5 * jnp.mean(jnp.sum((x @ params["kernel"] - y) ** 2, -1))


def expected_masks(scores, sparsity, whole):
    """Per layer, or of all: `{name: mask}`."""
    names = list(scores)
    zeros = {n: zeros_in(sparsity, scores[n].shape) for n in names}
    if not whole:
        return {n: top_k_mask(order(scores[n]), scores[n].size - zeros[n]) for n in names}
    flat = np.concatenate([scores[n].reshape(-1) for n in names])
    chosen = top_k_mask(order(flat), flat.size - sum(zeros.values()))
    parts = np.split(chosen, np.cumsum([scores[n].size for n in names])[:-1])
    return {n: p.reshape(scores[n].shape) for n, p in zip(names, parts, strict=True)}


def order(x):
    """Ranks as integers: `top_k_mask` compares integers."""
    return np.searchsorted(np.unique(x), x)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_by_magnitude(scope):
    params = some_params()
    masks = magnitude_masks(params, UNIFORM, scope=scope)
    scores = {n: np.abs(np.asarray(params[n]["kernel"])) for n in "ab"}
    for n, mask in expected_masks(scores, 0.7, scope == "global").items():
        np.testing.assert_array_equal(masks[n]["kernel"], mask)
    assert masks["a"]["bias"].all()


def test_snip_and_grasp_of_a_linear_model():
    weights = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
    params, both = {"kernel": jnp.asarray(weights)}, some_batches()
    covariance = [np.asarray(x.T @ x) / 16 for x, _ in both]
    gradients = [
        c @ weights - np.asarray(x.T @ y) / 16 for c, (x, y) in zip(covariance, both, strict=True)
    ]
    gradient = sum(gradients) / 2
    hessian_times_gradient = sum(covariance) / 2 @ gradient
    for function, score in (
        (snip_masks, np.abs(weights * gradient)),
        (grasp_masks, weights * hessian_times_gradient),
    ):
        masks = function(params, UNIFORM, quadratic, both)
        np.testing.assert_array_equal(
            masks["kernel"], expected_masks({"kernel": score}, 0.7, False)["kernel"]
        )
        assert int(masks["kernel"].sum()) == 24 - zeros_in(0.7, (24,))
    # Some are negative, and those are the first to go.
    kept = np.asarray(grasp_masks(params, UNIFORM, quadratic, both)["kernel"])
    assert (weights * hessian_times_gradient)[kept].min() > np.median(
        weights * hessian_times_gradient
    )


def network(params, x):
    return jax.nn.relu(x @ params["a"]["kernel"] + params["a"]["bias"]) @ params["b"]["kernel"]


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_synflow_against_numpy(scope):
    params = some_params()
    found = synflow_masks(params, UNIFORM, network, (1, 6), iterations=7, scope=scope)
    a, bias, b = (
        np.abs(np.asarray(x, np.float64))
        for x in (params["a"]["kernel"], params["a"]["bias"], params["b"]["kernel"])
    )
    masks = {"a": np.ones(a.shape, bool), "b": np.ones(b.shape, bool)}
    for k in range(1, 8):
        wa, wb = a * masks["a"], b * masks["b"]
        into, out = wa.sum(0) + bias, wb.sum(1)
        scores = {"a": wa * out, "b": wb * into[:, None]}
        sizes = {n: s.size for n, s in scores.items()}
        final = {n: sizes[n] - zeros_in(0.7, (sizes[n],)) for n in sizes}
        scores = {n: np.where(masks[n], s, -1) for n, s in scores.items()}
        if scope == "layer":
            keep = {n: round(sizes[n] * (final[n] / sizes[n]) ** (k / 7)) for n in sizes}
            masks = {n: top_k_mask(order(scores[n]), keep[n]) for n in sizes}
        else:
            total, wanted = sum(sizes.values()), sum(final.values())
            flat = np.concatenate([scores["a"].reshape(-1), scores["b"].reshape(-1)])
            chosen = top_k_mask(order(flat), round(total * (wanted / total) ** (k / 7)))
            masks = {"a": chosen[: a.size].reshape(a.shape), "b": chosen[a.size :].reshape(b.shape)}
    for n in "ab":
        np.testing.assert_array_equal(found[n]["kernel"], masks[n])


def test_signed_scores_keep_the_order():
    x = np.array([-np.inf, -3e38, -1.0, -1e-37, -0.0, 0.0, 1e-37, 1.0, 3e38, np.inf], np.float32)
    scores = np.asarray(saliency._signed_scores(jnp.asarray(x)))
    assert (scores >= 0).all()
    assert (np.diff(scores.astype(np.int64)) >= 0).all()
    assert scores[4] == scores[5] and len(np.unique(scores)) == 9


def test_stacked_layers_are_ranked_apart():
    params = {
        "layers": jnp.asarray(np.random.default_rng(0).standard_normal((3, 5, 8)), jnp.float32)
    }
    masks = magnitude_masks(params, rigl_optax.uniform(0.5, stacked=("layers",)))["layers"]
    assert np.asarray(masks).sum((1, 2)).tolist() == [20, 20, 20]


def test_half_precision():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), some_params())
    masks = magnitude_masks(params, UNIFORM)
    assert [int(masks[n]["kernel"].sum()) for n in "ab"] == [18, 12]


def test_bad_input_is_refused():
    params = some_params()
    with pytest.raises(ValueError, match="at least one batch"):
        snip_masks(params, UNIFORM, lambda p, b: 0.0, [])
    with pytest.raises(ValueError, match="scope='all'.*layer, global"):
        magnitude_masks(params, UNIFORM, scope="all")
    with pytest.raises(ValueError, match="iterations=0"):
        synflow_masks(params, UNIFORM, network, (1, 6), iterations=0)
    with pytest.raises(ValueError, match="'nowhere'"):
        magnitude_masks(params, rigl_optax.uniform(0.5, overrides={"nowhere": 0.1}))
    params["b"]["kernel"] = params["b"]["kernel"].at[1, 1].set(jnp.nan)
    with pytest.raises(ValueError, match=r"'b/kernel': 1 of 40 scores are not finite"):
        magnitude_masks(params, UNIFORM)


# ----------------------------------------------------------------- where scores say nothing


def two_layers(head):
    rng = np.random.default_rng(0)
    return {
        "a": jnp.asarray(rng.standard_normal((6, 10)), jnp.float32),
        "head": jnp.asarray(rng.standard_normal((10, 4)), jnp.float32) * head,
    }


def squared(params, x):
    return jnp.mean((jnp.tanh(x @ params["a"]) @ params["head"] - 1) ** 2)


BY_SCORES = {
    "magnitude": lambda p, **k: magnitude_masks(p, UNIFORM, **k),
    "snip": lambda p, **k: snip_masks(p, UNIFORM, squared, [jnp.eye(6)], **k),
    "synflow": lambda p, **k: synflow_masks(
        p, UNIFORM, lambda q, x: x @ q["a"] @ q["head"], (1, 6), iterations=2, **k
    ),
}


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("name", BY_SCORES)
def test_layers_without_a_score_are_named(name, scope):
    with pytest.raises(ValueError, match=r"scores of .*are all equal|nothing is left of 'head'"):
        BY_SCORES[name](two_layers(0.0), scope=scope)


def test_grasp_scores_a_layer_that_starts_at_zero():
    masks = grasp_masks(two_layers(0.0), UNIFORM, squared, [jnp.eye(6)])
    assert [int(m.sum()) for m in masks.values()] == [18, 12]


def test_a_layer_that_a_global_ranking_leaves_nothing_of_is_named():
    with pytest.raises(ValueError, match=r"nothing is left of 'head', .*scope='layer'"):
        magnitude_masks(two_layers(1e-6), UNIFORM, scope="global")
    stacked = rigl_optax.uniform(0.5, stacked=("x",))
    layers = {"x": jnp.stack([jnp.full((4, 4), 9.0), jnp.eye(4)])}
    with pytest.raises(ValueError, match=r"scope='global': nothing is left of 'x'"):
        magnitude_masks(layers, stacked, scope="global")
    with pytest.raises(ValueError, match=r"the scores of 'x' are all equal"):
        magnitude_masks(layers, stacked)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_synflow_of_sixty_layers(scope):
    """R is about 1e-30 there at first, and far below what float32 holds in the end."""
    rng = np.random.default_rng(0)
    layers = rng.standard_normal((60, 8, 8)).astype(np.float32) * np.float32(0.05)
    stack = rigl_optax.uniform(0.75, stacked=("w",))

    def apply(params, x):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, params["w"])[0]

    params = {"w": jnp.asarray(layers)}
    found = synflow_masks(params, stack, apply, (1, 8), iterations=4, scope=scope)
    masks = np.ones((60, 8, 8), bool)
    for k in range(1, 5):
        weights = np.abs(layers.astype(np.float64)) * masks
        into, out = [np.ones(8)], [np.ones(8)]
        for w in weights:
            into.append(into[-1] @ w)
        for w in weights[::-1]:
            out.append(w @ out[-1])
        pairs = zip(into[:-1], out[-2::-1], weights, strict=True)
        scores = np.stack([a[:, None] * w * b for a, b, w in pairs])
        scores = np.where(masks, scores / scores.max(), -1)
        rows = scores.reshape(60, -1) if scope == "layer" else scores.reshape(1, -1)
        keep = round(rows.shape[1] * 0.25 ** (k / 4))
        masks = np.stack([top_k_mask(order(row), keep) for row in rows]).reshape(60, 8, 8)
    np.testing.assert_array_equal(found["w"], masks)
    assert masks.any((1, 2)).all()


def test_scores_of_float16_and_of_tiny_weights_stay_in_range():
    def linear(params, x):
        return jnp.sum(x @ params["a"] @ params["head"]) * jnp.asarray(1e-3, x.dtype)

    params = {n: x.astype(jnp.float16) for n, x in two_layers(0.01).items()}
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    tiny = jax.tree.map(lambda x: x * jnp.float32(2.0**-80), wide)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((5, 6)), jnp.float16)
    each = [snip_masks(p, UNIFORM, linear, [x * s]) for p, s in ((wide, 1), (params, 1 / 64))]
    each.append(snip_masks(tiny, UNIFORM, linear, [x.astype(jnp.float32)]))
    for masks in each[1:]:
        for n in params:
            np.testing.assert_array_equal(masks[n], each[0][n])


def test_a_loss_that_insists_on_its_precision_is_scored_in_it():
    def strict(params, x):
        if params["a"].dtype != x.dtype:
            raise TypeError("operands differ")
        return jnp.sum((x @ params["a"] @ params["head"]) ** 2)

    params = {n: x.astype(jnp.float16) for n, x in two_layers(1.0).items()}
    masks = snip_masks(params, UNIFORM, strict, [jnp.eye(6, dtype=jnp.float16)])
    assert [int(m.sum()) for m in masks.values()] == [18, 12]
    zeros = jax.tree.map(jnp.zeros_like, params)
    with pytest.raises(ValueError, match=r"scores of 'a', 'head' are all equal"):
        snip_masks(zeros, UNIFORM, strict, [jnp.eye(6, dtype=jnp.float16)])


def test_models_of_tokens_with_leaves_that_have_no_gradient():
    rng = np.random.default_rng(0)
    params = two_layers(1.0) | {
        "embed": jnp.asarray(rng.standard_normal((7, 6)), jnp.float32),
        "seen": jnp.zeros((), jnp.int32),
        "key": jax.random.key(0),
    }

    def apply(params, tokens):
        return params["embed"][tokens] @ params["a"] @ params["head"]

    loss = lambda p, t: jnp.mean(apply(p, t) ** 2)
    tokens = jnp.arange(7)
    for masks in (
        synflow_masks(params, UNIFORM, apply, (1, 5), iterations=2, scope="layer"),
        snip_masks(params, UNIFORM, loss, [tokens, tokens]),
        grasp_masks(params, UNIFORM, loss, [tokens]),
    ):
        assert [int(masks[n].sum()) for n in ("a", "head", "embed", "seen")] == [18, 12, 42, 1]
    with pytest.raises(TypeError, match="contracting dimensions"):
        synflow_masks(params, UNIFORM, lambda p, x: x @ p["a"], (1, 5))


# ------------------------------------------------------------------------ initial weights


@pytest.mark.parametrize("mode", ["unit", "layer"])
def test_sparse_aware_init_restores_the_variance(mode):
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((400, 50)).astype(np.float32) / 20
    mask = rng.random((400, 50)) < np.linspace(0.05, 0.5, 50)
    init = rigl_optax.sparse_aware_init(
        {"kernel": jnp.asarray(weights)}, {"kernel": jnp.asarray(mask)}, mode=mode
    )
    kernel = np.asarray(init["kernel"])
    assert not kernel[~mask].any()
    if mode == "unit":
        expected = np.where(mask, weights * np.sqrt(400 / mask.sum(0)), 0)
        assert abs((kernel**2).sum(0).mean() - 1) < 0.05  # as a dense layer's
    else:
        expected = np.where(mask, weights / np.sqrt(mask.mean()), 0)
    np.testing.assert_allclose(kernel, expected, rtol=1e-5)


def test_sparse_aware_init_of_dead_units_convolutions_and_dense_leaves():
    params = {"conv": {"kernel": jnp.ones((3, 3, 4, 2)), "bias": jnp.ones(2)}}
    mask = np.zeros((3, 3, 4, 2), bool)
    mask[0, 0, :, 0] = True
    masks = {"conv": {"kernel": jnp.asarray(mask), "bias": jnp.ones(2, bool)}}
    init = rigl_optax.sparse_aware_init(params, masks)["conv"]
    np.testing.assert_allclose(init["kernel"][0, 0, :, 0], 3.0)
    assert not init["kernel"][..., 1].any()
    np.testing.assert_array_equal(init["bias"], 1)
    with pytest.raises(ValueError, match="mode='units'"):
        rigl_optax.sparse_aware_init(params, masks, mode="units")
    with pytest.raises(ValueError, match="'conv/bias'.*no mask"):
        rigl_optax.sparse_aware_init(params, {"conv": {"kernel": masks["conv"]["kernel"]}})


# -------------------------------------------------------------------------------- tickets


def test_a_ticket_is_the_old_weights_under_the_new_masks():
    params = some_params()
    masks = magnitude_masks(some_params(5), UNIFORM)
    ticket = rigl_optax.lottery_ticket(params, masks)
    for n in "ab":
        np.testing.assert_array_equal(
            ticket[n]["kernel"], np.where(masks[n]["kernel"], params[n]["kernel"], 0)
        )
    tx = rigl_optax.static_sparse(optax.sgd(0.1), UNIFORM, initial_masks=masks)
    np.testing.assert_array_equal(
        rigl_optax.get_masks(tx.init(ticket))["a"]["kernel"], masks["a"]["kernel"]
    )
    with pytest.raises(ValueError, match="do not fit"):
        rigl_optax.lottery_ticket({"a": params["a"]}, masks)


# ----------------------------------------------------------------------------- small dense


def test_small_dense_matches_the_bytes():
    def lenet(width):
        a, b = round(300 * width), round(100 * width)
        sizes = [(784, a), (a,), (a, b), (b,), (b, 10), (10,)]
        return [jax.ShapeDtypeStruct(s, jnp.float32) for s in sizes]

    def size(width):
        return 4 * sum(int(np.prod(s.shape)) for s in lenet(width))

    target = 4 * 0.05 * 266_200 + 266_200 / 8
    width = rigl_optax.small_dense_width(lenet, target)
    assert size(width) <= target < size(width + 0.01)
    assert rigl_optax.small_dense_width(lenet, 10 * size(1.0)) == 1.0
    with pytest.raises(ValueError, match="narrowest"):
        rigl_optax.small_dense_width(lenet, 39)


def test_a_wide_sparse_network_costs_what_the_dense_one_did():
    def model(params, x):
        return jax.nn.relu(x @ params["a"]) @ params["b"]

    def flops(width):
        hidden = round(64 * width)
        params = {
            "a": jax.ShapeDtypeStruct((16, hidden), jnp.float32),
            "b": jax.ShapeDtypeStruct((hidden, 10), jnp.float32),
        }
        example = jax.ShapeDtypeStruct((1, 16), jnp.float32)
        keys = {"method": "static", "steps": 1, "model": model, "inputs": [example]}
        return rigl_optax.explain(params, rigl_optax.uniform(0.75), **keys)

    width = rigl_optax.iso_flop_width(
        lambda w: flops(w).flops_sparse, flops(1.0).flops_dense, tolerance=1e-2
    )
    assert width == pytest.approx(4, abs=0.02)  # one side of each layer widens
    with pytest.raises(ValueError, match="at a width of 1$"):
        rigl_optax.iso_flop_width(lambda w: 2.0, 1.0)
    with pytest.raises(ValueError, match="no more at a width of 1,024"):
        rigl_optax.iso_flop_width(lambda w: 1.0, 1.0)


# ---------------------------------------------------------------------------------- real data


def test_snip_at_98_percent_on_digits_leaves_no_layer_dead():
    data = digits.load("")
    images = batches.to_float(jnp.asarray(data.train.images[:200]), maximum=data.maximum).reshape(
        200, -1
    )
    labels = jnp.asarray(data.train.labels[:200])
    rng = np.random.default_rng(0)
    sizes = [(images.shape[1], 100), (100, 50), (50, 10)]
    params = {
        f"w{i}": jnp.asarray(rng.standard_normal(s) / s[0] ** 0.5, jnp.float32)
        for i, s in enumerate(sizes)
    }

    def loss(params, batch):
        x = jax.nn.relu(jax.nn.relu(batch[0] @ params["w0"]) @ params["w1"]) @ params["w2"]
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(x, batch[1]))

    masks = snip_masks(
        params, 0.98, loss, [(images[:100], labels[:100]), (images[100:], labels[100:])]
    )
    tx = rigl_optax.static_sparse(optax.adam(3e-3), 0.98, initial_masks=masks)
    state = tx.init(params)
    params = rigl_optax.lottery_ticket(params, masks)
    first = float(loss(params, (images, labels)))

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params, (images, labels)), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(300):
        params, state = step(params, state)
    assert float(loss(params, (images, labels))) < 0.6 * first
    for i in range(3):
        used = np.asarray(masks[f"w{i}"])
        assert used.any(0).sum() >= 5
