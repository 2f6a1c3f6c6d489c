import threading
import time

import pytest

from rigl_optax.data.prefetch import prefetch


def test_what_is_made_comes_in_order_whatever_finishes_first():
    def make(step):
        time.sleep(0.02 if step % 2 else 0.0)
        return step

    with prefetch(make, 3, 12, depth=3) as made:
        assert list(made) == list(range(3, 12))


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_no_more_than_asked_for_is_made_ahead(depth):
    begun = []
    with prefetch(lambda step: begun.append(step) or step, 0, 100, depth) as made:
        assert next(made) == 0
        deadline = time.monotonic() + 5
        while len(begun) < depth + 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert sorted(begun) == list(range(depth + 1))  # the one taken, and `depth` more
    time.sleep(0.05)
    assert len(begun) == depth + 1


def test_they_are_made_while_the_loop_does_something_else():
    second = threading.Event()

    def make(step):
        if step == 1:
            second.set()
        return step

    with prefetch(make, 0, 3) as made:
        next(made)
        assert second.wait(5)


def test_an_error_comes_at_its_step():
    def make(step):
        if step == 2:
            raise ValueError("no such photo")
        return step

    seen = []
    with pytest.raises(ValueError, match="no such photo"), prefetch(make, 0, 9) as made:
        for step in made:
            seen.append(step)
    assert seen == [0, 1]


def test_nothing_is_made_for_no_steps():
    with prefetch(lambda step: 1 / 0, 5, 5) as made:
        assert list(made) == []
    assert not [t for t in threading.enumerate() if t.name.startswith("prefetch")]
