"""Runs that begin with weights from elsewhere: their values, their first masks, their resume."""

import ast
import io
import pathlib
import re
import runpy
import shlex
import shutil

import jax
import numpy as np
import pytest
from rich.console import Console
from safetensors import numpy as safetensors

import rigl_optax
from rigl_optax import _paths
from rigl_optax.training import (
    checkpoints,
    checks,
    loading,
    loop,
    methods,
    setup,
    sparsity,
)
from rigl_optax.training import config as config_lib

BLOCKS = {"name": "block", "rows": 4, "cols": 2, "pad": True}


def named(tree):
    return {path: np.asarray(x) for path, x in _paths.flatten_with_paths(tree)}


def train(config, workdir):
    return loop.train(config, workdir, Console(file=io.StringIO(), width=120))


def changed(config, path, name, **keys):
    keys = {key.replace("__", "."): value for key, value in keys.items()}
    return config_lib.changed(config, {"method.name": name, "start.path": str(path), **keys})


@pytest.fixture(scope="module")
def dense(small, tmp_path_factory):
    """A dense run: its workdir, and its weights at the end."""
    workdir = tmp_path_factory.mktemp("dense")
    train(config_lib.changed(small, {"method.name": "dense"}), workdir)
    return workdir, named(loading.load(workdir)[1].params)


def first(config):
    run = setup.prepare(config)
    return run, run.initial


def by_hand(weights, sparse, zeros):
    """Masks of the largest weights of each layer, restated in NumPy."""
    masks = {}
    for path, w in weights.items():
        masks[path] = np.ones(w.shape, bool)
        if path in sparse:
            order = np.argsort(np.abs(w).reshape(-1), kind="stable")
            masks[path].reshape(-1)[order[: zeros(path, w)]] = False
    return masks


@pytest.mark.parametrize("name", ["static", "rigl", "set", "top_kast"])
def test_a_sparse_start_keeps_the_largest_weights(small, dense, name):
    workdir, weights = dense
    run, state = first(changed(small, workdir, name))
    sparse = sparsity.distribution(run.config)(run.shapes)
    expected = by_hand(weights, sparse, lambda p, w: int(np.floor(sparse[p] * w.size)))
    masks, found = named(rigl_optax.get_masks(state.opt_state)), named(state.params)
    for path, w in weights.items():
        np.testing.assert_array_equal(masks[path], expected[path], err_msg=path)
        np.testing.assert_array_equal(found[path], np.where(expected[path], w, 0), err_msg=path)


@pytest.mark.parametrize("name", ["dense", "gmp", "iht", "spdf"])
def test_a_dense_start_has_all_weights(small, dense, name):
    workdir, weights = dense
    _, state = first(changed(small, workdir, name))
    found = named(state.params)
    if name != "spdf":
        for path, w in weights.items():
            np.testing.assert_array_equal(found[path], w, err_msg=path)
    else:
        assert any((found[path] != w).any() for path, w in weights.items())


def test_granet_begins_with_the_largest_at_its_first_sparsity(small, dense):
    workdir, _ = dense
    run, state = first(changed(small, workdir, "granet"))
    random = setup.prepare(config_lib.changed(small, {"method.name": "granet"}))
    assert checks.active_weights(run, state) == checks.active_weights(random, random.initial)
    masks, weights = (named(x) for x in (rigl_optax.get_masks(state.opt_state), dense[1]))
    kernel = "layers/0/kernel"
    kept, gone = (np.abs(weights[kernel][m]) for m in (masks[kernel], ~masks[kernel]))
    assert gone.size and kept.min() >= gone.max()


def test_blocks_are_those_of_masks(small, dense):
    workdir, _ = dense
    keys = {"method__structure": BLOCKS}
    masked, condensed = (
        first(changed(small, workdir, "rigl", **keys, method__condensed=is_condensed))
        for is_condensed in (False, True)
    )
    a, b = (run.representation for run, _ in (masked, condensed))
    for one, other in (
        (a.weight_masks(masked[1]), b.weight_masks(condensed[1])),
        (a.dense(masked[1]), b.dense(condensed[1])),
    ):
        for (path, x), y in zip(named(one).items(), named(other).values(), strict=True):
            np.testing.assert_array_equal(x, y, err_msg=path)
    mask = named(a.weight_masks(masked[1]))["layers/0/kernel"]
    assert 0 < mask.sum() < mask.size


@pytest.mark.parametrize("axes", ["auto", "explicit"])
def test_on_several_devices_it_begins_the_same(small, dense, axes):
    keys = {"mesh__params": 2, "mesh__data": 1, "mesh__axes": axes}
    states = [first(changed(small, dense[0], "rigl", **mesh))[1] for mesh in ({}, keys)]
    for a, b in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert not states[1].params["layers"][0]["kernel"].sharding.is_fully_replicated


def test_every_method_begins_with_its_own_number_of_weights(small, dense):
    """As many as from random weights, whatever chooses them; SNIP at the weights that are read."""
    workdir, _ = dense
    for name in ("snip", "mest", "snfs", "deepr", "dnw"):
        config = config_lib.changed(small, {"method.name": name})
        random, trained = first(config), first(changed(config, workdir, name))
        assert checks.active_weights(*random) == checks.active_weights(*trained), name
        masks = (named(rigl_optax.get_masks(s.opt_state)) for _, s in (random, trained))
        first_layers = [m["layers/0/kernel"] for m in masks]
        assert (first_layers[0] != first_layers[1]).any(), name
    for name, method in methods.METHODS.items():
        if method.start != "ticket" and not method.narrow:
            config = changed(small, workdir, name)
            assert setup.prepare(config).abstract is not None


def test_a_sparse_run_goes_on_with_its_own_masks(small, tmp_path):
    sparse = tmp_path / "sparse"
    train(small, sparse)
    run, end = loading.load(sparse)
    _, state = first(changed(small, sparse, "static"))
    for a, b in ((run.representation.masks(end), rigl_optax.get_masks(state.opt_state)),):
        for (path, x), y in zip(named(a).items(), named(b).values(), strict=True):
            np.testing.assert_array_equal(x, y, err_msg=path)


def test_it_resumes_without_the_file_and_ends_the_same(small, dense, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(dense[0], source)
    config = changed(small, source, "rigl", checkpoint__keep=1)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = train(config, whole)
    shutil.copytree(whole, parts)
    with checkpoints.read_checkpoints(parts) as saved:
        steps = [c.step for c in saved.checkpoints]
    assert steps[0] == 0 and steps[-1] == config.steps
    shutil.rmtree(source)
    for left in (1, 0):  # as if killed before the last checkpoint, and before all but the first
        for step in steps[1:][left:] if left else steps[1:]:
            shutil.rmtree(parts / "checkpoints" / str(step), ignore_errors=True)
        found = train(config, parts)
        for key in ("test", "active_weights", "flops", "coverage", "warnings"):
            assert found[key] == expected[key], key
        states = [loading.load(folder)[1] for folder in (whole, parts)]
        for a, b in zip(*map(jax.tree.leaves, states), strict=True):
            np.testing.assert_array_equal(a, b)


def test_batch_statistics_come_with_the_weights(vision, trained_vision):
    run, state = first(changed(vision, trained_vision.workdir, "dense"))
    for tree, own in (
        (state.params, trained_vision.state.params),
        (state.model_state, trained_vision.state.model_state),
    ):
        for (path, x), y in zip(named(tree).items(), named(own).values(), strict=True):
            if "dropout" not in path:  # its calls begin anew
                np.testing.assert_array_equal(x, y, err_msg=path)


def test_names_and_layout_of_others(small, dense, tmp_path):
    """A file as PyTorch writes it, and a new head."""
    arrays = {
        re.sub(r"layers/(\d)/kernel", r"net.\1.weight", path).replace(
            "/", "."
        ): np.ascontiguousarray(w.T)
        for path, w in dense[1].items()
        if not path.startswith("layers/2")
    }
    path = tmp_path / "model.safetensors"
    safetensors.save_file(arrays, path)
    names = ((r"layers/(\d)/kernel", r"net.\1.weight"), (r"layers/(\d)/bias", r"layers.\1.bias"))
    keys = {"start.names": names, "start.keep": "layers/2", "start.layout": "pytorch"}
    config = config_lib.changed(changed(small, path, "dense"), keys)
    assert config_lib.from_mapping(config_lib.to_json(config)) == config
    assert config.start.keep == ("layers/2",)
    _, state = first(config)
    random = named(
        setup.prepare(config_lib.changed(small, {"method.name": "dense"})).initial.params
    )
    for name, x in named(state.params).items():
        own = random if name.startswith("layers/2") else dense[1]
        np.testing.assert_array_equal(x, own[name], err_msg=name)


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"start.path": "none"}, r"config.start.path='none': none: there is no file or folder"),
        (
            {"model.hidden": (21, 10)},
            r"config.start.path=.*: 3 of 6 parameters do not come from the weights: .*"
            r"'layers/0/kernel' has shape \(64, 20\), not \(64, 21\).*'layers/1/kernel'",
        ),
        ({"start.names": (("layer.*/kernel", "x"),)}, r"3 of 6 .* \('x'\) is not there"),
        ({"start.names": (("nothing", "x"),)}, r"names: 'nothing' match no parameter"),
        ({"start.keep": ("head",)}, r"keep: 'head' matches no parameter"),
        ({"start.step": 7}, r"step=7: must be newest, best .*which are \["),
    ],
)
def test_what_is_wrong_is_said_at_once(small, dense, keys, problem):
    config = config_lib.changed(changed(small, dense[0], "static"), keys)
    with pytest.raises((ValueError, FileNotFoundError), match=problem):
        _ = setup.prepare(config).initial


def test_wrong_keys_are_refused(small, tmp_path):
    for keys, problem in (
        ({"start.keep": ("a",)}, r"config.start.path='': must be given with the other keys"),
        ({"start.layout": "caffe"}, "must be one of flax, pytorch"),
        ({"start.names": "x"}, "must be pairs of a pattern and a value"),
        ({"start.names": (("a", 3),)}, "config.start.names=3: must be str"),
        ({"start.path": "a", "start.step": "nearest"}, "config.start.step='nearest': must be"),
        ({"start.path": "a", "start.step": -5}, "config.start.step=-5: must be"),
        ({"start.path": "a", "start.keep": ("(",)}, r"'\(' is no regular expression"),
        ({"start.layout": "pytorch"}, r"other keys of config.start: \{'layout': 'pytorch'\}$"),
        (
            {"start.path": "a", "method.sparse_aware_init": "unit"},
            "sparse_aware_init='unit': must be 'none' with config.start.path='a'",
        ),
    ):
        with pytest.raises(ValueError, match=problem):
            config_lib.changed(small, keys)
    path = tmp_path / "model.safetensors"
    safetensors.save_file({"a": np.ones(2)}, path)
    config = config_lib.changed(small, {"start.path": str(path), "start.step": "best"})
    with pytest.raises(ValueError, match="config.start.step='best': must be 'newest', for"):
        _ = setup.prepare(config).initial


ROOT = pathlib.Path(__file__).parents[2]


def launches():
    """The commands of docs/deploy.md that train, as dicts of their flags."""
    text = (ROOT / "docs" / "deploy.md").read_text().replace("\\\n", " ")
    found = re.findall(r"^rigl-optax train (\w+) (.*)$", text, re.MULTILINE)
    return [
        {"recipe": recipe, **dict(w.removeprefix("--").split("=", 1) for w in shlex.split(flags))}
        for recipe, flags in found
    ]


def value(text):
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def test_the_launches_of_the_page_run(tmp_path, monkeypatch):
    """In order, with fewer steps: each finds what the ones before it have left."""
    monkeypatch.chdir(tmp_path)
    fewer = {"steps": 6, "method.every": 2, "eval.every": 6, "model.hidden": (12, 10)}
    fewer["mesh.data"] = 1  # of the eight devices of the tests
    commands, ended = launches(), {}
    assert len(commands) == 5 and sum("config.start.path" in c for c in commands) == 3
    first = {"recipe": "digits_lenet", "workdir": "runs/digits"}
    for command in [first, *commands]:
        recipe = runpy.run_path(ROOT / "configs" / f"{command['recipe']}.py")
        keys = {k.removeprefix("config."): value(v) for k, v in command.items() if "." in k}
        config = config_lib.from_mapping(recipe["get_config"]().to_dict())
        result = train(config_lib.changed(config, keys | fewer), pathlib.Path(command["workdir"]))
        ended[command["workdir"]] = sum(result["active_weights"].values()) / result["weights"]
    assert ended["runs/fine_tuned"] == ended["runs/digits"] < 0.2
    assert ended["runs/sparse"] < 0.5 and ended["runs/sparse_then_dense"] == 1
    assert ended["runs/dense_then_pruned"] < 0.2 < ended["runs/dense"] == 1
