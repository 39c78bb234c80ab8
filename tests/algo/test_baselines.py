"""Other baselines and lambdas beside their papers' formulas, one group and token after another."""

from __future__ import annotations

import itertools
import math
import statistics as stats

import pytest
import torch

from mcore_rl.algo.advantages import (
    GroupStatistics,
    bootstrap,
    gae,
    group_statistics,
    offsets_of,
    sums_ahead,
    whiten,
)
from mcore_rl.algo.advantages import Spread as Measured
from mcore_rl.algo.baselines import (
    best_of_group,
    gradient_energy,
    greedy_baseline,
    leave_one_out_normalized,
    length_weighted,
    max_likelihood,
    optimal_token,
    pass_at_k,
    role_baseline,
    running_mean,
)
from mcore_rl.algo.lambdas import gae_by_length, gae_two_lambdas

GROUPS = {
    "a": [1.0, 0.0, 0.25, 0.0, 0.0],
    "b": [1.0, 1.0, 1.0],
    "c": [0.0, 1.0],
    "d": [0.4],
    "e": [2.0, 0.0, 0.0],
}
LENGTHS = {"a": [3, 9, 1, 4, 0], "b": [1, 2, 3], "c": [5, 1], "d": [7], "e": [1, 1, 6]}


def batch() -> tuple[list[tuple[str, int]], torch.Tensor, GroupStatistics]:
    """Samples of all groups, interleaved as they may come."""
    order = sorted(
        ((g, i) for g, its in GROUPS.items() for i in range(len(its))), key=lambda one: (one[1], one[0])
    )
    rewards = torch.tensor([GROUPS[g][i] for g, i in order], dtype=torch.float64)
    found = group_statistics([g for g, _ in order], rewards.tolist())
    lengths = torch.tensor([LENGTHS[g][i] for g, i in order], dtype=torch.float64)
    return order, rewards, found._replace(lengths=lengths)


def check(found: torch.Tensor, expected: dict[str, list[float]]) -> None:
    order, _, _ = batch()
    wanted = torch.tensor([expected[g][i] for g, i in order], dtype=torch.float64)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert found.abs().max() > 0.1


def test_leave_one_out_with_the_std_of_the_others() -> None:
    """NeMo-RL: mean and std (n - 1) of the others; not divided where these are equal, 0 for one alone."""
    _, rewards, found = batch()
    expected = {}
    for group, its in GROUPS.items():
        expected[group] = []
        for i, reward in enumerate(its):
            others = its[:i] + its[i + 1 :]
            gap = reward - stats.mean(others) if others else 0.0
            std = stats.stdev(others) if len(others) > 1 and max(others) != min(others) else 0.0
            expected[group].append(gap / (std + 1e-6) if std else gap)
    check(leave_one_out_normalized(rewards, found), expected)


def test_equal_others_far_from_zero_are_no_spread() -> None:
    """Large rewards: what rounding leaves of a difference of squares would be divided by, and be 1e5."""
    its = [1e6 + 0.1, 1e6 + 0.3, 1e6 + 0.3, 1e6 + 0.3]
    rewards = torch.tensor(its, dtype=torch.float64)
    found = leave_one_out_normalized(rewards, group_statistics(["a"] * 4, its))
    std = stats.stdev(its[:3]) + 1e-6
    expected = [its[0] - its[1]] + [(its[1] - stats.mean(its[:3])) / std] * 3
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-7, atol=0)


def test_opo_weighs_the_baseline_by_length() -> None:
    """2505.23585: b = sum l R / sum l; nothing to learn from a constant group."""
    _, rewards, found = batch()
    expected = {}
    for group, its in GROUPS.items():
        lengths = LENGTHS[group]
        baseline = sum(n * r for n, r in zip(lengths, its, strict=True)) / sum(lengths)
        expected[group] = [r - baseline if len(set(its)) > 1 else 0.0 for r in its]
    check(length_weighted(rewards, found), expected)
    same = found._replace(lengths=torch.ones_like(rewards))
    equal = {g: [r - stats.mean(its) if len(set(its)) > 1 else 0.0 for r in its] for g, its in GROUPS.items()}
    check(length_weighted(rewards, same), equal)
    with pytest.raises(AssertionError):  # the control
        check(length_weighted(rewards, found), equal)


def test_maxrl_divides_by_the_mean() -> None:
    _, rewards, found = batch()
    expected = {
        g: [(r - stats.mean(its)) / stats.mean(its) if len(set(its)) > 1 else 0.0 for r in its]
        for g, its in GROUPS.items()
    }
    check(max_likelihood(rewards, found), expected)
    nothing = torch.tensor([-1.0, 0.5])
    assert max_likelihood(nothing, group_statistics("xx", nothing.tolist())).tolist() == [0, 0], (
        "a mean below 0"
    )


def test_maxrl_is_the_gradient_of_the_log_of_the_success_rate() -> None:
    """2602.02710: log p = -sum_k (1 - p)^k / k has the gradient sum_k (1 - p)^(k - 1), here up to k = n - 1.

    Enumerated over all answers of n samples: E[sum A grad log chance] / n.
    """
    p, n = 0.3, 3
    total = 0.0
    for passes in itertools.product((0.0, 1.0), repeat=n):
        chance = math.prod(p if x else 1 - p for x in passes)
        given = torch.tensor(passes, dtype=torch.float64)
        advantage = max_likelihood(given, group_statistics([0] * n, list(passes)))
        score = given / p - (1 - given) / (1 - p)  # d log chance / dp
        total += chance * (advantage * score).sum().item() / n
    assert total == pytest.approx(sum((1 - p) ** (k - 1) for k in range(1, n)), rel=1e-12)


def test_the_best_of_a_group_alone() -> None:
    _, rewards, found = batch()
    expected = {}
    for group, its in GROUPS.items():
        expected[group] = [0.0] * len(its)
        first, *rest = sorted(its, reverse=True)
        if rest and first > rest[0]:
            expected[group][its.index(first)] = (first - rest[0]) / (stats.stdev(its) + 1e-6)
    check(best_of_group(rewards, found), expected)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_pass_at_k_is_the_mean_over_all_groups_of_k(k: int) -> None:
    """2508.10751 by enumeration: a subset's A is normalised, a sample's the mean of its."""
    _, rewards, found = batch()
    expected = {}
    for group, its in GROUPS.items():
        expected[group] = [0.0] * len(its)
        if len(its) <= k:
            continue
        subsets = list(itertools.combinations(range(len(its)), k))
        reward = {s: float(any(its[i] > 0 for i in s)) for s in subsets}
        mean = stats.mean(reward.values())
        std = math.sqrt(mean * (1 - mean))
        if std:
            for i in range(len(its)):
                expected[group][i] = stats.mean((reward[s] - mean) / std for s in subsets if i in s)
    check(pass_at_k(rewards, found, k=k), expected)


REWARDS = [[0.1, 0.0, 1.0], [], [0.5], [0.0, -0.2, 0.0, 2.0]]
VALUES = [[0.3, 0.2, 0.7], [], [0.1], [0.5, -0.4, 0.3, 0.9]]


def one_by_one(gamma: float, lams: list[float]) -> list[float]:
    """Advantages by the definition: sum_l (gamma lam)^l delta_(t + l)."""
    found = []
    for rewards, values, lam in zip(REWARDS, VALUES, lams, strict=True):
        after = [*values[1:], 0.0][: len(values)]
        delta = [r + gamma * n - v for r, v, n in zip(rewards, values, after, strict=True)]
        found += [
            sum((gamma * lam) ** (j - t) * delta[j] for j in range(t, len(delta))) for t in range(len(delta))
        ]
    return found


def flat() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    cuts = offsets_of(torch.tensor([len(x) for x in REWARDS]))
    rewards, values = (torch.tensor([x for part in its for x in part]).double() for its in (REWARDS, VALUES))
    return rewards, values, cuts


def test_the_critic_may_have_a_lambda_of_its_own() -> None:
    rewards, values, cuts = flat()
    advantages, returns = gae_two_lambdas(rewards, values, cuts, gamma=0.9, lam=0.5, lam_critic=0.8)
    torch.testing.assert_close(
        advantages, torch.tensor(one_by_one(0.9, [0.5] * 4)).double(), rtol=0, atol=1e-7
    )
    torch.testing.assert_close(
        returns - values, torch.tensor(one_by_one(0.9, [0.8] * 4)).double(), rtol=0, atol=1e-7
    )
    assert torch.equal(
        gae_two_lambdas(rewards, values, cuts, lam=1.0)[1], gae(rewards, values, cuts, lam=1.0)[1]
    )


def test_lambda_follows_from_the_length() -> None:
    """2504.05118, with 1 / 0.8 tokens as the shortest that looks ahead at all."""
    rewards, values, cuts = flat()
    advantages, returns = gae_by_length(rewards, values, cuts, gamma=0.9, length_factor=0.8, lam_critic=1.0)
    lams = [max(0.0, 1 - 1 / (0.8 * len(x))) if x else 0.0 for x in REWARDS]
    assert lams[2] == 0 < lams[0] < lams[3]
    torch.testing.assert_close(advantages, torch.tensor(one_by_one(0.9, lams)).double(), rtol=0, atol=1e-7)
    assert torch.equal(returns, gae(rewards, values, cuts, gamma=0.9, lam=1.0)[1])


def test_whitening_over_n_or_n_minus_1() -> None:
    values = torch.tensor([0.5, -1.0, 2.0, 0.25], dtype=torch.float64)
    for ddof, variance in ((0, stats.pvariance(values.tolist())), (1, stats.variance(values.tolist()))):
        found = whiten(values, Measured.of_rows(values), ddof=ddof)  # type: ignore[arg-type]
        torch.testing.assert_close(found, (values - values.mean()) / math.sqrt(variance + 1e-8))


def test_remax_and_rae_take_a_baseline_away_that_follows_from_no_sample() -> None:
    """2310.10505: R - R(greedy); 2506.24119 eq. 2: R - b of the role, b <- a b + (1 - a) R."""
    _, rewards, found = batch()
    baseline = torch.linspace(-1, 1, len(rewards), dtype=torch.float64)
    known = found._replace(baseline=baseline)
    for advantage in (greedy_baseline, role_baseline):
        torch.testing.assert_close(advantage(rewards, known), rewards - baseline, rtol=0, atol=0)
    b = 0.0
    for its in ([1.0, -1.0, 1.0, 1.0], [-1.0], [0.5, 0.25]):
        expected = 0.9 * b + 0.1 * stats.mean(its)
        b = running_mean(b, torch.tensor(its, dtype=torch.float64), 0.9)
        assert b == pytest.approx(expected, rel=1e-15)
    assert role_baseline(rewards, known, decay=0.1, role="game").equal(rewards - baseline), "of the next step"


def test_the_energy_of_a_token_is_the_norm_of_its_gradient_in_the_logits() -> None:
    """2602.07078; by autograd, at a temperature that is not 1."""
    logits = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * 3
    for row in logits:
        scaled = (row / 0.8).requires_grad_()
        (gradient,) = torch.autograd.grad(torch.log_softmax(scaled, -1)[2], scaled)
        one, half = (torch.log_softmax(row / t, -1)[2:3] for t in (0.8, 0.4))
        assert gradient_energy(one, half).item() == pytest.approx(gradient.square().sum().item(), rel=1e-12)


def test_a_token_of_unknown_energy_weighs_nothing_for_the_others() -> None:
    log_prob = torch.tensor([-math.inf, -0.5, math.nan, -0.5])
    energy = gradient_energy(log_prob, torch.tensor([-math.inf, -0.2, -0.2, -math.inf]))
    assert energy[[0, 2, 3]].tolist() == [0, 0, 0]
    assert energy[1] > 0


def test_the_optimal_baseline_is_one_of_each_token() -> None:
    """2602.07078: b_t = sum W_t G_t / sum W_t over the group's samples of more than t tokens."""
    ahead = {"a": [[1.0, 1.0, 0.5], [0.0], [], [2.0, 2.0]], "b": [[3.0, 3.0], [3.0, 3.0, 3.0]], "c": [[0.7]]}
    energy = {
        "a": [[0.2, 0.1, 0.9], [0.4], [], [1.1, 0.3]],
        "b": [[0.1, 0.2], [0.9, 0.3, 0.7]],
        "c": [[0.5]],
    }
    order = [("a", 0), ("b", 0), ("a", 1), ("c", 0), ("a", 2), ("a", 3), ("b", 1)]
    flats = [
        torch.tensor([x for g, i in order for x in its[g][i]], dtype=torch.float64) for its in (ahead, energy)
    ]
    offsets = offsets_of(torch.tensor([len(ahead[g][i]) for g, i in order]))
    found = optimal_token(*flats, offsets, group_statistics([g for g, _ in order], [0.0] * len(order)))
    expected = []
    for g, i in order:
        for t, value in enumerate(ahead[g][i]):
            alive = [(sum(w[: t + 1]), x[t]) for w, x in zip(energy[g], ahead[g], strict=True) if len(x) > t]
            baseline = sum(w * x for w, x in alive) / sum(w for w, _ in alive)
            expected.append(value - baseline)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    assert (found[3:5] == 0).all(), "exactly, where all that is ahead is equal"
    uniform = optimal_token(
        flats[0], torch.ones_like(flats[1]), offsets, group_statistics([g for g, _ in order], [0.0] * 7)
    )
    assert not torch.allclose(uniform, found), "the control: the weights matter"


def test_the_value_behind_a_truncated_sequence_enters_delta_and_return() -> None:
    """delta_T = R_T + gamma V_(T+1) - V_T, one sequence after another."""
    rewards, values, cuts = flat()
    behind = [0.4, 0.0, -0.6, 0.0]
    placed = bootstrap(rewards, torch.tensor(behind), cuts, gamma=0.9)
    advantages, returns = gae(placed, values, cuts, gamma=0.9, lam=0.5)
    expected = []
    for its, value, last in zip(REWARDS, VALUES, behind, strict=True):
        after = [*value[1:], last][: len(value)]
        delta = [r + 0.9 * n - v for r, v, n in zip(its, value, after, strict=True)]
        expected += [sum(0.45 ** (j - t) * delta[j] for j in range(t, len(delta))) for t in range(len(delta))]
    torch.testing.assert_close(advantages, torch.tensor(expected).double(), rtol=0, atol=1e-7)
    torch.testing.assert_close(returns, advantages + values)


def test_what_is_ahead_is_a_discounted_sum() -> None:
    grid = torch.randn(3, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = torch.zeros_like(grid)
    for t in range(11):
        expected[:, t] = sum(0.8 ** (k - t) * grid[:, k] for k in range(t, 11))
    torch.testing.assert_close(sums_ahead(grid, 0.8), expected, rtol=1e-13, atol=1e-13)
    assert sums_ahead(grid[:, :1], 0.8).equal(grid[:, :1])
    assert sums_ahead(grid[:, :0], 0.8).shape == (3, 0)
