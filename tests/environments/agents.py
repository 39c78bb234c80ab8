"""Agents as people write them, and a model of which every response is a call, several, or text.

The model is a chain: its attention and feed-forward layers add nothing, so that the next token depends on
the last alone, and a server of any kind samples it. It never writes a call in the template's own spacing.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import anthropic
import httpx2
import openai
import torch
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from mcore_rl.environments.gateway import Endpoint
from mcore_rl.rollout.client import RolloutClient
from tests.environments.support import build_tokenizer

FIRST, SECOND = 'add {"a":', ',  "b":'
"""pieces of a call, one token each"""
CHAIN_VOCAB, CHAIN_CONTEXT = 256, 4096
PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}}
FUNCTION = {"name": "add", "description": "Add.", "parameters": PARAMETERS}
ASK = {"role": "user", "content": "2+2?"}


def chain_tokenizer() -> PreTrainedTokenizerFast:
    """The tests' own, with the pieces of a call."""
    tokenizer = build_tokenizer()
    tokenizer.add_tokens([AddedToken(FIRST, special=False), AddedToken(SECOND, special=False)])
    return tokenizer


def build_chain(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """After `assistant:` come calls or letters; after a call or a letter, another or the end."""
    end, call, close = (tokenizer.convert_tokens_to_ids(mark) for mark in ("<e>", "<call>", "</call>"))
    first, second = (tokenizer.convert_tokens_to_ids(piece) for piece in (FIRST, SECOND))
    pairs = [tokenizer.convert_tokens_to_ids(f"{n:02d}") for n in range(10, 100)]
    letters = [tokenizer.convert_tokens_to_ids(letter) for letter in "xyz"]
    brace, colon = (tokenizer.convert_tokens_to_ids(mark) for mark in "}:")
    after: dict[int, dict[int, float]] = {
        colon: {call: 0.6} | dict.fromkeys(letters, 0.4 / 3),
        call: {first: 1.0},
        first: dict.fromkeys(pairs[:40], 1 / 40),
        second: dict.fromkeys(pairs[40:], 1 / 50),
        brace: {close: 1.0},
        close: {call: 0.4, end: 0.6},
    }
    after |= {pair: {second: 1.0} for pair in pairs[:40]} | {pair: {brace: 1.0} for pair in pairs[40:]}
    letter_next = dict.fromkeys(letters, 0.8 / 3) | {end: 0.2}
    table = torch.full((CHAIN_VOCAB, CHAIN_VOCAB), -30.0)
    for token in range(CHAIN_VOCAB):
        for target, chance in after.get(token, letter_next).items():
            table[target, token] = torch.tensor(chance).log()
    config = Qwen3Config(
        vocab_size=CHAIN_VOCAB,
        hidden_size=CHAIN_VOCAB,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CHAIN_CONTEXT,
        tie_word_embeddings=False,
        eos_token_id=end,
    )
    model = Qwen3ForCausalLM(config).eval().requires_grad_(False)
    layer: Any = model.model.layers[0]
    layer.self_attn.o_proj.weight.zero_()
    layer.mlp.down_proj.weight.zero_()
    model.model.embed_tokens.weight.copy_(torch.eye(CHAIN_VOCAB))
    model.lm_head.weight.copy_(table / CHAIN_VOCAB**0.5)  # of a unit vector, the norm makes its square root
    return model


def save_chain(directory: Path) -> Path:
    """The model and its tokenizer on disk."""
    tokenizer = chain_tokenizer()
    build_chain(tokenizer).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def openai_client(endpoint: Endpoint, http: Any = None) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(
        base_url=endpoint.openai_url, api_key=endpoint.key, max_retries=0, http_client=http
    )


def anthropic_client(endpoint: Endpoint, http: Any = None) -> anthropic.AsyncAnthropic:
    return anthropic.AsyncAnthropic(
        base_url=endpoint.url, api_key=endpoint.key, max_retries=0, http_client=http
    )


class RawClient(RolloutClient):
    """Keeps every body that /generate answered, as the server wrote it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.raw: dict[str, tuple[int, ...]] = {}
        """request id, as it was asked for -> the server's output ids"""
        self.aborted: dict[str, tuple[int, ...]] = {}
        """the same of responses that were ended"""
        self.events: list[int] = []
        """of each response that was streamed"""
        self.cached = 0
        """tokens of prompts that the server had"""
        self.prompted = 0
        """tokens of prompts"""

    async def _raw(self, method: str, path: str, *args: Any, **kwargs: Any) -> bytes:
        raw = await super()._raw(method, path, *args, **kwargs)
        if path == "/generate":
            for one in json.loads(raw):
                self._keep(one)
        return raw

    async def _events(self, response: Any, most: int) -> AsyncIterator[bytes]:
        events = 0
        async for data in super()._events(response, most):
            events += 1
            one = json.loads(data)
            if (one.get("meta_info") or {}).get("finish_reason"):
                self._keep(one)
                self.events.append(events)
            yield data

    def _keep(self, one: Any) -> None:
        rid = one["meta_info"]["id"].rpartition("~")[0]
        if one["meta_info"]["finish_reason"]["type"] == "abort":
            self.aborted[rid] = tuple(one["output_ids"])
            return
        assert rid not in self.raw, "no request is answered twice"
        self.raw[rid] = tuple(one["output_ids"])
        self.prompted += one["meta_info"]["prompt_tokens"]
        self.cached += one["meta_info"]["cached_tokens"]


def _add(arguments: Any) -> str:
    return str(arguments["a"] + arguments["b"])


async def openai_agent(endpoint: Endpoint, http: httpx2.AsyncClient, draw: random.Random) -> list[Any]:
    """Calls tools until the model answers; each request is streamed or not. Its messages."""
    client = openai_client(endpoint, http)
    tools: Any = [{"type": "function", "function": FUNCTION}]
    messages: list[Any] = [ASK]
    while True:
        asked: Any = {"model": "m", "messages": messages, "tools": tools, "max_tokens": 64}
        if draw.random() < 0.5:
            said: Any = (await client.chat.completions.create(**asked)).choices[0]
        else:
            async with client.chat.completions.stream(**asked) as events:
                async for _ in events:
                    pass
                said = (await events.get_final_completion()).choices[0]
        messages.append(said.message.model_dump(exclude_none=True))
        if said.finish_reason != "tool_calls":
            return messages
        for call in said.message.tool_calls:
            answer = _add(json.loads(call.function.arguments))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": answer})


async def responses_agent(endpoint: Endpoint, http: httpx2.AsyncClient, draw: random.Random) -> list[Any]:
    """The same by responses, which go on by the last one's id or have everything in them. Its items."""
    client = openai_client(endpoint, http)
    tools: Any = [{"type": "function", **FUNCTION}]
    items: list[Any] = [ASK]
    new: list[Any] = [ASK]
    last: str | None = None
    while True:
        asked: Any = {"model": "m", "tools": tools, "max_output_tokens": 64}
        by_id = last is not None and draw.random() < 0.5
        asked |= {"input": new, "previous_response_id": last} if by_id else {"input": items}
        if draw.random() < 0.5:
            said: Any = await client.responses.create(**asked)
        else:
            ends = ("response.completed", "response.incomplete")  # the helper knows the first alone
            async with client.responses.stream(**asked) as events:
                said = [event.response async for event in events if event.type in ends][-1]
        last = said.id
        items += [item.model_dump(exclude_none=True, exclude={"parsed_arguments"}) for item in said.output]
        calls = [item for item in said.output if item.type == "function_call"]
        if said.status == "incomplete" or not calls:
            return items
        new = [
            {
                "type": "function_call_output",
                "call_id": one.call_id,
                "output": _add(json.loads(one.arguments)),
            }
            for one in calls
        ]
        items += new


async def anthropic_agent(endpoint: Endpoint, http: httpx2.AsyncClient, draw: random.Random) -> list[Any]:
    """The same with the other package."""
    client = anthropic_client(endpoint, http)
    tools: Any = [{"name": "add", "description": "Add.", "input_schema": PARAMETERS}]
    messages: list[Any] = [ASK]
    while True:
        asked: Any = {"model": "m", "max_tokens": 64, "messages": messages, "tools": tools}
        if draw.random() < 0.5:
            said: Any = await client.messages.create(**asked)
        else:
            async with client.messages.stream(**asked) as events:
                said = await events.get_final_message()
        content = [
            block.model_dump(include={"type", "text", "id", "name", "input"}) for block in said.content
        ]
        messages.append({"role": "assistant", "content": content or ""})
        if said.stop_reason != "tool_use":
            return messages
        uses = [block for block in said.content if block.type == "tool_use"]
        answers = [{"type": "tool_result", "tool_use_id": use.id, "content": _add(use.input)} for use in uses]
        messages.append({"role": "user", "content": answers})


async def wander(endpoint: Endpoint, draw: random.Random, clients: Sequence[Any]) -> None:
    """A dialogue as agents have them: it goes on, asks again, drops its beginning, calls sub-agents."""
    histories: list[list[dict[str, Any]]] = [[ASK]]
    chat, claude = openai_client(endpoint, clients[0]), anthropic_client(endpoint, clients[1])
    for _ in range(draw.randint(2, 6)):
        history = draw.choice(histories)
        match draw.choice(["on", "on", "on", "retry", "compact", "sub"]):
            case "compact":
                history = [{"role": "user", "content": "so far"}, *history[-2:]]
            case "sub":
                history = [{"role": "user", "content": f"task {draw.randint(0, 3)}"}]
            case "retry":
                history = history[: 1 + 2 * draw.randint(0, (len(history) - 1) // 2)]
        if history[-1]["role"] == "assistant":
            history = [*history, {"role": "user", "content": draw.choice(["go on", "why?"])}]
        most = draw.randint(1, 12)
        if draw.random() < 0.5:
            said: Any = await chat.chat.completions.create(model="m", messages=history, max_tokens=most)  # type: ignore[arg-type]
            text = said.choices[0].message.content or ""
        else:
            answer: Any = await claude.messages.create(model="m", messages=history, max_tokens=most)  # type: ignore[arg-type]
            text = "".join(block.text for block in answer.content if block.type == "text")
        histories.append([*history, {"role": "assistant", "content": text}])


async def agents(endpoint: Endpoint, https: Sequence[httpx2.AsyncClient], draw: random.Random) -> int:
    """One of each API, and one that rewrites what was said, side by side as sub-agents of one rollout.

    Returns the most calls that a turn of the first two had.
    """
    *found, _, _ = await asyncio.gather(
        openai_agent(endpoint, https[0], random.Random(draw.random())),
        anthropic_agent(endpoint, https[1], random.Random(draw.random())),
        responses_agent(endpoint, https[0], random.Random(draw.random())),
        wander(endpoint, random.Random(draw.random()), https),
    )
    calls = [len(message.get("tool_calls", [])) for message in found[0]]
    for message in found[1]:
        if isinstance(message["content"], list):
            calls.append(sum(block["type"] == "tool_use" for block in message["content"]))
    return max(calls)
