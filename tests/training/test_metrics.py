import pathlib

import pytest

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


def test_a_file_and_its_new_name_are_on_the_disk_before_anything_goes_on(tmp_path, monkeypatch):
    synced, fsync = [], files.os.fsync

    def watched(number):
        synced.append(pathlib.Path(files.os.readlink(f"/proc/self/fd/{number}")))
        fsync(number)

    monkeypatch.setattr(files.os, "fsync", watched)
    files.write(tmp_path / "a.json", {"a": 1})
    assert synced == [tmp_path / "a.json.tmp", tmp_path]
    assert files.read(tmp_path / "a.json", "", {}) == {"a": 1}
