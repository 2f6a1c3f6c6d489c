import importlib.util
import pathlib
import re

import numpy as np
import optax
import pytest

import rigl_optax

ROOT = pathlib.Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_page_on_optimizers_is_what_the_tests_run():
    path = ROOT / "docs" / "optimizers.py"
    spec = importlib.util.spec_from_file_location("optimizers", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text() == module.page(), "run python docs/optimizers.py"


@pytest.mark.parametrize("name", ["vision", "structured"])
def test_tables_are_those_of_the_records(name):
    path = ROOT / "docs" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text() == module.page(), f"run python docs/{name}.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_page_is_on_the_site():
    pages = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert set(re.findall(r"- (\w+\.md)", (ROOT / "mkdocs.yml").read_text())) == pages
    linked = re.findall(r"\]\((\w+\.md)\)", (ROOT / "docs" / "index.md").read_text())
    assert set(linked) == pages - {"index.md"}


def test_the_method_of_the_page_is_ours():
    """The code of docs/write_a_method.md trains as `rigl_optax.mest` does."""
    page = (ROOT / "docs" / "write_a_method.md").read_text()
    found: dict = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(block, "write_a_method.md", "exec"), found)
    rng = np.random.default_rng(0)
    params, grads = ({"a": rng.standard_normal((17, 12)).astype(np.float32)} for _ in range(2))
    assert int(found["tx"].update(grads, found["tx"].init(params), params)[1].rewirings) == 1
    keys = {"sparsity": 0.5, "end": 5, "every": 2, "gradient_weight": 0.3, "seed": 4}
    masks = []
    for make in (found["mest"], rigl_optax.mest):
        tx = make(optax.sgd(0.1), **keys)
        state = tx.init(params)
        for _ in range(4):
            _, state = tx.update(grads, state, params)
        masks.append(np.asarray(state.masks["a"]))
    np.testing.assert_array_equal(*masks)


def test_the_example_in_the_readme_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
