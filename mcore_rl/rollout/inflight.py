"""Groups that servers generate, beside the trainer's thread: which these are, and who asks for them.

`Schedule` and `Queue` say which groups are asked, taken and discarded in each step; they are pure, without
I/O and clock. Version v is the weights after step v, so that step s is trained on weights s - 1 and a token
of version v is then s - 1 - v old. A group's tokens are never older than the version that served when it was
asked.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Literal, Protocol, TypeVar

from mcore_rl.errors import RolloutError
from mcore_rl.rollout.client import Reply, RolloutClient
from mcore_rl.rollout.dispatch import Dispatch, Request, join
from mcore_rl.types import Sample

Discarded = Literal["unfinished", "stale"]
"""why a group is not taken: cut off by the early stop, or finished and too old for the next step"""


class Schedule:
    """The groups in flight of one replica, oldest first.

    A step takes, of the oldest that it wants and `extra` more, the first to finish. Those left keep
    generating, under new weights too, until no later step could train them. Without `extra` a step therefore
    takes the oldest, in whatever order they finish, and none is ever discarded.

    Args:
        extra: asked beyond those of the steps, so that a step need not wait for the slowest.
        max_staleness: versions that a trained token may be old. With 0 the groups of a step are asked in it,
            and none is in flight between two steps.
        outlives: a group that has not finished may go on while its first tokens become too old to be trained,
            since its later ones are not. One that has finished is discarded once its last token is too old.
    """

    def __init__(self, *, extra: int, max_staleness: int, outlives: bool = False) -> None:
        self.extra = extra
        self.max_staleness = max_staleness
        self.outlives = outlives
        self._newest: dict[str, int] = {}
        """id of a group that has finished -> version that served then, where it is told"""
        self._asked: dict[str, int] = {}
        """id -> version that served when it was asked; oldest first"""
        self._finished: list[str] = []
        """in the order of finishing"""

    @property
    def in_flight(self) -> Mapping[str, int]:
        """Asked, and neither taken nor discarded: id -> version that served when it was asked."""
        return self._asked

    def ask(self, ids: Iterable[str], version: int) -> None:
        """These are asked while `version` serves."""
        self._asked |= dict.fromkeys(ids, version)

    def finish(self, group: str, newest: int | None = None) -> None:
        """All samples of this group have arrived, while version `newest` served."""
        self._finished.append(group)
        if newest is not None:
            self._newest[group] = newest

    def take(self, groups: int) -> tuple[str, ...] | None:
        """So many groups, in the order in which they were asked; None as long as too few have finished."""
        if len(self._finished) < groups:  # asked after every group that finishes
            return None
        window = set(list(self._asked)[: groups + self.extra])
        first = set([group for group in self._finished if group in window][:groups])
        if len(first) < groups:
            return None
        taken = tuple(group for group in self._asked if group in first)
        self._remove(taken)
        return taken

    def discard(self, step: int) -> Mapping[str, Discarded]:
        """Take out the groups that would be too old for step + 1; `step` itself has taken its own."""
        finished = set(self._finished)
        discarded: dict[str, Discarded] = {
            group: "stale" if group in finished else "unfinished"
            for group in self._older(step)
            if not (self.outlives and self._lives(group, finished, step))
        }
        self._remove(discarded)
        return discarded

    def outlived(self, step: int) -> list[str]:
        """Groups that have not finished, and of which the first tokens are too old for step + 1."""
        return [group for group in self._older(step) if group not in set(self._finished)]

    def _older(self, step: int) -> list[str]:
        return [group for group, version in self._asked.items() if version < step - self.max_staleness]

    def _lives(self, group: str, finished: Collection[str], step: int) -> bool:
        return group not in finished or self._newest.get(group, -1) >= step - self.max_staleness

    def _remove(self, groups: Iterable[str]) -> None:
        for group in groups:
            del self._asked[group]
            self._newest.pop(group, None)
        self._finished = [group for group in self._finished if group in self._asked]


class Queue:
    """The groups in flight of all replicas, oldest first; every rank has the same one.

    What is asked and what is taken follows from it alone, so that it does not depend on how many replicas
    share the work, nor on which of them is the faster.

    Args:
        groups: trained per step.
        extra, max_staleness: as in Schedule, over all replicas.
    """

    def __init__(self, *, groups: int, extra: int, max_staleness: int, replicas: int) -> None:
        self.groups, self.extra, self.max_staleness = groups, extra, max_staleness
        self._replica: dict[str, int] = {}
        """id -> who asked for it; oldest first"""
        self._replicas = replicas

    def __len__(self) -> int:
        return len(self._replica)

    def __iter__(self) -> Iterator[str]:
        return iter(self._replica)

    def wanted(self, steps: int, missing: int) -> int:
        """Groups to ask now, where this step lacks `missing` and `steps` are left, this one among them.

        For this step and for `max_staleness` more, as far as they will come.
        """
        later = min(self.max_staleness, steps - 1) * self.groups
        return max(0, missing + later + self.extra - len(self))

    def spread(self, count: int) -> list[int]:
        """How many of `count` new groups each replica asks for: those that have the fewest come first."""
        loads = [0] * self._replicas
        for replica in self._replica.values():
            loads[replica] += 1
        more = [0] * self._replicas
        for _ in range(count):
            least = min(range(self._replicas), key=lambda replica: loads[replica] + more[replica])
            more[least] += 1
        return more

    def ask(self, groups: Sequence[str], counts: Sequence[int]) -> None:
        """These are asked, by each replica in turn so many."""
        replicas = (replica for replica, count in enumerate(counts) for _ in range(count))
        self._replica |= dict(zip(groups, replicas, strict=True))

    def oldest(self, count: int) -> list[int]:
        """How many of the `count` oldest each replica has."""
        owners = list(self._replica.values())[:count]
        return [owners.count(replica) for replica in range(self._replicas)]

    def remove(self, groups: Iterable[str]) -> None:
        """These were taken or discarded."""
        for group in groups:
            del self._replica[group]


T = TypeVar("T")
Replies = Sequence[Reply | Sample]
"""one per sample of a group: what a server said, or what a rollout of an environment came to"""
Arrived = Callable[[str, Replies], None]
"""is told of a group, by its id, as soon as all its samples have come"""
Begun = Sequence[asyncio.Task[list[Replies]]]
"""calls that are waited for later"""

_CLOSE_SECONDS = 10.0


class Player(Protocol):
    """Makes samples that are no answers to a prompt but rollouts of an environment."""

    async def play(
        self,
        request: Request,
        ask: Callable[[Request], Awaitable[list[Reply]]],
        parse: Callable[[str, Mapping[str, Any]], Awaitable[Mapping[str, Any]]],
        /,
    ) -> list[Sample]:
        """One sample for each id of the request, by asking servers as often as it likes.

        `parse` sends a path and a body to a server that reads texts.
        """
        ...

    async def cut(self, ids: Sequence[str], /) -> None:
        """End these rollouts where they are: they are asked for no further turn."""
        ...

    async def states(self, ids: Sequence[str], /) -> dict[str, Any]:
        """What of these rollouts can be resumed later, as JSON, by their ids."""
        ...

    def take_rewritten(self) -> int:
        """Turns since the last call whose conversation the chat template wrote anew."""
        ...


def _nobody_asks(group: str, replies: Replies) -> None:
    """Ignore the group: the default for `arrived`."""


@dataclass(frozen=True)
class PendingGroup:
    """All samples of one prompt, being generated or waiting for their step."""

    id: str
    version: int
    """served when it was asked"""
    request: Request
    replies: Replies | None = None
    """one per sample, once all have finished"""
    played: Mapping[str, Any] = field(default_factory=dict)
    """where they have not: what of rollouts of an environment can be resumed, by their ids"""


class InFlight:
    """The requests of one replica. The schedule and the servers belong to the thread.

    A publish does not wait for requests: the server retracts what runs, loads, and continues it under the new
    weights. Nothing is taken meanwhile, since whoever publishes is whoever takes.

    Args:
        dispatch: not open yet.
        timeout: seconds for any call here; RolloutError after it.
        player: makes the samples, where there is an environment.
        cuts: rollouts whose first tokens have become too old are ended where they are.
    """

    def __init__(
        self,
        dispatch: Dispatch,
        schedule: Schedule,
        *,
        timeout: float,
        player: Player | None = None,
        cuts: bool = False,
    ) -> None:
        self._dispatch, self._schedule, self._timeout, self._player = dispatch, schedule, timeout, player
        self._cuts = cuts
        self._requests: dict[str, Request] = {}
        """of all groups in flight"""
        self._replies: dict[str, Replies] = {}
        """of the groups that have finished"""
        self._tasks: dict[str, asyncio.Task[None]] = {}
        """of those that have not"""
        self._begun: set[asyncio.Task[list[Replies]]] = set()
        """calls that belong to no step, until `finish` has their replies"""
        self._error: Exception | None = None
        self._loop = asyncio.new_event_loop()
        self._changed = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_forever, name="mcore_rl-rollout", daemon=True)
        self._thread.start()
        self._call(self._dispatch.__aenter__())

    def close(self) -> None:
        """Ends requests and thread; a server stops generating for a request whose connection closes."""
        with suppress(RolloutError):
            self._call(self._end(), _CLOSE_SECONDS)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_CLOSE_SECONDS)
        if not self._thread.is_alive():
            self._loop.close()

    # -- what the lead calls ------------------------------------------------------------------------------

    def keep(self, clients: Sequence[RolloutClient]) -> None:
        """All servers but these are lost: what runs on others moves."""
        self._call(self._keep(clients))

    def add(self, groups: Iterable[PendingGroup], per_call: int = 1, arrived: Arrived = _nobody_asks) -> None:
        """These are in flight from now on, in this order: those without replies are asked.

        Args:
            per_call: groups that one call asks for. They finish together, so that more than 1 is for groups
                that are all waited for.
            arrived: called on the thread, which it must not keep.
        """
        self._call(self._add(groups, per_call, arrived))

    def begin(self, requests: Sequence[Request], per_call: int = 1, calls: int = 4) -> Begun:
        """Ask these, which belong to no step and which the schedule does not see; `finish` waits for them.

        Args:
            per_call: requests that one call asks for.
            calls: so many calls at a time, so that none waits longer at a server than a call may take.
        """
        return self._call(self._begin(requests, per_call, calls))

    def finish(self, begun: Begun) -> list[Replies]:
        """The replies to each of those requests, waiting for them.

        Raises:
            RolloutError, RejectedError: as `take`.
        """
        return self._call(self._finish(begun))

    def take(self, groups: int) -> dict[str, Replies]:
        """So many groups, waiting for them: id -> one reply per sample, in the order of asking.

        Raises:
            RolloutError: no server is left, or they do not finish within the timeout.
            RejectedError: a server refuses one of the groups in flight.
        """
        return self._call(self._take(groups))

    def discard(self, step: int) -> Mapping[str, Discarded]:
        """What no step after `step` could train: it is in flight no more, and its generation ends."""
        return self._call(self._discard(step))

    def lost(self) -> dict[str, str]:
        """Servers lost since the last call: url -> why."""
        return self._call(self._lost())

    def expect(self, clients: Sequence[RolloutClient], version: str) -> None:
        """The publish of `version` begins; all servers but `clients` are lost."""
        self._call(self._expect(clients, version))

    def serve(self, clients: Sequence[RolloutClient], version: str) -> None:
        """`version` is published and verified; `clients` hold it."""
        self._call(self._dispatch.serve(clients, version))

    def groups(self) -> list[PendingGroup]:
        """Every group in flight, oldest first: what `add` continues with."""
        return self._call(self._groups())

    def rewritten(self) -> int:
        """What Player.take_rewritten says, where there is an environment."""
        return 0 if self._player is None else self._player.take_rewritten()

    # -- on the thread ------------------------------------------------------------------------------------

    def _call(self, work: Coroutine[Any, Any, T], timeout: float | None = None) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(self._timeout if timeout is None else timeout)
        except FutureTimeout as error:
            future.cancel()
            raise RolloutError(
                f"the groups in flight did not answer within {self._timeout:g} s; see the servers' logs, "
                "ask for fewer (rollout.max_staleness, rollout.over_sampling), or raise train.step_timeout"
            ) from error

    async def _keep(self, clients: Sequence[RolloutClient]) -> None:
        self._dispatch.keep(clients, "was lost to another replica")

    async def _add(self, groups: Iterable[PendingGroup], per_call: int, arrived: Arrived) -> None:
        asked: list[PendingGroup] = []
        for group in groups:
            self._schedule.ask([group.id], group.version)
            self._requests[group.id] = group.request
            if group.replies is None:
                asked.append(group)
            else:
                self._arrive(group.id, group.replies, arrived)
        for start in range(0, len(asked), per_call):
            call = asked[start : start + per_call]
            task = asyncio.create_task(self._generate(call, arrived))
            self._tasks |= dict.fromkeys((group.id for group in call), task)

    async def _begin(self, requests: Sequence[Request], per_call: int, calls: int) -> Begun:
        free = asyncio.Semaphore(calls)

        async def one(part: Sequence[Request]) -> list[Replies]:
            async with free:
                return await self._one_call(part)

        parts = [requests[start : start + per_call] for start in range(0, len(requests), per_call)]
        begun = [asyncio.create_task(one(part)) for part in parts]
        self._begun.update(begun)
        return begun

    async def _finish(self, begun: Begun) -> list[Replies]:
        answers = await asyncio.gather(*begun)
        self._begun.difference_update(begun)
        return [replies for answer in answers for replies in answer]

    async def _one_call(self, requests: Sequence[Request]) -> list[Replies]:
        if self._player is not None:
            played = (self._player.play(one, self._dispatch.ask, self._dispatch.parse) for one in requests)
            return list(await asyncio.gather(*played))
        replies = iter(await self._dispatch.ask(join(requests)))
        return [list(islice(replies, len(request.rids))) for request in requests]

    def _arrive(self, group: str, replies: Replies, arrived: Arrived) -> None:
        self._replies[group] = replies
        self._schedule.finish(group, int(self._dispatch.version) if self._schedule.outlives else None)
        arrived(group, replies)

    async def _generate(self, groups: Sequence[PendingGroup], arrived: Arrived) -> None:
        try:
            answer = await self._one_call([group.request for group in groups])
            for group, replies in zip(groups, answer, strict=True):
                self._arrive(group.id, replies, arrived)
        except Exception as error:  # raised by the next `take`: this thread has no caller
            self._error = self._error or error
        finally:
            for group in groups:
                self._tasks.pop(group.id, None)
            self._changed.set()

    async def _take(self, groups: int) -> dict[str, Replies]:
        while (taken := self._schedule.take(groups)) is None:
            if self._error is not None:
                raise self._error
            self._changed.clear()
            await self._changed.wait()
        for group in taken:
            del self._requests[group]
        return {group: self._replies.pop(group) for group in taken}

    async def _discard(self, step: int) -> Mapping[str, Discarded]:
        discarded = self._schedule.discard(step)
        for group in discarded:
            del self._requests[group]
            self._replies.pop(group, None)
            if group in self._tasks:
                self._tasks[group].cancel()
        if self._cuts and self._player is not None:
            late = self._schedule.outlived(step)
            await self._player.cut([id for group in late for id in self._requests[group].rids])
        return discarded

    async def _lost(self) -> dict[str, str]:
        lost, self._dispatch.lost = self._dispatch.lost, {}
        return lost

    async def _expect(self, clients: Sequence[RolloutClient], version: str) -> None:
        self._dispatch.expect(clients, version)

    async def _groups(self) -> list[PendingGroup]:
        in_flight = self._schedule.in_flight.items()
        groups = [
            PendingGroup(id, version, self._requests[id], self._replies.get(id)) for id, version in in_flight
        ]
        if self._player is None:
            return groups
        ids = [id for group in groups if group.replies is None for id in group.request.rids]
        states = await self._player.states(ids)
        played = [{id: states[id] for id in group.request.rids if id in states} for group in groups]
        return [replace(group, played=its) for group, its in zip(groups, played, strict=True)]

    async def _end(self) -> None:
        tasks = [*self._tasks.values(), *self._begun]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._dispatch.__aexit__(None, None, None)
