"""Training of a reward model on pairs: Bradley-Terry with margin and centring, a score at the last token."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from mcore_rl.algo.sequences import ScoreLoss
from mcore_rl.config import Config
from mcore_rl.data.examples import Example
from mcore_rl.data.packing import TokenSequence
from mcore_rl.model.build import Model
from mcore_rl.model.hf.architecture import read_hf_config
from mcore_rl.model.optimizer import Optimizer
from mcore_rl.training.batch import Batching, pack_share
from mcore_rl.training.metrics import read
from mcore_rl.training.model_passes import Update, values
from mcore_rl.training.rewards import up_to_padding
from mcore_rl.training.sequence_objective import SequenceObjective, measured, parts_of
from mcore_rl.training.session import Metrics, sequences_of, start_model, start_session

TOTAL = "loss/reward_model"


def train_reward_model(config: Config, resume: str | None = None) -> None:
    """Train for `train.steps` batches of `supervised.batch_size` pairs, from the policy's weights.

    RUN_DIR/model is a sequence classifier of transformers with one label, which `reward.model` reads.
    """
    loss = ScoreLoss(config.reward_model.center_coef)
    with start_model(config, resume) as trainer, start_session(trainer) as session:
        pad = read_hf_config(config.model.path).get("pad_token_id")
        validate = partial(validate_reward_model, trainer.policy, trainer.shape, loss, pad)
        for step in session.steps(validate):
            with trainer.timers("train"):
                rows = session.next_batch()
                update = reward_model_update(trainer.optimizer, trainer.shape, loss, pad, rows, step)
                totals, optimized = session.optimize(update)
            session.log(step, rows, read(totals, updates=1) | optimized, validate)
        session.export()


def reward_model_update(
    optimizer: Optimizer,
    shape: Batching,
    loss: ScoreLoss,
    pad: int | None,
    rows: Sequence[Example],
    step: int,
) -> Update:
    """One optimizer step on `rows`; a pair stays in one micro-batch.

    Args:
        pad: the token that a classifier takes for padding at the end of a sequence.
    """
    mesh, fields = optimizer.model.mesh, constants(rows)
    numbered = {**fields, "sample": [i // 2 for i in range(2 * len(rows))]}
    return Update(
        kind="reward_model",
        step=step,
        optimizer=optimizer,
        objective=SequenceObjective(loss, mesh.cp if mesh.layout.context > 1 else None, TOTAL),
        batches=pack_share(scored_sequences(rows, pad), numbered, shape, mesh, together=2),
        temperature=1.0,
        ids=[row.id for row in rows],
    )


def constants(rows: Sequence[Example]) -> dict[str, list[float]]:
    """The fields of every sequence: the weight with the global number of pairs, and the margin."""
    margins = [row.margin for row in rows for _ in row.sequences]
    return {"weight": [1.0 / len(rows)] * len(margins), "margin": margins}


def scored_sequences(rows: Sequence[Example], pad: int | None) -> list[TokenSequence]:
    """Whole sequences, of each of which one row is scored: the state that has seen all but padding."""
    whole = ([*sequence.prompt, *sequence.response] for sequence in sequences_of(rows))
    return [TokenSequence(up_to_padding(ids, pad), (0,)) for ids in whole]


def validate_reward_model(
    model: Model, shape: Batching, loss: ScoreLoss, pad: int | None, rows: Sequence[Example]
) -> Metrics:
    """The loss, the accuracy and the calibration on held-out pairs; collective."""
    scores = [float(one[0]) for one in values(model, scored_sequences(rows, pad), shape)]
    found = measured(loss, scores, [1] * len(scores), constants(rows))
    metrics = read(parts_of(found, "loss", torch.ones_like(found.weighted, dtype=torch.bool)), updates=1)
    return {f"validation/{name.removeprefix('preference/')}": value for name, value in metrics.items()}
