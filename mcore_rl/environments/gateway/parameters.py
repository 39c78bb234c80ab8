"""What a client asks for beside its conversation: applied, without effect on what is sampled, or refused.

Every sampled token is trained, and the loss takes it for one of the policy's distribution at the run's own
sampling parameters. Another temperature, a penalty, a biased logit or a forced call would make that wrong,
and a parameter that is silently dropped leaves its agent to believe in it. So none is dropped silently: what
would act is answered with 400, unless the environment names it in `serve_policy(ignored=)`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from mcore_rl.environments.gateway.session import ApiError

_DISTRIBUTION: Mapping[str, float] = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0}
"""parameter -> what it is where the run sets none; a client may repeat the run's own value"""

_TOOLS_AUTO = ("auto", "none")
_ALIKE: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "chat": {
        "n": (1,),
        "stop": ([], ""),
        "frequency_penalty": (0,),
        "presence_penalty": (0,),
        "repetition_penalty": (1,),
        "logit_bias": ({},),
        "top_logprobs": (0,),
        "response_format": ({"type": "text"},),
        "tool_choice": _TOOLS_AUTO,
        "parallel_tool_calls": (True,),
        "modalities": (["text"],),
        "logprobs": (True, False),
    },
    "completions": {
        "n": (1,),
        "best_of": (1,),
        "stop": ([], ""),
        "suffix": ("",),
        "echo": (False,),
        "frequency_penalty": (0,),
        "presence_penalty": (0,),
        "repetition_penalty": (1,),
        "logit_bias": ({},),
        "logprobs": (0, 1),
    },
    "responses": {
        "tool_choice": _TOOLS_AUTO,
        "parallel_tool_calls": (True,),
        "top_logprobs": (0,),
        "text": ({"format": {"type": "text"}}, {}),
        "truncation": ("disabled",),
        "background": (False,),
        "include": ([], ["reasoning.encrypted_content"]),
        "reasoning": ({},),
    },
    "messages": {
        "stop_sequences": ([],),
        "tool_choice": (
            {"type": "auto"},
            {"type": "auto", "disable_parallel_tool_use": False},
            {"type": "none"},
        ),
        "thinking": ({"type": "disabled"},),
    },
}
"""API -> parameter -> its values that ask for what is done anyway; None always does"""

_FREE: Mapping[str, frozenset[str]] = {
    "chat": frozenset({"messages", "tools", "max_tokens", "max_completion_tokens"}),
    "completions": frozenset({"prompt", "max_tokens"}),
    "responses": frozenset({"input", "instructions", "tools", "max_output_tokens", "previous_response_id"}),
    "messages": frozenset({"messages", "system", "tools", "max_tokens"}),
}
"""API -> parameters that are applied, whatever they are"""

_OF_BOOKS = frozenset(
    {
        *("model", "stream", "stream_options", "user", "metadata", "store", "service_tier", "seed"),
        *("prompt_cache_key", "prompt_cache_retention", "safety_identifier"),
    }
)
"""without effect on what is sampled; a seed too, since every rollout of a prompt must draw its own"""

IGNORE = "leave it out, or name it in serve_policy(ignored=) if the agent cannot"
"""what an environment can do about a parameter that is refused"""


def check_parameters(
    api: str,
    body: Mapping[str, Any],
    sampling: Mapping[str, Any],
    ignored: Collection[str],
    remedy: str,
) -> None:
    """Raises ApiError for a parameter that would act and is not applied.

    Args:
        api: `chat`, `completions`, `responses` or `messages`.
        sampling: the run's own parameters, in SGLang's names.
        ignored: parameters that the environment lets its agent send in vain.
        remedy: what to do about one that is refused.
    """
    for name, value in body.items():
        if value is None or name in _FREE[api] or name in _OF_BOOKS or name in ignored:
            continue
        if name in _DISTRIBUTION:
            own = sampling.get(name, _DISTRIBUTION[name])
            if type(value) not in (int, float) or value != own:
                raise _refused(name, f"{_shown(value)}, and the run samples with {own:g}: {remedy}")
        elif name in _ALIKE[api]:
            if not any(_same(value, one) for one in _ALIKE[api][name]):
                raise _refused(name, f"{_shown(value)} is not supported: {remedy}")
        else:
            raise _refused(_shown(name), f"not a parameter of this gateway: {remedy}")


def _same(value: Any, other: Any) -> bool:
    """Whether they are equal, where true is not 1."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _refused(name: str, why: str) -> ApiError:
    return ApiError(400, f"{name}: {why}", code="unsupported_parameter", param=name)
