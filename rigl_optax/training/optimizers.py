"""The inner optimizer of a run: any of Optax's by name, its learning rate, decay and clipping."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import optax

import rigl_optax
from rigl_optax import _paths
from rigl_optax.training import config as config_lib
from rigl_optax.training.config import Config

PyTree = Any

# What Optax calls the argument that says which parameters decay.
_MASKS = ("mask", "weight_decay_mask")


def build(config: Config, factors: PyTree | None = None) -> optax.GradientTransformation:
    """Makes the optimizer that a method is wrapped around.

    Weight decay sits inside the wrapper, so that the growth score is the gradient of the loss
    without it (paper, section 3; TF reference). So does the clipping: its norm is that of the
    gradient of the active weights.

    Args:
      config: Of the run.
      factors: From `mupar.factors`: a tree like params of numbers that multiply the rate.

    Raises:
      ValueError: If there is no such optimizer, or it has no such argument.
    """
    make, section = find(config.optimizer.name), config.optimizer
    named = inspect.signature(make).parameters
    config_lib.check_options(
        "optimizer",
        section.name,
        section.options,
        [name for name in named if name not in ("learning_rate", "weight_decay", *_MASKS)],
    )
    arguments = dict(section.options)
    decayed = _DECAYED[section.weight_decay_on]
    before = []
    if section.gradient_clip:
        before.append(optax.clip_by_global_norm(section.gradient_clip))
    if "weight_decay" in named:
        arguments["weight_decay"] = section.weight_decay
        masks = [name for name in _MASKS if name in named]
        if masks:
            arguments[masks[0]] = decayed
        elif section.weight_decay and section.weight_decay_on != "all":
            raise ValueError(
                f"config.optimizer.weight_decay_on={section.weight_decay_on!r}: must be 'all' for "
                f"{section.name}, whose weight decay knows no mask"
            )
    else:
        before.append(optax.add_decayed_weights(section.weight_decay, mask=decayed))
    try:
        found = make(learning_rate(config), **arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"config.optimizer: {section.name} with {arguments}: {error}") from None
    after = [] if factors is None else [rigl_optax.scale_by_factors(factors)]
    return optax.chain(*before, found, *after)


def find(name: str) -> Callable[..., optax.GradientTransformation]:
    """Returns the function of `optax` or `optax.contrib` that makes the optimizer of this name.

    Raises:
      ValueError: If there is none that takes a learning rate; it lists those there are.
    """
    known = names()
    if name not in known:
        raise ValueError(
            f"config.optimizer.name={name!r}: must be an optimizer of optax or optax.contrib that "
            f"takes a learning rate: {', '.join(known)}"
        )
    return known[name]


def names() -> dict[str, Callable[..., optax.GradientTransformation]]:
    """Returns the optimizers by name: those of Optax that take a learning rate, and our AdamW."""
    found: dict[str, Callable[..., optax.GradientTransformation]] = {}
    for module in (optax.contrib, optax):
        for name in sorted(vars(module)):
            make = getattr(module, name)
            if name.startswith(("_", "scale_by_")) or not inspect.isfunction(make):
                continue
            parameters = list(inspect.signature(make).parameters.values())
            if parameters and parameters[0].name == "learning_rate":
                found[name] = make
    found["adamw_by_age"] = rigl_optax.adamw
    return found


def learning_rate(config: Config) -> optax.Schedule:
    """Returns the learning rate at each step: a linear rise from 0, then the schedule.

    Its anchors are fractions of the run, so a run that is M times as long has them M times as late.
    """
    section, warmup = config.optimizer, config.step_at(config.optimizer.warmup)
    rest: optax.Schedule
    if section.schedule == "cosine":
        rest = optax.cosine_decay_schedule(section.learning_rate, max(1, config.steps - warmup))
    else:
        drops = [config.step_at(fraction) - warmup for fraction in section.decay_at]
        rest = optax.piecewise_constant_schedule(
            section.learning_rate,
            # Two anchors of a very short run may be one step.
            {drop: section.decay_factor ** drops.count(drop) for drop in drops},
        )
    if not warmup:
        return rest
    rise = optax.linear_schedule(0.0, section.learning_rate, warmup)
    return optax.join_schedules([rise, rest], [warmup])


def _kernels(params: PyTree) -> PyTree:
    """Marks the leaves with at least two dimensions."""
    return jax.tree.map(lambda leaf: leaf.ndim >= 2, params)


def _kernels_but_depthwise(params: PyTree) -> PyTree:
    """Marks the kernels but those of depthwise convolutions, as the models here name them."""
    named = _paths.flatten_with_paths(params)
    decayed = [leaf.ndim >= 2 and "depthwise" not in path.split("/") for path, leaf in named]
    return jax.tree.unflatten(jax.tree.structure(params), decayed)


_DECAYED: dict[str, Callable[[PyTree], PyTree]] = {
    "kernels": _kernels,
    "kernels_but_depthwise": _kernels_but_depthwise,
    "all": lambda params: jax.tree.map(lambda leaf: True, params),
}
