"""What the tests of the convolutional networks share: shapes, counts, gradients."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import rigl_optax
from rigl_optax import _paths


def shapes(make):
    """Parameters of a model as shapes; nothing is computed."""
    return nnx.to_pure_dict(nnx.state(nnx.eval_shape(make), nnx.Param))


def kernels(params):
    """Shapes of the kernels by their paths."""
    named = _paths.flatten_with_paths(params)
    return {path: tuple(leaf.shape) for path, leaf in named if len(leaf.shape) >= 2}


def count(params):
    """Weights of the kernels alone."""
    return sum(math.prod(shape) for shape in kernels(params).values())


def size(params):
    """All parameters."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def density(params, distribution):
    """Density of each sparse layer, and all active weights."""
    sparsity = distribution(params)
    sizes = {path: math.prod(shape) for path, shape in kernels(params).items()}
    active = sum(sizes[path] - math.floor(s * sizes[path]) for path, s in sparsity.items())
    return {path: 1 - s for path, s in sparsity.items()}, active


def sparse(model_module, name, sparsity):
    """The distribution of that name with the model's own dense layers."""
    dense = rigl_optax.DenseLayers(model_module.dense_layers(name))
    return getattr(rigl_optax, name)(sparsity, dense=dense)


def gradients(make, image_shape, batch=4, classes=3):
    """Logits, the gradient of each parameter, and the state before and after a training pass.

    Parameters are drawn by NumPy and all scales are 1: initializers take long to compile.
    """
    graphdef, params, state = nnx.split(nnx.eval_shape(make), nnx.Param, ...)
    generator = np.random.default_rng(0)

    def value(path, leaf):
        name = path.split("/")[-1]
        if name == "kernel":
            drawn = generator.standard_normal(leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1]))
            return jnp.asarray(drawn, leaf.dtype)
        return jnp.full(leaf.shape, name in ("scale", "var"), leaf.dtype)

    def filled(tree):
        tree = nnx.to_pure_dict(tree)
        values = [value(path, leaf) for path, leaf in _paths.flatten_with_paths(tree)]
        return jax.tree.unflatten(jax.tree.structure(tree), values)

    params, state = filled(params), filled(state)
    images = jnp.asarray(generator.random((batch, *image_shape)), jnp.float32)
    labels = jnp.arange(batch) % classes

    @jax.jit
    def run(params):
        def loss(params):
            model = nnx.merge(graphdef, params, state)
            model.train()
            logits = model(images)
            after = nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.Param)))
            one_hot = jax.nn.one_hot(labels, classes)
            return -(jax.nn.log_softmax(logits) * one_hot).sum(), (logits, after)

        return jax.grad(loss, has_aux=True)(params)

    grads, (logits, after) = run(params)
    return logits, dict(_paths.flatten_with_paths(grads)), state, after
