"""Advantages: per sample, from rewards and the statistics of their groups, or per token, from values.

N samples of one whole rollout batch, gathered from all data-parallel ranks. Everything is float64 and sums
are exactly rounded (math.fsum), so a statistic does not depend on the order of the samples or on which rank
held them, bit for bit. Groups are recognised by id: they may be unequal, interleaved, or have lost samples.

Flat rows are the scored (UNMASKED) response tokens of all sequences end to end, sequence i at [offsets[i],
offsets[i+1]), which may be none. Masked tokens (tool output, padding) are absent, so nothing resets or leaks
at them. R rows, N sequences, P rewards of turns. Under context parallelism these run on whole sequences,
before the split.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from numbers import Real
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mcore_rl.algo.losses import difference
from mcore_rl.errors import ConfigError, DataError, RewardError

REWARD_LIMIT = 1e100
"""Beyond it squares overflow."""

PIECE = 1 << 18
"""numbers that are measured at once: what is made of them stays in the cache"""

STRIDE = 64
"""steps that `estimate` takes one by one"""

StdSource = Literal["group", "batch", "batch-centered", "none"]


class Spread(NamedTuple):
    """The mean and the sum of squared deviations of some numbers, from two passes in float64."""

    mean: float
    sum_squares: float
    size: int
    constant: bool

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Measure finite numbers; the sums are exactly rounded, so that their order does not matter."""
        if not values:
            return cls(0.0, 0.0, 0, True)
        mean = math.fsum(values) / len(values)
        sum_squares = math.fsum((value - mean) ** 2 for value in values)
        return cls(mean, sum_squares, len(values), min(values) == max(values))

    @classmethod
    def of_rows(cls, rows: Float[Tensor, " R"]) -> Spread:
        """Measure one number per token; torch's sums, as there are millions of tokens in a batch."""
        return cls.of_parts([_of_piece(piece) for piece in rows.detach().split(PIECE) if piece.numel()])

    @classmethod
    def of_parts(cls, parts: Sequence[Spread]) -> Spread:
        """Measure numbers whose parts have been measured: Chan's formula of the whole's squares."""
        size = sum(part.size for part in parts)
        if not size:
            return cls.of(())
        if len(parts) == 1:
            return parts[0]
        if all(part.constant and part.mean == parts[0].mean for part in parts):
            return cls(parts[0].mean, 0.0, size, True)
        mean = math.fsum(part.size * part.mean for part in parts) / size
        between = [part.size * (part.mean - mean) ** 2 for part in parts]
        return cls(mean, math.fsum([*between, *(part.sum_squares for part in parts)]), size, False)

    def variance(self, ddof: int = 1) -> float:
        """Return the sum of squares over size - ddof; exactly 0 for constant values."""
        return 0.0 if self.constant else self.sum_squares / (self.size - ddof)

    def std(self, ddof: int = 1) -> float:
        """Return the standard deviation; exactly 0 for constant values."""
        return math.sqrt(self.variance(ddof))


def _of_piece(rows: Float[Tensor, " R"]) -> Spread:
    """Two passes over some rows, at least one; the mean of equal numbers is that number."""
    rows = rows.double()
    least, most = rows.aminmax()
    constant = bool(least == most)
    mean = least if constant else rows.mean()
    deviations = rows - mean
    return Spread(mean.item(), deviations.dot(deviations).item(), rows.numel(), constant)


class GroupStatistics(NamedTuple):
    """Statistics of a rollout batch, spread to its samples in the order they were given."""

    groups: tuple[Spread, ...]
    """[N] of each sample's group"""
    batch: Spread
    """spread of all rewards"""
    centered: Spread
    """spread of all rewards after their group's mean is taken away"""
    ids: tuple[Hashable, ...] = ()
    """[N] whose group it is"""
    lengths: Float[Tensor, " N"] = torch.zeros(0)
    """trained tokens of each sample, where a rollout batch says them"""
    baseline: Float[Tensor, " N"] = torch.zeros(0)
    """what the reward of each sample is compared with, where it comes from outside of the batch"""

    @property
    def members(self) -> tuple[tuple[int, ...], ...]:
        """The samples of each sample's group."""
        found: dict[Hashable, list[int]] = defaultdict(list)
        for sample, group_id in enumerate(self.ids):
            found[group_id].append(sample)
        shared = {group_id: tuple(samples) for group_id, samples in found.items()}
        return tuple(shared[group_id] for group_id in self.ids)

    @property
    def mean(self) -> Float[Tensor, " N"]:
        """Mean reward of each sample's group."""
        return _float64(group.mean for group in self.groups)

    @property
    def size(self) -> Float[Tensor, " N"]:
        """Samples in each sample's group."""
        return _float64(group.size for group in self.groups)

    @property
    def constant(self) -> Bool[Tensor, " N"]:
        """All rewards of the group are equal (max == min, or a single sample): it carries no signal."""
        return torch.tensor([group.constant for group in self.groups], dtype=torch.bool)

    def std(self, source: StdSource = "group", ddof: Literal[0, 1] = 1) -> Float[Tensor, " N"]:
        """What an advantage is divided by. Raises ConfigError for an unknown source."""
        match source:
            case "group":
                return _float64(group.std(ddof) for group in self.groups)
            case "batch":
                return _float64(self.batch.std(ddof) for _ in self.groups)
            case "batch-centered":
                return _float64(self.centered.std(ddof) for _ in self.groups)
        raise ConfigError(f"algorithm.params.std: {source!r} is not group, batch, batch-centered or none")


def group_statistics(group_ids: Sequence[Hashable], rewards: Sequence[Any]) -> GroupStatistics:
    """Statistics of `rewards` per group id and over the batch; an empty batch gives empty statistics.

    Every rank that passes the same gathered batch gets the same bits, and the same error.

    Raises:
        DataError: as many ids as rewards are needed.
        RewardError: a reward is None, not a number, NaN or infinite; the message names sample and group.
    """
    if len(group_ids) != len(rewards):
        raise DataError(
            f"group_statistics: {len(group_ids)} group ids for {len(rewards)} rewards; pass one id each"
        )
    members: dict[Hashable, list[float]] = defaultdict(list)
    for position, (group_id, reward) in enumerate(zip(group_ids, rewards, strict=True)):
        if not _is_reward(reward):
            raise RewardError(
                f"sample {position} of group {group_id!r}: reward {reward!r} is not a finite number; "
                "return a float from the reward function, or drop the sample before training"
            )
        members[group_id].append(float(reward))
    spreads = {group_id: Spread.of(values) for group_id, values in members.items()}
    centered = [value - spreads[group_id].mean for group_id, values in members.items() for value in values]
    return GroupStatistics(
        tuple(spreads[group_id] for group_id in group_ids),
        Spread.of([value for values in members.values() for value in values]),
        # rounding leaves constant groups a hair off 0: the exact test decides
        Spread.of(() if all(spread.constant for spread in spreads.values()) else centered),
        tuple(group_ids),
    )


def _is_reward(value: Any) -> bool:
    return isinstance(value, Real) and bool(abs(value) < REWARD_LIMIT)  # type: ignore[operator]  # NaN is not below


def group_normalized(
    rewards: Float[Tensor, " N"],
    statistics: GroupStatistics,
    *,
    std: StdSource = "group",
    ddof: Literal[0, 1] = 1,
    eps: float = 1e-6,
) -> Float[Tensor, " N"]:
    """(R - group mean) / (std + eps); exactly 0 in a constant group.

    std "group" is GRPO (arXiv 2402.03300 section 4.1.2), "batch" LitePPO (2508.08221 eq. 6: over the raw
    rewards of the whole rollout batch), "batch-centered" the same over centred rewards, "none" Dr. GRPO
    (2503.20783) and DeepSeek-V3.2.
    """
    centered = rewards.double() - statistics.mean
    scaled = centered if std == "none" else centered / (statistics.std(std, ddof) + eps)
    return torch.where(statistics.constant, 0.0, scaled)


def leave_one_out(rewards: Float[Tensor, " N"], statistics: GroupStatistics) -> Float[Tensor, " N"]:
    """R minus the mean of the OTHERS of its group: RLOO, arXiv 2402.14740 eq. 8; 0 for a group of one."""
    size = statistics.size
    scaled = (rewards.double() - statistics.mean) * size / (size - 1).clamp(min=1)
    return torch.where(statistics.constant, 0.0, scaled)


def raw_reward(rewards: Float[Tensor, " N"], statistics: GroupStatistics) -> Float[Tensor, " N"]:
    """R itself: REINFORCE without a baseline (Williams 1992)."""
    return rewards.double()


def decoupled(
    group_ids: Sequence[Hashable],
    parts: Float[Tensor, "N K"],
    weights: Float[Tensor, " K"],
    advantage: Callable[..., Tensor] = group_normalized,
    *,
    eps: float = 1e-6,
) -> Float[Tensor, " N"]:
    """GDPO, arXiv 2601.05242 eqs. 4-7: each of K parts of the reward is compared within its group by itself.

    A = sum_k w_k A_k, where A_k is the `advantage` (rewards [N], GroupStatistics) of part k alone; then
    (A - mean) / (std + eps), over all N samples. The sum of the parts, compared as one number, would give
    different combinations of them the same advantage. Exactly 0 where no part differs within the group, and
    where all A are equal.

    Raises:
        DataError, RewardError: see group_statistics.
    """
    total = torch.zeros(len(parts), dtype=torch.float64)
    constant = torch.ones(len(parts), dtype=torch.bool)
    for part, weight in zip(parts.double().T, weights.tolist(), strict=True):
        statistics = group_statistics(group_ids, part.tolist())
        total += weight * advantage(part, statistics)
        constant &= statistics.constant | (weight == 0)
    batch = Spread.of(total.tolist())
    return torch.where(constant | batch.constant, 0.0, (total - batch.mean) / (batch.std() + eps))


def hybrid(
    group_ids: Sequence[Hashable],
    rewards: Float[Tensor, " N"],
    values: Float[Tensor, " N"],
    *,
    alpha: float = 0.5,
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """((1 - alpha)(R - group mean) + alpha (R - V(prompt)), R). EXPERIMENTAL: Hybrid GRPO, made usable.

    The formula of arXiv 2502.01652 (`hybrid_shared`) gives all samples of a group one advantage, so nothing
    tells a good answer from a bad one; this blend keeps the contrast. `values` are the critic's of the
    prompt. The second result is what they should be.
    """
    statistics, rewards = group_statistics(group_ids, rewards.tolist()), rewards.double()
    contrast = group_normalized(rewards, statistics, std="none")
    return (1 - alpha) * contrast + alpha * (rewards - values.double()), rewards


def hybrid_shared(
    group_ids: Sequence[Hashable], rewards: Float[Tensor, " N"], values: Float[Tensor, " N"]
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """(Group mean of tanh(R) - V(prompt), tanh(R)): arXiv 2502.01652 as printed, with one step per episode.

    EXPERIMENTAL; see `hybrid`, whose arguments and results it has.
    """
    returns = torch.tanh(rewards.double())
    return group_statistics(group_ids, (returns - values.double()).tolist()).mean, returns


def _float64(values: Iterable[float]) -> Float[Tensor, " N"]:
    return torch.tensor(list(values), dtype=torch.float64)


def token_rewards(
    scores: Float[Tensor, " N"],
    old_log_prob: Float[Tensor, " R"],
    ref_log_prob: Float[Tensor, " R"],
    offsets: Int[Tensor, " N_plus_1"],
    *,
    kl_coef: float,
) -> Float[Tensor, " R"]:
    """-kl_coef (old - ref) on every token, plus the score on the LAST row of its sequence.

    Source: InstructGPT, arXiv 2203.02155 section 3.5. The KL is k1 without gradient, the right estimator in a
    reward (losses.kl).
    """
    rewards = -kl_coef * difference(old_log_prob.detach().double(), ref_log_prob.detach().double())
    scored = offsets.diff() > 0
    return rewards.index_add(0, offsets[1:][scored] - 1, scores.double()[scored])


def add_turn_rewards(
    rewards: Float[Tensor, " R"], rows: Int[Tensor, " P"], turn_rewards: Float[Tensor, " P"]
) -> Float[Tensor, " R"]:
    """The reward of each turn, added on the row of its last token.

    The return of a token then has the rewards of its own turn and of later ones only. A sample whose reward
    is added here has score 0 in `token_rewards`.
    """
    return rewards.index_add(0, rows, turn_rewards.double())


def gae(
    rewards: Float[Tensor, " R"],
    values: Float[Tensor, " R"],
    offsets: Int[Tensor, " N_plus_1"],
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> tuple[Float[Tensor, " R"], Float[Tensor, " R"]]:
    """(advantages, returns), arXiv 1506.02438 eq. 16: A_t = delta_t + gamma lam A_next, returns = A + V.

    delta_t = R_t + gamma V_next - V_t, and V after the last row is 0. With values 0 and lam 1 the advantage
    is the discounted return, as REINFORCE++ (2501.03262) takes it.
    """
    return estimate(rewards, values, offsets, gamma, lam)


def estimate(
    rewards: Float[Tensor, " R"],
    values: Float[Tensor, " R"],
    offsets: Int[Tensor, " N_plus_1"],
    gamma: float,
    lam: float | Float[Tensor, " N"],
) -> tuple[Float[Tensor, " R"], Float[Tensor, " R"]]:
    """`gae` (arXiv 1506.02438 eq. 16) with one lambda, or with one for each sequence."""
    lengths = offsets.diff()
    longest = int(lengths.max()) if lengths.numel() else 0
    values = values.detach().double()
    following = torch.cat([values[1:], values.new_zeros(1)])[: len(values)]
    following[offsets[1:][lengths > 0] - 1] = 0.0
    delta = rewards.double() + (gamma * following - values)
    live = torch.arange(longest, device=offsets.device) < lengths[:, None]
    # a step of all sequences lies together: strided, each of the thousands of steps would miss the cache
    by_step = delta.new_zeros(-(-longest // STRIDE) * STRIDE, len(lengths))
    by_step.T[:, :longest].masked_scatter_(live, delta)
    _add_ahead(by_step, torch.as_tensor(gamma * lam, dtype=torch.float64, device=delta.device))
    # whole rows are copied: to select by a mask takes a second where these take a twentieth of it
    rows = zip(by_step.T.contiguous(), lengths.tolist(), strict=True)
    advantages = torch.cat([delta.new_zeros(0), *(row[:length] for row, length in rows)])
    return advantages, advantages + values


def _add_ahead(by_step: Float[Tensor, "T N"], decay: Tensor) -> None:
    """x_t becomes x_t + decay x_{t+1}, from the end on; T is a multiple of STRIDE, `decay` one or [N].

    Stretches of STRIDE steps go side by side, and then each is given what comes behind it: a step at a time,
    thousands of them would each cost more than their numbers.
    """
    stretches = by_step.unflatten(0, (len(by_step) // STRIDE, STRIDE))
    for t in range(STRIDE - 2, -1, -1):
        stretches[:, t] += decay * stretches[:, t + 1]
    powers = decay ** torch.arange(STRIDE, 0, -1, dtype=torch.float64, device=by_step.device)[:, None]
    for s in range(len(stretches) - 2, -1, -1):
        stretches[s] += powers * stretches[s + 1, 0]


def whiten(
    values: Float[Tensor, "*shape"], tokens: Spread, *, ddof: Literal[0, 1] = 1
) -> Float[Tensor, "*shape"]:
    """(x - mean) / sqrt(variance + 1e-8), by the mean and the variance (over n - ddof) of `tokens`.

    `tokens` are all unmasked tokens of the global batch. Fewer than two give nothing to scale by, and the
    values come back as they are.
    """
    if tokens.size < 2:
        return values
    return (values - tokens.mean) / (tokens.variance(ddof) + 1e-8) ** 0.5


def offsets_of(lengths: Int[Tensor, " N"]) -> Int[Tensor, " N_plus_1"]:
    """[N] row counts -> [N+1] boundaries, starting at 0."""
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def sequence_sum(
    values: Float[Tensor, " R"], sequence: Int[Tensor, " R"], sequences: int
) -> Float[Tensor, " N"]:
    """Sum of `values` per sequence; `sequence[r]` in [0, sequences). The caller adds up the CP ranks."""
    return values.new_zeros(sequences).index_add(0, sequence, values)


def sequence_mean(
    values: Float[Tensor, " R"], sequence: Int[Tensor, " R"], sequences: int
) -> Float[Tensor, " N"]:
    """Mean of `values` per sequence; 0 for a sequence without rows."""
    counts = torch.bincount(sequence, minlength=sequences).clamp(min=1)
    return sequence_sum(values, sequence, sequences) / counts


def sums_ahead(grid: Float[Tensor, "N T"], discount: float) -> Float[Tensor, "N T"]:
    """[N, T] -> sum over k >= 0 of discount^k grid[:, t + k], in log2(T) additions of shifted copies."""
    step = 1
    while step < grid.shape[1]:
        grid = torch.cat([grid[:, :-step] + discount**step * grid[:, step:], grid[:, -step:]], dim=1)
        step *= 2
    return grid


def bootstrap(
    rewards: Float[Tensor, " R"],
    following: Float[Tensor, " N"],
    offsets: Int[Tensor, " N_plus_1"],
    *,
    gamma: float,
) -> Float[Tensor, " R"]:
    """Token rewards plus gamma V on the last row, V the value `following` it: arXiv 1712.00378.

    `gae` takes the value behind the last row as 0, as where an episode has ended. One that met its limit
    would have gone on; added to the reward, the value enters delta and the returns alike.
    """
    scored = offsets.diff() > 0
    return rewards.index_add(0, offsets[1:][scored] - 1, gamma * following.double()[scored])


def spread(per_sequence: Float[Tensor, " N"], offsets: Int[Tensor, " N_plus_1"]) -> Float[Tensor, " R"]:
    """[N] one number per sequence -> [R] the same number on each of its rows."""
    return per_sequence.repeat_interleave(offsets.diff())


def informative(statistics: GroupStatistics) -> Bool[Tensor, " N"]:
    """Samples that dynamic sampling keeps: their group's rewards are not all equal.

    Source: DAPO, arXiv 2503.14476 section 3.2.
    """
    return ~statistics.constant
