"""Servers on the trainer's own GPUs: their memory is free while the trainer trains (residency.servers).

Released after generation; the weights' memory is back before a publish fills it, the KV cache's before
anything is generated. What was released is empty: between the two, a server has nothing to be asked for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Literal

from mcore_rl.parallel.control import on_main
from mcore_rl.rollout.client import RolloutClient
from mcore_rl.rollout.fleet import on_each

if TYPE_CHECKING:
    from mcore_rl.train.run import Run

Part = Literal["weights", "kv_cache"]


def release_servers(run: Run) -> None:
    """The servers that serve give up their memory, once; collective. One that does not is lost."""
    if run.config.residency.servers == "released":
        with run.timers("release"):
            away = run.fleet.released
            done = _ask(run, lambda url: url not in away, lambda client: client.release_memory())
            run.fleet.released |= dict.fromkeys(done, frozenset({"weights", "kv_cache"}))


def bring_back(run: Run, part: Part) -> None:
    """Those that have released `part` take its memory back; collective. One that does not is lost."""
    away = run.fleet.released
    if any(part in parts for parts in away.values()):
        done = _ask(run, lambda url: part in away.get(url, ()), lambda client: client.resume_memory(part))
        left = run.fleet.released | {url: away[url] - {part} for url in done}
        run.fleet.released = {url: parts for url, parts in left.items() if parts}


def restart_ended(run: Run) -> None:
    """Servers of this machine that were lost, and so ended, are started and waited for; collective."""
    if run.config.residency.servers == "released" and run.fleet.standing.lost:
        run.fleet.standing = on_main(run.mesh, run.fleet.restart_and_wait)


def _ask(
    run: Run, concerns: Callable[[str], bool], use: Callable[[RolloutClient], Awaitable[None]]
) -> list[str]:
    """The urls where `use` has succeeded; the others of those that `concerns` names are lost."""
    clients = [client for client in run.fleet.serving if concerns(client.url)]

    def work() -> tuple[list[str], dict[str, str]]:
        done, failed = asyncio.run(on_each(clients, use))
        return list(done), failed

    done, failed = on_main(run.mesh, work)
    run.lose(failed)
    return done
