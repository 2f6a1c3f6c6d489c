"""Mutates files for every loader; used by a test and by `fuzz_loaders.py`.

A loader may take a mutated file, or refuse it with a ValueError that says something, or, where a
file names others, with a FileNotFoundError. Anything else it does is a failure.
"""

import dataclasses
import gzip
import io
import json
import pathlib
import random
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
from rich.console import Console
from safetensors import numpy as safetensors

import rigl_optax
from benchmarks import real_photos, tfds_writer
from rigl_optax import export as export_lib
from rigl_optax.data import (
    batches,
    cifar10,
    decode,
    fashion_mnist,
    image_folder,
    imagenet,
    tf_example,
    tfrecord,
)
from rigl_optax.data.crops import Window
from rigl_optax.reports import comparison, page
from rigl_optax.training import checkpoints, export, files, loop, metrics, setup, weights
from rigl_optax.training import config as config_lib

Load = Callable[[], Any]
MAX_SPLICE = 64
# A run of a second or two, with one checkpoint.
CONFIG = config_lib.from_mapping(
    {
        "steps": 4,
        "batch_size": 50,
        "data": {"name": "digits"},
        "model": {"name": "lenet", "hidden": (4, 3)},
        "method": {"name": "rigl", "sparsity": 0.8, "every": 2},
        "optimizer": {"name": "sgd", "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4},
        "mesh": {"data": 1},
        "log": {"every": 2},
        "eval": {"every": 2, "batch_size": 128},
        "checkpoint": {"every": 0},
    }
)


@dataclasses.dataclass(frozen=True)
class Target:
    """A loader: the files that it reads, one of which is mutated, and what reads them."""

    files: tuple[pathlib.Path, ...]
    load: Load


def mutate(raw: bytes, generator: random.Random, other: bytes = b"") -> bytes:
    """Makes one to four changes: flips bits, sets bytes, cuts, doubles or inserts pieces."""
    data = bytearray(raw)
    for _ in range(generator.randint(1, 4)):
        at = generator.randrange(len(data) + 1)
        length = generator.randint(1, MAX_SPLICE)
        kind = generator.randrange(9)
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << generator.randrange(8)
        elif kind == 1 and data:
            data[at % len(data)] = generator.choice([0, 0xFF, 0x7F, 0x80, ord("0"), ord('"')])
        elif kind == 2:
            del data[at:]
        elif kind == 3:
            del data[at : at + length]
        elif kind == 4:
            data[at:at] = data[at : at + length]
        elif kind == 5:
            data[at : at + length] = bytes(length)
        elif kind == 6:
            data[at:at] = generator.randbytes(length)
        elif kind == 7:
            start = generator.randrange(len(other) + 1)
            data[at : at + length] = other[start : start + length]
        else:
            size = generator.choice([1, 2, 4, 8])
            extreme = generator.choice([0, 1, 2 ** (8 * size - 1), 2 ** (8 * size) - 1])
            data[at : at + size] = extreme.to_bytes(size, generator.choice(["little", "big"]))
    return bytes(data)


_STRANGE = (None, True, -1, 0, 1e308, float("nan"), 10**400, "", "\ud800", [], {}, [[]], "x" * 500)


def mutate_json(raw: bytes, generator: random.Random) -> bytes:
    """Changes a value, or a name, and leaves the file JSON."""
    lines = raw.decode().splitlines() if raw.count(b"\n{") else [raw.decode()]
    at = generator.randrange(len(lines))
    value = json.loads(lines[at])
    inside = value
    while True:
        keys = list(inside) if isinstance(inside, dict) else list(range(len(inside)))
        if not keys:
            break
        key = generator.choice(keys)
        if isinstance(inside[key], dict | list) and inside[key] and generator.random() < 0.7:
            inside = inside[key]
            continue
        if generator.random() < 0.2:
            del inside[key]
        elif generator.random() < 0.2 and isinstance(inside, dict):
            inside[generator.choice(["", "kind", "step", "\x00", "é"])] = inside.pop(key)
        else:
            inside[key] = generator.choice(_STRANGE)
        break
    lines[at] = json.dumps(value)
    if generator.random() < 0.02:
        lines[at] = "[" * 100_000
    return "\n".join(lines).encode() + b"\n"


def mutate_records(raw: bytes, generator: random.Random) -> bytes:
    """Changes a record of a tfrecord file and corrects its checksums."""
    records, at = [], 0
    while at < len(raw):
        (length,) = struct.unpack_from("<Q", raw, at)
        records.append(raw[at + 12 : at + 12 + length])
        at += length + 16
    chosen = generator.randrange(len(records))
    records[chosen] = mutate(records[chosen], generator)
    return b"".join(map(tfds_writer.frame, records))


def mutate_file(raw: bytes, path: pathlib.Path, other: bytes, generator: random.Random) -> bytes:
    """Changes a file; half of the changes leave it JSON, gzip or tfrecord, and reach inside."""
    if generator.random() < 0.5:
        if path.suffix in (".json", ".jsonl"):
            return mutate_json(raw, generator)
        if path.suffix == ".gz":
            return gzip.compress(mutate(gzip.decompress(raw), generator))
        if ".tfrecord" in path.name:
            return mutate_records(raw, generator)
    return mutate(raw, generator, other)


def trial(target: Target, generator: random.Random) -> str:
    """Mutates a file of the target, loads, and puts it back; returns `taken` or `refused`.

    Raises:
      Exception: What the loader raised, if that is neither, or without a message.
    """
    path = generator.choice(target.files)
    original = path.read_bytes()
    other = generator.choice(target.files).read_bytes()
    path.write_bytes(mutate_file(original, path, other, generator))
    try:
        target.load()
    except (ValueError, FileNotFoundError) as error:
        if not str(error):
            raise AssertionError("a refusal without a word") from error
        return "refused"
    finally:
        path.write_bytes(original)
    return "taken"


def targets(folder: pathlib.Path) -> dict[str, Target]:
    """Makes sound files for all loaders in a folder; each loader takes its own."""
    run, config = folder / "run", CONFIG
    loop.train(config, run, Console(file=io.StringIO()))
    record = folder / "record.json"
    result = json.loads((run / checkpoints.RESULT_FILE).read_text())
    files.write(record, {key: result[key] for key in comparison.RECORDED})
    prepared = setup.prepare(config)
    like = prepared.initial
    exported = folder / "bits.safetensors", folder / "indices.safetensors"
    export.write(exported[0], prepared, like)
    thin = np.eye(40, dtype=np.float32)
    export_lib.write(exported[1], {"kernel": thin}, {"kernel": thin > 0}, config={"seed": 0})
    foreign = folder / "foreign.safetensors"
    safetensors.save_file({"0.weight": thin, "0.bias": thin[0]}, foreign, {"format": "pt"})

    def restore() -> None:
        with checkpoints.read_checkpoints(run) as saved:
            checkpoints.restore_newest(saved, like, lambda text: None, config)

    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (20, 4, 4), np.uint8)
    idx = folder / "idx.gz"
    idx.write_bytes(gzip.compress(struct.pack(">4I", 0x0803, *images.shape) + images.tobytes()))
    saved = tuple(p for p in (run / "checkpoints").rglob("*") if p.is_file())
    kept = [run / checkpoints.CONFIG_FILE, run / checkpoints.RESULT_FILE]
    return {
        "idx": Target((idx,), lambda: fashion_mnist.read_idx(idx, 0x0803, images.shape)),
        **_photo_targets(folder),
        "config": Target(
            (run / checkpoints.CONFIG_FILE,),
            lambda: config_lib.from_mapping(checkpoints.read_config(run)),
        ),
        "metrics": Target((run / metrics.FILE,), lambda: metrics.read(run / metrics.FILE)),
        "record": Target((record,), lambda: comparison._recorded(record, config)),
        "result": Target((kept[1],), lambda: comparison._finished(run, config)),
        "page": Target(
            (*kept, run / metrics.FILE, run / loop.EXPLANATION_FILE), lambda: page.render(run)
        ),
        "export": Target(exported, lambda: [export.read(path) for path in exported]),
        "weights": Target(
            (foreign, exported[1]),
            lambda: [
                rigl_optax.start_from(like, weights.read_weights(path))
                for path, like in ((foreign, {"0.weight": thin}), (exported[1], {"kernel": thin}))
            ],
        ),
        "checkpoint": Target(saved, restore),
    }


def _photo_targets(folder: pathlib.Path) -> dict[str, Target]:
    """Makes files for the readers of images: single files, records and directories, read whole."""
    generator = np.random.default_rng(0)
    records = folder / "records.tfrecord"
    parts = [generator.bytes(int(n)) for n in generator.integers(0, 100, 10)]
    tfds_writer.write_tfrecord(records, parts)
    example = folder / "example"
    example.write_bytes(tf_example.serialize({"image": b"photo" * 9, "label": 3}))
    jpegs = real_photos.jpegs(6, smallest=24, largest=40)
    (jpeg, png) = (folder / "photo.jpeg", folder / "photo.png")
    jpeg.write_bytes(jpegs[0][0])
    png.write_bytes(real_photos.png(next(real_photos.pieces(1, 0, 24, 40))[0]))

    def look(path: pathlib.Path) -> None:
        out = np.empty((8, 8, 3), np.uint8)
        decode.photo(path.read_bytes(), lambda h, w: Window(0, 0, h, w), out)

    def read_records() -> None:
        for place in tfrecord.index(records):
            tfrecord.read(records, *map(int, place))

    def look_at_all(dataset: batches.Dataset) -> None:
        for split in (dataset.train, dataset.validation, dataset.test):
            list(batches.evaluation_batches(split, 4))

    splits = {"train": jpegs[:4], "validation": jpegs[4:]}
    targets = {
        "tfrecord": Target((records,), read_records),
        "example": Target((example,), lambda: tf_example.image_and_label(example.read_bytes())),
        "jpeg": Target((jpeg,), lambda: look(jpeg)),
        "png": Target((png,), lambda: look(png)),
    }
    for file_format in ("tfrecord", "array_record"):
        root = folder / f"in_{file_format}"
        inside = tfds_writer.write(root, "imagenet2012", splits, 4, file_format)
        targets[f"tfds_{file_format}"] = Target(
            tuple(sorted(inside.iterdir())),
            lambda root=root: look_at_all(imagenet.load(str(root), 0, 8, 1)),
        )
    tree = folder / "tree"
    for i, (data, label) in enumerate(jpegs):
        path = tree / ("train" if i < 4 else "val") / f"c{label}" / f"{i}.jpeg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    targets["image_folder"] = Target(
        tuple(sorted(tree.rglob("*.jpeg"))),
        lambda: look_at_all(image_folder.load(str(tree), 0, 8, 1)),
    )
    cifar = folder / "data_batch_1.bin"
    size = 3073 * cifar10.PER_FILE
    cifar.write_bytes(bytes(size - 10) + generator.bytes(10))
    targets["cifar10"] = Target((cifar,), lambda: cifar10.read_binary([cifar]))
    return targets
