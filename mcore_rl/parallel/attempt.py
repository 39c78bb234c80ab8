"""One store per attempt: what an earlier attempt wrote must not be read by the next one.

torchrun keeps one key-value store over its restarts and gives it to every attempt (pytorch issue 135712): a
new process group would take the addresses that dead ranks have left there, and connect to nobody. The count
of restarts does not tell attempts apart: every node's agent has its own. So the ranks agree on a name.
"""

from __future__ import annotations

import json
import time
import uuid
from datetime import timedelta

from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

_POLL_SECONDS = 0.05
_NAME = "mcore_rl"


def attempt_store(timeout: float) -> tuple[Store, int, int]:
    """(store of this attempt alone, rank, world size), from torchrun's environment; collective.

    Raises:
        TimeoutError: some rank did not come within `timeout` seconds.
    """
    store, rank, world_size = next(iter(rendezvous("env://", timeout=timedelta(seconds=timeout))))
    return PrefixStore(agree(store, rank, world_size, timeout), store), rank, world_size


def agree(store: Store, rank: int, world_size: int, timeout: float) -> str:
    """A name that all ranks return and no earlier attempt had, whatever earlier attempts left in `store`.

    Every rank writes a word of its own. Rank 0 proposes a name beside the words that it sees, a new one when
    they change; a rank accepts the proposal that holds its word; accepted by all, it is final.

    Raises:
        TimeoutError: as above.
    """
    deadline = time.monotonic() + timeout
    name = _propose(store, world_size, deadline) if rank == 0 else _accept(store, rank, deadline)
    return f"{_NAME}/{name}"


def _propose(store: Store, world_size: int, deadline: float) -> str:
    others = range(1, world_size)
    words: list[str] = []
    name = uuid.uuid4().hex
    while True:
        seen = [_get(store, f"word/{rank}") for rank in others]
        if seen != words:
            words, name = seen, uuid.uuid4().hex
            store.set(f"{_NAME}/proposal", json.dumps([name, words]))
        if all(_get(store, f"accepted/{rank}") == name for rank in others):
            store.set(f"{_NAME}/final", name)
            return name
        missing = [rank for rank in others if not seen[rank - 1]]
        _sleep(deadline, f"ranks {missing or list(others)}")


def _accept(store: Store, rank: int, deadline: float) -> str:
    word = uuid.uuid4().hex
    store.set(f"{_NAME}/word/{rank}", word)
    accepted = ""
    while not accepted or _get(store, "final") != accepted:
        name, words = json.loads(_get(store, "proposal") or '["", []]')
        if name != accepted and words[rank - 1 : rank] == [word]:
            accepted = name
            store.set(f"{_NAME}/accepted/{rank}", name)
        _sleep(deadline, "rank 0")
    return accepted


def _get(store: Store, key: str) -> str:
    """The value, empty where there is none."""
    key = f"{_NAME}/{key}"
    return store.get(key).decode() if store.check([key]) else ""


def _sleep(deadline: float, whom: str) -> None:
    if time.monotonic() > deadline:
        raise TimeoutError(f"no word from {whom} while the ranks meet; look at the logs of their nodes")
    time.sleep(_POLL_SECONDS)
