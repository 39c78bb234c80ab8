"""Losses away from the golden batch: extremes, bad input, finite differences."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mcore_rl.algo import losses, preference
from mcore_rl.algo.advantages import hybrid, hybrid_shared
from mcore_rl.algo.algorithms import objective
from mcore_rl.algo.losses import (
    adaptive_kl_coefficient,
    aggregation_weight,
    kl,
    log_ratio,
    value_loss,
    weighted_sum,
)
from mcore_rl.algo.rows import Rows, TokenLoss
from mcore_rl.errors import ConfigError

LARGEST = math.exp(20)
LOSSES: dict[str, Callable[..., TokenLoss]] = {
    "ppo": losses.ppo,
    "gspo": losses.gspo,
    "sapo": losses.sapo,
    "cispo": losses.cispo,
    "reinforce": losses.reinforce,
    "deepseek": losses.deepseek_masked,
}


def vector(*numbers: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(numbers, dtype=dtype)


def rows_of(log_prob: Tensor, old: Tensor, advantage: Tensor, rollout: Tensor | None = None) -> Rows:
    """Rows of which each is a sequence of its own."""
    rollout = old if rollout is None else rollout
    rows = Rows.of(log_prob, log_prob.detach(), old=old, rollout=rollout, advantage=advantage)
    ratios = {
        "sequence_log_ratio": log_prob.detach() - rows.old,
        "sequence_rollout_log_ratio": log_prob.detach() - rows.rollout,
    }
    return replace(rows, extras=ratios)


def clipped(token: TokenLoss) -> Tensor:
    values = token.metrics["clip/fraction"].values
    assert values is not None
    return values


def coefficient(name: str, d: Tensor, advantage: Tensor) -> tuple[TokenLoss, Tensor]:
    """(loss, dloss/dlog_prob) of tokens whose log-ratio is `d`, each a sequence of its own."""
    log_prob = torch.full_like(d, -1.0).requires_grad_()
    token = LOSSES[name](rows_of(log_prob, log_prob.detach() - d, advantage))
    return token, torch.autograd.grad(token.loss.sum(), log_prob)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LOSSES)
def test_extreme_log_ratios_give_finite_losses_and_gradients(name: str, dtype: torch.dtype) -> None:
    d = vector(-80, -20, -1, 0, 1, 20, 80, -1e30, 1e30, dtype=dtype)
    for sign in (1.0, -1.0, 0.0):
        token, gradient = coefficient(name, d, torch.full_like(d, sign))
        assert torch.isfinite(token.loss).all()
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ppo", [LARGEST, 0.0]),
        ("gspo", [LARGEST, 0.0]),
        ("sapo", [0.0, 0.0]),
        ("cispo", [1.28, math.exp(-20)]),
    ],
)
def test_a_runaway_ratio_with_negative_advantage_is_never_silently_dropped(
    name: str, expected: list[float]
) -> None:
    """At d = 80 PPO's objective is unbounded: the coefficient stays at e^20 rather than 0."""
    _, gradient = coefficient(name, vector(80, -80), vector(-1, -1))
    torch.testing.assert_close(gradient, vector(*expected))


def test_a_plain_clamp_would_have_dropped_it() -> None:
    log_prob = vector(80).requires_grad_()
    assert torch.autograd.grad(log_prob.clamp(-20, 20).exp().sum(), log_prob)[0].item() == 0
    assert torch.autograd.grad(log_ratio(log_prob, vector(0)).exp().sum(), log_prob)[0].item() == LARGEST


@pytest.mark.parametrize("bad", [-math.inf, math.inf, math.nan])
@pytest.mark.parametrize("name", LOSSES)
def test_a_token_without_finite_old_log_prob_is_masked(name: str, bad: float) -> None:
    log_prob = vector(-1, -2).requires_grad_()
    rows = rows_of(log_prob, vector(bad, -2.1), vector(-1, -1))
    loss = objective(rows, LOSSES[name](rows))
    (gradient,) = torch.autograd.grad(loss.sum(), log_prob)
    assert rows.usable.tolist() == [False, True]
    assert loss[0] == gradient[0] == 0
    assert gradient[1] != 0


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "k1_iw", "k2_iw", "k3_iw"])
def test_kl_is_finite_and_masked_the_same_way(estimator: str) -> None:
    log_prob = vector(-1, -1, -1, -90).requires_grad_()
    ref, old = vector(-math.inf, -80, -1, -1), vector(-1, -1, math.nan, -1)
    value = kl(estimator, log_prob, ref, old)
    (gradient,) = torch.autograd.grad(value.sum(), log_prob)
    assert torch.isfinite(value).all()
    assert torch.isfinite(gradient).all()
    assert value[0] == gradient[0] == 0
    if estimator == "k3":  # 89 nats away: a clamped k3 has no gradient here, where it is needed most
        assert gradient[3].item() == pytest.approx(1 - LARGEST)


def test_kl_says_what_is_wrong() -> None:
    with pytest.raises(ConfigError, match="'k4' is not one of k1, k2, k3"):
        inspect.unwrap(kl)("k4", vector(0), vector(0))  # without the check of annotations
    with pytest.raises(ConfigError, match="'k3_iw' needs old log-probs"):
        kl("k3_iw", vector(0), vector(0))


def test_adaptive_kl_moves_towards_the_target_within_its_bounds() -> None:
    assert adaptive_kl_coefficient(0.1, 6.0, 100) == pytest.approx(0.1)
    assert adaptive_kl_coefficient(0.1, 600.0, 100) == pytest.approx(0.1 * (1 + 0.2 * 100 / 10_000))
    assert adaptive_kl_coefficient(0.1, 0.0, 100) == pytest.approx(0.1 * (1 - 0.2 * 100 / 10_000))


def test_gspo_equals_the_form_differentiated_through_the_sequence_ratio() -> None:
    """arXiv 2507.18071 eq. 5, with autograd through s_i, against the token form with a constant s_i."""
    torch.manual_seed(0)
    log_prob = torch.randn(6, dtype=torch.float64).requires_grad_()
    old = log_prob.detach() - vector(2e-4, -1e-4, 5e-4, 0.3, -0.2, 0.1)
    sequence, advantage = torch.tensor([0, 0, 0, 1, 1, 1]), vector(1, 1, 1, -2, -2, -2)
    d = log_prob - old
    mean = torch.stack([d[:3].mean(), d[3:].mean()])
    s, a = mean.exp(), vector(1, -2)
    exact = torch.maximum(-a * s, -a * s.clamp(1 - 3e-4, 1 + 4e-4)).mean()
    rows = Rows.of(log_prob, log_prob.detach(), old=old, advantage=advantage)
    token = losses.gspo(replace(rows, extras={"sequence_log_ratio": mean.detach()[sequence]}))
    torch.testing.assert_close(token.loss.mean(), exact)
    gradients = [
        torch.autograd.grad(loss, log_prob, retain_graph=True)[0] for loss in (token.loss.mean(), exact)
    ]
    torch.testing.assert_close(*gradients)


def test_sapo_is_the_policy_gradient_at_ratio_one_and_fades_on_both_sides() -> None:
    token, gradient = coefficient("sapo", vector(0, 0, 1, -3), vector(2, -2, 2, 2))
    torch.testing.assert_close(gradient[:2], vector(-2, 2))
    p = 1 / (1 + math.exp(-(math.e - 1)))
    assert gradient[2].item() == pytest.approx(-2 * math.e * 4 * p * (1 - p))
    assert clipped(token).tolist() == [False, False, 4 * p * (1 - p) < 0.5, False]


def test_dual_clip_bounds_the_loss_where_the_advantage_is_negative() -> None:
    log_prob = vector(5.0, 5.0).requires_grad_()
    token = losses.ppo(rows_of(log_prob, vector(0, 0), vector(-1, -2)), dual_clip=3.0)
    assert token.loss.tolist() == [3.0, 6.0]
    assert torch.autograd.grad(token.loss.sum(), log_prob)[0].tolist() == [0.0, 0.0]


def test_deepseek_mask_needs_both_a_bad_answer_and_a_moved_policy() -> None:
    zero = vector(0, 0, 0, 0)
    rows = rows_of(zero, zero, vector(-1, -1, 1, 1), rollout=vector(0.2, -0.2, 0.2, -0.2))
    token = losses.deepseek_masked(rows, delta=0.1)
    assert clipped(token).tolist() == [True, False, False, False]
    assert token.loss.tolist() == [0, 1, -1, -1]


def test_corrections_are_bounded_and_without_gradient() -> None:
    log_weight = vector(-100, 0, math.log(1.5), 100).requires_grad_()
    for correction in losses.CORRECTIONS.values():
        weight = correction.weight(log_weight, **correction.params)
        assert torch.isfinite(weight).all()
        assert not weight.requires_grad
        assert weight[1] == 1
    assert losses.truncate(log_weight)[3] == 2
    assert losses.mask_outside(log_weight, low=0.5, high=5.0).tolist()[::3] == [0, 0]
    assert losses.keep_within(log_weight).tolist() == [0, 1, 0, 0]


def test_value_loss_cuts_the_gradient_only_on_the_far_side() -> None:
    values = vector(0.5, 0.5, 0.1).requires_grad_()
    result = value_loss(values, vector(0, 0, 0), vector(1, -1, 1), clip=0.2)
    (gradient,) = torch.autograd.grad(result.loss.sum(), values)
    assert result.clipped.tolist() == [True, False, False]
    torch.testing.assert_close(gradient, vector(0, 1.5, -0.9))


def test_kept_log_prob_always_keeps_the_sampled_token() -> None:
    logits = vector(0, 1, 2).requires_grad_()
    log_prob = preference.kept_log_prob(logits, torch.tensor(0), torch.tensor([False, True, False]))
    (gradient,) = torch.autograd.grad(log_prob, logits)
    assert log_prob.item() == pytest.approx(-math.log(1 + math.e))
    assert torch.isfinite(gradient).all()
    assert gradient[2] == 0


# --- aggregation ------------------------------------------------------------------------------------------


def test_weights_of_empty_batches_and_sequences_are_finite() -> None:
    for name in ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"):
        weight = aggregation_weight(name, vector(0, 3), tokens=0, sequences=0, max_length=4)
        assert torch.isfinite(weight).all()


def test_a_row_of_weight_zero_contributes_exactly_nothing() -> None:
    loss = vector(math.nan, 2).requires_grad_()
    total = weighted_sum(loss, vector(0, 0.5))
    assert total.item() == 1
    assert torch.autograd.grad(total, loss)[0].tolist() == [0, 0.5]
    assert math.isnan(weighted_sum(loss.detach(), vector(1e-9, 0.5)).item())


# --- finite differences, where there is no golden case ----------------------------------------------------


def finite_differences(function: Callable[[Tensor], Tensor], x: Tensor, step: float = 1e-6) -> Tensor:
    gradient = torch.zeros_like(x)
    for i in range(x.numel()):
        shift = torch.zeros_like(x)
        shift.view(-1)[i] = step
        gradient.view(-1)[i] = (function(x + shift) - function(x - shift)) / (2 * step)
    return gradient


def check_gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> None:
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(leaf), leaf)
    assert gradient.abs().max() > 1e-3
    torch.testing.assert_close(gradient, finite_differences(function, x), rtol=1e-7, atol=1e-9)
    with pytest.raises(AssertionError):  # the check can fail
        torch.testing.assert_close(gradient * 1.001, finite_differences(function, x), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("reference_point", [-0.5, 0.3])
def test_kto(reference_point: float) -> None:
    desirable = torch.tensor([True, False, True, False])
    z0 = torch.tensor(reference_point, dtype=torch.float64)
    h = vector(1.3, -0.4, -30.0, 2.0)

    def loss(h: Tensor) -> Tensor:
        losses = preference.kto(h, desirable, z0, beta=0.5, desirable_weight=1.2, undesirable_weight=0.7)
        return losses.mean()

    check_gradient(loss, h)
    at_zero = max(reference_point, 0.0)
    first = 1.2 * (1 - 1 / (1 + math.exp(-0.5 * (1.3 - at_zero))))
    second = 0.7 * (1 - 1 / (1 + math.exp(-0.5 * (at_zero + 0.4))))
    values = preference.kto(h, desirable, z0, beta=0.5, desirable_weight=1.2, undesirable_weight=0.7)
    torch.testing.assert_close(values[:2], vector(first, second))


def test_kto_reference_point_is_a_constant() -> None:
    z0 = torch.tensor(0.3, dtype=torch.float64).requires_grad_()
    assert not preference.kto(vector(1.0), torch.tensor([True]), z0).requires_grad


def test_hybrid_grpo_through_the_softmax() -> None:
    groups, rewards, values = ["a", "a", "b", "b"], vector(1, 0, 0.5, 0.25), vector(0.3, 0.4, 0.1, 0.9)
    advantage, returns = hybrid(groups, rewards, values, alpha=0.25)
    assert torch.equal(returns, rewards)
    expected = [
        0.75 * 0.5 + 0.25 * 0.7,
        -0.75 * 0.5 - 0.25 * 0.4,
        0.75 * 0.125 + 0.25 * 0.4,
        -0.75 * 0.125 - 0.25 * 0.65,
    ]
    torch.testing.assert_close(advantage, vector(*expected))
    torch.manual_seed(1)
    logits, targets = torch.randn(4, 5, dtype=torch.float64), torch.tensor([[0], [3], [1], [4]])
    old = torch.log_softmax(logits, -1).gather(1, targets)[:, 0] + vector(0.1, -0.1, 0.05, 0)

    def loss(logits: Tensor) -> Tensor:
        log_prob = torch.log_softmax(logits, -1).gather(1, targets)[:, 0]
        return losses.ppo(rows_of(log_prob, old, advantage)).loss.mean()

    check_gradient(loss, logits)
    check_gradient(lambda v: hybrid(groups, rewards, v, alpha=0.25)[0].square().sum(), values)


def test_hybrid_grpo_as_printed_cannot_tell_answers_apart() -> None:
    shared, returns = hybrid_shared(["a", "a", "b"], vector(1, 0, 0.5), vector(0.3, 0.4, 0.1))
    torch.testing.assert_close(returns, vector(1, 0, 0.5).tanh())
    assert shared[0] == shared[1] != shared[2]


@pytest.mark.parametrize("mean", [-1e-9, 0.0, -50.0])
def test_orpo_survives_certain_and_impossible_answers(mean: float) -> None:
    chosen, rejected = vector(mean).requires_grad_(), vector(-0.5).requires_grad_()
    loss = preference.orpo_odds(chosen, rejected).sum()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(loss, (chosen, rejected)))


def test_preference_losses_of_a_large_margin_are_finite() -> None:
    margins = vector(-1e4, 0, 1e4).requires_grad_()
    for loss in (preference.dpo, preference.robust_dpo, preference.ipo):
        value = loss(margins)
        assert torch.isfinite(value).all()
        assert torch.isfinite(torch.autograd.grad(value.sum(), margins)[0]).all()
