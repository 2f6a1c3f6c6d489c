"""Settings every test shares: eight CPU devices, and hypothesis without a clock."""

import os

# Before any test module touches a backend. Sharding tests need eight devices; everything else
# keeps using the first of them, so the whole suite can live in one process (or one xdist worker).
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Thousands of small programs are compiled here and run for a few steps: most of the time is
# spent in the optimizer of the compiler.
os.environ.setdefault(
    "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)

import hypothesis
import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)

hypothesis.settings.register_profile(
    "rigl",
    deadline=None,  # the first example of a shape compiles, the others do not
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("rigl")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Modules with slow tests come first: what is short fills both workers up to the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
