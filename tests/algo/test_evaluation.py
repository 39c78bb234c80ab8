"""pass@k and majority@k against all subsets of the samples; what the intervals cover, by simulation."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from statistics import fmean

import pytest

from mcore_rl.algo.evaluation import interval, majority_at_k, pass_at_k, student_quantile

Votes = Sequence[tuple[str | None, bool]]
"""of each sample: its answer, and whether it passes"""


@pytest.mark.parametrize("samples", range(1, 8))
def test_pass_at_k_is_the_mean_over_all_subsets(samples: int) -> None:
    for passed in range(samples + 1):
        right = [True] * passed + [False] * (samples - passed)
        for k in range(1, samples + 1):
            exact = fmean(any(subset) for subset in combinations(right, k))
            assert pass_at_k(samples, passed, k) == pytest.approx(exact, abs=1e-15)


def test_the_biased_estimate_is_another_number() -> None:
    """1 - (1 - c/n)^k, and what a resampling with replacement gives: the control."""
    assert pass_at_k(4, 1, 4) == 1.0
    assert pytest.approx(0.684, abs=1e-3) == 1 - (1 - 1 / 4) ** 4


def test_pass_at_k_of_many_samples_is_exact() -> None:
    assert pass_at_k(1024, 1, 512) == 0.5
    assert pass_at_k(1024, 1023, 2) == 1.0


@pytest.mark.parametrize(("samples", "passed", "k"), [(4, 5, 1), (4, -1, 1), (4, 1, 5), (4, 1, 0), (0, 0, 1)])
def test_what_cannot_have_been_counted_is_refused(samples: int, passed: int, k: int) -> None:
    with pytest.raises(ValueError, match="pass@"):
        pass_at_k(samples, passed, k)


def elected(votes: Votes, k: int) -> float:
    """majority@k by enumeration; the worth of an answer is the share of all its samples that pass."""
    counts = Counter(answer for answer, _ in votes)
    right = Counter(answer for answer, passes in votes if passes)
    worth = []
    for subset in combinations(votes, k):
        cast = Counter(answer for answer, _ in subset if answer is not None)
        first = [answer for answer, count in cast.items() if count == max(cast.values())]
        worth.append(fmean(right[answer] / counts[answer] for answer in first) if first else 0.0)
    return fmean(worth)


def estimate(votes: Votes, k: int) -> float:
    counts = Counter(answer for answer, _ in votes)
    right = Counter(answer for answer, passes in votes if passes)
    silent = counts.pop(None, 0)
    return majority_at_k([(count, right[answer] / count) for answer, count in counts.items()], k, silent)


def test_majority_at_k_is_the_mean_over_all_subsets() -> None:
    draw = random.Random(0)
    for _ in range(120):
        answers = [None, *"abcde"][: draw.randint(2, 6)]
        votes = [(draw.choice(answers), draw.random() < 0.5) for _ in range(draw.randint(1, 8))]
        for k in range(1, len(votes) + 1):
            assert estimate(votes, k) == pytest.approx(elected(votes, k), abs=1e-12)


def test_a_tie_is_shared_and_silence_elects_nobody() -> None:
    assert majority_at_k([(2, 1.0), (2, 0.0), (1, 1.0)], 5) == 0.5
    assert majority_at_k([(1, 1.0)], 3, silent=2) == 1.0, "silence does not vote"
    assert majority_at_k([], 2, silent=2) == 0.0
    assert majority_at_k([(1, 1.0)], 1, silent=1) == 0.5
    with pytest.raises(ValueError, match="majority@3 of 2"):
        majority_at_k([(1, 1.0)], 3, silent=1)


def test_majority_at_k_of_many_samples_stays_within_its_range() -> None:
    votes = [(300, 1.0), (299, 0.0), (1, 1.0)]
    assert 0.4 < majority_at_k(votes, 3) < 0.6
    assert majority_at_k(votes, 600) == 1.0


def test_the_quantile_is_the_one_of_the_tables() -> None:
    table = {1: 12.7062, 2: 4.3027, 3: 3.1824, 5: 2.5706, 10: 2.2281, 30: 2.0423, 31: 2.0395, 120: 1.9799}
    assert {n: round(student_quantile(n), 4) for n in table} == table


def test_of_one_sample_a_prompt_a_rate_has_the_interval_of_wilson() -> None:
    """12 of 400, where Student's factor is nearly 1: Wilson gives 0.0172 and 0.0517."""
    found = interval([1.0] * 12 + [0.0] * 388, 400, rate=True)
    assert found == pytest.approx((0.0172, 0.0517), abs=2e-4)


def test_a_rate_of_0_or_1_has_a_width_and_one_prompt_has_no_interval() -> None:
    low, high = interval([1.0] * 20, 80, rate=True) or (0.0, 0.0)
    assert (0.8 < low < 0.9, high) == (True, 1.0)
    assert interval([0.5], 8, rate=True) is None
    assert interval([-3.0, -3.0], 2, rate=False) == (-3.0, -3.0)
    assert interval([0.5, 0.5], 4, rate=True) != (0.5, 0.5)


def coverage(prompts: int, samples: int, hardness: tuple[float, float], clustered: bool) -> float:
    """How often the interval of a simulated evaluation has the true mean."""
    draw, a, b = random.Random(prompts * 100 + samples), *hardness
    hits, rounds = 0, 400
    for _ in range(rounds):
        chances = [draw.betavariate(a, b) for _ in range(prompts)]
        drawn = [[float(draw.random() < chance) for _ in range(samples)] for chance in chances]
        values = [fmean(each) for each in drawn] if clustered else [value for each in drawn for value in each]
        low, high = interval(values, prompts * samples, rate=True) or (1.0, 0.0)
        hits += low <= a / (a + b) <= high
    return hits / rounds


@pytest.mark.parametrize("hardness", [(5, 5), (0.5, 0.5), (9, 1), (0.2, 0.8)])
@pytest.mark.parametrize(("prompts", "samples"), [(15, 1), (15, 8), (60, 1), (60, 4)])
def test_the_interval_covers_what_it_says(prompts: int, samples: int, hardness: tuple[float, float]) -> None:
    """The bound is three standard errors of 400 rounds below 0.95."""
    assert coverage(prompts, samples, hardness, clustered=True) >= 0.915


def test_samples_that_count_as_prompts_cover_too_little() -> None:
    """The negative control: 16 samples of a prompt are not 16 observations."""
    assert coverage(60, 16, (0.5, 0.5), clustered=False) < 0.6
