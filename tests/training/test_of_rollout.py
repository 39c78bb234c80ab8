"""What is known of all tokens of a rollout: marks, the scale of a correction, turns as steps, likelihood."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from mcore_rl.algo.algorithms import configure
from mcore_rl.training.advantage import Scores, compute_advantages
from mcore_rl.training.batch import RolloutBatch, build_batch
from mcore_rl.types import Group, Prompt, Sample, Segment, VersionSpan
from mcore_rl.verify.layouts.problem import drawn, record, recorded_groups

PROMPT = Prompt("p", "", (1, 2), "")


def segment(log_probs: list[float], trained: list[bool]) -> Segment:
    tokens, count = (5,) * len(trained), sum(trained)
    assert count == len(log_probs)
    context = np.array([1, 2], np.int32)
    return Segment(context, tokens, tuple(log_probs), (VersionSpan("0", 0, count),), np.array(trained))


def batch() -> RolloutBatch:
    """Two samples: turns of 2 and 1 tokens and, in a segment of its own, 2; and one turn of 3."""
    many = (segment([-0.5, -1.0, -0.2], [True, True, False, True]), segment([-0.9, -0.4], [True, True]))
    one = (segment([-0.3, -0.6, -0.1], [True, True, True]),)
    samples = [
        Sample(f"g@1/{k}", PROMPT, its, "", "stop", r)
        for k, (its, r) in enumerate(((many, 1.0), (one, -0.5)))
    ]
    return build_batch([Group("g@1", tuple(samples))])


OLD = [np.array([-0.6, -0.4, -0.25, -2.0, -0.4]), np.array([-0.1, -0.7, -np.inf])]
VALUES = [np.array([0.1, 0.9, 0.4, -0.3, 0.7]), np.array([0.2, 0.5, 0.8])]


def advantages(name: str, **params: Any):
    algorithm = configure(name, params)
    scores = Scores(dict(enumerate(OLD)), [], VALUES if algorithm.needs_critic else [])
    return compute_advantages(batch(), algorithm, scores)


def test_a_step_of_gae_may_be_a_turn() -> None:
    """Turns (0, 1), (2), (3, 4) and (0, 1, 2); by hand, with one value for each."""
    found = advantages("ppo", gae_steps="turn", gamma=0.9, lam=0.5, kl_in_reward=0, whiten=False)
    v = [0.1, 0.4, -0.3]
    delta = [0.9 * v[1] - v[0], 0.9 * v[2] - v[1], 1.0 - v[2]]
    a = [delta[0] + 0.45 * (delta[1] + 0.45 * delta[2]), delta[1] + 0.45 * delta[2], delta[2]]
    np.testing.assert_allclose(found.fields["advantage"][0], [a[0], a[0], a[1], a[2], a[2]], rtol=1e-12)
    np.testing.assert_allclose(found.fields["advantage"][1], [-0.7] * 3, rtol=1e-12)
    returns = [x + y for x, y in zip(a, v, strict=True)]
    np.testing.assert_allclose(found.fields["return"][0], [returns[i] for i in (0, 0, 1, 2, 2)], rtol=1e-12)
    tokens = advantages("ppo", gamma=0.9, lam=0.5, kl_in_reward=0, whiten=False)
    assert not np.allclose(tokens.fields["advantage"][0], found.fields["advantage"][0]), "the control"


def test_marks_are_per_token_and_leave_out_what_is_not_finite() -> None:
    found = advantages("m2po", second_moment=0.05)
    far = [
        [abs(o - r) for o, r in zip(old, s.log_probs, strict=True)]
        for old, s in zip(OLD, batch().samples, strict=True)
    ]
    order = sorted(x for part in far for x in part if math.isfinite(x))
    left = max(k for k in range(len(order) + 1) if k == 0 or sum(x * x for x in order[:k]) / k <= 0.05)
    limit = order[left]
    expected = [[float(math.isfinite(x) and x >= limit) for x in part] for part in far]
    assert [part.tolist() for part in found.fields["marked"]] == expected
    assert 0 < sum(map(sum, expected)) < 7


@pytest.mark.parametrize("rules", ["", "token-k1:0.5..1.5", "sequence-max-k2:0.1", "sequence-mean-k3:0.05"])
def test_a_correction_that_is_normalised_has_mean_1(rules: str) -> None:
    """The mean is over all usable tokens of the rollout; a sequence is a segment."""
    found = advantages("grpo", correction="tis-token", rejection=rules, correction_normalized=True)
    one, other = (list(map(float, sample.log_probs)) for sample in batch().samples)
    sequences = [(OLD[0][:3], one[:3]), (OLD[0][3:], one[3:]), (OLD[1], other)]
    weights = []
    for old, rollout in sequences:
        d = [o - r for o, r in zip(old, rollout, strict=True) if math.isfinite(o)]
        k3 = sum(math.exp(x) - 1 - x for x in d) / len(d)
        for x in d:
            keep = {
                "": True,
                "token-k1:0.5..1.5": 0.5 <= math.exp(x) <= 1.5,
                "sequence-max-k2:0.1": max(y * y / 2 for y in d) <= 0.1,
                "sequence-mean-k3:0.05": k3 <= 0.05,
            }[rules]
            weights.append(min(math.exp(x), 2.0) * keep)
    mean = sum(weights) / len(weights)
    np.testing.assert_allclose(found.fields["correction_scale"], [1 / mean] * 2, rtol=1e-12)
    assert 0 < mean != 1
    assert "correction_scale" not in advantages("grpo", correction="tis-token").fields


def test_the_recorded_problem_of_the_layouts_rejects_some_and_keeps_some() -> None:
    """Otherwise `verify layouts` would prove nothing of rules, and of what is over what they keep."""
    samples = build_batch(recorded_groups()).samples
    own = [-np.abs(x) - 0.1 for x in drawn([np.zeros(s.trained_tokens) for s in samples], 1)]
    recorded = record("gspo-kept", own)
    algorithm = recorded.algorithm
    whole = compute_advantages(
        recorded.batch, algorithm, Scores(dict(enumerate(recorded.fields["old_log_prob"])))
    )
    for rule in algorithm.rejection.split(","):
        alone = replace(algorithm, rejection=rule.strip(), correction="none")
        found = compute_advantages(
            recorded.batch, alone, Scores(dict(enumerate(recorded.fields["old_log_prob"])))
        )
        kept = 1 / found.fields["correction_scale"][0]
        assert 0.1 < kept < 0.99, rule
    assert torch.isfinite(torch.tensor(whole.fields["correction_scale"])).all()


def test_the_likelihood_of_positive_samples_is_over_their_tokens_alone() -> None:
    """VAPO: mu / (tokens of positive samples) times -log_prob, beside a policy term of its own weight."""
    from tests.training.test_objective import objective_of_rows

    loss, _, log_prob, _ = objective_of_rows(None, "grpo", params={"positive_nll": 0.5})
    plain, _, same, _ = objective_of_rows(None, "grpo")
    extra = torch.autograd.grad(loss, log_prob)[0] - torch.autograd.grad(plain, same)[0]
    # rows_of: nll_weight is 0.1 of the first two rows, whatever their weight is
    torch.testing.assert_close(extra, torch.tensor([-0.05, -0.05, 0.0, 0.0]))
    torch.testing.assert_close(loss - plain, 0.05 * -(log_prob[0] + log_prob[1]))
