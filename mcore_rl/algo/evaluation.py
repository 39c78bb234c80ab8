"""What the samples of held-out prompts say: pass@k, majority@k, and how far a mean can be trusted.

A prompt has n samples, of which any k could have been drawn. Both estimates below are the mean over all
subsets of k of them, without bias; a resampling of the n with replacement would be biased.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, pvariance, variance

import torch
from torch import Tensor

LEVEL = 0.95
"""confidence level of the intervals"""
_Z = NormalDist().inv_cdf((1 + LEVEL) / 2)
_EXACT = 30
"""degrees of freedom up to which Student's quantile is not taken from its expansion"""


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k): the chance that one of k samples passes, where `passed` = c of n did.

    Chen et al. 2021, arXiv 2107.03374, eq. 1. Raises ValueError where k is not within 1..n or c not within
    0..n.
    """
    if not (1 <= k <= samples and 0 <= passed <= samples):
        raise ValueError(f"pass@{k} of {passed} in {samples} samples")
    return 1 - math.comb(samples - passed, k) / math.comb(samples, k)


def majority_at_k(votes: Sequence[tuple[int, float]], k: int, silent: int = 0) -> float:
    """The expected worth of the answer that most of k samples give, over all subsets of k samples.

    Where several answers have the most votes, each of them is chosen with the same chance. Where none of the
    k samples gives an answer, the worth is 0.

    Args:
        votes: (samples, worth) of every distinct answer; the worth is the share of its samples that pass.
        k: how many of the n samples vote.
        silent: samples without an answer.

    Raises:
        ValueError: k is not within 1..n.
    """
    counts = [count for count, _ in votes]
    total = sum(counts) + silent
    if not 1 <= k <= total:
        raise ValueError(f"majority@{k} of {total} samples")
    if k == total:
        first = max(counts, default=0)
        return fmean(worth for count, worth in votes if count == first) if first else 0.0
    # answers with as many votes are chosen as often: once for each count is enough
    chosen = {count: _chosen(counts, counts.index(count), k, silent) for count in set(counts)}
    return sum(worth * chosen[count] for count, worth in votes if worth) / math.comb(total, k)


def _chosen(counts: Sequence[int], answer: int, k: int, silent: int) -> float:
    """In how many subsets of k the answer is chosen; one that it shares with r others counts 1 / (1 + r)."""
    others = [count for place, count in enumerate(counts) if place != answer]
    found = 0.0
    for most in range(1, min(k, counts[answer]) + 1):
        rest = k - most
        ways = torch.zeros(rest // most + 1, rest + 1, dtype=torch.float64)
        """[ties, samples of others] in how many ways, no other answer having more than `most`"""
        ways[0] = torch.tensor([math.comb(silent, taken) for taken in range(rest + 1)], dtype=torch.float64)
        for count in others:
            ways = _with_one_more(ways, count, most)
        shared = 1 / (1 + torch.arange(len(ways), dtype=torch.float64))
        found += math.comb(counts[answer], most) * float((shared * ways[:, rest]).sum())
    return found


def _with_one_more(ways: Tensor, count: int, most: int) -> Tensor:
    ties, size = ways.shape
    new = torch.zeros_like(ways)
    for taken in range(min(most - 1, count, size - 1) + 1):
        new[:, taken:] += math.comb(count, taken) * ways[:, : size - taken]
    if most <= min(count, size - 1) and ties > 1:
        new[1:, most:] += math.comb(count, most) * ways[:-1, : size - most]
    return new


def interval(values: Sequence[float], samples: int, *, rate: bool) -> tuple[float, float] | None:
    """The 95 % interval of the mean of one value per prompt; None of fewer than two prompts.

    Prompts are what was drawn, and the samples of one belong together: a prompt counts as one observation
    however many samples it has. A rate, whose values lie in [0, 1], has Wilson's score interval with the
    effective number of prompts n p (1 - p) / var, at most `samples`, as Korn and Graubard 1998 (Survey
    Methodology 24, p. 193) adjust it by Student's quantile: near 0 and 1 the normal interval would have no
    width. Other values have Student's interval. No random number is drawn.

    Args:
        samples: of all prompts.
        rate: the values lie in [0, 1].
    """
    prompts = len(values)
    if prompts < 2:
        return None
    mean, t = fmean(values), student_quantile(prompts - 1)
    if not rate:
        half = t * math.sqrt(variance(values, mean) / prompts)
        return mean - half, mean + half
    spread, at_most = pvariance(values, mean), mean * (1 - mean)
    alike = prompts if at_most <= 0 else samples
    effective = min(samples, prompts * at_most / spread) if spread > 0 else alike
    size = effective * (_Z / t) ** 2
    centre = (mean + _Z**2 / (2 * size)) / (1 + _Z**2 / size)
    half = _Z / (1 + _Z**2 / size) * math.sqrt(at_most / size + _Z**2 / (4 * size**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def student_quantile(freedom: int) -> float:
    """Student's t that 2.5 % lie above, of 1 or more degrees of freedom.

    Up to 30 by bisection of its distribution, a finite sum for whole numbers (Abramowitz and Stegun 26.7.3,
    26.7.4); above by its expansion about the normal quantile (26.7.5), which is off by less than 1e-6.
    """
    if freedom > _EXACT:
        z, v = _Z, float(freedom)
        return (
            z
            + (z**3 + z) / (4 * v)
            + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
            + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
            + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * v**4)
        )
    low, high = 0.0, math.pi / 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < LEVEL else (low, middle)
    return math.tan(low) * math.sqrt(freedom)


def _within(angle: float, freedom: int) -> float:
    """P(|T| <= tan(angle) sqrt(freedom))."""
    cosine = math.cos(angle)
    odd = freedom % 2
    term, total = (cosine if odd else 1.0), 0.0
    for power in range(1 + odd, freedom, 2):
        total += term
        term *= cosine**2 * power / (power + 1)
    if odd:
        return 2 / math.pi * (angle + math.sin(angle) * total)
    return math.sin(angle) * total
