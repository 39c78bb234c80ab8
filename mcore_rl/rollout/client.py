"""One rollout server over the SGLang native HTTP API: deadlines, retries, and replies that are checked.

Infrastructure errors (connection, deadline, 5xx, 429, cut or malformed replies) are retried; a request that
the server refuses (4xx) is not, since it would be refused again.
"""

from __future__ import annotations

import asyncio
import os
import random
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, Literal, NoReturn, Self, TypeVar

import aiohttp
from pydantic_core import from_json

from mcore_rl.errors import EXIT_CONFIG, ConfigError, RolloutError
from mcore_rl.rollout import streaming
from mcore_rl.rollout.adapters import ServedAdapter, check_held, under
from mcore_rl.rollout.bodies import is_page, kind_of, message_of, shown
from mcore_rl.rollout.reply import ANY_VOCABULARY, Asked, MalformedReplyError, Reply, parse_reply
from mcore_rl.spans import span
from mcore_rl.terminal import escaped, quoted
from mcore_rl.types import ExpertLayers

T = TypeVar("T")

_BACKOFF_SECONDS = 0.2
_BACKOFF_MAX_SECONDS = 5.0
_JITTER = random.SystemRandom()
"""no draw of Python's own generator, whose state is the run's: it is in checkpoints"""
_READY_SECONDS = 5.0
_IDLE_SECONDS = 30.0
_NEW_TOKENS = 128
"""SGLang's own max_new_tokens, where none is asked for"""
_TOKEN_BYTES = 128
"""bytes of a reply for a token: its id, its log-prob and its text"""
_SMALL_REPLY_BYTES = 1 << 26
_LOOK = "see the server's log, or raise rollout.timeout"
_ABSENT = "start the server, or correct its address"
_STRANGER = (
    "something else than SGLang's API answers there, such as a proxy, or another program on this port: give "
    "the server's own host, port and path"
)


class RejectedError(RolloutError):
    """The server refused the request itself (4xx): bad data or configuration, never retried."""

    exit_code = EXIT_CONFIG

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status

    def __reduce__(self) -> tuple[type[RejectedError], tuple[str, int]]:
        """Ranks hand errors to each other: both arguments must come along."""
        return type(self), (str(self), self.status)


class _TransientError(Exception):
    """Worth another attempt, not before `retry_after` seconds; `remedy`: where attempts do not help."""

    def __init__(self, message: str, retry_after: float = 0.0, remedy: str = _LOOK) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.remedy = remedy


class RolloutClient:
    """`async with RolloutClient(url) as client: ...`; outside of it no method may be called.

    Args:
        url: `http://host:port` of the server.
        api_key_env: name of the environment variable that holds its key, if it asks for one.
        timeout: seconds for one call, all its attempts together.
        retries: attempts after the first.
        max_reply_bytes: longer replies are refused; unset, those of twice as many bytes as what was asked for
            can take (`reply_bytes`).
        vocabulary: ids of the served model are below this; a reply with another one is malformed. Only a
            caller that trains nothing may leave it out.
        frozen: url -> version of the model beside its adapters, by its first reply; of later clients too.

    Every method raises RolloutError when there is no usable reply within `timeout`, RejectedError when the
    server refuses the request. Opening raises ConfigError when the key variable is not set.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key_env: str | None = None,
        timeout: float = 600.0,
        retries: int = 3,
        max_reply_bytes: int | None = None,
        vocabulary: int = ANY_VOCABULARY,
        frozen: dict[str, str] | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        self.api_key_env = api_key_env
        self.timeout = timeout
        self.retries = retries
        self.max_reply_bytes = max_reply_bytes
        self.vocabulary = vocabulary
        self._frozen = {} if frozen is None else frozen
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        # Identity only: a compressed reply could unfold to any size.
        headers = {"Accept-Encoding": "identity"}
        if self.api_key_env is not None:
            key = os.environ.get(self.api_key_env, "")
            if not key:
                raise ConfigError(
                    f"{self.url}: environment variable {self.api_key_env} (api_key_env) is not set"
                )
            headers["Authorization"] = f"Bearer {key}"
        self._session = aiohttp.ClientSession(
            # No limit of connections: requests, health checks too, would wait behind it unseen.
            connector=aiohttp.TCPConnector(limit=0),
            headers=headers,
            auto_decompress=False,
            timeout=aiohttp.ClientTimeout(total=None),
        )
        return self

    async def __aexit__(self, *exc: object) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    # -- generation ---------------------------------------------------------------------------------------

    async def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling_params: Sequence[Mapping[str, Any]],
        rids: Sequence[str],
        *,
        prompt_log_probs: bool = False,
        experts: ExpertLayers | None = None,
        session: str = "",
        stream: streaming.TokenStream | None = None,
        adapter: ServedAdapter | None = None,
    ) -> list[Reply]:
        """One response per prompt, in one HTTP call; `sampling_params` and `rids` have one entry per prompt.

        A `stream` is told the tokens of the one response while they are sampled, and may end it.

        A `session` is the routing key of all requests that go on from each other.

        With `experts`, of the served model, replies say which of them every token was sent to.

        With an `adapter`, the tokens come from the frozen model with it, and have its version.

        Every attempt has request ids of its own (`rid~9f86d081`): one that was given up, here, over another
        address of the server or by a trainer that died, may still be running, and none is refused as its
        duplicate. Those of an earlier attempt of this call are aborted first.
        """
        sent: list[str] = []
        tokens = [int(params.get("max_new_tokens", _NEW_TOKENS)) for params in sampling_params]
        most = sum(reply_bytes(len(p), n, experts) for p, n in zip(prompts, tokens, strict=True))

        async def attempt(_: int) -> list[Reply]:
            await self._abort_quietly(sent)
            tag = secrets.token_hex(4)
            sent[:] = [f"{rid}~{tag}" for rid in rids]
            body = {
                "input_ids": [list(prompt) for prompt in prompts],
                "sampling_params": list(sampling_params),
                "rid": list(sent),
                "return_logprob": True,
                "logprob_start_len": 0 if prompt_log_probs else -1,
            } | ({} if experts is None else {"return_routed_experts": True})
            body |= {"routing_key": session} if session else {}
            body |= {} if adapter is None else {"lora_path": adapter.name}
            if stream is not None:
                one = Asked(rids[0], sent[0], prompts[0], tokens[0], self.vocabulary, False, experts)
                return [await self._streamed(body, one, stream, 2 * most)]
            raw = await self._raw("POST", "/generate", body, most=2 * most)
            data = _decode(raw) if raw else None
            if not isinstance(data, list) or len(data) != len(prompts):
                what = f"expected a list of {len(prompts)} responses, got {kind_of(data)}"
                raise MalformedReplyError(what) if data is None else _TransientError(what, remedy=_STRANGER)
            asked = (
                Asked(*each, self.vocabulary, prompt_log_probs, experts)
                for each in zip(rids, sent, prompts, tokens, strict=True)
            )
            return [parse_reply(item, one) for item, one in zip(data, asked, strict=True)]

        try:
            replies = await self._retrying("/generate", attempt) if prompts else []
            return replies if adapter is None else under(adapter, replies, self.url, self._frozen)
        except RejectedError as error:
            if adapter is not None and error.status == 400:
                check_held(self.url, adapter, error)
            raise

    async def _streamed(
        self, body: Mapping[str, Any], asked: Asked, stream: streaming.TokenStream, most: int
    ) -> Reply:
        """One attempt of which `stream` is told; it ends early where that wants no more of it."""
        (params,) = body["sampling_params"]
        params = {**params, "stream_interval": streaming.interval(asked.most)}
        body = {**body, "sampling_params": [params], "stream": True}
        found, url = streaming.StreamedReply(asked), f"{self.url}/generate"
        ending: asyncio.Task[None] | None = None
        try:
            async with self._opened.request("POST", url, json=body, allow_redirects=False) as response:
                if response.status != 200:
                    raw = await response.content.read(1 << 16)
                    self._raise_for(url, response.status, raw, response.headers.get("Retry-After", ""))
                async for data in self._events(response, max(most, 1 << 16)):
                    event = _decode(data)
                    if error := streaming.error_of(event):
                        self._raise_for(url, *error, "")
                    ended = found.add(event)
                    if not stream.tell(found.ids):
                        stream.stop()
                    if ended:
                        return parse_reply(found.whole(), asked)
                    if ending is None:  # from here on the server knows the request
                        ending = asyncio.create_task(self._abort_when_stopped(stream, asked.sent))
        finally:
            if ending is not None:
                ending.cancel()
        raise _TransientError("the stream ended before its response")

    def _events(self, response: aiohttp.ClientResponse, most: int) -> AsyncIterator[bytes]:
        return streaming.read_events(response.content.iter_any(), most)

    async def _abort_when_stopped(self, stream: streaming.TokenStream, rid: str) -> None:
        await stream.wait_stopped()
        await self._abort_quietly([rid])

    async def pause(self, mode: Literal["abort", "retract", "in_place"]) -> None:
        """Stops decoding; requests sent meanwhile wait for `resume`."""
        await self._simple("POST", "/pause_generation", {"mode": mode})

    async def resume(self) -> None:
        """Ends a pause."""
        await self._simple("POST", "/continue_generation", {})

    async def abort_all(self) -> None:
        """Ends every request, whoever sent it; the partial output arrives as their reply."""
        await self._simple("POST", "/abort_request", {"rid": "", "abort_all": True})

    async def parse(self, path: str, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """What a parser of the server, at `path`, makes of a text."""
        try:
            return _object(await self._simple("POST", path, body, retries=1), f"{self.url}{path}")
        except RolloutError as error:
            name = next((value for key, value in body.items() if key.endswith("_parser")), "")
            what = (
                f"{error}; SGLang's servers read texts by parsers of their own, and this one did not by "
                f"{quoted(name)}: check environment.tool_call_parser and environment.reasoning_parser"
            )
            if isinstance(error, RejectedError):
                raise RejectedError(what, error.status) from error
            raise RolloutError(what) from error

    # -- weights ------------------------------------------------------------------------------------------

    async def update_weights_from_disk(self, path: str, version: str, *, flush_cache: bool = True) -> None:
        """Loads the HF checkpoint directory `path` (as the server sees it) as weight version `version`.

        `flush_cache` must be False while requests are paused in place.
        """
        body = {"model_path": path, "weight_version": version, "flush_cache": flush_cache}
        await self.control("/update_weights_from_disk", body)

    async def control(self, path: str, body: Mapping[str, Any], *, retries: int | None = None) -> None:
        """A call that the server answers with {success, message}; raises RejectedError for success: false."""
        await self.told(path, body, retries=retries)

    async def told(self, path: str, body: Mapping[str, Any], *, retries: int | None = None) -> dict[str, Any]:
        """The whole answer to such a call."""

        async def attempt(_: int) -> dict[str, Any]:
            data = await self._request("POST", path, body)
            if not isinstance(data, dict) or not isinstance(data.get("success"), bool):
                raise _TransientError(f"expected success: true or false, got {message_of(data)}")
            return data

        data = await self._retrying(path, attempt, retries)
        if not data["success"]:
            raise RejectedError(f"{self.url}{path}: {message_of(data)}", 200)
        return data

    async def weight_checksums(self) -> list[dict[str, str]]:
        """Per rank of the server: tensor name -> checksum, in the server's own names and hash."""
        data = await self._simple("POST", "/weights_checker", {"action": "checksum"})
        try:
            return [dict(rank["checksums"]) for rank in data["ranks"]]
        except (TypeError, KeyError, ValueError) as error:
            raise RolloutError(
                f"{self.url}/weights_checker: reply without ranks[].checksums ({error!r})"
            ) from error

    # -- memory -------------------------------------------------------------------------------------------

    async def release_memory(self) -> None:
        """Gives up weights and KV cache with their content, once nothing runs; see `resume_memory`.

        In one attempt: SGLang ends when it is asked while it works, or twice.
        """
        path = f"/flush_cache?timeout={min(self.timeout, _IDLE_SECONDS):g}"  # 200 when nothing runs
        await self._retrying(path, lambda _: self._raw("POST", path))
        await self._simple("POST", "/release_memory_occupation", {"tags": ["weights", "kv_cache"]}, retries=0)

    async def resume_memory(self, part: Literal["weights", "kv_cache"]) -> None:
        """Takes the memory of a part back, empty. In one attempt: SGLang ends when it was not released."""
        await self._simple("POST", "/resume_memory_occupation", {"tags": [part]}, retries=0)

    # -- state --------------------------------------------------------------------------------------------

    async def ready(self) -> bool:
        """True when /ready is 200 within a few seconds, as it is unless starting or paused; never raises."""
        return await self.unready() is None

    async def unready(self) -> str | None:
        """Why `ready` would be False, for people; None where it is True. Never raises."""
        return await self._problem("/ready", min(self.timeout, _READY_SECONDS))

    async def end_pause(self) -> bool:
        """Resume in one attempt of a few seconds; returns whether it was answered, and never raises."""
        return await self._answers("/continue_generation", min(self.timeout, _READY_SECONDS), {})

    async def healthy(self, within: float) -> bool:
        """True when /health, for which an idle server samples a token, is 200 within that; never raises."""
        return await self._answers("/health", within)

    async def model_info(self) -> dict[str, Any]:
        """/model_info; its weight_version may lag, so the versions of replies are what counts."""
        return _object(await self._simple("GET", "/model_info"), f"{self.url}/model_info")

    async def server_info(self) -> dict[str, Any]:
        """/server_info: version, limits, settings."""
        return _object(await self._simple("GET", "/server_info"), f"{self.url}/server_info")

    async def _answers(self, path: str, within: float, body: Mapping[str, Any] | None = None) -> bool:
        return await self._problem(path, within, body) is None

    async def _problem(self, path: str, within: float, body: Mapping[str, Any] | None = None) -> str | None:
        """What was wrong with one attempt of a call that has to be answered `within` seconds."""
        try:
            async with asyncio.timeout(within):
                await self._request("GET" if body is None else "POST", path, body)
        except RejectedError as error:
            return escaped(error)
        except TimeoutError:
            return f"{self.url}{path}: no reply within {within:g} s"
        except (_TransientError, RolloutError, aiohttp.ClientError, OSError) as error:
            return f"{self.url}{path}: {escaped(error) or type(error).__name__}; {_remedy(error)}"
        return None

    # -- transport ----------------------------------------------------------------------------------------

    async def _simple(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, *, retries: int | None = None
    ) -> Any:
        return await self._retrying(path, lambda _: self._request(method, path, body), retries)

    async def _retrying(
        self, path: str, attempt: Callable[[int], Awaitable[T]], retries: int | None = None
    ) -> T:
        retries = self.retries if retries is None else retries
        end = time.monotonic() + self.timeout
        cause, remedy = "no attempt was made", _LOOK
        number = 0
        try:
            async with asyncio.timeout(self.timeout):
                for number in range(retries + 1):
                    try:
                        return await attempt(number)
                    except (_TransientError, MalformedReplyError, aiohttp.ClientError, OSError) as error:
                        cause, remedy = escaped(error) or type(error).__name__, _remedy(error)
                        wait = max(_backoff(number), getattr(error, "retry_after", 0.0))
                    if number == retries or time.monotonic() + wait > end:
                        break
                    await asyncio.sleep(wait)
        except TimeoutError:
            cause = f"no reply within {self.timeout:g} s (before that: {cause})"
        raise RolloutError(
            f"{self.url}{path}: no usable reply after {number + 1} attempts, last cause: {cause}; {remedy}"
        )

    async def _request(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """One attempt: the JSON of a 200, None for an empty body."""
        raw = await self._raw(method, path, body)
        return _decode(raw) if raw else None

    @property
    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise RuntimeError("RolloutClient is used outside of `async with`")
        return self._session

    async def _raw(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, *, most: int = 0
    ) -> bytes:
        """One attempt: the body of a 200, of at most `most` bytes or a small reply's."""
        most = max(most, _SMALL_REPLY_BYTES) if self.max_reply_bytes is None else self.max_reply_bytes
        url = f"{self.url}{path}"
        with span(path.lstrip("/"), self.url):
            return await self._answer(self._opened, method, url, body, most)

    async def _answer(
        self, session: aiohttp.ClientSession, method: str, url: str, body: Any, most: int
    ) -> bytes:
        async with session.request(method, url, json=body, allow_redirects=False) as response:
            raw = bytearray()
            async for chunk in response.content.iter_chunked(1 << 16):
                raw += chunk
                if len(raw) > most:
                    raise RolloutError(f"{url}: reply longer than {most} bytes, {self._why_most(most)}")
            if response.status == 200:
                return bytes(raw)
            self._raise_for(url, response.status, bytes(raw), response.headers.get("Retry-After", ""))

    def _why_most(self, most: int) -> str:
        """Why a reply of more bytes is not read to its end."""
        if self.max_reply_bytes is not None:
            return "its limit (max_reply_bytes)"
        if most > _SMALL_REPLY_BYTES:
            return f"twice what the tokens that were asked for take: it holds something else; {_LOOK}"
        return f"more than any reply of that kind takes: {_STRANGER}"

    def _raise_for(self, url: str, status: int, raw: bytes, retry_after: str) -> NoReturn:
        text = shown(raw)
        if status == 429 or status >= 500:
            wait = float(retry_after) if retry_after.strip().isdecimal() else 0.0
            behind = "a proxy says so: the server behind it is away, or slower than the proxy waits"
            raise _TransientError(f"HTTP {status}: {text}", wait, behind if is_page(raw) else _LOOK)
        if status < 300:
            raise RejectedError(f"{url}: HTTP {status} where the API answers 200; {_STRANGER}", status)
        if status in (401, 403):
            raise RejectedError(
                f"{url}: HTTP {status}; set api_key_env to the variable that holds the key", status
            )
        if 300 <= status < 400:
            raise RejectedError(f"{url}: HTTP {status}, a redirect; give the server's own address", status)
        where = f"; {_STRANGER}" if is_page(raw) or status in (404, 405) else ""
        raise RejectedError(f"{url}: HTTP {status}: {text}{where}", status)

    async def _abort_quietly(self, rids: Sequence[str]) -> None:
        """Best effort: a server that is gone has nothing left to abort."""
        bodies = [{"rid": rid, "abort_all": False} for rid in rids]
        await asyncio.gather(
            *(self._request("POST", "/abort_request", body) for body in bodies), return_exceptions=True
        )


def call(client: RolloutClient, use: Callable[[RolloutClient], Awaitable[T]]) -> T:
    """Runs `use(client)` to its end from synchronous code, with a connection of its own."""

    async def run() -> T:
        async with client:
            return await use(client)

    return asyncio.run(run())


def reply_bytes(prompt: int, response: int, experts: ExpertLayers | None = None) -> int:
    """What the reply to so many tokens may take, as JSON; experts, as base64 of int32, are most of it."""
    choices = 0 if experts is None else len(experts.sparse) * experts.per_token
    return (prompt + response) * (_TOKEN_BYTES + 6 * choices)


def _backoff(number: int) -> float:
    """Seconds before attempt number + 1: doubling, jittered so that many clients do not return together."""
    return min(_BACKOFF_MAX_SECONDS, _BACKOFF_SECONDS * 2**number) * _JITTER.uniform(0.5, 1.5)


def _decode(raw: bytes) -> Any:
    try:
        return from_json(raw, cache_strings=False)  # a third of json.loads's time a token of a reply
    except ValueError as error:
        if is_page(raw):
            raise _TransientError(f"reply is not JSON but {shown(raw)}", remedy=_STRANGER) from error
        raise _TransientError(f"reply is not JSON: {error}") from error


def _remedy(error: Exception) -> str:
    """What to do where an attempt that ended so is repeated in vain."""
    if isinstance(error, aiohttp.ClientConnectorError):
        return _ABSENT
    if isinstance(error, aiohttp.ClientResponseError):  # not HTTP
        return _STRANGER
    return getattr(error, "remedy", _LOOK)


def _object(data: object, where: str) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise RolloutError(f"{where}: expected a JSON object, got {message_of(data)}")
    return data
