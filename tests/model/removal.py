"""One measurement of `verify layouts` in two new processes, in which something of the package was removed."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

DEADLINE = 60.0


@dataclass(frozen=True)
class Outcome:
    """How the ranks ended."""

    finished: bool
    words: str
    """what they wrote to stderr"""


def step(remove: Callable[[], None], case: str, rank: int, directory: Path) -> None:
    """One measurement on two ranks; the exit code tells."""
    from mcore_rl.verify.layouts.case import Case
    from mcore_rl.verify.layouts.measure import measure

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with (directory / f"words.{rank}").open("w") as words:
        os.dup2(words.fileno(), 2)
    torch.set_num_threads(1)
    remove()
    rendezvous = (directory / "rendezvous").as_uri()
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    measure(Case.parse(case), ("gspo",), None)
    dist.barrier()
    dist.destroy_process_group()


def outcome(remove: Callable[[], None], case: str, directory: Path) -> Outcome:
    """What two ranks do, forked from a process that has imported everything and installed nothing.

    That is tests/preloaded.py, as of all ranks.
    """
    context = multiprocessing.get_context("forkserver")
    ranks = [
        context.Process(target=step, args=(remove, case, rank, directory), daemon=True) for rank in range(2)
    ]
    for rank in ranks:
        rank.start()
    deadline = time.monotonic() + DEADLINE
    while any(rank.is_alive() for rank in ranks) and time.monotonic() < deadline:
        ranks[0].join(timeout=0.1)
        if any(rank.exitcode for rank in ranks):  # the other one waits for it
            break
    for rank in ranks:
        rank.kill()
        rank.join()
    words = "\n".join((directory / f"words.{rank}").read_text() for rank in range(2))
    return Outcome(all(rank.exitcode == 0 for rank in ranks), words)


def nothing() -> None:
    """The control."""
