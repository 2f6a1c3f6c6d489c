"""From a config to what a run is made of: data, model, optimizer, state."""

import functools
import pathlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from rigl_optax import _paths, condensed
from rigl_optax.models import layers
from rigl_optax.training import checkpoints, first_masks, mesh, methods, state, tasks
from rigl_optax.training import config as config_lib
from rigl_optax.training.config import Config

PyTree = Any


class Run(NamedTuple):
    """What a run is made of.

    Attributes:
      task: The data, on the host, and what is to be learned from them.
      graphdef: The model's static part.
      tx: The optimizer, with the method around it.
      initial: The state at step 0.
      placement: Where the state and the batches are.
      shapes: Of the dense parameters, a tree of `jax.ShapeDtypeStruct`.
      draw: Makes the state at step 0 once more.
    """

    task: tasks.Task
    graphdef: nnx.GraphDef
    tx: optax.GradientTransformation | condensed.CondensedTransformation
    initial: state.TrainState
    placement: mesh.Placement
    shapes: PyTree
    draw: Callable[[], state.TrainState]

    @property
    def dataset(self) -> Any:
        """Of three splits: `train`, `validation`, `test`."""
        return self.task.dataset


def prepare(config: Config) -> Run:
    """Loads the data and draws initial weights and masks from the config's seed.

    Raises:
      ValueError: If the config names a dataset, model or method that does not exist; it lists
        those that do. If there are not the devices for its mesh.
      FileNotFoundError: If the dataset is not there.
    """
    placement = mesh.placement(config)
    methods.build(config)  # refuses what is wrong before any data is read
    task = tasks.find(config)

    def model_of(width: float) -> nnx.Module:
        return task.model(config, width)

    make_model = functools.partial(model_of, first_masks.width(config, model_of))
    abstract = nnx.eval_shape(make_model)
    shapes = nnx.to_pure_dict(nnx.state(abstract, nnx.Param))
    _check_dense_layers(config, shapes)
    if config.method.condensed:
        _check_condensed(config, abstract, shapes)
    method = methods.find(config)
    masks = None
    if method.start == "ticket":
        masks = _ticket(config)
    elif config.method.ticket:
        raise ValueError(
            f"config.method.ticket={config.method.ticket!r}: {config.method.name} takes none"
        )
    elif method.start is not None:
        masks = first_masks.salient(config, make_model, task)
    tx = methods.build(config, masks)
    create = functools.partial(
        state.create,
        make_model,
        tx,
        placement,
        masked=method.masked,
        rewires=methods.rewires(config),
        choose=functools.partial(first_masks.blocks, config) if config.method.condensed else None,
    )
    graphdef, initial = create()
    return Run(task, graphdef, tx, initial, placement, shapes, lambda: create()[1])


def _check_dense_layers(config: Config, shapes: PyTree) -> None:
    """Refuses a pattern of dense layers that no kernel has."""
    pattern = config.model.dense_layers
    if pattern in ("default", "none"):
        return
    kernels = [path for path, leaf in _paths.flatten_with_paths(shapes) if leaf.ndim >= 2]
    if not any(re.search(pattern, kernel) for kernel in kernels):
        raise ValueError(
            f"config.model.dense_layers={pattern!r}: must be 'default', 'none' or a pattern of "
            f"kernels, which are {_paths.listing(kernels)}"
        )


def _check_condensed(config: Config, model: nnx.Module, shapes: PyTree) -> None:
    """Refuses layers that cannot be stored as blocks, before anything is traced or made."""
    reasons = layers.refused(model, first_masks.stored(config, shapes))
    if reasons:
        raise ValueError(
            "config.method.condensed=True: these kernels cannot be stored as blocks: "
            + "; ".join(f"{path!r}, since {why}" for path, why in reasons.items())
            + f". Change the options of config.model={dict(config.model.options)} where that "
            f"helps, or keep them dense by config.model.dense_layers={config.model.dense_layers!r}"
        )


def _ticket(config: Config) -> Any:
    """The masks at the end of the run in `config.method.ticket`: a bool tree like params.

    Raises:
      ValueError: If there is no finished run.
    """
    folder = pathlib.Path(config.method.ticket)
    if not config.method.ticket or not (folder / checkpoints.CONFIG_FILE).exists():
        raise ValueError(
            f"config.method.ticket={config.method.ticket!r}: {config.method.name} starts from the "
            "masks of a finished run; give its workdir"
        )
    found = config_lib.from_mapping(checkpoints.read_config(folder))
    # Of condensed weights, the only kind of mesh that they can be on.
    here = config_lib.Mesh() if found.method.condensed else config.mesh
    run = prepare(config_lib.changed(found, {"mesh": config_lib.to_json(here)}))
    with checkpoints.read_checkpoints(folder) as saved:
        ended = checkpoints.restore_newest(saved, run.initial, print, found)
    if ended is None or int(ended.step) != found.steps:
        raise ValueError(
            f"config.method.ticket={config.method.ticket!r}: that run has not finished"
        )
    # They may be cut up over processes: each is to have them whole.
    masks = run.placement.compile(run.placement.gather)(state.weight_masks(ended))
    return jax.tree.map(lambda mask: jnp.asarray(np.asarray(mask)), masks)
