"""Runs commands: reads flags and recipe; a mistake of the user is one line and exit status 2."""

import os
import runpy
import textwrap
import traceback
from collections.abc import Callable, Sequence

import jax
from absl import flags, logging
from ml_collections import config_dict, config_flags

from rigl_optax.training import config as config_lib
from rigl_optax.training import mistakes
from rigl_optax_cli import recipes

_CONFIG = "config"  # the flag of the commands that take a recipe


def run(
    body: Callable[[flags.FlagValues], int | None],
    argv: Sequence[str],
    about: str,
    define: Callable[[flags.FlagValues], None] | None = None,
    *,
    with_recipe: bool = False,
) -> int:
    """Parses the flags of a command and does it.

    Args:
      body: What to do with the flags; returns the exit status, or None for 0.
      argv: The words after the name of the command.
      about: What `--help` says before it lists the flags.
      define: Defines the flags of the command.
      with_recipe: Whether it takes a recipe, as its first word or as `--config`, and
        `--config.key=value` for any key of it. `checked` returns it.

    Returns:
      The exit status: 2 for a mistake in flags, recipe or files, 1 for a run that failed, and 130
      for Ctrl-C where there is nothing to save. Any other error is raised.
    """
    if {"--help", "-h"} & {*argv}:
        print(_help(about, define, with_recipe))
        return 0
    flags.FLAGS.mark_as_parsed()  # those of libraries, which nobody sets
    logging.use_absl_handler()
    logging.set_verbosity(logging.WARNING)  # Orbax tells a lot at INFO
    try:
        return body(parse(argv, define, with_recipe=with_recipe)) or 0
    except (Exception, KeyboardInterrupt) as error:
        if mistakes.status(error) is None:
            raise
        return mistakes.report(error)


def parse(
    argv: Sequence[str],
    define: Callable[[flags.FlagValues], None] | None = None,
    *,
    with_recipe: bool = False,
) -> flags.FlagValues:
    """Returns the flags of a command, as `run` hands them to it.

    Raises:
      ValueError: If they, or the recipe, are wrong; the message is one line.
    """
    words = _with_config_flag(argv) if with_recipe else list(argv)
    values = flags.FlagValues()
    if with_recipe:
        _define_config(values, words)
    if define is not None:
        define(values)
    try:
        rest = values(["rigl-optax", *words])[1:]
        if with_recipe and values[_CONFIG].value is not None:
            _check_is_config(values[_CONFIG].value)
    except Exception as error:  # whatever the code of a recipe raises
        raise ValueError(_problem(error, words)) from None
    if rest:
        first = "; a recipe comes first, before the flags" * with_recipe
        raise ValueError(f"{rest[0]!r}: there is nothing to do with this word{first}")
    if with_recipe and values[_CONFIG].value is None:
        known = ", ".join(recipes.known())
        raise ValueError(f"which recipe? Give, as the first word, a path or one of {known}")
    return values


def define_workdir(values: flags.FlagValues) -> None:
    """Defines `--workdir` for the commands that look at a run."""
    flags.DEFINE_string("workdir", None, "The folder of the run.", values, required=True)


def define_step(values: flags.FlagValues) -> None:
    """Defines `--step`, of the commands that look at a checkpoint, for `training.load`."""
    flags.DEFINE_string(
        "step",
        "newest",
        "Which checkpoint: newest, best (on the validation split), or its step.",
        values,
    )


def use_cpu() -> None:
    """Leaves accelerators to runs that train, for commands that only read them.

    Call it before anything is computed. `JAX_PLATFORMS=cuda` (or `tpu`) in the environment wins.
    """
    if not os.environ.get("JAX_PLATFORMS"):
        jax.config.update("jax_platforms", "cpu")


def checked(values: flags.FlagValues) -> config_lib.Config:
    """Returns the config of the flags: the recipe, changed by each `--config.key=value`.

    Raises:
      ValueError: If something is wrong with it.
    """
    flag = values[_CONFIG]
    file, argument = _file(config_flags.get_config_filename(flag))
    make = runpy.run_path(file)["get_config"]
    recipe = config_lib.from_mapping((make(argument) if argument else make()).to_dict())
    given = config_flags.get_override_values(flag)
    plain = {
        key: value.to_dict() if isinstance(value, config_dict.ConfigDict) else value
        for key, value in given.items()
    }
    return config_lib.changed(recipe, plain)


def _with_config_flag(argv: Sequence[str]) -> list[str]:
    """Returns the words of a command with its first word, a recipe, as a flag."""
    if argv and not argv[0].startswith("-"):
        return [f"--{_CONFIG}={argv[0]}", *argv[1:]]
    return list(argv)


def _file(recipe: str) -> tuple[str, str]:
    """Returns the file of `NAME`, `PATH`, `NAME:ARGUMENT` or `PATH:ARGUMENT`, and the argument."""
    word, _, argument = recipe.partition(":")
    return recipes.path(word), argument


def _define_config(values: flags.FlagValues, words: list[str]) -> None:
    """Defines `--config`, a recipe, and `--config.key=value` for the keys that `words` change.

    A recipe leaves out sections in which nothing is special: here they are there, and empty.
    """
    config_flags.DEFINE_config_file(
        _CONFIG,
        None,
        "The recipe: a Python file with get_config().",
        values,
        lock_config=False,
        accept_new_attributes=True,
        sys_argv=words,
    )
    parser = values[_CONFIG].parser
    read = parser.parse

    def read_with_sections(word: str) -> config_dict.ConfigDict:
        file, argument = _file(word)
        recipe = read(f"{file}:{argument}" if argument else file)
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


def _check_is_config(value: object) -> None:
    if isinstance(value, config_dict.ConfigDict):
        return
    # Of a file that cannot be read `ml_collections` hands over an object that raises when used.
    getattr(value, "method", None)
    raise TypeError(f"get_config() returned {value!r}, not a ConfigDict")


def _problem(error: Exception, argv: Sequence[str]) -> str:
    """Says what is wrong with flags or recipe, from what parsing them raised."""
    recipe = _given(argv)
    try:
        file = _file(recipe)[0] if recipe else ""
    except ValueError as unknown:
        return str(unknown)
    chain: list[BaseException] = [error]
    while (deeper := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(deeper)
    root = chain[-1]
    if file and isinstance(root, OSError) and not isinstance(error, flags.Error):
        return f"--config={file}: cannot be read; pass the path of a recipe, or its name"
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
        return f"--config={file}: {root}; a recipe has a function get_config()"
    return f"{type(error).__name__}: {error}"


def _given(argv: Sequence[str]) -> str:
    """Returns the recipe that was given; empty if none was."""
    for i, word in enumerate(argv):
        name, _, value = word.lstrip("-").partition("=")
        if name == _CONFIG and word.startswith("-"):
            return value or "".join(argv[i + 1 : i + 2])
    return ""


def _help(about: str, define: Callable[[flags.FlagValues], None] | None, with_recipe: bool) -> str:
    """Returns what a command does, its flags, and the keys of a recipe."""
    values = flags.FlagValues()
    if define is not None:
        define(values)
    rows = {}
    if with_recipe:
        rows["RECIPE"] = (
            "Its name (`rigl-optax --help` lists them) or the path of its file; comes first."
        )
        rows["--config.KEY=VALUE"] = "Changes a key of the recipe; may be given for several keys."
    for name in values:
        flag = values[name]
        shown = f"--[no]{name}" if flag.boolean else f"--{name}=..."
        rows[shown] = f"{flag.help} {_default(flag)}".strip()
    width = max(map(len, rows)) + 4
    lines = [about.strip(), "", "Flags:"]
    for shown, meaning in rows.items():
        lines += textwrap.wrap(
            meaning,
            100,
            initial_indent=f"  {shown}".ljust(width),
            subsequent_indent=" " * width,
        )
    if with_recipe:
        lines += [
            "",
            "Keys; docs/config.md says what each is, and which options they take:",
            *_keys(),
        ]
    return "\n".join(lines)


def _default(flag: flags.Flag) -> str:
    if any("other than None" in each.message for each in flag.validators):
        return "(required)"
    if flag.default is None or flag.boolean:
        return "(default: yes)" if flag.default else ""
    shown = flag.default
    return f"(default: {','.join(shown) if isinstance(shown, list) else repr(shown)})"


def _keys() -> list[str]:
    """Lists the keys of a config, a line for each section."""
    sections: dict[str, list[str]] = {}
    for key in config_lib.known_keys():
        section, _, name = key.rpartition(".")
        sections.setdefault(section, []).append(name)
    return [
        line
        for section, names in sorted(sections.items())
        for line in textwrap.wrap(
            " ".join(names),
            100,
            initial_indent=f"  {section or 'top level'}: ",
            subsequent_indent=" " * 6,
        )
    ]
