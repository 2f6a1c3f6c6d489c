"""From a config to the optimizer: the one place of training that knows methods by name."""

import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

import rigl_optax
from rigl_optax import _paths, accounting, condensed
from rigl_optax._plan import RewiringPlan
from rigl_optax._transformation import Design, design_of
from rigl_optax.training import architectures, structures
from rigl_optax.training import config as config_lib
from rigl_optax.training.config import Config

PyTree = Any
Inner: TypeAlias = optax.GradientTransformation
DISTRIBUTIONS: dict[str, Callable[..., Any]] = {
    "erk": rigl_optax.erk,
    "erdos_renyi": rigl_optax.erdos_renyi,
    "uniform": rigl_optax.uniform,
}

_OVERRIDDEN = "uniform(overrides={'reset/kernel': 0.5})"

# Of the learning rate's schedule and `config.momentum`.
OPTIMIZERS: dict[str, Callable[[optax.Schedule, float], Inner]] = {
    "sgd": lambda rate, momentum: optax.sgd(rate, momentum=momentum, nesterov=True),
    "heavy_ball": lambda rate, momentum: optax.sgd(rate, momentum=momentum),
    "adam": lambda rate, momentum: optax.adam(rate, b1=momentum),
}


class Method(NamedTuple):
    """How a method is built, and what the loop has to know to watch over it.

    Attributes:
      transform: The transformation; None for the dense optimizer itself.
      cost: What its steps cost, against dense ones.
      arguments: From the config to the transformation's keyword arguments.
      masked: Whether there are masks.
      grows_by_gradient: Whether growth needs the gradients of inactive weights.
      keeps_counts: Whether the number of active weights of a layer never changes.
      start: Where the first masks come from, if not from the seed: a name in
        `rigl_optax.training.first_masks`.
      takes_sparsity: Whether the transformation is told the distribution.
      narrow: Whether the network is made as small as the sparse one instead.
      stored: The transformation that does the same to stored blocks, if there is one.
    """

    transform: Callable[..., Inner] | None
    cost: accounting.MethodCost
    arguments: Callable[[Config], dict[str, Any]] = lambda config: {}
    masked: bool = True
    grows_by_gradient: bool = False
    keeps_counts: bool = True
    start: str | None = None
    takes_sparsity: bool = True
    narrow: bool = False
    stored: Callable[..., condensed.CondensedTransformation] | None = None


def _rewiring(config: Config) -> dict[str, Any]:
    return {
        "end": config.rewire_end,
        "every": config.rewire_every,
        "drop_fraction": config.drop_fraction,
    }


def _seldom(config: Config) -> dict[str, Any]:
    # ITOP: fewer rewirings, so that each weight is trained long enough to be judged, and a
    # larger part at each. Its own runs have Delta T 4,000 of 100,000 steps and 0.5.
    return {
        "end": config.rewire_end,
        "every": 4 * config.rewire_every,
        "drop_fraction": 0.5,
    }


def _pruning(config: Config) -> dict[str, Any]:
    return {
        "begin": _first_pruning(config),
        "end": config.rewire_end + 1,
        "every": config.rewire_every,
    }


def _first_pruning(config: Config) -> int:
    # The last one, at the end of the rewirings of others, is on the grid.
    begin = config.step_at(config.prune_from)
    if begin > config.rewire_end:
        raise ValueError(
            f"config.prune_from={config.prune_from}: must not be after config.rewire_until="
            f"{config.rewire_until}"
        )
    steps = (config.rewire_end - begin) // config.rewire_every
    return config.rewire_end - steps * config.rewire_every


def _top_kast(config: Config) -> dict[str, Any]:
    # Twice as many weights learn as are seen: 80 and 50 %, 90 and 80 % in the paper.
    return {
        "backward_sparsity": max(0.0, 1 - 2 * (1 - config.sparsity)),
        "every": config.rewire_every,
    }


def _deep_rewiring(config: Config) -> dict[str, Any]:
    # On the validation split of Fashion-MNIST at 95 %, seed 100: 1e-6, 1e-4 and 1e-3 within 0.1
    # points, 5e-3 worse by 2, and noise no help (docs/results.md).
    return {"learning_rate": learning_rate(config), "l1": 1e-3, "temperature": 0.0}


def _soft_thresholding(config: Config) -> dict[str, Any]:
    # How sparse it becomes is learned: the decays that came nearest to each sparsity on the
    # validation split of Fashion-MNIST, with seed 100 (docs/results.md).
    nearest = min(_DECAYS, key=lambda s: abs(s - config.sparsity))
    return {"threshold_decay": _DECAYS[nearest], "layers": rigl_optax.uniform(0.0)}


_DECAYS = {0.9: 1.1e-2, 0.95: 1.65e-2, 0.98: 2.8e-2}

_COSTS = accounting.METHODS

METHODS = {
    "dense": Method(None, _COSTS["dense"], masked=False),
    "small_dense": Method(None, _COSTS["small_dense"], masked=False, narrow=True),
    "static": Method(rigl_optax.static_sparse, _COSTS["static"], stored=condensed.static_sparse),
    "snip": Method(rigl_optax.static_sparse, _COSTS["snip"], start="snip"),
    "grasp": Method(rigl_optax.static_sparse, _COSTS["grasp"], start="grasp"),
    "synflow": Method(rigl_optax.static_sparse, _COSTS["synflow"], start="synflow"),
    "set": Method(
        rigl_optax.sparse_evolutionary_training,
        _COSTS["set"],
        _rewiring,
        stored=condensed.sparse_evolutionary_training,
    ),
    "deepr": Method(rigl_optax.deep_rewiring, _COSTS["deepr"], _deep_rewiring),
    "snfs": Method(
        rigl_optax.sparse_momentum,
        _COSTS["snfs"],
        _rewiring,
        grows_by_gradient=True,
    ),
    "snfs_redistribute": Method(
        rigl_optax.sparse_momentum,
        _COSTS["snfs_redistribute"],
        lambda config: _rewiring(config) | {"redistribute": True},
        grows_by_gradient=True,
        keeps_counts=False,
    ),
    "dsr": Method(
        rigl_optax.dynamic_sparse_reparameterization,
        _COSTS["dsr"],
        _rewiring,
        keeps_counts=False,
    ),
    "rigl": Method(
        rigl_optax.rigl,
        _COSTS["rigl"],
        _rewiring,
        grows_by_gradient=True,
        stored=condensed.rigl,
    ),
    "rigl_itop": Method(
        rigl_optax.rigl,
        _COSTS["rigl_itop"],
        _seldom,
        grows_by_gradient=True,
    ),
    "gmp": Method(
        rigl_optax.gradual_magnitude_pruning,
        _COSTS["gmp"],
        _pruning,
        keeps_counts=False,
    ),
    "gmp_global": Method(
        rigl_optax.gradual_magnitude_pruning,
        _COSTS["gmp_global"],
        lambda config: _pruning(config) | {"scope": "global"},
        keeps_counts=False,
    ),
    "granet": Method(
        rigl_optax.granet,
        _COSTS["granet"],
        _rewiring,
        grows_by_gradient=True,
        keeps_counts=False,
    ),
    "top_kast": Method(
        rigl_optax.top_kast,
        _COSTS["top_kast"],
        _top_kast,
    ),
    "dnw": Method(rigl_optax.dnw, _COSTS["dnw"]),
    "str": Method(
        rigl_optax.soft_thresholding,
        _COSTS["str"],
        _soft_thresholding,
        takes_sparsity=False,
        keeps_counts=False,
    ),
    "lottery": Method(rigl_optax.static_sparse, _COSTS["lottery"], start="ticket"),
    "lottery_rigl": Method(
        rigl_optax.rigl,
        _COSTS["lottery_rigl"],
        _rewiring,
        grows_by_gradient=True,
        start="ticket",
    ),
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
    name, opened, rest = config.distribution.partition("(")
    if name not in DISTRIBUTIONS or bool(opened) != rest.endswith(")"):
        raise ValueError(
            f"config.distribution={config.distribution!r}: distributions are "
            f"{', '.join(DISTRIBUTIONS)}, with or without options as in {_OVERRIDDEN!r}"
        )
    found = config_lib.keywords(rest.removesuffix(")"), "distribution", _OVERRIDDEN)
    named = inspect.signature(DISTRIBUTIONS[name]).parameters.values()
    functions = ("dense", "axes")
    allowed = [p.name for p in named if p.kind is p.KEYWORD_ONLY and p.name not in functions]
    unknown = sorted(set(found) - set(allowed))
    if unknown:
        raise ValueError(
            f"config.distribution: {name} has no {', '.join(unknown)}; it has {', '.join(allowed)}"
        )
    dense = architectures.dense_layers(config)
    if config.structure == structures.MEASURED:
        dense = structures.DenseWhereQuicker({}, sparsity=config.sparsity, others=dense)
    return DISTRIBUTIONS[name](config.sparsity, dense=dense, **found)


def build(
    config: Config, initial_masks: PyTree | None = None
) -> optax.GradientTransformation | condensed.CondensedTransformation:
    """The optimizer of a run, wrapped by the method.

    Weight decay sits inside, so that the growth score is the gradient of the loss
    without it (paper, section 3; TF reference). So does the clipping: its norm is that of the
    gradient of the active weights.

    Args:
      config: Of the run.
      initial_masks: For methods whose first masks are not drawn from the seed.

    Returns:
      What trains masked parameters, or with `config.condensed` stored blocks.

    Raises:
      ValueError: If `method_options` has a name that the method does not take, or there is no such
        optimizer; if `condensed` does not go with another key.
    """
    if config.optimizer not in OPTIMIZERS:
        raise ValueError(
            f"config.optimizer={config.optimizer!r}: optimizers are {', '.join(OPTIMIZERS)}"
        )
    parts = [
        optax.add_decayed_weights(config.weight_decay, mask=_DECAYED[config.weight_decay_on]),
        OPTIMIZERS[config.optimizer](learning_rate(config), config.momentum),
    ]
    if config.gradient_clip:
        parts.insert(0, optax.clip_by_global_norm(config.gradient_clip))
    inner = optax.chain(*parts)
    method = find(config)
    layers = distribution(config)
    if config.condensed:
        return _condensed(config, inner)
    if method.transform is None:
        if config.method_options:
            raise ValueError(
                f"config.method_options={config.method_options!r}: {config.method} has none"
            )
        return inner
    arguments = method.arguments(config) | {"seed": config.seed} | options(config)
    if config.structure:
        if not takes_structure(method):
            able = [name for name, m in METHODS.items() if takes_structure(m)]
            raise ValueError(
                f"config.structure={config.structure!r}: {config.method} decides on single "
                f"weights; methods that rank groups are {', '.join(able)}"
            )
        arguments["structure"] = structures.parse(config.structure)
    if initial_masks is not None:
        arguments["initial_masks"] = initial_masks
    if method.takes_sparsity:
        return method.transform(inner, layers, **arguments)
    return method.transform(inner, **arguments)


def _condensed(
    config: Config, inner: optax.GradientTransformation
) -> condensed.CondensedTransformation:
    method = find(config)
    if method.stored is None:
        able = [name for name, m in METHODS.items() if m.stored is not None]
        raise ValueError(
            f"config.method={config.method!r}: methods of stored blocks, for "
            f"config.condensed=True, are {', '.join(able)}"
        )
    if not config.structure:
        raise ValueError(
            "config.structure='': must be blocks, as 'Block(16, 16)', with config.condensed=True"
        )
    if config.structure != structures.MEASURED:
        structures.parse(config.structure)
    for key, only in {"mesh_params": 1, "mesh_axes": "auto"}.items():
        if getattr(config, key) != only:
            raise ValueError(
                f"config.{key}={getattr(config, key)!r}: must be {only!r} with "
                "config.condensed=True: stored blocks are whole on every device"
            )
    seed = {"seed": config.seed} if "seed" in inspect.signature(method.stored).parameters else {}
    return method.stored(inner, **(method.arguments(config) | seed | options(config)))


def design(config: Config, tx: Any, shapes: PyTree) -> Design | None:
    """What a run's transformation was built from; None for a dense run.

    A condensed one starts from topologies that it is given. They are where the masked form of the
    same run has its blocks, so the design of that one tells of both.

    Args:
      config: Of the run.
      tx: From `build`.
      shapes: Of the dense parameters.
    """
    if not config.condensed:
        return design_of(tx)
    method, sparsities = find(config), distribution(config)(shapes)
    assert method.transform is not None
    dims = {path: tuple(leaf.shape) for path, leaf in _paths.flatten_with_paths(shapes)}
    found = structures.of_layers(config.structure, dims, sparsities)
    blocks = {f"^{re.escape(path)}$": found[path] for path, s in sparsities.items() if s}
    arguments = method.arguments(config) | {"seed": config.seed} | options(config)
    masked = method.transform(optax.identity(), distribution(config), structure=blocks, **arguments)
    return design_of(masked)


def options(config: Config) -> dict[str, Any]:
    """The method's arguments from `config.method_options`, as `momentum=0.99,redistribute=True`.

    Raises:
      ValueError: If it cannot be read, or the method has no such argument; it lists those
        there are.
    """
    example = "momentum=0.99,redistribute=True"
    found = config_lib.keywords(config.method_options, "method_options", example)
    method = find(config)
    transform = method.stored if config.condensed else method.transform
    allowed: list[str] = []
    if transform is not None:
        named = inspect.signature(transform).parameters.values()
        allowed = [p.name for p in named if p.kind is p.KEYWORD_ONLY and p.name != "initial_masks"]
    unknown = sorted(set(found) - set(allowed))
    if unknown:
        form = " of stored blocks (config.condensed=True)" * config.condensed
        raise ValueError(
            f"config.method_options: {config.method}{form} has no {', '.join(unknown)}; it has "
            f"{', '.join(allowed) or 'none'}"
        )
    # What the loop is to know as well has a key of its own.
    scheduled = sorted(set(found) & {"begin", "end", "every", "seed", "structure"})
    if scheduled:
        raise ValueError(
            f"config.method_options: {', '.join(scheduled)} follow from config.rewire_every, "
            "config.rewire_until, config.seed and config.structure"
        )
    return found


def takes_structure(method: Method) -> bool:
    """Whether the method ranks groups of weights."""
    transform = method.transform
    return transform is not None and "structure" in inspect.signature(transform).parameters


def can_be_stored(config: Config, structure: str) -> bool:
    """Whether the method has a form for stored blocks, and these are blocks."""
    if structure == structures.MEASURED:
        return find(config).stored is not None
    found = structures.parse(structure)
    kinds = found.values() if isinstance(found, Mapping) else [found]
    return find(config).stored is not None and all(isinstance(x, rigl_optax.Block) for x in kinds)


def learning_rate(config: Config) -> optax.Schedule:
    """The learning rate at each step: a linear rise from 0, then what the schedule says.

    Its anchors are fractions of the run, so a run that is M times as long has them M times as late.
    """
    warmup = config.step_at(config.warmup)
    rest: optax.Schedule
    if config.schedule == "cosine":
        rest = optax.cosine_decay_schedule(config.learning_rate, max(1, config.steps - warmup))
    else:
        drops = [config.step_at(fraction) - warmup for fraction in config.decay_at]
        rest = optax.piecewise_constant_schedule(
            config.learning_rate,
            # Two anchors of a very short run may be one step.
            {drop: config.decay_factor ** drops.count(drop) for drop in drops},
        )
    if not warmup:
        return rest
    rise = optax.linear_schedule(0.0, config.learning_rate, warmup)
    return optax.join_schedules([rise, rest], [warmup])


@functools.lru_cache(maxsize=64)
def plan(config: Config) -> RewiringPlan | None:
    """When the run rewires, as the transformation itself has it; None for never."""
    tx = build(config)
    if isinstance(tx, condensed.CondensedTransformation):
        return tx.plan
    found = design_of(tx)
    return None if found is None else found.plan


def rewires(config: Config) -> bool:
    """Whether the masks change."""
    return plan(config) is not None


def rewirings_before(config: Config, step: int) -> int:
    """How many rewirings the schedule holds before this step, so after `step` updates."""
    found = plan(config)
    return 0 if found is None else found.rewirings_before(step)


def is_rewiring(config: Config, step: int) -> bool:
    """Whether update number `step`, counted from 0, may change the masks."""
    found = plan(config)
    return found is not None and found.rewires_at(step)


def is_observed(config: Config, step: int) -> bool:
    """Whether the masks are looked at after update `step`: where they may have changed.

    Where that is at every step, only before records of the training loss.
    """
    found = plan(config)
    if found is not None and any(schedule.every == 1 for schedule in found.schedules):
        return (step + 1) % config.log_every == 0 or step + 1 == config.steps
    return is_rewiring(config, step)


def growth_predicate(config: Config) -> Callable[[jax.Array], jax.Array] | None:
    """Tells of a step (int32 scalar) whether its update grows weights by their gradient.

    None if no step of this method does.
    """
    found = plan(config)
    if found is None or not find(config).grows_by_gradient:
        return None
    return found.is_rewiring_step


def drop_fractions(config: Config, step: int, paths: Sequence[str]) -> dict[str, float]:
    """Fractions of the active weights that a rewiring at this step replaces.

    Returns:
      `drop_fraction`, and `drop_fraction/path` of each layer in `paths` that has another schedule
      of its own; nothing for a method that is given no drop fraction.
    """
    found = plan(config)
    if found is None or "drop_fraction" not in find(config).arguments(config):
        return {}
    values = {"drop_fraction": float(found.default.drop_fraction(jnp.int32(step)))}
    for path in paths:
        if (own := found.of(path)) is not found.default:
            values[f"drop_fraction/{path}"] = float(own.drop_fraction(jnp.int32(step)))
    return values


def _kernels(params: PyTree) -> PyTree:
    """True for the leaves with at least two dimensions."""
    return jax.tree.map(lambda leaf: leaf.ndim >= 2, params)


def _kernels_but_depthwise(params: PyTree) -> PyTree:
    """True for the kernels but those of depthwise convolutions, as the models here name them."""
    named = _paths.flatten_with_paths(params)
    decayed = [leaf.ndim >= 2 and "depthwise" not in path.split("/") for path, leaf in named]
    return jax.tree.unflatten(jax.tree.structure(params), decayed)


_DECAYED: dict[str, Callable[[PyTree], PyTree]] = {
    "kernels": _kernels,
    "kernels_but_depthwise": _kernels_but_depthwise,
    "all": lambda params: jax.tree.map(lambda leaf: True, params),
}
