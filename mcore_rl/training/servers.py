"""The rollout servers of a run, as all ranks know them: which serve, and which have given up their memory.

Servers on the trainer's own GPUs (residency.servers) release their memory after generation. The weights'
memory is back before a publish fills it, the KV cache's before anything is generated. What was released is
empty: between the two, a server has nothing to be asked for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Literal

from mcore_rl.log import StepLog, Timers
from mcore_rl.parallel.control import on_main
from mcore_rl.parallel.mesh import Mesh
from mcore_rl.rollout.client import RolloutClient
from mcore_rl.rollout.fleet import Fleet, on_each

Memory = Literal["weights", "kv_cache"]


class Servers:
    """Every rank has one, and every method is collective.

    Args:
        step_log: what is lost is an event there.
        shared: the servers run on the trainer's GPUs, and their memory is free while the trainer trains.
    """

    def __init__(self, mesh: Mesh, fleet: Fleet, step_log: StepLog, timers: Timers, *, shared: bool) -> None:
        self.fleet = fleet
        self._mesh, self._step_log, self._timers, self._shared = mesh, step_log, timers, shared

    def lose(self, lost: Mapping[str, str]) -> None:
        """These servers (url -> why, the same on every rank) serve no more until a publish.

        Those of this machine are started anew, at once or (where they share the GPUs) at the next publish,
        and are published to when they answer. A server that is known to be lost already, or an address that
        a server no longer has, is no news.
        """
        serving = {client.url for client in self.fleet.serving}
        lost = {url: why for url, why in lost.items() if url in serving}
        for url, why in lost.items():
            self._step_log.event("server_lost", url=url, why=why)
        self.fleet.lose(lost)
        if self.fleet.status.lost:  # one that starts would take the memory
            again = self.fleet.end_lost if self._shared else self.fleet.restart_lost
            self.fleet.status = on_main(self._mesh, again)

    def release(self) -> None:
        """The servers that serve give up their memory, once, where they share the GPUs.

        A server that does not is lost.
        """
        if self._shared:
            with self._timers("release"):
                away = self.fleet.released
                done = self._ask(lambda url: url not in away, lambda client: client.release_memory())
                self.fleet.released |= dict.fromkeys(done, frozenset({"weights", "kv_cache"}))

    def bring_back(self, part: Memory) -> None:
        """The servers that have released `part` take its memory back. One that does not is lost."""
        away = self.fleet.released
        if any(part in parts for parts in away.values()):
            done = self._ask(lambda url: part in away.get(url, ()), lambda client: client.resume_memory(part))
            left = self.fleet.released | {url: away[url] - {part} for url in done}
            self.fleet.released = {url: parts for url, parts in left.items() if parts}

    def restart_ended(self) -> None:
        """Lost servers that share the GPUs, and were ended therefore, are started and waited for."""
        if self._shared and self.fleet.status.lost:
            self.fleet.status = on_main(self._mesh, self.fleet.restart_and_wait)

    def _ask(
        self, concerns: Callable[[str], bool], use: Callable[[RolloutClient], Awaitable[None]]
    ) -> list[str]:
        """The urls where `use` has succeeded; the others of those that `concerns` names are lost."""
        clients = [client for client in self.fleet.serving if concerns(client.url)]

        def work() -> tuple[list[str], dict[str, str]]:
            done, failed = asyncio.run(on_each(clients, use))
            return list(done), failed

        done, failed = on_main(self._mesh, work)
        self.lose(failed)
        return done
