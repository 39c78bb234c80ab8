"""The section of a rollout that is more than one response, and the rules between it and the others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, StringConstraints

from mcore_rl.config.sections import (
    Count,
    DataConfig,
    FilePath,
    RewardConfig,
    RolloutConfig,
    Seconds,
    Section,
    TrainConfig,
    function_name,
    plain_arguments,
)

_OF_STEP = 0.9
"""share of train.step_timeout that a lead waits for the rollouts of a step"""
ParserName = Annotated[str, StringConstraints(pattern=r"^[\w.-]{1,64}$")]


def _tables_of_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """Plain arguments, and tables of them, as other packages have. Raises ValueError."""
    for name, value in arguments.items():
        if isinstance(value, dict):
            _tables_of_arguments({f"{name}.{key}": one for key, one in value.items()})
        else:
            plain_arguments({name: value})
    return arguments


class EnvironmentConfig(Section):
    """What a rollout is, where it is more than one response: turns, tools, a game."""

    function: Annotated[str, AfterValidator(function_name)] | None = None
    """`module:function` that makes one rollout of a policy and a prompt; unset, one response is all of it."""
    args: Annotated[dict[str, Any], AfterValidator(_tables_of_arguments)] = Field(default={})
    """Its keyword arguments."""
    max_turns: Count = 16
    """Responses of one rollout, at most."""
    max_tokens: Annotated[int, Field(ge=2)] = 4096
    """Longest training sequence of a rollout: prompt, responses and all that was observed."""
    timeout: Seconds = 300.0
    """Seconds of one rollout; one that has not ended by then is void."""
    turn_timeout: Seconds = 60.0
    """Seconds that the environment may take between two responses; beyond, its rollout is void."""
    outlived: Literal["drop", "cut", "finish"] = "drop"
    """What becomes of a rollout that has not ended when its first tokens are too old for
    rollout.max_staleness: dropped with its group; cut where it is, or finished, and trained on those of its
    tokens that are not."""
    response_template: FilePath | None = None
    """JSON file that says how a message and its tool calls are read in a response (transformers'
    parse_response); unset, the tokenizer's own, or as text."""
    tool_call_parser: ParserName | None = None
    """SGLang's name of the parser of tool calls, such as qwen25, by which its servers read a response; unset,
    the response template reads it."""
    reasoning_parser: ParserName | None = None
    """The same for reasoning, such as qwen3."""


def wrong_environment(
    one: EnvironmentConfig,
    data: DataConfig,
    rollout: RolloutConfig,
    reward: RewardConfig,
    train: TrainConfig,
) -> Iterator[str]:
    """`section.key: what, remedy` for what an environment cannot go together with."""
    if one.function is None:
        return
    if one.max_tokens <= data.max_prompt_tokens:
        yield (
            f"environment.max_tokens: {one.max_tokens} leave no room behind a prompt of "
            f"data.max_prompt_tokens = {data.max_prompt_tokens}; raise it, or lower that"
        )
    if one.timeout >= _OF_STEP * train.step_timeout:
        yield (
            f"environment.timeout: a step waits {_OF_STEP * train.step_timeout:g} s for its rollouts (train."
            "step_timeout), and one that takes longer would end the run; lower it, or raise that"
        )
    if one.response_template is not None and (one.tool_call_parser or one.reasoning_parser):
        yield (
            "environment.response_template: and a parser of the servers, where a response is read once; drop "
            "it, or environment.tool_call_parser and environment.reasoning_parser"
        )
    if one.outlived != "drop" and not (rollout.max_staleness and rollout.over_sampling):
        yield (
            "environment.outlived: no rollout becomes too old where a step waits for its oldest; set "
            "rollout.max_staleness and rollout.over_sampling to 1 or more, or drop it"
        )
    if reward.model is not None:
        yield (
            "reward.model: scores a response, and an environment's rollout may have several sequences; let "
            "environment.function return the reward, or name a reward.function"
        )
    if rollout.routing_replay:
        yield (
            "rollout.routing_replay: experts of several turns are not joined yet; set it to false, or drop "
            "environment.function"
        )


def unused_of_environment(one: EnvironmentConfig, *, samples: bool) -> dict[str, str]:
    """Keys of [environment] that have no effect -> why.

    Args:
        samples: the run samples responses, to train on them or to evaluate.
    """
    if not samples:
        return dict.fromkeys((f"environment.{key}" for key in type(one).model_fields), "nothing is sampled")
    if one.function is None:
        keys = [key for key in type(one).model_fields if key != "function"]
        return dict.fromkeys((f"environment.{key}" for key in keys), "there is no environment.function")
    return {}
