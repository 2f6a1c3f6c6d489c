"""Writes the sizes of ResNet-50 in docs/deploy.md from its shapes: python docs/sizes.py."""

import math
import pathlib

from flax import nnx

import rigl_optax
from rigl_optax import _paths
from rigl_optax.accounting import storage
from rigl_optax.models import resnet

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "deploy.md"
BEGIN, END = "<!-- `python docs/sizes.py` writes these lines -->\n", "<!-- end -->"
# The reference code's README, in MB: 32 bits for each active weight, a bit for each weight of a
# sparse layer, and a bias for each output channel of all layers.
PUBLISHED = {
    "erk": {0.8: 23.683, 0.9: 13.499, 0.95: 8.399, 0.965: 6.904},
    "uniform": {0.8: 23.685, 0.9: 13.532, 0.95: 8.433, 0.965: 6.904},
}
SPARSITIES = (0.8, 0.9, 0.95, 0.965, 0.98)
BLOCK = 32  # rows and columns


def page() -> str:
    """The page, with the table as the shapes have it."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    return before + BEGIN + _table() + END + rest.partition(END)[2]


def _table() -> str:
    model = nnx.eval_shape(lambda: resnet.ResNet((224, 224, 3), rngs=nnx.Rngs(0)))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    lines = [
        "| sparsity | layers | dense arrays | `sparse` file | CSR | 32x32 blocks | as they count "
        "| published |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, published in PUBLISHED.items():
        dense = rigl_optax.DenseLayers(resnet.dense_layers(name))
        for sparsity in SPARSITIES:
            layers = getattr(rigl_optax, name)(sparsity, dense=dense)(params)
            cells = [f"{size / 1e6:.1f}" for size in _sizes(params, layers)]
            paper = f"{published[sparsity]:.1f}" if sparsity in published else ""
            lines.append(f"| {100 * sparsity:g} % | {name} | {' | '.join(cells)} | {paper} |")
    return "\n".join(lines) + "\n"


def _sizes(params: dict, layers: dict[str, float]) -> tuple[float, ...]:
    """Bytes of dense arrays, of the arrays in the file, of CSR, of blocks, and as published."""
    shapes = {path: leaf.shape for path, leaf in _paths.flatten_with_paths(params)}
    active = {
        p: math.prod(shapes[p]) - math.floor(s * math.prod(shapes[p])) for p, s in layers.items()
    }
    found = storage.storage_at(params, active)
    rest = sum(4 * math.prod(shape) for path, shape in shapes.items() if path not in active)
    file = blocks = rest
    counted = 0.0
    for path, number in active.items():
        size = math.prod(shapes[path])
        is_sparse = number < size
        file += 4 * number + is_sparse * min(math.ceil(size / 8), 4 * number)
        blocks += 4 * number + is_sparse * 8 * math.ceil(number / BLOCK**2)  # a row and a column
    for path, shape in shapes.items():
        if len(shape) > 1:  # a kernel, with a bias for each output channel
            is_sparse = active.get(path, math.prod(shape)) < math.prod(shape)
            counted += 4 * active.get(path, math.prod(shape)) + 4 * shape[-1]
            counted += is_sparse * math.prod(shape) / 8
    return found.dense, file, found.csr, blocks, counted


if __name__ == "__main__":
    PAGE.write_text(page())
