"""A GPT of two blocks on the bytes of the Treasury of David, for studies of many short runs."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import rigl_optax
from rigl_optax.data import text
from rigl_optax.models import transformer

PyTree = Any
WIDTH, DEPTH, HEADS, CONTEXT, BATCH = 64, 2, 2, 128, 8
DENSE = rigl_optax.DenseLayers(transformer.dense_layers("erk"))


@functools.cache
def data() -> text.Text:
    """Loads the bytes."""
    return text.treasury_of_david()


def windows(tokens: np.ndarray, rng: np.random.Generator, size: int) -> jax.Array:
    """Draws `size` windows of the bytes, one byte longer than the context."""
    starts = rng.integers(0, len(tokens) - CONTEXT, size)
    return jnp.asarray(tokens[starts[:, None] + np.arange(CONTEXT + 1)], jnp.int32)


@functools.cache
def validation(size: int) -> jax.Array:
    """Returns the same windows of the validation bytes at each call."""
    return windows(data().validation.tokens, np.random.default_rng(0), size)


def initial(seed: int) -> tuple[PyTree, Callable[[PyTree, jax.Array], jax.Array]]:
    """Returns fresh parameters, and `loss(params, windows)` in bits per byte."""
    model = transformer.GPT(
        embedding=WIDTH, depth=DEPTH, heads=HEADS, context=CONTEXT, rngs=nnx.Rngs(seed)
    )
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params: PyTree, tokens_BxT: jax.Array) -> jax.Array:
        logits = nnx.merge(graphdef, params, rest)(tokens_BxT[:, :-1])
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, tokens_BxT[:, 1:])
        return nats.mean() / jnp.log(2.0)

    return nnx.to_pure_dict(params), loss


def rate(step: jax.Array, steps: int) -> jax.Array:
    """Returns the part of the learning rate at a step: a rise over 5 %, then a cosine to 0."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, steps // 20, steps)
    return jnp.asarray(schedule(step))
