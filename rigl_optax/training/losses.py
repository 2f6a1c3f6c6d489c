"""The loss: cross-entropy, with labels that may be smoothed."""

import jax
import jax.numpy as jnp
import optax


def cross_entropy(logits: jax.Array, labels: jax.Array, label_smoothing: float = 0.0) -> jax.Array:
    """Computes the cross-entropy of each label, in nats: float32 (...,).

    With smoothing a part of each label is spread evenly over all classes, the right one included.

    Args:
      logits: (..., classes).
      labels: Integers (...,).
      label_smoothing: That part.

    Examples:
      >>> import jax.numpy as jnp
      >>> round(float(cross_entropy(jnp.zeros((1, 4)), jnp.array([2]), 0.1)[0]), 4)
      1.3863
    """
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    if not label_smoothing:
        return losses
    even = jax.nn.logsumexp(logits, -1) - jnp.mean(logits, -1)
    return (1 - label_smoothing) * losses + label_smoothing * even
