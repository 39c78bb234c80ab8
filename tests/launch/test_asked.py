"""A request to leave before the ranks run, and after them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mcore_rl.launch.asked import finish_although_asked, leaving_when_asked
from tests.sources import ROOT


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_before_a_rank_was_started_it_may_be_tried_again(number: signal.Signals, tmp_path: Path) -> None:
    """The configuration is a pipe, which the command has opened and waits for."""
    if signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip("these tests run under nohup, and so would the command")
    config = tmp_path / "config.toml"
    os.mkfifo(config)
    command = [sys.executable, "-m", "mcore_rl", "train", str(config)]
    started = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    with config.open("wb"):
        started.send_signal(number)
        _, said = started.communicate(timeout=60)
    assert (started.returncode, said) == (
        75,
        f"mcore-rl: {number.name} came before a rank was started; nothing was begun\n",
    )


IMPORTING = """
import os, signal, sys
from mcore_rl.launch.start import catch_signals
for what in sys.argv[1:]:  # a process for each, which need not import all that again
    if child := os.fork():
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(code, end="\\0", flush=True)
        print(end="\\0", file=sys.stderr, flush=True)
        continue
    catch_signals()
    try:
        exec(what)
    except BaseException as error:
        print(type(error).__name__)
    sys.stdout.flush()
    os._exit(0)
"""


@pytest.mark.slow
def test_an_import_is_left_without_an_exception(tmp_path: Path) -> None:
    """Which a module that swallows it, as compiled ones do, would make another error of, or none."""
    module = "import signal\ntry: signal.raise_signal(signal.SIGTERM)\nexcept BaseException: pass\n"
    (tmp_path / "asks_to_leave.py").write_text(module)
    done = subprocess.run(
        [sys.executable, "-c", IMPORTING, "import asks_to_leave", "signal.raise_signal(signal.SIGTERM)"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.split("\0") == ["75", "AskedToLeave\n0", ""]
    assert done.stderr.split("\0") == ["mcore-rl: SIGTERM was delivered during an import\n", "", ""]
    assert done.returncode == 0


def test_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with leaving_when_asked():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


def test_after_the_ranks_their_end_is_said_whatever_comes() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}

    def torch_does(number: int, frame: object) -> None:
        raise RuntimeError("nobody catches this")

    try:
        signal.signal(signal.SIGTERM, torch_does)
        with pytest.raises(RuntimeError):
            signal.raise_signal(signal.SIGTERM)
        finish_although_asked()
        signal.raise_signal(signal.SIGTERM)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
