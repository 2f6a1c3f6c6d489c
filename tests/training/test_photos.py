"""From photos and their labels in files to a trained sparse network."""

import dataclasses
import io

import jax
import numpy as np
import pytest
from rich.console import Console

import rigl_optax
from rigl_optax.training import checkpoints, evaluation, loop, metrics, setup
from tests.data import real_photos
from tests.data.tfds_writer import write

TRAIN, TEST = 60, 14


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """A miniature ImageNet: real JPEG files, as TFDS keeps them."""
    data_dir = tmp_path_factory.mktemp("imagenet")
    photos = real_photos.jpegs(TRAIN + TEST, smallest=80, largest=160)
    splits = {"train": photos[:TRAIN], "validation": photos[TRAIN:]}
    write(data_dir, "imagenet2012", splits, real_photos.CLASSES, shards=3)
    return data_dir


@pytest.fixture
def config(small, imagenet):
    return dataclasses.replace(
        small,
        dataset="imagenet2012",
        data_dir=str(imagenet),
        image_size=32,
        augment="resized_crop",
        loader_threads=2,
        model="mobilenet_v1",
        hidden=(),
        width=0.25,
        sparsity=0.8,
        rewire_every=5,
        steps=20,
        batch_size=16,
        learning_rate=0.05,
        log_every=5,
        eval_every=10,
        eval_batch_size=8,
        checkpoint_every=10,
    )


def train(config, workdir):
    out = io.StringIO()
    result = loop.train(config, workdir, Console(file=out, width=200, highlight=False))
    return result, out.getvalue()


def ended(config, workdir):
    with checkpoints.read_checkpoints(workdir) as saved:
        return checkpoints.restore_newest(saved, setup.prepare(config).initial, print)


def check_trained(config, workdir, result):
    """The loss fell, the masks are what was asked for, all of the test split was looked at."""
    losses = list(metrics.recorded(workdir, "train", "loss").values())
    assert losses[-1] < losses[0]
    run = setup.prepare(config)
    state = ended(config, workdir)
    masks = rigl_optax.get_masks(state.opt_state)
    for mask, start, weight in zip(
        jax.tree.leaves(masks),
        jax.tree.leaves(rigl_optax.get_masks(run.initial.opt_state)),
        jax.tree.leaves(state.params),
        strict=True,
    ):
        assert mask.sum() == start.sum()
        assert not np.asarray(weight)[~np.asarray(mask)].any()
    weights = sum(mask.size for mask in jax.tree.leaves(masks))
    assert sum(result["active_weights"].values()) < 0.4 * weights
    found = evaluation.evaluator(config, run)(state, run.dataset.test)
    assert found == result["test"] and np.isfinite(found["loss"])
    # Every test example counts once: the last batch is not full.
    assert run.dataset.test.examples % config.eval_batch_size
    assert round(found["accuracy"] * run.dataset.test.examples, 3) % 1 == 0


@pytest.mark.slow
@pytest.mark.parametrize("model", ["resnet50", "mobilenet_v1", "mobilenet_v2"])
def test_the_models_of_the_paper_learn_from_jpeg_files(model, config, tmp_path):
    config = dataclasses.replace(config, model=model)
    result, printed = train(config, tmp_path)
    check_trained(config, tmp_path, result)
    assert f"rigl, {model} on imagenet2012: 20 steps" in printed and result["warnings"] == []
