"""What a run asks of its prompt files besides their form, and what it says of prompts that it left out."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from mcore_rl import strict_json
from mcore_rl.config import Config
from mcore_rl.data.chat import is_read
from mcore_rl.data.cursor import PromptCursor
from mcore_rl.data.examples import ExampleFormat, Limit, Target
from mcore_rl.data.messages import read_tools
from mcore_rl.data.prompts import PromptSet, Response
from mcore_rl.data.quota import shares_of
from mcore_rl.data.reader import RowFormat
from mcore_rl.errors import ConfigError, DataError
from mcore_rl.log import StepLog
from mcore_rl.model.hf.architecture import positions_of
from mcore_rl.precision import packed_multiple, token_multiple
from mcore_rl.terminal import printable, quoted


def response_of(config: Config, sampled: int | None = None) -> Response:
    """What follows every prompt in a run of `config`, and the lengths that the two together may not exceed.

    Args:
        sampled: tokens of the longest response of a held-out set, which is sampled whatever is trained.

    Raises:
        ConfigError: the model's config.json cannot be read.
    """
    fewest = fewest_positions(config, held_out=sampled is not None)
    supervised = config.trains_on_rows and sampled is None
    key = "rollout.max_new_tokens" if sampled is None else "the set's max_new_tokens"
    sampled = config.rollout.max_new_tokens if sampled is None else sampled
    limits = []
    if fewest is not None:
        positions, whose = fewest
        remedy = "shorten it, or take the line out"
        if not supervised:
            remedy = f"lower {key}"
            if sampled < positions:
                remedy += (
                    f", or data.max_prompt_tokens to {positions - sampled}, which leaves such prompts out"
                )
        limits.append(Limit(positions, f"{whose} has {positions} positions", remedy))
    if supervised:  # rollouts have a length that the config knows: its own rules compare it
        p, m, budget = config.parallel, config.model, config.train.tokens_per_micro_batch
        tokens = token_multiple(m.precision, m.fp8_recipe)
        align = packed_multiple(p.tensor, p.context, tokens, sequence=p.sequence)
        room = budget // align * align
        what = f"a micro-batch has room for {room} (train.tokens_per_micro_batch)"
        remedy = "raise train.tokens_per_micro_batch"
        behind = int(config.run.kind == "reward_model")  # a score is a row of its own behind its sequence
        limits.append(Limit(room, what, remedy, align, together=True, behind=behind))
    return Response(None if supervised else sampled, limits)


def fewest_positions(config: Config, *, held_out: bool = False) -> tuple[int, str] | None:
    """The tokens that a sequence may have for every model that reads it, and whose limit that is.

    Args:
        held_out: of a held-out set, which critics and teachers do not see.

    Raises:
        ConfigError: a config.json cannot be read.
    """
    paths = {"the model": config.model.path, "reward.model": config.reward.model}
    if not held_out:
        paths["critic.path"] = config.critic.path
        paths |= {f"distill.teachers.{name}": path for name, path in config.distill.teachers.items()}
    known = ((positions_of(path), whose) for whose, path in paths.items() if path is not None)
    limits = [(tokens, whose) for tokens, whose in known if tokens is not None]
    return min(limits, key=lambda one: one[0], default=None)


def row_format(config: Config, *, needs_label: bool | None = None, trained: bool = True) -> RowFormat:
    """How [data] says that a row is read.

    Args:
        needs_label: a row without a label is refused; unset, where what trains on it reads one.
        trained: the prompts are trained on, and not held out.

    Raises:
        ConfigError: data.tools is no file of tools.
    """
    data, target = config.data, target_of(config) if trained else None
    common: dict[str, Any] = dict(
        prompt_key=data.prompt_key,
        label_key=data.label_key,
        id_key=data.id_key,
        # a reward model alone reads none
        needs_label=needs_label_of(config) if needs_label is None else needs_label,
        trains_label=target == "label",
        renders_label=target == "label" or (config.trains_on_rows and not trained),
        apply_chat_template=data.apply_chat_template,
        last_assistant=data.last_assistant if target in (None, "label") else "continue",
        system=data.system,
        tools=None if data.tools is None else _tools(data.tools),
        chat_template_kwargs=data.chat_template_kwargs,
        choice_key=config.distill.teacher_key if trained else "",
        choices=tuple(config.distill.teachers),
    )
    return (
        RowFormat(**common)
        if target is None
        else ExampleFormat(
            **common,
            target=target,
            chosen_key=data.chosen_key,
            rejected_key=data.rejected_key,
            completion_key=data.completion_key,
            margin_key=data.margin_key,
        )
    )


def needs_label_of(config: Config) -> bool:
    """Whether a row without a label is refused; of a teacher's answer none is needed."""
    return config.reward.model is None and not config.distills_samples


def target_of(config: Config) -> Target | None:
    """What of a row is trained; None where that is sampled."""
    match config.run.kind:
        case "rl":
            return None
        case "sft":
            return config.supervised.target
        case "preference":
            return "verdict" if config.preference.loss == "kto" else "pair"
        case "reward_model":
            return "pair"
        case "distill":
            return None if config.distill.on_policy else config.supervised.target


def check_template(config: Config, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ConfigError for what [data] gives a chat template that does not read it."""
    if not tokenizer.chat_template:
        return
    if config.data.tools is not None and not is_read("tools", tokenizer):
        raise ConfigError(
            "data.tools: the chat template reads no tools; drop it, or use a template that does"
        )
    for name in config.data.chat_template_kwargs:
        if not is_read(name, tokenizer):
            raise ConfigError(
                f"data.chat_template_kwargs.{name}: the chat template reads no such variable; drop it, or "
                "name one that it reads"
            )


def _tools(path: Path) -> Sequence[Any]:
    try:
        found = read_tools(str(path), strict_json.parse(path.read_bytes()))
    except OSError as error:
        raise ConfigError(f"data.tools: {path}: {error.strerror}; check the path") from None
    except (strict_json.JsonError, DataError) as error:
        raise ConfigError(f"data.tools: {path}: {error}") from None
    if found is None:
        raise ConfigError(f"data.tools: {path}: no tool in it; write a JSON list of tools, or drop the key")
    return found


def check_batch(config: Config, prompts: PromptSet) -> None:
    """Raises DataError where the training file has fewer usable prompts than the run takes at once."""
    wanted, key = config.supervised.batch_size, "supervised.batch_size"
    if not config.trains_on_rows:
        wanted, key = config.rollout.prompts_per_step, "rollout.prompts_per_step"
        if config.rollout.max_staleness and config.rollout.over_sampling:
            wanted += config.rollout.over_sampling
            key += " and rollout.over_sampling"
    paths = ", ".join(map(str, config.data.train))
    if wanted > len(prompts):
        raise DataError(
            f"{paths}: {key} = {wanted}, the file has {len(prompts)} usable prompts; "
            "lower it, or give more prompts"
        )
    shares = shares_of(config.data.weights) if config.data.weights else ()
    begins = (0, *prompts.part_ends)
    for path, share, begin, end in zip(config.data.train, shares, begins, prompts.part_ends, strict=False):
        if math.ceil(share * wanted) > end - begin:
            raise DataError(
                f"{path}: data.weights and {key} = {wanted} take {math.ceil(share * wanted)} prompts of it "
                f"at once, it "
                f"has {end - begin} usable ones; lower them, or give more prompts"
            )


def describe_dropped(config: Config, found: PromptSet) -> str:
    """What was left out of a file and where it begins; of a set that lacks some."""
    examined = "" if found.examined.rows == found.read else f"the first {found.examined.rows} of "
    return (
        f"{len(found.too_long)} of {examined}{found.read} prompts exceed data.max_prompt_tokens = "
        f"{config.data.max_prompt_tokens} and are left out, the first at {found.examined.too_long_at} "
        f"({quoted(found.too_long[0])})"
    )


def data_metrics(name: str, found: PromptSet) -> dict[str, float]:
    """How many prompts a file has, and how many of them were left out, for the first logged step.

    Args:
        name: `train`, or `eval/NAME` of a held-out set.
    """
    return {f"data/{name}/prompts": float(found.read), f"data/{name}/dropped": float(len(found.too_long))}


def passed_over(cursor: PromptCursor) -> dict[str, float]:
    """How often a prompt turned out to be over-long when its turn came; nothing where none did.

    Those that were examined at the start are not among them: `data_metrics` counts these.
    """
    return {"data/train/passed_over": float(cursor.passed_over)} if cursor.passed_over else {}


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
        first=found.examined.too_long_at,
        id=found.too_long[0],
    )
    print(printable(f"{key}: {describe_dropped(config, found)}"), file=sys.stderr, flush=True)


def say_beginning(step_log: StepLog, found: PromptSet) -> None:
    """Warn, and write to events.jsonl, where conversations lack the token that begins texts; main rank."""
    if found.examined.without_beginning:
        step_log.event("prompts_without_bos", first=found.examined.without_beginning)
        print(printable(f"warning: {describe_beginning(found)}"), file=sys.stderr, flush=True)


def describe_beginning(found: PromptSet) -> str:
    """What is unusual of conversations without the beginning that the tokenizer gives a text."""
    return (
        f"{found.examined.without_beginning}: the chat template writes no {quoted(found.beginning_token)} "
        "in front, which the tokenizer puts in front of every text; use the template that belongs to the "
        "model, if this one does not"
    )
