"""Supervised training: the mean negative log-likelihood of a label, or of what an assistant said."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from mcore_rl.algo.losses import weighted_sum
from mcore_rl.algo.metrics import Key, Mean, check_surprise, gradient_scale, gradient_scale_sums, parts_of
from mcore_rl.algo.preference import sft
from mcore_rl.config import Config
from mcore_rl.data.examples import Example
from mcore_rl.model.build import Model
from mcore_rl.model.optimizer import Optimizer
from mcore_rl.parallel.head import HeadOutput
from mcore_rl.training.batch import Batching, pack_share
from mcore_rl.training.metrics import HeadGradient, LossTotal, read
from mcore_rl.training.model_passes import Update, log_probs
from mcore_rl.training.objective import Parts
from mcore_rl.training.session import Metrics, sequences_of, start_model, start_session
from mcore_rl.types import PackedBatch

HEAD = Key("head", HeadGradient(None))


def train_supervised(config: Config, resume: str | None = None) -> None:
    """Train for `train.steps` batches of `supervised.batch_size` and export the model to RUN_DIR/model.

    Held-out sets are evaluated as in reinforcement learning, by servers that the policy is published to; of
    the rows of data.validation the loss is measured.
    """
    with start_model(config, resume) as trainer, start_session(trainer) as session:
        validate = partial(validate_supervised, trainer.policy, trainer.shape)
        for step in session.steps(validate):
            with trainer.timers("train"):
                rows = session.next_batch()
                update = supervised_update(trainer.optimizer, trainer.shape, rows, step)
                totals, optimized = session.optimize(update)
            session.log(step, rows, supervised_metrics(totals, rows) | optimized, validate)
        session.export()


def supervised_update(optimizer: Optimizer, shape: Batching, rows: Sequence[Example], step: int) -> Update:
    """One optimizer step on `rows`, with the mean over all replicas' trained tokens."""
    sequences, tokens = sequences_of(rows), sum(row.tokens for row in rows)
    fields = {"weight": [1.0 / tokens] * len(sequences), "sample": range(len(sequences))}
    return Update(
        kind="supervised",
        step=step,
        optimizer=optimizer,
        objective=NegativeLogLikelihood(),
        batches=pack_share(sequences, fields, shape, optimizer.model.mesh),
        temperature=1.0,
        ids=[row.id for row in rows],
    )


def supervised_metrics(totals: Mapping[Key, Tensor], rows: Sequence[Example]) -> Metrics:
    """What the objective's sums over `rows` say.

    Raises:
        NumericsError: the head breaks a bound that holds for every batch (algo.metrics.check_surprise).
    """
    check_surprise(gradient_scale(totals[HEAD]))
    metrics = read(totals, updates=1)
    tokens = sum(row.tokens for row in rows)
    return {**metrics, "perplexity": perplexity(metrics["loss/policy"]), "tokens": tokens}


def validate_supervised(policy: Model, shape: Batching, rows: Sequence[Example]) -> Metrics:
    """The mean over the trained tokens of held-out rows; collective."""
    scored = log_probs(policy, sequences_of(rows), shape, 1.0)
    loss = -sum(float(one.sum(dtype="float64")) for one in scored) / sum(map(len, scored))
    return {"validation/loss": loss, "validation/perplexity": perplexity(loss)}


def perplexity(loss: float) -> float:
    """exp(loss), of a loss in nats per token."""
    return math.exp(min(loss, 50.0))


class NegativeLogLikelihood:
    """Called by model.step for every micro-batch; see `Loss` there."""

    def rowwise(self, batch: PackedBatch) -> bool:
        """Always."""
        return True

    def __call__(self, batch: PackedBatch, head: HeadOutput) -> tuple[Tensor, Callable[[], Parts]]:
        """Return the sum of -weight * log p over this rank's rows; weight = 1 / tokens of the whole step."""
        loss = sft(head.log_prob)

        def measure() -> Parts:
            weighted = batch.fields["weight"] * loss.detach()
            one = torch.ones_like(loss)
            scale = gradient_scale_sums(head.log_prob, head.entropy, one, -one)
            metrics = {"loss/policy": LossTotal(weighted), "entropy": Mean(head.entropy)}
            everything = torch.ones_like(loss, dtype=torch.bool)
            return {**parts_of(metrics, everything, everything), HEAD: scale}

        return weighted_sum(loss, batch.fields["weight"]), measure
