"""Exported files: written and read by us, read by NumPy and by PyTorch alone."""

import importlib.util
import json
import pathlib
import re
import subprocess
import sys

import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from safetensors import numpy as safetensors

from rigl_optax import _paths, export
from rigl_optax.export import _file

ROOT = pathlib.Path(__file__).parents[2]
PAGE = ROOT / "docs" / "deploy.md"


def named(tree):
    return dict(_paths.flatten_with_paths(tree))


def network(density, shape=(13, 7), dtype=np.float32, seed=0):
    """A sparse kernel, a dense one, and a bias that is half zero; the masks of both kernels."""
    rng = np.random.default_rng(seed)
    mask = rng.random(shape) < density
    kernel = np.where(mask, rng.standard_normal(shape), 0).astype(dtype)
    params = {
        "a": {"kernel": kernel, "bias": np.arange(4) % 2.0},
        "b": {"kernel": np.ones((2, 3), np.float32)},
    }
    return params, {"a": {"kernel": mask}, "b": {"kernel": np.ones((2, 3), bool)}}


@pytest.fixture(scope="module", params=[0.4, 0.01], ids=["bits", "indices"])
def written(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "network.safetensors"
    params, masks = network(request.param, shape=(40, 30))
    state = {"norm": {"mean": np.ones(3, np.float32), "key": np.arange(2, dtype=np.uint32)}}
    export.write(path, params, masks, model_state=state, config={"seed": 3})
    return path, params, masks, state


def assert_same(found, expected):
    found, expected = named(found), named(expected)
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert found[name].dtype == x.dtype, name
        np.testing.assert_array_equal(found[name], x)


def test_what_is_written_is_read(written):
    path, params, masks, state = written
    found = export.read(path)
    assert_same(found.params, params)
    assert_same(found.masks, masks)
    assert_same(found.model_state, state)
    assert found.config == {"seed": 3}


def test_the_smaller_form_is_chosen(written):
    path, params, masks, _ = written
    arrays = safetensors.load_file(path)
    active = int(masks["a"]["kernel"].sum())
    assert arrays["params/a/kernel"].shape == (active,)
    places = {name: x for name, x in arrays.items() if name.startswith(("bits", "indices"))}
    [(name, x)] = places.items()
    assert name.endswith("/a/kernel") and x.nbytes == min(4 * active, 1200 // 8)


@hypothesis.settings(max_examples=30)
@hypothesis.given(
    density=st.sampled_from([0.0, 0.02, 0.5, 0.97]),
    shape=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    dtype=st.sampled_from([np.float16, np.float32, np.float64, jnp.bfloat16]),
    seed=st.integers(0, 5),
)
def test_any_leaf_comes_back(density, shape, dtype, seed):
    params, masks = network(density, tuple(shape), np.dtype(dtype), seed)
    data = _file.serialized(params, masks)
    found = _file._unpacked(*_file.parse(data), 10**6)
    assert_same(found.params, params)
    assert_same(found.masks, masks)


def code_below(title):
    """Returns the code of the page below a title, without what it does with the function."""
    code = PAGE.read_text().partition(f"### {title}\n")[2]
    return re.search(r"```python\n(.*?)```", code, re.DOTALL).group(1).partition("\n\n\nweights")[0]


def check_reader(read, path, params, masks, state):
    weights, found, arrays, about = read(path)
    assert_same({n: np.asarray(x) for n, x in weights.items()}, named(params))
    assert_same({n: np.asarray(x) for n, x in found.items()}, named(masks))
    assert_same({n: np.asarray(arrays[f"state/{n}"]) for n in named(state)}, named(state))
    assert json.loads(about["config"]) == {"seed": 3}


def test_numpy_alone_reads_it(written):
    code, scope = code_below("A reader in NumPy"), {"np": np}
    exec(compile(code, PAGE.name, "exec"), scope)
    assert len([line for line in code.splitlines() if line.strip()]) <= 30
    check_reader(scope["read_numpy"], *written)


def python_with_torch():
    if importlib.util.find_spec("torch"):
        return sys.executable
    own = ROOT / ".venv-torch" / "bin" / "python"
    if not own.exists():
        pytest.skip("PyTorch is not installed; `make .venv-torch/.installed` installs it")
    return str(own)


SAVE = """
import sys
import numpy as np
*trees, about = read_torch(sys.argv[1])
arrays = {f"{i}/{n}": x.numpy() for i, tree in enumerate(trees) for n, x in tree.items()}
np.savez(sys.argv[2], **arrays)
print(json.dumps(about))
"""


def test_pytorch_reads_it(written, tmp_path):
    script, out = tmp_path / "read.py", tmp_path / "found.npz"
    script.write_text(code_below("A reader in PyTorch") + SAVE)
    path, *rest = written
    done = subprocess.run(
        [python_with_torch(), str(script), str(path), str(out)],
        check=True,
        capture_output=True,
        text=True,
    )
    trees = [{}, {}, {}]
    with np.load(out) as file:
        for name in file:
            number, _, name_of_leaf = name.partition("/")
            trees[int(number)][name_of_leaf] = file[name]
    check_reader(lambda _: (*trees, json.loads(done.stdout)), path, *rest)


def test_what_cannot_be_written_is_refused(tmp_path):
    params, masks = network(0.4)
    path = tmp_path / "network.safetensors"
    with pytest.raises(ValueError, match=r"inactive weights of 'a/kernel' are not zero; pass"):
        export.write(path, {**params, "a": {"kernel": np.ones((13, 7))}}, masks)
    with pytest.raises(ValueError, match=r"'c/kernel' has no parameter"):
        export.write(path, params, {"c": masks["a"]})
    with pytest.raises(
        ValueError, match=r"dtypes must be .*bfloat16.*; not \['params/x \(complex64\)"
    ):
        export.write(path, {"x": np.ones(3, np.complex64)}, {})
    assert not path.exists()


def spoiled(arrays, metadata, change):
    """The file with one array or entry of the metadata changed."""
    arrays, metadata = dict(arrays), dict(metadata)
    change(arrays, metadata)
    return safetensors.save(arrays, metadata)


KERNEL = "params/a/kernel"
SPOILERS = {
    r"no 'rigl_optax' of '1'": lambda a, m: m.update(rigl_optax="2"),
    r"is no shape": lambda a, m: m.update(shapes='{"a/kernel": [-1, 3]}'),
    r"has shape \(2, 3\), not \(3, 2\)": lambda a, m: m.update(
        shapes='{"a/kernel": [13, 7], "b/kernel": [3, 2]}'
    ),
    r"but shapes of \[\]": lambda a, m: m.update(shapes="{}"),
    r"config is no JSON object": lambda a, m: m.update(config="[]"),
    r"'more' is none of params": lambda a, m: a.update(more=np.ones(2)),
    r"values, \d+ active": lambda a, m: a.update({KERNEL: a[KERNEL][1:]}),
    r"is (above|below) another leaf": lambda a, m: a.update(
        {"state/x": a[KERNEL], "state/x/y": a[KERNEL]}
    ),
    r"is of dtype C64, not of": lambda a, m: a.update(odd=np.ones(2, np.complex64)),
    r"it unpacks to [\d,]+ bytes": lambda a, m: m.update(shapes='{"a/kernel": [100000, 1000000]}'),
}
OF_BITS = {
    r"bits beyond the last": lambda a, m: a["bits/a/kernel"].__setitem__(-1, 255),
    r"\(11,\) uint8 for 91": lambda a, m: a.update({"bits/a/kernel": a["bits/a/kernel"][1:]}),
}
OF_INDICES = {
    r"do not ascend": lambda a, m: a["indices/a/kernel"].__setitem__(0, 10**6),
    r"do not ascend from 0": lambda a, m: a["indices/a/kernel"].__setitem__(slice(None), 5),
    r"1 axes of int64": lambda a, m: a.update({"indices/a/kernel": np.arange(3)}),
}
CASES = [
    *((0.4, *case) for case in (SPOILERS | OF_BITS).items()),
    *((0.01, *case) for case in OF_INDICES.items()),
]


@pytest.mark.parametrize(("density", "problem", "change"), CASES)
def test_what_is_wrong_with_a_file_is_said(density, problem, change, tmp_path):
    path = tmp_path / "network.safetensors"
    shape = (13, 7) if density == 0.4 else (40, 30)
    arrays, metadata = _file.parse(_file.serialized(*network(density, shape)))
    path.write_bytes(spoiled({n: x.copy() for n, x in arrays.items()}, metadata, change))
    with pytest.raises(ValueError, match=f"not an export of a run.*{problem}"):
        export.read(path, max_bytes=10**9)


def test_a_file_that_is_too_large_or_no_safetensors_is_refused(written, tmp_path):
    path, *_ = written
    with pytest.raises(ValueError, match=r"it has [\d,]+ bytes, more than max_bytes=100"):
        export.read(path, max_bytes=100)
    with pytest.raises(ValueError, match=r"it unpacks to [\d,]+ bytes, more than max_bytes="):
        export.read(path, max_bytes=path.stat().st_size)
    for content in (b"", b"PK\x03\x04 no zip", path.read_bytes()[:-4]):
        other = tmp_path / "other"
        other.write_bytes(content)
        with pytest.raises(ValueError, match="not an export of a run"):
            export.read(other)
    with pytest.raises(FileNotFoundError):
        export.read(tmp_path / "none")
