"""Preference training: DPO and its kin on pairs of answers, KTO on verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch

from mcore_rl.algo.sequences import PairLoss, VerdictLoss
from mcore_rl.config import Config
from mcore_rl.data.examples import Example
from mcore_rl.data.packing import TokenSequence
from mcore_rl.errors import DataError
from mcore_rl.model.build import Model
from mcore_rl.model.optimizer import Optimizer
from mcore_rl.model.residency import Residency
from mcore_rl.training.batch import Batching, pack_share
from mcore_rl.training.data import response_of
from mcore_rl.training.metrics import read
from mcore_rl.training.model_passes import Update
from mcore_rl.training.reference import ReferencePolicy, means_of, start_reference, without_adapters
from mcore_rl.training.sequence_objective import SequenceObjective, measured, parts_of
from mcore_rl.training.session import (
    Metrics,
    sequences_of,
    start_model,
    start_session,
    validation_rows,
)

_REDUCED = 2.5e-4
"""PairLoss.rounding where layers compute in bfloat16, of which a micro-batch packed otherwise changes some"""


def train_preference(config: Config, resume: str | None = None) -> None:
    """Train for `train.steps` batches of `supervised.batch_size` rows; the model goes to RUN_DIR/model."""
    with start_model(config, resume) as trainer:
        loss, held_out = loss_of(config), validation_rows(config, trainer.tokenizer)
        longest = min(limit.tokens for limit in response_of(config).limits)
        everything = all_sequences(loss, held_out, longest)
        with without_adapters(trainer.policy):
            known = means_of(trainer.policy, trainer.shape, everything) if held_out else []
        reference = None
        if loss.needs_reference:
            parts = (config, trainer.policy, trainer.shape, trainer.prompts, trainer.attempt.reached)
            reference = start_reference(*parts)
        extra = {} if reference is None else {"frozen": reference.frozen, "waiting": reference.waiting}
        with start_session(trainer, **extra, held_out=held_out) as session:
            validate = partial(validate_preference, trainer.policy, trainer.shape, loss, known, longest)
            for step in session.steps(validate):
                rows = session.next_batch()
                with trainer.timers("score"):
                    fields = score(loss, reference, session.residency, rows, longest)
                with trainer.timers("train"):
                    update = preference_update(trainer.optimizer, trainer.shape, loss, rows, fields, step)
                    totals, optimized = session.optimize(update)
                metrics = {**read(totals, updates=1), **optimized, "tokens": sum(row.tokens for row in rows)}
                session.log(step, rows, metrics, validate)
            session.export()


def loss_of(config: Config) -> PairLoss | VerdictLoss:
    """The loss that [preference] asks for."""
    p = config.preference
    if p.loss == "kto":
        return VerdictLoss(p.beta, p.desirable_weight, p.undesirable_weight)
    rounding = {"rounding": _REDUCED} if config.model.precision in ("bf16", "fp8") else {}
    return PairLoss(p.loss, p.beta, p.label_smoothing, p.average, **rounding)


def score(
    loss: PairLoss | VerdictLoss,
    reference: ReferencePolicy | None,
    residency: Residency,
    rows: Sequence[Example],
    longest: int,
) -> dict[str, list[float]]:
    """What the loss reads of every sequence, [sequences] each; collective.

    Args:
        longest: tokens of the longest sequence that the models and a micro-batch take.
    """
    if reference is None:
        return constants(loss, rows)
    if isinstance(loss, PairLoss):
        return constants(loss, rows, reference.of_rows(rows, residency))
    everything = all_sequences(loss, rows, longest)
    means = reference.of_sequences(everything, residency)
    point = reference_point(reference.policy, reference.shape, everything[len(rows) :], means[len(rows) :])
    return constants(loss, rows, means[: len(rows)], point)


def all_sequences(loss: PairLoss | VerdictLoss, rows: Sequence[Example], longest: int) -> list[TokenSequence]:
    """What the reference scores of rows: their sequences, and behind them KTO's mismatched ones."""
    own = sequences_of(rows)
    return own if isinstance(loss, PairLoss) else [*own, *mismatched(own, longest)]


def mismatched(own: Sequence[TokenSequence], longest: int) -> list[TokenSequence]:
    """Every prompt with the answer of the next one, of the last with that of the first.

    An answer ends where the sequence has `longest` tokens: the rows fit, the longest prompt with the longest
    answer may not. It keeps a token at least, as its prompt has room for an answer of its own.

    Raises:
        DataError: there is one row, which has no next one.
    """
    if len(own) == 1:  # a batch has two by the rules of the config
        raise DataError(
            "data.validation: one row, and kto asks of its prompt with the answer of another row; give two "
            "or more (train.eval_samples), or drop it"
        )
    return [
        _of_length(TokenSequence(one.prompt, other.response, other.loss_mask), longest)
        for one, other in zip(own, [*own[1:], *own[:1]], strict=True)
    ]


def _of_length(sequence: TokenSequence, longest: int) -> TokenSequence:
    if len(sequence) <= longest:
        return sequence
    room, mask = longest - len(sequence.prompt), sequence.loss_mask
    return TokenSequence(sequence.prompt, sequence.response[:room], None if mask is None else mask[:room])


def reference_point(
    model: Model, shape: Batching, others: Sequence[TokenSequence], reference: Sequence[float]
) -> float:
    """KTO's z0: the mean over mismatched sequences of log pi / pi_ref, of the whole batch; collective."""
    policy = means_of(model, shape, others)
    ratios = [(own - ref) * one.scored for own, ref, one in zip(policy, reference, others, strict=True)]
    return sum(ratios) / len(ratios)


def constants(
    loss: PairLoss | VerdictLoss,
    rows: Sequence[Example],
    reference: Sequence[float] = (),
    point: float = 0.0,
) -> dict[str, list[float]]:
    """The fields of every sequence: weights with the global counts, and what the reference says.

    Args:
        reference: mean log-prob of every sequence; none for a loss without a reference.
        point: KTO's z0.
    """
    sequences = sequences_of(rows)
    fields = {"weight": [1.0 / len(rows)] * len(sequences)}
    if loss.needs_reference:
        fields["reference"] = list(reference)
    else:
        tokens = sum(row.sequences[0].scored for row in rows)
        fields["token_weight"] = [1.0 / tokens] * len(sequences)
    if isinstance(loss, VerdictLoss):
        fields["desirable"] = [float(row.desirable) for row in rows]
        fields["reference_point"] = [point] * len(rows)
    return fields


def preference_update(
    optimizer: Optimizer,
    shape: Batching,
    loss: PairLoss | VerdictLoss,
    rows: Sequence[Example],
    fields: Mapping[str, Sequence[float]],
    step: int,
) -> Update:
    """One optimizer step on `rows`, whose `fields` are those of `score`; a pair stays in one micro-batch."""
    mesh, sequences, answers = optimizer.model.mesh, sequences_of(rows), len(rows[0].sequences)
    numbered = {**fields, "sample": [i // answers for i in range(len(sequences))]}
    return Update(
        kind="preference",
        step=step,
        optimizer=optimizer,
        objective=SequenceObjective(loss, mesh.cp if mesh.layout.context > 1 else None),
        batches=pack_share(sequences, numbered, shape, mesh, together=answers),
        temperature=1.0,
        ids=[row.id for row in rows],
    )


def validate_preference(
    policy: Model,
    shape: Batching,
    loss: PairLoss | VerdictLoss,
    known: Sequence[float],
    longest: int,
    rows: Sequence[Example],
) -> Metrics:
    """The loss and the metrics of held-out rows; collective.

    Args:
        known: what the reference says of `all_sequences` of them.
        longest: see `score`.
    """
    everything = all_sequences(loss, rows, longest)
    own = sequences_of(rows)
    means = means_of(policy, shape, own)
    point = 0.0
    if isinstance(loss, VerdictLoss):
        point = reference_point(policy, shape, everything[len(own) :], known[len(own) :])
    fields = constants(loss, rows, known[: len(own)], point)
    tokens = [sequence.scored for sequence in own]
    sums = [mean * count for mean, count in zip(means, tokens, strict=True)]
    found = measured(loss, sums, tokens, fields)
    every = torch.ones_like(found.weighted, dtype=torch.bool)
    metrics = read(parts_of(found, "loss", every), updates=1)
    return {f"validation/{name.removeprefix('preference/')}": value for name, value in metrics.items()}
