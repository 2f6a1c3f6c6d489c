import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import rigl_optax
from rigl_optax import _paths, accounting
from rigl_optax.models import attention, transformer
from rigl_optax.models.transformer import GPT, ViT


def gpt(**keys):
    return GPT(**{"embedding": 16, "depth": 2, "heads": 2, "context": 12} | keys, rngs=nnx.Rngs(0))


def params_of(model):
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


TOKENS = jnp.arange(20).reshape(2, 10) * 7 % 256


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
@pytest.mark.parametrize("positions", ["rotary", "learned"])
@pytest.mark.parametrize("tied", [False, True])
def test_logits_depend_on_the_tokens_up_to_theirs_alone(mlp, positions, tied):
    model = gpt(mlp=mlp, positions=positions, tied=tied)
    before = model(TOKENS)
    assert before.shape == (2, 10, 256) and before.dtype == jnp.float32
    moved = np.abs(np.asarray(model(TOKENS.at[0, 6].set(99)) - before)).max(-1)
    assert (moved[0, :6] == 0).all() and (moved[0, 6:] > 0).all() and (moved[1] == 0).all()


def test_attention_is_softmax_of_scaled_products_head_by_head():
    model = transformer.Attention(
        8, 2, is_causal=False, rotary=False, init=0.5, dtype=None, rngs=nnx.Rngs(1)
    )
    x = np.random.default_rng(0).standard_normal((1, 5, 8)).astype(np.float32)
    qkv = x[0] @ np.asarray(model.qkv.kernel[...])
    out = []
    for head in range(2):
        q, k, v = (qkv[:, 8 * i + 4 * head : 8 * i + 4 * head + 4] for i in range(3))
        scores = np.exp(q @ k.T / 2)  # the root of 4
        out.append(scores / scores.sum(-1, keepdims=True) @ v)
    expected = np.concatenate(out, -1) @ np.asarray(model.out.kernel[...])
    np.testing.assert_allclose(model(jnp.asarray(x))[0], expected, rtol=1e-4, atol=1e-6)


def test_rotations_keep_lengths_and_depend_on_distances_alone():
    q, k = (np.random.default_rng(i).standard_normal(6).astype(np.float32) for i in (0, 1))
    same = jnp.broadcast_to(jnp.asarray(np.stack([q, k]))[None, None], (1, 9, 2, 6))
    turned = np.asarray(transformer.rotate(same))[0]
    np.testing.assert_allclose(
        np.linalg.norm(turned, axis=-1), np.linalg.norm(np.asarray(same)[0], axis=-1), rtol=1e-5
    )
    products = turned[:, 0] @ turned[:, 1].T
    for distance in range(4):
        diagonal = np.diagonal(products, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], rtol=1e-4, atol=1e-5)
    assert abs(products[0, 0] - products[0, 3]) > 1e-2


def test_what_stays_dense_and_why():
    for model, dense in (
        (gpt(tied=False, positions="learned"), {"embedding/embedding", "head/kernel", "positions"}),
        (ViT((8, 8), 3, patch=4, embedding=16, depth=1, heads=2, rngs=nnx.Rngs(0)), None),
    ):
        params = params_of(model)
        layers = rigl_optax.erk(0.8, dense=rigl_optax.DenseLayers(transformer.dense_layers("erk")))
        kernels = {p for p, x in _paths.flatten_with_paths(params) if x.ndim >= 2}
        left = kernels - layers(params).keys()
        assert left == (dense or {"patches/kernel", "head/kernel", "positions", "class_token"})
        assert all("blocks" in path for path in layers(params))


@pytest.mark.parametrize("structure", [rigl_optax.Block(8, 8), rigl_optax.ConstantFanIn()])
def test_kernels_take_structures(structure):
    dense = rigl_optax.DenseLayers(transformer.dense_layers("uniform"))
    tx = rigl_optax.static_sparse(
        rigl_optax.adamw(1e-3), rigl_optax.uniform(0.5, dense=dense), structure=structure
    )
    masks = jax.eval_shape(tx.init, params_of(gpt())).masks
    assert masks["blocks"][0]["attention"]["qkv"]["kernel"].shape == (16, 48)


@pytest.mark.parametrize("time", [8, 11])
def test_attention_of_some_queries_at_a_time_is_that_of_all(monkeypatch, time):
    monkeypatch.setattr(attention, "QUERIES", 4)
    arrays = jax.random.normal(jax.random.key(0), (4, 2, time, 3, 4))

    def both(attend):
        y, pull = jax.vjp(lambda *qkv: attend(*qkv, is_causal=True), *arrays[:3])
        return y, *pull(arrays[3])

    found, expected = both(attention.attend), both(jax.nn.dot_product_attention)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)


@pytest.mark.parametrize("batch", [4, 6, 3])
def test_a_batch_in_parts_has_the_gradient_of_the_whole(batch):
    tokens = jax.random.randint(jax.random.key(batch), (batch, 10), 0, 256)
    graphdef, params, rest = nnx.split(gpt(), nnx.Param, ...)
    of_parts = nnx.graphdef(gpt(parts=4))

    def both(graphdef):
        loss = lambda params: nnx.merge(graphdef, params, rest)(tokens).var()
        return jax.jit(jax.value_and_grad(loss))(params)

    found, expected = both(of_parts), both(graphdef)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, expected)


def test_in_parts_memory_is_that_of_a_part():
    def planned(parts):
        model = gpt(parts=parts, depth=4, context=64)
        loss = lambda params, tokens: nnx.merge(graphdef, params, rest)(tokens).var()
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)
        shapes = params, jax.ShapeDtypeStruct((16, 64), jnp.int32)
        return jax.jit(jax.grad(loss)).lower(*shapes).compile().memory_analysis()

    assert planned(8).temp_size_in_bytes < planned(1).temp_size_in_bytes / 3


@pytest.mark.parametrize("parts", [1, 2])
def test_flops_of_attention_scores_are_counted_as_dense(parts):
    model = gpt(context=10, parts=parts)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    run = lambda params, tokens: nnx.merge(graphdef, params, rest)(tokens)
    shapes = jax.eval_shape(lambda: nnx.to_pure_dict(params))
    cost = accounting.count_flops(run, shapes, jax.ShapeDtypeStruct((2, 10), jnp.uint8))
    of_kernel = {path: 2 * 20 * leaf.size for path, leaf in _paths.flatten_with_paths(shapes)}
    for path, flops in cost.by_parameter.items():
        assert flops == (of_kernel[path] if path.endswith("kernel") else 0), path
    scores = 2 * 2 * 2 * 2 * 10 * 10 * 16  # of 2 blocks: queries by keys, and weights by values
    assert cost.total == sum(cost.by_parameter.values()) + scores


def test_images_are_cut_into_patches_row_by_row():
    image = jnp.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    patches = transformer.cut(image, 2)
    assert patches.shape == (2, 6, 12)
    np.testing.assert_array_equal(patches[1, 4], image[1, 2:4, 2:4].reshape(-1))


@pytest.mark.parametrize("pooled", [False, True])
def test_a_vit_classifies_images(pooled):
    model = ViT((8, 8), 3, patch=4, embedding=16, depth=1, heads=2, pooled=pooled, rngs=nnx.Rngs(0))
    images = jnp.asarray(np.random.default_rng(0).random((5, 8, 8)), jnp.float32)
    logits = model(images)
    assert logits.shape == (5, 3) and len(np.unique(np.asarray(logits)[:, 0])) == 5
    assert model.positions.shape == (4 + (not pooled), 16)


def test_the_width_multiplies_the_embedding():
    assert gpt(width=0.5, embedding=32).embedding.embedding.shape == (256, 16)
    assert gpt(width=0.01).embedding.embedding.shape == (256, 4)
    assert gpt(mlp="swiglu").blocks[0].mlp.up.kernel.shape == (16, 64)


def test_bfloat16_is_of_the_computation_alone():
    model = gpt(dtype=jnp.bfloat16)
    assert model(TOKENS).dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves(params_of(model))} == {jnp.dtype("float32")}
    np.testing.assert_allclose(model(TOKENS), gpt()(TOKENS), atol=0.02)


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"embedding": 18}, "width=18: must be a multiple of twice the 2 heads"),
        ({"depth": 0}, "depth=0, heads=2"),
        ({"parts": 0}, "parts=0, hidden=0: must be at least 1"),
        ({"mlp": "relu"}, "mlp='relu': must be one of gelu, swiglu"),
        ({"positions": "none"}, "positions='none': must be one of rotary, learned"),
        ({"vocabulary": 0}, "vocabulary=0, context=12: must be at least 1"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(keys, told):
    with pytest.raises(ValueError, match=told):
        gpt(**keys)


def test_what_is_too_long_is_refused():
    with pytest.raises(ValueError, match="13 tokens: the model has a context of 12"):
        gpt()(jnp.zeros((1, 13), jnp.uint8))
    with pytest.raises(ValueError, match="patch=3: must divide the 8x8 pixels"):
        ViT((8, 8), 3, patch=3, embedding=16, depth=1, heads=2, rngs=nnx.Rngs(0))


def stacked_like(params):
    """Parameters of a list of blocks, as those of a model with `scan=True`."""
    blocks = [params["blocks"][i] for i in sorted(params["blocks"])]
    return params | {"blocks": jax.tree.map(lambda *each: jnp.stack(each), *blocks)}


def vit(**keys):
    shape = {"patch": 4, "embedding": 16, "depth": 2, "heads": 2} | keys
    return ViT((8, 8), 3, **shape, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("kind", ["gpt", "vit"])
def test_a_scan_over_the_blocks_is_the_same_network(kind):
    if kind == "gpt":
        make, x = (lambda **keys: gpt(mlp="swiglu", positions="learned", **keys)), TOKENS
    else:
        make, x = vit, jnp.linspace(0, 1, 128).reshape(2, 8, 8)

    def computed(model):
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)

        def loss(params):
            logits = nnx.merge(graphdef, params, rest)(x)
            return jnp.square(logits).sum(), logits

        pure = nnx.to_pure_dict(params)
        (_, logits), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(pure)
        return pure, gradients, logits

    apart, scanned = computed(make()), computed(make(scan=True, parts=2))
    jax.tree.map(np.testing.assert_array_equal, scanned[0], stacked_like(apart[0]))
    for found, expected in ((scanned[1], stacked_like(apart[1])), (scanned[2], apart[2])):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected
        )


def layers_of(**keys):
    stacked = (transformer.STACKED,) if keys.get("scan") else ()
    dense = rigl_optax.DenseLayers(transformer.dense_layers("erk"))
    return rigl_optax.erk(0.8, dense=dense, stacked=stacked)


def test_a_scan_has_the_sparsity_of_each_layer_and_the_flops():
    shapes = {}
    for scan in (False, True):
        model = nnx.eval_shape(lambda scan=scan: gpt(depth=3, scan=scan))
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)
        run = lambda params, tokens, g=graphdef, r=rest: nnx.merge(g, params, r)(tokens)
        shapes[scan] = nnx.to_pure_dict(params), run
    params, run = shapes[False]
    stack, scanned = shapes[True]
    apart, together = layers_of()(params), layers_of(scan=True)(stack)
    assert len(set(apart.values())) > 1
    for path, sparsity in apart.items():
        assert together[path.replace(path[:9], "blocks/", 1)] == pytest.approx(sparsity, abs=1e-12)
    tokens = jax.ShapeDtypeStruct((1, 10), jnp.uint8)
    one, loop = (accounting.count_flops(f, p, tokens) for f, p in ((run, params), (scanned, stack)))
    assert loop.total == one.total
    for path in together:
        name = path.removeprefix("blocks/")
        layers = [one.by_parameter[f"blocks/{i}/{name}"] for i in range(3)]
        assert loop.by_parameter[path] == sum(layers)


def test_the_program_of_a_scan_does_not_grow_with_the_depth():
    def size(**keys):
        model = nnx.eval_shape(lambda: gpt(**keys))
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)
        pure = nnx.to_pure_dict(params)
        tx = rigl_optax.rigl(rigl_optax.adamw(1e-3), layers_of(**keys), end=9)

        def step(params, state, tokens):
            loss = lambda params: nnx.merge(graphdef, params, rest)(tokens).mean()
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return updates, state

        state = jax.eval_shape(tx.init, pure)
        tokens = jax.ShapeDtypeStruct((1, 10), jnp.uint8)
        return len(jax.jit(step).lower(pure, state, tokens).as_text().splitlines())

    scanned = size(depth=4, scan=True)
    assert scanned < 1.02 * size(depth=2, scan=True)
    assert scanned < 0.6 * size(depth=4)


def test_with_the_same_masks_a_scan_rewires_as_the_blocks_do():
    params, updated = params_of(gpt()), []
    draw, sparse = np.random.default_rng(0), layers_of()(params)
    grads = jax.tree.map(lambda x: jnp.asarray(draw.standard_normal(x.shape), x.dtype), params)
    named = _paths.flatten_with_paths(params)
    masks = jax.tree.unflatten(
        jax.tree.structure(params),
        [(draw.random(x.shape) < 0.2) | (path not in sparse) for path, x in named],
    )
    for scan, of in ((False, lambda tree: tree), (True, stacked_like)):
        tx = rigl_optax.rigl(
            rigl_optax.adamw(1e-3), layers_of(scan=scan), end=9, initial_masks=of(masks)
        )
        step = lambda grads, params, tx=tx: tx.update(grads, tx.init(params), params)[1].masks
        updated.append(jax.jit(step)(of(grads), of(params)))
    jax.tree.map(np.testing.assert_array_equal, updated[1], stacked_like(updated[0]))
    both = zip(jax.tree.leaves(updated[0]), jax.tree.leaves(masks), strict=True)
    assert any((a != b).any() for a, b in both)
