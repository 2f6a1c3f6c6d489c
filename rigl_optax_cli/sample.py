"""Prints text from a checkpoint of a run on a text; the text itself is not needed.

    rigl-optax sample --workdir=runs/tdavid --length=500 --prompt="The Lord"
    rigl-optax sample --workdir=runs/text_gpt_124m --tokens=464,4453 --length=50

A model over bytes writes text; one over tokens prints their numbers, for your tokenizer to decode.

On the CPU, so that a run that is training keeps its accelerator; JAX_PLATFORMS=cuda in the
environment uses one.
"""

from collections.abc import Sequence

from absl import flags

from rigl_optax import training
from rigl_optax.training import sampling
from rigl_optax_cli import command_line


def main(argv: Sequence[str]) -> int:
    """Runs `rigl-optax sample`; returns the exit status."""
    return command_line.run(_sample, argv, __doc__, _define)


def _define(values: flags.FlagValues) -> None:
    command_line.define_workdir(values)
    command_line.define_step(values)
    integer = flags.DEFINE_integer
    integer("length", 500, "Bytes or tokens to draw.", lower_bound=1, flag_values=values)
    flags.DEFINE_string("prompt", None, "What is read first; a line break if not given.", values)
    flags.DEFINE_list("tokens", None, "The same, as numbers of tokens, in place of it.", values)
    about = "0: the likeliest."
    flags.DEFINE_float("temperature", 0.8, about, lower_bound=0.0, flag_values=values)
    integer("seed", 0, "Of the draws.", lower_bound=0, flag_values=values)


def _sample(values: flags.FlagValues) -> None:
    command_line.use_cpu()
    if values.prompt is not None and values.tokens is not None:
        raise ValueError(f"--prompt={values.prompt!r}: must not be given together with --tokens")
    run, state = training.load(values.workdir, values.step)
    settings = {"temperature": values.temperature, "seed": values.seed}
    if values.tokens is not None:
        tokens = [_token(word) for word in values.tokens]
        drawn = sampling.sample_tokens(run, state, values.length, prompt=tokens, **settings)
        print(",".join(map(str, [*tokens, *drawn])))
        return
    prompt: str = "\n" if values.prompt is None else values.prompt
    text = sampling.sample(run, state, values.length, prompt=prompt.encode(), **settings)
    print(prompt + text.decode(errors="replace"))


def _token(word: str) -> int:
    if not (word.isascii() and word.isdecimal()):
        raise ValueError(f"--tokens={word!r}: must be numbers, as 464,4453")
    return int(word)
