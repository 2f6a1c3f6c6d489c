"""Structures from the string of a config; literals only, nothing is executed."""

import ast
from collections.abc import Callable, Mapping
from typing import Any

from rigl_optax import NM, Block, ConstantFanIn, Unstructured, _paths
from rigl_optax._structure import Structures

STRUCTURES: dict[str, Callable[..., Any]] = {
    "Unstructured": Unstructured,
    "Block": Block,
    "NM": NM,
    "ConstantFanIn": ConstantFanIn,
}
_EXAMPLE = "Block(16, 16), or {'layers/0': Block(16, 16, pad=True), 'layers/1': Block(8, 32)}"


def parse(words: str) -> Structures:
    """What `config.structure` says: a structure, or structures by pattern; empty for none.

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
            f"config.structure={words!r}: must be like {_EXAMPLE}; structures are "
            f"{', '.join(STRUCTURES)}: {error}"
        ) from None


def ablates(words: str, path: str) -> bool:
    """Whether `config.structure` lets units of the sparse leaf at this path be ablated."""
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
