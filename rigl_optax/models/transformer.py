"""Transformers: GPT over bytes or tokens, and ViT over images, with the same pre-norm blocks.

Suffixes of names are shapes: B batch, T time or patches, D width, H heads, K width of a head, F
width of the MLP, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rigl_optax.export import Units, Wires
from rigl_optax.models import attention, layers
from rigl_optax.models.parts import by_parts, recomputed

Mlp = Literal["gelu", "swiglu"]
Positions = Literal["rotary", "learned"]
STACKED = r"^blocks/"  # with `scan=True`: the first axis of these parameters counts the blocks
_INIT = 0.02  # standard deviation of kernels and embeddings, as in GPT-2


def dense_layers(distribution: str) -> dict[str, str]:
    """Returns patterns of the kernels that stay dense, and why.

    Embeddings, positions and class tokens are no kernels: they stay dense by their names.
    """
    del distribution
    return {
        r"^patches/kernel": "the patch embedding, the first layer",
        r"^head/kernel": "the last layer",
    }


class Linear(layers.Linear):
    """A linear map of all positions as one matrix.

    The gradient of the kernel then sums over one axis: over two, batch and time, XLA's backend for
    CPUs takes twice as long.
    """

    def __call__(self, x: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Maps [..., in_features] to [..., out_features]."""
        y = super().__call__(x.reshape(-1, x.shape[-1]), out_sharding)
        return y.reshape(*x.shape[:-1], y.shape[-1])


class Attention(nnx.Module):
    """Multi-head self-attention with one fused kernel for queries, keys and values.

    `qkv/kernel` is (width, 3 * width), columns in the order query, key, value, each head by head;
    `out/kernel` is (width, width), rows head by head. Biases are left out, as in Llama.

    Args:
      width: Width D of the residual stream; a multiple of `heads`.
      heads: Number of heads.
      is_causal: Whether a position sees only those before it.
      rotary: Whether queries and keys are rotated by their position.
      init: Standard deviation of `out/kernel` at first; that of `qkv/kernel` is 0.02.
      dtype: Of the computation; float32 if not given.
      rngs: Random keys (stream `params`).
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        is_causal: bool,
        rotary: bool,
        init: float,
        dtype: Any,
        rngs: nnx.Rngs,
    ) -> None:
        self.heads, self.is_causal, self.rotary = heads, is_causal, rotary
        self.head_width = width // heads
        self.qkv = _linear(width, 3 * width, _INIT, dtype, rngs)
        self.out = _linear(width, width, init, dtype, rngs)

    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        """Maps (batch, time, width) to the same shape."""
        batch, time, _ = x_BxTxD.shape
        q_BxTxHxK, k_BxTxHxK, v_BxTxHxK = (
            x.reshape(batch, time, self.heads, self.head_width)
            for x in jnp.split(self.qkv(x_BxTxD), 3, axis=-1)
        )
        if self.rotary:
            q_BxTxHxK, k_BxTxHxK = rotate(q_BxTxHxK), rotate(k_BxTxHxK)
        mixed_BxTxHxK = attention.attend(q_BxTxHxK, k_BxTxHxK, v_BxTxHxK, is_causal=self.is_causal)
        return self.out(mixed_BxTxHxK.reshape(batch, time, self.heads * self.head_width))

    def units(self, walk: Units, x: Wires) -> Wires:
        """Describes itself to `export.compact`; a unit is a head."""
        return walk.layer(walk.heads(x, "qkv", self.heads), "out")


class FeedForward(nnx.Module):
    """The MLP of a block: GELU between two kernels, or SwiGLU with a third one that gates.

    Args:
      width: Width D of the residual stream.
      hidden: Width F of the hidden layer.
      kind: `gelu` or `swiglu`.
      init: Standard deviation of `down/kernel` at first; that of the others is 0.02.
      dtype: Of the computation; float32 if not given.
      rngs: Random keys (stream `params`).
    """

    def __init__(
        self, width: int, hidden: int, kind: Mlp, *, init: float, dtype: Any, rngs: nnx.Rngs
    ) -> None:
        self.up = _linear(width, hidden, _INIT, dtype, rngs)
        self.gate = _linear(width, hidden, _INIT, dtype, rngs) if kind == "swiglu" else None
        self.down = _linear(hidden, width, init, dtype, rngs)

    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        """Maps (batch, time, width) to the same shape."""
        up_BxTxF = self.up(x_BxTxD)
        if self.gate is None:
            return self.down(nnx.gelu(up_BxTxF))
        return self.down(nnx.silu(self.gate(x_BxTxD)) * up_BxTxF)

    def units(self, walk: Units, x: Wires) -> Wires:
        """Describes itself to `export.compact`; without biases the only constant is 0."""
        up = walk.layer(x, "up")
        if self.gate is None:
            return walk.layer(walk.map(up, _zero_or_varying), "down")
        gate = walk.map(walk.layer(x, "gate"), _zero_or_varying)
        return walk.layer(walk.multiply(gate, up), "down")


class Block(nnx.Module):
    """Attention and an MLP, each after normalisation and added to the residual stream.

    Args:
      width: Width D of the residual stream.
      heads: Number of heads.
      hidden: Width F of the MLP.
      mlp: `gelu` or `swiglu`.
      is_causal: Whether a position sees only those before it.
      rotary: Whether queries and keys are rotated by their position.
      depth: Number of blocks of the network, by which kernels that write to the residual stream
        are scaled down at first: 0.02 / sqrt(2 * depth).
      dtype: Of the computation; float32 if not given.
      rngs: Random keys (stream `params`).
    """

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        mlp: Mlp,
        *,
        is_causal: bool,
        rotary: bool,
        depth: int,
        dtype: Any,
        rngs: nnx.Rngs,
    ) -> None:
        init = _INIT / math.sqrt(2 * depth)
        self.norm1 = _norm(width, dtype, rngs)
        self.attention = Attention(
            width, heads, is_causal=is_causal, rotary=rotary, init=init, dtype=dtype, rngs=rngs
        )
        self.norm2 = _norm(width, dtype, rngs)
        self.mlp = FeedForward(width, hidden, mlp, init=init, dtype=dtype, rngs=rngs)

    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        """Maps (batch, time, width) to the same shape."""
        x_BxTxD = x_BxTxD + self.attention(self.norm1(x_BxTxD))
        return x_BxTxD + self.mlp(self.norm2(x_BxTxD))

    def units(self, walk: Units, x: Wires) -> None:
        """Describes itself to `export.compact`; `x` stays, as it is normalised as a whole."""
        walk.add(x, self.attention.units(walk.inside("attention"), x))
        walk.add(x, self.mlp.units(walk.inside("mlp"), x))


class GPT(nnx.Module):
    """A causal language model: embedding, pre-norm blocks, normalisation, logits.

    By default (`dense_layers`) the embedding, the head and the normalisation are dense, and all
    kernels of attention and MLP are sparse.

    Args:
      width: Multiplies `embedding`, to the nearest multiple of twice the heads.
      embedding: Width of the residual stream; a multiple of twice the heads.
      depth: Number of blocks.
      heads: Number of heads.
      vocabulary: Number of symbols: 256 for bytes.
      context: The longest sequence; needed for learned positions, a limit for rotary ones.
      mlp: `gelu` or `swiglu`.
      hidden: Width of the MLP; 0 for 4 times the width (`gelu`), or 8/3 of it, rounded up to a
        multiple of 32 (`swiglu`).
      positions: `rotary`, or a `learned` embedding.
      tied: Whether the logits are products with the embedding.
      scan: Whether the blocks are one loop (`nnx.scan`) over parameters with a leading axis of
        blocks: compiled once whatever the depth. A distribution then needs `stacked=(STACKED,)`.
      parts: Number of parts of a batch that each block takes in turn; the backward pass computes
        their activations again. It saves memory, and often time on a CPU; 1 for none.
      dtype: Of the computation; float32 if not given. Parameters are float32.
      rngs: Random keys (stream `params`).

    Raises:
      ValueError: If a number is below 1, twice the heads do not divide `embedding`, or a name
        does not exist.

    Examples:
      >>> from flax import nnx
      >>> import jax.numpy as jnp
      >>> model = GPT(embedding=32, depth=2, heads=4, rngs=nnx.Rngs(0))
      >>> model(jnp.zeros((2, 10), jnp.uint8)).shape
      (2, 10, 256)

    References:
      Radford et al., "Language models are unsupervised multitask learners", 2019 (GPT-2); Su et
      al., [RoFormer](https://arxiv.org/abs/2104.09864), 2021 (rotary positions); Shazeer, [GLU
      variants improve transformer](https://arxiv.org/abs/2002.05202), 2020.
    """

    def __init__(
        self,
        width: float = 1.0,
        *,
        embedding: int = 256,
        depth: int = 4,
        heads: int = 4,
        vocabulary: int = 256,
        context: int = 1_024,
        mlp: Mlp = "gelu",
        hidden: int = 0,
        positions: Positions = "rotary",
        tied: bool = False,
        scan: bool = False,
        parts: int = 1,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ) -> None:
        embedding = scaled(embedding, width, heads)
        hidden = _checked(embedding, depth, heads, hidden, mlp, parts)
        if min(vocabulary, context) < 1:
            raise ValueError(f"vocabulary={vocabulary}, context={context}: must be at least 1")
        if positions not in get_args(Positions):
            raise ValueError(
                f"positions={positions!r}: must be one of {', '.join(get_args(Positions))}"
            )
        self.context, self.tied, self.vocabulary = context, tied, vocabulary
        self.parts = parts
        embed = nnx.initializers.normal(_INIT)
        self.embedding = nnx.Embed(
            vocabulary, embedding, embedding_init=embed, dtype=dtype, rngs=rngs
        )
        learned = positions == "learned"
        self.positions = (
            nnx.Param(embed(rngs.params(), (context, embedding), jnp.float32)) if learned else None
        )
        self.blocks = _blocks(
            lambda: Block(
                embedding,
                heads,
                hidden,
                mlp,
                is_causal=True,
                rotary=not learned,
                depth=depth,
                dtype=dtype,
                rngs=rngs,
            ),
            depth,
            scan,
        )
        self.norm = _norm(embedding, dtype, rngs)
        self.head = None if tied else _linear(embedding, vocabulary, _INIT, dtype, rngs)

    def __call__(self, tokens_BxT: jax.Array) -> jax.Array:
        """Returns float32 logits (batch, time, vocabulary) of the token after each token.

        Args:
          tokens_BxT: Integers from 0 to vocabulary - 1, at most `context` of them.

        Raises:
          ValueError: If the sequence is longer than `context`.
        """
        time = tokens_BxT.shape[1]
        if time > self.context:
            raise ValueError(f"{time} tokens: the model has a context of {self.context}")
        x_BxTxD = self.embedding(tokens_BxT.astype(jnp.int32))
        if self.positions is not None:
            x_BxTxD = x_BxTxD + self.positions[:time].astype(x_BxTxD.dtype)
        x_BxTxD = self.norm(_through(self.blocks, x_BxTxD, self.parts))
        logits_BxTxV = self.embedding.attend(x_BxTxD) if self.head is None else self.head(x_BxTxD)
        return logits_BxTxV.astype(jnp.float32)

    def units(self, walk: Units) -> None:
        """Describes itself to `export.compact`: hidden units of the MLPs, and heads."""
        _follow(walk, self.blocks, self.embedding.embedding.shape[1])


class ViT(nnx.Module):
    """A vision transformer: patches, pre-norm blocks, normalisation, a linear head.

    By default (`dense_layers`) the patch embedding, positions, class token and head are dense, and
    all kernels of attention and MLP are sparse.

    Args:
      image_shape: (height, width) or (height, width, channels) of an image.
      classes: Number of logits.
      width: Multiplies `embedding`, to the nearest multiple of twice the heads.
      patch: Pixels a side of a patch; divides height and width.
      embedding: Width of the residual stream; a multiple of twice the heads.
      depth: Number of blocks.
      heads: Number of heads.
      mlp: `gelu` or `swiglu`.
      pooled: Whether the head reads the mean of all patches; else a class token.
      scan: As in `GPT`.
      parts: As in `GPT`.
      dtype: Of the computation; float32 if not given. Parameters are float32.
      rngs: Random keys (stream `params`).

    Raises:
      ValueError: If `patch` does not divide the image, or as in `GPT`.

    Examples:
      >>> from flax import nnx
      >>> import jax.numpy as jnp
      >>> model = ViT((28, 28), 10, patch=7, embedding=32, depth=2, heads=4, rngs=nnx.Rngs(0))
      >>> model(jnp.zeros((8, 28, 28))).shape
      (8, 10)

    References:
      Dosovitskiy et al., [An image is worth 16x16 words](https://arxiv.org/abs/2010.11929), 2021.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        classes: int,
        width: float = 1.0,
        *,
        patch: int = 16,
        embedding: int = 384,
        depth: int = 12,
        heads: int = 6,
        mlp: Mlp = "gelu",
        pooled: bool = False,
        scan: bool = False,
        parts: int = 1,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ) -> None:
        channels = image_shape[2] if len(image_shape) == 3 else 1
        embedding = scaled(embedding, width, heads)
        hidden = _checked(embedding, depth, heads, 0, mlp, parts)
        if patch < 1 or image_shape[0] % patch or image_shape[1] % patch:
            raise ValueError(
                f"patch={patch}: must divide the {image_shape[0]}x{image_shape[1]} pixels of an "
                "image"
            )
        self.patch, self.pooled, self.parts = patch, pooled, parts
        self.patches = _linear(patch * patch * channels, embedding, None, dtype, rngs, bias=True)
        time = (image_shape[0] // patch) * (image_shape[1] // patch) + (not pooled)
        embed = nnx.initializers.normal(_INIT)
        self.positions = nnx.Param(embed(rngs.params(), (time, embedding), jnp.float32))
        self.class_token = None if pooled else nnx.Param(jnp.zeros((1, embedding)))
        self.blocks = _blocks(
            lambda: Block(
                embedding,
                heads,
                hidden,
                mlp,
                is_causal=False,
                rotary=False,
                depth=depth,
                dtype=dtype,
                rngs=rngs,
            ),
            depth,
            scan,
        )
        self.norm = _norm(embedding, dtype, rngs)
        self.head = _linear(embedding, classes, None, dtype, rngs, bias=True)

    def __call__(self, images_BxHxWxC: jax.Array) -> jax.Array:
        """Returns float32 logits (batch, classes) for images (batch, *image_shape)."""
        x_BxTxD = self.patches(cut(images_BxHxWxC, self.patch))
        if self.class_token is not None:
            batch, _, width = x_BxTxD.shape
            token = jnp.broadcast_to(self.class_token[...].astype(x_BxTxD.dtype), (batch, 1, width))
            x_BxTxD = jnp.concatenate([token, x_BxTxD], axis=1)
        x_BxTxD = x_BxTxD + self.positions[...].astype(x_BxTxD.dtype)
        x_BxTxD = self.norm(_through(self.blocks, x_BxTxD, self.parts))
        x_BxD = x_BxTxD.mean(axis=1) if self.pooled else x_BxTxD[:, 0]
        return self.head(x_BxD).astype(jnp.float32)

    def units(self, walk: Units) -> None:
        """Describes itself to `export.compact`: hidden units of the MLPs, and heads."""
        _follow(walk, self.blocks, self.positions.shape[1])


def _blocks(make: Callable[[], Block], depth: int, scan: bool) -> nnx.List | Block:
    """Makes the blocks one after the other; with `scan` one block of all their parameters."""
    blocks = [make() for _ in range(depth)]
    if not scan:
        return nnx.List(blocks)
    states = [nnx.state(block) for block in blocks]
    stacked = jax.tree.map(lambda *each: jnp.stack(each), *states)
    return nnx.merge(nnx.graphdef(blocks[0]), stacked)


def _through(blocks: nnx.List | Block, x_BxTxD: jax.Array, parts: int) -> jax.Array:
    """Calls the blocks one after the other."""
    if isinstance(blocks, Block):

        def call(x_BxTxD: jax.Array, block: Block) -> jax.Array:
            return _applied(block, x_BxTxD, parts)

        return nnx.scan(call, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x_BxTxD, blocks)
    for block in blocks:
        x_BxTxD = _applied(block, x_BxTxD, parts)
    return x_BxTxD


def _applied(block: Block, x_BxTxD: jax.Array, parts: int) -> jax.Array:
    """Applies a block to parts of the batch; to all of it where kernels are scored for growth.

    The scores of the parts would not add up to those of the batch.
    """
    if parts > 1 and layers.has_probes(block):
        return recomputed(block, x_BxTxD)
    return by_parts(block, x_BxTxD, parts)


def scaled(embedding: int, width: float, heads: int) -> int:
    """Multiplies a width, to the nearest multiple of twice the heads; leaves it at 1.0 as it is."""
    if width == 1 or heads < 1:
        return embedding
    return 2 * heads * max(1, round(embedding * width / (2 * heads)))


def rotate(x_BxTxHxK: jax.Array, base: float = 10_000.0) -> jax.Array:
    """Rotates pairs of features by angles that grow with the position (rotary embedding).

    Args:
      x_BxTxHxK: Queries or keys; the two halves of the last axis are the pairs.
      base: The longest wavelength is about 2 pi times this, in positions.

    Returns:
      An array of the same shape and dtype.
    """
    time, half = x_BxTxHxK.shape[1], x_BxTxHxK.shape[-1] // 2
    frequency_K = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle_TxK = jnp.arange(time, dtype=jnp.float32)[:, None] * frequency_K
    cos_TxK, sin_TxK = jnp.cos(angle_TxK), jnp.sin(angle_TxK)
    # The two halves are turned by multiplying each by the cosine, the other by the sine.
    cos_TxPxK, sin_TxPxK = (
        jnp.concatenate(halves, axis=1).reshape(time, 2, half).astype(x_BxTxHxK.dtype)
        for halves in ([cos_TxK, cos_TxK], [-sin_TxK, sin_TxK])
    )
    x_BxTxHxPxK = x_BxTxHxK.reshape(*x_BxTxHxK.shape[:3], 2, half)
    other_BxTxHxPxK = jnp.flip(x_BxTxHxPxK, axis=3)
    turned = x_BxTxHxPxK * cos_TxPxK[None, :, None] + other_BxTxHxPxK * sin_TxPxK[None, :, None]
    return turned.reshape(x_BxTxHxK.shape)


def cut(images_BxHxWxC: jax.Array, patch: int) -> jax.Array:
    """Cuts images into patches: (batch, patches row by row, patch * patch * channels).

    Args:
      images_BxHxWxC: (batch, height, width) or (batch, height, width, channels).
      patch: Pixels a side; divides height and width.
    """
    batch, height, width = images_BxHxWxC.shape[:3]
    rows, cols = height // patch, width // patch
    x = images_BxHxWxC.reshape(batch, rows, patch, cols, patch, -1)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * cols, -1)


def _checked(width: int, depth: int, heads: int, hidden: int, mlp: str, parts: int) -> int:
    """The width of the MLP, of sizes that are sound."""
    if mlp not in get_args(Mlp):
        raise ValueError(f"mlp={mlp!r}: must be one of {', '.join(get_args(Mlp))}")
    if min(width, depth, heads, parts) < 1 or hidden < 0:
        raise ValueError(
            f"width={width}, depth={depth}, heads={heads}, parts={parts}, hidden={hidden}: must be "
            "at least 1, hidden at least 0"
        )
    if width % (2 * heads):
        raise ValueError(
            f"width={width}: must be a multiple of twice the {heads} heads: a head's features are "
            "rotated in pairs"
        )
    return hidden or (4 * width if mlp == "gelu" else 32 * math.ceil(8 * width / 3 / 32))


def _follow(walk: Units, blocks: nnx.List | Block, width: int) -> None:
    if isinstance(blocks, Block):
        raise ValueError(
            "scan=True: blocks of one stack keep one width, and each would lose units of its own; "
            "compact a model with scan=False"
        )
    x = walk.inputs(width)
    for i, block in enumerate(blocks):
        block.units(walk.inside("blocks", i), x)


def _zero_or_varying(values: np.ndarray) -> np.ndarray:
    """Returns what GELU or SiLU make of values that are 0 or NaN."""
    return np.where(values == 0, 0.0, np.nan)


def _linear(
    n_in: int, n_out: int, init: float | None, dtype: Any, rngs: nnx.Rngs, bias: bool = False
) -> Linear:
    """A linear map; normal kernels of this standard deviation, Lecun-normal ones of None."""
    kernel = nnx.initializers.lecun_normal() if init is None else nnx.initializers.normal(init)
    return Linear(n_in, n_out, use_bias=bias, kernel_init=kernel, dtype=dtype, rngs=rngs)


def _norm(width: int, dtype: Any, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(width, dtype=dtype, rngs=rngs)
