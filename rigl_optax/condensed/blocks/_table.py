"""Says which product of stored blocks is used where: by platform, blocks and dtype."""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import lax

from rigl_optax._structures import Block
from rigl_optax._types import PyTree
from rigl_optax.condensed.blocks import _product, _ragged

Platform = Literal["cpu", "cuda", "rocm", "tpu"]
Product = Literal["batched", "ragged", "pallas", "mosaic_gpu"]
Key = tuple[Platform | None, int | tuple[int, int] | None, jax.typing.DTypeLike | None]
Table = Mapping[Key, Product]

PLATFORMS: tuple[Platform, ...] = get_args(Platform)
PRODUCTS: tuple[Product, ...] = get_args(Product)
# Nothing has been measured on an accelerator yet, so all use what is there for the CPU.
DEFAULT: Table = {(None, None, None): "batched"}

# On the CPU kernels are interpreted, for tests.
_WHERE: dict[Product, tuple[Platform, ...]] = {
    "batched": PLATFORMS,
    "ragged": PLATFORMS,
    "pallas": ("cpu", "tpu"),
    "mosaic_gpu": ("cuda",),
}


class _Entry(NamedTuple):
    """An entry of a table, checked and hashable."""

    platform: Platform | None
    block: tuple[int, int] | None
    dtype: str | None
    product: Product


# Compiled programs know its value: JAX compiles a function again where the table is another.
_given = jax.make_user_context(())


@contextmanager
def products(table: Table) -> Iterator[None]:
    """Makes products of stored blocks use other implementations within a `with` block.

    Use it to try what is fastest on a device: `make accelerator` times all of them. It holds for
    `x @ kernel` with a `BlockSparse`, and so for linear layers, transformers and 1x1
    convolutions; other convolutions, recurrences and `features_first=True` have a way of their
    own. Results are the same up to rounding. Functions are compiled again under another table.

    - `batched`, the default: on the CPU a loop over the blocks; elsewhere activations of all
      blocks are gathered for one batched product, whose parts a segment sum adds up.
    - `ragged`: `jax.lax.ragged_dot_general`, with a group for each block of outputs (or inputs),
      contracted over the gathered inputs (or outputs) of its blocks. Nothing is added up
      afterwards. Where XLA has no kernel for it, as on the CPU, it multiplies masked copies of
      the activations, one for each group: far slower than dense.
    - `pallas`: kernels for TPUs, which read the list of blocks: nothing is gathered, and sums stay
      on the chip. The size of the batch must be known. On the CPU they are interpreted, for tests:
      very slow.
    - `mosaic_gpu`: kernels for NVIDIA's Hopper, which read the list of blocks likewise. No device
      has run them. Blocks have sides of 64, 128, 192 or 256, and all is bfloat16 or all float16,
      or a product is refused. The size of the batch must be known; neither `shard_map` nor
      explicit axes are supported.

    Args:
      table: `{(platform, block, dtype): product}`. The platform is `cpu`, `cuda`, `rocm` or `tpu`;
        the block is (rows, cols), or a number where they are equal; the dtype is that of the
        product, to which activations and values are promoted. None stands for all; of platforms,
        for those that have the product. The first entry that fits decides; where none fits, the
        default does.

    Raises:
      ValueError: If a platform or product is not one of these, or a block is not positive.
      TypeError: If a dtype does not exist.

    Examples:
      >>> import jax.numpy as jnp, rigl_optax
      >>> from rigl_optax import condensed
      >>> topology = condensed.random_topology((8, 6), 0.5, rigl_optax.Block(4, 3))
      >>> kernel = topology.bind(jnp.ones(topology.values_shape))
      >>> table = {("cuda", 128, "bfloat16"): "ragged", ("cpu", (4, 3), None): "ragged"}
      >>> with condensed.products(table):
      ...     y = jnp.ones((2, 8)) @ kernel
      >>> y.shape
      (2, 6)
    """
    with _given(tuple(_checked(key, product) for key, product in table.items())):
        yield


def chosen(block: Block, dtype: jax.typing.DTypeLike) -> tuple[Product, ...]:
    """Looks up the product of each of `PLATFORMS` for blocks and a dtype."""
    entries = (*_given.value, *(_checked(key, product) for key, product in DEFAULT.items()))
    wanted = ((block.rows, block.cols), jnp.dtype(dtype).name)

    def fits(entry: _Entry, platform: Platform) -> bool:
        asked = (entry.platform, entry.block, entry.dtype)
        is_asked = all(a in (None, w) for a, w in zip(asked, (platform, *wanted), strict=True))
        return is_asked and platform in _WHERE[entry.product]

    return tuple(next(e.product for e in entries if fits(e, p)) for p in PLATFORMS)


def apply(
    name: str, products: tuple[Product, ...], args: tuple[PyTree, ...], *static: Any
) -> PyTree:
    """Calls `forward` or `backward` of the product that each platform has.

    Args:
      name: Of a function of `_product`; those of the others take and return the same.
      products: From `chosen`.
      args: Its arrays.
      static: What it takes after them.
    """
    if len(set(products)) == 1:
        return _function(name, products[0], "cpu")(*args, *static)
    each = {
        platform: functools.partial(_last, _function(name, product, platform), static)
        for platform, product in zip(PLATFORMS, products, strict=True)
    }
    return lax.platform_dependent(*args, **each)


def _function(name: str, product: Product, platform: Platform) -> Callable[..., PyTree]:
    if product == "batched":
        return getattr(_product, name)
    if product == "ragged":
        return getattr(_ragged, name)
    # Imported here, since Pallas takes a while and most programs do not use it.
    if product == "mosaic_gpu":
        from rigl_optax.condensed.blocks import _mosaic_gpu

        return functools.partial(getattr(_mosaic_gpu, name), interpret=False)
    from rigl_optax.condensed.blocks import _pallas_tpu

    return functools.partial(getattr(_pallas_tpu, name), interpret=platform == "cpu")


def _last(function: Callable[..., PyTree], static: tuple[Any, ...], *args: PyTree) -> PyTree:
    return function(*args, *static)


def _checked(key: Key, product: Product) -> _Entry:
    if not isinstance(key, tuple) or len(key) != 3:
        raise ValueError(f"{key!r}: a key of the table must be (platform, block, dtype)")
    platform, block, dtype = key
    if platform is not None and platform not in PLATFORMS:
        raise ValueError(f"platform {platform!r}: must be None or one of {', '.join(PLATFORMS)}")
    if product not in PRODUCTS:
        raise ValueError(f"product {product!r}: must be one of {', '.join(PRODUCTS)}")
    if platform is not None and platform not in _WHERE[product]:
        exists = ", ".join(_WHERE[product])
        raise ValueError(f"product {product!r} on {platform!r}: it exists on {exists}")
    return _Entry(
        platform, _shape(block), None if dtype is None else jnp.dtype(dtype).name, product
    )


def _shape(block: Any) -> tuple[int, int] | None:
    if block is None:
        return None
    sides = (block, block) if isinstance(block, int) else block
    if not (
        isinstance(sides, tuple)
        and len(sides) == 2
        and all(isinstance(n, int) and n > 0 for n in sides)
    ):
        raise ValueError(f"block {block!r}: must be None, a positive number, or two, (rows, cols)")
    return sides
