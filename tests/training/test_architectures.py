import jax.numpy as jnp
import pytest

import rigl_optax
from rigl_optax import _paths
from rigl_optax.models import resnet
from rigl_optax.training import architectures, costs, setup, sparsity
from rigl_optax.training import config as config_lib


def kernels_of(params):
    return {path for path, leaf in _paths.flatten_with_paths(params) if leaf.ndim >= 2}


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


def test_with_nothing_dense_all_arrays_are_sparse_but_exceptions(small):
    config = config_lib.changed(
        small,
        {
            "model.dense_layers": "nothing",
            "method": {"name": "static", "distribution": {"name": "uniform"}},
            "method.distribution.overrides": (("1/bias", 0.0),),
        },
    )
    run = setup.prepare(config)
    masks = rigl_optax.get_masks(run.initial.opt_state)
    inactive = {path for path, mask in _paths.flatten_with_paths(masks) if not bool(jnp.all(mask))}
    assert inactive == {
        path for path, _ in _paths.flatten_with_paths(run.initial.params) if path != "layers/1/bias"
    }


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
