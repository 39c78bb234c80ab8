"""Who gives the rewards of a run: a function of each sample, or a reward model on the training ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from math import isfinite

from mcore_rl.config import Config
from mcore_rl.data.packing import TokenSequence
from mcore_rl.errors import ConfigError, RewardError
from mcore_rl.metric_names import held_out_word
from mcore_rl.model.build import Model
from mcore_rl.model.hf.architecture import read_hf_config
from mcore_rl.model.residency import Residency
from mcore_rl.parallel.control import gather_replicas, on_leads
from mcore_rl.parallel.mesh import Mesh
from mcore_rl.rewards import RewardFunction, RewardPool, check_rate
from mcore_rl.rewards.pool import Reasons
from mcore_rl.terminal import joined, short
from mcore_rl.training.batch import Batching, whole_sequence
from mcore_rl.training.model_passes import values
from mcore_rl.types import Group, Sample

MOST_REASONS = 16
"""of `Void`, that have a metric of their own in a run: a function may give each sample another one"""
_FAILURES = {"raised", "exited", "timeout", "memory", "output", "forked", "returned", "no_function"}
"""reasons of the pool, which always have one"""


def reward_functions(config: Config) -> tuple[RewardFunction, ...]:
    """The functions whose weighted sum is the reward of the run."""
    r = config.reward
    if not r.functions:
        return (RewardFunction(r.function),)
    return tuple(
        RewardFunction(
            one.function, name, one.weight, one.when, one.args, key=f"reward.functions.{name}.function"
        )
        for name, one in r.functions.items()
    )


def reward_title(config: Config) -> str:
    """What the functions of the run are called in messages."""
    r = config.reward
    return joined(f"{name} ({one.function})" for name, one in r.functions.items()) or r.function


def held_out_words(config: Config) -> dict[str, str]:
    """Held-out set -> what people call its mean reward; see held_out_word."""
    r, environment = config.reward, config.environment.function
    of_run = reward_title(config) if r.model is None else None
    return {name: held_out_word(one.reward or of_run, environment) for name, one in config.held_out.items()}


@dataclass
class RewardCounts:
    """What became of the samples since the last record of metrics."""

    scored: int = 0
    reasons: list[Reasons] = field(default_factory=list)
    """why samples of this replica are void, not yet gathered over the replicas"""
    known: list[Reasons] = field(default_factory=list)
    """the same of all replicas, gathered"""
    parts_known: bool = False
    """the names of weights were compared with those of parts"""
    named: set[str] = field(default_factory=set)
    """reasons of `Void` that have a metric"""

    def by_metric(self, counts: Mapping[str, int]) -> dict[str, float]:
        """`void/<reason>` of these counts; those beyond MOST_REASONS in a run together, as `void/other`."""
        found: Counter[str] = Counter()
        for reason, count in sorted(counts.items(), key=lambda one: (-one[1], one[0])):
            if reason not in _FAILURES and len(self.named) < MOST_REASONS:
                self.named.add(reason)
            known = reason in _FAILURES or reason in self.named
            found[f"void/{reason if known else 'other'}"] += count
        return {name: float(count) for name, count in found.items()}


@dataclass(frozen=True)
class RewardSource:
    """What gives the rewards: `model` where there is one, else the function of `pool`."""

    mesh: Mesh
    pool: RewardPool
    function: str
    """its name"""
    max_void: float
    """share of a step's samples that may get no reward"""
    model: Model | None
    shape: Batching
    """how the model's micro-batches are made"""
    residency: Residency
    """where the model is outside its phase"""
    tally: RewardCounts = field(default_factory=RewardCounts)
    weights: Mapping[str, float] = field(default_factory=dict)
    """of parts, all of which the samples of the first step must have"""
    names: Collection[str] = ()
    """of the functions, where there are several"""

    def begin_by_function(self, name: str, make: Callable[[], Group]) -> None:
        """On a lead: the function scores this group from now on, whoever waits. From any thread."""
        if self.model is None:
            self.pool.begin(name, make)

    def finish_by_function(self, groups: Mapping[str, Callable[[], Group]]) -> list[Group]:
        """On a lead: groups that were begun (id -> what makes it), with rewards; see by_function."""
        if self.model is not None:
            return [make() for make in groups.values()]
        scored, reasons = self.pool.finish(list(groups))
        self.tally.reasons.append(reasons)
        return scored

    def forget(self, names: Sequence[str]) -> None:
        """On a lead: nobody will ask for the rewards of these groups."""
        self.pool.forget(names)

    def by_function(self, groups: Sequence[Group]) -> list[Group]:
        """On a lead: the groups with rewards; unchanged where a model gives them.

        A sample that the function gave no reward is void. Raises RewardError, ConfigError: see RewardPool.
        """
        if self.model is not None:
            return list(groups)
        scored, reasons = self.pool.score(groups)
        self.tally.reasons.append(reasons)
        return scored

    def check_voids_and_ask_model(self, groups: Sequence[Group]) -> list[Group]:
        """On all ranks, for the same groups: whether too few have a reward, then `by_model`. Collective.

        Raises:
            RewardError: on every rank, where more than `max_void` of the samples since the last record, or
                all of them, got no reward; see by_model.
        """
        self.tally.scored += sum(len(group.samples) for group in groups)
        if self.model is None and any(sample.void for group in groups for sample in group.samples):
            found = gather_replicas(self.mesh, on_leads(self.mesh, lambda: self.tally.reasons))
            self.tally.known += [one for of_lead in found for one in of_lead]
            check_rate(self.tally.scored, self.tally.known, self.max_void, self.function)
        self.tally.reasons.clear()
        return self.by_model(groups)

    def check_parts(self, groups: Sequence[Group]) -> None:
        """On all ranks, for the same groups to be trained: the first of them have every part of a weight.

        Raises:
            ConfigError: on every rank.
        """
        live = [sample for group in groups for sample in group.samples if not sample.void]
        if live and self.model is None and not self.tally.parts_known:
            check_weights(self.weights, live, self.names)
            self.tally.parts_known = True

    def take_metrics(self) -> dict[str, float]:
        """`void/<reason>` of the samples since the last call; the same on every rank."""
        counts = sum((part.counts for part in self.tally.known), Counter())
        self.tally.known.clear()
        self.tally.scored = 0
        return self.tally.by_metric(counts)

    def by_model(self, groups: Sequence[Group]) -> list[Group]:
        """On all ranks, for the same groups: with the model's rewards; unchanged where there is no model.

        The score of a sample is that of its last token but padding, as transformers' classifiers take it,
        over the ids that were sampled, not over their text. Collective. Raises RewardError for a score that
        is no number.
        """
        if self.model is None:
            return list(groups)
        with self.residency.during("rewards"):
            return self._with_scores_of(self.model, groups)

    def _with_scores_of(self, model: Model, groups: Sequence[Group]) -> list[Group]:
        samples = [sample for group in groups for sample in group.samples]
        scores = scores_of(model, samples, self.shape)
        for sample, score in zip(samples, scores, strict=True):
            if not isfinite(score):
                raise RewardError(
                    f"reward.model: {model.source} gives {score} to sample {sample.id}; its weights are "
                    "damaged, or it overflows in model.precision"
                ).on_every_rank()
        judged = iter([replace(s, reward=score) for s, score in zip(samples, scores, strict=True)])
        return [replace(group, samples=tuple(islice(judged, len(group.samples)))) for group in groups]


def scores_of(model: Model, samples: Sequence[Sample], shape: Batching) -> list[float]:
    """[N] what a reward model says of samples, each up to its last token but padding; collective."""
    pad = read_hf_config(model.source).get("pad_token_id")
    # What is scored is the state before a row's token: one more token, of any id, has the whole sample.
    whole = [TokenSequence(up_to_padding(whole_sequence(s), pad), (0,)) for s in samples]
    return [float(score[0]) for score in values(model, whole, shape)] if whole else []


def check_weights(weights: Mapping[str, float], samples: Sequence[Sample], names: Collection[str]) -> None:
    """Whether every weight is of a part of these samples; every rank calls it with the same.

    Args:
        names: of the functions, where there are several. One that is for none of these prompts may have any
            part: `NAME/part`.

    Raises:
        ConfigError: on every rank.
    """
    known = {part.name for sample in samples for part in sample.parts}
    silent = set(names) - {name.partition("/")[0] for name in known}
    absent = [name for name in weights if name not in known and name.partition("/")[0] not in silent]
    if absent:
        parts = f"the parts are {joined(sorted(known))}" if known else "the reward has no parts"
        raise ConfigError(
            f"reward.weights: no sample of the first step has a part {short(absent[0])}, whose weight would "
            f"have no effect; {parts}: correct the name, or return the part for every sample (0 where it "
            "means nothing)"
        ).on_every_rank()


def up_to_padding(ids: list[int], pad: int | None) -> list[int]:
    """The ids less the padding at their end, where no classifier learnt to score."""
    end = len(ids)
    while end > 1 and ids[end - 1] == pad:
        end -= 1
    return ids[:end]
