"""Writes docs/optimizers.md from the catalogue that the tests run: python docs/optimizers.py."""

import pathlib
import sys

ROOT = pathlib.Path(__file__).parent.parent
PAGE = ROOT / "docs" / "optimizers.md"
INTRODUCTION = """# Optimizers

What can be inside `rigl(inner, ...)`, and what can be around it. Each row is a test
(`tests/core/catalogue.py`, `tests/core/test_catalogue.py`): a network with kernels, biases and
bfloat16 gradients is trained over several rewirings; after every `apply_updates` each inactive
weight is exactly 0 and the numbers of active weights are unchanged. `python docs/optimizers.py`
writes this page, and a test compares it with the catalogue.

| verdict | meaning |
|---|---|
| **works** | sparse and exact; the optimizer's state of a newborn weight is at rest |
| **works, not reset per weight** | sparse and exact; some of the optimizer's statistics belong to \
no single weight and are left alone at a rewiring |
| **cannot work** | by its nature; a test shows how it fails |

The wrapper comes last: what scales or adds to the updates of `rigl` afterwards keeps inactive
weights from landing on 0. Put such things inside. `rigl_optax.check(params, opt_state)`, called
outside of jit after a few steps, raises if an inactive weight is not 0, and names the layers.

Some wrappers give our transformation a part of the parameters (`optax.partition`,
`optax.masked`). Then `rigl_optax.get_masks(opt_state, params)` returns the tree of all of them,
with full masks for the others. Without `params` a scalar True stands for those; every function
that takes masks takes that too.

## How to freeze layers

A layer that is frozen *inside* would still be rewired, and lose weights that never come back.
`init` refuses where it can see that a sparse layer ignores its gradient. Freeze around instead, so
that the method sees only what trains:

```python
import optax, rigl_optax

tx = optax.partition(
    {"train": rigl_optax.rigl(optax.adamw(1e-3), 0.9, end=25_000), "frozen": optax.set_to_zero()},
    {"encoder": "frozen", "head": "train"},
)
```

Or keep the layer dense (`dense=` of the distribution) and freeze it inside; or freeze a sparse
layer under `static_sparse`, which rewires nothing.

## Several methods in one partition

Each part draws its masks by its own seed and the index of a leaf in that part. Two transformations
of the same `seed` draw the same masks for leaves of one shape at the same index: give each a seed
of its own.

## Number formats

- **float16.** Adam's `eps=1e-8` is 0 in float16, and an inactive weight, whose gradient and
  averages are 0, would be 0 / 0; a norm or a clip inside would spread the NaN. Within the
  optimizer of a tree with float16 (or narrower) leaves such quotients are 0, as they are in
  float32. An active weight whose squared gradient underflows is divided by 0, as in plain Optax:
  give an `eps` of at least 1e-7, or keep weights in bfloat16 or float32.
- **Mixed dtypes.** Updates have the dtype that holds both update and parameter: only so can a
  weight land on 0 exactly. Wrappers that put the update in a `lax.cond` (`apply_if_finite`,
  `conditionally_mask`, `conditionally_transform`) need updates of the gradients' dtype. With
  gradients narrower than the parameters, put the wrapper inside,
  `rigl(optax.apply_if_finite(...))`, or cast them in front:

```python
cast = optax.stateless_with_tree_map(lambda g, p: g.astype(p.dtype))
tx = optax.chain(cast, optax.apply_if_finite(rigl_optax.rigl(optax.adam(1e-3), 0.9, end=1_000), 3))
```
"""


def table(rows: list[dict[str, str]], heading: str) -> list[str]:
    """A section with a row for each call."""
    lines = [f"\n## {heading}\n", "| call | verdict | why |", "|---|---|---|"]
    for row in rows:
        call = row["call"].replace("|", "\\|")
        lines.append(f"| `{call}` | {row['verdict']} | {row['why']} |".replace("|  |", "| |"))
    return lines


def page() -> str:
    """The page, from the catalogue."""
    sys.path.insert(0, str(ROOT))
    from tests.core import catalogue

    rows = catalogue.rows()
    lines = [INTRODUCTION.rstrip()]
    for where, heading in (("inside", "Inside `rigl(...)`"), ("around", "Around `rigl(...)`")):
        lines += table([row for row in rows if row["where"] == where], heading)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
