"""What the tests of environments share: a tokenizer with chat templates, and a policy of known replies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mcore_rl.environments.dialogue import ChatTemplate
from mcore_rl.environments.parsers import Parse, ServerParsers
from mcore_rl.environments.policy import Policy, RolloutLimits
from mcore_rl.rollout.dispatch import Request
from mcore_rl.rollout.reply import Reply
from mcore_rl.types import Prompt, Segment, VersionSpan

STABLE = (
    "{% for m in messages %}<s>{{ m.role }}:{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} {{ c.function.arguments | tojson }}</call>"
    "{% endfor %}<e>\n{% endfor %}{% if add_generation_prompt %}<s>assistant:{% endif %}"
)
"""every turn is written as it was before; a tool call in a spacing of its own"""
FORGETFUL = STABLE.replace(
    "{{ m.content }}",
    "{{ m.content if loop.last or m.role != 'assistant' else m.content.split('</think>')[-1] }}",
)
"""drops the thinking of earlier turns, as Qwen3's and DeepSeek's do"""
RESPONSE = {
    "start_anchor": "<s>assistant:",
    "fields": {
        "content": {"close": "<e>"},
        "tool_calls": {
            "open_pattern": r"<call>(?P<name>\w+) ",
            "close": "</call>",
            "content": "json",
            "repeats": True,
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
    },
}


def build_tokenizer(template: str = STABLE) -> PreTrainedTokenizerFast:
    """Characters, pairs of digits, and the marks of the template, of which <e> ends a response."""
    marks = ["<pad>", "<e>", "<s>", "<call>", "</call>", "</think>", "\n"]
    letters = [chr(code) for code in range(32, 127)]
    pairs = [f"{n:02d}" for n in range(100)]
    words = {token: i for i, token in enumerate([*marks, *letters, *pairs])}
    inner = Tokenizer(models.WordLevel(words))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"\d\d|.|\n"), "isolated")
    inner.decoder = decoders.Fuse()
    inner.add_special_tokens([AddedToken(mark, special=True) for mark in marks[:3]])
    inner.add_tokens([AddedToken(mark, special=False) for mark in marks[3:6]])
    made = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<e>")
    made.chat_template = template
    return made


LIMITS = RolloutLimits(turns=8, tokens=400, seconds=5.0, turn_seconds=5.0)


def chat_prompt(tokenizer: PreTrainedTokenizerFast, text: str = "2+2?", **metadata: object) -> Prompt:
    """A prompt of one user's message."""
    messages = [{"role": "user", "content": text}]
    rendered = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    ids = tuple(tokenizer.encode(rendered, add_special_tokens=False))
    return Prompt("p", rendered, ids, "4", metadata, messages)


class Scripted:
    """A server that says what it is told; it keeps every request."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, *said: str, versions: Sequence[str] = (), end: str = "<e>"
    ) -> None:
        self.asked: list[Request] = []
        self.sampled: list[tuple[int, ...]] = []
        self._tokenizer, self._said, self._versions = tokenizer, list(said), list(versions)
        self._end = end

    async def __call__(self, request: Request) -> list[Reply]:
        said, version = self._said[len(self.asked)], (self._versions or ["0"] * 99)[len(self.asked)]
        self.asked.append(request)
        finish = "stop" if said.endswith(self._end) else "length"
        ids = tuple(self._tokenizer.encode(said, add_special_tokens=False))
        self.sampled.append(ids)
        scores = tuple(-0.001 * (k + 1) - len(self.asked) for k in range(len(ids)))
        return [Reply(request.rids[0], ids, scores, (), finish, (VersionSpan(version, 0, len(ids)),))]


def policy_of(
    tokenizer: PreTrainedTokenizerFast,
    prompt: Prompt,
    ask: Callable,
    *,
    limits: RolloutLimits = LIMITS,
    response: Mapping[str, object] | None = RESPONSE,
    rid: str = "p@1/0",
    sampling: Mapping[str, object] | None = None,
    parsers: ServerParsers | None = None,
    parse: Parse | None = None,
) -> Policy:
    """A policy in one rollout of `prompt`."""
    params = {"max_new_tokens": 64, "sampling_seed": 7, **(sampling or {})}
    request = Request([prompt.token_ids], [params], [rid])
    return Policy(
        prompt, request, ask, ChatTemplate(tokenizer, response=response, parsers=parsers), limits, parse
    )


def check_trained_once(segments: Sequence[Segment], log: Sequence[tuple[Sequence[int], Reply]]) -> None:
    """Every logged reply is trained in one place, after the very prompt of its own; nothing else is."""
    left = [
        (tuple(asked), reply.token_ids, reply.log_probs, reply.versions[0].version) for asked, reply in log
    ]
    for segment in segments:
        ids = [*np.asarray(segment.context).tolist(), *np.asarray(segment.token_ids).tolist()]
        mask = [True] * len(segment.token_ids) if segment.trained is None else segment.trained
        mask = [False] * len(segment.context) + list(mask)
        versions = [span.version for span in segment.versions for _ in range(span.start, span.end)]
        scores, place = iter(zip(segment.log_probs.tolist(), versions, strict=True)), 0
        while place < len(ids):
            if not mask[place]:
                place += 1
                continue
            # A trained token begins a turn that was logged with all that stands before it.
            turn = next(
                one
                for one in left
                if tuple(ids[:place]) == one[0] and tuple(ids[place : place + len(one[1])]) == one[1]
            )
            left.remove(turn)
            assert [next(scores) for _ in turn[1]] == [(np.float32(x), turn[3]) for x in turn[2]]
            place += len(turn[1])
    assert left == []
    assert sum(len(segment.log_probs) for segment in segments) == sum(
        len(reply.token_ids) for _, reply in log
    )
