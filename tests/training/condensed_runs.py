"""Configs of condensed runs, one of each kind of model, and what compares them with masked ones."""

import dataclasses
import io

import jax
import numpy as np
from rich.console import Console

from rigl_optax import _paths, condensed
from rigl_optax.models import mobilenet_v1
from rigl_optax.training import checkpoints, loop, methods, setup, state, step
from tests.training.conftest import SMALL

LENET = dataclasses.replace(
    SMALL,
    condensed=True,
    structure="{'layers/0': Block(4, 4), 'layers/1': Block(4, 4, pad=True)}",  # the last ones: 4x2
    dense_layers="layers/2",
    steps=40,
)
# On 8x8 digits, as small as they can be.
WIDE_RESNET = dataclasses.replace(
    LENET,
    model="wide_resnet",
    model_options="depth=10,k=1,dropout=0.1",
    hidden=(),
    width=0.5,
    augment="pad_crop",
    batch_size=10,
    steps=11,
    rewire_every=4,
    sparsity=0.6,
    learning_rate=0.05,
    label_smoothing=0.1,
    structure="Block(4, 4)",
    dense_layers="stem|classifier",
)
MOBILENET = dataclasses.replace(
    WIDE_RESNET,
    model="mobilenet_v1",
    model_options="",
    width=0.25,
    augment="none",
    distribution="uniform",
    structure="{'pointwise': Block(4, 8, pool_by='l2'), 'classifier': Block(4, 4, pad=True)}",
    dense_layers="default",
)
GRU = dataclasses.replace(
    LENET,
    dataset="topics",
    model="gru",
    hidden=(24,),
    model_options="embedding=16,readout=(16,),fused=False",
    dense_layers="default",
    sequence_length=12,
    batch_size=8,
    eval_batch_size=64,
    optimizer="adam",
    learning_rate=5e-3,
    schedule="constant",
    gradient_clip=10.0,
    distribution="uniform",
    sparsity=0.5,
    steps=24,
    rewire_every=7,
    structure="Block(4, 8)",
)
KINDS = {
    "lenet": LENET,
    "lenet-set": dataclasses.replace(LENET, method="set"),
    "lenet-static": dataclasses.replace(LENET, method="static"),
    "wide_resnet": WIDE_RESNET,
    "mobilenet_v1": MOBILENET,
    "gru": GRU,
    "gru-fused": dataclasses.replace(GRU, model_options="embedding=16,readout=(16,)"),
    "lstm": dataclasses.replace(GRU, model="lstm"),
}


def shorten(monkeypatch):
    """A MobileNet of three blocks: all that is compiled is compiled for each layer."""
    monkeypatch.setattr(mobilenet_v1, "BLOCKS", mobilenet_v1.BLOCKS[:3])


def masked(config):
    return dataclasses.replace(config, condensed=False)


def train(config, workdir):
    out = io.StringIO()
    result = loop.train(config, workdir, Console(file=out, width=200, highlight=False))
    return result, out.getvalue()


def final(config, workdir):
    with checkpoints.read_checkpoints(workdir) as saved:
        return checkpoints.restore_newest(saved, setup.prepare(config).initial, print)


def programs(config, run, **keys):
    """The compiled steps of a condensed run, by whether they rewire."""
    growth = methods.growth_predicate(config)
    return {
        rewires: step.make_train_step(run, growth, config.log_every, rewires=rewires, **keys)
        for rewires in (False, True)
    }


def advance(config, run, steps):
    """The state after so many steps, without the loop around them."""
    takes = programs(config, run)
    now = jax.tree.map(lambda x: x.copy(), run.initial)._replace(history=None)
    for at in range(steps):
        batch = run.placement.put(
            run.task.training_batch(config, at, run.placement.rows(config.batch_size))
        )
        now = takes[config.condensed and methods.is_rewiring(config, at)](now, batch)
    return now


def named(tree):
    return {path: np.asarray(leaf) for path, leaf in _paths.flatten_with_paths(tree)}


def masks_of(found):
    return named(state.weight_masks(found))


def dense_of(found):
    return named(condensed.densify(found.params, state.topologies(found)))


def assert_same_masks(found, expected):
    found, expected = masks_of(found), masks_of(expected)
    assert found.keys() == expected.keys()
    for path, mask in expected.items():
        np.testing.assert_array_equal(found[path], mask, err_msg=path)


def assert_close(found, expected, **tolerance):
    """Weights and batch statistics, or what else the model remembers."""
    for of in (dense_of, lambda end: named(end.model_state)):
        theirs, ours = of(expected), of(found)
        assert ours.keys() == theirs.keys()
        for path, leaf in theirs.items():
            np.testing.assert_allclose(ours[path], leaf, **tolerance, err_msg=path)
