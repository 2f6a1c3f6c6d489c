"""The masks of every recipe, rewired a few times, are those that were recorded.

Each recipe's own method, distribution, schedule and dense layers, on a network of its kind that is
as small as it can be. Weights, gradients and rates are few small fractions, which no optimizer
rounds: with sums of floats a mask may be another one on another kind of processor.

    python -m tests.training.test_recipe_masks      writes the record
"""

import hashlib
import json
import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rigl_optax
from rigl_optax import _paths
from rigl_optax.models import mobilenet_v1, mobilenet_v2, resnet
from rigl_optax.training import config as config_lib
from rigl_optax.training import setup, tasks

RECORD = pathlib.Path(__file__).with_suffix(".json")
RECIPES = sorted((pathlib.Path(__file__).parents[2] / "configs").glob("*.py"))
BRIEFLY = {
    "steps": 8,
    "method.every": 2,  # rewired at 0, 2, 4
    "batch_size": 8,
    "mesh.data": 1,
    "optimizer": {"name": "sgd", "learning_rate": 0.125, "momentum": 0.5, "schedule": "constant"},
}
BLOCKS = {"model.embedding": 16, "model.depth": 1, "model.heads": 2, "model.dtype": "float32"}
RECURRENT = {"model.hidden": (12,), "model.embedding": 8, "model.readout": (8,)}
SMALL = {
    "lenet": {"model.hidden": (20, 10)},
    "wide_resnet": {"model.depth": 10, "model.k": 1, "model.width": 0.25},
    "resnet50": {"model.width": 1 / 16},
    "mobilenet_v1": {"model.width": 0.25},
    "mobilenet_v2": {"model.width": 0.25},
    "vit": BLOCKS | {"model.patch": 8},
    "gpt": BLOCKS,
    "gru": RECURRENT,
}


def digest(path, patch):
    """A hash of all masks after the last step."""
    patch.setattr(resnet, "STAGES", (64, 128))
    patch.setitem(resnet.DEPTHS, 50, ((1, 1), True))
    patch.setattr(mobilenet_v1, "BLOCKS", ((64, 1), (128, 2)))
    patch.setattr(mobilenet_v2, "BLOCKS", mobilenet_v2.BLOCKS[:2])
    config = config_lib.from_mapping(runpy.run_path(str(path))["get_config"]().to_dict())
    config = config_lib.changed(config, BRIEFLY | SMALL[config.model.name])
    facts = tasks.Facts((config.data.image_size or 16,) * 2 + (3,), 10, 255.0)
    run = setup.outline(config, facts)

    def draw(step):
        of = np.random.default_rng(step)
        return jax.tree.map(
            lambda x: (of.integers(-64, 65, x.shape) / 64).astype(x.dtype), run.shapes
        )

    @jax.jit
    def rewired(params, grads):
        def take(carry, grads):
            params, state = carry
            updates, state = run.tx.update(grads, state, params)
            return (jax.tree.map(jnp.add, params, updates), state), None

        state = run.tx.init(params)
        start = rigl_optax.apply_masks(params, state), state
        return jax.lax.scan(take, start, grads)[0][1]

    grads = jax.tree.map(lambda *x: np.stack(x), *(draw(step) for step in range(6)))
    state = rewired(draw(100), grads)
    assert int(state.rewirings) == 3
    found = hashlib.sha256()
    for name, mask in _paths.flatten_with_paths(rigl_optax.get_masks(state)):
        found.update(name.encode() + np.packbits(np.asarray(mask)).tobytes())
    return found.hexdigest()[:16]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_masks_are_those_of_the_record(path, monkeypatch):
    assert digest(path, monkeypatch) == json.loads(RECORD.read_text())[path.stem]


def main():
    with pytest.MonkeyPatch.context() as patch:
        found = {path.stem: digest(path, patch) for path in RECIPES}
    RECORD.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
