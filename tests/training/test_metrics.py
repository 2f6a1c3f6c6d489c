import contextlib
import subprocess
import threading

import pytest
from tensorboardX import record_writer

from rigl_optax.training import files, metrics


def lines(tmp_path):
    return [(r["step"], r["kind"], r["loss"]) for r in metrics.read(tmp_path / metrics.FILE)]


def test_records_are_appended_and_readable_at_once(tmp_path):
    with metrics.writer(tmp_path, resumed_at=0, spent=float) as write:
        write("train", 10, {"loss": 2.0})
        assert lines(tmp_path) == [(10, "train", 2.0)]
        write("validation", 10, {"loss": 1.5})
    assert lines(tmp_path) == [(10, "train", 2.0), (10, "validation", 1.5)]
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))


def test_a_resumed_run_does_not_record_a_step_twice(tmp_path):
    with metrics.writer(tmp_path, resumed_at=0, spent=float) as write:
        for step in (10, 20, 30):
            write("train", step, {"loss": float(step)})
    with metrics.writer(tmp_path, resumed_at=20, spent=float) as write:
        write("train", 30, {"loss": 30.5})
    assert lines(tmp_path) == [(10, "train", 10.0), (20, "train", 20.0), (30, "train", 30.5)]


def test_a_line_cut_off_by_a_crash_is_dropped(tmp_path):
    path = tmp_path / metrics.FILE
    path.write_text('{"step": 1, "kind": "train", "loss": 1.0}\n{"step": 2, "ki')
    with metrics.writer(tmp_path, resumed_at=5, spent=float) as write:
        write("train", 6, {"loss": 6.0})
    assert lines(tmp_path) == [(1, "train", 1.0), (6, "train", 6.0)]


@pytest.mark.parametrize("broken", ["{", "3", '{"step": "x"}', "[]"])
def test_a_broken_line_in_the_middle_names_its_place(tmp_path, broken):
    path = tmp_path / metrics.FILE
    path.write_text(broken + '\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl:1: not a metrics record"):
        metrics.read(path)


def test_bytes_that_are_no_text_are_named_in_the_middle_and_dropped_at_the_end(tmp_path):
    path = tmp_path / metrics.FILE
    path.write_bytes(b'{"step": 1, "kind": "train", "loss": 1.0}\n\xff\xfe\x00')
    assert lines(tmp_path) == [(1, "train", 1.0)]
    path.write_bytes(b'\xff\xfe\n{"step": 1, "kind": "train", "loss": 1.0}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl:1: not a metrics record .*utf-8"):
        metrics.read(path)


def test_what_is_not_finite_is_no_json(tmp_path):
    with (
        metrics.writer(tmp_path, resumed_at=0, spent=float) as write,
        pytest.raises(ValueError, match="not JSON compliant"),
    ):
        write("train", 1, {"loss": float("nan")})
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write(tmp_path / "x.json", {"loss": float("inf")})
    for word in ("NaN", "-Infinity"):
        with pytest.raises(ValueError, match=f"{word} is no JSON"):
            files.parse(f'{{"loss": {word}}}', {})


@contextlib.contextmanager
def full_disk(folder):
    """A file system of two pages, one of them taken."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(folder)]
    if subprocess.run(command, check=False, capture_output=True).returncode != 0:
        pytest.skip("only root may mount")
    try:
        (folder / "other").write_bytes(bytes(4096))
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@contextlib.contextmanager
def no_folder(folder):
    folder.write_text("not a folder")
    yield


@pytest.mark.parametrize(("trouble", "told"), [(full_disk, "No space"), (no_folder, "File exists")])
def test_events_that_cannot_be_written_are_told_of_once_and_end_nothing(tmp_path, trouble, told):
    said = []
    with trouble(tmp_path / "tensorboard"):
        with metrics.writer(tmp_path, 0, float, said.append) as write:
            for step in range(2 * metrics._QUEUED):
                write("train", step, {"loss": 1.0})
        assert len(said) == 1 and "TensorBoard's events are incomplete" in said[0]
        assert told in said[0] or "too slow" in said[0]
    assert len(metrics.read(tmp_path / metrics.FILE)) == 2 * metrics._QUEUED


def test_a_disk_that_hangs_under_the_events_does_not_hold_up_a_run(tmp_path, monkeypatch):
    go_on = threading.Event()
    monkeypatch.setattr(record_writer.RecordWriter, "write", lambda *args: go_on.wait() and None)
    monkeypatch.setattr(metrics, "_QUEUED", 5)
    monkeypatch.setattr(metrics, "_PATIENCE", 0.05)
    said = []
    with metrics.writer(tmp_path, 0, float, said.append) as write:
        for step in range(20):
            write("train", step, {"loss": 1.0})
        assert len(said) == 1 and "too slow" in said[0]
    go_on.set()
    assert len(said) == 1 and len(metrics.read(tmp_path / metrics.FILE)) == 20
