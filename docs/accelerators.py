"""Writes what products of stored blocks should cost into docs/accelerators.md.

python docs/accelerators.py
"""

import itertools
import pathlib

from rigl_optax import Block
from rigl_optax.condensed import PRODUCTS, product_costs

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "accelerators.md"
BEGIN, END = "<!-- `python docs/accelerators.py` writes these lines -->\n", "<!-- end -->"
# Operations of dense bfloat16 and bytes of memory in a second, by the vendors' data sheets; and the
# products that exist there.
DEVICES = {
    "H200": (989e12, 4.8e12, ("batched", "ragged", "mosaic_gpu")),
    "TPU v5e": (197e12, 819e9, ("batched", "ragged", "pallas")),
}
TOKENS = 8192
SIZES = (64, 128, 256)
WIDTHS = (1024, 4096, 8192)
SPARSITIES = (0.8, 0.9, 0.95)


def page() -> str:
    """The page, with the tables as the function has them."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    return before + BEGIN + _costs() + "\n" + _speedups() + END + rest.partition(END)[2]


def _costs() -> str:
    """Operations and bytes at one width."""
    lines = [
        "| product | pass | GFLOP | MB moved | MB gathered | operations a byte |",
        "|---|---|---|---|---|---|",
    ]
    for product in ("dense", *PRODUCTS):
        costs = product_costs(product, TOKENS, (4096, 4096), Block(128, 128), 0.1)
        for name, cost in costs.items():
            if product == "dense" and name != "forward":
                continue  # all the same
            shown = "each" if product == "dense" else name
            lines.append(
                f"| `{product}` | {shown} | {cost.flops / 1e9:.0f} | {cost.bytes / 1e6:.0f} | "
                f"{cost.gathered / 1e6:.0f} | {cost.flops / cost.bytes:.0f} |"
            )
    return "\n".join(lines) + "\n"


def _speedups() -> str:
    """Times as fast as dense, all three passes together."""
    heads = " | ".join(f"{width}, {100 * s:g} %" for width in WIDTHS for s in SPARSITIES)
    lines = [f"| device | product | blocks | {heads} |", "|---" * (3 + 9) + "|"]
    for device, (flops, moved, products) in DEVICES.items():

        def seconds(product: str, size: int, width: int, sparsity: float) -> float:
            block, peaks = Block(size, size), (flops, moved)  # noqa: B023
            costs = product_costs(product, TOKENS, (width, width), block, 1 - sparsity)
            return sum(cost.seconds(*peaks) for cost in costs.values())

        for product, size in itertools.product(products, SIZES):
            ratios = (
                seconds("dense", size, width, sparsity) / seconds(product, size, width, sparsity)
                for width, sparsity in itertools.product(WIDTHS, SPARSITIES)
            )
            cells = " | ".join(f"{ratio:.1f}" for ratio in ratios)
            lines.append(f"| {device} | `{product}` | {size} | {cells} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
