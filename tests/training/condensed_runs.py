"""Configs of condensed runs, one of each kind of model, and what compares them with masked ones."""

import io

import jax
import numpy as np
from rich.console import Console

from rigl_optax import _paths, condensed
from rigl_optax.models import mobilenet_v1
from rigl_optax.training import checkpoints, loop, representation, setup, step
from rigl_optax.training import config as config_lib
from tests.training.conftest import SMALL

LENET = config_lib.changed(
    SMALL,
    {
        "method.condensed": True,
        "method.structure": {
            "name": "unstructured",
            "layers": (
                ("layers/0", {"name": "block", "rows": 4, "cols": 4}),
                ("layers/1", {"name": "block", "rows": 4, "cols": 4, "pad": True}),
            ),
        },
        "model.dense_layers": "layers/2",
        "steps": 40,
    },
)
# On 8x8 digits, as small as they can be.
WIDE_RESNET = config_lib.changed(
    LENET,
    {
        "model.name": "wide_resnet",
        "model.depth": 10,
        "model.k": 1,
        "model.dropout": 0.1,
        "model.hidden": (),
        "model.width": 0.5,
        "data.augment": "pad_crop",
        "batch_size": 10,
        "steps": 11,
        "method.every": 4,
        "method.sparsity": 0.6,
        "optimizer.learning_rate": 0.05,
        "loss.label_smoothing": 0.1,
        "method.structure": {"name": "block", "rows": 4, "cols": 4},
        "model.dense_layers": "stem|classifier",
    },
)
MOBILENET = config_lib.changed(
    WIDE_RESNET,
    {
        "model.name": "mobilenet_v1",
        "model.width": 0.25,
        "data.augment": "none",
        "method.distribution": {"name": "uniform"},
        "method.structure": {
            "name": "unstructured",
            "layers": (
                ("pointwise", {"name": "block", "rows": 4, "cols": 8, "pool_by": "l2"}),
                ("classifier", {"name": "block", "rows": 4, "cols": 4, "pad": True}),
            ),
        },
        "model.dense_layers": "default",
    },
)
GRU = config_lib.changed(
    LENET,
    {
        "data.name": "topics",
        "model.name": "gru",
        "model.hidden": (24,),
        "model.embedding": 16,
        "model.readout": (16,),
        "model.fused": False,
        "model.dense_layers": "default",
        "data.sequence_length": 12,
        "batch_size": 8,
        "eval.batch_size": 64,
        "optimizer.name": "adam",
        "optimizer.learning_rate": 5e-3,
        "optimizer.schedule": "constant",
        "optimizer.gradient_clip": 10.0,
        "method.distribution": {"name": "uniform"},
        "method.sparsity": 0.5,
        "steps": 24,
        "method.every": 7,
        "method.structure": {"name": "block", "rows": 4, "cols": 8},
    },
)
GPT = config_lib.changed(
    GRU,
    {
        "model": {"name": "gpt", "embedding": 16, "depth": 1, "heads": 2},
        "optimizer.name": "adamw",
    },
)
KINDS = {
    "lenet": LENET,
    "lenet-set": config_lib.changed(LENET, {"method.name": "set"}),
    "lenet-static": config_lib.changed(LENET, {"method.name": "static"}),
    "wide_resnet": WIDE_RESNET,
    "mobilenet_v1": MOBILENET,
    "gru": GRU,
    "gpt": GPT,
    "gpt-parts": config_lib.changed(GPT, {"model.parts": 4}),
    "gru-fused": config_lib.changed(GRU, {"model.fused": True}),
    "lstm": config_lib.changed(
        GRU, {"model.name": "lstm", **{f"model.{k}": v for k, v in GRU.model.options.items()}}
    ),
}


def shorten(monkeypatch):
    """A MobileNet of three blocks: all that is compiled is compiled for each layer."""
    monkeypatch.setattr(mobilenet_v1, "BLOCKS", mobilenet_v1.BLOCKS[:3])


def masked(config):
    return config_lib.changed(config, {"method.condensed": False})


def train(config, workdir):
    out = io.StringIO()
    result = loop.train(config, workdir, Console(file=out, width=200, highlight=False))
    return result, out.getvalue()


def final(config, workdir):
    with checkpoints.read_checkpoints(workdir) as saved:
        return checkpoints.restore_newest(saved, setup.prepare(config).abstract, print)


def programs(run):
    """The compiled steps of a condensed run, by whether they rewire."""
    return {rewires: step.make_train_step(run, rewires=rewires) for rewires in (False, True)}


def advance(run, steps):
    """The state after so many steps, without the loop around them."""
    config, takes = run.config, programs(run)
    now = jax.tree.map(lambda x: x.copy(), run.initial)._replace(history=None)
    for at in range(steps):
        batch = run.placement.put(
            run.task.training_batch(config, at, run.placement.rows(config.batch_size))
        )
        now = takes[config.method.condensed and run.rewirings.happen_at(at)](now, batch)
    return now


def named(tree):
    return {path: np.asarray(leaf) for path, leaf in _paths.flatten_with_paths(tree)}


def of(found):
    """The representation of a state, to read it with."""
    if isinstance(found.opt_state, condensed.CondensedState):
        return representation.Condensed(choose=None)
    return representation.Masked(has_masks=True)


def masks_of(found):
    return named(of(found).weight_masks(found))


def dense_of(found):
    return named(of(found).dense(found))


def assert_same_masks(found, expected):
    found, expected = masks_of(found), masks_of(expected)
    assert found.keys() == expected.keys()
    for path, mask in expected.items():
        np.testing.assert_array_equal(found[path], mask, err_msg=path)


def assert_close(found, expected, **tolerance):
    """Weights and batch statistics, or what else the model remembers."""
    for read in (dense_of, lambda end: named(end.model_state)):
        theirs, ours = read(expected), read(found)
        assert ours.keys() == theirs.keys()
        for path, leaf in theirs.items():
            np.testing.assert_allclose(ours[path], leaf, **tolerance, err_msg=path)
