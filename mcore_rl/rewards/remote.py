"""Built-in rewards of services: a grader of one's own, an LLM as a judge, and a reward model on SGLang."""

from __future__ import annotations

import math
import re
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from mcore_rl.errors import ConfigError
from mcore_rl.rewards.outcome import Void
from mcore_rl.rewards.service import Asks, Service, ServiceError, each, session
from mcore_rl.types import Group, Sample, join_arrays

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE = """Judge an answer.

Question:
{prompt}

Reference answer, which may be empty:
{label}

Answer to judge:
{response}

Think briefly about whether the answer is right and complete. Then end with one line "Score: N", where N is a
number from 0 (worthless) to 10 (perfect)."""
_NUMBER = r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?"
SCORE = rf"(?i)score\**\s*[:=]\s*\**\s*({_NUMBER})(?![.,]?\d|e[+-]?\d)"
_PLACE = re.compile(r"\d{1,18}", re.ASCII)
_FIELD = re.compile(r"\{(prompt|response|label)\}")


async def remote(
    group: Group,
    *,
    url: str,
    key_env: str = "",
    retries: int = 3,
    per_second: float = 0.0,
    concurrent: int = 16,
) -> list[Any]:
    """The reward that a service of one's own gives each sample, asked for by a POST of JSON.

    It is sent `id`, `prompt`, `messages`, `response`, `label`, `metadata` and `finish_reason`, and answers
    `{"reward": R}`, R as a reward function may return it, or `{"void": "reason"}`.

    Args:
        url: of the service.
        key_env, retries, per_second, concurrent: see Service.
    """
    service = Service(url, key_env, retries, per_second, concurrent)

    async def score(sample: Sample, ask: Asks) -> Any:
        prompt = sample.prompt
        body = {
            "id": sample.id,
            "prompt": prompt.text,
            "messages": list(prompt.messages),
            "response": sample.text,
            "label": prompt.label,
            "metadata": dict(prompt.metadata),
            "finish_reason": sample.finish_reason,
        }
        said = await ask(body)
        if isinstance(said, dict) and isinstance(said.get("void"), str):
            return Void(said["void"], f"{url} said so")
        if not isinstance(said, dict) or "reward" not in said:
            raise ServiceError("reply", f"{url}: neither reward nor void in {str(said)[:80]}")
        reward = said["reward"]
        if isinstance(reward, dict) and reward and all(map(_PLACE.fullmatch, reward)):
            return {int(place): value for place, value in reward.items()}  # JSON's keys are strings
        return reward

    return await each(service, group, score)


async def judge(
    group: Group,
    *,
    url: str,
    model: str,
    template: str = TEMPLATE,
    score: str = SCORE,
    low: float = 0.0,
    high: float = 10.0,
    max_tokens: int = 1024,
    temperature: float = 0.0,
    key_env: str = "",
    retries: int = 3,
    per_second: float = 0.0,
    concurrent: int = 16,
) -> list[Any]:
    """The score that a language model gives each sample, from 0 to 1, by an OpenAI-compatible address.

    The last match of `score` in its reply counts. A reply without one, or with a number beyond [low, high],
    makes the sample void: `unparsed`.

    Args:
        url: ends with `/v1`; `/chat/completions` is asked.
        template: of what the model is told, with {prompt}, {response} and {label} in it.
        score: regular expression whose group is the number.
        low, high: numbers that become 0 and 1.
        key_env, retries, per_second, concurrent: see Service.

    Raises:
        ConfigError: the template does not show the response, or `score` is no expression with one group.
    """
    service = Service(f"{url.rstrip('/')}/chat/completions", key_env, retries, per_second, concurrent)
    pattern = _pattern(score)
    if "{response}" not in template or not low < high:
        raise ConfigError("judge: template has to show {response}, and low to be below high; correct them")

    async def score_of(sample: Sample, ask: Asks) -> Any:
        told = {"prompt": conversation(sample), "response": sample.text, "label": sample.prompt.label_text}
        body = {
            "model": model,
            "messages": [{"role": "user", "content": _FIELD.sub(lambda field: told[field[1]], template)}],
            "max_tokens": max_tokens,
            "temperature": temperature,
        }
        reply = _content(await ask(body))
        numbers = pattern.findall(reply)
        number = float(numbers[-1]) if numbers and _is_number(numbers[-1]) else math.nan
        if not low <= number <= high:
            return Void("unparsed", f"no score from {low:g} to {high:g} in the judge's {reply[-60:]!r}")
        return (number - low) / (high - low)

    return await each(service, group, score_of)


async def classify(
    group: Group,
    *,
    url: str,
    tokenizer: str = "",
    key_env: str = "",
    retries: int = 3,
    per_second: float = 0.0,
) -> list[Any]:
    """The score that a reward model on an SGLang server (`--is-embedding`) gives each sample by `/classify`.

    Without a `tokenizer` it reads the ids that were sampled, and must have the policy's vocabulary. With the
    directory of its own, the conversation and the response are rendered by its chat template.

    Args:
        url: of the server, such as `http://host:30000`.
        key_env, retries, per_second: see Service; a call has all samples of the group.
    """
    service = Service(f"{url.rstrip('/')}/classify", key_env, retries, per_second)
    ids = [_rendered(sample, tokenizer) if tokenizer else _sampled(sample) for sample in group.samples]
    try:
        async with session() as opened:
            said = await service.ask(opened, {"input_ids": ids})
    except ServiceError as error:
        return [Void(error.reason, str(error))] * len(ids)
    if not isinstance(said, list) or len(said) != len(ids):
        return [Void("reply", f"{url}: no list of {len(ids)} scores")] * len(ids)
    return [_score(one, url) for one in said]


def conversation(sample: Sample) -> str:
    """What was asked, for a judge: `role: text` of each message, or the prompt where there are none."""
    turns = sample.prompt.messages
    return "\n\n".join(f"{turn.get('role')}: {turn.get('content')}" for turn in turns) or sample.prompt.text


@cache
def _pattern(text: str) -> re.Pattern[str]:
    try:
        pattern = re.compile(text)
    except re.error as error:
        raise ConfigError(f"judge: score is no regular expression ({error}); correct it") from None
    if pattern.groups != 1:
        raise ConfigError("judge: score needs one group, the number; write the others as (?:...)")
    return pattern


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _content(said: Any) -> str:
    try:
        content = said["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        content = None
    if not isinstance(content, str):
        raise ServiceError("reply", f"no choices[0].message.content in {str(said)[:80]}")
    return content


def _score(said: Any, url: str) -> Any:
    numbers = said.get("embedding") if isinstance(said, dict) else None
    if not isinstance(numbers, list) or len(numbers) != 1 or not isinstance(numbers[0], int | float):
        return Void("reply", f"{url}: no single score; serve a classifier of one label with --is-embedding")
    return numbers[0]


def _sampled(sample: Sample) -> list[int]:
    last = sample.segments[-1]
    return join_arrays([last.context, last.token_ids], np.int32).tolist()


def _rendered(sample: Sample, directory: str) -> list[int]:
    reader = _tokenizer(directory)
    asked = list(sample.prompt.messages) or [{"role": "user", "content": sample.prompt.text}]
    turns = [*asked, {"role": "assistant", "content": sample.text}]
    text = reader.apply_chat_template(turns, tokenize=False)
    return reader.encode(str(text), add_special_tokens=False)


@cache
def _tokenizer(directory: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer  # takes a second, which other rewards need not spend

    return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
