"""The critic's part of a step: what it says before the first update, and its own updates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mcore_rl.algo.algorithms import Algorithm
from mcore_rl.config import Config
from mcore_rl.config.sections import CriticConfig
from mcore_rl.data.packing import TokenSequence
from mcore_rl.model.build import Model
from mcore_rl.parallel.mesh import Mesh
from mcore_rl.training.batch import (
    Batching,
    PerSample,
    RolloutBatch,
    by_sample,
    pack_mini_batch,
    pack_share,
    split_mini_batches,
    token_sequences,
)
from mcore_rl.training.model_passes import Update, values
from mcore_rl.training.run import Critic
from mcore_rl.types import PackedBatch, Sample


def values_of(critic: Model, algorithm: Algorithm, batch: RolloutBatch, shape: Batching) -> list[np.ndarray]:
    """[N] of [m_i] values before each trained token, or of [1] of the prompt; collective.

    Its routers choose for themselves. With `bootstrap` a truncated sample has one more, that of the state
    behind its last token; see `split_following`.
    """
    if not algorithm.values_prompts:
        sequences = [replace(sequence, experts=None) for sequence in token_sequences(batch.samples)]
        if algorithm.bootstrap:
            sequences = _and_behind(sequences, batch.samples)
        return by_sample(values(critic, sequences, shape), batch.samples)
    groups = groups_of(batch)
    found = values(critic, [prompt_of(batch, members) for members in groups], shape)
    by_number = {i: value for value, members in zip(found, groups, strict=True) for i in members}
    return [by_number[i] for i in range(len(batch.samples))]


def _and_behind(sequences: Sequence[TokenSequence], samples: Sequence[Sample]) -> list[TokenSequence]:
    """The last sequence of each truncated sample has one more row, whose token, any at all, nobody reads."""
    found = list(sequences)
    for sample, end in zip(samples, np.cumsum([len(s.segments) for s in samples]).tolist(), strict=True):
        if sample.truncated:
            last = found[end - 1]
            mask = None if last.loss_mask is None else np.append(np.asarray(last.loss_mask), True)
            response = np.append(np.asarray(last.response, np.int32), np.int32(0))
            found[end - 1] = replace(last, response=response, loss_mask=mask)
    return found


def split_following(
    values: Sequence[np.ndarray], samples: Sequence[Sample]
) -> tuple[list[np.ndarray], list[float]]:
    """([N] of [m_i] values before each trained token, [N] the value behind the last, 0 where it ended)."""
    pairs = list(zip(values, samples, strict=True))
    return (
        [its[: sample.trained_tokens] for its, sample in pairs],
        [float(its[-1]) if sample.truncated else 0.0 for its, sample in pairs],
    )


def critic_updates(
    critic: Critic,
    config: Config,
    shape: Batching,
    algorithm: Algorithm,
    batch: RolloutBatch,
    fields: Mapping[str, Sequence[Any]],
    step: int,
) -> Iterator[Update]:
    """Its optimizer steps on a rollout: the policy's mini-batches, or as many of prompts, in several epochs.

    Args:
        fields: `old_value` and `return` of every sample, as compute_advantages gives them.
    """
    mesh = critic.model.mesh
    algorithm = replace(algorithm, observation_nll=0.0)  # its rows are those that have a value
    groups = groups_of(batch)
    units = len(groups) if algorithm.values_prompts else len(batch.samples)
    parts = split_mini_batches(units, shape.mini_batches, seed=(config.run.seed, step))
    its = {name: fields[name] for name in ("old_value", "return")}
    for _ in range(passes_of(config.critic, config.algorithm.epochs, step)):
        for part in parts:
            if algorithm.values_prompts:
                batches = pack_prompts(batch, [groups[i] for i in part.tolist()], shape, mesh, its)
            else:
                packed = pack_mini_batch(batch, part, algorithm, shape, mesh, its)
                batches = [replace(micro_batch, experts=None) for micro_batch in packed]
            yield Update(
                kind="critic",
                step=step,
                optimizer=critic.optimizer,
                objective=critic.objective,
                batches=batches,
                temperature=config.rollout.temperature,
                ids=[sample.id for sample in batch.samples],
            )


def passes_of(critic: CriticConfig, epochs: int, step: int) -> int:
    """How often the critic sees the rollout of a step, where the policy sees it in `epochs`."""
    in_warm_up = step <= critic.warmup_rollouts
    return critic.warmup_epochs if in_warm_up and critic.warmup_epochs is not None else epochs


def groups_of(batch: RolloutBatch) -> list[list[int]]:
    """The numbers of each group's samples, in the order in which the groups begin."""
    found: dict[str, list[int]] = {}
    for number, group in enumerate(batch.group_ids):
        found.setdefault(group, []).append(number)
    return list(found.values())


def prompt_of(batch: RolloutBatch, members: Sequence[int]) -> TokenSequence:
    """The prompt of a group, of which one row is scored: the state that has seen all of it."""
    return TokenSequence(batch.samples[members[0]].prompt.token_array, (0,))


def pack_prompts(
    batch: RolloutBatch,
    groups: Sequence[Sequence[int]],
    shape: Batching,
    mesh: Mesh,
    fields: Mapping[str, PerSample],
) -> list[PackedBatch]:
    """This replica's micro-batches of the prompts of `groups`, each a row with the mean of its samples.

    The gradient is that of the mean squared error over all samples: a row weighs as many as it has.
    """
    total = sum(map(len, groups))
    rows = {
        name: [float(np.mean([its[i] for i in members])) for members in groups]
        for name, its in fields.items()
    }
    rows |= {
        "weight": [len(members) / total for members in groups],
        "sample": [members[0] for members in groups],
    }
    return pack_share([prompt_of(batch, members) for members in groups], rows, shape, mesh)
