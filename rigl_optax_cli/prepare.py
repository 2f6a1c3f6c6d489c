r"""Prepares an image set with TensorFlow Datasets, for `--config.data.name=tfds/NAME`.

    rigl-optax prepare cifar100 --data_dir=/data
    rigl-optax train fashion_mnist_wrn --workdir=runs/cifar100 \
        --config.data.name=tfds/cifar100 --config.data.dir=/data

It needs the package tensorflow-datasets, and for most sets TensorFlow; training needs neither.
"""

import importlib.util
import pathlib
from collections.abc import Sequence

from absl import flags

from rigl_optax.data import tfds_directory
from rigl_optax_cli import command_line

FORMAT = "array_record"


def main(argv: Sequence[str]) -> int:
    """Runs `rigl-optax prepare`; returns the exit status."""
    named = argv and not argv[0].startswith("-")
    words = [f"--name={argv[0]}", *argv[1:]] if named else argv
    return command_line.run(_prepare, words, __doc__, _define)


def _define(values: flags.FlagValues) -> None:
    about = "The set, as TFDS calls it; may be given as the first word."
    flags.DEFINE_string("name", None, about, values, required=True)
    about = "Where prepared sets are; made if it is not there."
    flags.DEFINE_string("data_dir", None, about, values, required=True)


def _prepare(values: flags.FlagValues) -> None:
    name, data_dir = values.name, pathlib.Path(values.data_dir)
    try:
        found = tfds_directory.find(data_dir, name, "")
    except FileNotFoundError:
        found = _build(name, data_dir)
    splits = ", ".join(f"{split} {len(shards):,}" for split, shards in found.splits.items())
    print(f"{found.folder}: {found.classes} classes; {splits}")
    print(f"train on it with --config.data.name=tfds/{name} --config.data.dir={data_dir}")


def _build(name: str, data_dir: pathlib.Path) -> tfds_directory.Directory:
    missing = [
        package
        for module, package in (
            ("tensorflow_datasets", "tensorflow-datasets"),
            ("tensorflow", "tensorflow"),
        )
        if importlib.util.find_spec(module) is None
    ]
    if "tensorflow-datasets" in missing:
        raise ValueError(
            f"to prepare {name} needs {' and '.join(missing)}, which are not installed here: pip "
            f"install {' '.join(missing)}, in an environment of its own if you like; training "
            "needs neither"
        )
    if missing:
        print("TensorFlow is not installed: sets whose preparation needs it will fail")
    import tensorflow_datasets

    try:
        builder = tensorflow_datasets.builder(name, data_dir=str(data_dir), file_format=FORMAT)
        builder.download_and_prepare()
    except ModuleNotFoundError as error:
        raise ValueError(
            f"to prepare {name} TFDS needs {error.name}, which is not installed here: pip install "
            f"{error.name}"
        ) from error
    except Exception as error:  # of a download, a builder or a name: TFDS has many
        first = str(error).strip().partition("\n")[0]
        raise RuntimeError(
            f"TFDS could not prepare {name}: {type(error).__name__}: {first}"
        ) from error
    return tfds_directory.find(data_dir, name, "")
