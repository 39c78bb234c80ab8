"""Losses of whole sequences: pairs of answers and single verdicts, in units that carry their weights.

Legend: B sequences of a micro-batch, U units (pairs, or single sequences).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mcore_rl.algo import preference
from mcore_rl.algo.metrics import Mean, Metric


@dataclass(frozen=True)
class Sequences:
    """The whole sequences of one micro-batch, over all ranks that share them; float64."""

    value: Tensor
    """[B] sum of the log-probs of the trained tokens, or a model's score"""
    tokens: Tensor
    """[B] trained tokens; 0 of a sequence that is padding alone"""
    fields: Mapping[str, Tensor]
    """name -> [B] what every trained token of the sequence was given alike"""

    def pairs(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """[B] -> chosen and rejected [U]: a pair is two sequences, one behind the other."""
        pairs = values[: len(values) // 2 * 2].view(-1, 2)
        return pairs[:, 0], pairs[:, 1]


@dataclass(frozen=True)
class SequenceLoss:
    """What a loss of whole sequences answers."""

    weighted: Tensor
    """[U] weight * loss; the weights carry the global number of units"""
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    """name -> values of [U]"""


OfSequences = Callable[[Sequences], SequenceLoss]


@dataclass(frozen=True)
class PairLoss:
    """A preference loss of pairs: DPO, cDPO (with label_smoothing), rDPO, IPO or ORPO; see algo.preference.

    Fields of a sequence: `weight` (1 / pairs of the step), `reference` (mean log-prob of the reference) but
    for ORPO, and for that `token_weight` (1 / chosen tokens of the step).
    """

    name: str
    beta: float = 0.1
    """of IPO, tau; of ORPO, the weight of the odds ratio"""
    label_smoothing: float = 0.0
    average: bool = False
    """IPO of means over tokens, in the place of sums"""
    rounding: float = 1e-6
    """A margin of at most this share of its four log-probs is their rounding, a draw. This is float32's, and
    a hundred times what was seen."""

    @property
    def needs_reference(self) -> bool:
        """Whether a frozen reference is compared with."""
        return self.name != "orpo"

    def __call__(self, sequences: Sequences) -> SequenceLoss:
        """The loss of every pair of a micro-batch."""
        if self.name == "orpo":
            return self._odds_ratio(sequences)
        tokens = sequences.tokens.clamp(min=1)
        reference = sequences.fields["reference"] * tokens
        scale = tokens if self.average else torch.ones_like(tokens)
        chosen, rejected = sequences.pairs(sequences.value / scale)
        ref_chosen, ref_rejected = sequences.pairs(reference / scale)
        margins = preference.margin(chosen, rejected, ref_chosen, ref_rejected)
        weight = sequences.pairs(sequences.fields["weight"])[0]
        rewards = (self.beta * (chosen - ref_chosen), self.beta * (rejected - ref_rejected))
        size = chosen.abs() + rejected.abs() + ref_chosen.abs() + ref_rejected.abs()
        ahead = margins.where(margins.abs() > self.rounding * size, 0)
        return SequenceLoss(weight * self._of_margins(margins), _of_pairs(sequences, ahead, *rewards))

    def _of_margins(self, margins: Tensor) -> Tensor:
        match self.name:
            case "dpo":
                return preference.dpo(margins, beta=self.beta, label_smoothing=self.label_smoothing)
            case "rdpo":
                return preference.robust_dpo(margins, beta=self.beta, label_smoothing=self.label_smoothing)
            case "ipo":
                return preference.ipo(margins, tau=self.beta)
        raise ValueError(f"unknown loss of pairs {self.name!r}")

    def _odds_ratio(self, sequences: Sequences) -> SequenceLoss:
        tokens = sequences.tokens.clamp(min=1)
        chosen, rejected = sequences.pairs(sequences.value / tokens)
        weight, token_weight = (
            sequences.pairs(sequences.fields[name])[0] for name in ("weight", "token_weight")
        )
        odds = preference.orpo_odds(chosen, rejected, weight=self.beta)
        likelihood = token_weight * preference.sft(sequences.pairs(sequences.value)[0])
        rewards = (self.beta * chosen, self.beta * rejected)
        return SequenceLoss(weight * odds + likelihood, _of_pairs(sequences, chosen - rejected, *rewards))


@dataclass(frozen=True)
class VerdictLoss:
    """KTO, arXiv 2402.01306: single answers that were found desirable or not.

    Fields of a sequence: `weight` (1 / answers of the step), `reference` (mean log-prob of the reference),
    `desirable`, and `reference_point`: the mean log-ratio of the step's mismatched prompts and answers.
    """

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    needs_reference = True

    def __call__(self, sequences: Sequences) -> SequenceLoss:
        """The loss of every answer of a micro-batch."""
        fields = sequences.fields
        log_ratio = sequences.value - fields["reference"] * sequences.tokens
        desirable, real = fields["desirable"] > 0.5, sequences.tokens > 0
        loss = preference.kto(
            log_ratio,
            desirable,
            fields["reference_point"].max(),  # the same of all but padding, which has 0, and below 0 it is 0
            beta=self.beta,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
        )
        reward = self.beta * log_ratio
        metrics = {
            "preference/chosen": Mean(reward, desirable & real),
            "preference/rejected": Mean(reward, ~desirable & real),
            "preference/reference_point": Mean(fields["reference_point"], real),
        }
        return SequenceLoss(fields["weight"] * loss, metrics)


@dataclass(frozen=True)
class ScoreLoss:
    """A reward model's loss of pairs: Bradley-Terry with margin and centring; `value` is the score.

    Fields of a sequence: `weight` (1 / pairs of the step) and `margin`.
    """

    center_coef: float = 0.0

    def __call__(self, sequences: Sequences) -> SequenceLoss:
        """The loss of every pair of a micro-batch."""
        chosen, rejected = sequences.pairs(sequences.value)
        weight, margin = (sequences.pairs(sequences.fields[name])[0] for name in ("weight", "margin"))
        loss = preference.bradley_terry(chosen, rejected, margin, center_coef=self.center_coef)
        difference = chosen - rejected
        # what Bradley-Terry says of the chosen answer: its mean is the accuracy where it is calibrated
        metrics = {
            "preference/accuracy": _share_above(difference),
            "preference/margin": Mean(difference),
            "preference/chosen": Mean(chosen),
            "preference/rejected": Mean(rejected),
            "preference/confidence": Mean(torch.sigmoid(difference.abs())),
        }
        return SequenceLoss(weight * loss, metrics)


def _of_pairs(sequences: Sequences, margins: Tensor, chosen: Tensor, rejected: Tensor) -> dict[str, Metric]:
    log_probs = sequences.pairs(sequences.value)
    return {
        "preference/accuracy": _share_above(margins),
        "preference/margin": Mean(chosen - rejected),
        "preference/chosen": Mean(chosen),
        "preference/rejected": Mean(rejected),
        "preference/chosen_log_prob": Mean(log_probs[0]),
        "preference/rejected_log_prob": Mean(log_probs[1]),
    }


def _share_above(margins: Tensor) -> Metric:
    """The share of the pairs whose chosen answer is ahead; a draw is half of one."""
    return Mean((margins > 0).double() + (margins == 0).double() / 2)
