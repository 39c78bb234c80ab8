"""One store per attempt: what an earlier attempt wrote must not be read by the next one.

torchrun keeps one key-value store over its restarts and gives it to every attempt (pytorch issue 135712): a
new process group would take the addresses that dead ranks have left there, and connect to nobody. The count
of restarts does not tell attempts apart: every node's agent has its own. So the ranks agree on a name.
"""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from datetime import timedelta

from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from mcore_rl.errors import RendezvousError

_POLL_SECONDS = 0.05
_RETRY_SECONDS = 0.5
_CONNECT_SECONDS = 5.0
_NAME = "mcore_rl"


def attempt_store(timeout: float) -> tuple[Store, int, int]:
    """(store of this attempt alone, rank, world size), from torchrun's environment; collective.

    The way to the store is tried here first: torch would print a stack of its own for every attempt.

    Raises:
        RendezvousError: the store's host has no address or does not answer, or some rank did not come, within
            `timeout` seconds.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    is_host = os.environ["RANK"] == "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    reach(host, port, timeout, only_resolve=is_host)
    try:
        store, rank, world_size = next(iter(rendezvous("env://", timeout=timedelta(seconds=timeout))))
    except (RuntimeError, OSError) as error:
        what = str(error).partition("\n")[0]
        raise RendezvousError(
            f"the ranks do not meet at MASTER_ADDR={host}, MASTER_PORT={port} ({what}): start all of them, "
            "and give the launcher a port that no other program has"
        ) from error
    return PrefixStore(agree(store, rank, world_size, timeout), store), rank, world_size


def reach(host: str, port: int, timeout: float, *, only_resolve: bool = False) -> None:
    """Return when something answers at `host`:`port`; with `only_resolve`, when `host` has an address.

    A name may be known only after its host has started, so both are tried again until the deadline.

    Raises:
        RendezvousError: `timeout` seconds have passed.
    """
    deadline = time.monotonic() + timeout
    while True:
        try:
            if only_resolve:
                socket.getaddrinfo(host, port)
            else:
                left = max(_POLL_SECONDS, min(_CONNECT_SECONDS, deadline - time.monotonic()))
                socket.create_connection((host, port), timeout=left).close()
            return
        except (OSError, UnicodeError) as error:
            unknown = isinstance(error, socket.gaierror | UnicodeError)
            if time.monotonic() > deadline:
                raise _unreachable(host, port, timeout, error, unknown=unknown) from error
        time.sleep(_RETRY_SECONDS)


def _unreachable(host: str, port: int, timeout: float, error: Exception, *, unknown: bool) -> RendezvousError:
    why = getattr(error, "strerror", None) or str(error) or type(error).__name__
    if unknown:
        return RendezvousError(
            f"MASTER_ADDR={host!r:.300} has no address on this host after {timeout:g} s ({why}); give the "
            "name or address of rank 0's host, and see that this host's DNS knows it"
        )
    return RendezvousError(
        f"nothing answers at MASTER_ADDR={host}, MASTER_PORT={port} after {timeout:g} s ({why}): rank 0 has "
        "not started, has left, or a firewall is between; look at its log"
    )


def agree(store: Store, rank: int, world_size: int, timeout: float) -> str:
    """A name that all ranks return and no earlier attempt had, whatever earlier attempts left in `store`.

    Every rank writes a word of its own. Rank 0 proposes a name beside the words that it sees, a new one when
    they change; a rank accepts the proposal that holds its word; accepted by all, it is final.

    Raises:
        RendezvousError: as above.
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
        raise RendezvousError(f"no word from {whom} while the ranks meet; look at the logs of their nodes")
    time.sleep(_POLL_SECONDS)
