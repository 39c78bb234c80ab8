"""Advantages per sample by other baselines than the mean of the group; `advantages` says what all share."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mcore_rl.algo.advantages import GroupStatistics, leave_one_out


def leave_one_out_normalized(
    rewards: Float[Tensor, " N"], statistics: GroupStatistics, *, eps: float = 1e-6
) -> Float[Tensor, " N"]:
    """(R - mean) / (std + eps) of the OTHERS of its group, std over n - 1; undivided where they are equal.

    NeMo-RL's default for GRPO; the baseline is RLOO's (arXiv 2402.14740 eq. 8).
    """
    members = statistics.members
    std = torch.zeros(len(members), dtype=torch.float64)
    for samples in set(members):
        std[list(samples)] = _std_of_others(rewards[list(samples)].double())
    difference = leave_one_out(rewards, statistics)
    return torch.where(std > 0, difference / (std + eps), difference)


def _std_of_others(rewards: Float[Tensor, " G"]) -> Float[Tensor, " G"]:
    """Over n - 1, of all but the one; exactly 0 where they are equal, and of fewer than two.

    Each from its own numbers: what the group's sum of squares leaves of one that lies far off is rounding.
    """
    size = len(rewards)
    if size < 3:
        return torch.zeros_like(rewards)
    others = rewards.expand(size, size)[~torch.eye(size, dtype=torch.bool)].view(size, size - 1)
    return torch.where(others.amin(1) == others.amax(1), 0.0, others.std(1))


def length_weighted(rewards: Float[Tensor, " N"], statistics: GroupStatistics) -> Float[Tensor, " N"]:
    """R minus the mean reward of its group, each weighted by its length: OPO, arXiv 2505.23585.

    0 in a constant group, and where nothing of the group is trained.
    """
    members = statistics.members
    found = torch.zeros(len(members), dtype=torch.float64)
    for samples in set(members):
        own, lengths = rewards[list(samples)].double(), statistics.lengths[list(samples)].double()
        total = math.fsum(lengths.tolist())
        if total > 0:
            baseline = math.fsum((own * lengths).tolist()) / total
            found[list(samples)] = own - baseline
    return torch.where(statistics.constant, 0.0, found)


def max_likelihood(rewards: Float[Tensor, " N"], statistics: GroupStatistics) -> Float[Tensor, " N"]:
    """(R - group mean) / group mean: MaxRL, arXiv 2602.02710; 0 where the mean is not positive.

    For rewards of 0 and 1 it is the gradient of the log of the success rate, whose series it takes up to the
    order of the group's size less one.
    """
    mean = statistics.mean
    scaled = (rewards.double() - mean) / torch.where(mean > 0, mean, 1.0)
    return torch.where(statistics.constant | (mean <= 0), 0.0, scaled)


def best_of_group(
    rewards: Float[Tensor, " N"], statistics: GroupStatistics, *, eps: float = 1e-6
) -> Float[Tensor, " N"]:
    """(R - the second largest) / (std + eps) for the best of its group, 0 for the others.

    verl's `grpo_passk`, arXiv 2503.19595. Where several share the largest reward, all are 0.
    """
    members, std = statistics.members, statistics.std()
    found = torch.zeros(len(members), dtype=torch.float64)
    for samples in set(members):
        if len(samples) > 1:
            first, second = rewards[list(samples)].double().topk(2).values.tolist()
            best = samples[int(rewards[list(samples)].argmax())]
            found[best] = (first - second) / (std[best] + eps)
    return found


def pass_at_k(
    rewards: Float[Tensor, " N"], statistics: GroupStatistics, *, k: int = 2
) -> Float[Tensor, " N"]:
    """The advantage of pass@k, over all groups of k that could have been drawn: arXiv 2508.10751.

    A sample passes where its reward is positive. With W of G that fail, m = 1 - C(W, k) / C(G, k) and
    s = sqrt(m (1 - m)): (1 - m) / s for what passes, (1 - m - C(W - 1, k - 1) / C(G - 1, k - 1)) / s else.
    0 in a group that has lost samples and has no more than k: nothing could be compared.
    """
    members = statistics.members
    found = torch.zeros(len(members), dtype=torch.float64)
    for samples in set(members):
        size = len(samples)
        if size <= k:
            continue
        fails = sum(rewards[sample].item() <= 0 for sample in samples)
        mean = 1 - math.comb(fails, k) / math.comb(size, k)
        spread = math.sqrt(mean * (1 - mean))
        if spread > 0:
            failed = math.comb(fails - 1, k - 1) / math.comb(size - 1, k - 1)
            for sample in samples:
                passes = rewards[sample].item() > 0
                found[sample] = (1 - mean - (0.0 if passes else failed)) / spread
    return found


def greedy_baseline(rewards: Float[Tensor, " N"], statistics: GroupStatistics) -> Float[Tensor, " N"]:
    """R minus the reward of the greedy answer to the same prompt: ReMax, arXiv 2310.10505."""
    return rewards.double() - statistics.baseline


def role_baseline(
    rewards: Float[Tensor, " N"], statistics: GroupStatistics, *, decay: float = 0.95, role: str = "role"
) -> Float[Tensor, " N"]:
    """R minus the running mean of its role's rewards: RAE of SPIRAL, arXiv 2506.24119 eq. 2.

    `role` is the key of the prompt's metadata that says whose part it is (of which game); `decay` that of
    `running_mean`, by which the mean goes on after the step. It begins at 0.
    """
    return rewards.double() - statistics.baseline


def running_mean(before: float, rewards: Float[Tensor, " N"], decay: float) -> float:
    """decay b + (1 - decay) mean R of a step: the baseline of RAE, arXiv 2506.24119 eq. 2.

    The paper takes one game after another, and in this order; a step's are taken at once, after their
    advantages, so that neither their order nor a sample's own reward has a part in what it is compared with.
    """
    return decay * before + (1 - decay) * (math.fsum(rewards.tolist()) / len(rewards))


def optimal_token(
    ahead: Float[Tensor, " R"],
    energy: Float[Tensor, " R"],
    offsets: Int[Tensor, " N_plus_1"],
    statistics: GroupStatistics,
) -> Float[Tensor, " R"]:
    """G_t - sum W_t G_t / sum W_t over the group, token by token: the optimal baseline of arXiv 2602.07078.

    G is the reward from here on, `ahead`; W_t the sum up to t of `energy`, the squared norm of the gradient
    of a token's log-prob in the logits, 1 - 2 p + sum p^2. Both are of the t-th trained token of each
    sample, and of those alone that are as long.
    """
    found = torch.zeros_like(ahead)
    for samples in set(statistics.members):
        spans = [slice(int(offsets[i]), int(offsets[i + 1])) for i in samples]
        lengths = [span.stop - span.start for span in spans]
        # of the longest, which is there at every t: where all are equal, the differences are exactly 0
        origin = ahead[spans[lengths.index(max(lengths))]]
        total, weighted = torch.zeros(2, len(origin), dtype=torch.float64)
        for span, length in zip(spans, lengths, strict=True):
            weight = energy[span].cumsum(0)
            total[:length] += weight
            weighted[:length] += weight * (ahead[span] - origin[:length])
        baseline = weighted / torch.where(total > 0, total, 1.0)
        for span, length in zip(spans, lengths, strict=True):
            found[span] = ahead[span] - origin[:length] - baseline[:length]
    return found


def gradient_energy(log_prob: Float[Tensor, " R"], at_half: Float[Tensor, " R"]) -> Float[Tensor, " R"]:
    """|| onehot - p ||^2 = 1 - 2 p_y + sum p^2, from two log-probs of the token: arXiv 2602.07078.

    `at_half` is that at half the temperature, of which sum p^2 = exp(2 log_prob - at_half): no row of logits
    is held for it. 0 where one of them is not finite: the token is not learnt, and weighs nothing for others.
    """
    energy = 1 - 2 * log_prob.exp() + (2 * log_prob - at_half).exp()
    return torch.where(energy.isfinite(), energy.clamp(min=0.0), 0.0)
