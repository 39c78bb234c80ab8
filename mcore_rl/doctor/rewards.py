"""What gives the rewards, tried as a run does it: the first prompts' own labels are the responses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from mcore_rl.config import Config
from mcore_rl.data.prompts import PromptSet
from mcore_rl.doctor.finding import Finding
from mcore_rl.errors import RewardError
from mcore_rl.model.hf.architecture import read_architecture
from mcore_rl.model.hf.parameters import CriticParameterMap
from mcore_rl.model.layouts import check_layout_of, padded_vocab
from mcore_rl.model.weights_io import hf_reader
from mcore_rl.rewards import RewardFunction, load_rewards
from mcore_rl.terminal import joined
from mcore_rl.training.assemble import check_same_tokens
from mcore_rl.training.assemble_rollouts import reward_pool
from mcore_rl.training.layout import layout_of
from mcore_rl.training.rewards import check_weights, reward_functions, reward_title
from mcore_rl.training.setup import load_tokenizer
from mcore_rl.types import Group, Prompt, Sample, VersionSpan

_EACH = 8
"""prompts that a function is tried on"""
_LOOKED_AT = 2000
"""prompts among which those are looked for that a function is for"""
_OF_DATA = frozenset({"raised", "exited", "timeout", "memory", "output", "forked", "returned"})
"""reasons that are faults of the function itself; any other is one that it chose"""


def check_reward(config: Config, found: PromptSet) -> Iterator[Finding]:
    """The reward model, or the functions.

    Raises:
        ConfigError, RewardError: it cannot be had, or a function fails.
    """
    if config.reward.model is not None:
        yield classifier(config, "reward.model", config.reward.model)
        return
    functions = reward_functions(config)
    load_rewards(functions)
    chosen_by_row = any(one.when for one in functions)
    prompts = list(islice(found.prompts, _LOOKED_AT if chosen_by_row else _EACH))
    yield from _without_function(functions, prompts)
    chosen = {prompt.id: prompt for one in functions for prompt in _first(one, prompts)}
    if chosen:
        yield from _tried(config, list(chosen.values()))


def _first(function: RewardFunction, prompts: Sequence[Prompt]) -> list[Prompt]:
    return list(islice((prompt for prompt in prompts if function.applies(prompt)), _EACH))


def _without_function(functions: Sequence[RewardFunction], prompts: Sequence[Prompt]) -> Iterator[Finding]:
    """Tables that are for no prompt, and prompts that no table is for."""
    for one in functions:
        if not _first(one, prompts):
            what = f"{one.key.removesuffix('.function')} is for none of the first {len(prompts)} prompts"
            yield Finding("reward", "warning", what, "correct its `when`, unless such rows come later")
    left = [prompt for prompt in prompts if not any(one.applies(prompt) for one in functions)]
    if left:
        what = (
            f"{len(left)} of the first {len(prompts)} prompts have no reward function, such as {left[0].id}"
        )
        yield Finding("reward", "warning", what, "add a table for them: every sample of theirs would be void")


def _tried(config: Config, prompts: Sequence[Prompt]) -> Iterator[Finding]:
    """Each prompt's own label as the response to it, through the same path as a rollout."""
    tokenizer = load_tokenizer(config.model.path)
    groups = [
        Group(f"doctor/{k}", (_answered(f"doctor/{k}/0", p, tokenizer),)) for k, p in enumerate(prompts)
    ]
    with reward_pool(config) as pool:
        scored, reasons = pool.score(groups)
    name = reward_title(config)
    faults = {reason: count for reason, count in reasons.counts.items() if reason in _OF_DATA}
    if faults:
        raise RewardError(
            f"reward {name} gives {sum(faults.values())} of {len(prompts)} prompts' own labels no reward: "
            f"{joined(reasons.examples)}; handle these responses in the function"
        )
    live = [sample for group in scored for sample in group.samples if not sample.void]
    if not live:
        what = f"{name} gives none of the first {len(prompts)} prompts a reward, for their own labels: "
        yield Finding(
            "reward", "warning", what + joined(reasons.examples), "a run ends where all samples are void"
        )
        return
    check_weights(config.reward.weights, live, config.reward.functions)
    void = f"; {reasons.counts.total()} of {len(prompts)} are void" if reasons.counts else ""
    given = f"{name} gives the first prompt's own label {live[0].reward:g}{void}"
    no_text = any(prompt.label is not None and not isinstance(prompt.label, str) for prompt in prompts)
    if no_text and not any(sample.reward for sample in live):
        what = f"{given}, and so all of the first {len(live)}: labels that are no strings equal no text"
        yield Finding("reward", "warning", what, "compare sample.text with sample.prompt.label_text")
        return
    yield Finding("reward", "ok", given)


def _answered(name: str, prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> Sample:
    """One turn, of the label's own tokens and the end: places of tokens mean what they mean in a run."""
    text = prompt.label_text
    ends = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = np.array([*tokenizer.encode(text, add_special_tokens=False), *ends] or [0], np.int32)
    return Sample.of_response(
        id=name,
        prompt=prompt,
        token_ids=ids,
        log_probs=np.zeros(len(ids), np.float32),
        text=text,
        finish_reason="stop",
        versions=(VersionSpan("doctor", 0, len(ids)),),
    )


def classifier(config: Config, key: str, path: Path) -> Finding:
    """Whether `key` of the config names a sequence classifier for the policy's tokens at this layout.

    Raises:
        ConfigError, LayoutError: it does not.
    """
    arch = read_architecture(path)
    p = config.parallel
    check_layout_of(arch, layout_of(config, p.tensor * p.pipeline * p.context * (p.data or 1)), key)
    check_same_tokens(config, key, path)
    hf_reader(path, CriticParameterMap(arch, padded_vocab(arch, 1)))
    what = f"{path}: a sequence classifier over the policy's tokens, its weights complete"
    return Finding(key.partition(".")[0], "ok", what)
