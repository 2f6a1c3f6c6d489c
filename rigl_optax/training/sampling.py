"""Text from a trained language model, byte by byte or token by token."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from rigl_optax.training.setup import Run
from rigl_optax.training.state import TrainState
from rigl_optax.training.tasks import Bytes, Tokens, Windows


def sample(
    run: Run, state: TrainState, length: int, *, prompt: bytes, temperature: float, seed: int
) -> bytes:
    """Draws the bytes that a model of bytes goes on with after a prompt.

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
      ValueError: If the run is not of a text of bytes, or an argument makes no sense.
    """
    if isinstance(run.task, Tokens):
        raise ValueError(
            "only models over bytes write text: of others draw tokens, for a tokenizer to decode"
        )
    return bytes(
        sample_tokens(run, state, length, prompt=prompt, temperature=temperature, seed=seed)
    )


def sample_tokens(
    run: Run,
    state: TrainState,
    length: int,
    *,
    prompt: Sequence[int],
    temperature: float,
    seed: int,
) -> list[int]:
    """Draws the tokens that a model goes on with after a prompt; of bytes these are bytes.

    Args:
      run: Of a text.
      state: The trained state.
      length: Tokens to draw.
      prompt: What is read first; at least one token.
      temperature: As in `sample`.
      seed: As in `sample`.

    Returns:
      `length` tokens, without the prompt.

    Raises:
      ValueError: If the run is not of a text, the vocabulary does not have a token of the prompt,
        or an argument makes no sense.
    """
    if not isinstance(run.task, Bytes):
        raise ValueError("only a run on a text can be sampled")
    if length < 1 or not len(prompt) or temperature < 0:
        raise ValueError(
            f"length={length}, prompt={prompt!r}, temperature={temperature}: must be at least 1, "
            "one token, 0"
        )
    kernels = run.representation.kernels(state)
    key = jax.random.key(seed)
    model = _gpt(run, state) if isinstance(run.task, Windows) else None
    vocabulary = 256 if model is None else model.vocabulary
    if not 0 <= min(prompt) <= max(prompt) < vocabulary:
        raise ValueError(f"prompt={list(prompt)}: tokens are 0 to {vocabulary - 1}")
    if model is not None:
        window = jnp.asarray(list(prompt[-model.context :]), jnp.int32)
        drawn = draw_by_windows(
            run.graphdef,
            (kernels, state.model_state),
            jnp.zeros((1, model.context), jnp.int32).at[0, : len(window)].set(window),
            jnp.int32(len(window)),
            jax.random.split(key, length),
            temperature,
        )
    else:
        rest = run.task.at_rest(state.model_state, 1)
        read = jnp.asarray(list(prompt), jnp.uint8)[None]
        logits, rest = _read(run.graphdef, kernels, rest, read)
        drawn = _draw(run.graphdef, kernels, rest, logits[0, -1], key, length, temperature)
    return jax.device_get(drawn).tolist()


def _gpt(run: Run, state: TrainState) -> Any:
    return nnx.merge(run.graphdef, run.representation.kernels(state), state.model_state)


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
        token = _chosen(key, logits, temperature).astype(jnp.uint8)
        logits, rest = _read(graphdef, weights, rest, token[None, None])
        return (logits[0, -1], rest), token

    return jax.lax.scan(advance, (logits, rest), jax.random.split(key, length))[1]


@functools.partial(jax.jit, static_argnums=(0, 5))
def draw_by_windows(
    graphdef: nnx.GraphDef,
    variables: tuple[Any, Any],
    window_1xT: jax.Array,
    known: jax.Array,
    keys: jax.Array,
    temperature: float,
) -> jax.Array:
    """Draws a token for each key from a model that reads the last T tokens anew each time.

    `known` tokens of the window are those of the prompt. What comes after them does not matter: a
    position sees only those before it.
    """
    context = window_1xT.shape[1]

    def advance(before: tuple[jax.Array, jax.Array], key: jax.Array) -> tuple[Any, jax.Array]:
        window, known = before
        logits = nnx.merge(graphdef, *variables)(window)[0, known - 1]
        token = _chosen(key, logits, temperature).astype(window.dtype)
        is_full = known == context
        window = jnp.where(is_full, jnp.roll(window, -1, axis=1), window)
        window = window.at[0, jnp.where(is_full, context - 1, known)].set(token)
        return (window, jnp.minimum(known + 1, context)), token

    return jax.lax.scan(advance, (window_1xT, known), keys)[1]


def _chosen(key: jax.Array, logits: jax.Array, temperature: float) -> jax.Array:
    """The likeliest token at temperature 0, else one drawn from the distribution."""
    if temperature == 0:
        return jnp.argmax(logits)
    return jax.random.categorical(key, logits / temperature)
