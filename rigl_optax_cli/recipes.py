"""Finds recipes by name: they are installed with the package, and in `configs/` of a clone."""

import ast
import difflib
import pathlib
from collections.abc import Iterable


def known() -> dict[str, pathlib.Path]:
    """Returns the recipes, `{name: file}` in alphabetical order."""
    here = pathlib.Path(__file__).parent
    installed = here / "configs"
    folder = installed if installed.is_dir() else here.parent / "configs"
    files = sorted(folder.glob("*.py"))
    return {file.stem: file for file in files if not file.stem.startswith("_")}


def path(word: str) -> str:
    """Returns the file of a recipe: of the given name, or the given path itself.

    Raises:
      ValueError: If it can only be a name, and no recipe has it.
    """
    recipes = known()
    if word in recipes:
        return str(recipes[word])
    given = pathlib.Path(word)
    if given.suffix == ".py" or given.name != word or given.exists():
        return word
    raise ValueError(
        f"{word!r}: there is no such recipe{nearest(word, recipes)}; give a path, "
        f"or one of {', '.join(recipes)}"
    )


def about(file: pathlib.Path) -> str:
    """Returns the first line of a module's docstring, without importing the module."""
    text = ast.get_docstring(ast.parse(file.read_text())) or ""
    return text.partition("\n")[0].rstrip(".")


def nearest(word: str, known: Iterable[str]) -> str:
    """Returns words that suggest the known ones that look like `word`; empty if none does."""
    found = difflib.get_close_matches(word, list(known), n=2)
    return f"; did you mean {' or '.join(found)}?" if found else ""
