"""Every parameter of every algorithm changes the gradient of a rollout's updates, or is refused or warned of.

The gradient is that by each token's log-prob, over the two mini-batches of a fixed rollout: the first is on
policy, in the second the policy has moved. A reference, a critic and another engine's log-probs are there.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from mcore_rl.algo.algorithms import ALGORITHMS, _accepted, configure
from mcore_rl.config.effects import doubtful, params_without_effect
from mcore_rl.errors import ConfigError
from mcore_rl.parallel.head import HeadOutput
from mcore_rl.parallel.layout import Layout
from mcore_rl.parallel.mesh import Mesh
from mcore_rl.training.advantage import Scores, compute_advantages
from mcore_rl.training.batch import Batching, RolloutBatch, build_batch, pack_mini_batch
from mcore_rl.training.kl_control import KLControl
from mcore_rl.training.metrics import Gathered, read
from mcore_rl.training.objective import PolicyObjective
from mcore_rl.types import Group, Prompt, RewardPart, Sample, VersionSpan

LENGTHS = (3, 5, 2, 4)
REWARDS = ((1.0, 0.0, 0.25, 0.0), (0.0, 1.0, 0.75, 0.5))
OTHER: Mapping[str, tuple[object, ...]] = {
    "aggregation": ("seq-mean-token-sum", "token-mean"),
    "std": ("none", "group", "batch"),
    "ddof": (0,),
    "eps": (0.1,),
    "eps_low": (0.9, 0.05),
    "eps_high": (0.9, 0.05),
    "dual_clip": (1.2,),
    "delta": (0.001, 0.5),
    "tau_pos": (2.0,),
    "tau_neg": (2.0,),
    "gamma": (0.9,),
    "lam": (0.5,),
    "kl_in_reward": (0.5,),
    "kl_target": (0.02,),
    "kl_horizon": (20.0,),
    "alpha": (0.9,),
    "kl_in_loss": (0.5,),
    "kl_estimator": ("k1", "k2", "k1_iw", "abs", "k3_straight", "k3_score"),
    "kl_cap": (0.001,),
    "positive_nll": (0.5,),
    "half_life": (0.5,),
    "weight_low": (0.5,),
    "weight_high": (1.01,),
    "rejection": ("token-k1:0.99..1.01", "sequence-max-k2:0.0001"),
    "whiten_ddof": (0,),
    "gae_steps": ("turn",),
    "clip_low": (0.05,),
    "clip_high": (0.05,),
    "k_pos": (5.0,),
    "k_neg": (5.0,),
    "lambda_pos": (0.5,),
    "lambda_neg": (0.5,),
    "cap": (0.9,),
    "tv_low": (1e-5,),
    "tv_high": (1e-5,),
    "kl_low": (1e-9,),
    "kl_high": (1e-9,),
    "drift": (0.5,),
    "second_moment": (1e-5,),
    "fraction": (0.3,),
    "penalty": (0.1,),
    "cov_low": (0.2,),
    "cov_high": (0.2,),
    "tau": (3.0,),
    "k": (3,),
    "lam_critic": (0.5,),
    "length_factor": (0.5,),
    "entropy_coef": (0.1,),
    "correction": ("mis-token", "geometric"),
    "correction_low": (0.9999,),
    "correction_high": (0.9999, 1.02),
}
"""values that are no entry's default"""
NEEDS: Mapping[str, Mapping[str, object]] = {
    "correction_low": {"correction": "mis-token"},
    "correction_high": {"correction": "tis-token"},
    "kl_estimator": {"kl_in_loss": 0.1},
    "kl_cap": {"kl_in_loss": 0.1},
    "correction_normalized": {"correction": "tis-token"},
    "kl_horizon": {"kl_target": 0.02},
}
"""what gives a parameter a meaning; each is refused without it, which is tried too"""
OF_LATER_ROLLOUTS = ("kl_target", "kl_horizon")
"""parameters that act on the next rollout"""
OF_CRITIC = ("lam_critic",)
"""parameters that act on what the critic learns from alone"""
ELSEWHERE = ("observation_nll", "decay", "role")
"""parameters of what this rollout has not: tokens between turns, and steps; tests/training/test_outside.py"""
BESIDE: Mapping[str, Mapping[str, object]] = {"clip-cov": {"cov_low": 0.01, "fraction": 0.5}}
"""what makes an algorithm act on this little rollout at all"""


def sample(group: int, number: int) -> Sample:
    tokens, reward = LENGTHS[number], REWARDS[group][number]
    made = Sample.of_response(
        f"{group}@1/{number}",
        Prompt(str(group), "", (1, 2), ""),
        (5,) * tokens,
        tuple(noise(group, number, 0, tokens).tolist()),
        "",
        "stop",
        (VersionSpan("0", 0, tokens),),
        reward,
    )
    parts = (RewardPart("right", reward, 1.0), RewardPart("short", 1.0 / tokens, 0.5))
    return Sample(**{**vars_of(made), "parts": parts})


def vars_of(made: Sample) -> dict[str, Any]:
    return {name: getattr(made, name) for name in Sample.__dataclass_fields__}


def noise(group: int, number: int, what: int, tokens: int) -> np.ndarray:
    """Log-probs of a kind: 0 the server's, 1 the policy's before its updates, 2 moved, 3 the reference's."""
    near = np.random.default_rng([group, number]).uniform(-2, -0.5, tokens)
    mean = (-0.1, 0.1)[number % 2] if what == 2 else 0.0
    moved = np.random.default_rng([what, group, number]).normal(mean, (0.02, 0.0, 0.2, 0.2)[what], tokens)
    return np.minimum(near + moved, -0.01)


@cache
def batch() -> RolloutBatch:
    return build_batch([Group(f"{g}@1", tuple(sample(g, n) for n in range(4))) for g in range(2)])


def of_samples(what: int) -> list[np.ndarray]:
    return [noise(int(s.id[0]), int(s.id[-1]), what, s.trained_tokens) for s in batch().samples]


def gradient(name: str, params: Mapping[str, object]) -> tuple[torch.Tensor, dict[str, float]]:
    """By each token's log-prob, in each mini-batch, then the critic's returns; and what was measured.

    A coefficient of the KL is adapted between the two, as if they were of two rollouts.
    """
    return _gradient(name, tuple(params.items()))


@cache  # every parameter of an algorithm is compared with the same
def _gradient(name: str, items: tuple[tuple[str, object], ...]) -> tuple[torch.Tensor, dict[str, float]]:
    params = dict(items)
    algorithm, samples = configure(name, params), batch().samples
    before, moved = of_samples(1), of_samples(2)
    of_prompts = algorithm.values_prompts
    critic = [np.linspace(0.1, 0.4, s.trained_tokens) for s in samples]
    critic = [np.array([(0.1, 0.9)[int(s.id[0])]]) for s in samples] if of_prompts else critic
    critic = critic if algorithm.needs_critic else []
    reference = of_samples(3) if algorithm.needs_reference else []
    outside = {
        "following": [0.3] * len(samples) if algorithm.bootstrap else [],
        "energy": [np.linspace(0.1, 1, s.trained_tokens) for s in samples] if algorithm.by_token else [],
        "baselines": [0.0] * len(samples) if algorithm.baseline == "none" else np.linspace(0, 1, 8).tolist(),
    }
    scores, control = Scores(dict(enumerate(before)), reference, critic, **outside), KLControl(algorithm)
    first = compute_advantages(batch(), control.algorithm, scores)
    control.observe(first.metrics, 4000)
    later = compute_advantages(batch(), control.algorithm, scores)
    shape = Batching(2, 256, 5, lambda n: np.asarray(n, float), 1)
    mesh = cast(Mesh, SimpleNamespace(layout=Layout(), dp_rank=0))
    found, parts = [], []
    for update, (members, now) in enumerate(((range(0, 8, 2), before), (range(8), moved))):
        its = {**(first if update == 0 else later).fields, "now": now} | (
            {} if update == 0 else {"old_log_prob": before}
        )
        (packed,) = pack_mini_batch(batch(), np.array(members), algorithm, shape, mesh, its)
        log_prob = packed.fields["now"].clone().requires_grad_()
        entropy = -log_prob * 0.5  # whatever it is: it follows from the logits too
        loss, measure = PolicyObjective(algorithm, None)(packed, HeadOutput(log_prob, entropy))
        parts.append(measure())
        (of_rows,) = torch.autograd.grad(loss, log_prob)
        found.append(of_rows)
    returns = np.concatenate([np.zeros(0), *map(np.atleast_1d, later.fields.get("return", ()))])
    return torch.cat([*found, torch.from_numpy(returns)]), read(Gathered(parts)._parts, 2)


def is_refused(name: str, params: Mapping[str, object]) -> bool:
    try:
        return bool(list(params_without_effect(configure(name, params), params)))
    except ConfigError:
        return True


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-5, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_parameter_changes_the_gradient_or_is_refused_or_warned_of(name: str) -> None:
    """Over all updates of a rollout, and in one that has a single one."""
    first = sum(s.trained_tokens for s in batch().samples[0:8:2])
    for key in _accepted(ALGORITHMS[name]).keys() - {*ELSEWHERE}:
        values = OTHER.get(key) or (not getattr(ALGORITHMS[name], key),)
        context = {**BESIDE.get(name, {}), **NEEDS.get(key, {})}
        given = [{**context, key: value} for value in values if not is_refused(name, {**context, key: value})]
        assert key not in NEEDS or is_refused(name, {key: values[0]}), f"{key} has no meaning alone"
        if is_refused(name, context):
            assert not given
            continue
        usual, changed = gradient(name, context)[0], [gradient(name, params)[0] for params in given]
        assert not given or not all(same(one, usual) for one in changed), f"{key} changes nothing"
        assert given or is_refused(name, {**context, key: values[0]})
        if key in (*OF_LATER_ROLLOUTS, *OF_CRITIC):
            continue
        silent = given and all(same(one[:first], usual[:first]) for one in changed)
        assert bool(silent) == bool(given and warned(name, given[0])), (
            f"{key} in the only update of a rollout"
        )


def warned(name: str, params: Mapping[str, object]) -> bool:
    rates = {"optimizer.lr": 1e-6}
    said = doubtful(configure(name, params), params, updates=1, stale=False, rates=rates, tokens=99)
    return any(what.startswith("algorithm.params") for what in said)


SILENT = {(name, "clip/fraction") for name in ("rloo", "reinforce", "opo", "remax", "rae", "otb")}
"""metrics that are 0 whatever happens, and why: a loss that is never clipped says so"""
NARROW: dict[str, dict[str, float]] = {
    "sapo": {"tau_pos": 9.0, "tau_neg": 9.0},
    "sapo-sequence": {"tau_pos": 40.0, "tau_neg": 40.0},
    "vespo": {"k_pos": 50.0, "lambda_pos": 50.0, "k_neg": 50.0, "lambda_neg": 50.0},
    "m2po": {"second_moment": 1e-5},
}
"""parameters with which the clip or gate acts on this little rollout"""


@pytest.mark.parametrize("name", ALGORITHMS)
def test_no_metric_is_always_zero(name: str) -> None:
    wide = {key: 1e-5 for key in ("eps_low", "eps_high") if key in _accepted(ALGORITHMS[name])}
    _, measured = gradient(name, wide | NARROW.get(name, {}))
    zero = {(name, key) for key, value in measured.items() if value == 0}
    assert zero - {(name, "masked/fraction")} == SILENT & {(name, "clip/fraction")}
