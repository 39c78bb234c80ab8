"""Who gives the rewards of a run: a function of each sample, or a reward model on the training ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from math import isfinite

from mcore_rl.data.packing import TokenSequence
from mcore_rl.errors import RewardError
from mcore_rl.model.build import Model
from mcore_rl.model.hf.architecture import read_hf_config
from mcore_rl.model.residency import Residency
from mcore_rl.parallel.control import gather_replicas, on_leads
from mcore_rl.parallel.mesh import Mesh
from mcore_rl.rewards import RewardPool, check_rate
from mcore_rl.rewards.pool import Reasons
from mcore_rl.training.batch import Shape, whole_sequence
from mcore_rl.training.model_passes import values
from mcore_rl.types import Group


@dataclass
class Tally:
    """What became of the samples since the last record of metrics."""

    scored: int = 0
    reasons: list[Reasons] = field(default_factory=list)
    """why samples are void: of this lead, not yet known to the others"""
    known: list[Reasons] = field(default_factory=list)
    """of all leads"""


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
    shape: Shape
    """how the model's micro-batches are made"""
    residency: Residency
    """where the model is outside its phase"""
    tally: Tally = field(default_factory=Tally)

    def by_function(self, groups: Sequence[Group]) -> list[Group]:
        """On a lead: the groups with rewards; unchanged where a model gives them.

        A sample that the function gave no reward is void. Raises RewardError, ConfigError: see RewardPool.
        """
        if self.model is not None:
            return list(groups)
        scored, reasons = self.pool.score(groups)
        self.tally.reasons.append(reasons)
        return scored

    def complete(self, groups: Sequence[Group]) -> list[Group]:
        """On all ranks, for the same groups: `by_model`, and whether too few have a reward. Collective.

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

    def take_metrics(self) -> dict[str, float]:
        """`void/<reason>` of the samples since the last call; the same on every rank."""
        counts = sum((part.counts for part in self.tally.known), Counter())
        self.tally.known.clear()
        self.tally.scored = 0
        return {f"void/{reason}": float(count) for reason, count in counts.items()}

    def by_model(self, groups: Sequence[Group]) -> list[Group]:
        """On all ranks, for the same groups: with the model's rewards; unchanged where there is no model.

        The score of a sample is that of its last token but padding, as transformers' classifiers take it,
        over the ids that were sampled, not over their text. Collective. Raises RewardError for a score that
        is no number.
        """
        if self.model is None:
            return list(groups)
        with self.residency.during("rewards"):
            return self._scored(self.model, groups)

    def _scored(self, model: Model, groups: Sequence[Group]) -> list[Group]:
        samples = [sample for group in groups for sample in group.samples]
        pad = read_hf_config(model.source).get("pad_token_id")
        # What is scored is the state before a row's token: one more token, of any id, has the whole sample.
        whole = [TokenSequence(_up_to_padding(whole_sequence(s), pad), (0,)) for s in samples]
        scores = [float(score[0]) for score in values(model, whole, self.shape)] if whole else []
        for sample, score in zip(samples, scores, strict=True):
            if not isfinite(score):
                raise RewardError(
                    f"reward.model: {model.source} gives {score} to sample {sample.id}; its weights are "
                    "damaged, or it overflows in model.precision"
                ).on_every_rank()
        judged = iter([replace(s, reward=score) for s, score in zip(samples, scores, strict=True)])
        return [replace(group, samples=tuple(islice(judged, len(group.samples)))) for group in groups]


def _up_to_padding(ids: list[int], pad: int | None) -> list[int]:
    """The ids less the padding at their end, where no classifier learnt to score."""
    end = len(ids)
    while end > 1 and ids[end - 1] == pad:
        end -= 1
    return ids[:end]
