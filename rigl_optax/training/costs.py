"""What a run will be and cost: explained before its first step, and added up on the way."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

import rigl_optax
from rigl_optax import accounting
from rigl_optax.accounting import explanation
from rigl_optax.training import methods
from rigl_optax.training.config import Config
from rigl_optax.training.setup import Run

PyTree = Any


class Flops(NamedTuple):
    """FLOPs (multiplies plus adds) of a run, and of the dense run it is compared with.

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


def explain(config: Config, run: Run) -> accounting.Explanation | None:
    """What will be sparse, and what it saves; None for a method that `explain` does not know."""
    if config.method not in explanation.REWIRES:
        return None
    return accounting.explain(
        run.initial.params,
        methods.distribution(config),
        end=config.rewire_end,
        every=config.rewire_every,
        drop_fraction=config.drop_fraction,
        method=config.method,
        steps=config.steps,
        model=_forward(run),
        inputs=[_image(run)],
    )


def count(config: Config, run: Run) -> tuple[Flops, Callable[[int], float]]:
    """Counts FLOPs from the model's jaxpr; nothing is computed.

    Returns:
      Those of the whole run; and a function of the number of steps done to the training FLOPs
      spent by then, for curves against FLOPs.
    """
    method = methods.find(config)
    cost = accounting.count_flops(_forward(run), run.initial.params, _image(run))
    dense = float(cost.total)
    sparse = dense
    if method.masked:
        sparse = accounting.flops_of_masks(cost, rigl_optax.get_masks(run.initial.opt_state))
    spent, spent_dense = (
        accounting.cumulative_cost(
            kind,
            dense,
            sparse,
            batch_size=config.batch_size,
            end=config.rewire_end,
            every=config.rewire_every,
        )
        for kind in (method.cost, "dense")
    )
    return Flops(sparse, dense, spent(config.steps), spent_dense(config.steps)), spent


def _forward(run: Run) -> Callable[[PyTree, jax.Array], jax.Array]:
    def forward(params: PyTree, images: jax.Array) -> jax.Array:
        model = nnx.merge(run.graphdef, params, run.initial.model_state)
        model.eval()
        return model(images)

    return forward


def _image(run: Run) -> jax.ShapeDtypeStruct:
    """One example, as FLOPs are counted per example."""
    return jax.ShapeDtypeStruct((1, *run.image_shape), jnp.float32)
