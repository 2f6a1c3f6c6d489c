"""From a config to the optimizer: the one place of training that knows methods by name."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import optax

import rigl_optax
from rigl_optax import accounting
from rigl_optax.training.config import Config

PyTree = Any
Inner: TypeAlias = optax.GradientTransformation
DISTRIBUTIONS: dict[str, Callable[[float], Any]] = {
    "erk": rigl_optax.erk,
    "erdos_renyi": rigl_optax.erdos_renyi,
    "uniform": rigl_optax.uniform,
}


class Method(NamedTuple):
    """How a method is built, and what the loop has to know to watch over it.

    Attributes:
      build: From the dense optimizer, the distribution and the config to the optimizer.
      cost: What its steps cost, against dense ones.
      masked: Whether there are masks.
      rewires: Whether the topology changes on the config's schedule.
      grows_by_gradient: Whether growth needs the gradients of inactive weights.
    """

    build: Callable[[Inner, Any, Config], Inner]
    cost: accounting.MethodCost
    masked: bool = True
    rewires: bool = False
    grows_by_gradient: bool = False


def _dense(inner: Inner, distribution: Any, config: Config) -> Inner:
    del distribution, config
    return inner


def _static(inner: Inner, distribution: Any, config: Config) -> Inner:
    return rigl_optax.static_sparse(inner, distribution, seed=config.seed)


def _set(inner: Inner, distribution: Any, config: Config) -> Inner:
    return rigl_optax.sparse_evolutionary_training(inner, distribution, **_rewiring(config))


def _rigl(inner: Inner, distribution: Any, config: Config) -> Inner:
    return rigl_optax.rigl(inner, distribution, **_rewiring(config))


def _rewiring(config: Config) -> dict[str, Any]:
    return {
        "end": config.rewire_end,
        "every": config.rewire_every,
        "drop_fraction": config.drop_fraction,
        "seed": config.seed,
    }


METHODS = {
    "dense": Method(_dense, accounting.METHODS["dense"], masked=False),
    "static": Method(_static, accounting.METHODS["static"]),
    "set": Method(_set, accounting.METHODS["set"], rewires=True),
    "rigl": Method(_rigl, accounting.METHODS["rigl"], rewires=True, grows_by_gradient=True),
}


def find(config: Config) -> Method:
    """The method that the config names.

    Raises:
      ValueError: If there is none of that name; it lists those there are.
    """
    if config.method not in METHODS:
        raise ValueError(f"config.method={config.method!r}: methods are {', '.join(METHODS)}")
    return METHODS[config.method]


def distribution(config: Config) -> Any:
    """The layer-wise distribution of the config's sparsity; call it on the parameters."""
    if config.distribution not in DISTRIBUTIONS:
        raise ValueError(
            f"config.distribution={config.distribution!r}: distributions are "
            f"{', '.join(DISTRIBUTIONS)}"
        )
    return DISTRIBUTIONS[config.distribution](config.sparsity)


def build(config: Config) -> optax.GradientTransformation:
    """The optimizer of a run: SGD with Nesterov momentum, wrapped by the method.

    Weight decay sits inside, so that the growth score is the gradient of the loss
    without it (paper, section 3; TF reference).
    """
    inner = optax.chain(
        optax.add_decayed_weights(config.weight_decay, mask=_kernels),
        optax.sgd(learning_rate(config), momentum=config.momentum, nesterov=True),
    )
    return find(config).build(inner, distribution(config), config)


def learning_rate(config: Config) -> optax.Schedule:
    """Cosine from the config's learning rate at step 0 to 0 after the last step."""
    return optax.cosine_decay_schedule(config.learning_rate, config.steps)


def drop_fraction(config: Config) -> optax.Schedule:
    """The fraction of active weights replaced by a rewiring at a given step."""
    return rigl_optax.cosine_drop_fraction(config.drop_fraction, config.rewire_end)


def rewirings_before(config: Config, step: int) -> int:
    """How many rewirings the schedule holds before this step, so after `step` updates."""
    if not find(config).rewires:
        return 0
    return len(range(0, min(step, config.rewire_end), config.rewire_every))


def is_rewiring(config: Config, step: int) -> bool:
    """Whether update number `step`, counted from 0, may change the masks."""
    return rewirings_before(config, step + 1) > rewirings_before(config, step)


def growth_predicate(config: Config) -> Callable[[jax.Array], jax.Array] | None:
    """Tells of a step (int32 scalar) whether its update grows weights by their gradient.

    None if no step of this method does.
    """
    if not find(config).grows_by_gradient:
        return None
    return lambda step: (step < config.rewire_end) & (step % config.rewire_every == 0)


def _kernels(params: PyTree) -> PyTree:
    """True for the leaves with at least two dimensions: those that are decayed."""
    return jax.tree.map(lambda leaf: leaf.ndim >= 2, params)
