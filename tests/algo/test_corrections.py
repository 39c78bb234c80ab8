"""Rejection by rules, weights of mean 1, lower bounds, and the estimators of the KL, beside plain Python."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mcore_rl.algo.algorithms import configure
from mcore_rl.algo.corrections import Rejection, correction_weight, distance, parse_rules
from mcore_rl.algo.losses import kl, truncate
from mcore_rl.errors import ConfigError

OLD = [[-0.5, -1.0, -0.2], [-2.0], [-0.1, -0.7]]
ROLLOUT = [[-0.6, -0.4, -0.25], [-2.1], [-0.9, -0.7]]
SEQUENCE = torch.tensor([0, 0, 0, 1, 2, 2])
REDUCED = {"sequence-sum": math.fsum, "sequence-mean": lambda x: math.fsum(x) / len(x), "sequence-max": max}


def flat(parts: list[list[float]]) -> Tensor:
    return torch.tensor([x for part in parts for x in part], dtype=torch.float64)


def reduce(values: Tensor, reads: str) -> Tensor:
    each = [REDUCED[reads](values[s == SEQUENCE].tolist()) for s in range(3)]
    return torch.tensor(each, dtype=torch.float64)[SEQUENCE]


def of_token(name: str, old: float, rollout: float) -> float:
    p, q = math.exp(old), math.exp(rollout)
    both = [a * math.log(a / b) + (1 - a) * math.log((1 - a) / (1 - b)) for a, b in ((p, q), (q, p))]
    w = p / q
    return {"k1": math.log(w), "k2": math.log(w) ** 2 / 2, "k3": w - 1 - math.log(w), "binary-kl": max(both)}[
        name
    ]


@pytest.mark.parametrize("reads", ["token", *REDUCED])
@pytest.mark.parametrize("name", ["k1", "k2", "k3", "binary-kl"])
def test_a_rule_rejects_what_lies_outside(name: str, reads: str) -> None:
    if (name, reads) == ("k1", "sequence-max"):
        with pytest.raises(ConfigError, match="k1 has a sign"):
            Rejection.parse("sequence-max-k1:0.5..2")
        return
    each = [
        [of_token(name, o, r) for o, r in zip(a, b, strict=True)] for a, b in zip(OLD, ROLLOUT, strict=True)
    ]
    torch.testing.assert_close(distance(name, flat(OLD), flat(ROLLOUT)), flat(each))
    seen = each if reads == "token" else [[REDUCED[reads](part)] * len(part) for part in each]
    bound = "0.8..1.2" if name == "k1" else "0.05"
    kept = [[float(0.8 <= math.exp(x) <= 1.2 if name == "k1" else x <= 0.05) for x in part] for part in seen]
    found = correction_weight(None, parse_rules(f"{reads}-{name}:{bound}"), flat(OLD), flat(ROLLOUT), reduce)
    assert found.tolist() == flat(kept).tolist()
    assert 0 < found.sum() < 6, "the rule tells them apart"


def test_several_rules_and_a_weight_hold_together() -> None:
    used = configure("grpo", {"correction": "tis-token", "correction_low": 0.9, "correction_high": 1.1})
    assert used.rules == ()
    rules = parse_rules("token-k2:0.1, sequence-max-k3:0.2")
    found = correction_weight(used.corrects, rules, flat(OLD), flat(ROLLOUT), reduce)
    weight = [
        min(max(math.exp(o - r), 0.9), 1.1)
        for o, r in zip(flat(OLD).tolist(), flat(ROLLOUT).tolist(), strict=True)
    ]
    k2 = [
        of_token("k2", o, r) <= 0.1 for o, r in zip(flat(OLD).tolist(), flat(ROLLOUT).tolist(), strict=True)
    ]
    k3 = [True, True, True, True, False, False]
    expected = [w * a * b for w, a, b in zip(weight, k2, k3, strict=True)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    assert len({*expected}) > 2


def test_a_lower_bound_acts_and_none_is_the_default() -> None:
    w = torch.tensor([-3.0, 0.0, 3.0], dtype=torch.float64)
    assert truncate(w).tolist() == [math.exp(-3), 1.0, 2.0]
    assert truncate(w, low=0.5).tolist() == [0.5, 1.0, 2.0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("k2:0.1", "is not READS-DISTANCE:BOUND"),
        ("token-k4:0.1", "DISTANCE one of k1, k2, k3, binary-kl"),
        ("token-k2", "the bound is a number"),
        ("token-k2:0.1..2", "the bound is a number"),
        ("token-k1:2", "LOW..HIGH of k1"),
        ("token-k1:2..0.5", "leaves nothing"),
        ("token-k2:nan", "leaves nothing"),
        ("token-k2:0.1,", "is not READS-DISTANCE:BOUND"),
    ],
)
def test_a_rule_that_cannot_be_meant_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configure("grpo", {"rejection": text})


def test_a_loss_with_its_own_ratio_to_the_sampler_takes_no_correction() -> None:
    for params in ({"correction": "tis-token"}, {"rejection": "token-k2:1"}):
        with pytest.raises(ConfigError, match="would be corrected twice"):
            configure("dppo-tv", params)
    with pytest.raises(ConfigError, match="there is no correction"):
        configure("grpo", {"correction_normalized": True})
    assert configure("dppo-tv", {"rejection": "token-k2:1"}, "tests.losses.wrong:declared").rules


# --- the KL in the loss -----------------------------------------------------------------------------------

LOGITS = torch.tensor([0.3, -0.8, 1.1, 0.0], dtype=torch.float64)
REFERENCE = torch.tensor([0.1, 0.4, 0.2, -0.9], dtype=torch.float64).log_softmax(0)


def expected_gradient(estimator: str, **options: float) -> Tensor:
    """E over y of d k(y) / d logits, by enumeration: the sample itself has no gradient."""
    logits = LOGITS.clone().requires_grad_()
    log_p = logits.log_softmax(0)
    value = kl(estimator, log_p, REFERENCE, log_p.detach(), **options)  # type: ignore[arg-type]
    return torch.autograd.grad((log_p.detach().exp() * value).sum(), logits)[0]


def gradient_of(divergence) -> Tensor:
    logits = LOGITS.clone().requires_grad_()
    return torch.autograd.grad(divergence(logits.log_softmax(0)), logits)[0]


def reverse(log_p: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - REFERENCE)).sum()


def forward(log_p: Tensor) -> Tensor:
    return (REFERENCE.exp() * (REFERENCE - log_p)).sum()


def variation(log_p: Tensor) -> Tensor:
    return (log_p.exp() - REFERENCE.exp()).abs().sum() / 2


@pytest.mark.parametrize(
    ("estimator", "divergence"),
    [
        ("k2", reverse),
        ("k3_straight", reverse),
        ("k3_score", reverse),
        ("k3_iw", reverse),
        ("k3", forward),
        ("abs", lambda log_p: 2 * variation(log_p)),
    ],
)
def test_the_expected_gradient_of_each_estimator_is_that_of_the_table(estimator: str, divergence) -> None:
    torch.testing.assert_close(expected_gradient(estimator), gradient_of(divergence))


def test_k1_has_none() -> None:
    assert expected_gradient("k1").abs().max() < 1e-15
    assert gradient_of(reverse).abs().max() > 0.05, "while the KL has one"


def test_values_and_caps() -> None:
    x = torch.tensor([0.5, -0.25, 3.0], dtype=torch.float64)  # ref - log_prob
    log_prob = (-1 - x).requires_grad_()
    ref = torch.full_like(x, -1.0)
    k3 = x.exp() - x - 1
    for estimator in ("k3_straight", "k3_score"):
        torch.testing.assert_close(kl(estimator, log_prob, ref), k3)  # type: ignore[arg-type]
    torch.testing.assert_close(kl("abs", log_prob, ref), x.abs())
    capped = kl("k3", log_prob, ref, cap=10.0)
    torch.testing.assert_close(capped, k3.clamp(max=10.0))
    assert torch.autograd.grad(capped.sum(), log_prob)[0][2] == 0, "what a cap costs"
    straight = kl("k3_straight", log_prob, ref, cap=10.0)
    torch.testing.assert_close(straight, k3.clamp(max=10.0))
    torch.testing.assert_close(torch.autograd.grad(straight.sum(), log_prob)[0], -x)
    assert kl("k1", log_prob, ref, cap=0.25).tolist() == [-0.25, 0.25, -0.25]
