"""A preset gives the update of the trainer it is named after: weights of a policy after 5 AdamW updates.

Each trainer's update is written anew, padded and with masks as these have them, from its documentation and
the papers: advantages, loss and aggregation. On the other side is the path of a run: advantages, packing,
objective.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor

from mcore_rl.algo.algorithms import Algorithm, configure
from mcore_rl.algo.presets import PRESETS
from mcore_rl.config.effects import params_without_effect
from mcore_rl.parallel.head import HeadOutput
from mcore_rl.parallel.mesh import Layout, Mesh
from mcore_rl.training.advantage import Scores, compute_advantages
from mcore_rl.training.batch import Batching, build_batch, pack_mini_batch
from mcore_rl.training.objective import PolicyObjective
from mcore_rl.types import Group, Prompt, Sample, VersionSpan

LENGTHS = (3, 5, 2, 4, 6, 1, 3, 4)
REWARDS = torch.tensor([1.0, 0.0, 0.25, 0.0, 0.0, 1.0, 1.0, 0.5], dtype=torch.float64)
LONGEST, VOCAB, FEATURES, MAX_LENGTH, UPDATES, RATE = 6, 7, 5, 8, 5, 0.05
MASK = (torch.arange(LONGEST) < torch.tensor(LENGTHS)[:, None]).double()
GENERATOR = torch.Generator().manual_seed(4)
INPUTS = torch.randn(8, LONGEST, FEATURES, generator=GENERATOR, dtype=torch.float64)
TOKENS = torch.randint(VOCAB, (8, LONGEST), generator=GENERATOR)
START = 0.3 * torch.randn(FEATURES, VOCAB, generator=GENERATOR, dtype=torch.float64)
NOISE = torch.randn(8, LONGEST, generator=GENERATOR, dtype=torch.float64)
VALUES = torch.randn(8, LONGEST, generator=GENERATOR, dtype=torch.float64)


def log_probs(weights: Tensor) -> Tensor:
    """[8, LONGEST] of the tokens."""
    return (INPUTS @ weights).log_softmax(-1).gather(-1, TOKENS[..., None])[..., 0]


OLD = log_probs(START)
REFERENCE = OLD + 0.2 * NOISE.flip(0)
ENGINE = (OLD + NOISE).clamp(max=-0.01)


@dataclass
class Padded:
    """What a trainer's loss is given; [8, LONGEST]."""

    now: Tensor
    rollout: Tensor
    old: Tensor = OLD
    mask: Tensor = MASK


def train(gradient: Callable[[Tensor, int], Tensor]) -> Tensor:
    """The weights after UPDATES of AdamW."""
    weights = START.clone().requires_grad_()
    optimizer = torch.optim.AdamW([weights], lr=RATE, betas=(0.9, 0.99), weight_decay=0.05)
    for update in range(UPDATES):
        weights.grad = gradient(weights, update)
        optimizer.step()
    return weights.detach()


def by_library(algorithm: Algorithm, rollout: Tensor) -> Tensor:
    samples = []
    for i, tokens in enumerate(LENGTHS):
        its = tuple(rollout[i, :tokens].tolist())
        versions = (VersionSpan("0", 0, tokens),)
        prompt = Prompt(str(i // 4), "", (1, 2), "")
        name, reward = f"{i // 4}@1/{i % 4}", REWARDS[i].item()
        samples.append(Sample.of_response(name, prompt, (5,) * tokens, its, "", "stop", versions, reward))
    batch = build_batch([Group("0@1", tuple(samples[:4])), Group("1@1", tuple(samples[4:]))])

    def cut(values: Tensor) -> list[np.ndarray]:
        return [row[:n].detach().numpy() for row, n in zip(values, LENGTHS, strict=True)]

    old = dict(enumerate(cut(OLD)))
    scores = Scores(old, cut(REFERENCE), cut(VALUES) if algorithm.needs_critic else [])
    found = compute_advantages(batch, algorithm, scores)
    shape = Batching(1, 1024, MAX_LENGTH, lambda n: np.asarray(n, float), 1)
    mesh = cast(Mesh, SimpleNamespace(layout=Layout(), dp_rank=0))
    at = dict(enumerate(cut(torch.arange(8 * LONGEST).reshape(8, LONGEST).double())))

    def gradient(weights: Tensor, update: int) -> Tensor:
        later = {"old_log_prob": old} if update else {}
        fields = {**found.fields, **later, "at": at}
        total = torch.zeros((), dtype=torch.float64)
        for packed in pack_mini_batch(batch, np.arange(8), algorithm, shape, mesh, fields):
            rows = log_probs(weights).reshape(-1)[packed.fields["at"].long()]
            total = total + PolicyObjective(algorithm, None)(packed, HeadOutput(rows, -rows))[0]
        return torch.autograd.grad(total, weights)[0]

    return train(gradient)


# --- the trainers -----------------------------------------------------------------------------------------


def normalized(eps: float, *, std: bool = True) -> Tensor:
    groups = REWARDS.view(2, 4)
    gap = groups - groups.mean(1, keepdim=True)
    return (gap / (groups.std(1, keepdim=True) + eps) if std else gap).reshape(8, 1)


def others() -> Tensor:
    """NeMo-RL: each reward beside mean and std of the other three."""
    found = []
    for group in REWARDS.view(2, 4):
        for i in range(4):
            rest = torch.cat([group[:i], group[i + 1 :]])
            gap = group[i] - rest.mean()
            found.append(gap / (rest.std() + 1e-6) if rest.std() > 0 else gap)
    return torch.stack(found)[:, None]


def token_mean(loss: Tensor, mask: Tensor = MASK) -> Tensor:
    return (loss * mask).sum() / mask.sum()


def sequence_mean(loss: Tensor, mask: Tensor = MASK) -> Tensor:
    return ((loss * mask).sum(1) / mask.sum(1)).mean()


def clipped(ratio: Tensor, a: Tensor, low: float, high: float, dual: float | None = None) -> Tensor:
    loss = -torch.minimum(ratio * a, ratio.clamp(1 - low, 1 + high) * a)
    return loss if dual is None else torch.where(a < 0, torch.minimum(loss, -a * dual), loss)


def of_sequence(p: Padded) -> Tensor:
    return (((p.now - p.old) * p.mask).sum(1, keepdim=True) / p.mask.sum(1, keepdim=True)).exp()


def trl(kind: str, low: float = 0.2, high: float = 0.2) -> Callable[[Padded], Tensor]:
    """GRPOTrainer beside vLLM: sequence_mask of importance sampling at 3, eps 1e-4."""

    def loss(p: Padded) -> Tensor:
        a, ratio = normalized(1e-4), (p.now - p.old).exp()
        if kind in ("gspo", "luspo"):
            each = clipped(of_sequence(p), a, low, high).expand(8, LONGEST)
        elif kind == "cispo":
            each = -ratio.clamp(max=high).detach() * a * p.now
        elif kind == "sapo":
            tau = torch.where(a > 0, 1.0, 1.05)
            each = -torch.sigmoid(tau * (ratio - 1)) * 4 / tau * a
        else:
            each = clipped(ratio, a, low, high)
        weight = ((p.old - p.rollout) * p.mask).sum(1, keepdim=True).exp()
        assert 0 < (weight > 3).sum() < 8
        each = each * torch.where(weight <= 3, weight, 0.0)
        if kind in ("dapo", "cispo"):
            return token_mean(each)
        if kind == "dr_grpo":
            return (each * p.mask).sum() / (8 * MAX_LENGTH)
        return (each * p.mask).sum(1).mean() if kind == "luspo" else sequence_mean(each)

    return loss


def trl_vespo(p: Padded) -> Tensor:
    a = normalized(1e-4)
    log_w = ((p.now.detach() - p.rollout) * p.mask).sum(1, keepdim=True)
    k, decay = torch.where(a >= 0, 2.0, 3.0), torch.where(a >= 0, 3.0, 2.0)
    return token_mean(-(decay + k * log_w - decay * log_w.exp()).exp() * a * p.now)


def verl(kind: str, high: float = 0.2, dual: float | None = 3.0) -> Callable[[Padded], Tensor]:
    def loss(p: Padded) -> Tensor:
        a, ratio = normalized(1e-6), (p.now - p.old).exp()
        if kind == "gspo":
            return sequence_mean(clipped(of_sequence(p), a, 3e-4, 4e-4).expand(8, LONGEST))
        if kind == "sapo":
            tau = torch.where(a > 0, 1.0, 1.05)
            return sequence_mean(-torch.sigmoid(tau * (ratio - 1)) * 4 / tau * a)
        if kind == "cispo":
            return token_mean(-ratio.clamp(0.8, 1.2).detach() * a * p.now)
        if kind == "geo_mean":
            d, sign = p.now - p.old, a.sign()
            least = sign * torch.minimum(sign * d, sign * d.clamp(-0.2, 0.2))
            return (-a[:, 0] * ((least * p.mask).sum(1) / p.mask.sum(1)).exp()).mean()
        if kind.startswith("dppo"):
            now, mu = p.now.detach().exp(), p.old.exp()
            if kind == "dppo_tv":
                keep = torch.where(a > 0, now - mu <= 0.2, now - mu >= -0.2)
            else:
                kl = mu * (mu / now).log() + (1 - mu) * ((1 - mu) / (1 - now)).log()
                keep = (kl <= 0.2) | torch.where(a > 0, now <= mu, now >= mu)
            return token_mean(-a * ratio.clamp(max=3.0).detach() * p.now * keep)
        return token_mean(clipped(ratio, a, 0.2, high, dual))

    return loss


def verl_ppo(p: Padded) -> Tensor:
    """GAE at gamma = lam = 1 is the return less the value; whitened over n - 1; dual clip."""
    a = REWARDS[:, None] - VALUES
    flat = a[p.mask > 0]
    a = (a - flat.mean()) / (flat.var() + 1e-8).sqrt()
    return token_mean(clipped((p.now - p.old).exp(), a, 0.2, 0.2, 3.0))


def nemo(p: Padded) -> Tensor:
    x = REFERENCE - p.now
    kl = (p.now - p.now.detach()).exp() * (x.exp() - x - 1).clamp(-10, 10)
    return token_mean(clipped((p.now - p.old).exp(), others(), 0.2, 0.2) + 0.01 * kl)


def prime(p: Padded) -> Tensor:
    a, log_r = normalized(0.0, std=False), p.now - p.rollout
    gap = p.now.exp() - p.rollout.exp()
    masked = torch.where(a > 0, gap > 0.2, gap < -0.2)
    return token_mean(torch.where(masked, 0.0, -a * log_r.exp()) + 1e-3 * log_r.square())


TRAINERS: dict[str, Callable[[Padded], Tensor]] = {
    "trl-grpo": trl("dapo"),
    "trl-grpo-paper": trl("grpo"),
    "trl-dapo": trl("dapo", high=0.28),
    "trl-dr-grpo": trl("dr_grpo"),
    "trl-gspo": trl("gspo", 3e-4, 4e-4),
    "trl-luspo": trl("luspo", 3e-4, 4e-4),
    "trl-sapo": trl("sapo"),
    "trl-cispo": trl("cispo", high=5.0),
    "trl-vespo": trl_vespo,
    "verl-ppo": verl_ppo,
    "verl-grpo": verl("vanilla"),
    "verl-dapo": verl("vanilla", high=0.28, dual=10.0),
    "verl-gspo": verl("gspo"),
    "verl-sapo": verl("sapo"),
    "verl-cispo": verl("cispo"),
    "verl-gmpo": verl("geo_mean"),
    "verl-dppo-tv": verl("dppo_tv"),
    "verl-dppo-kl": verl("dppo_kl"),
    "nemo-grpo": nemo,
    "prime-grpo": prime,
    "slime-grpo": lambda p: sequence_mean(clipped((p.now - p.old).exp(), normalized(1e-6), 0.2, 0.2)),
}
BY_ONE_UPDATE = {"verl-rloo", "verl-opo", "prime-maxrl"}
"""presets that are the trainer's in the only update of a rollout, as they say"""
TO_OLD = {"verl-dppo-tv", "verl-dppo-kl"}
"""whose trainer samples with the old policy, as they say"""


def by_trainer(loss: Callable[[Padded], Tensor], rollout: Tensor) -> Tensor:
    def gradient(weights: Tensor, update: int) -> Tensor:
        return torch.autograd.grad(loss(Padded(log_probs(weights), rollout)), weights)[0]

    return train(gradient)


def apart(one: Tensor, other: Tensor) -> float:
    return ((one - other).abs().max() / (other - START).abs().max()).item()


@pytest.mark.parametrize("name", TRAINERS)
def test_weights_after_five_updates_are_those_of_the_trainer(name: str) -> None:
    rollout = OLD if name in TO_OLD else ENGINE
    expected = by_trainer(TRAINERS[name], rollout)
    assert apart(by_library(configure(name), rollout), expected) < 3e-5
    assert (expected - START).abs().max() > 0.1


def test_every_preset_is_compared_and_says_what_is_left() -> None:
    slime = {"slime-gspo"}  # its two numbers are those of `gspo`
    assert {*TRAINERS, *BY_ONE_UPDATE, *slime} == set(PRESETS)
    assert all(PRESETS[name].differs for name in BY_ONE_UPDATE | TO_OLD)
    assert configure("slime-gspo") == configure("gspo")
    for name, preset in PRESETS.items():
        assert list(params_without_effect(configure(name), preset.params)) == [], name
    assert configure("trl-grpo", {"eps": 0.5}).advantage_params["eps"] == 0.5, "one's own number wins"


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("trl-grpo", {"eps": 0.1}),
        ("trl-grpo", {"correction": "none"}),
        ("verl-cispo", {"eps_low": 0.9}),
        ("nemo-grpo", {"kl_estimator": "k3"}),
        ("prime-grpo", {"drift": 0.01}),
    ],
)
def test_another_number_is_another_update(name: str, params: dict[str, object]) -> None:
    """The controls: a tolerance that would not see these proves nothing."""
    found = by_library(configure(name, params), ENGINE)
    assert apart(found, by_trainer(TRAINERS[name], ENGINE)) > 3e-4
