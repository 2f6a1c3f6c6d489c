"""`python -O` drops asserts: none may check what a user gives."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[2]
FILES = sorted(
    p for d in ("rigl_optax", "rigl_optax_cli", "configs") for p in (ROOT / d).rglob("*.py")
)


def is_for_types_alone(test):
    """`x is not None` or `isinstance(x, T)`: they narrow a type for mypy."""
    if isinstance(test, ast.Compare):
        (operator,) = test.ops
        return isinstance(operator, ast.IsNot) and isinstance(test.comparators[0], ast.Constant)
    return isinstance(test, ast.Call) and getattr(test.func, "id", "") == "isinstance"


def test_asserts_only_narrow_types():
    found = []
    for path in FILES:
        tree = ast.parse(path.read_text())
        caught = [n for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id == "AssertionError"]
        asserts = [n for n in ast.walk(tree) if isinstance(n, ast.Assert)]
        bad = [n for n in asserts if not is_for_types_alone(n.test)] + caught
        found += [f"{path.relative_to(ROOT)}:{n.lineno}" for n in bad]
    assert found == []


@pytest.mark.parametrize("code", ["x > 0", "isinstance(x, int) and x", "x in y", "not args"])
def test_what_is_no_narrowing(code):
    assert not is_for_types_alone(ast.parse(code, mode="eval").body)
