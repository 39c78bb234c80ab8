"""The ranks of this host, seen by each other: which of them is gone, which is stopped.

torchrun and `launch_node` start all ranks of a host as their own children, with the rank's number in its
environment. A rank that was killed, or left by os._exit, says nothing; its siblings can.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection
from contextlib import suppress

import psutil

_SETTLE_SECONDS = 1.0
"""A connection breaks a moment before the process that held it is gone."""
_POLL_SECONDS = 0.05


def siblings() -> dict[int, psutil.Process]:
    """Rank -> its process, of those of this host that are there, this one included."""
    parent = psutil.Process().parent()
    return {} if parent is None else ranks_below(parent, os.environ.get("TORCHELASTIC_RUN_ID"))


def ranks_below(launcher: psutil.Process, launch: str | None) -> dict[int, psutil.Process]:
    """Rank -> its process, of the children of `launcher` that carry the name of its `launch`."""
    found: dict[int, psutil.Process] = {}
    for child in launcher.children():
        with suppress(psutil.Error, KeyError, ValueError):  # it has just ended, or it is no rank
            environment = child.environ()
            if environment.get("TORCHELASTIC_RUN_ID") == launch:
                found[int(environment["RANK"])] = child
    return found


def lost_ranks(rank: int, spoken: Collection[int]) -> list[int]:
    """Ranks of this host that are gone, except those that have `spoken`; waits a moment for one to go."""
    first = rank - int(os.environ.get("LOCAL_RANK", "0"))
    silent = set(range(first, first + int(os.environ.get("LOCAL_WORLD_SIZE", "1")))) - {rank, *spoken}
    deadline = time.monotonic() + _SETTLE_SECONDS
    while silent:
        lost = sorted(silent - siblings().keys())
        if lost or time.monotonic() > deadline:
            return lost
        time.sleep(_POLL_SECONDS)
    return []


def state_of(rank: int) -> str:
    """What the system says of the process of `rank`: `stopped`, `sleeping`, ...; where it is not here, so."""
    process = siblings().get(rank)
    with suppress(psutil.Error):
        if process is not None:
            return f"its process {process.pid} is {process.status()}"
    return "no process of it is on this host"
