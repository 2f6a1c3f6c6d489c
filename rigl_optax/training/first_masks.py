"""Chooses masks and widths before a run: saliency, Small-Dense, first blocks."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import rigl_optax
from rigl_optax import _paths, condensed
from rigl_optax.training import losses, methods, sparsity, tasks
from rigl_optax.training.config import Config

PyTree = Any
# Logits are divided by it for GraSP, as its authors' code does: at a nearly uniform softmax the
# scores no longer depend on how confident the untrained network happens to be.
GRASP_TEMPERATURE = 200.0
MakeModel = Callable[[float], nnx.Module]  # from the width multiplier


def width(config: Config, make_model: MakeModel) -> float:
    """Returns the width multiplier; of `small_dense` that of a network as small as the sparse one.

    As in the paper's accounting, a sparse layer takes 4 bytes per active weight and a bit for each.
    With `config.method.mask_bits` 0 the masks take nothing: both have as many weights.
    """
    if not methods.find(config).narrow:
        return config.model.width

    def shapes(part: float) -> PyTree:
        model = nnx.eval_shape(lambda: make_model(part * config.model.width))
        return nnx.to_pure_dict(nnx.state(model, nnx.Param))

    full = shapes(1.0)
    layers = sparsity.distribution(config)
    sparsities, slices = layers(full), {each.path: each.slices for each in layers.layers(full)}
    target, bits = 0.0, methods.mask_bits(config)
    for path, leaf in _paths.flatten_with_paths(full):
        size, number = math.prod(leaf.shape), slices.get(path, 1)
        zeros = number * math.floor(sparsities.get(path, 0.0) * (size // number))
        target += 4 * (size - zeros) + (bits * size / 8 if path in sparsities else 0)
    return config.model.width * rigl_optax.small_dense_width(shapes, target)


def salient(config: Config, make_model: Callable[[], nnx.Module], task: tasks.Task) -> PyTree:
    """Returns masks by saliency on the first training batch of the run, at the initial weights.

    Raises:
      ValueError: If the score is not for such data.
    """
    kind = methods.find(config).start
    model, layers = make_model(), sparsity.distribution(config)
    if kind == "synflow":
        model.eval()  # running statistics at their start: normalisation is left out
    structure = sparsity.structures(config)
    graphdef = nnx.graphdef(model)
    params, model_state = map(nnx.to_pure_dict, nnx.state(model, nnx.Param, ...))

    def apply(params: PyTree, *inputs: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, _opened(params), model_state)(*inputs)

    if kind == "synflow":
        if not isinstance(task, tasks.Images):
            raise ValueError(
                f"config.method.name='synflow': not for {config.data.name}, but for images"
            )
        shape = (1, *task.image_shape)
        return rigl_optax.synflow_masks(params, layers, apply, shape, structure=structure)

    temperature = GRASP_TEMPERATURE if kind == "grasp" else 1.0

    def loss(params: PyTree, batch: dict[str, Any]) -> jax.Array:
        logits = apply(params, *task.inputs(batch)) / temperature
        return losses.cross_entropy(logits, batch["labels"], config.loss.label_smoothing).mean()

    first = jax.tree.map(jnp.asarray, task.training_batch(config, 0))
    score = rigl_optax.snip_masks if kind == "snip" else rigl_optax.grasp_masks
    return score(params, layers, loss, [first], structure=structure)


def stored(config: Config, params: PyTree) -> dict[str, tuple[float, rigl_optax.Block]]:
    """Returns the kernels to be stored as blocks: `{path: (sparsity, block)}`.

    Args:
      config: The run's, with `condensed`.
      params: Dense parameters, or their shapes.

    Raises:
      ValueError: If no layer is sparse, or one has no blocks, or some that do not divide it.
    """
    sparsities = sparsity.distribution(config)(params)
    if not any(sparsities.values()):
        raise ValueError(
            f"config.method.sparsity={config.method.sparsity}: must leave some layer sparse with "
            "config.method.condensed=True"
        )
    shapes = {path: tuple(leaf.shape) for path, leaf in _paths.flatten_with_paths(params)}
    structure = sparsity.structure_of_layers(config, shapes, sparsities)
    found = {}
    for path, part in sparsities.items():
        block = structure[path]
        if not part:
            continue  # all of it is there
        if not isinstance(block, rigl_optax.Block):
            raise ValueError(
                f"config.method.structure: must be blocks for {path!r} with "
                f"config.method.condensed=True, not {block}; give it some by its pattern in "
                "config.method.structure.layers, or keep it dense by config.model.dense_layers"
            )
        block.grid(shapes[path], path)
        found[path] = part, block
    return found


def blocks(
    config: Config, params: PyTree, masks: PyTree | None = None
) -> dict[str, condensed.BlockTopology]:
    """Draws the first blocks of condensed kernels: the same ones as the masks of a masked run.

    Args:
      config: The run's.
      params: Dense parameters, or their shapes.
      masks: A bool tree like params, from which the blocks are taken instead.

    Returns:
      `{path: topology}` of the kernels that are `stored` as blocks.
    """
    of, topologies = stored(config, params), {}
    given = dict(_paths.flatten_with_paths(masks))
    for position, (path, leaf) in enumerate(_paths.flatten_with_paths(params)):
        if path not in of:
            continue
        part, block = of[path]
        if masks is not None:
            with jax.ensure_compile_time_eval():  # the masks are not traced
                topologies[path] = condensed.BlockTopology.from_mask(given[path], block, path)
        else:
            topologies[path] = condensed.random_topology(
                leaf.shape, part, block, seed=config.seed, position=position
            )
    return topologies


def _opened(params: PyTree) -> PyTree:
    """Returns parameters with all scales of normalisation at 1.

    The last one of a residual branch starts at 0: no gradient comes through it, and all weights of
    the branch would have a score of 0.
    """
    named = _paths.flatten_with_paths(params)
    opened = [jnp.ones_like(x) if path.endswith("/scale") else x for path, x in named]
    return jax.tree.unflatten(jax.tree.structure(params), opened)
