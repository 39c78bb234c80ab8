"""Messages, ids and segments: what was sampled is what is trained, once, whatever a template does."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mcore_rl.environments.parsers import ServerParsers
from mcore_rl.environments.policy import LimitReached
from mcore_rl.environments.recorder import TokenRecorder
from mcore_rl.errors import DataError
from mcore_rl.rollout.reply import Reply
from mcore_rl.types import Prompt, Segment, VersionSpan
from tests.environments.support import (
    FORGETFUL,
    LIMITS,
    RESPONSE,
    STABLE,
    Scripted,
    build_tokenizer,
    chat_prompt,
    check_trained_once,
    policy_of,
)

CALL = '<call>add {"a":1,  "b":2}</call><e>'
"""spaced as no template writes it"""


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, 20))


def trained(segments: tuple[Segment, ...]) -> list[list[int]]:
    """The runs of trained tokens, in order."""
    found: list[list[int]] = []
    for segment in segments:
        mask = [True] * len(segment.token_ids) if segment.trained is None else segment.trained.tolist()
        before = False
        for token, mine in zip(np.asarray(segment.token_ids).tolist(), mask, strict=True):
            if mine and not before:
                found.append([])
            if mine:
                found[-1].append(token)
            before = mine
    return found


@pytest.mark.parametrize(
    ("template", "segments", "rewritten"), [(STABLE, 1, 0), (FORGETFUL, 2, 1)], ids=["stable", "forgetful"]
)
def test_a_dialogue_keeps_its_ids_or_the_rewrite_is_counted(template, segments, rewritten) -> None:
    """A tool call whose text the template would write otherwise keeps its ids, and is no new sequence.

    The control: a template that drops the thinking of earlier turns begins one, and says so.
    """
    tokenizer = build_tokenizer(template)
    prompt = chat_prompt(tokenizer)
    said = ["so</think>" + CALL, "done<e>", "bye<e>"]
    server = Scripted(tokenizer, *said, versions=["3", "3", "4"])
    response = RESPONSE if template == STABLE else None
    policy = policy_of(tokenizer, prompt, server, response=response)

    async def play() -> None:
        messages: list = [*prompt.messages]
        turn = await policy.generate(messages)
        if template == STABLE:
            (call,) = turn.tool_calls
            assert call["function"] == {"name": "add", "arguments": {"a": 1, "b": 2}}
        messages += [turn.message, {"role": "tool", "content": "3"}]
        turn = await policy.generate(messages)
        messages += [turn.message, {"role": "user", "content": "thanks"}]
        await policy.generate(messages)

    run(play())
    found = policy.recorder.segments(prompt)
    assert (len(found), policy.dialogue.rewritten) == (segments, rewritten)
    assert trained(found) == [list(ids) for ids in server.sampled]
    assert found[0].context is prompt.token_array
    first = tokenizer.decode([*found[0].context, *found[0].token_ids])
    start = "<s>user:2+2?<e>\n<s>assistant:so</think>" + CALL
    if segments == 1:
        assert first == start + "\n<s>tool:3<e>\n<s>assistant:done<e>\n<s>user:thanks<e>\n<s>assistant:bye<e>"
        assert found[0].versions == (
            VersionSpan("3", 0, len(server.sampled[0]) + len(server.sampled[1])),
            VersionSpan("4", len(server.sampled[0]) + len(server.sampled[1]), found[0].log_probs.size),
        )
    else:
        assert first == start
        assert "so</think>" not in tokenizer.decode(found[1].context)
    for asked, segment_ids in zip(server.asked, server.sampled, strict=True):
        whole = [*asked.prompts[0], *segment_ids]
        assert any(whole == [*s.context, *s.token_ids][: len(whole)] for s in found), (
            "not as the model saw it"
        )


def test_a_cut_turn_is_ended_by_the_template_as_an_observation() -> None:
    tokenizer = build_tokenizer()
    prompt = chat_prompt(tokenizer)
    server = Scripted(tokenizer, "12", "ok<e>")
    policy = policy_of(tokenizer, prompt, server)

    async def play() -> None:
        turn = await policy.generate(prompt.messages)
        assert turn.finish_reason == "length"
        await policy.generate([*prompt.messages, turn.message, {"role": "user", "content": "?"}])

    run(play())
    (segment,) = policy.recorder.segments(prompt)
    assert trained((segment,)) == [list(ids) for ids in server.sampled]
    assert tokenizer.decode(segment.token_ids) == "12<e>\n<s>user:?<e>\n<s>assistant:ok<e>"


def test_what_an_environment_changes_in_an_answer_is_no_longer_that_answer() -> None:
    """Changed in place, too: then its text is encoded, in a sequence of its own."""
    tokenizer = build_tokenizer()
    prompt = chat_prompt(tokenizer)
    server = Scripted(tokenizer, "1<e>", "2<e>")
    policy = policy_of(tokenizer, prompt, server)

    async def play() -> None:
        turn = await policy.generate(prompt.messages)
        turn.message["content"] = "other"  # type: ignore[index]
        await policy.generate([*prompt.messages, turn.message, {"role": "user", "content": "?"}])

    run(play())
    first, second = policy.recorder.segments(prompt)
    assert tokenizer.decode(second.context).count("other") == 1
    assert trained((first, second)) == [list(ids) for ids in server.sampled]
    assert policy.dialogue.rewritten == 0


def test_what_cannot_be_parsed_is_text_with_the_reason() -> None:
    tokenizer = build_tokenizer()
    prompt = chat_prompt(tokenizer)
    policy = policy_of(tokenizer, prompt, Scripted(tokenizer, "<call>add {1</call><e>"))
    turn = run(policy.generate(prompt.messages))
    assert "json" in turn.unparsed
    assert (turn.tool_calls, turn.message["content"]) == ((), "<call>add {1</call>")


def test_a_parser_of_the_servers_is_told_of_a_tool_what_it_reads() -> None:
    """It refuses a `strict` that is text, and a refusal ends the run."""
    bodies: list[Any] = []

    async def parse(path: str, body: Any) -> Any:
        bodies.append(body)
        return {}

    mine = {"name": "f", "description": "does", "parameters": {"type": "object"}}
    tools = [{"type": "function", "function": {**mine, "strict": "no"}, "more": 1}, {"name": "g"}]
    run(ServerParsers("qwen25").read("x", tools, parse))
    functions = [mine, {"name": "g"}]
    assert bodies[0]["tools"] == [{"type": "function", "function": one} for one in functions]


def test_limits_end_a_rollout_before_a_server_is_asked() -> None:
    tokenizer = build_tokenizer()
    prompt = chat_prompt(tokenizer)
    for limits, what in (
        (replace(LIMITS, turns=1), "turns"),
        (replace(LIMITS, tokens=len(prompt.token_ids) + 3), "tokens"),
    ):
        server = Scripted(tokenizer, "1<e>", "2<e>")
        policy = policy_of(tokenizer, prompt, server, limits=limits)

        async def play(policy=policy) -> None:
            turn = await policy.generate(prompt.messages)
            await policy.generate([*turn.prompt_ids, *turn.token_ids, *policy.encode("x")])

        with pytest.raises(LimitReached, match=what):
            run(play())
        assert (len(server.asked), policy.progress.limit) == (1, what)
        assert server.asked[0].sampling_params[0]["max_new_tokens"] <= limits.tokens - len(prompt.token_ids)
    for wrong in ([], [-1], "12", [1.0]):
        with pytest.raises((TypeError, ValueError)):
            run(policy_of(tokenizer, prompt, Scripted(tokenizer)).generate(wrong))


def test_a_conversation_of_megabytes_is_refused_without_being_encoded() -> None:
    """Encoded, it would keep every other rollout of the loop. The agent may go on with a shorter one."""
    tokenizer = build_tokenizer()
    prompt = chat_prompt(tokenizer)
    server = Scripted(tokenizer, "1<e>", "2<e>")
    policy = policy_of(tokenizer, prompt, server, limits=replace(LIMITS, tokens=100))
    longest = max(map(len, tokenizer.get_vocab()))

    def said(characters: int) -> list[dict[str, Any]]:
        return [{"role": "user", "content": "\u00e9" * characters}]  # of which the tokenizer has no token

    async def play() -> None:
        await policy.generate(prompt.messages)
        with pytest.raises(LimitReached, match="all its tokens"):
            await policy.generate(said(100 * longest))
        with pytest.raises(LimitReached, match="all its tokens"):
            policy.encode("1" * (100 * longest + 1))
        with pytest.raises(DataError, match="the tokenizer refuses it"):  # the control: it is encoded
            await policy.generate(said(90 * longest))
        await policy.generate([{"role": "user", "content": "?"}])
        policy.cut()
        with pytest.raises(LimitReached, match="max_staleness"):
            await policy.generate(prompt.messages)

    run(play())
    assert (len(server.asked), policy.progress.limit) == (2, "tokens")


def test_every_turn_has_a_seed_and_a_name_of_its_own_and_the_first_those_of_a_single_response() -> None:
    tokenizer = build_tokenizer()
    prompt = chat_prompt(tokenizer)
    server = Scripted(tokenizer, *["1<e>"] * 4)
    policy = policy_of(tokenizer, prompt, server)

    async def side_by_side() -> None:
        await asyncio.gather(*(policy.generate(prompt.token_ids) for _ in range(4)))

    run(side_by_side())
    assert server.asked[0].sampling_params[0]["sampling_seed"] == 7
    assert len({asked.sampling_params[0]["sampling_seed"] for asked in server.asked}) == 4
    assert [asked.rids[0] for asked in server.asked] == ["p@1/0", "p@1/0#1", "p@1/0#2", "p@1/0#3"]
    assert trained(policy.recorder.segments(prompt)) == [list(ids) for ids in server.sampled]


def random_rollout(draw: random.Random) -> tuple[TokenRecorder, list[tuple[list[int], Reply]]]:
    """Requests as agents make them: they go on, retry, compact, and call sub-agents side by side."""
    recorder, log, histories = TokenRecorder(), [], [[1, 2, 3]]
    for turn in range(draw.randint(1, 12)):
        history = draw.choice(histories)
        match draw.choice(["on", "on", "on", "retry", "compact", "sub"]):
            case "compact":
                history = [*history[:2], 9, *history[-draw.randint(1, 3) :]]
            case "sub":
                history = [7, draw.randint(0, 9)]
            case "retry":
                history = history[: draw.randint(1, len(history))]
        prompt = [*history, *(draw.randint(0, 9) for _ in range(draw.randint(0, 3)))]
        ids = tuple(draw.randint(0, 9) for _ in range(draw.randint(1, 4)))
        version = str(turn // 3)
        spans = (VersionSpan(version, 0, len(ids)),)
        reply = Reply("r", ids, tuple(-turn - k / 8 for k in range(len(ids))), (), "stop", spans)
        recorder.add(prompt, reply)
        log.append((prompt, reply))
        histories.append([*prompt, *ids])
    return recorder, log


def test_every_sampled_token_is_trained_once_in_the_context_that_it_had() -> None:
    """1,000 rollouts with compaction, retries and sub-agents against the log of what was sampled."""
    prompt = Prompt("p", "", (1, 2, 3), "")
    several = 0
    for seed in range(1000):
        recorder, log = random_rollout(random.Random(seed))
        segments = recorder.segments(prompt)
        several += len(segments) > 1
        check_trained_once(segments, log)
    assert several > 500, "the control: there is something to rewrite"
