"""How sparse each layer of a run is, and which weights are active together: from the config."""

import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import rigl_optax
from rigl_optax import DenseLayers, Unstructured, _paths, condensed, default_dense
from rigl_optax._axes import Axes, default_axes
from rigl_optax._distributions import DensePredicate, dense_reason
from rigl_optax._structures import Structure, Structures, by_path
from rigl_optax.training import architectures
from rigl_optax.training import config as config_lib
from rigl_optax.training.config import Config

DISTRIBUTIONS: dict[str, Callable[..., Any]] = {
    "erk": rigl_optax.erk,
    "erdos_renyi": rigl_optax.erdos_renyi,
    "uniform": rigl_optax.uniform,
}
STRUCTURES: dict[str, Callable[..., Any]] = {
    "unstructured": rigl_optax.Unstructured,
    "block": rigl_optax.Block,
    "nm": rigl_optax.NM,
    "constant_fan_in": rigl_optax.ConstantFanIn,
}
MEASURED = "measured"  # the fastest blocks of each layer, by the table of `condensed.choose`


def distribution(config: Config) -> Any:
    """Returns the layer-wise distribution of the config's sparsity, a function of params."""
    section = config.method.distribution
    make = DISTRIBUTIONS[section.name]
    named = inspect.signature(make).parameters.values()
    functions = ("dense", "axes")
    allowed = [p.name for p in named if p.kind is p.KEYWORD_ONLY and p.name not in functions]
    config_lib.check_options("method.distribution", section.name, section.options, allowed)
    options = dict(section.options)
    if "overrides" in options:
        key = "method.distribution.overrides"
        options["overrides"] = config_lib.pairs(options["overrides"], key)
    if stacked := architectures.stacked(config):
        given = options.get("stacked", ())
        options["stacked"] = given if isinstance(given, str) else (*stacked, *given)
    dense = architectures.dense_layers(config)
    if config.method.structure.name == MEASURED:
        dense = DenseWhereFaster({}, sparsity=config.method.sparsity, others=dense)
    return make(config.method.sparsity, dense=dense, **options)


def rescaling(config: Config) -> Callable[[Any, Any], Any] | None:
    """Returns `rescale(params, masks)` of `config.method.sparse_aware_init`; None for `none`."""
    mode: Any = config.method.sparse_aware_init
    if mode == "none":
        return None
    stacked = distribution(config).stacked_paths

    def rescale(params: Any, masks: Any) -> Any:
        exact = [f"^{re.escape(path)}$" for path in stacked(params)]
        return rigl_optax.sparse_aware_init(params, masks, mode=mode, stacked=exact)

    return rescale


def structures(config: Config) -> Structures:
    """Returns the structure of the run, or structures by pattern; not for `measured`.

    Raises:
      ValueError: If a structure lacks an argument, or has one that it does not take.
    """
    section = config.method.structure
    general = _structure(section)
    if not section.layers:
        return general
    each = {pattern: _structure(one) for pattern, one in section.layers}
    if section.name != "unstructured":
        raise ValueError(
            f"config.method.structure.name={section.name!r}: must be 'unstructured' with "
            f"config.method.structure.layers, which give patterns a structure of their own"
        )
    return each


def check_structure(section: config_lib.Structure) -> None:
    """Raises a ValueError if a structure lacks an argument, or has one that it does not take."""
    for each in (section, *(one for _, one in section.layers)):
        _structure(each)


def structure_of_layers(
    config: Config, shapes: Mapping[str, tuple[int, ...]], sparsities: Mapping[str, float]
) -> dict[str, Structure]:
    """Returns the structure of each sparse layer.

    Args:
      config: The run's.
      shapes: Of the sparse layers.
      sparsities: Of them.

    Raises:
      ValueError: As `structures`; if a pattern matches no layer, or two match one.
    """
    if config.method.structure.name != MEASURED:
        return by_path(structures(config), list(sparsities))
    chosen = {path: condensed.choose(shapes[path], sparsities[path]).block for path in sparsities}
    return {path: Unstructured() if block is None else block for path, block in chosen.items()}


def describe(section: config_lib.Structure) -> str:
    """Returns a few words for a structure, for tables and folders; none for single weights."""
    options = section.options
    if section.layers:
        return "structures by layer"
    if section.name == "block":
        words = f"{options.get('rows')}x{options.get('cols')} blocks"
        more = [k for k in ("pad",) if options.get(k)] + [str(options.get("pool_by", ""))]
        return " ".join(filter(None, [words, *more])).replace("pad", "padded")
    if section.name == "nm":
        both = " both ways" * bool(options.get("transposable"))
        return f"{options.get('n')} of {options.get('m')}{both}"
    if section.name == "constant_fan_in":
        return f"constant fan-in {options.get('min_salient', '')}".rstrip()
    return "" if section.name == "unstructured" else section.name


def ablates(config: Config, path: str) -> bool:
    """Returns whether `method.structure` lets units of the sparse leaf at this path be ablated."""
    structure = structures(config)
    if not isinstance(structure, Mapping):
        return structure.min_salient > 0
    return any(
        one.min_salient > 0 and _paths.compile_pattern(pattern, "structure").search(path)
        for pattern, one in structure.items()
    )


@dataclasses.dataclass(frozen=True)
class DenseWhereFaster(DenseLayers):
    """Keeps layers dense in which stored blocks would be slower, and others for other reasons.

    Attributes:
      sparsity: The sparsity of the blocks whose speed is compared.
      others: What else stays dense; in place of `because`.
    """

    sparsity: float = 0.0
    others: DensePredicate = default_dense

    def reason(self, path: str, leaf: Any, axes: Axes = default_axes) -> str | None:
        """Returns why a leaf is kept dense; None if it is not."""
        others = self.others.reason if isinstance(self.others, DenseLayers) else dense_reason
        if (found := others(path, leaf, axes)) is not None:
            return found
        choice = condensed.choose(tuple(leaf.shape), self.sparsity)
        if choice.pays:
            return None
        if choice.block is None:
            return "narrower than a block"
        return f"blocks would be {choice.ratio:.2g} times as fast as dense"


def _structure(section: config_lib.Structure) -> Any:
    if section.name == MEASURED:
        return Unstructured()
    make = STRUCTURES[section.name]
    allowed = list(inspect.signature(make).parameters)
    config_lib.check_options("method.structure", section.name, section.options, allowed)
    try:
        return make(**section.options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"config.method.structure: {error}") from None
