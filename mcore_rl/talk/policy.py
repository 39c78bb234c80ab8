"""A served model as the policy that an environment would have, for people and programs that only ask it."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from mcore_rl.environments.dialogue import ChatTemplate
from mcore_rl.environments.load import load_response
from mcore_rl.environments.policy import Policy, RolloutLimits
from mcore_rl.errors import ConfigError
from mcore_rl.rollout.client import RolloutClient
from mcore_rl.rollout.dispatch import Request
from mcore_rl.rollout.reply import Reply
from mcore_rl.types import Prompt

SECONDS = 3600.0
"""the most that an answer takes"""
_TURNS = 1 << 20
SAMPLING = ("temperature", "top_p", "top_k", "min_p")


def chat_template(tokenizer: PreTrainedTokenizerBase | None, model: str) -> ChatTemplate:
    """The template of a served model. Raises ConfigError where it has no tokenizer."""
    if tokenizer is None:
        raise ConfigError(f"{model} has no tokenizer files: only token ids can be sent to it (/generate)")
    return ChatTemplate(
        tokenizer, response=load_response(None, getattr(tokenizer, "response_template", None))
    )


def policy_of(
    client: RolloutClient, template: ChatTemplate, context: int, sampling: Mapping[str, Any]
) -> Policy:
    """A policy without a prompt of its own, which samples from the server of `client`.

    Args:
        context: the most tokens of a conversation with its answer.
        sampling: in SGLang's names; `seed`, where it is one, makes an answer repeatable.
    """
    params = {name: sampling[name] for name in SAMPLING if type(sampling.get(name)) in (int, float)}
    seed = sampling.get("seed")
    params["sampling_seed"] = seed if type(seed) is int else secrets.randbits(31)
    params["max_new_tokens"] = context

    async def ask(request: Request) -> list[Reply]:
        return await client.generate(request.prompts, request.sampling_params, request.rids)

    name = f"talk-{secrets.token_hex(8)}"
    limits = RolloutLimits(_TURNS, context, SECONDS, SECONDS)
    return Policy(Prompt(name, "", (), ""), Request([[]], [params], [name]), ask, template, limits)
