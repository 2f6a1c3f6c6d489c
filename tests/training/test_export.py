import pathlib
import subprocess
import sys

import numpy as np
import pytest

from rigl_optax import _paths
from rigl_optax.training import config as config_lib
from rigl_optax.training import export, sparsity

ROOT = pathlib.Path(__file__).parents[2]


def test_an_export_is_the_network_and_its_masks(trained_vision, tmp_path):
    vision, _, _, run, state = trained_vision
    path = tmp_path / "network.safetensors"
    export.write(path, run, state)
    found = export.read(path)
    size = path.stat().st_size
    with pytest.raises(
        ValueError, match=rf"it unpacks to [\d,]+ bytes, more than max_bytes={size:,}"
    ):
        export.read(path, max_bytes=size)
    assert config_lib.from_mapping(found.config) == vision
    masks = dict(_paths.flatten_with_paths(found.masks))
    assert masks.keys() == sparsity.distribution(vision)(state.params).keys()
    weights = dict(_paths.flatten_with_paths(found.params))
    for name, mask in masks.items():
        assert mask.dtype == bool and not weights[name][~mask].any()
    for tree, own in ((found.params, state.params), (found.model_state, state.model_state)):
        ours = {name: np.asarray(leaf) for name, leaf in _paths.flatten_with_paths(own)}
        theirs = dict(_paths.flatten_with_paths(tree))
        assert ours.keys() == theirs.keys()
        for name, leaf in ours.items():
            np.testing.assert_array_equal(leaf, theirs[name])
            assert leaf.dtype == theirs[name].dtype


@pytest.mark.slow
def test_the_script_evaluates_and_exports(trained_vision, tmp_path):
    vision, workdir, result, *_ = trained_vision
    path = tmp_path / "out.safetensors"
    command = [sys.executable, "scripts/evaluate.py", f"--workdir={workdir}", f"--export={path}"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    assert f"accuracy {100 * result['test']['accuracy']:.2f} %" in done.stdout
    assert export.read(path).config["seed"] == vision.seed
    command[-1] = "--export=weights.pkl"
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "must end in .safetensors" in done.stderr
