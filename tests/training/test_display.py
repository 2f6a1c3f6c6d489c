import io
import os
import pathlib
import subprocess
import sys

import pytest
from rich.console import Console

from rigl_optax.training import display


def test_without_a_terminal_there_are_plain_lines_now_and_then(monkeypatch):
    monkeypatch.setattr(display, "PLAIN_EVERY", 0.0)
    out = io.StringIO()
    with display.training_progress(Console(file=out, width=100, highlight=False), 0, 100) as show:
        show(50, "loss 0.5")
        show(100, "loss 0.1")
    first, last = out.getvalue().splitlines()
    assert first == "step 50/100  loss 0.5"  # no speed yet: the time before was compilation
    assert last.startswith("step 100/100  loss 0.1  ") and last.endswith("steps/s  0 s left")
    assert "\x1b" not in out.getvalue()


def test_plain_lines_are_rare_but_the_last_is_always_shown(monkeypatch):
    monkeypatch.setattr(display, "PLAIN_EVERY", 1e9)
    out = io.StringIO()
    with display.training_progress(Console(file=out, width=100, highlight=False), 0, 100) as show:
        for step in range(10, 101, 10):
            show(step, "x")
    assert [line.split()[1] for line in out.getvalue().splitlines()] == ["10/100", "100/100"]


def test_in_a_terminal_there_is_a_bar_with_speed_and_time_left():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=160)
    with display.training_progress(console, 0, 100) as show:
        show(50, "loss 0.5")
        show(100, "loss 0.1")
    text = out.getvalue()
    assert "100/100" in text and "loss 0.1" in text and "steps/s" in text and "left" in text


@pytest.mark.parametrize("is_terminal", [True, False])
def test_output_goes_on_into_nothing_when_its_reader_is_gone(monkeypatch, is_terminal):
    monkeypatch.setattr(display, "PLAIN_EVERY", 0.0)
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as file:
        console = Console(file=file, force_terminal=is_terminal, width=100)
        display.outlive_reader(console)
        console.print("seen")
        assert b"seen" in os.read(reader, 100)
        os.close(reader)
        with display.training_progress(console, 0, 100) as show:
            for step in range(1, 101):
                show(step, "unseen")
        console.print("unseen")
        file.write("and what others print")
        file.flush()


def test_a_process_whose_reader_is_gone_or_whose_log_is_full_ends_with_status_0():
    code = (
        "from rigl_optax.training import display; console = display.make_console();"
        "display.outlive_reader(console); [console.print('x' * 99) for _ in range(999)]; print(1)"
    )
    with pathlib.Path("/dev/full").open("w") as full:
        ended = subprocess.run(
            [sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert (ended.returncode, ended.stderr) == (0, b"")
