"""Before training: what will be sparse, and what it will cost."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from rich import box
from rich.table import Table

import rigl_optax
from rigl_optax import accounting
from rigl_optax.training import methods
from rigl_optax.training.config import Config
from rigl_optax.training.setup import Run
from rigl_optax.training.state import TrainState

PyTree = Any


class Layer(NamedTuple):
    """One parameter leaf: its name, shape, active weights, and why it is dense if it is."""

    path: str
    shape: tuple[int, ...]
    active: int
    why_dense: str

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


class Flops(NamedTuple):
    """FLOPs (multiplies plus adds) of the run, and of the dense run it is compared with.

    Attributes:
      inference: Of one forward pass of one example, with the masks.
      inference_dense: The same without masks.
      training: Of the whole run, by `rigl_optax.accounting.training_cost`.
      training_dense: Of dense training for as many steps.
    """

    inference: float
    inference_dense: float
    training: float
    training_dense: float


def layers(config: Config, state: TrainState) -> list[Layer]:
    """All parameter leaves in tree order, with their active weights counted."""
    active = active_weights(config, state)
    reasons: dict[str, str | None] = dict.fromkeys(active, f"method {config.method}")
    if methods.find(config).masked:
        explained = accounting.explain(
            state.params, methods.distribution(config), end=config.rewire_end
        )
        reasons = {layer.path: layer.dense_because for layer in explained.layers}
    return [
        Layer(path, leaf.shape, active[path], reasons[path] or "")
        for path, leaf in named_leaves(state.params)
    ]


def table(config: Config, found: list[Layer]) -> Table:
    """The layers as text: shape, sparsity, active weights, or dense and why."""
    title = f"{config.method}, {config.model} on {config.dataset}"
    grid = Table("layer", "shape", title=title, title_justify="left", box=box.SIMPLE)
    grid.add_column("sparsity", justify="right")
    grid.add_column("active", justify="right")
    grid.add_column("weights", justify="right")
    grid.add_column("")
    for layer in found:
        share = "dense" if layer.why_dense else f"{1 - layer.active / layer.size:.4f}"
        shape = " x ".join(map(str, layer.shape))
        counts = (f"{layer.active:,}", f"{layer.size:,}")
        grid.add_row(layer.path, shape, share, *counts, layer.why_dense)
    active, size = sum(x.active for x in found), sum(x.size for x in found)
    grid.add_section()
    grid.add_row("all", "", f"{1 - active / size:.4f}", f"{active:,}", f"{size:,}", "")
    return grid


def active_weights(config: Config, state: TrainState) -> dict[str, int]:
    """`{path: active weights}` for all leaves, dense ones in full; exact integers."""
    if not methods.find(config).masked:
        return {path: leaf.size for path, leaf in named_leaves(state.params)}
    counts = jax.device_get(_count(rigl_optax.get_masks(state.opt_state)))
    return {path: int(count) for path, count in named_leaves(counts)}


def flops(config: Config, run: Run) -> Flops:
    """What the run costs, counted from the model's jaxpr; nothing is computed."""
    method = methods.find(config)

    def forward(params: PyTree, image: jax.Array) -> jax.Array:
        model = nnx.merge(run.graphdef, params, run.initial.model_state)
        model.eval()
        return model(image)

    image = jax.ShapeDtypeStruct((1, *run.image_shape), jnp.float32)
    cost = accounting.count_flops(forward, run.initial.params, image)
    dense = float(cost.total)
    sparse = dense
    if method.masked:
        sparse = accounting.flops_of_masks(cost, rigl_optax.get_masks(run.initial.opt_state))
    training, training_dense = (
        accounting.training_cost(
            kind,
            dense,
            sparse,
            steps=config.steps,
            batch_size=config.batch_size,
            end=config.rewire_end,
            every=config.rewire_every,
        )
        for kind in (method.cost, "dense")
    )
    return Flops(sparse, dense, training, training_dense)


def named_leaves(tree: PyTree) -> list[tuple[str, Any]]:
    """`(path, leaf)` in tree order, paths as in the distributions: `layers/0/kernel`."""
    return [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


@jax.jit
def _count(masks: PyTree) -> PyTree:
    return jax.tree.map(lambda mask: jnp.sum(mask, dtype=jnp.int32), masks)
