"""The lm_head gradient-scale diagnostic: identities, the bound on any data, the expectation on policy."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mcore_rl.algo.metrics import ALERT_RATIO, check_surprise, gradient_scale, gradient_scale_sums
from mcore_rl.errors import NumericsError
from mcore_rl.parallel.head import dense_log_prob_entropy

TEMPERATURE = 0.7


def scored(
    rows: int, vocabulary: int, scale: float, seed: int, *, on_policy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(logits, log_prob, entropy) of random rows; targets drawn from the policy, or uniformly."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(rows, vocabulary, dtype=torch.float64, generator=generator)
    p = torch.softmax(logits / TEMPERATURE, -1) if on_policy else torch.ones_like(logits)
    targets = torch.multinomial(p, 1, generator=generator)[:, 0]
    eye = torch.eye(vocabulary, dtype=torch.float64)
    return logits, *dense_log_prob_entropy(logits.requires_grad_(), eye, targets, TEMPERATURE)


def test_measured_is_the_l1_norm_of_the_gradient_in_the_logits() -> None:
    logits, log_prob, entropy = scored(50, 11, 2.0, 0, on_policy=False)
    advantage = torch.linspace(-2, 2, 50, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((-advantage * log_prob).sum(), logits)
    scale = gradient_scale(gradient_scale_sums(log_prob, entropy, advantage, -advantage))
    assert scale.measured == pytest.approx(gradient.abs().sum(1).mean().item() * TEMPERATURE / 2)
    torch.testing.assert_close(gradient.sum(1), torch.zeros(50, dtype=torch.float64))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 30), st.integers(2, 12), st.sampled_from([0.0, 0.1, 1.0, 10.0, 300.0]), st.integers(0, 999)
)
def test_surprise_is_bounded_by_cross_entropy(rows: int, v: int, scale: float, seed: int) -> None:
    _, log_prob, entropy = scored(rows, v, scale, seed, on_policy=False)
    ones = torch.ones_like(log_prob)
    check_surprise(gradient_scale(gradient_scale_sums(log_prob, entropy, ones, ones)))


def test_numbers_that_are_no_log_probs_fail_the_check() -> None:
    scale = gradient_scale(torch.tensor([0.0, 0.0, 0.9, 0.5, 1.0], dtype=torch.float64))
    with pytest.raises(NumericsError, match="temperature, vocabulary padding"):
        check_surprise(scale)
    with pytest.raises(NumericsError):
        check_surprise(scale._replace(surprise=math.nan))


def test_on_policy_the_ratio_stays_below_one_and_another_temperature_raises_the_alert() -> None:
    _, log_prob, entropy = scored(20_000, 8, 1.5, 3, on_policy=True)
    ones = torch.ones_like(log_prob)
    assert 0.7 < gradient_scale(gradient_scale_sums(log_prob, entropy, ones, -ones)).ratio < 1
    _, log_prob, entropy = scored(20_000, 8, 1.5, 3, on_policy=False)
    assert gradient_scale(gradient_scale_sums(log_prob, entropy, ones, -ones)).ratio > ALERT_RATIO


def test_sums_add_up_and_no_token_is_no_scale() -> None:
    _, log_prob, entropy = scored(6, 5, 1.0, 0, on_policy=True)
    ones = torch.ones_like(log_prob)
    whole = gradient_scale_sums(log_prob, entropy, ones, ones)
    parts = [
        gradient_scale_sums(*(x[part] for x in (log_prob, entropy, ones, ones)))
        for part in (slice(0, 2), slice(2, 6))
    ]
    torch.testing.assert_close(sum(parts), whole)
    nothing = gradient_scale(torch.zeros(5, dtype=torch.float64))
    assert nothing == (0, 0, 0, 0)
    assert nothing.ratio == 0
    check_surprise(nothing)
