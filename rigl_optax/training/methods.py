"""Makes the optimizer of a run; the one place of training that knows methods by name."""

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import optax

import rigl_optax
from rigl_optax import _paths, accounting, condensed
from rigl_optax._plan import RewiringPlan
from rigl_optax._wrapper._design import Design, design_of
from rigl_optax.methods import _facts
from rigl_optax.methods._facts import Facts
from rigl_optax.training import config as config_lib
from rigl_optax.training import optimizers, sparsity
from rigl_optax.training.config import Config

PyTree = Any
Inner: TypeAlias = optax.GradientTransformation


class Method(NamedTuple):
    """A method: how it is built from a config, and what the loop has to know about it.

    Attributes:
      facts: What is true of it, whatever it trains.
      cost: What its steps cost, against dense ones.
      arguments: `arguments(config)` returns the transformation's keyword arguments.
      start: Where the first masks come from, if not from the seed: a name in
        `rigl_optax.training.first_masks`.
      takes_sparsity: Whether the transformation takes the distribution.
      narrow: Whether the network is made as small as the sparse one instead.
      stored: The transformation that does the same to stored blocks, if there is one.
    """

    facts: Facts
    cost: accounting.MethodCost
    arguments: Callable[[Config], dict[str, Any]] = lambda config: {}
    start: str | None = None
    takes_sparsity: bool = True
    narrow: bool = False
    stored: Callable[..., condensed.CondensedTransformation] | None = None

    @property
    def transform(self) -> Callable[..., Inner] | None:
        """The transformation; None for the dense optimizer itself."""
        return self.facts.transform

    @property
    def masked(self) -> bool:
        """Whether there are masks."""
        return self.facts.transform is not None

    @property
    def grows_by_gradient(self) -> bool:
        """Whether growth needs the gradients of inactive weights."""
        return self.facts.grows_by_gradient

    @property
    def keeps_counts(self) -> bool:
        """Whether the number of active weights of a layer never changes."""
        return self.facts.keeps_counts


def _rewiring(config: Config) -> dict[str, Any]:
    return {
        "end": config.rewire_end,
        "every": config.method.every,
        "drop_fraction": _drop_fraction(config),
    }


def _drop_fraction(config: Config) -> float | optax.Schedule:
    alpha, end = config.method.drop_fraction, config.rewire_end
    return {
        "cosine": alpha,  # what a number means to every method
        "constant": rigl_optax.constant_drop_fraction(alpha),
        "linear": rigl_optax.linear_drop_fraction(alpha, end),
        "inverse_power": rigl_optax.inverse_power_drop_fraction(alpha, end),
        "stages": optax.piecewise_constant_schedule(alpha, {end // 3: 0.5, 2 * end // 3: 0.5}),
    }[config.method.drop_schedule]


def _seldom(config: Config) -> dict[str, Any]:
    # ITOP: fewer rewirings, so that each weight is trained long enough before it may be dropped,
    # and a larger part at each. Its own runs have Delta T 4,000 of 100,000 steps and 0.5.
    return {
        "end": config.rewire_end,
        "every": 4 * config.method.every,
        "drop_fraction": 0.5,
    }


def _pruning(config: Config) -> dict[str, Any]:
    begin = config.step_at(config.method.prune_from)
    if begin > config.rewire_end:
        raise ValueError(
            f"config.method.prune_from={config.method.prune_from}: must not be after "
            f"config.method.until={config.method.until}"
        )
    return _pruning_between(begin, config.rewire_end, config.method.every)


def _pruning_in_the_middle(config: Config) -> dict[str, Any]:
    # "The journey matters" (Jin et al., 2025) finds this near the best; there of the FLOPs.
    return _pruning_between(config.step_at(0.25), config.step_at(0.75), config.method.every)


def _pruning_between(begin: int, last: int, every: int) -> dict[str, Any]:
    # The last one is on the grid.
    return {"begin": last - (last - begin) // every * every, "end": last + 1, "every": every}


def _hard_thresholding(config: Config) -> dict[str, Any]:
    return {"end": config.rewire_end}


def _top_kast(config: Config) -> dict[str, Any]:
    # Twice as many weights learn as are seen: 80 and 50 %, 90 and 80 % in the paper.
    return {
        "backward_sparsity": max(0.0, 1 - 2 * (1 - config.method.sparsity)),
        "every": config.method.every,
    }


def _deep_rewiring(config: Config) -> dict[str, Any]:
    # On the validation split of Fashion-MNIST at 95 %, seed 100: 1e-6, 1e-4 and 1e-3 within 0.1
    # points, 5e-3 worse by 2, and noise no help (docs/results.md).
    return {"learning_rate": optimizers.learning_rate(config), "l1": 1e-3, "temperature": 0.0}


def _soft_thresholding(config: Config) -> dict[str, Any]:
    # How sparse it becomes is learned: the decays that came nearest to each sparsity on the
    # validation split of Fashion-MNIST, with seed 100 (docs/results.md).
    nearest = min(_DECAYS, key=lambda s: abs(s - config.method.sparsity))
    return {"threshold_decay": _DECAYS[nearest], "layers": rigl_optax.uniform(0.0)}


_DECAYS = {0.9: 1.1e-2, 0.95: 1.65e-2, 0.98: 2.8e-2}


def _method(name: str, **keys: Any) -> Method:
    return Method(_facts.METHODS[name], accounting.METHODS[name], **keys)


# What the config has to do with each method; what is not here needs no arguments.
_FROM_CONFIG: dict[str, dict[str, Any]] = {
    "small_dense": {"narrow": True},
    "static": {"stored": condensed.static_sparse},
    "snip": {"start": "snip"},
    "grasp": {"start": "grasp"},
    "synflow": {"start": "synflow"},
    "set": {"arguments": _rewiring, "stored": condensed.sparse_evolutionary_training},
    "mest": {"arguments": _rewiring, "stored": condensed.mest},
    "mest_soft": {"arguments": _rewiring},
    "cht": {"arguments": _rewiring},
    "cht_soft": {"arguments": _rewiring},
    "deepr": {"arguments": _deep_rewiring},
    "snfs": {"arguments": _rewiring},
    "snfs_redistribute": {"arguments": _rewiring},
    "dsr": {"arguments": _rewiring},
    "rigl": {"arguments": _rewiring, "stored": condensed.rigl},
    "rigl_itop": {"arguments": _seldom},
    "gmp": {"arguments": _pruning},
    "gmp_global": {"arguments": _pruning},
    "gmp_25_75": {"arguments": _pruning_in_the_middle},
    "granet": {"arguments": _rewiring},
    "acdc": {"arguments": _pruning},
    "spdf": {"arguments": lambda config: {"dense_from": config.rewire_end}},
    "iht": {"arguments": _hard_thresholding},
    "top_kast": {"arguments": _top_kast},
    "str": {"arguments": _soft_thresholding, "takes_sparsity": False},
    "lottery": {"start": "ticket"},
    "lottery_rigl": {"arguments": _rewiring, "start": "ticket"},
}

METHODS = {name: _method(name, **_FROM_CONFIG.get(name, {})) for name in _facts.METHODS}


def find(config: Config) -> Method:
    """Returns the method that the config names.

    Raises:
      ValueError: If there is none of that name; it lists those there are.
    """
    if config.method.name not in METHODS:
        raise ValueError(
            f"config.method.name={config.method.name!r}: methods are {', '.join(METHODS)}"
        )
    return METHODS[config.method.name]


def build(
    config: Config, initial_masks: PyTree | None = None, factors: PyTree | None = None
) -> optax.GradientTransformation | condensed.CondensedTransformation:
    """Makes the optimizer of a run, wrapped by the method.

    Args:
      config: Of the run.
      initial_masks: For methods whose first masks are not drawn from the seed.
      factors: Numbers that multiply the learning rate of each leaf, as in `optimizers.build`.

    Returns:
      What trains masked parameters, or with `config.method.condensed` stored blocks.

    Raises:
      ValueError: If the method has no such option, the optimizer does not exist, or `condensed`
        does not go with another key.
    """
    inner = optimizers.build(config, factors)
    method, layers = find(config), sparsity.distribution(config)
    if config.method.condensed:
        return _condensed(config, inner)
    given = options(config)
    if config.method.structure.name == sparsity.MEASURED:
        raise ValueError(
            "config.method.structure.name='measured': only with "
            "config.method.condensed=True, whose products were measured"
        )
    structure = sparsity.structures(config)
    if structure != rigl_optax.Unstructured() and not takes_structure(method):
        able = [name for name, m in METHODS.items() if takes_structure(m)]
        raise ValueError(
            f"config.method.structure={config_lib.to_json(config.method.structure)}: "
            f"{config.method.name} decides on single weights; methods that rank groups are "
            f"{', '.join(able)}"
        )
    if method.transform is None:
        return inner
    arguments = method.arguments(config) | {"seed": config.seed} | given
    if takes_structure(method):
        arguments["structure"] = structure
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
            f"config.method.name={config.method.name!r}: methods of stored blocks, for "
            f"config.method.condensed=True, are {', '.join(able)}"
        )
    is_measured = config.method.structure.name == sparsity.MEASURED
    if not is_measured and sparsity.structures(config) == rigl_optax.Unstructured():
        raise ValueError(
            "config.method.structure.name='unstructured': must be 'block' or 'measured' with "
            "config.method.condensed=True, as --config.method.structure.name=block "
            "--config.method.structure.rows=16 --config.method.structure.cols=16"
        )
    for key, value, only in (
        ("params", config.mesh.params, 1),
        ("axes", config.mesh.axes, "auto"),
    ):
        if value != only:
            raise ValueError(
                f"config.mesh.{key}={value!r}: must be {only!r} with config.method.condensed=True: "
                "stored blocks are whole on every device"
            )
    seed = {"seed": config.seed} if "seed" in inspect.signature(method.stored).parameters else {}
    return method.stored(inner, **(method.arguments(config) | seed | options(config)))


def design(config: Config, tx: Any, shapes: PyTree) -> Design | None:
    """Returns what a run's transformation was built from; None for a dense run.

    A condensed one has no design. Its blocks start where those of the masked form of the same run
    do, so the design of that form is returned.

    Args:
      config: Of the run.
      tx: From `build`.
      shapes: Of the dense parameters.
    """
    if not config.method.condensed:
        return design_of(tx)
    method, layers = find(config), sparsity.distribution(config)
    sparsities = layers(shapes)
    assert method.transform is not None
    dims = {path: tuple(leaf.shape) for path, leaf in _paths.flatten_with_paths(shapes)}
    found = sparsity.structure_of_layers(config, dims, sparsities)
    blocks = {f"^{re.escape(path)}$": found[path] for path, s in sparsities.items() if s}
    arguments = method.arguments(config) | {"seed": config.seed} | options(config)
    masked = method.transform(optax.identity(), layers, structure=blocks, **arguments)
    return design_of(masked)


def options(config: Config) -> dict[str, Any]:
    """Returns the method's own arguments from the config, as `momentum` and `redistribute`.

    Raises:
      ValueError: If the method has no such argument; it lists those there are.
    """
    method, section = find(config), config.method
    transform = method.stored if section.condensed else method.transform
    allowed: list[str] = []
    if transform is not None:
        named = inspect.signature(transform).parameters.values()
        # The others follow from keys that all methods share.
        taken = {"initial_masks", "begin", "end", "every", "seed", "structure", "drop_fraction"}
        allowed = [p.name for p in named if p.kind is p.KEYWORD_ONLY and p.name not in taken]
    if method.narrow:
        allowed = ["mask_bits"]
    form = " (condensed)" * section.condensed
    config_lib.check_options("method", section.name + form, section.options, allowed)
    given = dict(section.options)
    if "overrides" in given:
        each = config_lib.pairs(given["overrides"], "method.overrides")
        given["overrides"] = {pattern: dict(plan) for pattern, plan in each.items()}
    if "grown" in given:
        given["grown"] = _grown(given["grown"])
    return given


def mask_bits(config: Config) -> float:
    """Returns how many bits per weight the masks of the network take that a narrow one stands for.

    Raises:
      ValueError: If it is not a number from 0 to 32.
    """
    bits = options(config).get("mask_bits", 1)
    if isinstance(bits, bool) or not isinstance(bits, int | float) or not 0 <= bits <= 32:
        raise ValueError(f"config.method.mask_bits={bits!r}: must be a number from 0 to 32")
    return float(bits)


def _grown(value: Any) -> rigl_optax.Grown:
    if not isinstance(value, Mapping) or not set(value) <= set(rigl_optax.Grown._fields):
        raise ValueError(
            f"config.method.grown={value!r}: must be a section with keys of "
            f"{', '.join(rigl_optax.Grown._fields)}"
        )
    return rigl_optax.Grown(**value)


def takes_structure(method: Method) -> bool:
    """Tells whether the method ranks groups of weights."""
    transform = method.transform
    return transform is not None and "structure" in inspect.signature(transform).parameters


def can_be_stored(config: Config) -> bool:
    """Returns whether the method has a form for stored blocks, and the structure is of blocks."""
    if config.method.structure.name == sparsity.MEASURED:
        return find(config).stored is not None
    found = sparsity.structures(config)
    kinds = found.values() if isinstance(found, Mapping) else [found]
    return find(config).stored is not None and all(isinstance(x, rigl_optax.Block) for x in kinds)


def plan_of(tx: Any) -> RewiringPlan | None:
    """Returns the plan that a transformation itself rewires by; None if it never does."""
    if isinstance(tx, condensed.CondensedTransformation):
        return tx.plan
    found = design_of(tx)
    return None if found is None else found.plan
