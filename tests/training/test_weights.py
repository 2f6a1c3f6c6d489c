"""Weights from workdirs, Orbax checkpoints and safetensors files, by their names."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as orbax
import pytest
from orbax.checkpoint import v1 as ocp
from safetensors import numpy as safetensors

import rigl_optax
from rigl_optax import _paths, training
from rigl_optax.training import export

TREE = {"params": {"kernel": jnp.arange(6.0).reshape(2, 3)}, "step": jnp.int32(3)}


def test_a_workdir_and_its_export_give_the_same(trained_vision, tmp_path):
    _, workdir, _, run, state = trained_vision
    weights = training.read_weights(workdir)
    params = rigl_optax.start_from(run.shapes, weights)
    for (path, x), (_, own) in zip(
        *map(_paths.flatten_with_paths, (params, state.params)), strict=True
    ):
        np.testing.assert_array_equal(x, own, err_msg=path)
    statistics = rigl_optax.start_from(state.model_state, weights)
    assert jax.tree.structure(statistics) == jax.tree.structure(state.model_state)
    path = tmp_path / "network.safetensors"
    export.write(path, run, state)
    again = training.read_weights(path)
    assert again.keys() == weights.keys()
    for name, x in weights.items():
        np.testing.assert_array_equal(again[name], x)


def test_orbax_checkpoints_of_all_formats(tmp_path, settled):
    with orbax.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "standard", TREE)
    ocp.save(tmp_path / "new", TREE)
    with orbax.CheckpointManager(tmp_path / "manager") as manager:
        manager.save(5, args=orbax.args.StandardSave(TREE))
        manager.wait_until_finished()
    for place in ("standard", "new", "manager/5"):
        found = training.read_weights(str(tmp_path / place))
        assert found.keys() == {"params/kernel", "step"}
        params = {"kernel": jnp.zeros((2, 3))}
        params = rigl_optax.start_from(params, found, names={"(.*)": r"params/\1"})
        np.testing.assert_array_equal(params["kernel"], TREE["params"]["kernel"])


def test_a_file_of_others_has_its_own_names(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.save_file({"0.weight": np.ones((3, 2), np.float32)}, path)
    found = training.read_weights(path)
    assert list(found) == ["0.weight"] and found["0.weight"].shape == (3, 2)


def test_what_is_no_checkpoint_is_refused_in_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file or folder of weights"):
        training.read_weights(tmp_path / "none")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00not json")
    with pytest.raises(ValueError, match="not a safetensors file"):
        training.read_weights(broken)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="neither a workdir, an Orbax checkpoint nor a"):
        training.read_weights(tmp_path / "folder")
