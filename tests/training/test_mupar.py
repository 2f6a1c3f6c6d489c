import jax
import numpy as np
import pytest

from rigl_optax import _paths
from rigl_optax.training import config as config_lib
from rigl_optax.training import mupar, setup
from tests.training.condensed_runs import GPT

MASKED = {"method.condensed": False, "method.structure": {}}


def prepared(**changes):
    return setup.prepare(config_lib.changed(GPT, {**MASKED, "mesh.data": 1, **changes}))


def factors(**changes):
    run = prepared(**{"optimizer.base_width": 4, **changes})
    return dict(_paths.flatten_with_paths(mupar.factors(run.config, run.shapes)))


def test_kernels_of_attention_and_mlp_are_scaled_and_nothing_else():
    found = factors(**{"method.name": "dense"})
    scaled = {path for path, factor in found.items() if factor != 1}
    assert scaled == {p for p in found if p.startswith("blocks/") and p.endswith("/kernel")}
    assert {found[path] for path in scaled} == {4 / 16}


@pytest.mark.parametrize(("method", "density"), [("rigl", 0.5), ("gmp", 1.0), ("granet", 0.5)])
def test_the_density_is_that_at_the_start(method, density):
    path = "blocks/0/mlp/up/kernel"
    changes = {"method.name": method, "method.sparsity": 0.5 if method == "rigl" else 0.75}
    assert factors(**changes)[path] == pytest.approx(4 / (16 * density), rel=0.02)


def test_a_smaller_network_is_scaled_by_its_own_width():
    narrow = prepared(**{"method.name": "small_dense", "optimizer.base_width": 4})
    found = dict(_paths.flatten_with_paths(mupar.factors(narrow.config, narrow.shapes)))
    width = narrow.shapes["norm"]["scale"].shape[0]
    assert width < 16 and found["blocks/0/mlp/up/kernel"] == 4 / width


@pytest.mark.parametrize("condensed", [False, True])
def test_initial_values_are_scaled_by_the_root_and_updates_by_the_factor(condensed):
    changes = {} if condensed else MASKED
    runs = [
        setup.prepare(
            config_lib.changed(
                GPT,
                changes | {"method.name": "static", "mesh.data": 1, "optimizer.base_width": base},
            )
        )
        for base in (0, 4)
    ]
    plain, scaled = (run.initial for run in runs)
    by_path = dict(_paths.flatten_with_paths(mupar.factors(runs[1].config, runs[1].shapes)))
    assert set(by_path.values()) != {1.0}
    params, grads = plain.params, jax.tree.map(np.ones_like, plain.params)
    moves = [jax.jit(run.tx.update)(grads, run.initial.opt_state, params)[0] for run in runs]
    leaves = zip(*map(_paths.flatten_with_paths, (params, scaled.params, *moves)), strict=True)
    for (path, w), (_, v), (_, u), (_, t) in leaves:
        np.testing.assert_allclose(v, w * by_path[path] ** 0.5, rtol=1e-6, err_msg=path)
        np.testing.assert_allclose(t, u * by_path[path], rtol=1e-5, err_msg=path)


def test_other_models_are_refused(small):
    config = config_lib.changed(small, {"optimizer.base_width": 64})
    with pytest.raises(ValueError, match=r"base_width=64: must be 0 for lenet; it is for gpt"):
        setup.prepare(config)
