"""The recorded problem of training without rollouts: conversations, pairs of answers and verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mcore_rl.algo.distillation import ForwardKL, JensenShannon, ReverseKL
from mcore_rl.algo.sequences import PairLoss, ScoreLoss, VerdictLoss
from mcore_rl.data.examples import Example
from mcore_rl.data.packing import TokenSequence
from mcore_rl.model.residency import Residency
from mcore_rl.model.step import Loss
from mcore_rl.parallel.head.divergence import Against, Divergence
from mcore_rl.parallel.mesh import Mesh
from mcore_rl.training import reward_model
from mcore_rl.training.batch import Batching, pack_share
from mcore_rl.training.distill import Comparison
from mcore_rl.training.preference import constants
from mcore_rl.training.sequence_objective import SequenceObjective
from mcore_rl.training.session import sequences_of
from mcore_rl.training.supervised import NegativeLogLikelihood
from mcore_rl.training.teachers import Teachers
from mcore_rl.types import PackedBatch
from mcore_rl.verify.layouts.problem import TEMPERATURE, VOCAB, filled

LOSSES: Mapping[str, PairLoss | VerdictLoss | ScoreLoss | None] = {
    "sft": None,
    "dpo": PairLoss("dpo", label_smoothing=0.1),
    "rdpo": PairLoss("rdpo", label_smoothing=0.1),
    "ipo": PairLoss("ipo", average=True),
    "orpo": PairLoss("orpo"),
    "kto": VerdictLoss(undesirable_weight=1.5),
    "reward_model": ScoreLoss(center_coef=0.01),
}
"""what a kind of training without rollouts is verified by; None: the likelihood of what is trained"""
DIVERGENCES: Mapping[str, Divergence | None] = {
    "forward_kl": ForwardKL(),
    "reverse_kl": ReverseKL(),
    "jsd": JensenShannon(0.3),
    "sampled_kl": None,
}
"""what distillation is verified by; None: the reverse KL at the tokens of the rows"""
ROWS = 12
TOKENS_PER_MICRO_BATCH = 64
"""fewer than of rollouts, which are more: two replicas have two micro-batches each here too"""
SCALE = {"ipo": 0.05, "reward_model": 0.5}
"""of losses that are steep: plain SGD with problem.SGD_LEARNING_RATE would leave all bounds"""
USUAL_SCALE = 8.0
"""The loss is so many times larger than in a run, so that plain SGD moves the weights enough to compare."""


@dataclass(frozen=True)
class RecordedRows:
    """What one kind trains on, and by."""

    loss: Loss
    batches: Sequence[PackedBatch]
    """this replica's micro-batches"""
    against: Sequence[Against | None] = ()
    """what a student is compared with in each of them"""


def record_distillation(name: str, teachers: Teachers, shape: Batching, mesh: Mesh) -> RecordedRows:
    """The recorded rows of distillation by `name`, packed for this replica, each with one of the teachers."""
    rows = [
        replace(row, metadata={teachers.key: list(teachers.models)[number % 3 == 0]})
        for number, row in enumerate(recorded_rows("sft"))
    ]
    shape = replace(shape, tokens_per_micro_batch=filled(TOKENS_PER_MICRO_BATCH, mesh.layout))
    comparison = Comparison(teachers, DIVERGENCES[name], shape, TEMPERATURE, Residency({}))
    compared = comparison.of(rows, mesh)
    return RecordedRows(comparison.objective, compared.batches, compared.against)


def record_rows(name: str, shape: Batching, mesh: Mesh) -> RecordedRows:
    """The recorded rows of the kind `name`, packed for this replica."""
    loss, rows = LOSSES[name], recorded_rows(name)
    shape = replace(shape, tokens_per_micro_batch=filled(TOKENS_PER_MICRO_BATCH, mesh.layout))
    sequences = sequences_of(rows)
    if loss is None:
        weight = 1.0 / sum(row.tokens for row in rows)
        fields = {"weight": [weight] * len(sequences), "sample": range(len(sequences))}
        return RecordedRows(NegativeLogLikelihood(), pack_share(sequences, fields, shape, mesh))
    cp, scale = mesh.cp if mesh.layout.context > 1 else None, SCALE.get(name, USUAL_SCALE)
    if isinstance(loss, ScoreLoss):
        fields = scaled(reward_model.constants(rows), scale)
        packed = pack_share(reward_model.scored_sequences(rows, None), fields, shape, mesh, together=2)
        return RecordedRows(SequenceObjective(loss, cp, reward_model.TOTAL), packed)
    drawn = np.random.default_rng(22).standard_normal(len(sequences)) - np.log(VOCAB)
    fields = constants(loss, rows, drawn.tolist() if loss.needs_reference else (), point=0.3)
    packed = pack_share(sequences, scaled(fields, scale), shape, mesh, together=len(rows[0].sequences))
    return RecordedRows(SequenceObjective(loss, cp), packed)


def scaled(fields: Mapping[str, list[float]], scale: float) -> dict[str, list[float]]:
    """The fields, of which the weights are `scale` times what they are in a run."""
    return {key: [scale * x for x in its] if "weight" in key else its for key, its in fields.items()}


def recorded_rows(name: str) -> list[Example]:
    """Prompts of 1-9 tokens and answers of 1-14, some tokens of which are context alone."""
    rng = np.random.default_rng(21)
    answers = 2 if isinstance(LOSSES[name], PairLoss | ScoreLoss) else 1
    rows = []
    for number in range(ROWS):
        prompt = tuple(rng.integers(VOCAB, size=rng.integers(1, 10)).tolist())
        sequences = tuple(_answer(rng, prompt, every=number % 2 == 0) for _ in range(answers))
        verdict = {"margin": 0.1 * number, "desirable": number % 3 > 0}
        rows.append(Example(f"r{number}", "", prompt, "", sequences=sequences, **verdict))
    return rows


def _answer(rng: np.random.Generator, prompt: tuple[int, ...], *, every: bool) -> TokenSequence:
    length = int(rng.integers(1, 15))
    trained = None if every else rng.random(length) < 0.6
    if trained is not None:
        trained[-1] = True
    return TokenSequence(prompt, rng.integers(VOCAB, size=length).tolist(), trained)
