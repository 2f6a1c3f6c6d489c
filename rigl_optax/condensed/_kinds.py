"""Which topology stores a layer of which structure."""

from typing import Any

from rigl_optax._structures import Block, Structure, Unstructured
from rigl_optax.condensed._topology import Topology
from rigl_optax.condensed.blocks._topology import BlockTopology
from rigl_optax.condensed.single._csr_topology import CSRTopology

_KINDS: dict[Any, type[Topology]] = {Block: BlockTopology, Unstructured: CSRTopology}


def kind(structure: Structure, name: str) -> type[Topology]:
    """Returns the class of topologies for a structure.

    Args:
      structure: Of a layer.
      name: Of the layer, for the error.

    Raises:
      ValueError: If layers of this structure are not stored for training.
    """
    if type(structure) not in _KINDS:
        raise ValueError(
            f"{name} has {structure}, for which there is no training of stored weights; "
            "condense_csr stores them to deploy them"
        )
    return _KINDS[type(structure)]
