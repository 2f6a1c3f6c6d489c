"""Starts scripts: a mistake of the user is one line and exit status 2."""

import os
import runpy
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

import jax
from absl import app, flags
from ml_collections import config_dict, config_flags

from rigl_optax.training import config as config_lib
from rigl_optax.training import mistakes

_CONFIG = "config"  # the flag of the scripts that take one


def run(main: Callable[[list[str]], None]) -> None:
    """Does what `absl.app.run` does, but without a traceback where one line says it all.

    The exit status is 2 for a mistake in flags, config or files, 1 for a run that failed, and 130
    for Ctrl-C where there is nothing to save. Any other error keeps its traceback.
    """

    def main_in_one_line(argv: list[str]) -> None:
        try:
            main(argv)
        except (Exception, KeyboardInterrupt) as error:
            if mistakes.status(error) is None:
                raise
            sys.exit(mistakes.report(error))

    app.run(main_in_one_line, flags_parser=parse)


def refuse(problem: str) -> NoReturn:
    """Ends with one line and exit status 2."""
    print(mistakes.one_line(problem), file=sys.stderr)
    sys.exit(mistakes.MISTAKEN)


def define_config(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines `--config`, a recipe, and `--config.key=value` for any key of a config.

    A recipe leaves out sections in which nothing is special: here they are there, and empty.
    """
    config_flags.DEFINE_config_file(
        _CONFIG,
        None,
        "The recipe: a Python file with get_config().",
        values,
        lock_config=False,
        accept_new_attributes=True,
    )
    parser = values[_CONFIG].parser
    read = parser.parse

    def read_with_sections(path: str) -> config_dict.ConfigDict:
        recipe = read(path)
        if isinstance(recipe, config_dict.ConfigDict):
            for section in config_lib.sections():
                *above, last = section.split(".")
                inner = recipe
                for name in above:
                    inner = inner[name]
                if isinstance(inner, config_dict.ConfigDict) and last not in inner:
                    inner[last] = {}
        return recipe

    parser.parse = read_with_sections  # type: ignore[assignment, method-assign]


def define_step() -> flags.FlagHolder[str]:
    """Defines `--step`, of the scripts that look at a checkpoint, for `training.load`."""
    return flags.DEFINE_string(
        "step", "newest", "Which checkpoint: newest, best (on the validation split), or its step."
    )


def use_cpu() -> None:
    """Leaves accelerators to runs that train, for scripts that only read them.

    Call it before anything is computed. `JAX_PLATFORMS=cuda` (or `tpu`) in the environment wins.
    """
    if not os.environ.get("JAX_PLATFORMS"):
        jax.config.update("jax_platforms", "cpu")


def parse(argv: list[str]) -> list[str]:
    """Parses the flags; ends with one line if they, or the config file, are wrong."""
    try:
        found = list(flags.FLAGS(argv))
        if _CONFIG in flags.FLAGS:
            _check_is_config(flags.FLAGS[_CONFIG].value)
    except Exception as error:  # whatever the code of a config file raises
        refuse(_problem(error, argv))
    return found


def checked() -> config_lib.Config:
    """Returns the config of the flags: the recipe, changed by each `--config.key=value`.

    Raises:
      ValueError: If something is wrong with it.
    """
    flag = flags.FLAGS[_CONFIG]
    file, _, argument = config_flags.get_config_filename(flag).partition(":")
    make = runpy.run_path(file)["get_config"]
    recipe = config_lib.from_mapping((make(argument) if argument else make()).to_dict())
    given = config_flags.get_override_values(flag)
    plain = {
        key: value.to_dict() if isinstance(value, config_dict.ConfigDict) else value
        for key, value in given.items()
    }
    return config_lib.changed(recipe, plain)


def _check_is_config(value: object) -> None:
    if isinstance(value, config_dict.ConfigDict):
        return
    # Of a file that cannot be read `ml_collections` hands over an object that raises when used.
    getattr(value, "method", None)
    raise TypeError(f"get_config() returned {value!r}, not a ConfigDict")


def _problem(error: Exception, argv: Sequence[str]) -> str:
    """Says what is wrong with flags or config file, from what parsing them raised."""
    file = _config_file(argv)
    chain: list[BaseException] = [error]
    while (deeper := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(deeper)
    root = chain[-1]
    if file and isinstance(root, OSError) and not isinstance(error, flags.Error):
        return f"--config={file}: cannot be read; pass the path of a config file"
    inside = [
        frame.lineno
        for one in chain
        for frame in traceback.extract_tb(one.__traceback__)
        if file and frame.filename == file
    ]
    if inside or isinstance(root, SyntaxError):
        at = f", line {inside[-1]}" if inside else ""
        return f"--config={file}{at}: {type(root).__name__}: {root}"
    if isinstance(error, flags.Error):
        return f"{error}; pass --help for the flags"
    if isinstance(root, TypeError) or "get_config" in str(root):
        return f"--config={file}: {root}; a config file has a function get_config()"
    return f"{type(error).__name__}: {error}"


def _config_file(argv: Sequence[str]) -> str:
    """Returns the path given as config, without an argument for it; empty if none was given."""
    for i, word in enumerate(argv):
        name, _, value = word.lstrip("-").partition("=")
        if name == _CONFIG and word.startswith("-"):
            return (value or "".join(argv[i + 1 : i + 2])).split(":")[0]
    return ""
