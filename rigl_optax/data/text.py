"""Reads text as bytes, and cuts it into batches of parallel lanes.

A split is cut into as many equal lanes as a batch has sequences; a step reads the next bytes of
every lane, so that the state of a recurrent network can be carried from step to step. As for
images, a batch is a pure function of (seed, step), and every host can make its own lanes.
"""

import contextlib
import itertools
import pathlib
import re
import shutil
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from typing import IO, NamedTuple

import numpy as np

from rigl_optax.data import hidden

Batch = dict[str, np.ndarray]

WIKITEXT = {part: f"wiki.{part}.raw" for part in ("train", "valid", "test")}
# An article of WikiText starts with its title between single equals signs; sections have more.
# Files that were saved on Windows have a carriage return at the end of each line.
_TITLE = re.compile(rb"(?m)^ = [^=\r\n].*[^=\r\n] = \r?\n")
_WIKITEXT_IS = (
    f"Pass the folder with {', '.join(WIKITEXT.values())}, or their zip, as --config.data.dir=PATH"
)
TREASURY_DIR = "/usr/share/sword/modules/comments/zcom/tdavid"


class Part(NamedTuple):
    """One split.

    Attributes:
      tokens: uint8 (bytes,), or uint16 (tokens,); may be a memory map.
      starts: int64 (texts,), ascending: offsets where independent texts begin, at which a
        recurrent state is reset. The first is 0.
    """

    tokens: np.ndarray
    starts: np.ndarray


class Text(NamedTuple):
    """Three disjoint splits."""

    train: Part
    validation: Part
    test: Part


def whole(tokens: bytes | np.ndarray, starts: np.ndarray | None = None) -> Part:
    """Makes a split of one text, or of several that begin at `starts`."""
    array = np.frombuffer(tokens, np.uint8) if isinstance(tokens, bytes) else tokens
    return Part(array, np.zeros(1, np.int64) if starts is None else starts)


def treasury_of_david(data_dir: str = "") -> Text:
    """Loads the Treasury of David, 11.8 MB of Victorian prose, split 90/5/5 in order.

    Debian's package `sword-comm-tdavid` (public domain) installs it. Its mark-up is removed. For
    comparison with the bits per byte of a model: `xz -9` needs 2.124.

    Args:
      data_dir: The folder with `ot.czs` and `ot.czz`; empty: `TREASURY_DIR`, where Debian's
        package puts them.

    Raises:
      FileNotFoundError: If the files are not there; the message says how to get them.
      ValueError: If they are damaged.
    """
    folder = pathlib.Path(data_dir or TREASURY_DIR)
    index_path, blocks_path = folder / "ot.czs", folder / "ot.czz"
    missing = [path.name for path in (index_path, blocks_path) if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"the Treasury of David is not in {folder}: no {', '.join(missing)}. Install Debian's "
            "package sword-comm-tdavid, or pass a folder with both as --config.data.dir=DIRECTORY"
        )
    index, blocks = index_path.read_bytes(), blocks_path.read_bytes()
    if not index or len(index) % 12:
        raise ValueError(f"{index_path}: {len(index)} bytes, not a multiple of 12")
    out = []
    for number, (offset, size, _) in enumerate(struct.iter_unpack("<III", index)):
        if offset + size > len(blocks):
            raise ValueError(f"{index_path}: entry {number} ends beyond {blocks_path.name}")
        if size:
            out.append(_unpacked(blocks[offset : offset + size], f"{blocks_path}: block {number}"))
    return in_order(re.sub(rb"<[^>]+>", b"", b"".join(out)))


def python_topics(data_dir: str = "") -> Text:
    """Loads Python's own help texts, split 90/5/5: no download, but they differ by version."""
    if data_dir:
        raise ValueError(
            f"config.data.dir={data_dir!r}: the topics come with Python; leave it empty"
        )
    from pydoc_data import topics

    return in_order("\n".join(topics.topics.values()).encode())


def wikitext(data_dir: str) -> Text:
    """Loads WikiText-103 raw; every article is a text of its own.

    Each split is memory-mapped; out of a zip, by way of a temporary file.

    Args:
      data_dir: A folder with `wiki.{train,valid,test}.raw`, or the zip they come in.

    Raises:
      FileNotFoundError: If files are missing; the message lists them.
      ValueError: If a file is empty or has no title of an article in it, or the zip is damaged.
    """
    if not data_dir:
        raise FileNotFoundError(f"config.data.dir is empty. {_WIKITEXT_IS}")
    path = pathlib.Path(data_dir)
    if path.is_file() and zipfile.is_zipfile(path):
        try:
            parts = _from_zip(path)
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise ValueError(f"{path} is damaged ({error})") from error
    else:
        found = [p for p in sorted(path.glob("**/wiki.train.raw")) if hidden.is_visible(p, path)]
        folder = found[0].parent if found else path
        _check_there(path, [n for n in WIKITEXT.values() if not (folder / n).is_file()])
        for name in WIKITEXT.values():
            _check_size(folder / name, (folder / name).stat().st_size)
        parts = [np.memmap(folder / name, np.uint8, "r") for name in WIKITEXT.values()]
    names = (path / name for name in WIKITEXT.values())
    return Text(*(Part(part, _articles(part, n)) for part, n in zip(parts, names, strict=True)))


def raw(data_dir: str) -> Text:
    """Loads all files of a folder, each a text of its own, split 90/5/5 by bytes.

    Files are read in the order of their paths; hidden files and folders (leading dot) are left out.
    The tokens are one memory map: of the file if there is only one, else of a temporary copy of all
    of them.

    Args:
      data_dir: The folder, searched recursively.

    Raises:
      FileNotFoundError: If there are no files that are not empty.
      ValueError: If there is too little text for three splits.
    """
    folder = pathlib.Path(data_dir)
    found = (p for p in folder.rglob("*") if hidden.is_visible(p, folder)) if data_dir else ()
    paths = sorted(p for p in found if p.is_file() and p.stat().st_size)
    if not paths:
        raise FileNotFoundError(f"config.data.dir={data_dir!r}: no files with text in it")
    if len(paths) == 1:
        return in_order(np.memmap(paths[0], np.uint8, "r"))
    with contextlib.ExitStack() as stack:
        return in_order(*_mapped(stack.enter_context(path.open("rb")) for path in paths))


def token_files(data_dir: str) -> Text:
    """Reads nanoGPT's token files: a folder with `train.bin` and `val.bin`, uint16, memory-mapped.

    The first half of `val.bin` is the validation split, the second the test split.

    Raises:
      FileNotFoundError: If a file is not there.
      ValueError: If a file has an odd number of bytes, or too few.
    """
    folder, parts = pathlib.Path(data_dir), []
    for name in ("train.bin", "val.bin"):
        path = folder / name
        if not data_dir or not path.is_file():
            raise FileNotFoundError(
                f"{path}: no such file. config.data.name='tokens' needs train.bin and val.bin in "
                "config.data.dir, tokens as uint16, as nanoGPT's prepare.py writes them"
            )
        if path.stat().st_size % 2 or path.stat().st_size < 8:
            raise ValueError(f"{path}: {path.stat().st_size} bytes; must be 2 a token, 4 or more")
        parts.append(np.memmap(path, np.uint16, "r"))
    train, held_out = parts
    half = len(held_out) // 2
    return Text(whole(train), whole(held_out[:half]), whole(held_out[half:]))


def in_order(tokens: bytes | np.ndarray, starts: np.ndarray | None = None) -> Text:
    """Splits a text: the first 90 % for training, then 5 % for validation and 5 % for test.

    Args:
      tokens: All bytes.
      starts: int64 (texts,), offsets where texts begin; the start of a split is always one.

    Raises:
      ValueError: If that leaves a split with fewer than two bytes.
    """
    array = whole(tokens).tokens
    cuts = [0, len(array) * 90 // 100, len(array) * 95 // 100, len(array)]
    if min(np.diff(cuts)) < 2:
        raise ValueError(f"{len(array)} bytes of text: too few for three splits")
    begin = np.zeros(1, np.int64) if starts is None else np.asarray(starts, np.int64)
    parts = []
    for low, high in itertools.pairwise(cuts):
        inside = begin[(begin > low) & (begin < high)] - low
        parts.append(Part(array[low:high], np.concatenate([[0], inside])))
    return Text(*parts)


def steps_per_epoch(size: int, lanes: int, length: int) -> int:
    """Returns the number of steps that read every lane once, without an incomplete last step.

    Args:
      size: Number of bytes in the split.
      lanes: Sequences in a batch.
      length: Bytes of each sequence.

    Raises:
      ValueError: If there is not a single step.
    """
    steps = (size // lanes - 1) // length if lanes > 0 and length > 0 else 0
    if steps < 1:
        raise ValueError(
            f"{size} bytes in {lanes} lanes: too few for a sequence of {length} and a byte after it"
        )
    return steps


def training_batch(
    part: Part, lanes: int, length: int, *, seed: int, step: int, rows: np.ndarray | None = None
) -> Batch:
    """Makes the batch of one training step, or one host's lanes of it.

    The steps of an epoch read each lane from its beginning to its end. Every epoch shifts the lanes
    by a random offset (the text is read as a ring), so that sequences are cut at other places.

    Args:
      part: The training split.
      lanes: Sequences in the whole batch, over all hosts.
      length: Bytes of each sequence.
      seed: Data seed.
      step: Training step, from 0.
      rows: int64 (part,), the lanes that this host makes; None for all.

    Returns:
      `tokens` uint8 (part, length); `labels` int32 (part, length), the byte after each; `resets`
      bool (part, length), True where a text or a lane begins.
    """
    size = len(part.tokens)
    epoch, position = divmod(step, steps_per_epoch(size, lanes, length))
    key = np.array([seed, epoch], np.uint64)
    shift = int(np.random.Generator(np.random.Philox(key=key)).integers(size))
    chosen = np.arange(lanes) if rows is None else rows
    begin = chosen * (size // lanes) + position * length + shift
    places = (begin[:, None] + np.arange(length + 1)) % size
    tokens = part.tokens[places]
    resets = np.isin(places[:, :-1], part.starts)
    if position == 0:
        resets[:, 0] = True
    return {"tokens": tokens[:, :-1], "labels": tokens[:, 1:].astype(np.int32), "resets": resets}


def evaluation_batches(
    part: Part, lanes: int, length: int, rows: np.ndarray | None = None
) -> Iterator[Batch]:
    """Makes batches that predict every byte of a split but the first exactly once.

    Lanes differ by at most one byte in length; the last batch is filled up with zeros of weight 0.
    The state is reset at the beginning of each lane, so the loss depends a little on the number of
    lanes.

    Args:
      part: The split to evaluate on.
      lanes: Sequences in a whole batch, over all hosts.
      length: Bytes of each sequence.
      rows: int64 (part,), the lanes that this host makes; None for all. Lanes past the last are
        empty.

    Yields:
      As `training_batch`, and `weights` float32 (part, length).

    Raises:
      ValueError: If `lanes` or `length` is less than 1, or the split has less than two bytes.
    """
    predicted = len(part.tokens) - 1
    if lanes < 1 or length < 1 or predicted < 1:
        raise ValueError(f"lanes={lanes}, length={length}, {predicted + 1} bytes: too few")
    edges = np.arange(lanes + 1) * predicted // lanes
    chosen = np.arange(lanes) if rows is None else rows
    begin, end = (edges[np.minimum(chosen + i, lanes)][:, None] for i in (0, 1))
    for offset in range(0, int(np.diff(edges).max()), length):
        places = begin + offset + np.arange(length)
        is_inside = places < end
        resets = np.isin(places, part.starts) & is_inside
        if offset == 0:
            resets[:, 0] = True
        here = np.where(is_inside, places, 0)
        yield {
            "tokens": np.where(is_inside, part.tokens[here], 0).astype(part.tokens.dtype),
            "labels": np.where(is_inside, part.tokens[here + 1], 0).astype(np.int32),
            "resets": resets,
            "weights": is_inside.astype(np.float32),
        }


def _from_zip(path: pathlib.Path) -> list[np.ndarray]:
    with zipfile.ZipFile(path) as archive:
        names = {pathlib.PurePosixPath(name).name: name for name in archive.namelist()}
        _check_there(path, [name for name in WIKITEXT.values() if name not in names])
        parts = []
        for name in WIKITEXT.values():
            _check_size(path / name, archive.getinfo(names[name]).file_size)
            with archive.open(names[name]) as file:
                parts.append(_mapped([file])[0])
    return parts


def _check_size(path: pathlib.Path, size: int) -> None:
    if size < 2:
        raise ValueError(f"{path}: {size} bytes; a split needs two, to predict one from the other")


def _mapped(files: Iterable[IO[bytes]]) -> tuple[np.ndarray, np.ndarray]:
    """Copies all files into one memory-mapped array; also returns the offset of each.

    The array maps a temporary file without a name, which disappears with the array.
    """
    starts = []
    with tempfile.TemporaryFile() as copy:
        for file in files:
            starts.append(copy.tell())
            shutil.copyfileobj(file, copy)
        copy.flush()
        return np.memmap(copy, np.uint8, "r"), np.array(starts, np.int64)


def _unpacked(block: bytes, where: str) -> bytes:
    unpacker = zlib.decompressobj()
    try:
        # Bounded: a hostile file may unpack to any size.
        content = unpacker.decompress(block, 2**24)
    except zlib.error as error:
        raise ValueError(f"{where} is damaged ({error})") from error
    if not unpacker.eof:
        raise ValueError(f"{where} is damaged (cut off, or too long)")
    return content


def _check_there(path: pathlib.Path, missing: list[str]) -> None:
    if missing:
        raise FileNotFoundError(
            f"WikiText-103 is not in {path}: no {', '.join(missing)}. {_WIKITEXT_IS}"
        )


def _articles(tokens: np.ndarray, path: pathlib.Path) -> np.ndarray:
    """Finds where the articles begin; a memory map stays one."""
    found = [match.start() for match in _TITLE.finditer(tokens.data)]
    if not found:
        raise ValueError(
            f"{path}: no title of an article in it, which is a line like ' = Title = '; so it is "
            "not WikiText as it is distributed"
        )
    return np.unique(np.array([0, *found], np.int64))
