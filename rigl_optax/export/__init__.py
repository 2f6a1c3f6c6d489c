"""Hands a sparse network over to where it runs: to a file, or to a smaller dense network.

`docs/deploy.md` describes the file. Reading and writing it needs the package `safetensors`, which
comes with the `export` and `train` extras; nothing here needs Flax.
"""

from rigl_optax.export._compaction import Compacted as Compacted
from rigl_optax.export._compaction import compact as compact
from rigl_optax.export._file import Export as Export
from rigl_optax.export._file import read as read
from rigl_optax.export._file import write as write
from rigl_optax.export._units import Units as Units
from rigl_optax.export._units import Wires as Wires
