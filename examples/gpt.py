"""A GPT over bytes, sparse under Adam with one learning rate for all densities.

    python examples/gpt.py mytext.txt

Without a file it learns the sources of Python's standard library.
"""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import rigl_optax
from rigl_optax.models import transformer

CONTEXT = 128
BASE_WIDTH, WIDTH = 16, 64  # the rate below is for a dense network of the first


def read(path: str | None) -> np.ndarray:
    """Returns bytes of a file, or of modules that every Python has."""
    if path is not None:
        return np.fromfile(path, np.uint8)
    library = pathlib.Path(pathlib.__file__).parent
    if library.name == "pathlib":  # a package since Python 3.13
        library = library.parent
    names = sorted(library.glob("*.py"))
    return np.frombuffer(b"".join(name.read_bytes() for name in names), np.uint8)


def main(steps: int = 600, path: str | None = None) -> float:
    """Trains for some steps, and returns the bits per byte of text that it has not seen."""
    text = read(path)
    unseen = text[-64 * (CONTEXT + 1) :].reshape(64, CONTEXT + 1)
    text = text[: -unseen.size]

    model = transformer.GPT(embedding=WIDTH, depth=2, heads=4, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model)
    params = nnx.to_pure_dict(params)
    distribution = rigl_optax.erk(
        0.9, dense=rigl_optax.DenseLayers(transformer.dense_layers("erk"))
    )
    # Sparse muPar: a layer's initial values and rate go by its width and its density.
    factors = rigl_optax.mupar_factors(params, distribution, width=WIDTH / BASE_WIDTH)
    params = jax.tree.map(lambda w, f: w * f**0.5, params, factors)
    adam = optax.chain(
        optax.clip_by_global_norm(1.0),
        rigl_optax.adamw(optax.warmup_cosine_decay_schedule(0, 0.02, steps // 20, steps), b2=0.95),
        rigl_optax.scale_by_factors(factors),
    )
    tx = rigl_optax.rigl(adam, distribution, end=3 * steps // 4, every=50)
    opt_state = tx.init(params)
    params = rigl_optax.apply_masks(params, opt_state)

    def loss(params, text):
        logits = nnx.merge(graphdef, params)(text[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, text[:, 1:]).mean()

    @jax.jit
    def step(params, opt_state, text):
        value, grads = jax.value_and_grad(loss)(params, text)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    rng = np.random.default_rng(0)
    for count in range(steps):
        starts = rng.integers(0, len(text) - CONTEXT - 1, 8)
        batch = np.stack([text[start : start + CONTEXT + 1] for start in starts])
        params, opt_state, value = step(params, opt_state, batch)
        if count % 100 == 0:
            print(f"step {count}: {value / np.log(2):.2f} bits per byte")

    rigl_optax.check(params, opt_state)
    bits = float(jax.jit(loss)(params, unseen) / jnp.log(2))
    print(f"{bits:.2f} bits per byte of unseen text")
    return bits


if __name__ == "__main__":
    main(path=sys.argv[1] if len(sys.argv) > 1 else None)
