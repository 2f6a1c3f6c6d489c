import os
import pathlib
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rigl_optax.training import checkpoints, files, hosts, loop, setup
from rigl_optax.training import config as config_lib

pytestmark = pytest.mark.usefixtures("shared_programs")


@pytest.fixture
def state(small):
    return setup.prepare(small).initial


def at_step(state, step):
    """A state that is told apart from that of another step."""
    params = jax.tree.map(lambda x: x + step, state.params)
    return state._replace(step=jnp.int32(step), params=params)


def save(workdir, state, steps, keep=2):
    with checkpoints.open_checkpoints(workdir, keep) as saved:
        for step in steps:
            checkpoints.save(saved, at_step(state, step))


def restore(workdir, state, say=lambda text: None):
    with checkpoints.open_checkpoints(workdir, 2) as saved:
        return checkpoints.restore_newest(saved, state, say)


def assert_equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def damage(step_folder):
    """Cuts off half of every data file of a checkpoint."""
    files = [
        p for p in pathlib.Path(step_folder).rglob("*") if p.is_file() and p.parent.name == "d"
    ]
    assert files
    for path in files:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_masks_counters_and_weights_come_back_bit_for_bit(tmp_path, state):
    save(tmp_path, state, [7])
    assert_equal(restore(tmp_path, state), at_step(state, 7))


def test_a_restored_state_is_placed_like_the_initial_one(tmp_path, state):
    save(tmp_path, state, [7])
    for found, like in zip(
        jax.tree.leaves(restore(tmp_path, state)), jax.tree.leaves(state), strict=True
    ):
        assert found.sharding == like.sharding and found.committed == like.committed


def test_nothing_to_restore(tmp_path, state):
    assert restore(tmp_path, state) is None


def test_the_last_n_are_kept(tmp_path, state):
    save(tmp_path, state, [1, 2, 3, 4])
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["3", "4"]


def test_a_state_may_be_donated_while_it_is_being_saved(tmp_path, state):
    grow = jax.jit(
        lambda s: jax.tree.map(lambda x: x + x if x.dtype != bool else ~x, s), donate_argnums=0
    )
    with checkpoints.open_checkpoints(tmp_path, 2) as saved:
        current = at_step(state, 5)
        expected = jax.device_get(current)
        expected = jax.tree.map(np.copy, expected)
        checkpoints.save(saved, current)
        for _ in range(5):
            current = grow(current)
        jax.block_until_ready(current)
    assert_equal(restore(tmp_path, state), expected)


# Orbax gives up at the first file that is damaged; reads that are still under way then find
# their event loop closed, and say so where nobody can catch it.
given_up = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@given_up
def test_a_truncated_newest_checkpoint_falls_back_to_the_one_before_and_says_so(
    tmp_path, state, settled
):
    save(tmp_path, state, [1, 2])
    damage(tmp_path / "checkpoints" / "2")
    said = []
    assert_equal(restore(tmp_path, state, said.append), at_step(state, 1))
    assert len(said) == 1 and "checkpoint 2 cannot be read" in said[0]
    save(tmp_path, state, [2])  # and training may write it again
    assert_equal(restore(tmp_path, state), at_step(state, 2))


@given_up
def test_only_unreadable_checkpoints_stop_the_run(tmp_path, state, settled):
    save(tmp_path, state, [1, 2])
    for step in ("1", "2"):
        damage(tmp_path / "checkpoints" / step)
    with pytest.raises(ValueError, match=r"none of the checkpoints \[1, 2\] can be read"):
        restore(tmp_path, state)


def test_a_half_written_checkpoint_is_not_taken_for_one(tmp_path, state):
    save(tmp_path, state, [1])
    leftover = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp"
    leftover.mkdir()
    (leftover / "junk").write_text("half")
    assert_equal(restore(tmp_path, state), at_step(state, 1))
    assert not leftover.exists()


def test_reading_leaves_alone_what_a_run_is_just_writing(tmp_path, state):
    save(tmp_path, state, [1, 2, 3])
    unfinished = tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp"
    unfinished.mkdir()
    before = sorted((tmp_path / "checkpoints").iterdir())
    with checkpoints.read_checkpoints(tmp_path) as saved:
        assert_equal(checkpoints.restore_newest(saved, state, print), at_step(state, 3))
    assert sorted((tmp_path / "checkpoints").iterdir()) == before


def test_a_workdir_of_another_config_is_refused_listing_the_keys(tmp_path, small):
    checkpoints.claim(tmp_path, small)
    checkpoints.claim(tmp_path, config_lib.changed(small, {"log.every": 5}))
    other = config_lib.changed(small, {"method.sparsity": 0.5, "optimizer.learning_rate": 1.0})
    with pytest.raises(ValueError, match=r"method.sparsity: 0\.8 -> 0\.5; .*rate: 0\.1 -> 1"):
        checkpoints.claim(tmp_path, other)


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "\x00\xff"])
def test_a_config_file_that_is_none_gives_one_clear_error(tmp_path, small, content):
    (tmp_path / checkpoints.CONFIG_FILE).write_text(content)
    with pytest.raises(ValueError, match="not the config of a run"):
        checkpoints.claim(tmp_path, small)


def test_a_second_run_in_one_workdir_is_refused(tmp_path):
    with checkpoints.lock(tmp_path), pytest.raises(RuntimeError, match="another process"):
        checkpoints.lock(tmp_path)
    checkpoints.lock(tmp_path).close()  # free again


def test_a_checkpoint_of_another_config_is_refused_listing_the_keys(tmp_path, state, small):
    other = config_lib.changed(small, {"method.sparsity": 0.5, "seed": 3})
    bookkeeping = config_lib.changed(
        small, {"log.every": 5, "mesh.params": 4, "data.dir": "elsewhere"}
    )
    with checkpoints.open_checkpoints(tmp_path, 2) as saved:
        checkpoints.save(saved, at_step(state, 1), small, steps_per_second=12.5)
        saved.wait()
        with pytest.raises(ValueError, match=r"checkpoint 1 .*sparsity: 0\.8 -> 0\.5; seed: 0 "):
            checkpoints.restore_newest(saved, state, print, other)
        with pytest.raises(ValueError, match="seed: 0 -> 3"):
            checkpoints.check_newest(saved, other)
        for config in (small, bookkeeping):
            checkpoints.check_newest(saved, config)
            assert_equal(checkpoints.restore_newest(saved, state, print, config), at_step(state, 1))
        assert checkpoints.steps_per_second(saved, 1) == 12.5
        assert checkpoints.steps_per_second(saved, 2) == 0


def test_later_checkpoints_are_left_alone_when_asked(tmp_path, state):
    with checkpoints.open_checkpoints(tmp_path, 5) as saved:
        for step in (2, 4, 6):
            checkpoints.save(saved, at_step(state, step))
        saved.wait()
        for until, found in ((9, 6), (5, 4), (4, 4)):
            restored = checkpoints.restore_newest(saved, state, print, until=until)
            assert_equal(restored, at_step(state, found))
        assert checkpoints.restore_newest(saved, state, print, until=1) is None


def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    target = tmp_path / "precious"
    target.write_text("content")
    (tmp_path / "lock").symlink_to(target)
    with pytest.raises(RuntimeError, match="lock is a link"):
        checkpoints.lock(tmp_path)
    (tmp_path / "x.json.tmp").symlink_to(target)
    files.write(tmp_path / "x.json", {})
    assert target.read_text() == "content"


@pytest.mark.parametrize("name", ["lr[0.1]", "a*", "a?"])
def test_a_path_that_orbax_takes_for_a_pattern_is_refused_before_anything_is_made(
    tmp_path, small, name
):
    with pytest.raises(ValueError, match="a workdir must not have"):
        loop.train(small, tmp_path / name)
    with pytest.raises(ValueError, match="a workdir must not have"):
        checkpoints.read_checkpoints(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_checkpoints_leave_no_files_and_threads_behind(tmp_path, state):
    def count():
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    tiny = state._replace(params={}, model_state={}, opt_state={}, history=None)
    with checkpoints.open_checkpoints(tmp_path, 1) as saved:
        counts = []
        for step in range(20):
            checkpoints.save(saved, tiny._replace(step=jnp.int32(step)))
            saved.wait()
            counts.append(count())
    # Threads of the pools that Orbax and JAX share come one by one at first.
    assert counts[-1][0] <= counts[9][0] + 2 and counts[-1][1] <= counts[9][1] + 2, counts


def test_for_who_reads_nothing_is_made_and_nothing_can_be_written(tmp_path, state):
    with checkpoints.read_checkpoints(tmp_path) as saved:
        assert checkpoints.restore_newest(saved, state, print) is None
        for write in (lambda: saved.delete(1), lambda: checkpoints.save(saved, state)):
            with pytest.raises(ValueError, match="opened for reading"):
                write()
    assert not list(tmp_path.iterdir())


def test_who_reads_finds_the_newer_one_when_a_run_has_deleted_the_one_it_saw(tmp_path, state):
    save(tmp_path, state, [1], keep=1)
    said = []
    with checkpoints.read_checkpoints(tmp_path) as saved:
        save(tmp_path, state, [2], keep=1)
        found = checkpoints.restore_newest(saved, state, said.append)
    assert_equal(found, at_step(state, 2))
    assert said == []


def test_what_one_process_cannot_read_all_pass_over(tmp_path, state, monkeypatch):
    """As seen by one that can; `test_hosts` has none that is damaged for one alone."""
    save(tmp_path, state, [1, 2])
    said, asked = [], []

    def all_say(text):
        asked.append(text)
        return [text, "DATA_LOSS: cut off" if len(asked) == 2 else text]

    monkeypatch.setattr(hosts, "all_say", all_say)
    with checkpoints.open_checkpoints(tmp_path, 2) as saved:
        found = checkpoints.restore_newest(saved, state, said.append)
    assert_equal(found, at_step(state, 1))
    assert asked == ["1 2", "", ""]
    assert said == [
        "warning: checkpoint 2 cannot be read by process 1, skipped: DATA_LOSS: cut off"
    ]


def test_a_run_does_not_go_on_with_other_data(tmp_path, state):
    data = {"train": "100 examples, 0123", "classes": "10"}
    with checkpoints.open_checkpoints(tmp_path, 2) as saved:
        checkpoints.save(saved, state, data=data)
        saved.wait()
        for same in (data, None):
            assert checkpoints.restore_newest(saved, state, print, data=same) is not None
        with pytest.raises(ValueError, match="other data .train: 100 examples, 0123 -> 90 exam"):
            checkpoints.restore_newest(
                saved, state, print, data=data | {"train": "90 examples, 4567"}
            )
