"""The command `rigl-optax`: the recipes, and one module for each of its commands.

It stands beside `rigl_optax`, not inside it: whatever is imported from there imports JAX, which
takes seconds. This module, `recipes` and `huge_pages` do not.

A command is a row of `COMMANDS` and a module of its name with `main(argv) -> int`, the exit status
from the words after the name. The first line of its docstring is shown by `rigl-optax --help`.
"""

import faulthandler
import importlib
import os
import pathlib
import select
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from rigl_optax_cli import huge_pages, recipes

# Whether a command trains, and so starts anew with memory in huge pages.
COMMANDS = {
    "explain": False,
    "train": True,
    "report": False,
    "evaluate": False,
    "sample": False,
    "compare": True,
    "reproduce": True,
    "export": False,
    "prepare": False,
}
MISTAKEN = 2  # the exit status of what was asked for wrongly
UNREAD = 128 + signal.SIGPIPE  # that of a command whose output nobody reads on
_HELP = ("-h", "--help", "help")


def start(command: str | None = None) -> NoReturn:
    """Does what the arguments of this process say, and ends it.

    Args:
      command: The command, if the arguments are only its flags.
    """
    words = [*([] if command is None else [command]), *sys.argv[1:]]
    if words and COMMANDS.get(words[0]) and not set(words) & {*_HELP}:
        huge_pages.use()
    faulthandler.enable()
    try:
        status = main(words)
        sys.stdout.flush()
    except BrokenPipeError:
        if not _is_unread():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # flushed again at the end
        status = UNREAD
    sys.exit(status)


def main(argv: Sequence[str]) -> int:
    """Does what the words after `rigl-optax` say; returns the exit status."""
    name, *words = argv or ["--help"]
    if name in _HELP:
        print(_overview())
        return 0
    if name == "--version":
        print(_version())
        return 0
    if name not in COMMANDS:
        near = recipes.nearest(name, COMMANDS)
        known = ", ".join(COMMANDS)
        print(f"rigl-optax {name}: no such command{near}; commands are {known}", file=sys.stderr)
        return MISTAKEN
    try:
        module = importlib.import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as missing:
        if (missing.name or "").partition(".")[0] in ("rigl_optax", __name__):
            raise
        wanted = f"rigl-optax {name} needs {missing.name}: pip install 'rigl-optax[train]'"
        print(wanted, file=sys.stderr)
        return MISTAKEN
    return module.main(words)


def _is_unread() -> bool:
    """Tells whether the reader of our output has gone, as `head` does when it has its lines."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)  # errors are reported in any case
    return bool(output.poll(0))


def _overview() -> str:
    """Returns the text of `rigl-optax --help`."""
    folder = pathlib.Path(__file__).parent
    return f"""\
Trains sparse networks in JAX from recipes, and shows, compares and exports them.

  rigl-optax explain digits_lenet                   # what will be sparse, and what it costs
  rigl-optax train digits_lenet --workdir=runs/digits --config.method.sparsity=.98
  rigl-optax report --workdir=runs/digits           # one HTML page
  rigl-optax compare digits_lenet --workdir=runs/digits-comparison

Commands; `rigl-optax COMMAND --help` says more:
{_table({name: folder / f"{name}.py" for name in COMMANDS})}

Recipes; the path of a file of your own does as well (docs/recipes.md):
{_table(recipes.known())}

`--config.KEY=VALUE` changes one key of a recipe; `rigl-optax train --help` lists the keys."""


def _table(files: dict[str, pathlib.Path]) -> str:
    width = max(map(len, files), default=0)
    return "\n".join(f"  {name:<{width}}  {recipes.about(at)}" for name, at in files.items())


def _version() -> str:
    import jax
    import optax

    import rigl_optax

    return f"rigl-optax {rigl_optax.__version__} (jax {jax.__version__}, optax {optax.__version__})"
