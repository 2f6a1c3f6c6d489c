"""Dead heads and hidden units, against products of masks in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import rigl_optax
from rigl_optax import _paths, analysis
from rigl_optax.models import transformer
from rigl_optax.training import checks, first_masks, parts, setup, tasks
from rigl_optax.training import config as config_lib
from tests.training.condensed_runs import GPT

MASKED = config_lib.changed(
    GPT,
    {
        "model.depth": 3,
        "model.heads": 4,
        "model.mlp": "swiglu",
        "model.hidden": (),
        "method.condensed": False,
        "method.structure": {},
        "mesh.data": 1,
    },
)


def counted(masks, path, heads, rotary):
    """Dead heads, averaging heads and dead hidden units of a block, from products of its masks."""
    qkv, out = (np.asarray(masks[f"{path}attention/{name}/kernel"], int) for name in ("qkv", "out"))
    dead = averaging = 0
    for q, k, v, o in zip(
        *(np.split(part, heads, axis=1) for part in np.split(qkv, 3, axis=1)),
        np.split(out, heads),
        strict=True,
    ):
        if not (v @ o).any():  # no way from an input, by a feature, to an output
            dead += 1
            continue
        if rotary:  # each feature turns into the other one of its pair as well
            q, k = (x + np.roll(x, x.shape[1] // 2, axis=1) for x in (q, k))
        averaging += not (q @ k.T).any()
    up, down = (np.asarray(masks[f"{path}mlp/{name}/kernel"], int) for name in ("up", "down"))
    alive = up.any(0) & down.any(1)
    if f"{path}mlp/gate/kernel" in masks:
        alive &= np.asarray(masks[f"{path}mlp/gate/kernel"]).any(0)
    return dead, averaging, int((~alive).sum())


def outlined(**changes):
    return setup.outline(config_lib.changed(MASKED, changes), tasks.Facts())


def with_masks(run, masks):
    """A state of a masked run: as far as needed here."""
    leaves = [jnp.asarray(masks[path]) for path, _ in _paths.flatten_with_paths(run.shapes)]
    tree = jax.tree.unflatten(jax.tree.structure(run.shapes), leaves)
    opt_state = run.abstract.opt_state
    return run.abstract._replace(opt_state=opt_state._replace(masks=tree))


def random_masks(shapes, seed, density):
    draw = np.random.default_rng(seed)
    named = _paths.flatten_with_paths(shapes)
    return {path: draw.random(leaf.shape) < density for path, leaf in named}


def of_blocks(masks, heads, rotary, depth=3):
    each = [counted(masks, f"blocks/{i}/", heads, rotary) for i in range(depth)]
    of_attention = ("dead_heads", "averaging_heads")
    return {
        **{
            name: {f"blocks/{i}/attention": each[i][j] for i in range(depth)}
            for j, name in enumerate(of_attention)
        },
        "dead_units": {f"blocks/{i}/mlp": each[i][2] for i in range(depth)},
    }


@pytest.mark.parametrize(("mlp", "positions"), [("gelu", "rotary"), ("swiglu", "learned")])
def test_dead_parts_are_those_of_products_of_masks(mlp, positions):
    run = outlined(**{"model.mlp": mlp, "model.positions": positions})
    found = parts.find(run)
    assert parts.heads(found) == {f"blocks/{i}/attention": 4 for i in range(3)}
    seen = np.zeros(3, int)
    for seed, density in enumerate([0.02, 0.05, 0.05, 0.1]):
        masks = random_masks(run.shapes, seed, density)
        expected = of_blocks(masks, 4, positions == "rotary")
        assert parts.dead(run, found, with_masks(run, masks)) == expected
        seen += [sum(numbers.values()) > 0 for numbers in expected.values()]
    assert (seen > 1).all()


def test_of_stacked_blocks_each_is_counted():
    run, apart = outlined(**{"model.scan": True}), outlined()
    masks = random_masks(apart.shapes, 0, 0.05)
    stacked = {
        path: np.stack([masks[path.replace("blocks/", f"blocks/{i}/")] for i in range(3)])
        if path.startswith("blocks/")
        else masks[path]
        for path, _ in _paths.flatten_with_paths(run.shapes)
    }
    named = {
        measure: {f"blocks/{path.split('/')[2]}/{path.split('/')[1]}": n for path, n in of.items()}
        for measure, of in parts.dead(run, parts.find(run), with_masks(run, stacked)).items()
    }
    assert named == parts.dead(apart, parts.find(apart), with_masks(apart, masks))
    # And so are dead output units of kernels, for warnings.
    dead = checks.dead_units(run, with_masks(run, stacked))
    for path, number in checks.dead_units(apart, with_masks(apart, masks)).items():
        at = path.split("/")
        if at[0] == "blocks":
            path = "/".join([at[0], *at[2:], at[1]])
        assert dead[path] == number, path


def test_blocks_that_cover_several_heads_are_taken_apart():
    blocks = {"name": "block", "rows": 5, "cols": 3, "pad": True}
    changes = {"method.structure": blocks, "method.sparsity": 0.9, "model.depth": 1}
    run = outlined(**{"method.condensed": True} | changes)
    topologies = first_masks.blocks(run.config, run.shapes)
    opt_state = run.abstract.opt_state._replace(topologies=topologies)
    masks = {path: np.ones(x.shape, bool) for path, x in _paths.flatten_with_paths(run.shapes)}
    masks |= {path: np.asarray(of.dense_mask()) for path, of in topologies.items()}
    assert masks["blocks/0/attention/qkv/kernel"].mean() < 0.2
    found = parts.dead(run, parts.find(run), run.abstract._replace(opt_state=opt_state))
    assert found == of_blocks(masks, 4, True, depth=1)
    assert all(sum(numbers.values()) for numbers in found.values())


def test_dead_heads_do_nothing_and_averaging_ones_take_the_mean():
    heads, size, time = 6, 4, 5
    attention = transformer.Attention(
        heads * size, heads, is_causal=False, rotary=True, init=1.0, dtype=None, rngs=nnx.Rngs(0)
    )
    draw = np.random.default_rng(0)
    qkv, out = (draw.random((heads * size, heads * size * n)) < 0.02 for n in (3, 1))
    x = jnp.asarray(draw.standard_normal((1, time, heads * size)), jnp.float32)
    into = np.split(np.asarray(analysis.fan_in(qkv)), 3)
    dead = np.asarray(analysis.dead_heads(into[2], analysis.fan_out(out), heads=heads))
    averages = np.asarray(analysis.averaging_heads(*into[:2], heads=heads, rotary=True))
    assert 0 < dead.sum() < heads and 0 < (averages & ~dead).sum() < (~dead).sum()
    weights = 5 * draw.standard_normal(qkv.shape) * qkv
    values = np.split(x[0] @ weights, 3, axis=1)[2]
    for head in range(heads):
        mine = slice(head * size, (head + 1) * size)
        alone = np.zeros(out.shape)
        alone[mine] = (draw.standard_normal(out.shape) * out)[mine]
        attention.qkv.kernel[...], attention.out.kernel[...] = (
            jnp.asarray(weights, jnp.float32),
            jnp.asarray(alone, jnp.float32),
        )
        y = np.asarray(attention(x)[0])
        assert y.any() != dead[head]
        mean = np.broadcast_to(values[:, mine].mean(0) @ alone[mine], y.shape)
        assert dead[head] or np.allclose(y, mean, atol=1e-5) == averages[head]


def test_kernels_with_an_axis_of_heads_are_counted_alike():
    draw = np.random.default_rng(1)
    value, out = draw.random((8, 4, 2)) < 0.1, draw.random((4, 2, 8)) < 0.1
    into, out_of = (
        analysis.fan_in(value, rigl_optax.flax_axes("query/kernel", value)),
        analysis.fan_out(out, rigl_optax.flax_axes("attention/out/kernel", out)),
    )
    expected = [not (value[:, i].astype(int) @ out[i].astype(int)).any() for i in range(4)]
    assert 0 < sum(expected) < 4
    assert analysis.dead_heads(into, out_of, heads=4).tolist() == expected
    with pytest.raises(ValueError, match="heads=3: must divide the 8 features"):
        analysis.dead_heads(into, out_of, heads=3)


def test_a_run_is_warned_of_heads_that_die():
    run = outlined()
    masks = random_masks(run.shapes, 0, 1.1)
    start = checks.start_of(run, with_masks(run, masks))
    assert set(start.dead_heads.values()) == {0}
    masks["blocks/1/attention/out/kernel"][4:8] = False
    now = checks.dead_heads(run, start.parts, with_masks(run, masks))
    (warning,) = checks._lost_heads(start, now).values()
    assert "blocks/1/attention 0 -> 1 of 4;" in warning
    assert checks._lost_heads(start, start.dead_heads) == {}


def test_a_network_without_attention_has_no_such_parts(small):
    assert parts.find(setup.prepare(small)) == ()
