"""Launchers whose ranks are forked from them instead of begun anew: all else of torch's agent is what it is.

A rank that is begun anew imports the library, which is most of what a short run costs. What is started so
carries the environment that torchrun gives it, but the system shows that of the process that it was forked
from. So a test in which ranks look for each other there (training/faults/siblings.py) has real ones, as has
one of what ends when a run does (training/faults/leftovers.py).
"""

from __future__ import annotations

import atexit
import inspect
import os
import runpy
import signal
import subprocess
import sys
import threading
import traceback
from typing import Any, NoReturn

_BEGIN = inspect.signature(subprocess.Popen._execute_child)  # pyright: ignore[reportAttributeAccessIssue]


class Forked(subprocess.Popen):
    """A process of Python, forked: `python [-u] [-P] (-m mcore_rl | SCRIPT) ARGUMENTS`."""

    def _execute_child(self, *given: Any) -> None:
        asked = _BEGIN.bind(self, *given).arguments
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        self._child_created = True
        if self.pid == 0:
            _become(list(asked["args"]), asked["env"], (asked["c2pwrite"], asked["errwrite"]))


def fork_ranks() -> None:
    """Torch's agent in this process forks what it would begin anew."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    vars(subprocess_handler)["Popen"] = Forked


def _become(command: list[str], environment: dict[str, str], streams: tuple[int, int]) -> NoReturn:
    """Never returns to the agent, whose threads and stores are not here: it ends as Python does without."""
    code = 1
    try:
        os.setsid()
        _usual_signals()
        atexit._clear()
        for given, place in zip(streams, (1, 2), strict=True):
            if given >= 0:
                os.dup2(given, place)
        os.environ.clear()
        os.environ.update(environment)
        _run([word for word in command[1:] if word not in ("-u", "-P")])
        code = 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run(words: list[str]) -> None:
    from mcore_rl.__main__ import main

    if words[:2] == ["-m", "mcore_rl"]:
        sys.argv = words[1:]
        sys.exit(main(words[2:]))
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


def _usual_signals() -> None:
    """As in a new process: what is ignored stays so, and nothing of the agent's is left."""
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
