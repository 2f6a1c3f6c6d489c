"""The recipes of transformers by the command, as small as they can be: nothing is downloaded."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rigl_optax
import rigl_optax_cli
from benchmarks import real_photos
from rigl_optax import _paths, training
from rigl_optax.training import metrics, setup, step
from rigl_optax_cli import command_line
from tests.training.test_parts import counted

ROOT = pathlib.Path(__file__).parents[2]
# Of ml_collections, which loads a config file in an old way.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
TINY = {
    "model.embedding": 16,
    "model.depth": 2,
    "model.heads": 4,
    "model.dtype": "float32",
    "batch_size": 4,
    "steps": 7,
    "method.sparsity": 0.8,
    "method.every": 2,
    "method.until": 1.0,
    "eval.batch_size": 16,
    "log.every": 3,
    "mesh.data": 1,
}
TEXT = {"data.sequence_length": 8, "model.vocabulary": 256}


def flags_of(changes):
    return [f"--config.{key}={value}" for key, value in changes.items()]


def command(*words):
    """Runs `rigl-optax` in this process."""
    assert rigl_optax_cli.main([*map(str, words)]) == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Text, token files and photos."""
    root = tmp_path_factory.mktemp("data")
    for part in ("text", "tokens"):
        (root / part).mkdir()
    words = np.random.default_rng(0).choice(["the ", "lord ", "is ", "my ", "shepherd. "], 400)
    text = "".join(words).encode()
    (root / "text" / "a.txt").write_bytes(text)
    for name, part in (("train", text[:1500]), ("val", text[1500:])):
        np.frombuffer(part, np.uint8).astype(np.uint16).tofile(root / "tokens" / f"{name}.bin")
    for i, (image, label) in enumerate(real_photos.jpegs(28, smallest=40, largest=60)):
        path = root / "photos" / ("val" if i >= 20 else "train") / f"class{label}" / f"{i}.jpeg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)
    return root


def argv_of(recipe, folder, **changes):
    places = {"text": "text", "tokens": "tokens", "image_folder": "photos"}
    name = changes.get("data.name")
    where = {"data.dir": folder / places[name]} if name in places else {}
    return [f"--config={ROOT / 'configs' / recipe}.py", *flags_of(TINY | where | changes)]


ONE_BLOCK = {"model.depth": 1, "model.heads": 2, "method.every": 3, "steps": 5}
RUNS = {
    "tdavid_gpt": {"data.name": "text", **TEXT, "model.scan": True},
    "text_gpt_124m-text": {"data.name": "text", **TEXT, **ONE_BLOCK},
    "text_gpt_124m-tokens": {"data.name": "tokens", **TEXT, **ONE_BLOCK},
    "imagenet_vit_s16": {
        "data.name": "image_folder",
        "data.image_size": 8,
        "data.threads": 2,
        "model.patch": 4,
        "model.scan": True,
        "model.dtype": "bfloat16",
    },
}


@pytest.fixture(scope="module", params=RUNS)
def trained(request, folder, tmp_path_factory):
    """A recipe, its flags and the workdir of its run."""
    name = request.param
    workdir, argv = tmp_path_factory.mktemp(name), argv_of(name.split("-")[0], folder, **RUNS[name])
    command("train", *argv, f"--workdir={workdir}", "--num_processes=1")
    return name, argv, workdir


def test_a_recipe_trains_and_is_healthy(trained):
    name, _, workdir = trained
    result, explained = (
        json.loads((workdir / f"{file}.json").read_text()) for file in ("result", "explanation")
    )
    assert np.isfinite(result["test"]["loss"])
    # In networks as small as this, units and heads die.
    assert all("inputs and are const" in w or "pass nothing" in w for w in result["warnings"])
    # Of a stack a path is one row, too.
    assert result["active_weights"] == {x["path"]: x["active"] for x in explained["layers"]}
    _, state = training.load(workdir)
    rigl_optax.check(state.params, state.opt_state)
    masks = dict(_paths.flatten_with_paths(rigl_optax.get_masks(state.opt_state)))
    options = TINY | RUNS[name]
    check_health(
        workdir,
        {path: np.asarray(m) for path, m in masks.items() if "/kernel" in path and m.ndim > 1},
        options["model.depth"],
        options["model.heads"],
        scanned=options.get("model.scan", False),
        rotary=name == "tdavid_gpt",
    )


@pytest.mark.parametrize("trained", ["tdavid_gpt"], indirect=True)
def test_the_other_commands_go_on_from_there(trained, tmp_path, capsys):
    _, argv, workdir = trained
    result = json.loads((workdir / "result.json").read_text())
    where, exported = f"--workdir={workdir}", tmp_path / "network.safetensors"
    command("explain", *argv, "--json")
    active = {x["path"]: x["active"] for x in json.loads(capsys.readouterr().out)["layers"]}
    assert active == result["active_weights"]
    command("evaluate", where, f"--export={exported}")
    assert f"loss {result['test']['loss']:.4f}" in capsys.readouterr().out
    masks = dict(_paths.flatten_with_paths(rigl_optax.export.read(exported).masks))
    assert len(masks) == 4 and {path: int(m.sum()) for path, m in masks.items()} == {
        path: result["active_weights"][path] for path in masks
    }
    command("sample", where, "--length=9", "--temperature=0")
    assert len(capsys.readouterr().out) >= 9
    command("report", where)
    page = (workdir / "report.html").read_text()
    for text in ("averaging heads", "blocks/attention/1", 'id="dead-units"', "blocks/mlp/1"):
        assert text in page


def check_health(workdir, masks, depth, heads, *, scanned, rotary):
    """The last rewiring, after which the masks stayed, against NumPy's counts."""
    records = metrics.read(workdir / metrics.FILE)
    last = [record for record in records if record["kind"] == "rewiring"][-1]
    for i in range(depth):
        at = "blocks/" if scanned else f"blocks/{i}/"
        block = {
            path.removeprefix(at): mask[i] if scanned else mask
            for path, mask in masks.items()
            if path.startswith(at)
        }
        named = (lambda path, i=i: f"blocks/{path}/{i}") if scanned else at.__add__
        found = [last[f"{name}/{named(part)}"] for name, part in MEASURES.items()]
        assert found == list(counted(block, "", heads, rotary))
        for path, mask in block.items():
            assert last[f"dead_outputs/{named(path)}"] == (~mask.any(0)).sum()
            assert last[f"dead_inputs/{named(path)}"] == (~mask.any(1)).sum()


MEASURES = {"dead_heads": "attention", "averaging_heads": "attention", "dead_units": "mlp"}


@pytest.mark.parametrize(
    "method", ["rigl", "set", "static", "gmp", "granet", "top_kast", "dense", "small_dense"]
)
def test_a_method_is_one_word(method, folder):
    argv = argv_of("tdavid_gpt", folder, **{"data.name": "text"}, **TEXT, **ONE_BLOCK)
    config = parsed([*argv, f"--config.method.name={method}"])
    run = setup.prepare(config)
    batch = run.placement.put(run.task.training_batch(config, 0))
    before = run.abstract._replace(history=None)
    after = jax.eval_shape(step.make_train_step(run), before, batch)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, before)
    sizes = {path: leaf.size for path, leaf in _paths.flatten_with_paths(run.shapes)}
    assert (sum(sizes.values()) < DENSE_SIZE) == (method == "small_dense")


DENSE_SIZE = 256 * 16 * 2 + 4 * 16**2 + 8 * 16**2 + 3 * 16


def parsed(argv):
    """The config of flags, as the commands read it."""
    return command_line.checked(command_line.parse(argv, with_recipe=True))
