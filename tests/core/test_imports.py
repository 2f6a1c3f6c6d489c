"""What `import rigl_optax` brings: quick, and all that it names."""

import ast
import pathlib
import subprocess
import sys

import numpy as np

import rigl_optax

# From the top to the core: a package imports only those below it.
PACKAGES = ("reports", "training", "models", "data")

PROGRAM = """
import sys
import rigl_optax
LATER = ("accounting", "analysis", "condensed", "export", "training")
for name in ("flax", "orbax", "jax.extend", *(f"rigl_optax.{each}" for each in LATER)):
    assert name not in sys.modules, name
rigl_optax.condensed.CSR, rigl_optax.analysis.churn, rigl_optax.accounting.explain
rigl_optax.export.read, rigl_optax.explain, rigl_optax.small_dense_width
assert "flax" not in sys.modules
"""


def test_import_needs_jax_and_optax_only():
    subprocess.run([sys.executable, "-c", PROGRAM], check=True)


def test_arrows_point_one_way():
    root = pathlib.Path(rigl_optax.__file__).parent
    for path in root.rglob("*.py"):
        package = path.relative_to(root).parts[0]
        above = PACKAGES[: PACKAGES.index(package)] if package in PACKAGES else PACKAGES
        refused = [["rigl_optax", name] for name in above]
        for node in ast.walk(ast.parse(path.read_text())):
            found = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                found = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            assert not [name for name in found if name.split(".")[:2] in refused], path


def test_all_is_complete():
    for name in rigl_optax.__all__:
        assert hasattr(rigl_optax, name)
    own = {n for n, x in vars(rigl_optax).items() if n[0] != "_" and callable(x)}
    assert own <= {*rigl_optax.__all__}
    assert {"condensed", "export"} <= {*dir(rigl_optax)} and rigl_optax.__version__[0].isdigit()


def test_masks_of_an_export_fit_condensed_weights(tmp_path):
    mask = np.eye(4, 3, dtype=bool)
    params = {"w": mask.astype(np.float32), "b": np.ones(3)}
    path = tmp_path / "out.safetensors"
    rigl_optax.export.write(str(path), params, {"w": mask})
    found = rigl_optax.export.read(str(path))
    weights, topologies = rigl_optax.condensed.condense_csr(found.params, found.masks)
    kernels = rigl_optax.condensed.bind(weights, topologies)
    x = np.ones((2, 4), np.float32)
    np.testing.assert_array_equal(x @ kernels["w"], x @ found.params["w"])
