import importlib.util
import io
import pathlib

import jax
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

import rigl_optax
from rigl_optax.data import text
from rigl_optax.models import transformer
from rigl_optax.training import checkpoints, costs, loop, sampling, score, setup, tasks
from rigl_optax.training import config as config_lib
from tests.training.condensed_runs import GPT

ROOT = pathlib.Path(__file__).parents[2]


def recipe(name, **changes):
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return config_lib.changed(config_lib.from_mapping(module.get_config().to_dict()), changes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    config = config_lib.changed(
        GPT,
        {
            "method.condensed": False,
            "method.structure": {},
            "optimizer.name": "adamw_by_age",
            "mesh.data": 1,
        },
    )
    workdir = tmp_path_factory.mktemp("gpt")
    result = loop.train(config, workdir, Console(file=io.StringIO()))
    run = setup.prepare(config)
    with checkpoints.read_checkpoints(workdir) as saved:
        return config, result, run, checkpoints.restore_newest(saved, run.abstract, print)


def test_a_gpt_learns_bytes_in_windows_and_stays_sparse(trained):
    config, result, run, state = trained
    assert result["warnings"] == [] and result["curve"][-1]["loss"] < np.log(256)
    assert result["test"]["bits_per_byte"] == pytest.approx(result["test"]["loss"] / np.log(2))
    rigl_optax.check(state.params, state.opt_state)
    assert int(state.opt_state.rewirings) > 1
    explained = costs.explain(run)
    dense = {layer.path: layer.dense_because for layer in explained.layers if not layer.is_sparse}
    assert dense["embedding/embedding"] == "an embedding" and "head/kernel" in dense
    assert sum("no parameter takes part" in note for note in explained.notes) == 2


def test_its_text_goes_on_from_the_prompt_and_past_the_context(trained):
    _, _, run, state = trained
    draw = lambda **keys: sampling.sample(
        run, state, 20, **{"prompt": b"a prompt", "temperature": 0.0, "seed": 0} | keys
    )
    first = draw()
    assert len(first) == 20 and draw() == first and draw(temperature=1.0) != first
    # The model has a context of 12: only the end of a longer prompt is read.
    assert draw(prompt=b"something else a prompt of 12"[-12:]) == draw(
        prompt=b"something else a prompt of 12"
    )


def test_its_bytes_are_its_tokens(trained):
    _, _, run, state = trained
    settings = {"temperature": 1.0, "seed": 3}
    drawn = sampling.sample(run, state, 6, prompt=b"a prompt", **settings)
    assert sampling.sample_tokens(run, state, 6, prompt=list(b"a prompt"), **settings) == list(
        drawn
    )
    with pytest.raises(ValueError, match=r"prompt=\[97, 256\]: tokens are 0 to 255"):
        sampling.sample_tokens(run, state, 6, prompt=[97, 256], **settings)


def test_a_token_is_predicted_from_those_before_it(trained):
    _, _, run, state = trained
    model = nnx.merge(run.graphdef, run.representation.kernels(state), state.model_state)
    prompt = b"a prompt"
    logits = model(np.frombuffer(prompt, np.uint8)[None])[0, -1]
    assert sampling.sample(run, state, 1, prompt=prompt, temperature=0.0, seed=0)[0] == int(
        np.argmax(logits)
    )


def test_token_files_are_read_as_they_are(tmp_path):
    tokens = np.arange(400, dtype=np.uint16) * 3
    tokens.tofile(tmp_path / "train.bin")
    tokens[:100].tofile(tmp_path / "val.bin")
    found = text.token_files(str(tmp_path))
    assert found.train.tokens.dtype == np.uint16 and isinstance(found.train.tokens, np.memmap)
    assert [len(part.tokens) for part in found] == [400, 50, 50]
    config = config_lib.changed(
        GPT,
        {
            "data.name": "tokens",
            "data.dir": str(tmp_path),
            "model.vocabulary": 1_200,
            "method.condensed": False,
            "method.structure": {},
        },
    )
    task = tasks.find(config)
    assert set(task.units) == {"bits_per_token"} and task.score.label == "bits per token"
    assert score.of({"loss": 1.0, "bits_per_token": 1.4}) is task.score
    batch = task.training_batch(config, 0)
    np.testing.assert_array_equal(batch["labels"], batch["tokens"].astype(np.int32) + 3)
    assert batch["labels"].max() > 255
    run = setup.prepare(config)
    start, settings = run.initial, {"temperature": 1.0, "seed": 0}
    drawn = sampling.sample_tokens(run, start, 12, prompt=[1_199, 3], **settings)
    assert len(drawn) == 12 and 255 < max(drawn) < 1_200
    # Nor do those over few tokens, as of a set of characters.
    few = setup.prepare(config_lib.changed(config, {"model.vocabulary": 65}))
    for each in (run, few):
        with pytest.raises(ValueError, match="only models over bytes write text"):
            sampling.sample(each, start, 12, prompt=b"a", **settings)
    evaluated = list(text.evaluation_batches(found.validation, 4, 5))
    assert sum(batch["weights"].sum() for batch in evaluated) == 49
    (tmp_path / "val.bin").write_bytes(b"123")
    with pytest.raises(ValueError, match=r"val.bin: 3 bytes; must be 2 a token"):
        text.token_files(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="needs train.bin and val.bin"):
        text.token_files("")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model.hidden": (3,)}, "widths of its own, `embedding`, `depth` and `heads`"),
        ({"model.width_of_mlp": 3}, "config.model.width_of_mlp: .*for 'gpt' .*embedding, heads"),
        ({"data.name": "digits", "data.sequence_length": 0}, "models for digits are lenet"),
        ({"data.name": "tokens"}, "needs train.bin"),
        ({"mesh.axes": "explicit"}, "transformers are for 'auto' alone"),
        ({"data.augment": "pad_crop"}, "texts are for 'none' alone"),
    ],
)
def test_what_makes_no_sense_is_refused(changes, told):
    plain = {"method.condensed": False, "method.structure": {}}
    with pytest.raises((ValueError, FileNotFoundError), match=told):
        setup.prepare(config_lib.changed(GPT, plain | changes))


def test_recurrent_models_read_no_tokens(tmp_path):
    config = config_lib.changed(GPT, {"model": {"name": "gru", "hidden": (4,)}})
    config = config_lib.changed(config, {"data.name": "tokens", "data.dir": str(tmp_path)})
    with pytest.raises(ValueError, match="gru reads bytes; tokens are for gpt"):
        tasks.find(config)


def test_the_large_recipe_has_the_weights_of_its_name():
    config = recipe("text_gpt_124m")
    made = nnx.eval_shape(
        lambda: transformer.GPT(
            **config.model.options,
            context=config.data.sequence_length,
            rngs=nnx.Rngs(0),
        )
    )
    size = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(made, nnx.Param)))
    assert 123e6 < size < 125e6


def test_the_vit_recipe_trains_for_some_steps(tmp_path):
    config = recipe(
        "fashion_mnist_vit",
        **{
            "data.name": "digits",
            "model.embedding": 16,
            "model.depth": 1,
            "model.heads": 2,
            "steps": 8,
            "method.every": 3,
            "mesh.data": 1,
        },
    )
    result = loop.train(config, tmp_path, Console(file=io.StringIO()))
    assert np.isfinite(result["test"]["loss"]) and result["warnings"] == []


def test_blocks_of_a_scan_are_not_stored_one_by_one():
    with pytest.raises(
        ValueError, match=r"blocks/attention/out/kernel.* counts layers.*model.scan"
    ):
        setup.prepare(config_lib.changed(GPT, {"model.scan": True}))


def test_a_scan_is_made_as_small_as_its_blocks_would_be():
    plain = {"method.condensed": False, "method.structure": {}, "method.name": "small_dense"}
    sizes = []
    for scan in (False, True):
        changes = {"model.scan": scan, "model.depth": 3, "method.sparsity": 0.87}
        run = setup.outline(config_lib.changed(GPT, plain | changes), tasks.Facts())
        sizes.append(sum(leaf.size for leaf in jax.tree.leaves(run.shapes)))
    assert sizes[0] == sizes[1]
