"""Convolutional networks in the training loop: schedules, losses, dense layers, compilation."""

import functools
import importlib.util
import io
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from rich.console import Console

import rigl_optax
from rigl_optax import _paths
from rigl_optax.models import mobilenet_v1, resnet
from rigl_optax.training import (
    architectures,
    checkpoints,
    costs,
    evaluation,
    export,
    first_masks,
    loop,
    losses,
    methods,
    optimizers,
    setup,
    sparsity,
    step,
    tasks,
)
from rigl_optax.training import config as config_lib

ROOT = pathlib.Path(__file__).parents[2]


def recipe(name, **changes):
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = config_lib.from_mapping(module.get_config().to_dict())
    return config_lib.changed(found, changes)


@pytest.fixture(scope="module")
def vision(small):
    """A wide ResNet as small as one can be, on digits."""
    return config_lib.changed(
        small,
        {
            "model.name": "wide_resnet",
            "model.depth": 10,
            "model.k": 1,
            "model.dropout": 0.1,
            "model.hidden": (),
            "model.width": 0.25,
            "data.augment": "pad_crop",
            "batch_size": 20,
            "steps": 20,
            "method.every": 5,
            "method.sparsity": 0.7,
            "loss.label_smoothing": 0.1,
        },
    )


@pytest.fixture(scope="module")
def trained(vision, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("vision")
    return workdir, loop.train(vision, workdir, Console(file=io.StringIO(), width=120))


def final(config, workdir):
    run = setup.prepare(config)
    with checkpoints.read_checkpoints(workdir) as saved:
        return run, checkpoints.restore_newest(saved, run.initial, print)


# Rates


def plan_of(config):
    return methods.plan_of(methods.build(config))


def test_the_imagenet_schedule_is_that_of_the_fact_sheet():
    config = recipe("imagenet_resnet50")
    rate = optimizers.learning_rate(config)
    # Section 4.1: peak at step 1,564, a tenth of it from 9,384, 21,895 and 28,151 on.
    expected = {0: 0, 782: 0.8, 1_564: 1.6, 9_383: 1.6, 9_384: 0.16, 21_894: 0.16, 21_895: 0.016}
    expected |= {28_150: 0.016, 28_151: 0.0016, 31_999: 0.0016}
    for at, value in expected.items():
        assert float(rate(at)) == pytest.approx(value, rel=1e-5, abs=1e-9), at
    assert (
        config.rewire_end == 25_000
        and plan_of(
            config_lib.changed(config, {"method.name": "gmp", "method.every": 1_000})
        ).default.schedule.begin
        == 10_000
    )


def test_the_cifar_schedule_is_that_of_the_fact_sheet():
    config = recipe("cifar10_wrn22_2")
    rate = optimizers.learning_rate(config)
    for at, value in {0: 0.1, 29_999: 0.1, 30_000: 0.02, 60_000: 0.004, 90_000: 0.0008}.items():
        assert float(rate(at)) == pytest.approx(value, rel=1e-5), at
    assert config.rewire_end == 75_000 and config.steps == 97_656


@pytest.mark.parametrize("name", ["imagenet_resnet50", "cifar10_wrn22_2"])
def test_training_m_times_as_long_scales_rates_and_t_end_and_nothing_else(name):
    once = recipe(name)
    five = config_lib.changed(once, {"steps": 5 * once.steps})
    rates = optimizers.learning_rate(once), optimizers.learning_rate(five)
    for at in range(0, once.steps, 997):
        assert float(rates[1](5 * at)) == pytest.approx(float(rates[0](at)), rel=1e-3, abs=1e-4)
    assert five.rewire_end == 5 * once.rewire_end
    assert five.method == once.method
    assert float(
        plan_of(five).default.drop_fraction(jnp.int32(five.rewire_end // 2))
    ) == pytest.approx(0.15)
    pruning = [
        config_lib.changed(c, {"method.name": "gmp", "method.every": 1_000}) for c in (once, five)
    ]
    begins = [plan_of(config).default.schedule.begin for config in pruning]
    assert begins[1] == pytest.approx(5 * begins[0], abs=1_000)


def test_a_cosine_rises_first_and_ends_at_zero(small):
    config = config_lib.changed(
        small, {"steps": 100, "optimizer.warmup": 0.1, "optimizer.learning_rate": 0.4}
    )
    rate = optimizers.learning_rate(config)
    assert [float(rate(t)) for t in (0, 5, 10)] == pytest.approx([0, 0.2, 0.4])
    assert float(rate(55)) == pytest.approx(0.2) and float(rate(100)) == pytest.approx(0, abs=1e-8)
    constant = optimizers.learning_rate(
        config_lib.changed(config, {"optimizer.schedule": "constant", "optimizer.warmup": 0.0})
    )
    assert float(constant(0)) == float(constant(99)) == pytest.approx(0.4)


def test_two_drops_in_one_step_of_a_short_run_are_both_taken(small):
    config = config_lib.changed(
        small,
        {
            "steps": 4,
            "optimizer.schedule": "step",
            "optimizer.decay_at": (0.5, 0.55),
            "optimizer.decay_factor": 0.1,
        },
    )
    rates = [float(optimizers.learning_rate(config)(t)) for t in range(4)]
    assert rates == pytest.approx([0.1, 0.1, 0.001, 0.001])


# Loss and decay


def test_smoothed_labels_are_a_mixture_with_the_even_distribution():
    logits = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32) * 3
    labels = np.array([0, 3, 6, 2, 2])
    target = 0.9 * np.eye(7)[labels] + 0.1 / 7
    log_p = logits - np.log(np.exp(logits.astype(np.float64)).sum(1, keepdims=True))
    found = losses.cross_entropy(jnp.asarray(logits), jnp.asarray(labels), 0.1)
    np.testing.assert_allclose(found, -(target * log_p).sum(1), rtol=1e-5)
    plain = losses.cross_entropy(jnp.asarray(logits), jnp.asarray(labels))
    np.testing.assert_allclose(plain, -log_p[np.arange(5), labels], rtol=1e-5)


@pytest.mark.parametrize(
    ("covered", "expected"),
    [
        ("kernels", {"conv/kernel", "depthwise/kernel"}),
        ("kernels_but_depthwise", {"conv/kernel"}),
        ("all", {"conv/kernel", "depthwise/kernel", "norm/scale"}),
    ],
)
@pytest.mark.parametrize("nesterov", [True, False])
def test_what_decays(small, covered, expected, nesterov):
    params = {
        "conv": {"kernel": jnp.ones((1, 1, 2, 2))},
        "depthwise": {"kernel": jnp.ones((3, 3, 1, 2))},
        "norm": {"scale": jnp.ones(2)},
    }
    config = config_lib.changed(
        small,
        {
            "method.name": "dense",
            "optimizer.nesterov": nesterov,
            "optimizer.schedule": "constant",
            "optimizer.weight_decay": 0.5,
            "optimizer.weight_decay_on": covered,
        },
    )
    tx = methods.build(config)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    moved = {path for path, u in _paths.flatten_with_paths(updates) if np.any(u)}
    assert moved == expected
    # Nesterov's first step looks one step ahead: 1 + momentum times the plain one.
    size = 0.1 * 0.5 * (1.9 if nesterov else 1)
    assert float(updates["conv"]["kernel"][0, 0, 0, 0]) == pytest.approx(-size)


# Dense layers and widths


def test_a_model_brings_its_dense_layers_and_says_why(vision, monkeypatch):
    monkeypatch.setitem(resnet.DEPTHS, 18, ((1, 1, 1, 1), False))
    config = config_lib.changed(
        vision,
        {"model.name": "resnet18", "model.width": 0.1, "method.distribution": {"name": "uniform"}},
    )
    run = setup.prepare(config)
    why = {layer.path: layer.dense_because for layer in costs.explain(run).layers}
    # Digits have one channel: by its shape alone the stem would be taken for a depthwise kernel.
    kernels = {path: reason for path, reason in why.items() if path.endswith("kernel") and reason}
    assert kernels == {"stem/kernel": "the first convolution, dense with a uniform distribution"}

    def left_out(key, value):
        layers = sparsity.distribution(config_lib.changed(config, {key: value}))
        return kernels_of(run.initial.params) - layers(run.initial.params).keys()

    assert left_out("method.distribution.name", "erk") == set()
    assert left_out("model.dense_layers", "none") == set()
    assert left_out("model.dense_layers", "^classifier") == {"classifier/kernel"}
    wide = config_lib.changed(config, {"model.name": "wide_resnet"})
    assert sparsity.distribution(wide).dense.reason(
        "stem/kernel", run.initial.params["stem"]["kernel"]
    )
    with pytest.raises(ValueError, match="dense_layers='conv1'.*'stem/kernel'"):
        setup.prepare(config_lib.changed(config, {"model.dense_layers": "conv1"}))


def kernels_of(params):
    return {path for path, leaf in _paths.flatten_with_paths(params) if leaf.ndim >= 2}


def test_small_dense_is_as_small_as_the_sparse_network(vision):
    config = config_lib.changed(vision, {"model.name": "mobilenet_v1", "model.width": 1.0})
    config = config_lib.changed(config, {"method.name": "small_dense", "method.sparsity": 0.9})
    task = tasks.find(config)
    width = first_masks.width(config, lambda w: task.model(config, w))
    shapes = lambda w: nnx.to_pure_dict(
        nnx.state(nnx.eval_shape(lambda: task.model(config, w)), nnx.Param)
    )
    size = lambda tree: sum(leaf.size for _, leaf in _paths.flatten_with_paths(tree))
    full, sparse = shapes(1.0), sparsity.distribution(config)(shapes(1.0))
    sizes = {path: leaf.size for path, leaf in _paths.flatten_with_paths(full)}
    active = sum(n - int(sparse.get(path, 0) * n) for path, n in sizes.items())
    bits = sum(sizes[path] for path in sparse)
    budget = 4 * active + bits / 8
    assert 0.85 * budget < 4 * size(shapes(width)) <= budget
    assert 0.25 < width < 0.45


def test_hidden_widths_and_options_fit_the_model(vision, small):
    for keys, told in (
        ({"model.hidden": (3,)}, "has its own widths"),
        ({"model.name": "lenet"}, "needs its hidden widths"),
        (
            {"model.depth": 10, "model.heads": 2},
            "config.model.heads: .*for 'wide_resnet' depth, dropout, k",
        ),
        (
            {"model.name": "resnet18", "model.depth": 50},
            "config.model.depth: .*for 'resnet18' none more",
        ),
        ({"model.name": "resnet19"}, "must be one of lenet, resnet18, resnet34"),
    ):
        with pytest.raises(ValueError, match=told):
            setup.prepare(config_lib.changed(vision, keys))
    twice = config_lib.changed(small, {"model.width": 2.0})
    model = architectures.build(twice, (8, 8), 10, 2.0)
    assert [layer.kernel.shape for layer in model.layers] == [(64, 40), (40, 20), (20, 10)]


@pytest.mark.parametrize("method", ["snip", "synflow"])
def test_saliency_sees_into_residual_branches_that_start_closed(vision, method, monkeypatch):
    monkeypatch.setitem(resnet.DEPTHS, 18, ((1, 1, 1, 1), False))
    config = config_lib.changed(
        vision,
        {
            "model.name": "resnet18",
            "model.width": 1 / 16,
            "method.name": method,
            "method.distribution": {"name": "uniform"},
        },
    )
    run = setup.prepare(config)
    masks = rigl_optax.get_masks(run.initial.opt_state)
    found = [np.asarray(masks["stages"][i][0]["convs"][0]["kernel"]).ravel() for i in range(4)]
    assert all(mask.any() for mask in found)
    # Scores of 0 would be ties, and the first weights active.
    assert not any(mask[: mask.sum()].all() for mask in found if not mask.all())
    assert any(not mask.all() for mask in found)


# Whole runs


def test_a_run_learns_keeps_its_counts_and_is_resumed(vision, trained):
    result = trained[1]
    assert result["warnings"] == [] and np.isfinite(result["test"]["loss"])
    run, state = final(vision, trained[0])
    sparse = sparsity.distribution(vision)(run.initial.params)
    masks = dict(_paths.flatten_with_paths(rigl_optax.get_masks(state.opt_state)))
    for path, part in sparse.items():
        assert int(masks[path].sum()) == masks[path].size - int(part * masks[path].size)
    calls = [x for x in jax.tree.leaves(state.model_state) if x.dtype == jnp.int32]
    assert [int(x) for x in calls] == [vision.steps] * 3


def test_an_export_is_the_network_and_its_masks(vision, trained, tmp_path):
    run, state = final(vision, trained[0])
    path = tmp_path / "network.npz"
    export.write(path, run, state)
    found = export.read(path)
    with pytest.raises(ValueError, match=r"it unpacks to [\d,]+ bytes, more than max_bytes=9,000"):
        export.read(path, max_bytes=9000)
    assert config_lib.from_mapping(found.config) == vision
    masks = dict(_paths.flatten_with_paths(found.masks))
    assert masks.keys() == sparsity.distribution(vision)(state.params).keys()
    weights = dict(_paths.flatten_with_paths(found.params))
    for name, mask in masks.items():
        assert mask.dtype == bool and not weights[name][~mask].any()
    for tree, own in ((found.params, state.params), (found.model_state, state.model_state)):
        ours = {name: np.asarray(leaf) for name, leaf in _paths.flatten_with_paths(own)}
        theirs = dict(_paths.flatten_with_paths(tree))
        assert ours.keys() == theirs.keys()
        for name, leaf in ours.items():
            np.testing.assert_array_equal(leaf, theirs[name])
            assert leaf.dtype == theirs[name].dtype
    with np.load(path) as plain:
        np.testing.assert_array_equal(plain["params/stem/kernel"], weights["stem/kernel"])
    for content in (b"", b"PK\x03\x04 no zip", path.read_bytes()[:-40]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="not an export of a run"):
            export.read(path)
    np.savez(path, config=np.array({"a": 1}, dtype=object))
    with pytest.raises(ValueError, match="not an export of a run"):
        export.read(path)
    with pytest.raises(FileNotFoundError):
        export.read(tmp_path / "none.npz")


@pytest.mark.slow
def test_the_script_evaluates_and_exports(vision, trained, tmp_path):
    path = tmp_path / "out.npz"
    command = [sys.executable, "scripts/evaluate.py", f"--workdir={trained[0]}", f"--export={path}"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    assert f"accuracy {100 * trained[1]['test']['accuracy']:.2f} %" in done.stdout
    assert export.read(path).config["seed"] == vision.seed
    command[-1] = "--export=weights.pkl"
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "must end in .npz" in done.stderr


# Compilation


@pytest.fixture(scope="module", params=["resnet18", "mobilenet_v1"])
def accelerated(request, vision):
    """A run of a network of few blocks, and its compiled step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(resnet.DEPTHS, 18, ((1, 1, 1, 1), False))
        patch.setattr(mobilenet_v1, "BLOCKS", mobilenet_v1.BLOCKS[:3])
        config = config_lib.changed(
            vision,
            {
                "model.name": request.param,
                "model.width": 1 / 8,
                "method.every": 2,
                "method.distribution": {"name": "uniform"},
            },
        )
        run = setup.prepare(config)
        take = step.make_train_step(run)
        yield config, run, take


def test_a_step_moves_nothing_between_host_and_device_and_compiles_once(accelerated):
    config, run, take = accelerated
    device = jax.devices()[0]
    given = [jax.device_put(run.task.training_batch(config, i), device) for i in range(4)]
    state = jax.tree.map(lambda x: x.copy(), run.initial)._replace(history=None)
    for batch in given[:2]:
        state = take(state, batch)
    with jax.transfer_guard("disallow"):
        for batch in given[2:]:  # step 2 rewires
            state = take(state, batch)
        jax.block_until_ready(state)
    assert take._cache_size() == 1
    assert int(state.opt_state.rewirings) == 2 and np.isfinite(float(state.sums.loss))


def test_a_step_lowers_for_accelerators(accelerated):
    config, run, take = accelerated
    batch = run.placement.put(run.task.training_batch(config, 0))
    exported = jax.export.export(take, platforms=["tpu", "cuda"])(
        run.initial._replace(history=None), batch
    )
    assert exported.platforms == ("tpu", "cuda")
    assert "stablehlo.convolution" in exported.mlir_module()


@pytest.fixture(scope="module")
def after(vision):
    """Masks and values after three steps on a mesh."""

    @functools.cache
    def found(**mesh):
        config = config_lib.changed(
            vision, {"batch_size": 16, "optimizer.learning_rate": 1e-3, "method.every": 2, **mesh}
        )
        run = setup.prepare(config)
        take = step.make_train_step(run)
        state = jax.tree.map(lambda x: x.copy(), run.initial)._replace(history=None)
        rows = run.placement.rows(16)
        for i in range(3):
            state = take(state, run.placement.put(run.task.training_batch(config, i, rows)))
        masks = rigl_optax.get_masks(state.opt_state)
        return jax.device_get((masks, (state.params, state.model_state, state.sums.loss)))

    return found


@pytest.mark.slow
@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
@pytest.mark.parametrize("axes", ["auto", "explicit"])
def test_the_same_network_on_a_mesh(after, axes):
    """Batch statistics are those of the whole batch, wherever its parts are."""
    masks, values = after()
    other_masks, other = after(**{"mesh.data": 2, "mesh.params": 2, "mesh.axes": axes})
    for mine, theirs in zip(*map(jax.tree.leaves, (masks, other_masks)), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    for mine, theirs in zip(*map(jax.tree.leaves, (values, other)), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-4)


def test_bfloat16_computes_in_bfloat16_and_keeps_float32(vision):
    config = config_lib.changed(vision, {"model.dtype": "bfloat16", "method.name": "dense"})
    run = setup.prepare(config)
    floats = (run.initial.params, run.initial.model_state, run.initial.opt_state)
    kinds = {leaf.dtype.name for leaf in jax.tree.leaves(floats)}
    assert kinds == {"float32", "int32", "uint32"}
    take = step.make_train_step(run)
    batch = run.placement.put(run.task.training_batch(config, 0))
    text = str(jax.make_jaxpr(take)(run.initial._replace(history=None), batch))
    found = [line for line in text.splitlines() if "conv_general_dilated[" in line]
    assert found and all(":bf16" in line for line in found)


def test_evaluation_uses_running_statistics_and_counts_every_example(vision, trained):
    run, state = final(vision, trained[0])
    evaluate = evaluation.evaluator(run)
    found = evaluate(state, run.dataset.test)
    assert found["accuracy"] == trained[1]["test"]["accuracy"]
    model = nnx.merge(run.graphdef, state.params, state.model_state)
    model.eval()
    images, labels = run.dataset.test.images, run.dataset.test.labels
    logits = nnx.jit(lambda m, x: m(x))(model, jnp.asarray(images[:100], jnp.float32) / 16)
    some = evaluate(state, type(run.dataset.test)(images[:100], labels[:100]))
    assert some["accuracy"] == pytest.approx(float((logits.argmax(-1) == labels[:100]).mean()))
    plain = optax.softmax_cross_entropy_with_integer_labels(logits, labels[:100])
    assert some["loss"] == pytest.approx(float(plain.mean()), rel=1e-4)
