"""The image models by name: how each is made, and which of its layers the paper keeps dense."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx

import rigl_optax
from rigl_optax._distributions import DensePredicate
from rigl_optax.models import (
    lenet,
    mobilenet_v1,
    mobilenet_v2,
    resnet,
    transformer,
    vgg,
    wide_resnet,
)
from rigl_optax.training import config as config_lib
from rigl_optax.training.config import Config


class Architecture(NamedTuple):
    """How a model is made.

    Attributes:
      make: The model, of the shape of an image, the number of classes and the width multiplier;
        or, if it is `open`, of the hidden widths instead.
      dense: From the name of a distribution to patterns of the kernels that stay dense, and why;
        None for `rigl_optax.default_dense`.
      open: Whether `config.model.hidden` says how wide the layers are.
      fixed: Arguments that the name stands for.
    """

    make: Callable[..., nnx.Module]
    dense: Callable[[str], dict[str, str]] | None = None
    open: bool = False
    fixed: dict[str, Any] = {}  # noqa: RUF012 - never changed


ARCHITECTURES = {
    "lenet": Architecture(lenet.LeNet, open=True),
    **{
        f"resnet{depth}": Architecture(resnet.ResNet, resnet.dense_layers, fixed={"depth": depth})
        for depth in resnet.DEPTHS
    },
    "mobilenet_v1": Architecture(mobilenet_v1.MobileNetV1, mobilenet_v1.dense_layers),
    "mobilenet_v2": Architecture(mobilenet_v2.MobileNetV2, mobilenet_v2.dense_layers),
    "vgg16": Architecture(vgg.VGG, vgg.dense_layers, fixed={"depth": 16}),
    "wide_resnet": Architecture(wide_resnet.WideResNet, wide_resnet.dense_layers),
    "vit": Architecture(transformer.ViT, transformer.dense_layers),
}
# Of texts; recurrent models keep `rigl_optax.default_dense`.
CELLS = ("gru", "lstm")
GPT = "gpt"
TRANSFORMERS = (GPT, "vit")


def build(config: Config, image_shape: Sequence[int], classes: int, width: float) -> nnx.Module:
    """Makes a freshly initialised model, from the config's seed.

    Args:
      config: Names it.
      image_shape: Of one image.
      classes: Number of logits.
      width: By which hidden widths are multiplied.

    Raises:
      ValueError: If `config.model.hidden` or an option does not fit the model.
    """
    found = ARCHITECTURES[config.model.name]
    options = model_options(config, found.make, found.fixed) | found.fixed
    if found.open != bool(config.model.hidden):
        raise ValueError(
            f"config.model.hidden={config.model.hidden}: {config.model.name} "
            + ("needs its hidden widths" if found.open else "has its own widths: leave it empty")
        )
    size = scaled(config.model.hidden, width) if found.open else width
    dtype, rngs = jnp.dtype(config.model.dtype), nnx.Rngs(config.seed)
    return found.make(image_shape, classes, size, **options, dtype=dtype, rngs=rngs)


def scaled(hidden: Sequence[int], width: float) -> tuple[int, ...]:
    """Multiplies hidden widths, and rounds them; at least 1."""
    return tuple(max(1, round(width * n)) for n in hidden)


def dense_layers(config: Config) -> DensePredicate:
    """Returns which leaves stay dense in this model, for `dense=` of the distribution.

    With `config.model.dense_layers` of "default", those that the paper and its code keep so.
    """
    if config.model.dense_layers == "none":
        return rigl_optax.DenseLayers({})
    if config.model.dense_layers != "default":
        return rigl_optax.DenseLayers(
            {config.model.dense_layers: "config.model.dense_layers says so"}
        )
    if config.model.name == GPT:
        return rigl_optax.DenseLayers(transformer.dense_layers(config.method.distribution.name))
    found = ARCHITECTURES.get(config.model.name)
    if found is None or found.dense is None:
        return rigl_optax.default_dense
    return rigl_optax.DenseLayers(found.dense(config.method.distribution.name))


def stacked(config: Config) -> tuple[str, ...]:
    """Returns patterns of the parameters whose first axis counts layers, for `stacked=`."""
    return (transformer.STACKED,) if config.model.options.get("scan") else ()


def model_options(
    config: Config, model: Callable[..., nnx.Module], fixed: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Returns the model's own arguments from the config, as `embedding` and `tied`.

    Raises:
      ValueError: If the model has no such argument; it lists those there are.
    """
    # The signature of the class itself is that of NNX's metaclass.
    made = vars(model)["__init__"] if isinstance(model, type) else model
    named = inspect.signature(made).parameters.values()
    taken = {"rngs", "dtype", *(fixed or {})}
    allowed = [p.name for p in named if p.kind is p.KEYWORD_ONLY and p.name not in taken]
    config_lib.check_options("model", config.model.name, config.model.options, allowed)
    return dict(config.model.options)
