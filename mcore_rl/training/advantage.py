"""From rewards and scores to what the losses need per token. Pure; every rank computes the same.

Statistics are exact: they are those of the whole gathered batch. N samples, m_i trained tokens of sample i,
R their sum: flat rows, sample after sample and segment after segment, as algo.advantages has them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mcore_rl.algo.advantages import (
    PIECE,
    GroupStatistics,
    Spread,
    add_turn_rewards,
    bootstrap,
    decoupled,
    gae,
    group_statistics,
    offsets_of,
    spread,
    token_rewards,
    whiten,
)
from mcore_rl.algo.algorithms import Algorithm
from mcore_rl.algo.corrections import Reads, correction_weight
from mcore_rl.algo.lambdas import of_turns
from mcore_rl.algo.losses import difference
from mcore_rl.algo.readings import mark
from mcore_rl.algo.rows import marked_by
from mcore_rl.errors import NumericsError, RewardError
from mcore_rl.rewards.outcome import turn_ends
from mcore_rl.training.batch import RolloutBatch
from mcore_rl.types import RewardPart, Sample


@dataclass(frozen=True)
class Scores:
    """What models say about a rollout batch before its first update; empty where nobody asks."""

    old_log_probs: Mapping[int, np.ndarray] = field(default_factory=dict)
    """sample number -> [m_i] of the policy"""
    ref_log_probs: Sequence[np.ndarray] = ()
    """[N] of [m_i]"""
    values: Sequence[np.ndarray] = ()
    """[N] of [m_i], of the state before each token; [N] of [1], of its prompt, where prompts are valued"""
    following: Sequence[float] = ()
    """[N] values behind the last tokens of truncated samples, 0 of the others; with Algorithm.bootstrap"""
    energy: Sequence[np.ndarray] = ()
    """[N] of [m_i] of baselines.gradient_energy; with Algorithm.by_token"""
    baselines: Sequence[float] = ()
    """[N] what rewards are compared with, NaN where it could not be had; with Algorithm.baseline"""


NO_SCORES = Scores()
TOGETHER = 64
"""samples whose tokens are computed at once"""


@dataclass(frozen=True)
class Advantages:
    """What a rollout batch is trained on."""

    fields: Mapping[str, Sequence[Any]]
    """`advantage`, and `ref_log_prob`, `old_value`, `return` where there are any: [N], or [N] of [m_i]. Where
    prompts are valued, the last two are the critic's alone"""
    metrics: dict[str, float] = field(default_factory=dict)


def compute_advantages(batch: RolloutBatch, algorithm: Algorithm, scores: Scores = NO_SCORES) -> Advantages:
    """Per-sample advantages from group statistics, or per-token ones by `gae`; whitened where asked.

    With them comes what else is known of all tokens of the rollout at once: which of them the loss marks, and
    the scale of a correction that is normalised. Rewards of turns enter token by token where the algorithm
    has token rewards, and by their sum elsewhere.

    Args:
        scores: old log-probs of ALL samples where the algorithm needs them (Algorithm.needs_old).

    Raises:
        RewardError: a reward is not a finite number, or lies at no token of its sample.
        NumericsError: a value is not.
    """
    found = _of_rewards(batch, algorithm, scores)
    return replace(found, fields={**found.fields, **_of_rollout(batch, algorithm, scores, found)})


def _of_rewards(batch: RolloutBatch, algorithm: Algorithm, scores: Scores) -> Advantages:
    """The advantages, what the critic learns from, and their metrics."""
    statistics = group_statistics(batch.group_ids, [sample.reward for sample in batch.samples])
    lengths = [sample.trained_tokens for sample in batch.samples]
    statistics = statistics._replace(lengths=torch.tensor(lengths, dtype=torch.float64))
    offsets = offsets_of(torch.tensor(lengths, dtype=torch.int64))
    fields: dict[str, Sequence[Any]] = {"ref_log_prob": scores.ref_log_probs} if scores.ref_log_probs else {}
    if algorithm.values_prompts:
        return _of_valued_prompts(batch, algorithm, scores, fields, offsets)
    if algorithm.by_token:
        return _of_tokens(batch, algorithm, scores, fields, statistics)
    if not algorithm.per_token:
        return _of_samples(batch, algorithm, scores, fields, statistics)
    return _of_steps(batch, algorithm, scores, fields, offsets)


class _Measured(NamedTuple):
    """What is logged of the tokens of some samples, or of all."""

    kl: Spread
    """k1 of the reference"""
    values: Spread
    returns: Spread
    left: Spread
    """returns less values"""


def _of_steps(
    batch: RolloutBatch,
    algorithm: Algorithm,
    scores: Scores,
    fields: Mapping[str, Sequence[Any]],
    offsets: Tensor,
) -> Advantages:
    """Advantages from rewards of tokens and a critic's values, some samples at a time.

    A batch has millions of tokens. Of all of them at once are only the advantages and the returns: what is
    computed on the way would be ten times that, and the memory for it would take longer than the numbers.
    """
    rows = offsets.tolist()
    advantages, returns = (torch.empty(rows[-1], dtype=torch.float64) for _ in range(2))
    measured: list[_Measured] = []
    for first in range(0, max(1, len(batch.samples)), TOGETHER):
        last = min(first + TOGETHER, len(batch.samples))
        some, its = slice(rows[first], rows[last]), _some(batch, scores, first, last)
        advantages[some], returns[some], found = _of_some(*its, algorithm)
        measured.append(found)
    if algorithm.whiten:
        tokens = Spread.of_rows(advantages)
        for piece in advantages.split(PIECE):
            piece.copy_(whiten(piece, tokens, ddof=algorithm.whiten_ddof))
    whole = _Measured(*map(Spread.of_parts, zip(*measured, strict=True)))
    fields = {**fields, "advantage": _split(advantages, offsets)}
    beta = algorithm.kl_in_reward
    metrics = kl_metrics(whole.kl, beta, samples=len(batch.samples)) if beta else {}
    if not algorithm.needs_critic:
        return Advantages(fields, metrics)
    fields |= {"old_value": scores.values, "return": _split(returns, offsets)}
    return Advantages(fields, metrics | _of_values(whole.values, whole.returns, whole.left))


def _some(batch: RolloutBatch, scores: Scores, first: int, last: int) -> tuple[RolloutBatch, Scores]:
    """The samples `first` to `last` - 1, and what models say about them that advantages are made of."""
    some = slice(first, last)
    old = scores.old_log_probs
    return replace(batch, samples=batch.samples[some], group_ids=batch.group_ids[some]), Scores(
        {i - first: old[i] for i in range(first, last) if i in old},
        scores.ref_log_probs[some],
        scores.values[some],
        scores.following[some],
    )


def _of_some(batch: RolloutBatch, scores: Scores, algorithm: Algorithm) -> tuple[Tensor, Tensor, _Measured]:
    """(advantages, returns, what is logged) of the tokens of some samples, not whitened."""
    offsets = offsets_of(torch.tensor([s.trained_tokens for s in batch.samples], dtype=torch.int64))
    rewards = torch.tensor([sample.reward for sample in batch.samples], dtype=torch.float64)
    values = _values(scores) if algorithm.needs_critic else _zeros(offsets)
    old, ref = _kl_terms(scores, algorithm, offsets)
    per_token = _placed(batch, rewards, offsets, old, ref, algorithm.kl_in_reward)
    if algorithm.bootstrap:
        gamma = algorithm.advantage_params["gamma"]
        assert isinstance(gamma, float)
        per_token = bootstrap(per_token, torch.tensor(scores.following), offsets, gamma=gamma)
    if algorithm.gae_steps == "turn":
        advantages, returns = _by_turns(batch, algorithm, per_token, values)
    else:
        advantages, returns = algorithm.advantage(per_token, values, offsets, **algorithm.advantage_params)
    nothing = Spread.of(())
    kl = Spread.of_rows(difference(old, ref)) if algorithm.kl_in_reward else nothing
    spreads = _value_spreads(values, returns) if algorithm.needs_critic else (nothing,) * 3
    return advantages, returns, _Measured(kl, *spreads)


def _of_samples(
    batch: RolloutBatch,
    algorithm: Algorithm,
    scores: Scores,
    fields: Mapping[str, Sequence[Any]],
    statistics: GroupStatistics,
) -> Advantages:
    """One advantage for each sample, from its reward."""
    rewards = torch.tensor([sample.reward for sample in batch.samples], dtype=torch.float64)
    metrics: dict[str, float] = {}
    if scores.baselines:
        known = torch.tensor(scores.baselines, dtype=torch.float64)
        statistics = statistics._replace(baseline=torch.where(known.isnan(), statistics.mean, known))
        metrics["baseline/mean"] = statistics.baseline.mean().item()
    advantages = (
        _by_parts(batch, algorithm)
        if algorithm.decoupled
        else algorithm.advantage(rewards, statistics, **algorithm.advantage_params)
    )
    if algorithm.whiten:
        offsets = offsets_of(statistics.lengths.long())
        advantages = _whitened(advantages, spread(advantages, offsets), algorithm)
    return Advantages({**fields, "advantage": advantages.tolist()}, metrics)


def _of_tokens(
    batch: RolloutBatch,
    algorithm: Algorithm,
    scores: Scores,
    fields: Mapping[str, Sequence[Any]],
    statistics: GroupStatistics,
) -> Advantages:
    """One advantage for each token, from the rewards ahead of it, without a critic."""
    rewards = torch.tensor([sample.reward for sample in batch.samples], dtype=torch.float64)
    offsets = offsets_of(statistics.lengths.long())
    ahead, _ = gae(_placed(batch, rewards, offsets), _zeros(offsets), offsets, gamma=1.0, lam=1.0)
    advantages = algorithm.advantage(ahead, _join(scores.energy), offsets, statistics)
    if algorithm.whiten:
        advantages = _whitened(advantages, advantages, algorithm)
    return Advantages({**fields, "advantage": _split(advantages, offsets)})


def _placed(
    batch: RolloutBatch,
    rewards: Tensor,
    offsets: Tensor,
    old: Tensor | None = None,
    ref: Tensor | None = None,
    kl_coef: float = 0.0,
) -> Tensor:
    """[R] the rewards [N] at the last tokens, or at those of the turns, less the KL of log-probs [R]."""
    by_turn = torch.tensor([bool(sample.turn_rewards) for sample in batch.samples], dtype=torch.bool)
    nothing = _zeros(offsets)
    per_token = token_rewards(
        torch.where(by_turn, 0.0, rewards),
        nothing if old is None else old,
        nothing if ref is None else ref,
        offsets,
        kl_coef=kl_coef,
    )
    return add_turn_rewards(per_token, *_turn_rows(batch, offsets))


def _zeros(offsets: Tensor) -> Tensor:
    return torch.zeros(int(offsets[-1]), dtype=torch.float64)


def _of_valued_prompts(
    batch: RolloutBatch,
    algorithm: Algorithm,
    scores: Scores,
    fields: Mapping[str, Sequence[Any]],
    offsets: Tensor,
) -> Advantages:
    """By the critic's value of each sample's prompt."""
    values, rewards = _values(scores), torch.tensor([s.reward for s in batch.samples], dtype=torch.float64)
    params = algorithm.advantage_params
    advantages, returns = algorithm.advantage(batch.group_ids, rewards, values, **params)
    if algorithm.whiten:
        advantages = _whitened(advantages, spread(advantages, offsets), algorithm)
    valued = {"old_value": values.tolist(), "return": returns.tolist()}
    found = {**fields, **valued, "advantage": advantages.tolist()}
    return Advantages(found, value_metrics(values, returns))


def kl_metrics(k1: Spread, coefficient: float, *, samples: int) -> dict[str, float]:
    """The KL in the reward, k1 of all tokens, per token and per response, and its coefficient."""
    return {
        "kl/reward": k1.mean,
        "kl/response": k1.mean * k1.size / max(samples, 1),
        "kl/coefficient": coefficient,
    }


def value_metrics(values: Tensor, returns: Tensor) -> dict[str, float]:
    """Means of values [R] and returns [R], and how much of the returns' variance the values explain.

    `value/explained_variance` is 1 - Var(returns - values) / Var(returns): 1 is perfect, a constant gets 0.
    """
    return _of_values(*_value_spreads(values, returns))


def _value_spreads(values: Tensor, returns: Tensor) -> tuple[Spread, Spread, Spread]:
    return Spread.of_rows(values), Spread.of_rows(returns), Spread.of_rows(returns - values)


def _of_values(values: Spread, returns: Spread, left: Spread) -> dict[str, float]:
    total = returns.variance()
    return {
        "value/mean": values.mean,
        "value/explained_variance": 1.0 - left.variance() / total if total > 0 else 0.0,
        "return/mean": returns.mean,
    }


def reward_parts(sample: Sample) -> tuple[RewardPart, ...]:
    """What the reward of a sample is the sum of: one part of weight 1, where the function gave one number."""
    return sample.parts or (RewardPart("reward", float(sample.reward or 0.0), 1.0),)


def _by_parts(batch: RolloutBatch, algorithm: Algorithm) -> Tensor:
    """[N] of `advantages.decoupled`; a part that a sample does not have is 0 there."""
    parts = [reward_parts(sample) for sample in batch.samples]
    weights = {part.name: part.weight for its in parts for part in its}
    column = {name: k for k, name in enumerate(sorted(weights))}
    values = torch.zeros(len(parts), len(column), dtype=torch.float64)
    for row, its in zip(values, parts, strict=True):
        for part in its:
            row[column[part.name]] = part.value
    of_columns = torch.tensor([weights[name] for name in column], dtype=torch.float64)
    params = algorithm.advantage_params
    advantage = partial(algorithm.advantage, **params)
    eps = params.get("eps", 1e-6)  # leave_one_out has none
    assert isinstance(eps, float)
    return decoupled(batch.group_ids, values, of_columns, advantage, eps=eps)


def _turn_rows(batch: RolloutBatch, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """(rows [P], rewards [P]) of all turns that have a reward of their own."""
    rows: list[int] = []
    given: list[float] = []
    for sample, begin, end in zip(batch.samples, offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        for token, reward in sample.turn_rewards:
            if not (0 <= token < end - begin and math.isfinite(reward)):
                raise RewardError(
                    f"sample {sample.id}: a reward of {reward} at trained token {token} of {end - begin}; "
                    "place a finite reward at a token of the sample"
                ).on_every_rank()
            rows.append(begin + token)
            given.append(reward)
    return torch.tensor(rows, dtype=torch.int64), torch.tensor(given, dtype=torch.float64)


def _whitened(advantages: Tensor, rows: Tensor, algorithm: Algorithm) -> Tensor:
    """Whiten the advantages of samples or tokens by those of all tokens, `rows` [R]."""
    return whiten(advantages, Spread.of_rows(rows), ddof=algorithm.whiten_ddof)


def _by_turns(
    batch: RolloutBatch, algorithm: Algorithm, rewards: Tensor, values: Tensor
) -> tuple[Tensor, Tensor]:
    """GAE whose steps are turns: a turn's reward is that of its tokens, its value that of its first token.

    Every token of a turn has the turn's advantage and return.
    """
    ends = [torch.tensor(turn_ends(sample), dtype=torch.int64) + 1 for sample in batch.samples]
    turns = offsets_of(torch.tensor([len(its) for its in ends], dtype=torch.int64))
    tokens = torch.cat(
        [torch.zeros(0, dtype=torch.int64), *(its.diff(prepend=its.new_zeros(1)) for its in ends)]
    )
    cuts = offsets_of(tokens)
    turn = torch.arange(len(tokens)).repeat_interleave(tokens)
    of_turn = rewards.new_zeros(len(tokens)).index_add(0, turn, rewards)
    found = algorithm.advantage(of_turn, values[cuts[:-1]], turns, **algorithm.advantage_params)
    return of_turns(found, tokens)


def _of_rollout(
    batch: RolloutBatch, algorithm: Algorithm, scores: Scores, found: Advantages
) -> dict[str, Sequence[Any]]:
    """`marked` and `correction_scale`, where the algorithm has a use for them; the same on every rank."""
    marks, scales = marked_by(algorithm.loss) is not None, algorithm.correction_normalized
    if not marks and not scales:
        return {}
    lengths = [sample.trained_tokens for sample in batch.samples]
    offsets = offsets_of(torch.tensor(lengths, dtype=torch.int64))
    old = _join([scores.old_log_probs[i] for i in range(len(lengths))])
    rollout = _join([np.asarray(sample.log_probs) for sample in batch.samples])
    fields: dict[str, Sequence[Any]] = {}
    if marks:
        each = zip(found.fields["advantage"], lengths, strict=True)
        advantage = _join([np.broadcast_to(np.asarray(one, np.float64), (n,)) for one, n in each])
        chosen = mark(algorithm.loss, algorithm.loss_params, advantage, old, rollout)
        fields["marked"] = _split(chosen.double(), offsets)
    if scales:
        mean = _mean_correction(batch, algorithm, old, rollout)
        fields["correction_scale"] = [1.0 / mean if mean > 0 else 1.0] * len(lengths)
    return fields


def _mean_correction(batch: RolloutBatch, algorithm: Algorithm, old: Tensor, rollout: Tensor) -> float:
    """The mean of the correction over all usable tokens; what it reads of a sequence is that of a segment."""
    counts = torch.tensor([len(s.log_probs) for sample in batch.samples for s in sample.segments])
    sequence = torch.arange(len(counts)).repeat_interleave(counts)
    usable = torch.isfinite(old) & torch.isfinite(rollout)
    if not usable.any():
        return 0.0

    def reduce(values: Tensor, reads: Reads) -> Tensor:
        among = torch.where(usable, values, 0.0)
        if reads == "sequence-max":
            return among.new_zeros(len(counts)).scatter_reduce(0, sequence, among, "amax")[sequence]
        total = among.new_zeros(len(counts)).index_add(0, sequence, among)
        if reads == "sequence-mean":
            total /= (
                usable.double().new_zeros(len(counts)).index_add(0, sequence, usable.double()).clamp(min=1)
            )
        return total[sequence]

    old, rollout = torch.where(usable, old, 0.0), torch.where(usable, rollout, 0.0)
    weight = correction_weight(algorithm.corrects, algorithm.rules, old, rollout, reduce)
    return weight[usable].mean().item()


def _values(scores: Scores) -> Tensor:
    values = _join(scores.values)
    if not torch.isfinite(values).all():
        raise NumericsError(
            "the critic's values are not finite, and every advantage of the batch would follow; lower "
            "critic.lr, or start again from a checkpoint before loss/value rose"
        ).on_every_rank()
    return values


def _kl_terms(scores: Scores, algorithm: Algorithm, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """(old, reference) log-probs [R] for the KL in the reward; 0 apart where the loss masks the token."""
    if algorithm.kl_in_reward == 0:
        return _zeros(offsets), _zeros(offsets)
    old = _join([scores.old_log_probs[i] for i in range(len(offsets) - 1)])
    return old, torch.where(torch.isfinite(old), _join(scores.ref_log_probs), -torch.inf)


def _join(parts: Sequence[np.ndarray]) -> Tensor:
    """[N] of [m_i] -> [R] float64"""
    return torch.from_numpy(np.concatenate([np.zeros(0), *parts]))


def _split(rows: Tensor, offsets: Tensor) -> list[np.ndarray]:
    """[R] -> [N] of [m_i]"""
    return np.split(rows.numpy(), offsets[1:-1].numpy())
