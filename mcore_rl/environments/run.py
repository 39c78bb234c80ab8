"""Runs the rollouts of an environment: one task each, all of them on one event loop in a thread of its own.

What an environment does to its rollout is its own affair: what raises, takes too long or returns no reward
makes a void sample. One that keeps the event loop, instead of waiting by `await`, keeps every other rollout,
and ends the run with the line on which it stands. The servers' connections are another thread's, so that they
do not suffer from it.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from mcore_rl.environments.deadlines import Deadlines
from mcore_rl.environments.dialogue import ChatTemplate
from mcore_rl.environments.parsers import Parse
from mcore_rl.environments.policy import AbortedError, Ask, LimitReached, Policy, RolloutLimits
from mcore_rl.environments.sessions import SampledTurn, SessionClass, SessionKeeper, StateError
from mcore_rl.errors import BlockedLoopError, RewardError
from mcore_rl.rewards.outcome import Void, read_outcome
from mcore_rl.rollout.dispatch import Request
from mcore_rl.rollout.reply import Reply
from mcore_rl.rollout.saved import prompt_digest
from mcore_rl.rollout.saved_samples import sample_from_json, sample_to_json
from mcore_rl.terminal import QUOTED_CHARS, escaped, printable, short
from mcore_rl.types import Prompt, Sample, Segment
from mcore_rl.user_code import MOST_CHARS, place, said

T = TypeVar("T")
_BEAT_SECONDS = 0.5
_LEAST_BLOCKED_SECONDS = 10.0
"""a busy machine may keep a loop for seconds"""
_WHY_CHARS = QUOTED_CHARS + MOST_CHARS
"""the most that is kept of why a rollout is void"""
_GRACE_SECONDS = 5.0
"""until a rollout that was cancelled has put away what it holds"""
_CLOSE_SECONDS = 10.0
_NO_TOKENS = Void("empty", "ended before anything was sampled")


@dataclass(frozen=True)
class Environment:
    """What a rollout is: the user's function, and what every rollout of it is given."""

    name: str
    """`module:function`, for messages"""
    function: Callable[..., Any] | SessionClass
    """async, of a Policy and a Prompt; returns what a reward function may, or None"""
    template: ChatTemplate
    limits: RolloutLimits
    weights: Mapping[str, float]
    """of the parts of a reward"""


class Environments:
    """The rollouts of one replica. The thread begins with the first, and ends with `close`."""

    def __init__(self, environment: Environment) -> None:
        self._of = environment
        self._thread: threading.Thread | None = None
        self._loop = asyncio.new_event_loop()
        self._beat = 0.0
        self._abandoned: set[asyncio.Task[Any]] = set()
        """that go on after they were cancelled"""
        self._rewritten = self._counted = 0
        self._playing: dict[str, Policy] = {}
        """by the id of the rollout"""
        self._played: dict[str, Sample] = {}
        """rollouts that have ended, of groups that have not"""

    def close(self) -> None:
        """End the thread, and with it all rollouts."""
        if self._thread is None:
            self._loop.close()
            return
        with suppress(Exception):  # a blocked loop does not come to it
            asyncio.run_coroutine_threadsafe(_cancel_all(), self._loop).result(_CLOSE_SECONDS)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_CLOSE_SECONDS)
        if not self._thread.is_alive():
            self._loop.close()

    def take_rewritten(self) -> int:
        """Turns since the last call whose conversation the chat template wrote anew."""
        new, self._counted = self._rewritten - self._counted, self._rewritten
        return new

    async def play(self, request: Request, ask: Ask, parse: Parse | None = None) -> list[Sample]:
        """The rollouts that `request` asks for, one for each of its ids; called on the loop of `ask`.

        Args:
            parse: has a server read an answer, on the same loop.

        Raises:
            RolloutError, RejectedError: what `ask` raises in one of them.
            BlockedLoopError: the environment keeps the event loop.
        """
        if self._thread is None:
            self._start()
        home = asyncio.get_running_loop()

        async def far(one: Request) -> list[Reply]:
            return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(_awaited(ask(one)), home))

        async def far_parse(path: str, body: Mapping[str, Any]) -> Mapping[str, Any]:
            assert parse is not None
            work = asyncio.run_coroutine_threadsafe(_awaited(parse(path, body)), home)
            return await asyncio.wrap_future(work)

        group = self._group(request, far, None if parse is None else far_parse)
        played = asyncio.wrap_future(asyncio.run_coroutine_threadsafe(group, self._loop))
        most = max(_LEAST_BLOCKED_SECONDS, self._of.limits.turn_seconds)
        try:
            while not (await asyncio.wait({played}, timeout=most / 4))[0]:
                if time.monotonic() - self._beat > most:
                    raise BlockedLoopError(self._blocked(most))
            return played.result()
        finally:
            played.cancel()

    async def cut(self, ids: Sequence[str]) -> None:
        """End these rollouts where they are, as those that have had all their turns: they are too old."""
        if self._thread is not None:
            work = asyncio.run_coroutine_threadsafe(self._cut(ids), self._loop)
            await asyncio.wait_for(asyncio.wrap_future(work), _CLOSE_SECONDS)

    async def states(self, ids: Sequence[str]) -> dict[str, Any]:
        """What of these rollouts, of groups that have not ended, can be resumed later, as JSON.

        Those that are absent begin again: their environment has no state, or has not asked for a turn.
        """
        if self._thread is None:
            return {}
        work = asyncio.run_coroutine_threadsafe(self._states(ids), self._loop)
        return await asyncio.wait_for(asyncio.wrap_future(work), _CLOSE_SECONDS)

    # -- on the thread ------------------------------------------------------------------------------------

    def _start(self) -> None:
        self._beat = time.monotonic()
        self._loop.call_soon(self._tick)
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="mcore_rl-environments", daemon=True
        )
        self._thread.start()

    def _tick(self) -> None:
        self._beat = time.monotonic()
        self._loop.call_later(_BEAT_SECONDS, self._tick)

    def _blocked(self, seconds: float) -> str:
        assert self._thread is not None
        frame = sys._current_frames().get(self._thread.ident or 0)
        stack = traceback.extract_stack(frame) if frame is not None else []
        where = f"it stands at {stack[-1].filename}:{stack[-1].lineno}; " if stack else ""
        return (
            f"environment.function {self._of.name} has kept the event loop of all rollouts for "
            f"{seconds:g} s: {where}wait by `await` there, or call what waits by asyncio.to_thread"
        )

    async def _group(self, request: Request, ask: Ask, parse: Parse | None) -> list[Sample]:
        prompt = request.prompt
        assert prompt is not None, "an environment is asked for by a prompt"
        ones = [
            Request([ids], [params], [rid], resumed=request.resumed)
            for ids, params, rid in zip(request.prompts, request.sampling_params, request.rids, strict=True)
        ]
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._attempt(prompt, one, ask, parse)) for one in ones]
        except BaseExceptionGroup as errors:  # the first has ended the others
            raise errors.exceptions[0] from None
        finally:
            for one in ones:
                self._played.pop(one.rids[0], None)
        return [task.result() for task in tasks]

    async def _cut(self, ids: Sequence[str]) -> None:
        for id in ids:
            if (policy := self._playing.get(id)) is not None:
                policy.cut()

    async def _states(self, ids: Sequence[str]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for id in ids:
            if (sample := self._played.get(id)) is not None:
                found[id] = {"sample": sample_to_json(sample), "prompt": prompt_digest(sample.prompt)}
            elif (policy := self._playing.get(id)) is not None and policy.keeper is not None:
                kept = policy.keeper.to_json()
                found |= {} if kept is None else {id: kept | {"prompt": prompt_digest(policy.prompt)}}
        return found

    async def _attempt(self, prompt: Prompt, request: Request, ask: Ask, parse: Parse | None) -> Sample:
        id = request.rids[0]
        saved = request.resumed.get(id)
        if saved is not None and "sample" in saved:
            self._played[id] = sample_from_json(saved["sample"], prompt)
            return self._played[id]
        policy = Policy(prompt, request, ask, self._of.template, self._of.limits, parse)
        self._playing[id] = policy
        try:
            returned = await self._outcome(policy, prompt, saved)
        finally:
            del self._playing[id]
        if policy.progress.broken is not None:
            raise policy.progress.broken
        if policy.progress.stateless:
            returned = Void("state", policy.progress.stateless)
        self._note_rewritten(policy.dialogue.rewritten, prompt)
        self._played[id] = self._sample(policy, prompt, id, returned)
        return self._played[id]

    def _function(self, policy: Policy, saved: Mapping[str, Any] | None) -> Callable[..., Any]:
        """What plays this rollout: the function, or a session, from what was saved of it on."""
        of = self._of.function
        if not isinstance(of, SessionClass):
            return of
        session: Any = of.begin()
        if of.restorable:
            turns = [SampledTurn.from_json(one) for one in saved["turns"]] if saved is not None else []
            if saved is not None:
                try:
                    session.restore(saved["state"])
                except Exception as error:
                    what = short(f"restore raised {type(error).__name__}: {said(error)}")
                    raise StateError(what + place(error)) from error
                policy.resume(turns, saved["asked"])
            policy.keeper = SessionKeeper(session.state, turns)
        return session.rollout

    async def _outcome(self, policy: Policy, prompt: Prompt, saved: Mapping[str, Any] | None) -> Any:
        """What the function returned, or the Void that it came to."""
        task = asyncio.create_task(_guarded(lambda: self._function(policy, saved), policy, prompt))
        deadlines = Deadlines(self._of.limits)
        policy.progress.changed = lambda: deadlines.turn(waiting=policy.progress.generating == 0)
        try:
            await asyncio.wait({task, deadlines.passed}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return Void("raised", "raised CancelledError") if task.cancelled() else task.result()
            return Void("timeout", deadlines.passed.result())
        finally:
            policy.progress.closed = True
            deadlines.close()
            await self._end(task)

    async def _end(self, task: asyncio.Task[Any]) -> None:
        if task.done():
            return
        task.cancel()
        await asyncio.wait({task}, timeout=_GRACE_SECONDS)
        if not task.done():
            self._abandoned.add(task)
            task.add_done_callback(self._abandoned.discard)

    def _sample(self, policy: Policy, prompt: Prompt, id: str, returned: Any) -> Sample:
        progress, segments = policy.progress, policy.recorder.segments(prompt)
        reason = "length" if progress.limit else progress.finish_reason
        if isinstance(returned, AbortedError):
            reason, returned = "abort", None
        elif not segments and not isinstance(returned, Void):
            returned = _NO_TOKENS
        if not segments:
            nothing = np.zeros(0, np.int32), np.zeros(0, np.float32)
            segments = (Segment(prompt.token_array, *nothing, ()),)
        sample = Sample(id, prompt, segments, progress.text, reason)
        return sample if returned is None else with_outcome(sample, returned, self._of.weights)

    def _note_rewritten(self, turns: int, prompt: Prompt) -> None:
        if turns and not self._rewritten:
            what = (
                f"environment: the chat template writes earlier turns anew once a later one is there (first "
                f"for prompt {short(prompt.id)}): such a turn begins another training sequence, counted in "
                "environment/rewritten"
            )
            print(printable(what), file=sys.stderr, flush=True)
        self._rewritten += turns


def with_outcome(sample: Sample, returned: Any, weights: Mapping[str, float]) -> Sample:
    """The sample with what an environment returned for it; void where that is no reward."""
    if not isinstance(returned, Void):
        try:
            found = read_outcome(returned, sample, weights)
        except RewardError as error:
            returned = Void("returned", f"returned {error}")
        except Exception as error:  # an object whose comparison or hash raises
            returned = Void("returned", f"returned what cannot be read ({type(error).__name__})")
        else:
            return replace(sample, reward=found.reward, parts=found.parts, turn_rewards=found.turn_rewards)
    why = returned.why or "returned Void"
    return replace(sample, void=True, failure=(short(returned.reason), escaped(why)[:_WHY_CHARS]))


async def _guarded(function: Callable[[], Callable[..., Any]], policy: Policy, prompt: Prompt) -> Any:
    """What the function returns, or what its exception means; only a cancellation passes.

    Args:
        function: makes it, which may be the user's code too.
    """
    try:
        return await function()(policy, prompt)
    except asyncio.CancelledError:
        raise
    except BaseException as error:  # SystemExit too, which would end the thread
        if _is(error, AbortedError):
            return AbortedError()
        if isinstance(error, StateError):
            return Void("restore", str(error))
        # A client of the gateway has an exception of its own for a rollout that has had all its turns.
        if policy.progress.limit or _is(error, LimitReached):
            return 0.0
        return Void("raised", short(f"raised {type(error).__name__}: {said(error)}") + place(error))


def _is(error: BaseException, kind: type[Exception]) -> bool:
    """Whether an exception is of that kind, or a group of such alone, as sub-agents in a TaskGroup raise."""
    return isinstance(error, kind) or (isinstance(error, BaseExceptionGroup) and error.split(kind)[1] is None)


async def _awaited(work: Awaitable[T]) -> T:
    return await work


async def _cancel_all() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks, timeout=_GRACE_SECONDS)
