"""Makes smaller models of this library without the units that do nothing (`export.compact`)."""

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx

from rigl_optax import export
from rigl_optax.models import recurrent, transformer


@runtime_checkable
class HasUnits(Protocol):
    """A model that describes its units."""

    def units(self, walk: export.Units) -> None:
        """Walks through itself as `__call__` does."""


def compact(model: nnx.Module) -> tuple[nnx.Module, export.Compacted]:
    """Makes a smaller dense model with the same outputs in evaluation.

    Args:
      model: One of `rigl_optax.models`, or any that has a method `units`; its parameters are
        arrays, in which inactive weights are zero.

    Returns:
      A model of the same class whose layers have fewer units, and what was removed. It does not
      share arrays with the first one, which stays as it was.

    Raises:
      ValueError: If the model does not describe its units.

    Examples:
      >>> from rigl_optax.models import lenet
      >>> model = lenet.LeNet((4, 4), 3, (8, 6), rngs=nnx.Rngs(0))
      >>> model.layers[1].kernel[...] = model.layers[1].kernel[...].at[2:].set(0)
      >>> small, about = compact(model)
      >>> [layer.kernel.shape for layer in small.layers], about.units
      ([(16, 2), (2, 6), (6, 3)], {'layers/0': (8, 2), 'layers/1': (6, 6)})
    """
    if not isinstance(model, HasUnits):
        raise ValueError(
            f"{type(model).__name__} does not describe its units: give it a method `units`, or "
            "call rigl_optax.export.compact with a description"
        )
    parts: Any = nnx.split(model, nnx.Param, ...)
    graphdef, params, rest = parts
    found = export.compact(nnx.to_pure_dict(params), model.units, nnx.to_pure_dict(rest))
    arrays = jax.tree.map(jnp.asarray, (found.params, found.model_state))
    smaller = nnx.merge(graphdef, *arrays)
    for _, module in nnx.iter_modules(smaller):
        _resize(module)
    return smaller, found


def _resize(module: nnx.Module) -> None:
    """Sets the sizes that a module keeps beside its arrays."""
    if isinstance(module, nnx.Linear):
        module.in_features, module.out_features = module.kernel.shape
    elif isinstance(module, nnx.Conv):
        groups, inputs = module.feature_group_count, module.kernel.shape[-2]
        module.out_features, module.kernel_shape = module.kernel.shape[-1], module.kernel.shape
        if groups > 1:  # depthwise
            module.feature_group_count = groups = module.out_features
        module.in_features = groups * inputs
    elif isinstance(module, nnx.BatchNorm):
        module.num_features = module.mean.shape[0]
    elif isinstance(module, nnx.Embed):
        module.features = module.embedding.shape[1]
    elif isinstance(module, transformer.Attention):
        module.heads = module.out.kernel.shape[0] // module.head_width
    elif isinstance(module, recurrent.Layer):
        module.units = _units_of(module)
    elif isinstance(module, recurrent.RecurrentLM):
        module.hidden = tuple(_units_of(layer) for layer in module.layers)


def _units_of(layer: recurrent.Layer) -> int:
    bias: Any = layer.input.bias
    return bias.shape[0] // len(layer.input.names)
