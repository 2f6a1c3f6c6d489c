"""Names that begin with a dot: what editors, Git and macOS leave behind is no data."""

import pathlib


def is_hidden(name: str) -> bool:
    """Tells whether a file or folder of this name is left out."""
    return name.startswith(".")


def is_seen(path: pathlib.Path, root: pathlib.Path) -> bool:
    """Tells whether no part of a path below `root` is hidden; those of `root` itself may be.

    Example:
      >>> root = pathlib.Path("/home/me/.cache")
      >>> [is_seen(root / name, root) for name in ("a/b.txt", ".git/config", "a/._b.txt")]
      [True, False, False]
    """
    return not any(is_hidden(part) for part in path.relative_to(root).parts)
