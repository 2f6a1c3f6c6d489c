import json
import pathlib

from rigl_optax.training import files


def test_json_is_replaced_at_once(tmp_path):
    path = tmp_path / "x.json"
    files.write(path, {"a": 1})
    files.write(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_a_file_and_its_new_name_are_on_the_disk_before_anything_goes_on(tmp_path, monkeypatch):
    synced, fsync = [], files.os.fsync

    def watched(number):
        synced.append(pathlib.Path(files.os.readlink(f"/proc/self/fd/{number}")))
        fsync(number)

    monkeypatch.setattr(files.os, "fsync", watched)
    files.write(tmp_path / "a.json", {"a": 1})
    assert synced == [tmp_path / "a.json.tmp", tmp_path]
    assert files.read(tmp_path / "a.json", "", {}) == {"a": 1}
