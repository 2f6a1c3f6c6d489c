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


def test_a_small_dense_network_has_as_many_weights_where_masks_take_nothing(small):
    keys = {"method.name": "small_dense", "model.hidden": (300, 100), "method.sparsity": 0.95}
    config = config_lib.changed(small, keys | {"method.mask_bits": 0})
    sparse = setup.prepare(config_lib.changed(small, keys | {"method.name": "static"}))
    active = sum(checks.active_weights(sparse, sparse.initial).values())
    sizes = [leaf.size for leaf in jax.tree.leaves(setup.prepare(config).shapes)]
    assert 0.95 * active < sum(sizes) <= active
    for wrong in (-1, 33, "1", True):
        with pytest.raises(ValueError, match=r"config.method.mask_bits=.*from 0 to 32"):
            setup.prepare(config_lib.changed(config, {"method.mask_bits": wrong}))
    with pytest.raises(ValueError, match="config.method.mask_bits: there is no such key"):
        setup.prepare(config_lib.changed(small, {"method.mask_bits": 0}))


@pytest.mark.parametrize("mode", ["unit", "layer"])
def test_initial_weights_are_rescaled_to_the_inputs_that_are_left(small, mode):
    config = config_lib.changed(small, {"method.sparse_aware_init": mode})
    found, plain = setup.prepare(config).initial, setup.prepare(small).initial
    masks = rigl_optax.get_masks(plain.opt_state)
    jax.tree.map(np.testing.assert_array_equal, rigl_optax.get_masks(found.opt_state), masks)
    for layer in range(3):
        pair = [np.asarray(state.params["layers"][layer]["kernel"]) for state in (found, plain)]
        mask = np.asarray(masks["layers"][layer]["kernel"])
        inputs = mask.sum(0) if mode == "unit" else mask.sum() / mask.shape[1]
        factor = np.sqrt(mask.shape[0] / np.maximum(inputs, 1))
        np.testing.assert_allclose(pair[0], pair[1] * factor, rtol=1e-5)


def test_images_with_a_scaling_of_their_own_are_not_standardised(small):
    for name in ("cifar10", "imagenet2012", "tdavid"):
        config = config_lib.changed(small, {"data.name": name, "data.standardise": True})
        with pytest.raises(ValueError, match=f"config.data.standardise=True: .* for {name}"):
            tasks.check(config)
    facts = tasks.find(config_lib.changed(small, {"data.standardise": True})).facts
    assert 0.3 < facts.mean[0] < 0.31 and 0.37 < facts.deviation[0] < 0.38


@pytest.mark.parametrize("method", ["top_kast", "dnw", "str", "deepr"])
def test_weights_that_learn_while_inactive_are_not_rescaled(small, method):
    keys = {"method.name": method, "method.sparse_aware_init": "unit"}
    with pytest.raises(ValueError, match=r"config.method.sparse_aware_init: must be 'none'"):
        setup.prepare(config_lib.changed(small, keys))


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
