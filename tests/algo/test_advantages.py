"""Group statistics, advantages per sample and per token: exactness, order, bad rewards."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mcore_rl.algo import advantages
from mcore_rl.algo.advantages import offsets_of, sequence_mean, sequence_sum, spread
from mcore_rl.errors import DataError, RewardError

PER_SAMPLE = {
    "grpo": advantages.group_normalized,
    "liteppo": lambda r, s: advantages.group_normalized(r, s, std="batch"),
    "centered": lambda r, s: advantages.group_normalized(r, s, std="batch-centered"),
    "drgrpo": lambda r, s: advantages.group_normalized(r, s, std="none"),
    "rloo": advantages.leave_one_out,
}

BATCHES = st.lists(
    st.tuples(st.sampled_from("abcd"), st.floats(-1e4, 1e4, allow_subnormal=False)), min_size=1, max_size=24
)


def tensor(numbers: list[float]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def zipped(batch: list[tuple[str, float]]) -> tuple[list[str], list[float]]:
    return [group for group, _ in batch], [reward for _, reward in batch]


def all_advantages(groups: list[str], rewards: list[float]) -> dict[str, list[float]]:
    statistics = advantages.group_statistics(groups, rewards)
    return {name: f(tensor(rewards), statistics).tolist() for name, f in PER_SAMPLE.items()}


@settings(max_examples=60, deadline=None)
@given(BATCHES, st.randoms(use_true_random=False))
def test_permuting_samples_changes_no_bit(batch: list[tuple[str, float]], random) -> None:
    order = list(range(len(batch)))
    random.shuffle(order)
    plain = all_advantages(*zipped(batch))
    shuffled = all_advantages(*zipped([batch[i] for i in order]))
    for name, values in plain.items():
        assert shuffled[name] == [values[i] for i in order], name


@settings(max_examples=60, deadline=None)
@given(BATCHES)
def test_statistics_are_those_of_exact_arithmetic(batch: list[tuple[str, float]]) -> None:
    groups, rewards = zipped(batch)
    statistics = advantages.group_statistics(groups, rewards)
    for i, group in enumerate(groups):
        members = [Fraction(r) for g, r in batch if g == group]
        mean = sum(members) / len(members)
        variance = sum((r - mean) ** 2 for r in members) / max(len(members) - 1, 1)
        assert statistics.mean[i].item() == pytest.approx(float(mean), rel=1e-15, abs=1e-300)
        assert statistics.std()[i].item() == pytest.approx(math.sqrt(variance), rel=1e-9, abs=1e-11)
        assert statistics.size[i] == len(members)


def test_large_rewards_keep_their_variance() -> None:
    rewards = [1e4 + x for x in (0.0, 0.1, 0.2, 0.3)]
    statistics = advantages.group_statistics("aaaa", rewards)
    assert statistics.std(ddof=0)[0].item() ** 2 == pytest.approx(0.0125, rel=1e-9)
    squares = torch.tensor(rewards, dtype=torch.float32)
    naive = squares.square().mean() - squares.mean() ** 2
    assert abs(naive.item() - 0.0125) > 1  # what sums of squares in float32 would have said


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 16])
def test_constant_float32_rewards_have_advantage_exactly_zero(size: int) -> None:
    traps = 0
    for value in torch.linspace(-2, 2, 81, dtype=torch.float32):
        rewards = value.repeat(size)
        traps += bool((rewards.mean() != value).any())
        result = all_advantages(["a"] * size + ["b", "b"], [*rewards.tolist(), 1.0, 0.0])
        for name, values in result.items():
            assert values[:size] == [0.0] * size, name
    if size == 7:
        assert traps > 0  # the mean itself is not exact: only an explicit test gives 0


def test_groups_may_be_unequal_interleaved_and_short_of_a_sample() -> None:
    groups, rewards = ["a", "b", "a", "c", "b", "a"], [1.0, 5.0, 2.0, 9.0, 7.0, 6.0]
    statistics = advantages.group_statistics(groups, rewards)
    assert statistics.mean.tolist() == [3, 6, 3, 9, 6, 3]
    assert statistics.constant.tolist() == [False, False, False, True, False, False]
    assert advantages.informative(statistics).tolist() == [True, True, True, False, True, True]
    assert advantages.leave_one_out(tensor(rewards), statistics).tolist() == [-3, -2, -1.5, 0, 2, 4.5]


def test_an_empty_batch_has_empty_statistics() -> None:
    statistics = advantages.group_statistics([], [])
    assert advantages.group_normalized(tensor([]), statistics).tolist() == []
    assert statistics.batch.size == 0


@pytest.mark.parametrize("bad", [None, math.nan, math.inf, -math.inf, "1.0", [1.0], 1j, 1e200, 10**400])
def test_a_reward_that_is_no_number_names_its_group(bad: object) -> None:
    with pytest.raises(RewardError, match=r"sample 1 of group 'p7@3': reward .* is not a finite number"):
        advantages.group_statistics(["p7@3", "p7@3"], [0.5, bad])


def test_integers_and_booleans_are_rewards() -> None:
    assert advantages.group_statistics("aa", [True, 0]).mean.tolist() == [0.5, 0.5]


def test_ids_and_rewards_must_pair_up() -> None:
    with pytest.raises(DataError, match="2 group ids for 1 rewards"):
        advantages.group_statistics(["a", "b"], [1.0])


# --- per token --------------------------------------------------------------------------------------------

TOKENS = st.lists(st.integers(0, 6), min_size=1, max_size=5)


def slow_gae(rewards: Tensor, values: Tensor, lengths: list[int], gamma: float, lam: float) -> list[float]:
    """Sum of (gamma lam)^k delta, straight from eq. 11 of arXiv 1506.02438."""
    result, start = [], 0
    for length in lengths:
        r, v = rewards[start : start + length].tolist(), [*values[start : start + length].tolist(), 0.0]
        delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(length)]
        result += [sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, length)) for t in range(length)]
        start += length
    return result


@settings(max_examples=40, deadline=None)
@given(TOKENS, st.sampled_from([0.0, 0.9, 1.0]), st.sampled_from([0.0, 0.95, 1.0]), st.integers(0, 99))
def test_gae_of_packed_rows_is_that_of_each_sequence(
    lengths: list[int], gamma: float, lam: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, sum(lengths), dtype=torch.float64, generator=generator)
    offsets = offsets_of(torch.tensor(lengths))
    result, targets = advantages.gae(rewards, values, offsets, gamma=gamma, lam=lam)
    torch.testing.assert_close(result, tensor(slow_gae(rewards, values, lengths, gamma, lam)))
    torch.testing.assert_close(targets, result + values)


def test_the_score_lies_on_the_last_row_of_each_sequence() -> None:
    offsets = offsets_of(torch.tensor([2, 0, 1]))
    old, ref = tensor([-1.0, -2.0, -3.0]), tensor([-1.5, -2.0, -math.inf])
    rewards = advantages.token_rewards(tensor([1.0, 9.0, 2.0]), old, ref, offsets, kl_coef=0.1)
    assert rewards.tolist() == pytest.approx([-0.05, 1.0, 2.0])


def test_gae_without_any_row() -> None:
    result, targets = advantages.gae(tensor([]), tensor([]), offsets_of(torch.tensor([0, 0])))
    assert result.tolist() == targets.tolist() == []


def test_whitening_of_fewer_than_two_tokens_changes_nothing() -> None:
    one, both = tensor([3.0]), tensor([3.0, 5.0])
    assert advantages.whiten(one, advantages.Spread.of_rows(one)).tolist() == [3.0]
    white = advantages.whiten(both, advantages.Spread.of_rows(both))
    torch.testing.assert_close(white, tensor([-1.0, 1.0]) / math.sqrt(2 + 1e-8))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-1e3, 1e3), max_size=20))
def test_the_spread_of_rows_is_that_of_the_same_numbers(values: list[float]) -> None:
    exact, rows = advantages.Spread.of(values), advantages.Spread.of_rows(tensor(values))
    assert (rows.size, rows.constant) == (exact.size, exact.constant)
    assert rows.mean == pytest.approx(exact.mean, rel=1e-12, abs=1e-12)
    assert rows.variance() == pytest.approx(exact.variance(), rel=1e-9, abs=1e-9)


def test_the_spread_of_too_little_is_zero() -> None:
    for values in ([], [3.0], [0.1] * 7):
        assert advantages.Spread.of_rows(tensor(values)).variance() == 0


def test_the_spread_of_rows_survives_a_large_mean() -> None:
    rows = 1e4 + torch.tensor([0.0, 0.1, 0.2, 0.3], dtype=torch.float64)
    assert advantages.Spread.of_rows(rows).variance() == pytest.approx(0.05 / 3, rel=1e-9)


def test_sequence_sums_and_means() -> None:
    sequence, values = torch.tensor([0, 2, 2]), tensor([1.0, 2.0, 4.0])
    assert sequence_sum(values, sequence, 3).tolist() == [1, 0, 6]
    assert sequence_mean(values, sequence, 3).tolist() == [1, 0, 3]
    assert spread(tensor([1.0, 2.0, 3.0]), offsets_of(torch.tensor([1, 0, 2]))).tolist() == [1, 3, 3]
