import pathlib
import struct
import zipfile
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rigl_optax.data import text

RAW = {
    "train": b" \n = First = \n\nOne . \n = = A section = = \ntwo\n = Second = \n three \n" * 3,
    "valid": b" \n = Third = \n four\n",
    "test": b" \n = Fourth = \n five\n",
}


def ring(size):
    return text.whole(np.arange(size, dtype=np.uint8))


@given(
    size=st.integers(10, 200),
    lanes=st.integers(1, 4),
    length=st.integers(1, 6),
    seed=st.integers(0, 9),
)
def test_lanes_are_read_on_from_step_to_step(size, lanes, length, seed):
    part = ring(size)
    try:
        steps = text.steps_per_epoch(size, lanes, length)
    except ValueError:
        return
    found = [
        text.training_batch(part, lanes, length, seed=seed, step=step) for step in range(2 * steps)
    ]
    for step, batch in enumerate(found):
        assert batch["tokens"].shape == batch["labels"].shape == (lanes, length)
        np.testing.assert_array_equal(batch["labels"], (batch["tokens"].astype(int) + 1) % size)
        if step % steps == 0:
            assert batch["resets"][:, 0].all()
        else:
            np.testing.assert_array_equal(batch["tokens"][:, 0], found[step - 1]["labels"][:, -1])
    one = np.concatenate([batch["tokens"].ravel() for batch in found[:steps]])
    assert len(np.unique(one)) == len(one), "a byte twice in an epoch"


def test_epochs_begin_at_other_places_and_seeds_differ():
    begins = [
        text.training_batch(ring(250), 2, 5, seed=seed, step=step)["tokens"][0, 0]
        for seed in (0, 1)
        for step in (0, text.steps_per_epoch(250, 2, 5))
    ]
    assert len(set(begins)) == 4


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_have_parts_of_one_batch(hosts):
    whole = text.training_batch(ring(200), 8, 5, seed=3, step=2)
    rows = np.split(np.arange(8), hosts)
    parts = [text.training_batch(ring(200), 8, 5, seed=3, step=2, rows=r) for r in rows]
    for name, expected in whole.items():
        np.testing.assert_array_equal(np.concatenate([p[name] for p in parts]), expected)


def test_texts_that_begin_are_told_of():
    part = text.Part(np.arange(100, dtype=np.uint8), np.array([0, 31, 60]))
    seen = set()
    for step in range(text.steps_per_epoch(100, 2, 4)):
        batch = text.training_batch(part, 2, 4, seed=0, step=step)
        inside = batch["resets"].copy()
        if step == 0:
            inside[:, 0] &= np.isin(batch["tokens"][:, 0], part.starts)
        seen |= set(batch["tokens"][inside].tolist())
    assert seen >= {31, 60}


@given(size=st.integers(2, 120), lanes=st.integers(1, 7), length=st.integers(1, 9))
def test_every_byte_but_the_first_is_evaluated_exactly_once(size, lanes, length):
    counts = np.zeros(size, int)
    for batch in text.evaluation_batches(ring(size), lanes, length):
        inside = batch["weights"] == 1
        np.testing.assert_array_equal(
            batch["labels"][inside], batch["tokens"][inside].astype(int) + 1
        )
        np.add.at(counts, batch["labels"][inside], 1)
        assert not batch["labels"][~inside].any() and set(np.unique(batch["weights"])) <= {0, 1}
    np.testing.assert_array_equal(counts, [0] + [1] * (size - 1))
    padded = text.evaluation_batches(ring(size), lanes, length, np.arange(lanes + 2))
    for found, expected in zip(
        padded, text.evaluation_batches(ring(size), lanes, length), strict=True
    ):
        np.testing.assert_array_equal(found["labels"][:lanes], expected["labels"])
        assert not found["weights"][lanes:].any()


def test_splits_follow_each_other_and_begin_texts():
    data = text.in_order(bytes(range(200)), np.array([0, 50, 185]))
    np.testing.assert_array_equal(np.concatenate([p.tokens for p in data]), np.arange(200))
    assert [len(p.tokens) for p in data] == [180, 10, 10]
    assert [p.starts.tolist() for p in data] == [[0, 50], [0, 5], [0]]


def test_too_little_text_is_refused():
    with pytest.raises(ValueError, match="too few for three splits"):
        text.in_order(b"abc")
    with pytest.raises(ValueError, match="in 4 lanes: too few for a sequence of 10"):
        text.steps_per_epoch(40, 4, 10)


@pytest.mark.parametrize("form", ["folder", "zip"])
def test_wikitext_is_read_and_articles_are_texts(form, tmp_path):
    folder = tmp_path / "wikitext-103-raw"
    folder.mkdir()
    for part, content in RAW.items():
        (folder / f"wiki.{part}.raw").write_bytes(content)
    path = tmp_path
    if form == "zip":
        path = tmp_path / "wikitext-103-raw-v1.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for file in folder.iterdir():
                archive.write(file, f"wikitext-103-raw/{file.name}")
    data = text.wikitext(str(path))
    assert [part.tokens.tobytes() for part in data] == list(RAW.values())
    titles = [data.train.tokens[s : s + 4].tobytes() for s in data.train.starts[1:]]
    assert len(titles) == 6 and set(titles) == {b" = F", b" = S"}
    assert all(isinstance(part.tokens, np.memmap) for part in data)


def test_wikitext_saved_on_windows_has_the_same_articles(tmp_path):
    for part, content in RAW.items():
        (tmp_path / f"wiki.{part}.raw").write_bytes(content.replace(b"\n", b"\r\n"))
    data = text.wikitext(str(tmp_path))
    titles = [data.train.tokens[s : s + 4].tobytes() for s in data.train.starts[1:]]
    assert len(titles) == 6 and set(titles) == {b" = F", b" = S"}
    (tmp_path / "wiki.valid.raw").write_bytes(b"\n = = Only a section = = \n words\n")
    with pytest.raises(ValueError, match=r"wiki.valid.raw: no title of an article"):
        text.wikitext(str(tmp_path))


def test_without_a_directory_nothing_is_looked_for(tmp_path, monkeypatch):
    for part, content in RAW.items():
        (tmp_path / f"wiki.{part}.raw").write_bytes(content)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"data.dir is empty. Pass the folder with wiki."):
        text.wikitext("")
    with pytest.raises(FileNotFoundError, match="no files with text"):
        text.raw("")


def test_hidden_files_are_no_texts(tmp_path):
    root = tmp_path / ".cache"  # above it, any name will do
    for name in (".git/config", "a.txt", ".DS_Store", "b/._c.txt", "b/c.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode() * 40)
    data = text.raw(str(root))
    every = b"".join(part.tokens.tobytes() for part in data)
    assert every == b"a.txt" * 40 + b"b/c.txt" * 40
    for part, content in RAW.items():
        for folder, read in ((".trash", b"x" + content), ("raw", content)):
            (root / folder).mkdir(exist_ok=True)
            (root / folder / f"wiki.{part}.raw").write_bytes(read)
    assert text.wikitext(str(root)).test.tokens.tobytes() == RAW["test"]


def test_missing_files_are_named(tmp_path):
    (tmp_path / "wiki.train.raw").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match=r"no wiki.valid.raw, wiki.test.raw"):
        text.wikitext(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="sword-comm-tdavid"):
        text.treasury_of_david(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no files with text"):
        text.raw(str(tmp_path / "nowhere"))


def test_files_of_a_folder_are_texts_in_the_order_of_their_names(tmp_path):
    for name, size in (("b", 30), ("a", 60), ("c", 10)):
        (tmp_path / name).write_bytes(name.encode() * size)
    data = text.raw(str(tmp_path))
    assert data.train.tokens.tobytes() == b"a" * 60 + b"b" * 30
    assert data.train.starts.tolist() == [0, 60]
    assert data.test.tokens.tobytes() == b"c" * 5 and isinstance(data.test.tokens, np.memmap)
    assert not (tmp_path / "d").exists() and len(list(tmp_path.iterdir())) == 3


def test_a_single_file_is_mapped_where_it_is(tmp_path):
    (tmp_path / "only.txt").write_bytes(bytes(range(200)))
    data = text.raw(str(tmp_path))
    assert isinstance(data.train.tokens, np.memmap)
    np.testing.assert_array_equal(data.train.tokens, np.arange(180))
    assert data.train.starts.tolist() == [0]


def test_an_empty_split_or_a_damaged_zip_is_refused(tmp_path):
    for name in text.WIKITEXT.values():
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=r"wiki.train.raw: 0 bytes"):
        text.wikitext(str(tmp_path))
    path = tmp_path / "raw.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for part in ("train", "valid", "test"):
            archive.writestr(f"wiki.{part}.raw", b"some words " * 400)
    content = bytearray(path.read_bytes())
    content[60:70] = bytes(10)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"raw.zip is damaged"):
        text.wikitext(str(path))


def write_treasury(folder, blocks):
    packed = [zlib.compress(block) for block in blocks]
    offsets = np.cumsum([0, *map(len, packed)])
    entries = [struct.pack("<III", o, len(p), 9) for o, p in zip(offsets, packed, strict=False)]
    (folder / "ot.czs").write_bytes(b"".join(entries))
    (folder / "ot.czz").write_bytes(b"".join(packed))


def test_the_treasury_is_unpacked_without_its_mark_up(tmp_path):
    write_treasury(tmp_path, [b"<p>Blessed" + b" is" * 20, b"</p> the man<br/>"])
    data = text.treasury_of_david(str(tmp_path))
    assert b"".join(p.tokens.tobytes() for p in data) == b"Blessed" + b" is" * 20 + b" the man"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda i, z: (i[:-1], z), "not a multiple of 12"),
        (lambda i, z: (i, z[:-3]), "ends beyond"),
        (lambda i, z: (i, b"y" + z[1:]), "block 0 is damaged"),
        (lambda i, z: (i[:4] + b"\5" + i[5:], z), "block 0 is damaged .cut off"),
    ],
)
def test_a_damaged_treasury_is_refused(change, told, tmp_path):
    write_treasury(tmp_path, [b"one" * 30, b"two" * 30])
    paths = (tmp_path / "ot.czs", tmp_path / "ot.czz")
    for path, content in zip(paths, change(*(p.read_bytes() for p in paths)), strict=True):
        path.write_bytes(content)
    with pytest.raises(ValueError, match=told):
        text.treasury_of_david(str(tmp_path))


@pytest.mark.skipif(not pathlib.Path(text.TREASURY_DIR).is_dir(), reason="not installed")
def test_the_real_treasury():
    data = text.treasury_of_david()
    assert sum(len(part.tokens) for part in data) == 11_845_841
    assert data.train.tokens[:200].tobytes().isascii()


def test_python_s_own_topics():
    data = text.python_topics()
    assert len(data.train.tokens) > 200_000
    with pytest.raises(ValueError, match="leave it empty"):
        text.python_topics("/somewhere")
