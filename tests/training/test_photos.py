"""From photos and their labels in files to a trained sparse network."""

import io

import jax
import numpy as np
import pytest
from rich.console import Console

import rigl_optax
from benchmarks import real_photos
from benchmarks.tfds_writer import write
from rigl_optax.data import cifar10
from rigl_optax.models import mobilenet_v1
from rigl_optax.training import (
    checkpoints,
    evaluation,
    loop,
    metrics,
    setup,
    signals,
    step,
    tasks,
)
from rigl_optax.training import config as config_lib

pytestmark = pytest.mark.usefixtures("shared_programs")

TRAIN, TEST = 60, 14


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """A miniature ImageNet: real JPEG files, as TFDS keeps them."""
    data_dir = tmp_path_factory.mktemp("imagenet")
    photos = real_photos.jpegs(TRAIN + TEST, smallest=80, largest=160)
    splits = {"train": photos[:TRAIN], "validation": photos[TRAIN:]}
    write(data_dir, "imagenet2012", splits, real_photos.CLASSES, shards=3)
    return data_dir


@pytest.fixture(scope="module", autouse=True)
def shallow():
    """A MobileNet of five blocks: to compile them takes most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mobilenet_v1, "BLOCKS", mobilenet_v1.BLOCKS[:5])
        yield


@pytest.fixture(scope="module")
def config(small, imagenet):
    return config_lib.changed(
        small,
        {
            "data.name": "imagenet2012",
            "data.dir": str(imagenet),
            "data.image_size": 16,
            "data.augment": "resized_crop",
            "data.threads": 2,
            "model.name": "mobilenet_v1",
            "model.hidden": (),
            "model.width": 0.25,
            "method.every": 5,
            "steps": 20,
            "batch_size": 16,
            "optimizer.learning_rate": 0.05,
            "log.every": 5,
            "eval.every": 10,
            "eval.batch_size": 8,
            "checkpoint.every": 10,
        },
    )


def train(config, workdir):
    out = io.StringIO()
    result = loop.train(config, workdir, Console(file=out, width=200, highlight=False))
    return result, out.getvalue()


def ended(config, workdir):
    with checkpoints.read_checkpoints(workdir) as saved:
        return checkpoints.restore_newest(saved, setup.prepare(config).abstract, print)


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """An uninterrupted run: its workdir, result, what it printed."""
    workdir = tmp_path_factory.mktemp("finished")
    return workdir, *train(config, workdir)


@pytest.mark.slow
def test_a_network_of_the_paper_learns_from_jpeg_files(config, finished):
    workdir, result, printed = finished
    assert "rigl, mobilenet_v1 on imagenet2012: 20 steps" in printed and result["warnings"] == []
    losses = list(metrics.recorded(metrics.read(workdir / metrics.FILE), "train", "loss").values())
    assert losses[-1] < losses[0]
    run, state = setup.prepare(config), ended(config, workdir)
    masks = rigl_optax.get_masks(state.opt_state)
    starts = rigl_optax.get_masks(run.initial.opt_state)
    for mask, start, weight in zip(
        *map(jax.tree.leaves, (masks, starts, state.params)), strict=True
    ):
        assert mask.sum() == start.sum()
        assert not np.asarray(weight)[~np.asarray(mask)].any()
    assert sum(result["active_weights"].values()) < 0.4 * result["weights"]
    # Every test photo counts once, though the last batch is not full.
    assert run.dataset.test.examples == TEST and TEST % config.eval.batch_size
    assert result["test"]["accuracy"] * TEST == pytest.approx(
        round(result["test"]["accuracy"] * TEST), abs=1e-4
    )


@pytest.mark.slow
def test_a_run_stopped_and_started_again_ends_bit_for_bit_the_same(
    config, finished, tmp_path, monkeypatch
):
    real = tasks.Images.training_batch
    config = config_lib.changed(config, {"data.threads": 3})  # the batches are the same

    def stopping(self, config, step, rows=None):
        if step == 13:
            raise signals.StoppedError
        return real(self, config, step, rows)

    with monkeypatch.context() as patch:
        patch.setattr(tasks.Images, "training_batch", stopping)
        with pytest.raises(signals.StoppedError):
            train(config, tmp_path)
    again, printed = train(config, tmp_path)
    workdir, result, _ = finished
    assert "resumed at step 10 of 20" in printed
    for found, expected in zip(
        *map(jax.tree.leaves, (ended(config, tmp_path), ended(config, workdir))), strict=True
    ):
        np.testing.assert_array_equal(found, expected)
    assert again["test"] == result["test"]


@pytest.mark.slow
def test_damaged_photos_are_told_of_and_do_not_count(config, tmp_path):
    photos = real_photos.jpegs(TRAIN + TEST, smallest=80, largest=160)
    bad = [3, 40, TRAIN + 2]
    for i in bad:
        photos[i] = (photos[i][0][: len(photos[i][0]) // 2], photos[i][1])
    data_dir, workdir = tmp_path / "data", tmp_path / "run"
    splits = {"train": photos[:TRAIN], "validation": photos[TRAIN:]}
    write(data_dir, "imagenet2012", splits, real_photos.CLASSES, shards=3)
    config = config_lib.changed(config, {"data.dir": str(data_dir)})
    with pytest.raises(ValueError, match=r"record \d+ of .* cannot be read.*max_bad_records=0"):
        train(config, workdir)
    config = config_lib.changed(config, {"data.max_bad_records": 3})
    result, printed = train(config, workdir)
    (warning,) = result["warnings"]
    assert warning.startswith("3 records of the dataset could not be read and are left out")
    assert "warning: " in printed
    counted = result["test"]["accuracy"] * (TEST - 1)
    assert counted == pytest.approx(round(counted), abs=1e-4)


@pytest.mark.slow
def test_a_wide_resnet_learns_from_files_of_cifars_format(config, tmp_path, monkeypatch):
    monkeypatch.setattr(cifar10, "PER_FILE", 16)
    monkeypatch.setattr(cifar10, "VALIDATION", 10)
    images, labels = real_photos.small(6 * 16, 32)
    for i, name in enumerate([*cifar10.TRAIN, *cifar10.TEST]):
        planes = images[16 * i : 16 * i + 16].transpose(0, 3, 1, 2).reshape(16, -1)
        raw = np.concatenate([labels[16 * i : 16 * i + 16, None].astype(np.uint8), planes], 1)
        (tmp_path / name).write_bytes(raw.tobytes())
    config = config_lib.changed(
        config,
        {
            "data.name": "cifar10",
            "data.dir": str(tmp_path),
            "data.image_size": 0,
            "data.augment": "pad_crop",
            "model.name": "wide_resnet",
            "model.depth": 10,
            "model.width": 1.0,
        },
    )
    run = setup.prepare(config)
    take = step.make_train_step(run)
    state, losses = run.initial._replace(history=None), []
    for at in range(12):
        batch = run.task.training_batch(config, at)
        assert set(batch) == {"images", "labels", "mean", "deviation"}
        state = take(state, run.placement.put(batch))
        losses.append(float(state.sums.loss / state.sums.examples))
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    found = evaluation.evaluator(run)(state, run.dataset.test)
    assert np.isfinite(found["loss"]) and found["accuracy"] * 16 == round(found["accuracy"] * 16)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"data.image_size": 0}, "photos of imagenet2012 are of many sizes; give one, as 224"),
        ({"data.augment": "pad_crop"}, "for imagenet2012 it is none or resized_crop"),
        ({"batch_size": 60}, "batch_size=60: must be from 1 to 54"),
        ({"data.name": "cifar100"}, "must be one of digits.*cifar10, imagenet2012, image_folder"),
        ({"data.sequence_length": 3}, "images have none"),
    ],
)
def test_what_does_not_fit_photos_is_refused_before_anything_is_read(config, changes, problem):
    with pytest.raises(ValueError, match=problem):
        tasks.find(config_lib.changed(config, changes))


def test_a_dataset_that_is_not_there_fails_with_the_command(config, tmp_path):
    for dataset, command in (
        ("imagenet2012", "tfds build imagenet2012"),
        ("image_folder", "tar -xf"),
        ("cifar10", "tfds build cifar10"),
    ):
        changed = config_lib.changed(config, {"data.name": dataset, "data.dir": str(tmp_path)})
        with pytest.raises(FileNotFoundError, match=command):
            train(changed, tmp_path / "run")
    assert not (tmp_path / "run").exists()
