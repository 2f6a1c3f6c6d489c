# ---
# jupyter:
#   jupytext:
#     formats: py:percent
#     text_representation: {extension: .py, format_name: percent}
# ---

# %% [markdown]
# # Which pixels does a sparse network read?
#
# Open it as a notebook with `jupytext --to ipynb examples/story.py`, or run it with
# `python examples/story.py pictures/`.
#
# A network with 300 hidden units on images of 64 pixels has 19,200 connections in its first layer.
# We keep one in fifty, drawn at random, and train. Then we let RigL move them. The pictures show
# where they go.

# %%
import pathlib
import sys

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from plain_jax import apply, init, loss
from sklearn.datasets import load_digits

import rigl_optax

STEPS, EVERY, SPARSITY = 2_000, 50, 0.98
images, labels = load_digits(return_X_y=True)
x, y = jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels)
folder = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else None


def show(figure, name: str) -> None:
    """Shows a picture in a notebook, and writes it if a folder was given."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / f"{name}.png", dpi=120, bbox_inches="tight")
    plt.show() if plt.isinteractive() else plt.close(figure)


# %% [markdown]
# ## The data
#
# Grey images of 8x8 pixels. The left and right columns are nearly always empty.

# %%
figure, axes = plt.subplots(1, 9, figsize=(9, 1.3))
for axis, image in zip(axes[:8], images, strict=False):
    axis.imshow(image.reshape(8, 8), cmap="gray_r")
axes[8].imshow(images.mean(0).reshape(8, 8), cmap="viridis")
axes[8].set_title("mean", fontsize=8)
for axis in axes:
    axis.axis("off")
show(figure, "digits")

# %% [markdown]
# ## Two networks from the same masks
#
# `static_sparse` keeps the random masks that both begin with. `rigl` drops the smallest weights
# every 50 steps and grows as many where the gradient is largest. Everything else is the same.


# %%
def train(tx) -> tuple[list, list, dict]:
    """Trains; returns accuracies and first-layer masks along the way, and the parameters."""
    params = init(jax.random.key(0))
    opt_state = tx.init(params)
    params = rigl_optax.apply_masks(params, opt_state)

    @jax.jit
    def step(params, opt_state, x, y):
        updates, opt_state = tx.update(jax.grad(loss)(params, x, y), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    rng = np.random.default_rng(0)
    accuracies, masks = [], []
    for count in range(STEPS):
        if count % EVERY == 0:
            right = apply(params, x[1_300:]).argmax(-1) == y[1_300:]
            accuracies.append(100 * float(right.mean()))
            masks.append(np.asarray(rigl_optax.get_masks(opt_state)["layer0"]["kernel"]))
        rows = rng.integers(0, 1_300, 100)
        params, opt_state = step(params, opt_state, x[rows], y[rows])
    rigl_optax.check(params, opt_state)
    return accuracies, masks, params


adam = optax.adamw(3e-3)
runs = {
    "static": train(rigl_optax.static_sparse(adam, SPARSITY)),
    "RigL": train(rigl_optax.rigl(adam, SPARSITY, end=3 * STEPS // 4, every=EVERY)),
}

# %% [markdown]
# ## What it gives

# %%
figure, axis = plt.subplots(figsize=(5, 3))
for (name, (accuracies, _, _)), color in zip(runs.items(), ("#E69F00", "#0072B2"), strict=True):
    axis.plot(range(0, STEPS, EVERY), accuracies, color=color, label=name)
axis.set_xlabel("step")
axis.set_ylabel("unseen digits right, %")
axis.legend(frameon=False)
show(figure, "accuracy")
for name, (accuracies, _, _) in runs.items():
    print(f"{name}: {accuracies[-1]:.1f} %")

# %% [markdown]
# ## Where the connections went
#
# Each square is a pixel, its colour the number of its connections to the 300 hidden units. RigL
# moves them from pixels that are always empty to those that tell digits apart. Nobody told it
# which these are.

# %%
moments = [0, 5, 15, len(runs["RigL"][1]) - 1]
figure, axes = plt.subplots(1, len(moments), figsize=(9, 2.4))
counts = [runs["RigL"][1][moment].sum(1).reshape(8, 8) for moment in moments]
for axis, moment, count in zip(axes, moments, counts, strict=True):
    picture = axis.imshow(count, cmap="viridis", vmin=0, vmax=max(c.max() for c in counts))
    axis.set_title(f"step {moment * EVERY}", fontsize=9)
    axis.axis("off")
figure.colorbar(picture, ax=axes, label="connections", shrink=0.8)
show(figure, "connections")
empty = images.std(0) < 0.5
before, after = (runs["RigL"][1][moment].sum(1)[empty].sum() for moment in (0, -1))
print(
    f"connections of the {empty.sum()} pixels that hardly vary: {before} at first, {after} at last"
)

# %% [markdown]
# ## Smaller in fact
#
# Units that have lost all inputs or all outputs can be taken out. What remains is a smaller dense
# network with the same outputs: see `docs/deploy.md`.

# %%
for name, (_, _, params) in runs.items():
    alive = (params["layer0"]["kernel"] != 0).any(0) & (params["layer1"]["kernel"] != 0).any(1)
    print(f"{name}: {int(alive.sum())} of 300 units of the first hidden layer are in use")
