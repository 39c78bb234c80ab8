"""What an environment has of the model: `generate`, within limits of turns, tokens and time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import index
from typing import Any

from mcore_rl.environments.dialogue import AskedTurn, ChatMessage, ChatTemplate, Dialogue, TooLongError
from mcore_rl.environments.live import LiveTurn
from mcore_rl.environments.parsers import Parse
from mcore_rl.environments.recorder import TokenRecorder
from mcore_rl.environments.sessions import SampledTurn, SessionKeeper, StateError
from mcore_rl.errors import DataError, RolloutError
from mcore_rl.rollout.client import RejectedError
from mcore_rl.rollout.dispatch import Request
from mcore_rl.rollout.reply import Reply
from mcore_rl.rollout.sampler import sample_seed
from mcore_rl.types import Prompt

Ask = Callable[[Request], Awaitable[list[Reply]]]
"""sends a request to a server"""


_LARGEST_ID = (1 << 31) - 1
"""that a training sequence can hold"""
_TOO_OLD = "the rollout is older than rollout.max_staleness, and is cut (environment.outlived)"


class LimitReached(Exception):
    """The rollout has had all its turns or tokens, or is too old.

    An environment may catch it, and say what it is worth.
    """


class AbortedError(Exception):
    """A server ended the response before its end: the attempt is as if it had not been asked for."""


@dataclass(frozen=True)
class Turn:
    """What the model answered."""

    text: str
    """without special tokens"""
    token_ids: tuple[int, ...]
    """[n] as sampled, the stop token included"""
    prompt_ids: tuple[int, ...]
    """[P] what it was sampled after: `[*prompt_ids, *token_ids, *policy.encode("...")]` goes on from it"""
    finish_reason: str
    """`stop` or `length`"""
    message: Mapping[str, Any]
    """the assistant's message, to be appended to the messages as it is"""
    log_probs: tuple[float, ...] = ()
    """[n] of each token under the sampling policy"""
    tool_calls: Sequence[Mapping[str, Any]] = ()
    """of the message: `{"type": "function", "function": {"name": ..., "arguments": {...}}}`"""
    unparsed: str = ""
    """why the answer could not be read as the response template has it; the message is its text then"""


@dataclass(frozen=True)
class RolloutLimits:
    """What one rollout may take."""

    turns: int
    tokens: int
    """of one training sequence, its prompt and all that was observed included"""
    seconds: float
    """of the whole rollout"""
    turn_seconds: float
    """that the environment may take between one response and the next"""


@dataclass
class RolloutState:
    """What has become of a rollout, for whoever runs it."""

    turns: int = 0
    finish_reason: str = "stop"
    text: str = ""
    """of the last turn"""
    limit: str = ""
    """which was reached first"""
    too_old: bool = False
    """it was cut"""
    broken: BaseException | None = None
    """that no server answers, which ends the run"""
    stateless: str = ""
    """why the session cannot say its state"""
    generating: int = 0
    closed: bool = False
    changed: Callable[[], None] = field(default=lambda: None)
    """is told when the model begins or ends to generate"""


class Policy:
    """The model in one rollout. Its methods may be called side by side, by sub-agents.

    Args:
        request: what asks for the first turn, with one prompt; later turns take over its parameters.
        ask: sends a request to a server.
        parse: has a server read an answer, where the template says so.
    """

    def __init__(
        self,
        prompt: Prompt,
        request: Request,
        ask: Ask,
        template: ChatTemplate,
        limits: RolloutLimits,
        parse: Parse | None = None,
    ) -> None:
        self.progress = RolloutState()
        self.recorder = TokenRecorder()
        self.dialogue = Dialogue(template, prompt, limits.tokens)
        self.prompt = prompt
        self._request, self._ask = request, ask
        self._template, self._limits, self._parse = template, limits, parse
        self._asking: set[asyncio.Future[list[Reply]]] = set()
        self.keeper: SessionKeeper | None = None
        """of an environment that can be restored"""

    async def generate(
        self,
        prompt: Sequence[int] | Sequence[ChatMessage],
        *,
        tools: Sequence[Any] | None = None,
        max_new_tokens: int | None = None,
        live: LiveTurn | None = None,
    ) -> Turn:
        """The model's answer to token ids, or to messages as the chat template renders them.

        Messages that go on from an earlier answer, its `message` among them, keep the ids that were sampled.

        Args:
            tools: JSON schemas of what may be called; unset, those of the prompt's row or of data.tools.
            max_new_tokens: a lower limit than that of the run.
            live: hears the answer while it is sampled, and may end it where it is: its finish reason is
                then `length`.

        Raises:
            LimitReached: there are no turns or tokens left.
            AbortedError: the server ended the response.
            StateError: the session's state() raises, or returns what cannot be kept.
            DataError: the chat template fails on the messages, or the server refuses the ids.
            TypeError, ValueError: the prompt is neither ids nor messages, or empty.
        """
        if self.progress.closed:
            raise asyncio.CancelledError
        first = prompt[0] if len(prompt) else None
        asked = None
        if isinstance(first, Mapping):
            its = self._template.tools_of(self.prompt) if tools is None else tools
            try:
                asked = self.dialogue.ask(prompt, its)  # type: ignore[arg-type]
            except TooLongError:
                raise self._had_all("tokens") from None
            ids = asked.ids
        else:
            ids = [index(one) for one in prompt]  # type: ignore[arg-type]
        if self.keeper is not None:
            try:
                self.keeper.keep(self.progress.turns)
            except StateError as error:  # whatever the environment makes of it, its rollout is void
                self.progress.stateless = str(error)
                raise
        if live is not None:
            live.begin(self._template, asked, len(ids))
        reply = await self._sample(ids, max_new_tokens, own=asked is None, live=live)
        self.recorder.add(ids, reply)
        turn = await self._read(ids, reply, asked)
        if self.keeper is not None:
            self.keeper.turns.append(SampledTurn(ids, reply, asked, turn.message))
        self.progress.text, self.progress.finish_reason = turn.text, reply.finish_reason
        return turn

    def resume(self, turns: Sequence[SampledTurn], asked: int) -> None:
        """Go on behind these turns, of a rollout that had asked for so many."""
        for one in turns:
            self.recorder.add(one.ids, one.reply)
            if one.asked is not None:
                self.dialogue.answer(one.asked, one.message, one.reply.token_ids, one.reply.finish_reason)
            self.progress.text = self._template.decode(one.reply.token_ids)
            self.progress.finish_reason = one.reply.finish_reason
        self.progress.turns = asked

    def cut(self) -> None:
        """No further turn: the rollout has become too old. What is being sampled is given up."""
        self.progress.too_old = True
        self.progress.limit = self.progress.limit or "age"
        for work in self._asking:
            work.cancel()

    @property
    def sampling(self) -> Mapping[str, Any]:
        """The sampling parameters of every turn, in SGLang's names."""
        return self._request.sampling_params[0]

    def encode(self, text: str) -> list[int]:
        """The ids of a text, no special token added.

        Raises:
            DataError: the tokenizer refuses it.
            LimitReached: it has more tokens than a rollout may have.
        """
        try:
            self._template.check_length(text, self._limits.tokens)
        except TooLongError:
            raise self._had_all("tokens") from None
        return self._template.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens included."""
        return self._template.decode(ids, special=True)

    async def _sample(self, ids: list[int], most: int | None, *, own: bool, live: LiveTurn | None) -> Reply:
        """The reply after `ids`, which are the environment's `own` where no template wrote them."""
        request = self._next_request(ids, most)
        stream = None
        if live is not None:
            stream = live.stream
            request = replace(request, stream=stream)
        progress = self.progress
        progress.turns += 1
        progress.generating += 1
        progress.changed()
        work = asyncio.ensure_future(self._ask(request))
        self._asking.add(work)
        try:
            (reply,) = await work
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if progress.too_old and not (task and task.cancelling()):
                raise LimitReached(_TOO_OLD) from None
            raise
        except Exception as error:
            if own and isinstance(error, RejectedError):  # such as a token beyond the vocabulary
                raise DataError(f"the server refuses the ids of a turn: {error}; correct them") from error
            progress.broken = error  # no server answers: whatever the environment makes of it, the run ends
            raise
        finally:
            self._asking.discard(work)
            progress.generating -= 1
            progress.changed()
        if stream is not None and stream.stopped and not stream.broken and reply.token_ids:
            cut = reply.finish_reason == "abort"
            return replace(reply, finish_reason="length") if cut else reply
        if stream is not None and (stream.stopped or stream.broken):
            raise AbortedError("the response was given up")
        if reply.finish_reason == "abort":
            progress.finish_reason = "abort"
            raise AbortedError("a server aborted the response")
        return reply

    def _next_request(self, ids: list[int], most: int | None) -> Request:
        if self.progress.too_old:
            raise LimitReached(_TOO_OLD)
        if not ids or min(ids) < 0 or max(ids) > _LARGEST_ID:
            raise ValueError("a prompt without tokens, or with one that is none; give ids, or messages")
        params, turn = dict(self._request.sampling_params[0]), self.progress.turns
        room = min(params["max_new_tokens"], self._limits.tokens - len(ids))
        room = room if most is None else min(room, most)
        for left, what in ((self._limits.turns - turn, "turns"), (room, "tokens")):
            if left < 1:
                raise self._had_all(what)
        params["max_new_tokens"] = room
        rid = self._request.rids[0]
        if turn:
            params["sampling_seed"] = sample_seed(params["sampling_seed"], str(turn))
            rid = f"{rid}#{turn}"
        return Request([ids], [params], [rid], affinity=self._request.rids[0])

    def _had_all(self, what: str) -> LimitReached:
        self.progress.limit = self.progress.limit or what
        return LimitReached(f"the rollout has had all its {what} (environment.max_{what})")

    async def _read(self, ids: list[int], reply: Reply, asked: AskedTurn | None) -> Turn:
        template = self._template
        text, unparsed = template.decode(reply.token_ids), ""
        message: Mapping[str, Any] = {"role": "assistant", "content": text}
        if asked is not None and (template.response is not None or template.parsers is not None):
            try:
                message = await self._message(template, asked, reply)
            except RolloutError as error:  # of servers that have no such parser, or are gone
                self.progress.broken = error
                raise
            except Exception as error:  # transformers raises what its parsers raise, for what a model wrote
                unparsed = f"{type(error).__name__}: {error}"
        if asked is not None:
            self.dialogue.answer(asked, message, reply.token_ids, reply.finish_reason)
        calls = message.get("tool_calls") or ()
        return Turn(
            text=text,
            token_ids=reply.token_ids,
            prompt_ids=tuple(ids),
            finish_reason=reply.finish_reason,
            message=message,
            log_probs=reply.log_probs,
            tool_calls=tuple(calls),
            unparsed=unparsed,
        )

    async def _message(self, template: ChatTemplate, asked: AskedTurn, reply: Reply) -> Mapping[str, Any]:
        if template.parsers is None or self._parse is None:
            return parse(template, asked, reply.token_ids)
        said = reply.token_ids[:-1] if reply.finish_reason == "stop" else reply.token_ids
        return await template.parsers.read(template.decode(said, special=True), asked.tools, self._parse)


def parse(template: ChatTemplate, asked: AskedTurn, token_ids: Sequence[int]) -> Mapping[str, Any]:
    """The assistant's message in what was sampled, by transformers' parser; raises whatever that raises."""
    said = template.decode(token_ids, special=True)
    tools = list(asked.tools) if asked.tools else None
    message: Any = template.tokenizer.parse_response(
        said, dict(template.response or {}), prefix=asked.text, tools=tools
    )
    for call in message.get("tool_calls", []):
        function = call["function"]
        if not (isinstance(function["name"], str) and isinstance(function.get("arguments", {}), dict)):
            raise DataError("a tool call without a name, or whose arguments are no object")
    return {"role": "assistant", "content": "", **message}
