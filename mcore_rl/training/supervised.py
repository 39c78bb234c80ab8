"""Supervised training on the same stack: prompt -> label, token-mean negative log-likelihood."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import cast

import torch
from torch import Tensor

from mcore_rl.algo.losses import weighted_sum
from mcore_rl.algo.metrics import Key, Mean, check_surprise, gradient_scale, gradient_scale_sums
from mcore_rl.algo.preference import sft
from mcore_rl.config import Config
from mcore_rl.data.packing import TokenSequence
from mcore_rl.model.residency import Residency
from mcore_rl.parallel.head import HeadOutput
from mcore_rl.training.assemble_rollouts import evaluating
from mcore_rl.training.batch import pack_share
from mcore_rl.training.checkpoint import Contents, end_step, restore
from mcore_rl.training.data import data_metrics, response_of
from mcore_rl.training.evaluation_sets import load_set_functions
from mcore_rl.training.faults.dump import keep_broken
from mcore_rl.training.held_out_loss import LabelLoss
from mcore_rl.training.metrics import Gathered, HeadGradient, LossTotal, read, work_of
from mcore_rl.training.model_passes import Update, run_update
from mcore_rl.training.objective import Parts
from mcore_rl.training.setup import offloaded_optimizers, start_trainer
from mcore_rl.training.trainer import Trainer
from mcore_rl.types import PackedBatch, Prompt
from mcore_rl.weights.disk import export

HEAD = Key("head", HeadGradient(None))


def train_supervised(config: Config, resume: str | None = None) -> None:
    """Train for `train.steps` batches of `supervised.batch_size` and export the model to RUN_DIR/model.

    Held-out sets are evaluated as in reinforcement learning, by servers that the policy is published to, and
    by the loss on their labels.
    """
    load_set_functions(config)
    with (
        start_trainer(config, optimizer_steps=config.train.steps, resume=resume) as trainer,
        ExitStack() as stack,
    ):
        contents = Contents({"": trainer.optimizer}, {}, {"cursor": trainer.cursor})
        restore(trainer, contents)
        residency = Residency(offloaded_optimizers(config, contents.optimizers))
        longest = min(limit.tokens for limit in response_of(config).limits)
        end = cast(int, trainer.tokenizer.eos_token_id)
        loss = LabelLoss(trainer.policy, trainer.shape, trainer.tokenizer, end, longest)
        evaluate = stack.enter_context(evaluating(trainer, loss))
        counted = data_metrics("train", trainer.prompts)
        if trainer.attempt.step == 0 and config.held_out:
            trainer.log(0, counted | evaluate(0))
        for step in range(trainer.attempt.step + 1, config.train.steps + 1):
            with trainer.timers("train"):
                prompts = trainer.cursor.next(config.supervised.batch_size)
                trainer.cursor.keep(())
                rate = trainer.optimizer.learning_rate
                sequences = [labelled(trainer.tokenizer, prompt) for prompt in prompts]
                metrics = train_step(trainer, residency, prompts, sequences, step)
            logged = {**metrics, "lr/policy": rate, **(counted if step == 1 else {}), **evaluate(step)}
            trainer.log(step, logged, work_of(sequences, trainer.shape))
            end_step(trainer, contents, residency, step)
        export(trainer.policy, config.run.dir / "model", kind="model")


def train_step(
    trainer: Trainer,
    residency: Residency,
    prompts: Sequence[Prompt],
    sequences: Sequence[TokenSequence],
    step: int,
) -> dict[str, float]:
    """One optimizer step on `sequences`, one of each prompt, with the mean over all replicas' label tokens.

    Raises:
        NumericsError: the head breaks a bound that holds for every batch (algo.metrics), or the gradient
            is not finite.
    """
    mesh = trainer.mesh
    tokens = sum(sequence.scored for sequence in sequences)
    fields = {"weight": [1.0 / tokens] * len(sequences), "sample": range(len(sequences))}
    update = Update(
        kind="supervised",
        step=step,
        optimizer=trainer.optimizer,
        objective=NegativeLogLikelihood(),
        batches=pack_share(sequences, fields, trainer.shape, mesh),
        temperature=1.0,
        ids=[prompt.id for prompt in prompts],
    )
    explain = partial(keep_broken, trainer.config, trainer.shape.align)
    sums, norm = run_update(update, residency, explain)
    totals = Gathered(sums).reduce(mesh)
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
        metrics = {"loss/policy": LossTotal(weighted), "entropy": Mean(head.entropy)}
        everything = torch.ones_like(loss, dtype=torch.bool)
        parts = {Key(name, metric.kind): metric.part(everything) for name, metric in metrics.items()}
        return weighted_sum(loss, batch.fields["weight"]), {**parts, HEAD: scale}


def labelled(tokenizer, prompt: Prompt) -> TokenSequence:
    """The prompt and its label, of which the label is trained."""
    return TokenSequence(prompt.token_ids, label_tokens(tokenizer, prompt))


def label_tokens(tokenizer, prompt: Prompt) -> list[int]:
    """The label as the model should answer it, ended by the end-of-sequence token."""
    return [*tokenizer.encode(prompt.label_text, add_special_tokens=False), tokenizer.eos_token_id]
