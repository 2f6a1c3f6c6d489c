"""Makes a run from a config: data, model, optimizer, schedule and placement."""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from rigl_optax import _paths, condensed
from rigl_optax.models import layers
from rigl_optax.training import (
    checkpoints,
    first_masks,
    mesh,
    methods,
    mupar,
    sparsity,
    start,
    state,
    tasks,
)
from rigl_optax.training import config as config_lib
from rigl_optax.training.config import Config
from rigl_optax.training.representation import Condensed, Masked, Representation
from rigl_optax.training.rewirings import Rewirings

PyTree = Any
MakeModel = Callable[[], nnx.Module]


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """Everything that follows from a config; functions that work on a run take this.

    Making one reads no weights and computes none: only `initial` and `draw` do.

    Attributes:
      config: The config it follows from.
      method: The entry of its method in `methods.METHODS`.
      rewirings: When the masks change.
      representation: How sparse kernels are held.
      task: The data, on the host, and what is to be learned from them.
      graphdef: The model's static part.
      tx: The optimizer, wrapped by the method.
      placement: Where the state and the batches are.
      shapes: The dense parameters, as a tree of `jax.ShapeDtypeStruct`.
      abstract: The state, as a tree of `jax.ShapeDtypeStruct` with shardings.
      draw: Makes the state at step 0: from the seed, or from the weights of `config.start`, which
        only it reads.
    """

    config: Config
    method: methods.Method
    rewirings: Rewirings
    representation: Representation
    task: tasks.Task
    graphdef: nnx.GraphDef
    tx: optax.GradientTransformation | condensed.CondensedTransformation
    placement: mesh.Placement
    shapes: PyTree
    abstract: state.TrainState
    draw: Callable[[], state.TrainState]

    @functools.cached_property
    def initial(self) -> state.TrainState:
        """The state at step 0: made when it is first asked for, then kept."""
        return self.draw()

    @property
    def dataset(self) -> Any:
        """Three splits: `train`, `validation`, `test`; read when they are first asked for."""
        return self.task.dataset


def prepare(config: Config) -> Run:
    """Prepares a run for training: loads the data, and finds masks that other data or runs decide.

    What can be refused from the config alone is refused before anything is read, and what can be
    refused from shapes before anything is computed.

    Raises:
      ValueError: If the config names a dataset, model or method that does not exist; it lists
        those that do. If there are not the devices for its mesh.
      FileNotFoundError: If the dataset is not there.
    """
    mesh.placement(config)
    methods.build(config)
    tasks.check(config)
    _check_ticket(config)
    return _assembled(config, tasks.find(config), with_masks=True)


def outline(config: Config, facts: tasks.Facts) -> Run:
    """Prepares a run whose states are read from checkpoints: neither data nor weights are needed.

    Its `dataset` is loaded when it is first asked for. Where the first masks come from data or
    another run, `tx` has masks of its seed instead; `draw` makes the right ones.

    Args:
      config: Of the run.
      facts: Of its data.

    Raises:
      ValueError: As `prepare`.
    """
    tasks.check(config)
    return _assembled(config, tasks.find(config, facts), with_masks=False)


def _assembled(config: Config, task: tasks.Task, *, with_masks: bool) -> Run:
    placement = mesh.placement(config)

    def model_of(width: float) -> nnx.Module:
        return task.model(config, width)

    make_plain = functools.partial(model_of, first_masks.width(config, model_of))
    model = nnx.eval_shape(make_plain)
    shapes = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    _check_dense_layers(config, shapes)
    if config.method.condensed:
        _check_condensed(config, model, shapes)
    method = methods.find(config)
    factors = mupar.factors(config, shapes)
    make_model = functools.partial(mupar.initialised, make_plain, factors)
    unmasked = methods.build(config, factors=factors)
    rewirings = Rewirings.of(config, method, methods.plan_of(unmasked))
    representation: Representation = Masked(
        has_masks=method.masked, rescale=sparsity.rescaling(config)
    )
    if config.method.condensed:
        representation = Condensed(functools.partial(first_masks.blocks, config))

    def build(masks: PyTree | None) -> Any:
        return unmasked if masks is None else methods.build(config, masks, factors)

    def first(make_model: MakeModel, masks: PyTree | None = None) -> Callable[[], state.TrainState]:
        tx, held = unmasked, representation
        if config.method.condensed and masks is not None:
            held = Condensed(functools.partial(first_masks.blocks, config, masks=masks))
        else:
            tx = build(masks)
        return functools.partial(
            state.start, make_model, tx, representation=held, rewires=rewirings.happen
        )

    # Whatever the first masks are: shapes do not depend on them.
    abstract = placement.abstract(first(make_model))

    def chosen(make_model: MakeModel) -> PyTree | None:
        if method.start is None:
            return None
        if method.start == "ticket":
            return _ticket(config)
        return first_masks.salient(config, make_model, task)

    is_random = not config.start.path
    masks = functools.cache(functools.partial(chosen, make_model))

    @functools.cache
    def maker() -> Callable[[], state.TrainState]:
        return placement.maker(first(make_model, masks()))

    def draw() -> state.TrainState:
        if is_random:
            return maker()()
        weights = start.read(config, model)
        make = functools.partial(start.filled, make_model)
        masks = chosen(functools.partial(make, weights))
        if method.start is None:
            masks = start.largest(config, unmasked, make_model, weights)
        return placement.maker(lambda w: first(functools.partial(make, w), masks)(), weights)()

    has_own = with_masks and (is_random or method.start == "ticket")
    return Run(
        config=config,
        method=method,
        rewirings=rewirings,
        representation=representation,
        task=task,
        graphdef=nnx.graphdef(model),
        tx=build(masks()) if has_own else unmasked,
        placement=placement,
        shapes=shapes,
        abstract=abstract,
        draw=draw,
    )


def _check_dense_layers(config: Config, shapes: PyTree) -> None:
    """Refuses a pattern of dense layers that no kernel has."""
    pattern = config.model.dense_layers
    if pattern in ("default", "none", "nothing"):
        return
    kernels = [path for path, leaf in _paths.flatten_with_paths(shapes) if leaf.ndim >= 2]
    if not any(re.search(pattern, kernel) for kernel in kernels):
        raise ValueError(
            f"config.model.dense_layers={pattern!r}: must be 'default', 'none', 'nothing' or a "
            f"pattern of kernels, which are {_paths.listing(kernels)}"
        )


def _check_condensed(config: Config, model: nnx.Module, shapes: PyTree) -> None:
    """Refuses layers that cannot be stored as blocks, before anything is traced or made."""
    layers_of = sparsity.distribution(config)
    stacks = [path for path in layers_of(shapes) if path in layers_of.stacked_paths(shapes)]
    if stacks:
        raise ValueError(
            f"config.method.condensed=True: the first axis of {_paths.listing(stacks)} counts "
            "layers; kernels are stored as blocks one by one: leave out config.model.scan and "
            "config.method.distribution.stacked"
        )
    reasons = layers.refused(model, first_masks.stored(config, shapes))
    if reasons:
        raise ValueError(
            "config.method.condensed=True: these kernels cannot be stored as blocks: "
            + "; ".join(f"{path!r}, since {why}" for path, why in reasons.items())
            + f". Change the options of config.model={dict(config.model.options)} where that "
            f"helps, or keep them dense by config.model.dense_layers={config.model.dense_layers!r}"
        )


def _check_ticket(config: Config) -> None:
    """Refuses a workdir whose masks the method does not take, or that is not there."""
    name, ticket = config.method.name, config.method.ticket
    if methods.find(config).start != "ticket":
        if ticket:
            raise ValueError(f"config.method.ticket={ticket!r}: {name} takes none")
    elif not ticket or not (pathlib.Path(ticket) / checkpoints.CONFIG_FILE).exists():
        raise ValueError(
            f"config.method.ticket={ticket!r}: {name} starts from the masks of a finished run; "
            "give its workdir"
        )


def _ticket(config: Config) -> Any:
    """Reads the masks at the end of the run in `config.method.ticket`: a bool tree like params.

    Raises:
      ValueError: If that run has not finished.
    """
    from rigl_optax.training import loading  # which needs runs in turn

    _check_ticket(config)
    folder = pathlib.Path(config.method.ticket)
    found = config_lib.from_mapping(checkpoints.read_config(folder))
    # Of condensed weights, the only kind of mesh that they can be on.
    here = config_lib.Mesh() if found.method.condensed else config.mesh
    run = loading.read_run(folder, here)
    ended = loading.restore(run, folder) if (folder / "checkpoints").exists() else None
    if ended is None or int(ended.step) != found.steps:
        raise ValueError(
            f"config.method.ticket={config.method.ticket!r}: that run has not finished"
        )
    # They may be cut up over processes: each is to have them whole.
    masks = run.placement.compile(run.placement.gather)(run.representation.weight_masks(ended))
    return jax.tree.map(lambda mask: jnp.asarray(np.asarray(mask)), masks)
