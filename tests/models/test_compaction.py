"""Compacted models of every family: fewer units, the same outputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rigl_optax import _paths
from rigl_optax.models import (
    compaction,
    lenet,
    mobilenet_v1,
    mobilenet_v2,
    recurrent,
    resnet,
    transformer,
    vgg,
    wide_resnet,
)

IMAGE = (16, 16, 3)


def lm(cell, **options):
    rngs = nnx.Rngs(0)
    sizes = {"vocabulary": 11, "embedding": 12, "readout": (10, 12)}
    return recurrent.StreamingLM(cell, (14, 9), **sizes, **options, lanes=3, rngs=rngs)


def rngs():
    return nnx.Rngs(0)


MODELS = {
    "lenet": lambda: lenet.LeNet(IMAGE, 5, (40, 20), rngs=rngs()),
    "vgg": lambda: vgg.VGG(IMAGE, 5, 0.1, depth=11, rngs=rngs()),
    "resnet18": lambda: resnet.ResNet(IMAGE, 5, 0.15, depth=18, rngs=rngs()),
    "resnet50": lambda: resnet.ResNet(IMAGE, 5, 0.1, depth=50, rngs=rngs()),
    "wide_resnet": lambda: wide_resnet.WideResNet(
        IMAGE, 5, depth=10, k=1, dropout=0.1, rngs=rngs()
    ),
    "mobilenet_v1": lambda: mobilenet_v1.MobileNetV1(IMAGE, 5, 0.2, rngs=rngs()),
    "mobilenet_v2": lambda: mobilenet_v2.MobileNetV2(IMAGE, 5, 0.2, rngs=rngs()),
    "gru": lambda: lm("gru"),
    "gru_separate": lambda: lm("gru", fused=False, tied=False),
    "lstm": lambda: lm("lstm"),
    "gpt": lambda: transformer.GPT(
        embedding=16, depth=2, heads=4, vocabulary=11, context=8, rngs=rngs()
    ),
    "gpt_swiglu": lambda: transformer.GPT(
        embedding=16, depth=2, heads=4, vocabulary=11, mlp="swiglu", tied=True, rngs=rngs()
    ),
    "vit": lambda: transformer.ViT(IMAGE, 5, patch=8, embedding=16, depth=2, heads=4, rngs=rngs()),
}
IS_TEXT = ("gru", "lstm", "gpt")


ENDS = ("stem", "convs/0/", "classifier", "patches", "head/", "logits")


@pytest.fixture(scope="module", autouse=True)
def shallow():
    """Fewer blocks of each kind: to compile them takes most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resnet, "STAGES", resnet.STAGES[:2])
        patch.setitem(resnet.DEPTHS, 18, ((1, 2), False))
        patch.setitem(resnet.DEPTHS, 50, ((2, 1), True))
        patch.setitem(vgg.DEPTHS, 11, (1, 1, 1, 2, 1))
        patch.setattr(mobilenet_v1, "BLOCKS", mobilenet_v1.BLOCKS[:3])
        patch.setattr(mobilenet_v2, "BLOCKS", mobilenet_v2.BLOCKS[:4])
        yield


def filled(name, density=0.2, alive=0.8, seed=0):
    """A model with few weights, drawn by NumPy: whole units cut off, constants of all kinds."""
    rng = np.random.default_rng(seed)
    graphdef, params, rest = nnx.split(nnx.eval_shape(MODELS[name]), nnx.Param, ...)

    def value(path, leaf):
        last, shape = path.split("/")[-1], leaf.shape
        if leaf.dtype != np.float32:
            return jnp.zeros(shape, leaf.dtype)
        if path.startswith("carry"):
            return jnp.zeros(shape)
        if last == "var":
            return jnp.asarray(rng.uniform(0.5, 2, shape), jnp.float32)
        drawn = rng.standard_normal(shape)
        if last == "kernel":
            fan_in = np.prod(shape[:-1]) * density
            if path.startswith(ENDS) or "depthwise" in path:
                return jnp.asarray(drawn, jnp.float32)
            drawn = drawn * (rng.random(shape) < density) / np.sqrt(max(fan_in, 1))
            drawn *= rng.random(shape[-1]) < alive  # units without inputs
            drawn *= (rng.random(shape[-2]) < alive)[:, None]  # and without outputs
            if path.endswith("qkv/kernel"):
                drawn.reshape(16, 3, 4, 4)[:, :, 1] = 0
        elif last in ("bias", "scale") and not path.startswith("norm"):
            drawn *= rng.random(shape) < alive
        return jnp.asarray(drawn, jnp.float32)

    def fill(tree):
        return _paths.map_with_names(value, nnx.to_pure_dict(tree))

    model = nnx.merge(graphdef, fill(params), fill(rest))
    model.eval()
    return model


def inputs(name, seed=1):
    rng = np.random.default_rng(seed)
    if name.startswith(IS_TEXT):
        tokens = jnp.asarray(rng.integers(0, 11, (3, 8)))
        return (tokens, jnp.asarray(rng.random((3, 8)) < 0.2)) if "gpt" not in name else (tokens,)
    return (jnp.asarray(rng.standard_normal((3, *IMAGE)), jnp.float32),)


def outputs(model, name):
    """The outputs for two batches in turn, so that recurrent models start from their state."""
    graphdef, state = nnx.split(model)

    @jax.jit
    def call(state, *x):
        model = nnx.merge(graphdef, state)
        y = model(*x)
        return y, nnx.state(model)

    found = []
    for seed in (1, 2):
        y, state = call(state, *inputs(name, seed))
        found.append(np.asarray(y))
    return np.stack(found)


def size(model):
    return sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))


@pytest.mark.parametrize("name", MODELS)
def test_a_smaller_model_has_the_same_outputs(name):
    # A signal soon ends at scales of 0 where no residual connection leads around them.
    model = filled(name, *((0.9, 0.9) if "mobilenet" in name else ()))
    small, about = compaction.compact(model)
    before, after = outputs(model, name), outputs(small, name)
    assert np.ptp(before, axis=1).max() > 1e-3 * np.abs(before).max()  # the input matters
    np.testing.assert_allclose(after, before, rtol=2e-4, atol=2e-4 * np.abs(before).max())
    removed = {group: was - now for group, (was, now) in about.units.items()}
    assert sum(removed.values()) > 0 and size(small) < size(model)
    again, unchanged = compaction.compact(small)
    assert size(again) == size(small)
    assert all(was == now for was, now in unchanged.units.values())


def test_models_keep_true_sizes():
    small, _ = compaction.compact(filled("mobilenet_v2"))
    for _, module in nnx.iter_modules(small):
        if isinstance(module, nnx.Conv):
            inputs = module.in_features // module.feature_group_count
            assert module.kernel.shape[-2:] == (inputs, module.out_features)
    text, _ = compaction.compact(filled("lstm"))
    assert [c.shape for c in text.initial_carry(2)] == [(2, c.shape[1]) for c in text.carry]


def test_a_stack_of_blocks_is_refused():
    model = transformer.GPT(embedding=16, depth=2, heads=4, scan=True, rngs=rngs())
    with pytest.raises(ValueError, match="compact a model with scan=False"):
        compaction.compact(model)
