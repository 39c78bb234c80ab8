"""Reward functions that do what user code does sooner or later: exit, crash, fork. Each fires once."""

from __future__ import annotations

import os
import signal
import sys
import time
from multiprocessing import get_context
from pathlib import Path

from mcore_rl.types import Sample

CALLS = [0]


def _due(at: int = 8) -> bool:
    CALLS[0] += 1  # the first five are held-out samples
    return CALLS[0] == at


def leave(sample: Sample) -> float:
    """What the model wrote calls exit(), sooner or later."""
    if _due():
        sys.exit(0)
    return float(len(sample.token_ids))


def fork(sample: Sample) -> float:
    """Three children: one comes back, one sleeps, one has gone to a session and a parent of its own."""
    if _due():
        with get_context("fork").Pool(1) as pool:  # ended by SIGTERM
            pool.map(len, ["abc"])
        notes = Path(os.environ["FORKED"])
        parent = os.getpid()
        for what in ("returns", "sleeps", "daemon"):
            if os.fork() == 0:
                _child(what, notes)
                break
        assert os.getpid() == parent or what == "returns"
    return float(len(sample.token_ids))


def _child(what: str, notes: Path) -> None:
    if what == "daemon":
        os.setsid()
        if os.fork():
            os._exit(0)
    with notes.open("a") as file:
        file.write(f"{what} {os.getpid()}\n")
    if what != "returns":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)
