import os
import signal
import time

import pytest

from rigl_optax.training import signals


def until(condition):
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert condition()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_remembered_and_the_second_ends_at_once(number, monkeypatch, capsys):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    before = signal.getsignal(number)
    with signals.asked_to_stop() as stop:
        assert stop(1) == 0
        os.kill(os.getpid(), number)
        until(lambda: stop(2) == 128 + number)
        assert not ended
        os.kill(os.getpid(), number)
        until(lambda: ended == [128 + number])
    assert signal.getsignal(number) is before
    assert "once more to end at once" in capsys.readouterr().err


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as by nohup
    try:
        with signals.asked_to_stop() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            until(lambda: stop(1) == signals.STOPPED)
    finally:
        signal.signal(signal.SIGINT, before)
