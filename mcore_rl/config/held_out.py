"""The rules of held-out sets, and the name of one that has none."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from mcore_rl.config.sections import EXACT_MATCH, EvalSetConfig, RewardConfig


def set_name(path: Path) -> str:
    """The name of the set of data.eval: its file's, with `_` for what no name of a set can have."""
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", path.stem)[:64]
    return name if re.match(r"[A-Za-z0-9_]", name) else f"_{name[1:]}"


def wrong_sets(
    sets: Mapping[str, EvalSetConfig], file: Path | None, reward: RewardConfig, temperature: float
) -> Iterator[str]:
    """`eval.sets.NAME.key: what, remedy` for keys of a set that cannot go together.

    Args:
        file: data.eval.
        reward: what scores a set without a reward of its own.
        temperature: that of [rollout].
    """
    if file is not None and set_name(file).lower() in map(str.lower, sets):
        yield f"data.eval: [eval.sets] has a set called {set_name(file)} too; keep that one alone"
    for name, one in sets.items():
        for key, what in (*_of_sampling(one, temperature), *_of_scores(one, reward)):
            yield f"eval.sets.{name}.{key}: {what}"


def _of_sampling(one: EvalSetConfig, temperature: float) -> Iterator[tuple[str, str]]:
    greedy = one.top_k == 1 or (temperature if one.temperature is None else one.temperature) == 0
    if greedy and one.samples > 1:
        yield "samples", "the likeliest response is always the same; set 1, or temperature and top_k higher"
    if greedy and one.top_p < 1:
        yield "top_p", "has no effect on the likeliest token; remove it"


def _of_scores(one: EvalSetConfig, reward: RewardConfig) -> Iterator[tuple[str, str]]:
    for key, ks in (("pass_at", one.pass_at), ("majority_at", one.majority_at)):
        if any(k > one.samples for k in ks):
            yield key, f"{max(ks)} of {one.samples} samples; lower it, or raise samples"
        if len(set(ks)) < len(ks):
            yield key, "names a number twice; name it once"
    by_model = reward.model is not None and one.reward is None
    counted = one.pass_at or one.majority_at
    if by_model and one.pass_reward is None and counted:
        yield "pass_reward", "required, since the scores of a reward model have no 1 for right; set it"
    if one.pass_reward is not None and not counted:
        yield "pass_reward", "has no effect without pass_at or majority_at; remove it"
    if one.answer is not None and not one.majority_at:
        yield "answer", "has no effect without majority_at; remove it"
    of_run = None if reward.functions else reward.function
    exact = not by_model and (one.reward or of_run) == EXACT_MATCH
    if one.majority_at and one.answer is None and not exact:
        yield "answer", "required: the whole response is the answer for exact_match alone; set it"
