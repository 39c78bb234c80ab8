"""The held-out sets of a run: their prompts, how they are sampled, and what their samples say.

Every sample of an evaluation becomes a record, a line of JSON. All metrics follow from the records, so that
what is kept in a file is what was measured.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from transformers import PreTrainedTokenizerBase

from mcore_rl.algo.evaluation import interval, majority_at_k, pass_at_k
from mcore_rl.config import Config
from mcore_rl.config.sections import EvalSetConfig
from mcore_rl.data.prompts import PromptSet
from mcore_rl.errors import AskedToLeave, RewardError
from mcore_rl.functions import load_function
from mcore_rl.rewards import load_reward, load_rewards
from mcore_rl.training.data import data_metrics
from mcore_rl.training.rewards import held_out_words, reward_functions, reward_title
from mcore_rl.training.setup import read_prompts
from mcore_rl.types import Prompt, Sample
from mcore_rl.user_code import place, said

AnswerFn = Callable[[Sample], str | None]
Record = Mapping[str, Any]
"""one sample: set, prompt_id, prompt, response, label, reward, answer, finish_reason, tokens"""


@dataclass(frozen=True)
class EvalSet:
    """One held-out set."""

    name: str
    """name of the set in metrics and files"""
    key: str
    """key of its file in the config: `data.eval`, `eval.sets.NAME.path`"""
    found: PromptSet
    """all that its file has"""
    prompts: Sequence[Prompt]
    """those that are sampled"""
    samples: int
    """per prompt"""
    params: Mapping[str, Any]
    """SGLang's sampling parameters"""
    function: str | None
    """`module:function` that gives the rewards; None: the run's reward model"""
    word: str
    """what people call their mean"""
    answer: AnswerFn | None
    """what a sample votes for; None where nobody votes"""
    pass_reward: float
    """least reward with which a sample passes"""
    pass_at: Sequence[int]
    majority_at: Sequence[int]

    @property
    def what(self) -> str:
        """The metric: `accuracy`, or `reward` where a reward model gives scores, which are no accuracy."""
        return "reward" if self.function is None else "accuracy"


def reading_of(config: Config, one: EvalSetConfig) -> dict[str, Any]:
    """What `read_prompts` is told of a set."""
    sampled = set_params(config, one)["max_new_tokens"]
    return {"needs_label": not _by_model(config, one), "sampled": sampled}


def key_of(config: Config, name: str) -> str:
    """The key of the config that names the file of a set."""
    return f"eval.sets.{name}.path" if name in config.eval.sets else "data.eval"


def held_out_metrics(sets: Sequence[EvalSet]) -> dict[str, float]:
    """How many prompts each file has, and how many were left out, for the first logged step."""
    counts = [data_metrics(f"eval/{one.name}", one.found) for one in sets]
    return {key: value for found in counts for key, value in found.items()}


def set_params(config: Config, one: EvalSetConfig) -> dict[str, Any]:
    """How a set is sampled, as SGLang names it: what the set leaves unset is that of [rollout]."""
    own = {"temperature": one.temperature, "max_new_tokens": one.max_new_tokens, "top_k": one.top_k}
    own["top_p"] = one.top_p if one.top_p < 1 else None
    return config.rollout.sampling_params | {key: value for key, value in own.items() if value is not None}


def load_set_functions(config: Config) -> dict[str, tuple[str | None, AnswerFn | None]]:
    """Set -> what gives its rewards (None: the reward model), and what its samples vote for (None: nothing).

    Raises ConfigError for a function that does not exist or cannot take one sample.
    """
    found: dict[str, tuple[str | None, AnswerFn | None]] = {}
    for name, one in config.held_out.items():
        reward = None if _by_model(config, one) else one.reward or reward_title(config)
        if one.reward is not None:
            load_reward(one.reward, f"eval.sets.{name}.reward")
        elif reward is not None:
            load_rewards(reward_functions(config))
        answer: AnswerFn | None = _whole if one.majority_at else None
        if one.answer is not None:
            answer = load_function(f"eval.sets.{name}.answer", one.answer, "the sample")
        found[name] = (reward, answer)
    return found


def _by_model(config: Config, one: EvalSetConfig) -> bool:
    return config.reward.model is not None and one.reward is None


def read_sets(config: Config, tokenizer: PreTrainedTokenizerBase) -> list[EvalSet]:
    """Every held-out set of `config`, its file read.

    Raises:
        DataError: a file is malformed.
        ConfigError: a function of a set does not exist.
    """
    functions, words = load_set_functions(config), held_out_words(config)
    sets = []
    for name, one in config.held_out.items():
        found = read_prompts(config, one.path, tokenizer, **reading_of(config, one))
        reward, answer = functions[name]
        sets.append(
            EvalSet(
                name=name,
                key=key_of(config, name),
                found=found,
                prompts=found.first(one.prompts or config.train.eval_samples),
                samples=one.samples,
                params=set_params(config, one),
                function=reward,
                word=words[name],
                answer=answer,
                pass_reward=1.0 if one.pass_reward is None else one.pass_reward,
                pass_at=one.pass_at,
                majority_at=one.majority_at,
            )
        )
    return sets


def _whole(sample: Sample) -> str:
    """What `exact_match` compares with the label."""
    return sample.text.strip()


# --- records --------------------------------------------------------------------------------------------


def record_of(one: EvalSet, sample: Sample) -> Record:
    """A scored sample, with its text, as a line of JSON.

    Raises:
        RewardError: the set's answer function fails, or returns neither a string nor None.
    """
    return {
        "set": one.name,
        "prompt_id": sample.prompt.id,
        "prompt": sample.prompt.text,
        "response": sample.text,
        "label": sample.prompt.label,
        "reward": None if sample.void else sample.reward,
        "answer": None if one.answer is None or sample.void else _answer(one.answer, sample),
        "finish_reason": sample.finish_reason,
        "tokens": sample.trained_tokens,
    }


def _answer(function: AnswerFn, sample: Sample) -> str | None:
    name = getattr(function, "__qualname__", type(function).__qualname__)
    try:
        answer = function(sample)
    except AskedToLeave:
        raise
    except BaseException as error:
        raise RewardError(
            f"answer {name} raised {type(error).__name__} on sample {sample.id}: {said(error)}"
            f"{place(error)}; return None for a response without an answer"
        ) from error
    if not (answer is None or isinstance(answer, str)):
        raise RewardError(
            f"answer {name} returned {type(answer).__name__} for sample {sample.id}; return a string or None"
        )
    return answer


def as_lines(records: Sequence[Record]) -> str:
    """The records as a file has them."""
    return "".join(json.dumps(record) + "\n" for record in records)


# --- what they say --------------------------------------------------------------------------------------


def measure(one: EvalSet, records: Sequence[Record]) -> dict[str, float]:
    """The metrics of one evaluation, `eval/<set>/...`; docs/evaluation.md says what they mean.

    Samples without a reward, since a server aborted them or their grader failed, have no part in any of them.
    A prompt of which fewer than k samples are left has none in pass@k and majority@k. Nothing but the counts
    where no sample is left: no accuracy is not an accuracy of 0.
    """
    by_prompt: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        if record["reward"] is not None:
            by_prompt[record["prompt_id"]].append(record)
    scored = [record for its in by_prompt.values() for record in its]
    found: dict[str, float] = {
        "prompts": float(one.found.read),
        "sampled": float(len(by_prompt)),
        "samples": float(len(scored)),
        "missing": float(len(one.prompts) * one.samples - len(scored)),
    }
    if scored:
        found["truncated"] = fmean(record["finish_reason"] == "length" for record in scored)
        found["length"] = fmean(record["tokens"] for record in scored)
        found |= _means(one, list(by_prompt.values()))
    return {f"eval/{one.name}/{key}": value for key, value in found.items()}


def _means(one: EvalSet, prompts: Sequence[Sequence[Record]]) -> dict[str, float]:
    rewards = [[float(record["reward"]) for record in its] for its in prompts]
    within = all(0 <= reward <= 1 for its in rewards for reward in its)
    values = {one.what: ([fmean(its) for its in rewards], sum(map(len, rewards)), within)}
    for name, ks, estimate in (("pass", one.pass_at, _pass), ("majority", one.majority_at, _majority)):
        for k in ks:
            enough = [its for its in prompts if len(its) >= k]
            each = [estimate(one, its, k) for its in enough]
            values[f"{name}@{k}"] = (each, sum(map(len, enough)), True)
    found: dict[str, float] = {}
    for name, (each, samples, rate) in values.items():
        if each:
            found[name] = fmean(each)
        if (bounds := interval(each, samples, rate=rate)) is not None:
            found[f"{name}/low"], found[f"{name}/high"] = bounds
    return found


def _pass(one: EvalSet, records: Sequence[Record], k: int) -> float:
    return pass_at_k(len(records), sum(_passes(one, record) for record in records), k)


def _majority(one: EvalSet, records: Sequence[Record], k: int) -> float:
    votes = Counter(record["answer"] for record in records)
    right = Counter(record["answer"] for record in records if _passes(one, record))
    silent = votes.pop(None, 0)
    return majority_at_k([(count, right[answer] / count) for answer, count in votes.items()], k, silent)


def _passes(one: EvalSet, record: Record) -> bool:
    return record["reward"] >= one.pass_reward
