"""Supervised training on the same stack: prompt -> label, token-mean negative log-likelihood."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mcore_rl.algo.aggregation import weighted_sum
from mcore_rl.algo.diagnostics import check_surprise, gradient_scale, gradient_scale_sums
from mcore_rl.algo.metrics import Key, Mean, Total
from mcore_rl.algo.preference import sft
from mcore_rl.config import Config
from mcore_rl.data.packing import TokenSequence
from mcore_rl.parallel.head import HeadOutput
from mcore_rl.train.batch import pack_share
from mcore_rl.train.checkpoint import end_step, restore
from mcore_rl.train.metrics import Gathered, HeadGradient, read
from mcore_rl.train.objective import Parts
from mcore_rl.train.setup import Trainer, offload_optimizers, start_trainer
from mcore_rl.train.update import Update, run_update
from mcore_rl.types import PackedBatch, Prompt
from mcore_rl.weights.disk import export

HEAD = Key("head", HeadGradient(None))


def train_supervised(config: Config, resume: str | None = None) -> None:
    """Train for `train.steps` batches of `supervised.batch_size` and export the model to RUN_DIR/model."""
    with start_trainer(config, optimizer_steps=config.train.steps, resume=resume) as run:
        restore(run)
        offload_optimizers(run)
        for step in range(run.step + 1, config.train.steps + 1):
            with run.timers("train"):
                metrics = train_step(run, run.cursor.next(config.supervised.batch_size), step)
            run.log(step, metrics | (run.counted if step == 1 else {}))
            end_step(run, step)
        export(run.policy, config.run.dir / "model")


def train_step(run: Trainer, prompts: Sequence[Prompt], step: int) -> dict[str, float]:
    """One optimizer step on whole sequences; the loss is the mean over the label tokens of all replicas.

    Raises:
        NumericsError: the head breaks a bound that holds for every batch (algo.diagnostics), or the gradient
            is not finite.
    """
    sequences = [TokenSequence(prompt.token_ids, label_tokens(run.tokenizer, prompt)) for prompt in prompts]
    tokens = sum(sequence.scored for sequence in sequences)
    fields = {"weight": [1.0 / tokens] * len(sequences), "sample": range(len(sequences))}
    batches = pack_share(sequences, fields, run.shape, run.mesh)
    objective, ids = NegativeLogLikelihood(), [prompt.id for prompt in prompts]
    sums, norm = run_update(run, Update("supervised", step, run.optimizer, objective, batches, 1.0, ids))
    totals = Gathered(sums).reduce(run.mesh)
    check_surprise(gradient_scale(totals[HEAD]))
    metrics = read(totals, updates=1)
    return {
        **metrics,
        "perplexity": math.exp(min(metrics["loss/policy"], 50.0)),
        "grad_norm": norm,
        "tokens": tokens,
    }


class NegativeLogLikelihood:
    """Called by model.step for every micro-batch; see `Loss` there."""

    def rowwise(self, batch: PackedBatch) -> bool:
        """Always."""
        return True

    def __call__(self, batch: PackedBatch, head: HeadOutput) -> tuple[Tensor, Parts]:
        """Return the sum of -weight * log p over this rank's rows; weight = 1 / tokens of the whole step."""
        loss = sft(head.log_prob)
        weighted = batch.fields["weight"] * loss.detach()
        one = torch.ones_like(loss)
        scale = gradient_scale_sums(head.log_prob, head.entropy, one, -one)
        metrics = {"loss/policy": Total(weighted), "entropy": Mean(head.entropy)}
        everything = torch.ones_like(loss, dtype=torch.bool)
        parts = {Key(name, metric.kind): metric.part(everything) for name, metric in metrics.items()}
        return weighted_sum(loss, batch.fields["weight"]), {**parts, HEAD: scale}


def label_tokens(tokenizer, prompt: Prompt) -> list[int]:
    """The label as the model should answer it, ended by the end-of-sequence token."""
    return [*tokenizer.encode(prompt.label, add_special_tokens=False), tokenizer.eos_token_id]
