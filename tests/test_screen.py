"""What a run shows while it runs: a live line on a terminal, whole lines elsewhere, what is done."""

from __future__ import annotations

import os
import re
import select
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import pytest

from mcore_rl import screen
from mcore_rl.log import Progress, Timers, tell
from mcore_rl.screen import Screen
from mcore_rl.spans import listening, span

INSTALLS = re.compile(r"pip install|\$\(SGLANG_PIP\)")


class Terminal:
    """A pseudo terminal in the place of standard error."""

    def __init__(self, reading: int, stream: TextIO, monkeypatch: pytest.MonkeyPatch) -> None:
        self._reading, self._stream, self._monkeypatch, self.text = reading, stream, monkeypatch, ""

    def attach(self) -> None:
        """Take the place, in the test itself: pytest puts its own there after every fixture."""
        self._monkeypatch.setattr(sys, "stderr", self._stream)

    def until(self, words: str) -> None:
        deadline = time.monotonic() + 10
        while words not in self.text:
            assert time.monotonic() < deadline, self.text
            if select.select([self._reading], [], [], 0.1)[0]:
                self.text += os.read(self._reading, 1 << 16).decode()


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    reading, writing = os.openpty()
    monkeypatch.setenv("TERM", "xterm")
    with os.fdopen(writing, "w") as stream:
        yield Terminal(reading, stream, monkeypatch)
        monkeypatch.undo()
    os.close(reading)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Screen:
    monkeypatch.setattr(screen, "REDRAWN", 0.02)
    return Screen()


def test_a_terminal_has_a_live_line_below_what_is_said(terminal: Terminal, quick: Screen) -> None:
    terminal.attach()
    with quick.showing(active=True):
        quick.progress(0.25, "step 50/200  time left 9:41")
        with span("publish"):
            terminal.until("[#####...............]  step 50/200  time left 9:41  publishing weights 0 s\r")
        done = [3]
        quick.doing(lambda: f"evaluating sums: {done[0]} of 9")
        terminal.until("evaluating sums: 3 of 9")
        done[0] = 4
        terminal.until("evaluating sums: 4 of 9")
        quick.say("step 51/200  reward \x1b[2J")
        terminal.until("step 51/200  reward \\x1b[2J\r\n")
    assert "\r\x1b[2Kstep 51" in terminal.text, "the line is wiped before others are written"
    terminal.text = ""
    quick.say("the end")
    terminal.until("the end\r\n")
    assert terminal.text == "\r\x1b[2Kthe end\r\n" or terminal.text == "the end\r\n"


def test_the_line_is_no_wider_than_the_terminal(quick: Screen) -> None:
    quick.progress(1.0, "x" * 200)
    assert len(quick.line(80)) == 79
    assert "\n" not in quick.line(500)


def test_elsewhere_long_work_is_said_again_and_nothing_is_drawn(
    quick: Screen, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(screen, "FIRST_REMINDER", 0.1)
    with quick.showing(active=True):
        quick.doing("evaluating sums")
        time.sleep(0.5)
        quick.say("step 1/2")
    said = capsys.readouterr().err
    assert "\x1b" not in said
    assert "\r" not in said
    reminders = re.findall(r"^still evaluating sums, for \d+ s$", said, re.MULTILINE)
    assert 2 <= len(reminders) <= 3, "after 0.1 s, 0.2 s and 0.4 s"
    assert said.endswith("step 1/2\n")


@pytest.mark.parametrize("term", ["dumb", None])
def test_a_terminal_that_cannot_is_left_in_peace(
    terminal: Terminal, quick: Screen, monkeypatch, term
) -> None:
    terminal.attach()
    monkeypatch.setenv("TERM", term) if term else monkeypatch.delenv("TERM")
    with quick.showing(active=True):
        quick.doing("something")
        time.sleep(0.1)
        quick.say("a line")
    terminal.until("a line")
    assert "\x1b" not in terminal.text


def test_other_ranks_show_nothing(terminal: Terminal, quick: Screen) -> None:
    terminal.attach()
    with quick.showing(active=False):
        quick.doing("something")
        time.sleep(0.1)
    quick.say("x")
    terminal.until("x\r\n")
    assert terminal.text == "x\r\n"


def test_what_cannot_be_asked_ends_nothing(terminal: Terminal, quick: Screen) -> None:
    terminal.attach()

    def broken() -> str:
        raise KeyError("gone")

    with quick.showing(active=True):
        quick.doing(broken)
        time.sleep(0.1)
        quick.doing("still here")
        terminal.until("still here")


def test_what_is_told_is_done_until_something_else_is(capsys: pytest.CaptureFixture[str]) -> None:
    tell("reading rows ...", is_main=True)
    tell("not on this rank ...", is_main=False)
    assert capsys.readouterr().err == "reading rows ...\n"
    assert "reading rows 0 s" in screen.SCREEN.line(200)
    tell("the model is in a directory", is_main=True)
    assert "reading rows" in screen.SCREEN.line(200), "that is said, and not done"


def test_timers_are_spans_also_inside_each_other() -> None:
    class Heard:
        def __init__(self) -> None:
            self.spans: list[tuple[str, str]] = []

        def begun(self, lane: str, name: str) -> None: ...

        def ended(self, lane: str, name: str, start: float, seconds: float) -> None:
            assert 0 <= seconds < 5
            assert abs(start - time.time()) < 5
            self.spans.append((lane, name))

    heard, timers = Heard(), Timers()
    with timers("train"):
        pass
    with listening(heard):
        with timers("train"), timers("score"):
            pass
        with pytest.raises(ValueError, match="x"), span("generate", "http://a:1"):
            raise ValueError("x")
    with timers("train"):
        pass
    assert heard.spans == [("", "score"), ("", "train"), ("http://a:1", "generate")]


def test_the_line_of_a_step_says_what_it_cost() -> None:
    cost = {"throughput/tokens_per_second": 12345.6, "memory/peak_gib": 1.44, "time/publish": 0.31}
    progress = Progress(60)
    line = progress.line(3, {"reward/mean": 0.5, "time/step": 2.0, **cost})
    assert line == (
        "step 3/60  reward 0.5  2.0 s/step  tokens/s 12\u202f346  memory 1.4 GiB  publish 0.3 s  "
        "time left 1:54"
    )
    assert (progress.share, progress.left) == (0.05, "step 3/60  time left 1:54")


def test_install_steps_say_what_they_download() -> None:
    lines = (Path(__file__).parents[1] / "Makefile").read_text().splitlines()
    steps = [n for n, line in enumerate(lines) if line.startswith("\t") and INSTALLS.search(line)]
    assert len(steps) >= 5
    silent = [lines[n] for n in steps if not any("MB" in line for line in lines[n - 2 : n] if "echo" in line)]
    assert silent == []
