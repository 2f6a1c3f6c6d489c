"""Times a 3x3 convolution of single weights, patches and then CSR, beside XLA's dense convolution.

    python benchmarks/csr_convolution.py

Channels and sizes are those of a WRN-22-2 on 32x32 images, float32. It prints the medians of nine
calls in milliseconds, those of making the patches alone, and how many times as fast as dense it is.
`docs/deploy.md` says what follows: exports keep convolutions dense. Leave the machine alone.
"""

import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from rigl_optax import condensed

LAYERS = ((32, 32), (16, 64), (8, 128))  # side of the image, channels in and out


def patches(x: jax.Array) -> jax.Array:
    """Returns the 3x3 neighbourhoods of all pixels, as rows of a matrix."""
    side, channels = x.shape[1], x.shape[-1]
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    parts = [x[:, i : i + side, j : j + side] for i in range(3) for j in range(3)]
    return jnp.concatenate(parts, axis=-1).reshape(-1, 9 * channels)


def dense(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Computes the convolution as XLA does."""
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layout)


def median_ms(call: Callable[..., jax.Array], *arguments: object) -> float:
    """Returns the median of nine calls after the first."""
    call(*arguments).block_until_ready()
    seconds = []
    for _ in range(9):
        began = time.perf_counter()
        call(*arguments).block_until_ready()
        seconds.append(time.perf_counter() - began)
    return 1e3 * statistics.median(seconds)


def main() -> None:
    """Prints a line for each layer and batch."""
    rng = np.random.default_rng(0)
    sparse = jax.jit(lambda x, kernel: (patches(x) @ kernel).reshape(*x.shape[:3], -1))
    for side, channels in LAYERS:
        for batch in (1, 8, 64):
            x = jnp.asarray(rng.standard_normal((batch, side, side, channels)), jnp.float32)
            flat = (rng.standard_normal((9 * channels, channels)) / channels).astype(np.float32)
            shape = (3, 3, channels, channels)
            before = median_ms(jax.jit(dense), x, jnp.asarray(flat.reshape(shape)))
            cells = [f"{median_ms(jax.jit(patches), x):.3f} for patches"]
            for sparsity in (0.95, 0.98):
                mask = rng.random(flat.shape) > sparsity
                weights = {"kernel": jnp.asarray(flat * mask)}
                kernel = condensed.bind(*condensed.condense_csr(weights, {"kernel": mask}))[
                    "kernel"
                ]
                expected = dense(x, (flat * mask).reshape(shape))
                np.testing.assert_allclose(sparse(x, kernel), expected, atol=1e-3)
                ms = median_ms(sparse, x, kernel)
                cells.append(f"{100 * sparsity:g} %: {ms:.3f} ({before / ms:.2f}x)")
            print(f"{side}x{side}x{channels}, batch {batch}: dense {before:.3f}", *cells, sep="; ")


if __name__ == "__main__":
    main()
