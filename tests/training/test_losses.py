import jax.numpy as jnp
import numpy as np

from rigl_optax.training import losses


def test_smoothed_labels_are_a_mixture_with_the_even_distribution():
    logits = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32) * 3
    labels = np.array([0, 3, 6, 2, 2])
    target = 0.9 * np.eye(7)[labels] + 0.1 / 7
    log_p = logits - np.log(np.exp(logits.astype(np.float64)).sum(1, keepdims=True))
    found = losses.cross_entropy(jnp.asarray(logits), jnp.asarray(labels), 0.1)
    np.testing.assert_allclose(found, -(target * log_p).sum(1), rtol=1e-5)
    plain = losses.cross_entropy(jnp.asarray(logits), jnp.asarray(labels))
    np.testing.assert_allclose(plain, -log_p[np.arange(5), labels], rtol=1e-5)
