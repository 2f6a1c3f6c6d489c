"""Settings every test shares: how XLA compiles, eight CPU devices, hypothesis without a clock."""

import gc
import importlib.metadata
import os
import pathlib
import shutil
import tempfile

# Before any test module touches a backend. Sharding tests need eight devices; everything else
# keeps using the first of them, so the whole suite can live in one process (or one xdist worker).
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Thousands of small programs are compiled here and run for a few steps: most of the time is
# spent in the compiler. `XLA_FLAGS=` compiles as for everybody else. With XLA's older way of
# emitting fusions, and each program in one part, it takes a fifth as long: `make test` asks for it
# but for tests marked `exact`, since it may round differently in each program. Newer ones no longer
# have it, nor know its flag.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    + " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    * (
        "QUICK_COMPILE" in os.environ
        and importlib.metadata.version("jaxlib").startswith(("0.8.", "0.9.", "0.10."))
    ),
)
# Nor is it of use here which line of the source each operation comes from.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
# What one test has compiled the next ones read: in this process, in other workers, and in the
# processes that tests start, which inherit these variables.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(suffix=f"-compiled-{os.getpid()}")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import hypothesis
import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
# Here most programs are compiled once, and to write one takes a sixth of compiling it. The
# processes that tests start are many of a kind: these write all they compile.
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.25)

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


def pytest_collection_finish() -> None:
    """What was imported stays, as most of what is traced does: to look for garbage takes long.

    With Python's own thresholds it takes a tenth of the time of all tests.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 50, 100)


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Programs are let go when they are many: each holds three memory mappings of a process.

    Linux allows 65,530, and the next compilation is a segmentation fault. Between modules, the
    largest of which compile some thousand programs; those that go are compiled again.
    """
    if nextitem is not None and nextitem.path != item.path and _mappings() > 25_000:
        jax.clear_caches()
        gc.collect()


def _mappings() -> int:
    """Memory mappings of this process, 0 where there is no `/proc`."""
    maps = pathlib.Path("/proc/self/maps")
    return maps.read_bytes().count(b"\n") if maps.exists() else 0


def pytest_unconfigure() -> None:
    """The process that made the cache removes it, after its workers."""
    compiled = os.environ["JAX_COMPILATION_CACHE_DIR"]
    if compiled.endswith(f"-compiled-{os.getpid()}"):
        shutil.rmtree(compiled, ignore_errors=True)
