"""Structures from the string of a config; literals only, nothing is executed."""

import ast
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from rigl_optax import (
    NM,
    Block,
    ConstantFanIn,
    DenseLayers,
    Unstructured,
    _paths,
    condensed,
    default_dense,
)
from rigl_optax._distributions import DensePredicate, dense_reason
from rigl_optax._structure import Structure, Structures, by_path

MEASURED = "measured"  # the quickest blocks of each layer, by the table of `condensed.choose`

STRUCTURES: dict[str, Callable[..., Any]] = {
    "Unstructured": Unstructured,
    "Block": Block,
    "NM": NM,
    "ConstantFanIn": ConstantFanIn,
}
_EXAMPLE = "Block(16, 16), or {'layers/0': Block(16, 16, pad=True), 'layers/1': Block(8, 32)}"


def parse(words: str) -> Structures:
    """What `config.method.structure` says: a structure, or structures by pattern; empty for none.

    Not `measured`, which depends on the layers: see `of_layers`.

    Raises:
      ValueError: If it cannot be read, or there is no such structure.
    """
    if not words:
        return Unstructured()
    try:
        node = ast.parse(words.strip(), mode="eval").body
        if not isinstance(node, ast.Dict):
            return _structure(node)
        keys = [ast.literal_eval(key) for key in node.keys if key is not None]
        return dict(zip(keys, map(_structure, node.values), strict=True))
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError(
            f"config.method.structure={words!r}: must be like {_EXAMPLE}; structures are "
            f"{', '.join(STRUCTURES)}, or with config.method.condensed=True {MEASURED!r}: {error}"
        ) from None


@dataclasses.dataclass(frozen=True)
class DenseWhereQuicker(DenseLayers):
    """Keeps layers dense in which stored blocks would be slower, and others for other reasons.

    Attributes:
      sparsity: At which they are judged.
      others: What else stays dense; in place of `because`.
    """

    sparsity: float = 0.0
    others: DensePredicate = default_dense

    def reason(self, path: str, leaf: Any) -> str | None:
        """Why a leaf is kept dense; None if it is not."""
        others = self.others.reason if isinstance(self.others, DenseLayers) else dense_reason
        if (found := others(path, leaf)) is not None:
            return found
        choice = condensed.choose(tuple(leaf.shape), self.sparsity)
        if choice.pays:
            return None
        if choice.block is None:
            return "narrower than a block"
        return f"blocks would be {choice.ratio:.2g} times as fast as dense"


def of_layers(
    words: str, shapes: Mapping[str, tuple[int, ...]], sparsities: Mapping[str, float]
) -> dict[str, Structure]:
    """The structure of each sparse layer.

    Args:
      words: `config.method.structure`.
      shapes: Of the sparse layers.
      sparsities: Of them.

    Raises:
      ValueError: As `parse`; if a pattern matches no layer, or two match one.
    """
    if words != MEASURED:
        return by_path(parse(words), list(sparsities))
    chosen = {path: condensed.choose(shapes[path], sparsities[path]).block for path in sparsities}
    return {path: Unstructured() if block is None else block for path, block in chosen.items()}


def ablates(words: str, path: str) -> bool:
    """Whether `config.method.structure` lets units of the sparse leaf at this path be ablated."""
    structure = parse(words)
    if not isinstance(structure, Mapping):
        return structure.min_salient > 0
    return any(
        one.min_salient > 0 and _paths.compile_pattern(pattern, "structure").search(path)
        for pattern, one in structure.items()
    )


def _structure(node: ast.expr) -> Any:
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        raise ValueError("not a structure")
    if node.func.id not in STRUCTURES:
        raise ValueError(f"there is no {node.func.id}")
    arguments = [ast.literal_eval(value) for value in node.args]
    options = {str(k.arg): ast.literal_eval(k.value) for k in node.keywords}
    return STRUCTURES[node.func.id](*arguments, **options)
