"""What a run asks of its prompt files besides their form, and what it says of prompts that it left out."""

from __future__ import annotations

import sys

from mcore_rl.config import Config
from mcore_rl.data.prompts import Limit, PromptSet, Response
from mcore_rl.errors import DataError
from mcore_rl.log import StepLog
from mcore_rl.model.hf.architecture import read_hf_config
from mcore_rl.precision import packed_multiple, token_multiple
from mcore_rl.terminal import printable, quoted


def response_of(config: Config, sampled: int | None = None) -> Response:
    """What follows every prompt in a run of `config`, and the lengths that the two together may not exceed.

    Args:
        sampled: tokens of the longest response of a held-out set, which is sampled whatever is trained.

    Raises:
        ConfigError: the model's config.json cannot be read.
    """
    positions = read_hf_config(config.model.path).get("max_position_embeddings")
    supervised = config.supervised_only and sampled is None
    key = "rollout.max_new_tokens" if sampled is None else "the set's max_new_tokens"
    sampled = config.rollout.max_new_tokens if sampled is None else sampled
    limits = []
    if positions is not None:
        remedy = "shorten it, or take the line out"
        if not supervised:
            remedy = f"lower {key}"
            if sampled < positions:
                remedy += (
                    f", or data.max_prompt_tokens to {positions - sampled}, which leaves such prompts out"
                )
        limits.append(Limit(positions, f"the model has {positions} positions", remedy))
    if supervised:  # rollouts have a length that the config knows: its own rules compare it
        p, m, budget = config.parallel, config.model, config.train.tokens_per_micro_batch
        tokens = token_multiple(m.precision, m.fp8_recipe)
        align = packed_multiple(p.tensor, p.context, tokens, sequence=p.sequence)
        what = f"a micro-batch has room for {budget // align * align} (train.tokens_per_micro_batch)"
        limits.append(Limit(budget // align * align, what, "raise train.tokens_per_micro_batch"))
    return Response(None if supervised else sampled, limits)


def check_batch(config: Config, prompts: PromptSet) -> None:
    """Raises DataError where the training file has fewer usable prompts than the run takes at once."""
    wanted, key = config.supervised.batch_size, "supervised.batch_size"
    if not config.supervised_only:
        wanted, key = config.rollout.prompts_per_step, "rollout.prompts_per_step"
        if config.rollout.max_staleness and config.rollout.over_sampling:
            wanted += config.rollout.over_sampling
            key += " and rollout.over_sampling"
    if wanted > len(prompts.prompts):
        raise DataError(
            f"{config.data.train}: {key} = {wanted}, the file has {len(prompts.prompts)} usable prompts; "
            "lower it, or give more prompts"
        )


def describe_dropped(config: Config, found: PromptSet) -> str:
    """What was left out of a file and where it begins; of a set that lacks some."""
    return (
        f"{len(found.too_long)} of {found.read} prompts exceed data.max_prompt_tokens = "
        f"{config.data.max_prompt_tokens} and are left out, the first at {found.too_long_at} "
        f"({quoted(found.too_long[0])})"
    )


def data_metrics(name: str, found: PromptSet) -> dict[str, float]:
    """How many prompts a file has, and how many of them were left out, for the first logged step.

    Args:
        name: `train`, or `eval/NAME` of a held-out set.
    """
    return {f"data/{name}/prompts": float(found.read), f"data/{name}/dropped": float(len(found.too_long))}


def say_dropped(config: Config, step_log: StepLog, key: str, found: PromptSet) -> None:
    """Say, and write to events.jsonl, what was left out of a file; for the main rank.

    Args:
        key: of the file in the config, such as `data.train`.
    """
    if not found.too_long:
        return
    step_log.event(
        "prompts_dropped",
        key=key,
        dropped=len(found.too_long),
        prompts=found.read,
        first=found.too_long_at,
        id=found.too_long[0],
    )
    print(printable(f"{key}: {describe_dropped(config, found)}"), file=sys.stderr, flush=True)
