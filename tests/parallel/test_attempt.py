"""Attempts that share a store: everyone gets the same new name, whatever the dead have left behind."""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from mcore_rl.errors import EXIT_RETRYABLE, RendezvousError
from mcore_rl.parallel.attempt import agree, reach

WORLD = 3


def meet(store: dist.Store, ranks: range, timeout: float = 20.0) -> list[str]:
    with ThreadPoolExecutor(WORLD) as pool:
        return list(pool.map(lambda rank: agree(store, rank, WORLD, timeout), ranks))


def test_attempts_have_names_of_their_own():
    store, names = dist.HashStore(), []
    for _ in range(3):
        attempt = meet(store, range(WORLD))
        assert len(set(attempt)) == 1
        names.append(attempt[0])
    assert len(set(names)) == 3


def test_a_rank_that_died_while_they_met_is_not_met():
    """Its word and its acceptance are there; only a living rank 2 completes the attempt."""
    store = dist.HashStore()
    with pytest.raises(RendezvousError, match=r"rank 0"):
        meet(store, range(2, 3), timeout=0.3)
    with pytest.raises(RendezvousError, match=r"ranks \[1, 2\]"):
        meet(store, range(2), timeout=0.3)
    assert len(set(meet(store, range(WORLD)))) == 1


@pytest.mark.parametrize("only_resolve", [False, True], ids=["another rank", "rank 0"])
@pytest.mark.parametrize("host", ["no-such-host.invalid", "a" * 70 + ".invalid", "x..y"])
def test_a_host_without_an_address_is_said_within_the_deadline(host: str, only_resolve: bool):
    began = time.monotonic()
    with pytest.raises(RendezvousError, match=r"has no address on this host after 0\.3 s .*DNS") as raised:
        reach(host, 29500, 0.3, only_resolve=only_resolve)
    assert host in str(raised.value)
    assert raised.value.exit_code == EXIT_RETRYABLE
    assert time.monotonic() - began < 10


def test_a_host_that_does_not_answer_is_said_and_one_that_comes_late_is_found():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # it does not listen
        port = held.getsockname()[1]
        with pytest.raises(
            RendezvousError, match=f"nothing answers at MASTER_ADDR=localhost, MASTER_PORT={port}"
        ):
            reach("localhost", port, 0.3)
        reach("localhost", port, 0.3, only_resolve=True)
        late = threading.Timer(0.7, held.listen)
        late.start()
        reach("localhost", port, 20.0)
        late.join()
