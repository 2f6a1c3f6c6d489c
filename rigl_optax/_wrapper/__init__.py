"""One call of `update`: the wrapper around an Optax optimizer that every method is made of."""
