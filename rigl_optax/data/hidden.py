"""Recognises hidden files (names with a leading dot), which editors, Git and macOS leave behind."""

import pathlib


def is_hidden(name: str) -> bool:
    """Returns whether a file or folder of this name is hidden, and so no data."""
    return name.startswith(".")


def is_visible(path: pathlib.Path, root: pathlib.Path) -> bool:
    """Returns whether no component of a path below `root` is hidden; `root` itself may be.

    Examples:
      >>> root = pathlib.Path("/data/.cache")
      >>> [is_visible(root / name, root) for name in ("a/b.txt", ".git/config", "a/._b.txt")]
      [True, False, False]
    """
    return not any(is_hidden(part) for part in path.relative_to(root).parts)
