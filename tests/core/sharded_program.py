"""Runs RigL under one placement of its arrays and prints what came out; used by several tests.

A program of its own so that it can be started in a fresh interpreter, with another
`PYTHONHASHSEED`, other PRNG flags or another number of devices.
"""

import hashlib
import json
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

SHAPE = (16, 24)
STEPS = 7


def build(method="rigl", seed=3):
    import rigl_optax

    inner = optax.sgd(0.125, momentum=0.5)
    return getattr(rigl_optax, method)(
        inner,
        rigl_optax.uniform(0.75),
        end=6,
        every=2,
        drop_fraction=rigl_optax.constant_drop_fraction(0.5),
        seed=seed,
    )


def some_params():
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    return {
        "a": {"kernel": draw(*SHAPE), "bias": draw(24)},
        "conv": {"kernel": draw(3, 3, 4, 8)},
    }


def some_grads(step):
    """Of few different magnitudes, so that ties decide; and exact in every order of summing."""
    rng = np.random.default_rng(100 + step)
    draw = lambda *shape: (rng.integers(-8, 9, shape) / 8).astype(np.float32)
    return {
        "a": {"kernel": draw(*SHAPE), "bias": draw(24)},
        "conv": {"kernel": draw(3, 3, 4, 8)},
    }


def run(tx, *, jit=True, place=lambda tree: jax.tree.map(jnp.asarray, tree), steps=STEPS):
    """Params and state after `steps`, with whatever placement `place` gives."""
    import rigl_optax

    params = place(some_params())
    state = tx.init(params)
    params = rigl_optax.apply_masks(params, state)
    update = jax.jit(tx.update) if jit else tx.update
    for i in range(steps):
        updates, state = update(place(some_grads(i)), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def digest(tree):
    text = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(jax.device_get(tree))[0]:
        text.update(jax.tree_util.keystr(path).encode())
        text.update(np.ascontiguousarray(leaf).tobytes())
    return text.hexdigest()


def main():
    for setting in sys.argv[2:]:
        name, value = setting.split("=")
        jax.config.update(name, json.loads(value))
    params, state = run(build(sys.argv[1]))
    print(
        json.dumps(
            {
                "masks": digest(state.masks),
                "params": digest(params),
                "hash": hash("x"),
                "seed": os.environ.get("PYTHONHASHSEED"),
            }
        )
    )


if __name__ == "__main__":
    main()
