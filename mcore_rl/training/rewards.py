"""Who gives the rewards of a run: a function of each sample, or a reward model on the training ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from math import isfinite

from mcore_rl.data.packing import TokenSequence
from mcore_rl.errors import RewardError
from mcore_rl.model.build import Model
from mcore_rl.model.hf.architecture import read_hf_config
from mcore_rl.model.residency import Residency
from mcore_rl.rewards import RewardFn, score_groups
from mcore_rl.training.batch import Shape, whole_sequence
from mcore_rl.training.forward_only import values
from mcore_rl.types import Group


@dataclass(frozen=True)
class RewardSource:
    """What gives the rewards: `model` where there is one, else `function`."""

    function: RewardFn
    weights: Mapping[str, float]
    """name -> weight of each part that the function returns"""
    model: Model | None
    shape: Shape
    """how the model's micro-batches are made"""
    residency: Residency
    """where the model is outside its phase"""

    def by_function(self, groups: Sequence[Group]) -> list[Group]:
        """On a lead: the groups with rewards; unchanged where a model gives them. Raises RewardError."""
        return list(groups) if self.model else score_groups(groups, self.function, self.weights)

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
