"""Training runs from configs: the loop, its checkpoints, and everything that looks at a run."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rigl_optax.training.loading import load as load
    from rigl_optax.training.weights import read_weights as read_weights

__all__ = ["load", "read_weights"]


def __getattr__(name: str) -> Any:
    # Only when it is asked for: it takes Flax and Orbax, which most modules here do without.
    if name == "load":
        from rigl_optax.training.loading import load

        return load
    if name == "read_weights":
        from rigl_optax.training.weights import read_weights

        return read_weights
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
