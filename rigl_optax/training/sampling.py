"""Text from a trained language model, byte by byte."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from rigl_optax.training.setup import Run
from rigl_optax.training.state import TrainState
from rigl_optax.training.tasks import Bytes


def sample(
    run: Run, state: TrainState, length: int, *, prompt: bytes, temperature: float, seed: int
) -> bytes:
    """Draws the bytes that the model goes on with after a prompt.

    Args:
      run: Of a text.
      state: The trained state.
      length: Bytes to draw.
      prompt: What is read first; at least one byte.
      temperature: Logits are divided by it; 0 takes the likeliest byte each time.
      seed: Of the draws.

    Returns:
      `length` bytes, without the prompt.

    Raises:
      ValueError: If the run is not of a text, or an argument makes no sense.
    """
    if not isinstance(run.task, Bytes):
        raise ValueError("only a run on a text can be sampled")
    if length < 1 or not prompt or temperature < 0:
        raise ValueError(
            f"length={length}, prompt={prompt!r}, temperature={temperature}: must be at least 1, "
            "one byte, 0"
        )
    rest = run.task.at_rest(state.model_state, 1)
    read = jnp.frombuffer(prompt, jnp.uint8)[None]
    kernels = run.representation.kernels(state)
    logits, rest = _read(run.graphdef, kernels, rest, read)
    key = jax.random.key(seed)
    drawn = _draw(run.graphdef, kernels, rest, logits[0, -1], key, length, temperature)
    return bytes(jax.device_get(drawn).tolist())


@functools.partial(jax.jit, static_argnums=0)
def _read(
    graphdef: nnx.GraphDef, weights: Any, rest: Any, tokens: jax.Array
) -> tuple[jax.Array, Any]:
    model = nnx.merge(graphdef, weights, rest)
    logits = model(tokens, jnp.zeros(tokens.shape, bool))
    return logits, nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.Param)))


@functools.partial(jax.jit, static_argnums=(0, 5, 6))
def _draw(
    graphdef: nnx.GraphDef,
    weights: Any,
    rest: Any,
    logits: jax.Array,
    key: jax.Array,
    length: int,
    temperature: float,
) -> jax.Array:
    def advance(before: tuple[jax.Array, Any], key: jax.Array) -> tuple[Any, jax.Array]:
        logits, rest = before
        if temperature == 0:
            token = jnp.argmax(logits).astype(jnp.uint8)
        else:
            token = jax.random.categorical(key, logits / temperature).astype(jnp.uint8)
        logits, rest = _read(graphdef, weights, rest, token[None, None])
        return (logits[0, -1], rest), token

    return jax.lax.scan(advance, (logits, rest), jax.random.split(key, length))[1]
