"""The losses of sequences and of masks beside their papers' formulas, sequence by sequence in plain Python.

A reference is the objective of the paper as one number, differentiated whole by finite differences; what the
paper holds constant (a detached weight, a mask) is computed once, at the base point.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from mcore_rl.algo.advantages import offsets_of, sequence_mean, sequence_sum, sums_ahead
from mcore_rl.algo.algorithms import ALGORITHMS, Algorithm, configure, objective
from mcore_rl.algo.losses import aggregation_weight, weighted_sum
from mcore_rl.algo.masked_losses import bernoulli_kl
from mcore_rl.algo.readings import mark, readings
from mcore_rl.algo.rows import Rows, TokenLoss, marks
from mcore_rl.errors import ConfigError

LENGTHS = (3, 1, 5, 4, 2)
ADVANTAGE = (1.2, -0.7, 0.4, -1.5, 0.0)


@dataclass(frozen=True)
class Data:
    """Lists of lists: one inner list per sequence."""

    log_prob: list[list[float]]
    old: list[list[float]]
    rollout: list[list[float]]

    @classmethod
    def drawn(cls, spread: float, seed: int = 0) -> Data:
        rng = np.random.default_rng(seed)
        now = [np.minimum(-rng.exponential(0.7, n) - 0.02, -0.02) for n in LENGTHS]
        old = [np.minimum(x + spread * rng.standard_normal(len(x)), -0.01) for x in now]
        rollout = [np.minimum(x + 0.4 * spread * rng.standard_normal(len(x)), -0.005) for x in old]
        return cls(*([list(map(float, x)) for x in part] for part in (now, old, rollout)))


def by_library(algorithm: Algorithm, data: Data) -> tuple[float, Tensor]:
    """(loss, d loss / d log_prob [R]) with everything the loss declares."""
    n = torch.tensor(LENGTHS)
    sequence = torch.arange(len(LENGTHS)).repeat_interleave(n)
    flat = [
        torch.tensor(joined(part), dtype=torch.float64) for part in (data.log_prob, data.old, data.rollout)
    ]
    log_prob = flat[0].clone().requires_grad_()
    advantage = torch.tensor(ADVANTAGE, dtype=torch.float64)[sequence]
    rows = Rows.of(log_prob, -log_prob.detach(), old=flat[1], rollout=flat[2], advantage=advantage)

    def sums(values: Tensor, among: Tensor) -> tuple[Tensor, Tensor]:
        return (
            sequence_sum(values, sequence, len(LENGTHS))[sequence],
            sequence_mean(values, sequence, len(LENGTHS))[sequence],
        )

    place = torch.cat([torch.arange(count) for count in LENGTHS])

    def ahead(values: Tensor, discount: float) -> Tensor:
        grid = values.new_zeros(len(LENGTHS), max(LENGTHS)).index_put((sequence, place), values)
        return sums_ahead(grid, discount)[sequence, place]

    params = algorithm.loss_params
    chosen = mark(algorithm.loss, params, advantage, flat[1], flat[2])
    extras = readings(algorithm.loss, rows, params, sums, marked=chosen, ahead=ahead)
    token = algorithm.loss(replace(rows, extras=extras), **params)
    weight = aggregation_weight(
        algorithm.aggregation, n.double()[sequence], tokens=sum(LENGTHS), sequences=len(LENGTHS), max_length=9
    )
    loss = weighted_sum(objective(rows, token), weight)
    return loss.item(), torch.autograd.grad(loss, log_prob)[0]


def differences(of: Callable[[list[list[float]]], float], at: Sequence[Sequence[float]]) -> Tensor:
    """Central differences of one number by every log-prob."""
    found = []
    for i, own in enumerate(at):
        for t in range(len(own)):
            ends = []
            for step in (1e-6, -1e-6):
                moved = [list(x) for x in at]
                moved[i][t] += step
                ends.append(of(moved))
            found.append((ends[0] - ends[1]) / 2e-6)
    return torch.tensor(found, dtype=torch.float64)


def agree(name: str, data: Data, reference: Callable[[list[list[float]]], float], **params):
    loss, gradient = by_library(configure(name, params), data)
    expected = differences(reference, data.log_prob)
    torch.testing.assert_close(gradient, expected, rtol=1e-7, atol=1e-8)
    assert gradient.abs().max() > 1e-3
    assert loss == pytest.approx(reference(data.log_prob), rel=1e-12, abs=1e-12)


def joined(parts: Sequence[Sequence[float]]) -> list[float]:
    return [x for part in parts for x in part]


def means(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


TOKENS = sum(LENGTHS)
SPREADS = (0.05, 0.6)


@pytest.mark.parametrize("spread", SPREADS)
def test_gmpo_is_the_geometric_mean_of_clipped_ratios(spread: float) -> None:
    """2507.20673: (prod_t min(r^s, clip(r)^s)^s)^(1/n) A with s the sign of A."""
    data = Data.drawn(spread)

    def reference(log_prob: list[list[float]]) -> float:
        each = []
        for now, old, a in zip(log_prob, data.old, ADVANTAGE, strict=True):
            ratios = [math.exp(x - y) for x, y in zip(now, old, strict=True)]
            low, high = math.exp(-0.3), math.exp(0.2)
            sign = 1 if a > 0 else -1
            used = [min(r**sign, min(max(r, low), high) ** sign) ** sign for r in ratios]
            each.append(-a * math.prod(used) ** (1 / len(used)))
        return means(each)

    agree("gmpo", data, reference, clip_low=0.3, clip_high=0.2)


@pytest.mark.parametrize("spread", SPREADS)
def test_sapo_with_the_ratio_of_the_sequence(spread: float) -> None:
    data = Data.drawn(spread)

    def reference(log_prob: list[list[float]]) -> float:
        each = []
        for now, old, a in zip(log_prob, data.old, ADVANTAGE, strict=True):
            s = math.exp(means([x - y for x, y in zip(now, old, strict=True)]))
            tau = 1.0 if a > 0 else 1.05
            each.append(-a * 4 / tau / (1 + math.exp(-tau * (s - 1))))
        return means(each)

    agree("sapo-sequence", data, reference)


@pytest.mark.parametrize(("dual_clip", "shift"), [(None, 0.0), (1.2, 0.0), (1.2, -1.0)])
def test_gspo_with_dual_clip_and_over_what_is_kept(dual_clip: float | None, shift: float) -> None:
    """2507.18071 eq. 5; without a rejection `gspo-kept` is the same. The shift is of one with A < 0."""
    data = Data.drawn(0.3)
    data = replace(data, old=[*data.old[:3], [x + shift for x in data.old[3]], data.old[4]])

    def reference(log_prob: list[list[float]]) -> float:
        each = []
        for now, old, a in zip(log_prob, data.old, ADVANTAGE, strict=True):
            s = math.exp(means([x - y for x, y in zip(now, old, strict=True)]))
            loss = max(-a * s, -a * min(max(s, 1 - 0.1), 1 + 0.2))
            each.append(min(loss, -a * dual_clip) if a < 0 and dual_clip else loss)
        return means(each)

    given = {"eps_low": 0.1, "eps_high": 0.2, "dual_clip": dual_clip}
    for name in ("gspo", "gspo-kept"):
        agree(name, data, reference, **given)


@pytest.mark.parametrize("spread", SPREADS)
def test_vespo_weighs_by_a_gamma_of_the_product_of_ratios(spread: float) -> None:
    """2602.10693: W^k e^(lambda (1 - W)) with W over the trajectory; the weight has no gradient."""
    data = Data.drawn(spread)
    weights = []
    for now, rollout, a in zip(data.log_prob, data.rollout, ADVANTAGE, strict=True):
        w = math.prod(math.exp(x - y) for x, y in zip(now, rollout, strict=True))
        k, decay = (2.0, 3.0) if a >= 0 else (3.0, 2.0)
        weights.append(w**k * math.exp(decay * (1 - w)))

    def reference(log_prob: list[list[float]]) -> float:
        return (
            -math.fsum(w * a * sum(x) for w, a, x in zip(weights, ADVANTAGE, log_prob, strict=True)) / TOKENS
        )

    agree("vespo", data, reference)


@pytest.mark.parametrize("spread", SPREADS)
def test_topr_learns_what_is_rewarded_and_leaves_what_has_become_unlikely(spread: float) -> None:
    data = Data.drawn(spread)
    weights = []
    for now, rollout, a in zip(data.log_prob, data.rollout, ADVANTAGE, strict=True):
        w = math.exp(sum(now) - sum(rollout))
        weights.append(min(w, 1.0) if a < 0 else 1.0)

    def reference(log_prob: list[list[float]]) -> float:
        return -means([w * a * sum(x) for w, a, x in zip(weights, ADVANTAGE, log_prob, strict=True)])

    agree("topr", data, reference)


@pytest.mark.parametrize("spread", SPREADS)
def test_fipo_weighs_a_token_by_what_follows_it(spread: float) -> None:
    """2603.19835: e^F, F_t = sum_k 2^(-(k - t) / h) d_k over r_k <= c, clipped; then PPO with a dual clip."""
    data = Data.drawn(spread, seed=1)
    low, high, c, h = 0.9, 1.2, 1.5, 2.0
    weights, clipped = [], set()
    for now, old in zip(data.log_prob, data.old, strict=True):
        d = [x - y if x - y <= math.log(c) else 0.0 for x, y in zip(now, old, strict=True)]
        for t in range(len(d)):
            raw = math.exp(sum(2 ** (-(k - t) / h) * d[k] for k in range(t, len(d))))
            weights.append(min(max(raw, low), high))
            clipped.add(weights[-1] in (low, high))
    assert clipped == ({True, False} if spread > 0.1 else {False, True} & clipped)

    def reference(log_prob: list[list[float]]) -> float:
        now, total = joined(log_prob), 0.0
        for i, (_, old, _, a) in enumerate(tokens(data)):
            r, weighted = math.exp(now[i] - old), weights[i] * a
            loss = max(-weighted * r, -weighted * min(max(r, 0.8), 1.28))
            total += min(loss, -weighted * c) if a < 0 else loss
        return total / TOKENS

    agree("fipo", data, reference, dual_clip=c, half_life=h, weight_low=low, weight_high=high)
    if spread > 0.1:  # the control: without what follows
        weights = [min(max(math.exp(x - old), low), high) for x, old, _, _ in tokens(data)]
        with pytest.raises(AssertionError):
            agree("fipo", data, reference, dual_clip=c, half_life=h, weight_low=low, weight_high=high)


def tokens(data: Data) -> list[tuple[float, float, float, float]]:
    """(log_prob, old, rollout, advantage) of every token."""
    return [
        (x, o, r, a)
        for now, old, rollout, a in zip(data.log_prob, data.old, data.rollout, ADVANTAGE, strict=True)
        for x, o, r in zip(now, old, rollout, strict=True)
    ]


def kl_of_bernoullis(p: float, q: float) -> float:
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("kind", ["tv", "kl"])
def test_dppo_masks_what_leaves_the_region_further(kind: str, spread: float) -> None:
    """2602.04879: sg(min(r, C)) A log p where the divergence is within delta, or the update leads back."""
    data = Data.drawn(spread)
    weights, outside = [], 0
    for x, _, r, a in tokens(data):
        p, mu = math.exp(x), math.exp(r)
        distance = abs(p - mu) if kind == "tv" else kl_of_bernoullis(mu, p)
        leaves = (p > mu) if a > 0 else (p < mu)
        delta = 0.08 if kind == "tv" else 0.02
        outside += leaves and distance > delta
        weights.append(0.0 if leaves and distance > delta else min(p / mu, 1.1))
    assert bool(outside) == (spread > 0.1)

    def reference(log_prob: list[list[float]]) -> float:
        rows = [
            (x, r)
            for now, old in zip(log_prob, data.rollout, strict=True)
            for x, r in zip(now, old, strict=True)
        ]
        total = 0.0
        for (x, r), w, (_, _, _, a) in zip(rows, weights, tokens(data), strict=True):
            total += -w * a * x + 0.3 * (x - r) ** 2
        return total / TOKENS

    bounds = {f"{kind}_{end}": 0.08 if kind == "tv" else 0.02 for end in ("low", "high")}
    agree(f"dppo-{kind}", data, reference, **bounds, cap=1.1, drift=0.3)


def test_the_binary_kl_is_that_of_two_coins() -> None:
    p, q = torch.tensor([0.3, 0.9, 0.5]).double(), torch.tensor([0.5, 0.2, 0.5]).double()
    expected = [kl_of_bernoullis(*pair) for pair in zip(p.tolist(), q.tolist(), strict=True)]
    torch.testing.assert_close(bernoulli_kl(p.log(), q.log()), torch.tensor(expected, dtype=torch.float64))
    assert torch.isfinite(bernoulli_kl(torch.tensor([0.0, -50.0]), torch.tensor([-50.0, 0.0]))).all()


@pytest.mark.parametrize("limit", [1e-6, 0.01, 0.05, 10.0])
def test_m2po_leaves_out_the_farthest_until_the_second_moment_is_small(limit: float) -> None:
    """2510.01161, one token after the other."""
    data = Data.drawn(0.6)
    left = sorted(range(TOKENS), key=lambda i: (tokens(data)[i][1] - tokens(data)[i][2]) ** 2)
    while left and means([(tokens(data)[i][1] - tokens(data)[i][2]) ** 2 for i in left]) > limit:
        left.pop()

    def reference(log_prob: list[list[float]]) -> float:
        flat = joined(log_prob)
        terms = [-tokens(data)[i][3] * math.exp(flat[i] - tokens(data)[i][2]) for i in left]
        return math.fsum(terms) / TOKENS

    if left:
        agree("m2po", data, reference, second_moment=limit)
    flat = torch.tensor(tokens(data), dtype=torch.float64)
    chosen = mark(ALGORITHMS["m2po"].loss, {"second_moment": limit}, flat[:, 3], flat[:, 1], flat[:, 2])
    assert sorted(torch.nonzero(~chosen)[:, 0].tolist()) == sorted(left)


def covariances(data: Data) -> list[float]:
    rows = tokens(data)
    a, p = means([row[3] for row in rows]), means([row[1] for row in rows])
    return [(row[3] - a) * (row[1] - p) for row in rows]


def test_kl_cov_penalises_the_tokens_of_largest_covariance() -> None:
    """2505.22617; 15 tokens, a fifth of which are 3."""
    data = Data.drawn(0.6)
    values = covariances(data)
    chosen = sorted(range(TOKENS), key=lambda i: -values[i])[:3]

    def reference(log_prob: list[list[float]]) -> float:
        flat = joined(log_prob)
        total = 0.0
        for i, (_, old, _, a) in enumerate(tokens(data)):
            total += -a * math.exp(flat[i] - old) + (0.7 * abs(flat[i] - old) if i in chosen else 0.0)
        return total / TOKENS

    agree("kl-cov", data, reference, fraction=0.2, penalty=0.7)


def test_clip_cov_leaves_out_some_tokens_of_a_band_of_covariance() -> None:
    """2505.22617: which of the band are drawn is free, how many and from where is not."""
    data = Data.drawn(0.6)
    values = covariances(data)
    given = {"fraction": 0.15, "cov_low": 0.1, "cov_high": 0.9}
    flat = torch.tensor(tokens(data), dtype=torch.float64)
    chosen = mark(ALGORITHMS["clip-cov"].loss, given, flat[:, 3], flat[:, 1], flat[:, 2])
    band = [i for i, value in enumerate(values) if 0.1 < value < 0.9]
    drawn = torch.nonzero(chosen)[:, 0].tolist()
    assert len(drawn) == 2
    assert set(drawn) < set(band)
    again = mark(ALGORITHMS["clip-cov"].loss, given, flat[:, 3], flat[:, 1], flat[:, 2])
    assert torch.equal(chosen, again)

    def reference(log_prob: list[list[float]]) -> float:
        now, total = joined(log_prob), 0.0
        for i, (_, old, _, a) in enumerate(tokens(data)):
            r = math.exp(now[i] - old)
            total += 0.0 if i in drawn else max(-a * r, -a * min(max(r, 0.8), 1.2))
        return total / TOKENS

    agree("clip-cov", data, reference, **given)


@pytest.mark.parametrize("spread", SPREADS)
def test_dro_is_a_quadratic_in_the_log_ratio(spread: float) -> None:
    data = Data.drawn(spread)

    def reference(log_prob: list[list[float]]) -> float:
        flat = joined(log_prob)
        terms = [-a * flat[i] + 0.25 * (flat[i] - old) ** 2 for i, (_, old, _, a) in enumerate(tokens(data))]
        return math.fsum(terms) / TOKENS

    agree("dro", data, reference, tau=0.5)


def test_cispo_with_a_lower_bound_that_acts() -> None:
    data = Data.drawn(0.6)
    weights = [min(max(math.exp(x - old), 0.8), 1.28) for x, old, _, _ in tokens(data)]
    assert (min(weights), max(weights)) == (0.8, 1.28)

    def reference(log_prob: list[list[float]]) -> float:
        flat = joined(log_prob)
        return (
            -math.fsum(w * row[3] * x for w, row, x in zip(weights, tokens(data), flat, strict=True)) / TOKENS
        )

    agree("cispo", data, reference, eps_low=0.2)
    with pytest.raises(AssertionError):  # the control: without the bound
        agree("cispo", data, reference)


def test_a_wrong_reference_is_seen() -> None:
    """The control of all of these: GMPO beside GSPO's mean of what is not clipped."""
    data = Data.drawn(0.6)

    def reference(log_prob: list[list[float]]) -> float:
        pairs = zip(log_prob, data.old, ADVANTAGE, strict=True)
        return means([-a * math.exp(means([x - y for x, y in zip(n, o, strict=True)])) for n, o, a in pairs])

    with pytest.raises(AssertionError):
        agree("gmpo", data, reference, clip_low=0.3, clip_high=0.2)


def test_a_mark_must_be_one_bool_per_row_and_must_be_declared() -> None:
    numbers = torch.zeros(3, dtype=torch.float64)

    @marks(lambda advantage, old, rollout: advantage)
    def wrong(rows: Rows) -> TokenLoss:
        return TokenLoss(-rows.log_prob)

    with pytest.raises(ConfigError, match="must return one bool per row"):
        mark(wrong, {}, numbers, numbers, numbers)
    with pytest.raises(ConfigError, match=r"write @marks\(choice\) above the function"):
        _ = Rows.of(numbers, numbers, advantage=numbers).marked
    broken = torch.tensor([math.nan, 0.0, -0.5], dtype=torch.float64)
    found = mark(ALGORITHMS["m2po"].loss, {"second_moment": 1e-9}, numbers, broken, numbers)
    assert found.tolist() == [False, False, True], "what is not finite has no part in the choice"


def test_offsets_of_nothing_and_a_rollout_without_tokens_have_no_mark() -> None:
    none = torch.zeros(0, dtype=torch.float64)
    assert offsets_of(torch.zeros(0, dtype=torch.int64)).tolist() == [0]
    for name in ("m2po", "kl-cov", "clip-cov"):
        algorithm = ALGORITHMS[name]
        assert mark(algorithm.loss, algorithm.loss_params, none, none, none).shape == (0,)
