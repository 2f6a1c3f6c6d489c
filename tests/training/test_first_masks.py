"""Where the first masks come from, and how wide a small dense network is."""

import jax
import numpy as np
import pytest
from flax import nnx

import rigl_optax
from rigl_optax import _paths
from rigl_optax.models import resnet
from rigl_optax.training import checks, first_masks, setup, sparsity, tasks
from rigl_optax.training import config as config_lib


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


def test_a_small_dense_network_takes_no_more_bytes(small):
    config = config_lib.changed(
        small, {"method.name": "small_dense", "model.hidden": (300, 100), "method.sparsity": 0.95}
    )
    sparse = setup.prepare(config_lib.changed(config, {"method.name": "static"}))
    sizes = [
        sum(leaf.size for leaf in jax.tree.leaves(setup.prepare(config).initial.params)),
        sum(checks.active_weights(sparse, sparse.initial).values()),
    ]
    kernels = 64 * 300 + 300 * 100 + 100 * 10
    biases = 410
    assert 0.9 * 4 * sizes[0] < 4 * sizes[1] + kernels / 8
    assert 4 * (sizes[0] - biases) <= 4 * sizes[1] + kernels / 8


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
